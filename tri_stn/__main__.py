"""The command line: ``python -m tri_stn warp IN OUT …`` shows on a picture what the sampler does.

Each subcommand is a parser, built in `_parser`, and a function that takes the parsed arguments.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import obstacle, write_whole
from .functional import LARGEST_AXIS, MODES, PADDING_MODES, warp
from .transforms import Affine

FORMATS = {
    ".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP",
}  # fmt: skip
NO_ALPHA = ("BMP", "JPEG")
SIXTEEN_BITS = ("PNG", "TIFF")
MOST_PIXELS = 2**28
"""Of an output: some gigabytes in fp32. Pillow itself opens no picture of as many."""


class CommandError(Exception):
    """What the user can put right, in one sentence."""


def affine_theta(
    rotate: float = 0.0,
    scale: float = 1.0,
    shear: float = 0.0,
    translate: tuple[float, float] = (0.0, 0.0),
    *,
    size: tuple[int, int],
    align_corners: bool = False,
) -> Tensor:
    """The sampler's map for what is to happen to the *content* of a picture.

    The picture fills the output, whatever its own size. Then, about the centre and in pixels of the
    output, so that angles are true in a picture of any aspect: scaled, sheared, rotated, moved.

    Args:
        rotate: degrees, counter-clockwise as seen.
        scale: factor of the content; 0.5 halves it.
        shear: degrees along x; the upper half leans to the right. Less than 90 either way.
        translate: (x, y), to the right and downwards, in fractions of the output's width and height.
        size: (H_out, W_out) in pixels.
        align_corners: as in `tri_stn.warp`.

    Returns:
        theta, (1, 2, 3) in fp64: the inverse of all this, normalised, for `tri_stn.Affine`.

    Raises:
        ValueError: a number is not finite, scale is not positive, or shear is 90 degrees or more.
    """
    if not all(map(math.isfinite, (rotate, scale, shear, *translate))):
        raise ValueError("rotate, scale, shear and translate must be finite numbers.")
    if scale <= 0:
        raise ValueError(f"scale must be positive; got {scale:g}.")
    if abs(shear) >= 90:
        raise ValueError(f"shear must be less than 90 degrees either way; got {shear:g}.")
    height, width = size
    cos, sin = math.cos(math.radians(rotate)), math.sin(math.radians(rotate))
    # y points down, so counter-clockwise as seen and leaning to the right carry the other sign.
    rotation = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
    lean = torch.tensor([[1.0, -math.tan(math.radians(shear))], [0.0, 1.0]], dtype=torch.float64)
    inverse = torch.linalg.inv(rotation @ lean * scale)
    offset = torch.tensor([[translate[0] * width], [translate[1] * height]], dtype=torch.float64)
    # Pixels per normalised unit; with align_corners, a single pixel spans none: any number will do.
    unit = torch.tensor([[(s - align_corners) / 2 or 0.5] for s in (width, height)], dtype=torch.float64)
    return torch.cat([inverse * unit.T, -inverse @ offset], 1).div(unit).unsqueeze(0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except CommandError as error:
        print(f"tri_stn: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tri_stn", description="Spatial transformer sampling, on pictures.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "warp",
        help="rotate, scale, shear and move a picture",
        description="Rotate, scale, shear and move a picture. The picture first fills the output (with --size, it is "
        "stretched to it); then its content is scaled, sheared, rotated and moved, in this order, about the "
        "centre. Each output pixel reads the input once, so there is no smoothing when shrinking.",
        epilog="Example: python -m tri_stn warp in.jpg out.png --rotate 30 --scale 0.8 --padding-mode reflection",
    )
    command.add_argument("input", type=Path, metavar="IN", help="a picture; its EXIF orientation is applied")
    command.add_argument("output", type=Path, metavar="OUT", help=f"where to write: {', '.join(FORMATS)}")
    command.add_argument("--rotate", type=float, default=0.0, metavar="DEG", help="counter-clockwise as seen")
    command.add_argument("--scale", type=float, default=1.0, metavar="F", help="0.8 shrinks the content")
    command.add_argument("--shear", type=float, default=0.0, metavar="DEG", help="lean to the right")
    command.add_argument(
        "--translate", type=float, nargs=2, default=(0.0, 0.0), metavar=("X", "Y"),
        help="move right and down, in fractions of the output's width and height",
    )  # fmt: skip
    command.add_argument(
        "--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="of the output, in pixels; as the input's"
    )
    command.add_argument("--mode", choices=MODES, default="bilinear")
    command.add_argument("--padding-mode", choices=PADDING_MODES, default="zeros", help="what lies outside")
    command.add_argument("--align-corners", action="store_true", help="fit the outermost pixels' centres, not edges")
    command.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")
    command.set_defaults(run=_warp)
    command = commands.add_parser(
        "gallery",
        help="draw what a spatial transformer does, for learners",
        description="Draw pictures of what a spatial transformer does: coordinates, forward and reverse mapping, "
        "interpolation, every transform, sampling points, and a network in training (under a minute on one core).",
    )
    command.add_argument("names", nargs="*", metavar="PICTURE", help="which of them; by default all")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write to")
    command.add_argument("--photo", type=Path, metavar="FILE", help="a photograph; scikit-learn's pagoda by default")
    command.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, …")
    command.set_defaults(run=_gallery)
    return parser


def _warp(arguments: argparse.Namespace) -> None:
    format = _output_format(arguments.output)
    device = _device(arguments.device)
    if arguments.size:
        _check_size("--size", *arguments.size)
    picture = _read(arguments.input)
    _check_size(f"The size of {arguments.input}", *reversed(picture.pixels.shape[-2:]))
    width, height = arguments.size or reversed(picture.pixels.shape[-2:])
    try:
        theta = affine_theta(
            arguments.rotate, arguments.scale, arguments.shear, tuple(arguments.translate),
            size=(height, width), align_corners=arguments.align_corners,
        )  # fmt: skip
    except ValueError as error:
        raise CommandError(str(error)) from error
    options = {name: getattr(arguments, name) for name in ("mode", "padding_mode", "align_corners")}
    pixels = _warp_pixels(picture.pixels.to(device), Affine(theta.to(device)), (height, width), options)
    _write(Picture(pixels.cpu(), picture.bits, picture.icc_profile), arguments.output, format)


def _check_size(name: str, width: int, height: int) -> None:
    if min(width, height) < 1:
        raise CommandError(f"{name} must be positive; got {width} {height}.")
    if max(width, height) > LARGEST_AXIS or width * height > MOST_PIXELS:
        raise CommandError(
            f"{name} must be at most {LARGEST_AXIS} pixels along an axis and {MOST_PIXELS} in all; got {width} "
            f"{height}."
        )


def _gallery(arguments: argparse.Namespace) -> None:
    from . import gallery

    device = _device(arguments.device)
    photo = None if arguments.photo is None else _read(arguments.photo)
    pixels = None if photo is None else photo.pixels / (2**photo.bits - 1)
    try:
        gallery.draw(arguments.names, arguments.out, pixels, device, gallery.progress_line)
    except gallery.GalleryError as error:
        raise CommandError(str(error)) from error


def _warp_pixels(pixels: Tensor, transform: Affine, size: tuple[int, int], options: dict[str, Any]) -> Tensor:
    """(1, C, H, W) → (1, C, *size); two or four channels end in alpha."""
    if pixels.shape[1] in (1, 3):
        return warp(pixels, transform, size, **options)
    # Colours mix by their opacity, or edges would darken; a wholly transparent pixel keeps its colour.
    colour, alpha = pixels[:, :-1], pixels[:, -1:]
    pixels = warp(torch.cat([colour * alpha, colour, alpha], 1), transform, size, **options)
    weighted, colour, alpha = pixels.split([colour.shape[1], colour.shape[1], 1], 1)
    return torch.cat([torch.where(alpha > 0, weighted / alpha, colour), alpha], 1)


# --- files -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """Pixels (1, C, H, W) in fp32 from 0 to 2 ** bits - 1; grey, grey and alpha, RGB or RGBA."""

    pixels: Tensor
    bits: int
    icc_profile: bytes | None


def _read(path: Path) -> Picture:
    image_module, image_ops, numpy = _pillow()
    try:
        with image_module.open(path) as image:
            _check_depth(image, path)
            image = image_ops.exif_transpose(image)
            profile = image.info.get("icc_profile") if image.mode != "CMYK" else None
            bits = 16 if image.mode.startswith("I") else 8
            transparent = "transparency" in image.info or image.mode == "PA"  # a colour that stands for it
            if bits == 8 and (transparent or image.mode not in ("L", "LA", "RGB", "RGBA")):
                kept = {"1": "L", "L": "LA"}.get(image.mode, "RGBA" if transparent else "RGB")
                image = image.convert(kept)
            array = numpy.array(image, dtype=numpy.float32)
    except FileNotFoundError as error:
        raise CommandError(f"There is no file {path}.") from error
    except image_module.UnidentifiedImageError as error:
        raise CommandError(f"{path} is not an image that Pillow can read.") from error
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise CommandError(f"{path} could not be read: {getattr(error, 'strerror', None) or error}.") from error
    if not 0 <= array.min() <= array.max() < 2**bits:
        raise CommandError(f"{path} has values outside 0 to {2**bits - 1}; convert it to 8 or 16 bits first.")
    pixels = torch.from_numpy(array)
    pixels = pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)
    return Picture(pixels[None], bits, profile)


def _check_depth(image: Any, path: Path) -> None:
    """Pillow reads 16-bit colour as 8-bit without a word, so ask the file."""
    depth = 8
    if image.format == "PNG":
        with path.open("rb") as file:
            depth = file.read(25)[24]  # the header chunk has a fixed place
    elif image.format == "TIFF":
        depth = max(image.tag_v2.get(258, (8,)))  # BitsPerSample
    if image.mode == "F" or (depth > 8 and not image.mode.startswith("I")):
        raise CommandError(
            f"{path} has more than 8 bits per colour channel, which Pillow would cut; convert it to 8 bits, or to "
            "16-bit greyscale, first."
        )


def _output_format(path: Path) -> str:
    """The format that the extension names, once it is sure that something can be written there."""
    if path.suffix.lower() not in FORMATS:
        raise CommandError(
            f"The output's extension must be one of {', '.join(FORMATS)}; got {path.suffix or 'none'} in {path}."
        )
    if why := obstacle(path):
        raise CommandError(why)
    if not path.parent.is_dir():
        raise CommandError(f"There is no folder {path.parent} to write {path.name} in; create it first.")
    return FORMATS[path.suffix.lower()]


def _write(picture: Picture, path: Path, format: str) -> None:
    image_module, _, numpy = _pillow()
    channels = picture.pixels.shape[1]
    if channels in (2, 4) and format in NO_ALPHA:
        raise CommandError(f"{format} files hold no transparency, which the input has; write .png, .tif or .webp.")
    if picture.bits == 16 and format not in SIXTEEN_BITS:
        raise CommandError(f"{format} files hold 8 bits per channel, the input has 16; write .png or .tif.")
    dtype = numpy.uint16 if picture.bits == 16 else numpy.uint8
    array = picture.pixels[0].round().clamp(0, 2**picture.bits - 1).movedim(0, -1).numpy().astype(dtype)
    image = image_module.fromarray(array[..., 0] if channels == 1 else array)
    options: dict[str, Any] = {"icc_profile": picture.icc_profile} if picture.icc_profile else {}
    if format in ("JPEG", "WEBP"):
        options["quality"] = 95
    try:
        write_whole(path, lambda temporary: image.save(temporary, format=format, **options))
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} could not be written: {getattr(error, 'strerror', None) or error}.") from error


def _pillow() -> tuple[Any, Any, Any]:
    try:
        import numpy
        from PIL import Image, ImageOps
    except ModuleNotFoundError as error:
        package = "Pillow" if (error.name or "").startswith("PIL") else error.name
        raise CommandError(f"This needs {package}, which is not installed: pip install tri_stn[demo].") from error
    return Image, ImageOps, numpy


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise CommandError(f"Device {name!r} is not available here; try --device cpu.") from error
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"tri_stn runs on cpu and cuda devices; got {name!r}.")
    return device


if __name__ == "__main__":
    sys.exit(main())
