"""A white page in pixels, the colours of the house, and files that are written whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import write_whole

INK, ACCENT, SECOND, MUTED, PALE = "#1f2933", "#e4572e", "#2f6f9f", "#7b8794", "#e4e7eb"
"""Text; what to look at; what to look at next; remarks; edges."""

DPI = 110
STYLE: dict[Any, Any] = {
    "font.size": 11, "text.color": INK, "axes.edgecolor": PALE, "axes.labelcolor": INK, "xtick.color": MUTED,
    "ytick.color": MUTED,
}  # fmt: skip


class Page:
    """A figure in which everything lies where it is put: by its upper left corner, in pixels of the file."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)

    def panel(self, x: float, y: float, width: float, height: float) -> Any:
        """Axes without ticks."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.set(xticks=[], yticks=[])
        return axes

    def picture(self, x: float, y: float, width: float, height: float, image: Tensor) -> Any:
        """Axes with an image (1, 1 or 3, H, W) or (1 or 3, H, W) from 0 to 1, whose pixels show; ticks are its pixels'
        indices.
        """
        axes = self.panel(x, y, width, height)
        pixels = image.detach().reshape(-1, *image.shape[-2:]).movedim(0, -1).clamp(0, 1).cpu().numpy()
        axes.imshow(
            pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest",
            aspect="auto",
        )  # fmt: skip
        axes.spines[:].set(color=MUTED, linewidth=0.8)
        return axes

    def write(self, x: float, y: float, text: str, **options: Any) -> Any:
        """Text by its upper edge."""
        return self.figure.text(x / self.width, 1 - y / self.height, text, **({"va": "top"} | options))

    def pixels(self) -> Any:
        """The page as a Pillow image."""
        from PIL import Image

        self.canvas.draw()
        return Image.frombuffer("RGBA", (self.width, self.height), self.canvas.buffer_rgba()).convert("RGB")

    def save(self, path: Path, colours: int | None = None) -> None:
        """As PNG; with few colours, a smaller file."""
        image = self.pixels()
        if colours is not None:
            image = image.quantize(colours)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        write_whole(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))


@contextmanager
def page(width: int, height: int) -> Iterator[Page]:
    """A page, and matplotlib's settings while it is drawn."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield Page(width, height)
