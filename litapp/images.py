"""Pictures: from premultiplied floats to PNG files that are whole, or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from litapp.errors import EXIT_USAGE, LitappError
from litapp.png import encode_png

__all__ = [
    "checkerboard",
    "contact_sheet",
    "ensure_writable",
    "fresh_path",
    "load_picture",
    "read_parameters",
    "save_png",
    "snap_alpha",
    "to_image",
    "write_whole",
]

ALPHA_SLACK = 0.06
# Of the pixels of an opaque picture, those that need not be nearly opaque.
OPAQUE_SHARE = 0.001
BAND_PIXELS = 1 << 15

DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about=""'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


def to_image(premultiplied: NDArray[np.floating[Any]]) -> Image.Image:
    """Straight 8-bit RGBA of a premultiplied picture, or RGB where every pixel is opaque.

    Args:
        premultiplied: (H, W, 4), nominal range [0, 1]; clipped, and colour to at most alpha.

    Raises:
        LitappError: a value is NaN or infinite.
    """
    pixels = np.empty(premultiplied.shape, np.uint8)
    for rows in _bands(premultiplied):
        planes = premultiplied[rows].transpose(2, 0, 1)
        if not np.isfinite(planes).all():
            raise LitappError("the picture holds NaN or infinite values and was not kept")
        alpha = np.clip(planes[3], 0, 1)
        colour = np.clip(planes[:3], 0, alpha)
        # What alpha hides is 0 here, so that any divisor will do.
        colour /= np.where(alpha > 0, alpha, 1)
        # A colour nobody can see only costs bytes and shows up in tools that drop alpha.
        colour[:, alpha < 0.5 / 255] = 0
        for channel, plane in enumerate((*colour, alpha)):
            plane *= 255
            pixels[rows, :, channel] = np.rint(plane, out=plane)
    if pixels[..., 3].min() < 255:
        return Image.fromarray(pixels)
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3]))


def snap_alpha(premultiplied: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Make what is nearly opaque opaque and what is nearly clear clear, colours unchanged.

    A decoder is never exact: without this an opaque scene has pixels of alpha 0.98 and a sticker a
    faint veil around it.

    Args:
        premultiplied: (H, W, 4), nominal range [0, 1]; clipped.

    Returns:
        The same with alpha stretched so that ``ALPHA_SLACK`` at either end is 0 or 1; and 1
        everywhere where all but a thousandth of the picture is nearly opaque.
    """
    nearly = np.count_nonzero(premultiplied[..., 3] > 1 - 2 * ALPHA_SLACK)
    opaque = nearly >= (1 - OPAQUE_SHARE) * premultiplied[..., 3].size
    planes = np.empty((4, *premultiplied.shape[:2]), premultiplied.dtype)
    for rows in _bands(premultiplied):
        band = np.clip(premultiplied[rows].transpose(2, 0, 1), 0, 1, out=planes[:, rows])
        alpha = band[3]
        snapped = np.clip((alpha - ALPHA_SLACK) / (1 - 2 * ALPHA_SLACK), 0, 1)
        if opaque:
            snapped[:] = 1
        gain = np.divide(snapped, alpha, out=np.zeros_like(alpha), where=alpha > 0)
        band[:3] *= gain
        band[3] = snapped
    return planes.transpose(1, 2, 0)


def _bands(picture: NDArray[Any]) -> Iterator[slice]:
    """Rows to work on at a time: few enough to stay in the caches, and to need no second copy."""
    height, width = picture.shape[:2]
    count = max(1, BAND_PIXELS // max(width, 1))
    for top in range(0, height, count):
        yield slice(top, top + count)


def save_png(image: Image.Image, path: Path, parameters: Mapping[str, Any] | None = None) -> None:
    """Write a PNG whole or not at all, with its parameters where given.

    ``parameters`` go into the PNG twice: as the ``parameters`` text that other tools read, and as
    JSON in a ``litapp`` chunk. Every picture is marked as generated (IPTC digital source type).

    Raises:
        LitappError: the file cannot be written; nothing is left behind.
    """
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_text("parameters", _a1111_text(parameters))
        info.add_text("litapp", json.dumps(parameters))
    info.add_itxt("XML:com.adobe.xmp", XMP)
    content = encode_png(image, info)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise LitappError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def _opened(path: Path | BinaryIO, formats: Sequence[str] | None = None) -> Iterator[Image.Image]:
    """A picture file; what is wrong with it is told in one line."""
    name = path if isinstance(path, Path) else "the file"
    try:
        with Image.open(path, formats=formats) as image:
            yield image
    except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise LitappError(f"{name} is not a picture litapp can read") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LitappError(f"cannot read {name}: {reason}") from error


def load_picture(
    path: Path | BinaryIO, formats: Sequence[str] | None = None, most: int | None = None
) -> Image.Image:
    """A picture, upright, as RGBA.

    Args:
        formats: Pillow's names of what may be read; None for all that it reads.
        most: pixels that it may have; None for as many as Pillow takes.

    Raises:
        LitappError: the file cannot be read, or is something else.
    """
    with _opened(path, formats) as image:
        if most is not None and image.width * image.height > most:
            raise LitappError(
                f"the picture has {image.width}x{image.height} pixels, which is more than {most}",
                EXIT_USAGE,
            )
        return ImageOps.exif_transpose(image).convert("RGBA")


def read_parameters(path: Path | BinaryIO) -> dict[str, Any]:
    """The parameters a picture was drawn with. Raises LitappError where it holds none."""
    name = path if isinstance(path, Path) else "the file"
    with _opened(path) as image:
        text = image.info.get("litapp")
    try:
        parameters = json.loads(text) if text else None
    except (TypeError, ValueError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        raise LitappError(f"{name} holds no parameters of litapp")
    return parameters


def ensure_writable(path: Path) -> None:
    """Raise LitappError unless a file could be created at ``path``, whose folders may be new."""
    folder = path.parent
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()  # tells of a name that is too long
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise LitappError(f"cannot write {path}: {error.strerror}") from error


def fresh_path(folder: Path, prompt: str, seed: int) -> Path:
    """A file name in ``folder`` that tells prompt and seed and is not taken yet."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"
    # Bytes, not letters, are what file systems limit.
    while len(words.encode()) > 120:
        words = words[:-1]
    path, count = folder / f"{words}-{seed}.png", 1
    while path.exists():
        count += 1
        path = folder / f"{words}-{seed}-{count}.png"
    return path


def checkerboard(width: int, height: int, cell: int = 16) -> Image.Image:
    """The grey squares (RGB) that stand for transparency."""
    rows, columns = np.arange(height) // cell, np.arange(width) // cell
    light = (rows[:, None] + columns) % 2 == 0
    return Image.fromarray(np.where(light, 255, 225).astype(np.uint8)).convert("RGB")


def contact_sheet(
    images: Sequence[Image.Image], columns: int, cell: int = 256, gap: int = 8
) -> Image.Image:
    """An RGB grid of pictures, each fitted into ``cell`` x ``cell`` pixels on a checkerboard.

    Raises:
        ValueError: there are no images, or ``columns`` is not positive.
    """
    if not images or columns < 1:
        raise ValueError("a contact sheet needs at least one image and one column")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB", (columns * (cell + gap) + gap, rows * (cell + gap) + gap), (255, 255, 255)
    )
    for i, image in enumerate(images):
        small = image.convert("RGBA")
        small.thumbnail((cell, cell), Image.Resampling.LANCZOS)
        tile = checkerboard(*small.size)
        tile.paste(small, mask=small)
        x = gap + (i % columns) * (cell + gap) + (cell - small.width) // 2
        y = gap + (i // columns) * (cell + gap) + (cell - small.height) // 2
        sheet.paste(tile, (x, y))
    return sheet


def _a1111_text(parameters: Mapping[str, Any]) -> str:
    """The text layout that AUTOMATIC1111's web UI made the common one."""
    fields = {
        "Steps": parameters.get("steps"),
        "Sampler": parameters.get("sampler"),
        "CFG scale": parameters.get("guidance"),
        "Seed": parameters.get("seed"),
        "Size": f"{parameters.get('width')}x{parameters.get('height')}",
        "Model hash": str(parameters.get("model_digest", ""))[:10],
        "Model": parameters.get("model"),
        "Version": f"litapp {parameters.get('version')}",
    }
    lines = [str(parameters.get("prompt", ""))]
    if negative := parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {negative}")
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return "\n".join(lines)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file that is there with all its content or not at all; raises OSError."""
    draft = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
