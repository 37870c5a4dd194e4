"""Fewer cases than all combinations: any choice but one still meets every choice of the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any


def covering(*choices: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """One of each, so that of n kinds of choices any n - 1 meet in all combinations.

    The last follows from the places of the others, as in a Latin square; it has the fewest.
    """
    *free, last = choices
    assert all(len(choice) >= len(last) for choice in free)
    for places in itertools.product(*(range(len(choice)) for choice in free)):
        yield (*(choice[i] for choice, i in zip(free, places, strict=True)), last[sum(places) % len(last)])
