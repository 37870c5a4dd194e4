"""What `torch.compile` puts into its graphs: imported when it first traces the sampler, and not before.

Dynamo refuses an autograd.Function with a forward mode when it looks inside, and an operator with a
registered gradient loses forward mode without a word. So the call goes into the graph as it is, and
AOTAutograd takes it apart with all derivatives. Telling Dynamo so imports it, which would double the
time that `import tri_stn` takes.
"""

import torch

from . import autograd

torch.compiler.allow_in_graph([autograd._warp, autograd._warp_with_mask, autograd._splat])
