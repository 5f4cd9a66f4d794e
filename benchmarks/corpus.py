"""Images in, results out."""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitstream.errors import ImageError
from vqcodec.files import write_atomically
from vqcodec.image import find_images, read

Bytes = NDArray[np.uint8]


def name_of(folder: Path) -> str:
    """What a folder is called where it is named, which may be a link."""
    return os.path.basename(os.path.abspath(folder))


def summary(folder: Path, names: list[str], pixels: int, skipped: dict[str, str]) -> dict[str, Any]:
    """What was measured. pixels: of all images together; skipped: reasons by name."""
    return {
        "folder": name_of(folder),
        "images": len(names),
        "names": names,
        "pixels": pixels,
        "skipped": skipped,
    }


def load(path: Path) -> Bytes | str:
    """Pixels (H, W, 3) of an image, without alpha and metadata; or why they cannot be read."""
    try:
        return read(path).pixels
    except (ImageError, OSError) as error:
        return str(error)


def describe(name: str, pixels: Bytes) -> dict[str, Any]:
    """An image by name, size and CRC-32 of its pixels."""
    height, width = pixels.shape[:2]
    return {"image": name, "width": width, "height": height, "crc32": f"{zlib.crc32(pixels.tobytes()):08x}"}


def photos(folder: Path, skipped: dict[str, str]) -> Iterator[tuple[str, Bytes]]:
    """Name and pixels of every image that can be read; the others go to `skipped`, with the reason."""
    for path in find_images(folder):
        pixels = load(path)
        if isinstance(pixels, str):
            skipped[path.name] = pixels
        else:
            yield path.name, pixels


def beside(output: Path, ending: str) -> Path:
    """results/NAME and ".json" -> results/NAME.json. Makes the folder."""
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.with_name(output.name + ending)


def save_json(output: Path, result: dict[str, Any]) -> Path:
    path = beside(output, ".json")
    with write_atomically(path, force=True) as file:
        file.write(json.dumps(result, indent=1, allow_nan=False).encode() + b"\n")
    return path


def pyplot() -> Any:
    """matplotlib's, without a screen, writing the same file for the same numbers."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vqcodec"
    from matplotlib import pyplot

    return pyplot


def save_figure(output: Path, figure: Any) -> None:
    """As OUTPUT.png and OUTPUT.svg."""
    for ending, metadata in ((".png", {}), (".svg", {"Date": None})):
        figure.savefig(beside(output, ending), dpi=150, metadata=metadata)
    pyplot().close(figure)
