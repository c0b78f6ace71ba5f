"""Vector art from the npm registry, rendered to premultiplied RGBA sprites.

The four icon sets are permissively licensed (see ``NOTICE``). They are fetched with ``npm pack``
at training time only, and every rendered sprite is kept in a cache folder.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from threading import Lock, get_ident

import numpy as np
from PIL import Image

from litapp.errors import LitappError

# The versions that the bundled model was trained on: an icon redrawn upstream changes the data.
PACKAGES = {
    "glossy": "@iconify-json/fluent-emoji@1.2.7",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
SPRITE_SIZE = 1024
FLAGS = ([], ["mass"], ["fixed"], ["mass", "fixed"])
_FETCHING = Lock()


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn: its icon's name and the words people use for it.

    ``mass`` marks words without article and number, ``fixed`` what is never recoloured.
    """

    icon: str
    names: tuple[str, ...]
    mass: bool
    fixed: bool = False

    @property
    def name(self) -> str:
        return self.names[0]


def parse_concepts(text: str) -> list[Concept]:
    """Read ``ICON : NAME [, SYNONYM ...] [: mass] [: fixed]`` lines; ``#`` starts a comment line.

    Raises:
        LitappError: a line has no name, or an icon stands twice.
    """
    concepts: dict[str, Concept] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        icon, *rest = (part.strip() for part in line.split(" : "))
        if not rest or icon in concepts or rest[1:] not in FLAGS:
            raise LitappError(f"concept list, line {number}: cannot read {line.strip()!r}")
        names = tuple(name.strip() for name in rest[0].split(","))
        concepts[icon] = Concept(icon, names, "mass" in rest[1:], "fixed" in rest[1:])
    return list(concepts.values())


def load_concepts(count: int | None = None) -> list[Concept]:
    """The first ``count`` concepts of the list, all without: a model may know only a part of it.

    Raises:
        LitappError: the list has not as many.
    """
    text = resources.files(__package__).joinpath("concepts.txt").read_text(encoding="utf-8")
    concepts = parse_concepts(text)
    if count is not None and not 1 <= count <= len(concepts):
        raise LitappError(f"the concept list has {len(concepts)} concepts, so not {count}")
    return concepts[:count]


def fetch_package(spec: str, cache: Path) -> Path:
    """Return the unpacked npm package ``NAME@VERSION``, fetching it into ``cache`` if need be."""
    target = cache / re.sub(r"[^\w.-]+", "_", spec)
    if target.is_dir():
        return target
    if not shutil.which("npm"):
        raise LitappError("the vector art comes as npm packages: install npm, then run this again")
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    done = subprocess.run(
        ["npm", "pack", spec, "--pack-destination", str(partial)], capture_output=True, text=True
    )
    if done.returncode:
        raise LitappError(f"npm could not fetch {spec}: check the network, then run this again")
    archive = next(partial.glob("*.tgz"))
    with tarfile.open(archive) as tar:
        tar.extractall(partial, filter="data")
    archive.unlink()
    partial.replace(target)
    return target


class SpriteStore:
    """Icons of all styles as premultiplied uint8 RGBA arrays, rendered once and cached as ``.npy``.

    Args:
        cache: folder for the npm packages and the rendered sprites.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._icon_sets: dict[str, dict] = {}

    def _icons(self, style: str) -> dict:
        # Scenes are rendered by several threads, and the first of them fetches the package.
        with _FETCHING:
            if style not in self._icon_sets:
                folder = fetch_package(PACKAGES[style], self.cache / "npm")
                text = (folder / "package" / "icons.json").read_text()
                self._icon_sets[style] = json.loads(text)
            return self._icon_sets[style]

    def svg(self, style: str, icon: str) -> str:
        """The icon's SVG document.

        Raises:
            LitappError: the set has no such icon.
        """
        data = self._icons(style)
        if icon not in data["icons"]:
            raise LitappError(f"{PACKAGES[style]} has no icon {icon!r}")
        entry = data["icons"][icon]
        width = entry.get("width", data.get("width", 16))
        height = entry.get("height", data.get("height", 16))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
            f"{entry['body']}</svg>"
        )

    def sprite(self, style: str, icon: str) -> np.ndarray:
        """Return a read-only (1024, 1024, 4) uint8 premultiplied RGBA view of the icon."""
        path = self.cache / "sprites" / f"{style}-{icon}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{get_ident()}.npy")
            np.save(partial, premultiply(render_svg(self.svg(style, icon), SPRITE_SIZE)))
            partial.replace(path)
        return np.load(path, mmap_mode="r")


def render_svg(svg: str, size: int) -> np.ndarray:
    """Rasterise with resvg to a (size, size, 4) uint8 array, straight alpha."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def premultiply(rgba: np.ndarray) -> np.ndarray:
    """Straight (..., 4) uint8 RGBA to premultiplied uint8 RGBA."""
    colour = rgba[..., :3].astype(np.uint16) * rgba[..., 3:].astype(np.uint16)
    return np.concatenate([((colour + 127) // 255).astype(np.uint8), rgba[..., 3:]], axis=-1)
