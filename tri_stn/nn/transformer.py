"""The paper's module: localisation network, map, sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import MODES, PADDING_MODES, _check_choice, _check_fill, _check_size, warp
from .maps import NAMED, Constants, ParametricMap, real_device


class SpatialTransformer(Constants):
    """Look at the input, choose a map, read the input through it (Jaderberg et al. 2015, section 3).

    The localisation network gives, for each image, how far its map departs from the identity (``residual``), so that a
    network that starts at zero starts by reading the whole image, weight decay draws it there, and under autocast the
    identity is not rounded. The map's numbers are fp32 or wider.

    Args:
        localisation: a module from the input to (N, P), P the ``count`` of the transform, or (N, K × P) with
            ``parallel=K``; such as `FullyConnected` or `Convolutional`.
        transform: "affine", "attention", "similarity", "projective", "thin_plate_spline", "free_form" or
            "piecewise_affine"; or a `ParametricMap`, such as ``ProjectiveMap(dims=3)``.
        size: the output's ([D,] [H,] W) in pixels; an integer for all axes; by default the input's.
        parallel: K maps per image, each with an output of its own. The input is not copied.
        bounds: how far each number may go from where it starts, either way: one for all, or a tensor (P,). The
            departure r becomes ``bounds * tanh(r / bounds)``.
        residual: False if localisation gives the map's numbers themselves, as networks do that were made elsewhere,
            with the identity in their last bias.
        mode, padding_mode, align_corners, antialias, fill: as of `tri_stn.warp`.
        sampler: what reads the input: `tri_stn.warp`, or a function with its signature.

    Shape:
        (N, C, *input_size) → (N, C, *size); with ``parallel=K``, (N, K, C, *size).

    Raises:
        ValueError: transform is not known, or localisation gives another number of parameters.
        TypeError: transform is neither a name nor a `ParametricMap`.

    Example:
        >>> import torch, tri_stn
        >>> stn = tri_stn.nn.SpatialTransformer(tri_stn.nn.Convolutional(1, 6), "affine", size=(20, 20))
        >>> images = torch.rand(4, 1, 28, 28)
        >>> stn(images).shape
        torch.Size([4, 1, 20, 20])
        >>> output, parameters = stn(images, return_parameters=True)  # for a loss that keeps it near the identity
        >>> stn.penalty(parameters).item()
        0.0
    """

    def __init__(
        self,
        localisation: nn.Module,
        transform: str | ParametricMap = "affine",
        size: int | Sequence[int] | None = None,
        *,
        parallel: int | None = None,
        bounds: float | Tensor | None = None,
        residual: bool = True,
        mode: str = "bilinear",
        padding_mode: str = "zeros",
        align_corners: bool = False,
        antialias: bool = False,
        fill: float | Sequence[float] | Tensor = 0,
        sampler: Callable[..., Tensor] = warp,
    ) -> None:
        super().__init__()
        if isinstance(transform, str):
            if transform not in NAMED:
                raise ValueError(f"transform must be one of {', '.join(NAMED)}, or a ParametricMap; got {transform!r}.")
            transform = NAMED[transform]()
        if not isinstance(transform, ParametricMap):
            raise TypeError(
                f"transform must be a name such as 'affine', or a ParametricMap; got {type(transform).__name__}."
            )
        if not callable(localisation):
            raise TypeError(
                f"localisation must be a module, such as FullyConnected; got {type(localisation).__name__}."
            )
        if parallel is not None and (not isinstance(parallel, int) or isinstance(parallel, bool) or parallel < 1):
            raise ValueError(f"parallel must be a number of maps per image, at least 1, or None; got {parallel!r}.")
        self.localisation = localisation
        self.map = transform
        self.size = tuple(size) if isinstance(size, Iterable) else size
        if size is not None:
            sizes: Any = (size,) if isinstance(size, int) else self.size
            _check_size(sizes, len(sizes) if isinstance(sizes, tuple) else 2)
        self.parallel = parallel
        self.residual = residual
        self.sampler = sampler
        self.options: dict[str, Any] = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
        if antialias:
            self.options["antialias"] = True
        # On the module's device, so that no call copies numbers there.
        self.register_constant("bounds", None if bounds is None else self._check_bounds(bounds))
        number = isinstance(fill, (int, float))
        self.fill = fill if number else None
        self.register_constant("fills", None if number else _tensor("fill", fill, torch.float32))
        if sampler is warp:  # another may have more choices
            _check_choice("mode", mode, MODES)
            _check_choice("padding_mode", padding_mode, PADDING_MODES)
            values = self.map.identity.new_tensor(fill) if self.fills is None else self.fills
            _check_fill(fill if number else values, values.new_empty(1, values.numel()), padding_mode)

    bounds: Tensor | None
    fills: Tensor | None

    def _check_bounds(self, bounds: float | Tensor) -> Tensor:
        limits = _tensor("bounds", bounds, self.map.identity.dtype)
        positive = limits.is_meta or bool((limits > 0).all())
        if limits.shape not in ((), (self.map.count,)) or not positive:
            raise ValueError(f"bounds must be positive, one number or a tensor ({self.map.count},); got {bounds!r}.")
        return limits

    def localise(self, input: Tensor) -> Tensor:
        """The numbers of the maps that localisation chooses, (N, P) or (N, K, P)."""
        found = self.localisation(input)
        count, maps = self.map.count, self.parallel
        expected = (input.shape[0], count * (maps or 1))
        if found.dim() != 2 or found.shape[1] != expected[1] or found.shape[0] != expected[0]:
            raise ValueError(
                f"localisation must give (N, {expected[1]}), the {count} numbers of {type(self.map).__name__}"
                f"{f' for each of {maps} maps' if maps else ''}; got {tuple(found.shape)} for {expected[0]} images."
            )
        identity = self.map.identity
        found = found.to(torch.promote_types(found.dtype, torch.promote_types(identity.dtype, torch.float32)))
        if maps is not None:
            found = found.unflatten(1, (maps, count))
        departure = found if self.residual else found - identity
        if self.bounds is not None:
            departure = self.bounds * torch.tanh(departure / self.bounds)
        elif not self.residual:
            return found
        return identity + departure

    def penalty(self, parameters: Tensor) -> Tensor:
        """A regulariser: the mean squared departure of parameters, (N, [K,] P), from the identity."""
        return (parameters - self.map.identity).square().mean()

    def forward(
        self, input: Tensor, source: Tensor | None = None, return_parameters: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Read input where localisation looks.

        Args:
            input: (N, C, *input_size), what localisation sees.
            source: (N, C', *size), what is read, if not input: the full image, where localisation sees a small one.
            return_parameters: also return the maps' numbers, (N, P) or (N, K, P).
        """
        parameters = self.localise(input)
        source = input if source is None else source
        size = (self.size,) * (source.dim() - 2) if isinstance(self.size, int) else self.size
        fill = self.fill if self.fills is None else self.fills
        options = self.options if isinstance(fill, (int, float)) and fill == 0 else {**self.options, "fill": fill}
        output = self.sampler(source, self.map(parameters), size, **options)
        return (output, parameters) if return_parameters else output

    def extra_repr(self) -> str:
        """The settings that are not modules of their own."""
        size = "the input's" if self.size is None else self.size
        settings: dict[str, Any] = {"size": size, "parallel": self.parallel} | self.options
        return ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def _tensor(name: str, given: Any, dtype: torch.dtype) -> Tensor:
    """Numbers or a tensor as a tensor with numbers in it, a given one where it is."""
    device = given.device if isinstance(given, Tensor) else real_device()
    try:
        if hasattr(given, "__array__") and not isinstance(given, Tensor):
            given = given.copy()  # torch takes no negative strides, and shares what it takes
        return torch.as_tensor(given, dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a number, several or a tensor; got {given!r}.") from error
