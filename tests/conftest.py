"""Where the tests run: on a CUDA device if there is one; else through Triton's interpreter or, where EMULATE names an
architecture, what its compiler makes of the kernels for that, emulated.
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMULATE = os.environ.get("EMULATE") if DEVICE == "cpu" else None
if EMULATE:
    os.environ.pop("TRITON_INTERPRET", None)
    from triton import knobs

    knobs.runtime.interpret = False  # whatever the variable says, which sends tensors on the CPU to the kernels
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, so before they are

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import tri_stn.kernels  # noqa: E402  here, while the variable is set, whichever test comes first

import tri_stn  # noqa: E402

if EMULATE:
    from bench import emulator

    emulation = emulator.emulated(EMULATE)  # until the end
    emulation.__enter__()
elif DEVICE == "cpu":
    import interpreter  # noqa: F401


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Tests for a GPU only are skipped without one; with one, tests of the kernels are GPU tests too."""
    for item in items:
        if DEVICE == "cpu" and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
        elif DEVICE == "cuda" and getattr(item, "callspec", None) and item.callspec.params.get("backend") == "kernels":
            item.add_marker(pytest.mark.gpu)


compiled = pytest.mark.skipif(
    DEVICE == "cpu" and not EMULATE, reason="kernels are interpreted here; EMULATE=sm_90 runs what is compiled of them"
)
"""Of tests that need kernels to be compiled; whether for a device does not matter."""


interpreted = pytest.mark.skipif(DEVICE == "cuda" or bool(EMULATE), reason="looks into Triton's interpreter")


@pytest.fixture(params=["kernels"] if EMULATE else ["kernels", "reference"])
def backend(request, monkeypatch):
    """The device to put tensors on so that warp runs the kernels, or the reference."""
    if request.param == "kernels":
        return DEVICE
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tri_stn.ops, "_is_plain", lambda *_: False)  # the reference alone: test_cpu has the fast road
    return "cpu"


@pytest.fixture(autouse=True)
def nothing_remembered():
    """A test may change what launches follow from."""
    yield
    tri_stn.kernels.launch.forget()


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill every new tensor with NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(tri_stn.ops, "is_deterministic", lambda: False)  # the usual road, all the same
    # The interpreter computes with numpy, which warns where a GPU quietly makes an infinity.
    with np.errstate(all="ignore"):
        yield
    torch.use_deterministic_algorithms(False)
