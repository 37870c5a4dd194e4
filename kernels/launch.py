"""Tensors to kernel arguments, sizes and strides x first; what follows from dtype and layout; and the start itself.

A small warp is over sooner than Python has got its launch together. All that a launch takes but the pointers
follows from the layouts of its tensors and from the options, so launchers work it out once for each (`Launch`), and
remember it.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import driver

_INT32_MAX = 2**31 - 1
_BATCHED = ("input", "input_tangent", "parameters", "parameters_tangent", "grad_output")
_REMEMBERED: list = []
OPTIONS = {"enable_fp_fusion": True}
"""Of every compilation. The default up to Triton 3.9, which tells every user that that of 3.10 is another."""


class Layout(NamedTuple):
    """What a launch must know of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


def contiguous(shape, dtype):
    """The layout of a new tensor."""
    return Layout(shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))), dtype)


def remembered(function):
    """A function of layouts and options → one of tensors, or None, and options, which works each out once and keeps
    the last few thousand, until `forget`.
    """

    @functools.lru_cache(2**12)
    def work_out(layouts, *options):
        return function(*[None if of is None else Layout(*of) for of in layouts], *options)

    @functools.wraps(function)
    def find(tensors, *options):
        return work_out(tuple([None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]), *options)

    _REMEMBERED.append(work_out)
    return find


def forget():
    """Where device functions or budgets have changed."""
    for function in _REMEMBERED:
        function.cache_clear()


class Launch:
    """A kernel with its grid and all that it takes but pointers, which are its first arguments.

    Triton's own call works out, every time, which compiled kernel its arguments ask for. That follows from what is
    held here, from which pointers there are and how they are aligned, and from the device: it is asked once for each.
    """

    def __init__(self, kernel, grid, arguments, constants):
        self.kernel, self.grid, self.arguments, self.constants = kernel, (*grid, 1), arguments, constants | OPTIONS
        # AMD's compiler asks for sizes of memory as well; Triton's interpreter compiles nothing.
        self._compiled = {} if isinstance(kernel, triton.JITFunction) and torch.version.hip is None else None

    def __call__(self, *pointers):
        if self._compiled is None:
            self.kernel[self.grid](*pointers, *self.arguments, **self.constants)
            return
        key = driver.active.get_current_device(), *[p if p is None else p.data_ptr() % 16 == 0 for p in pointers]
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[self.grid](*pointers, *self.arguments, *self._compile_time)
            return
        compiled = self.kernel[self.grid](*pointers, *self.arguments, **self.constants)
        if compiled is not None:
            self._compiled[key] = compiled

    @functools.cached_property
    def _compile_time(self):
        """The constants that are arguments, in their order: a kernel's last, all of them."""
        return [self.constants[name] for name in self.kernel.arg_names if name in self.constants]


def size(image):
    """(N, C, *size) → its spatial size, x first."""
    return tuple(reversed(image.shape[2:]))


def strides(image):
    """(N, C, *size) → strides of n, of c and of the pixels, x first."""
    return *image.strides[:2], *reversed(image.strides[2:])


def parameter_strides(parameters):
    """(N, K, *size, d) of a dense map → strides of n, of k, of the pixels, x first, and of the components."""
    n, k, *pixels, component = parameters.strides
    return n, k, *reversed(pixels), component


def shared_strides(field):
    """The same of a field that may serve all maps of an image."""
    n, k, *rest = parameter_strides(field)
    return n, 0 if field.shape[1] == 1 else k, *rest


def packed(dense, *parameters):
    """Parameters and their tangent as the kernels read them: a dense map in place, a few numbers per map next to each
    other; None where there is none.
    """
    return parameters if dense else tuple(None if p is None else p.contiguous() for p in parameters)


def packed_fill(fill):
    """The fill as the kernels read it, channels next to each other; None where there is none."""
    return None if fill is None else fill.contiguous()


COUNTS = ["maps", "slots", *(f"{name}_batch" for name in _BATCHED)]
"""Arguments that take any value: a compilation for each would serve nobody."""


def batches(batch, *tensors):
    """Those of tensors that serve a larger batch over and over; None for the others."""
    return tuple(None if t.shape[0] == batch else t.shape[0] for t in tensors)


def units(input_size, size, align_corners, dtype):
    """What the entries of a homogeneous matrix, x first, are multiplied by to take pixels of an output to pixels of an
    input, in fp32; None for images in fp64.
    """
    if dtype == torch.float64:
        return None
    source, target = ([(n - 1 if align_corners else n) / 2 for n in reversed(sizes)] for sizes in (input_size, size))
    return tuple([unit for s in (*source, 1.0) for unit in (*[s / n if n else 0.0 for n in target], s)])


def count(parameters):
    """Numbers per map in parameters (M, K, …)."""
    return math.prod(parameters.shape[2:])


def present(*tensors):
    """Those that are not None."""
    return tuple(t for t in tensors if t is not None)


def is_channels_last(image):
    """Whether channels lie next to each other in memory, and more than one channel does."""
    packed = contiguous(image.shape, image.dtype).strides
    orders = zip(image.shape, image.strides, packed, strict=True)
    return image.shape[1] > 1 and image.strides[1] == 1 and any(n > 1 and s != p for n, s, p in orders)


def compute_dtype(dtype):
    """What coordinates, weights and sums are computed in, for images of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def constants(*images, parameters):
    """Compile-time arguments that follow from the tensors: images, or what else has numbers of its own for each; the
    first decides the dtype.
    """
    far = max(*(_reach(i, 1) for i in images), *(_reach(p, 2) for p in parameters))
    return {
        "COMPUTE": tl.float64 if images[0].dtype == torch.float64 else tl.float32,
        "INDEX": tl.int64 if far > _INT32_MAX else tl.int32,
    }


def is_far(constants):
    """Whether a launch with these constants computes offsets in 64 bits."""
    return constants["INDEX"] == tl.int64


def _reach(tensor, first):
    """The largest element offset along the dimensions from `first` on."""
    return sum((n - 1) * s for n, s in zip(tensor.shape[first:], tensor.strides[first:], strict=True))
