"""litapp: text-to-image on a laptop with a linear diffusion transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litapp.errors import Cancelled, LitappError
    from litapp.pipeline import Picture, TextToImage

__all__ = ["Cancelled", "LitappError", "Picture", "TextToImage", "__version__"]

__version__ = "0.1.0"

_HOMES = {
    "Cancelled": "litapp.errors",
    "LitappError": "litapp.errors",
    "Picture": "litapp.pipeline",
    "TextToImage": "litapp.pipeline",
}


def __getattr__(name: str) -> Any:
    # numpy and Pillow are a fifth of a second that `litapp --help` should not pay for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
