"""How near a decoded picture is to the original."""

import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MIN_SIDE = 8  # pixels that libjxl's metrics need


def psnr(original: NDArray[Any], decoded: NDArray[Any], visible: NDArray[Any] | None = None) -> float:
    """PSNR in dB of 8-bit images (H, W, C), one mean over pixels and channels; infinite if they are equal.

    visible: (H, W), zero where pixels do not count, such as an alpha plane.
    """
    total, count = 0, original.size if visible is None else int(np.count_nonzero(visible)) * original.shape[2]
    for row, (a, b) in enumerate(zip(original, decoded, strict=True)):  # differences take several times the memory
        difference = a.astype(np.int32) - b
        if visible is not None:
            difference = difference[visible[row] > 0]
        total += int(np.square(difference).sum())
    return 10 * math.log10(255**2 * count / total) if total else math.inf


def ssimulacra2(original: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> float | None:
    """SSIMULACRA 2.1 (Cloudinary, 2023) of (H, W, 3): 100 for equal images, 70 is high quality; may be negative.

    By the reference implementation, libjxl's program: the Python package of this name is up to 4 points off. None for
    what it cannot measure, such as sides below 8 pixels.
    """
    return _last_number_of("ssimulacra2", original, decoded)


def butteraugli(original: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> float | None:
    """Butteraugli (Google, 2016) of (H, W, 3), as the 3-norm of its map: 0 for equal images, 1 is hardly visible.

    By libjxl's program, for a screen of 80 cd/m2. None for what it cannot measure; it would call images with a side
    below 8 pixels equal.
    """
    return _last_number_of("butteraugli_main", original, decoded)  # the default norm, after the maximum


def _last_number_of(program: str, original: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> float | None:
    """What a program prints last about two files; None if it fails, or a side has less than MIN_SIDE pixels."""
    if min(original.shape[:2]) < MIN_SIDE:
        return None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("original.png", "decoded.png")]
        for file, pixels in zip(files, (original, decoded), strict=True):
            Image.fromarray(pixels).save(file, compress_level=1)
        ran = subprocess.run([program, *files], capture_output=True, text=True)
    return float(ran.stdout.split()[-1]) if ran.returncode == 0 else None
