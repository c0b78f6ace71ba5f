"""What this computer offers: measured where it can be, and unknown where it cannot."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from litapp import __version__
from litapp.bundle import Bundle, home, list_bundles, load
from litapp.engines import (
    available_devices,
    choose_device,
    has_openvino,
    multiplies_bf16,
    physical_cores,
)
from litapp.errors import LitappError
from litapp.memory import predict
from litapp.pipeline import DEFAULT_MODEL

__all__ = ["memory", "report", "shortage"]

SIDES = (1024, 2048, 4096)


def report() -> dict[str, str]:
    """One line of text for each thing that decides whether and how fast pictures are drawn."""
    import onnxruntime

    total, available = memory()
    models = list_bundles()
    return {
        "litapp": f"{__version__} on Python {platform.python_version()}, {platform.platform()}",
        "processor": f"{platform.machine()}, {physical_cores() or os.cpu_count()} cores",
        "memory": f"{_gigabytes(total)}, {_gigabytes(available)} available",
        "disk": f"{_gigabytes(_free_disk(home()))} free at {home()}",
        "ONNX Runtime": f"{onnxruntime.__version__}, devices: {', '.join(available_devices())}",
        "OpenVINO": _openvino(),
        "device": f"--device auto is {choose_device('auto')}",
        "models": ", ".join(sorted(models)) or "none",
        "default model": "installed" if DEFAULT_MODEL in models else f"{DEFAULT_MODEL} is missing",
        "a picture": _needs(),
    }


def shortage(bundle: Bundle, width: int, height: int) -> str | None:
    """A warning where a picture of this size is about to need more memory than is available."""
    needed, available = max(predict(bundle, width, height).values()), memory()[1]
    if available is None or needed <= available:
        return None
    return (
        f"a picture of {width}x{height} takes about {_gigabytes(needed)} of memory, and"
        f" {_gigabytes(available)} are available: it may be slow or fail"
    )


def _openvino() -> str:
    """Whether it is installed, and whether it would be faster here."""
    if has_openvino():
        return metadata.version("openvino")
    if multiplies_bf16():
        return (
            "not installed; this processor multiplies bf16, where it decodes a picture in less"
            ' time: pip install "litapp[openvino]"'
        )
    return "not installed, and no faster on this processor"


def _needs() -> str:
    """What the default model takes for a picture, by size."""
    try:
        bundle = load(DEFAULT_MODEL)
    except LitappError:
        return "unknown"
    needed = {side: max(predict(bundle, side, side).values()) for side in SIDES}
    sizes = (f"{_gigabytes(count)} at {side}x{side}" for side, count in needed.items())
    return f"takes about {', '.join(sizes)}"


def memory() -> tuple[int | None, int | None]:
    """(total, available) bytes of RAM; None where the system does not tell."""
    if sys.platform == "win32":
        return _windows_memory()
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None, None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return total, None
    fields = dict(line.split(":", 1) for line in lines)
    return total, int(fields["MemAvailable"].split()[0]) * 1024


def _windows_memory() -> tuple[int | None, int | None]:
    class MemoryStatus(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong),
            ("load", ctypes.c_ulong),
            ("total", ctypes.c_ulonglong),
            ("available", ctypes.c_ulonglong),
            ("rest", ctypes.c_ulonglong * 5),
        )

    status = MemoryStatus(length=ctypes.sizeof(MemoryStatus))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None, None
    return status.total, status.available


def _free_disk(path: Path) -> int | None:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"
