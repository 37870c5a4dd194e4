"""Images of many channels in channels_last on the CPU: each pixel is a row of a table, as of an embedding.

What a sample reads is a weighted sum of a few rows, for which torch has a vectorised loop over channels; what it adds
to an image's gradient is a product with a sparse matrix. Coordinates, weights and which taps lie inside are the
reference's, and so is all else. Torch's own sampler is made for channels that lie apart.

Shape notes: M images, K maps per image, P samples of a chunk, C channels; S = M * K * P samples in all, each with its
taps inside, from none to all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import reference
from .reference import PLAIN, Access, Tap

FEWEST_CHANNELS = 64
"""With fewer, the coordinates cost more than the channels save."""


def suits(like: Tensor, channels_last: bool) -> bool:
    """Whether an image with the channels, dtype and device of a tensor, in that layout or not, is read by rows."""
    held = like.dtype in (torch.float32, torch.float64)  # a dtype that can hold sums
    return channels_last and held and like.shape[1] >= FEWEST_CHANNELS and like.device.type == "cpu"


def _is_table(image: Tensor) -> bool:
    """Whether its rows follow each other, which those of a part of an image may not."""
    return image.movedim(1, -1).is_contiguous()


class _Bags:
    """The taps of S samples that lie inside, in order."""

    def __init__(self, image: Tensor, taps: Sequence[Tap]) -> None:
        corners = [corner for corner, _ in taps]
        pixels = math.prod(image.shape[2:])
        first = torch.arange(len(image)).view(-1, 1, 1) * pixels
        index = torch.stack([corner.flat(image)[:, 0] + first for corner in corners], -1)
        inside = torch.stack([corner.inside.expand(index.shape[:-1]) for corner in corners], -1)
        self.shape, self.taps = index.shape[:-1], len(corners)
        self.kept = None if bool(inside.all()) else inside.flatten().nonzero().squeeze(1)
        self.index = self.chosen(index)
        weights = torch.broadcast_tensors(*(weight for _, weight in taps))
        self.weights = self.chosen(torch.stack(weights, -1).expand(index.shape))
        if self.kept is None:
            self.start = torch.arange(0, index.numel(), self.taps)
        else:
            counts = inside.flatten(0, -2).sum(-1)
            self.start = counts.cumsum(0) - counts

    @property
    def sample(self) -> Tensor:
        """Whose each tap is."""
        kept = torch.arange(math.prod(self.shape) * self.taps) if self.kept is None else self.kept
        return kept // self.taps

    def chosen(self, numbers: Tensor) -> Tensor:
        """(M, K, P, taps) → those of taps inside."""
        return numbers.flatten() if self.kept is None else numbers.flatten().index_select(0, self.kept)

    def spread(self, numbers: Tensor) -> Tensor:
        """The way back; zeros elsewhere."""
        shape = *self.shape, self.taps
        if self.kept is None:
            return numbers.view(shape)
        return numbers.new_zeros(math.prod(shape)).index_copy_(0, self.kept, numbers).view(shape)


def _table(image: Tensor) -> Tensor:
    return image.movedim(1, -1).flatten(0, -2)


def _rows(samples: Tensor) -> Tensor:
    """(M, C, K, P) → (S, C); a copy where channels lie apart."""
    return samples.movedim(1, -1).flatten(0, -2).contiguous()


def _weighted_sum(image: Tensor, taps: Iterable[Tap]) -> Tensor:
    if not _is_table(image):
        return PLAIN.read(image, taps)
    bags = _Bags(image, list(taps))
    rows = torch.embedding_bag(_table(image), bags.index, bags.start, False, 0, False, bags.weights)[0]
    return rows.view(*bags.shape, -1).movedim(-1, 1)


def _back(grad_image: Tensor | None, image: Tensor | None, taps: Sequence[Tap], samples: Tensor) -> Sequence[Tensor]:
    if not all(_is_table(there) for there in (grad_image, image) if there is not None):
        return list(PLAIN.back(grad_image, image, taps, samples))
    like = grad_image if grad_image is not None else image
    if like is None:
        return ()
    bags, rows = _Bags(like, taps), _rows(samples)
    sample = bags.sample
    if grad_image is not None:
        table, places = _table(grad_image), torch.stack([bags.index, sample])
        shape = len(table), len(rows)
        table.addmm_(torch.sparse_coo_tensor(places, bags.weights, shape, check_invariants=False), rows)
    if image is None:
        return ()
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows, _table(image), bags.index, bags.start, sample, 0
    )
    return bags.spread(dots).unbind(-1)


ROWS = Access(_weighted_sum, _back, tensors=1)
gather = functools.partial(reference.gather, access=ROWS)
adjoint = functools.partial(reference.adjoint, access=ROWS)
