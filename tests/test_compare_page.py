"""The page of `vqcodec compare` in a real browser."""

from pathlib import Path

import numpy as np
import pytest
from browser import WIDTHS, ask, needs_browser

from vqcodec.image import from_array
from vqcodec.look import Shown, _file, page

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 900, 3), np.uint8)  # wider than a phone

SCRIPT = """
const images = [...page.images];
return {
  loaded: images.every(image => image.complete && image.naturalWidth === 900),
  inside: images.every(image => image.getBoundingClientRect().right <= root.clientWidth),
  proportion: images.map(image => Math.round(image.width / image.height)),
  columns: new Set(images.map(image => image.getBoundingClientRect().left)).size,
  captions: [...page.querySelectorAll("figcaption")].map(caption => caption.innerText.split("\\n").pop()),
  heading: page.querySelector("h1").textContent,
};
"""


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_every_picture_within_the_window(width: int, tmp_path: Path) -> None:
    file = _file(PIXELS, "PNG")
    row = [Shown(title, file, "png", size, {"PSNR": 31.5}) for title, size in (("vq2", 900), ("A", 850), ("B", 901))]
    made = page("a<b>&.png", from_array(PIXELS), [row]).decode()
    assert ask(made, width, SCRIPT, tmp_path) == {
        "overflow": 0,
        "loaded": True,
        "inside": True,
        "proportion": [15] * 4,
        "columns": 2 if width > 900 else 1,
        "captions": ["original", "PSNR 31.50", "PSNR 31.50", "its smallest file"],
        "heading": "a<b>&.png",
    }
