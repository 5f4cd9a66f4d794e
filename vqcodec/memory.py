"""Whether there is memory enough for a picture, better one line than a process that the system kills, and memory given
back."""

import contextlib
import ctypes
from pathlib import Path

from bitstream.errors import LimitError

TILE = 768  # pixels a side for the networks: large enough for the halo to cost little, small enough to bound memory
TILES_AT_ONCE = 4  # for the same reason

# What decoding takes at most: bytes, bytes for each pixel of the picture's blocks of 16 x 16, and for each pixel of
# what the networks work on at once. Measured by tests/trust/limits.py.
BASE, PER_PIXEL, PER_PIXEL_OF_TILES, LARGEST_TILES = 50 * 10**6, 12, 300, TILES_AT_ONCE * (TILE + 256) ** 2


def needed(width: int, height: int) -> int:
    """Bytes that decoding a picture takes besides those that a loaded model has."""
    pixels = -(-width // 16) * -(-height // 16) * 256
    return BASE + PER_PIXEL * pixels + PER_PIXEL_OF_TILES * min(pixels, LARGEST_TILES)


def available() -> int | None:
    """Bytes that this process can still get, swap included. None where the system does not say (all but Linux)."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        amounts = [1024 * sum(int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree"))]
        _, _, group = Path("/proc/self/cgroup").read_text().rpartition("0::/")
    except (OSError, KeyError, ValueError):
        return None
    root = Path("/sys/fs/cgroup")
    place = root / group.strip().lstrip("/")
    for folder in (place, *place.parents):  # a container's limit, or that of anything around it
        if folder.is_relative_to(root):
            amounts += _left(folder)
    return min(amounts)


def _left(folder: Path) -> list[int]:
    """Bytes that a control group (version 2) leaves its processes, if it has a limit."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [limit - used + int(statistics["inactive_file"])]  # a cache that gives way
    except (OSError, KeyError, ValueError):  # "max" is no number
        return []


def require(width: int, height: int) -> None:
    """Raises LimitError if decoding a picture takes more memory than there is."""
    need, there = needed(width, height), available()
    if there is not None and need > there:
        raise LimitError(
            f"decoding {width} x {height} pixels takes up to {need / 1e9:.1f} GB of memory, {there / 1e9:.1f} GB are "
            "free: close other programs, add swap space, or raise the limit of the container"
        )


def give_back() -> None:
    """Returns freed memory that the C library keeps to the system. Where there is no way to, nothing happens."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
