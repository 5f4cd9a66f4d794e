"""How near a decoded picture is to the original."""

import math
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


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
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("original.png", "decoded.png")]
        for file, pixels in zip(files, (original, decoded), strict=True):
            Image.fromarray(pixels).save(file, compress_level=1)
        ran = subprocess.run(["ssimulacra2", *files], capture_output=True, text=True)
    return float(ran.stdout.split()[-1]) if ran.returncode == 0 else None
