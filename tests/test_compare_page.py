"""The page of `vqcodec compare` in a real browser."""

from pathlib import Path

import numpy as np
import pytest
from browser import WIDTHS, ask, needs_browser

from vqcodec.image import from_array
from vqcodec.look import Panel, _file, page

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 900, 3), np.uint8)  # wider than a phone

SCRIPT = """
const images = [...page.querySelectorAll("figure img")], get = id => page.getElementById(id);
const [left, right] = get("images").children, between = right.style.clipPath;
const small = left.width;
get("right").value = 3;
get("right").onchange();
get("split").value = 25;
get("split").oninput();
get("full").click();
return {
  choices: [...get("right").options].map(option => option.text),
  slider: [between, right.style.clipPath, left.src === images[0].src, right.src === images[3].src],
  sizes: [small <= root.clientWidth, left.naturalWidth, left.width],
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
    files = [("vq2", 900, None), ("A", 850, 40), ("B", 901, 0)]
    row = [Panel(title, file, "png", size, {"PSNR": 31.5}, quality) for title, size, quality in files]
    made = page("a<b>&.png", from_array(PIXELS), [row], "PNG, 9 bytes").decode()
    assert ask(made, width, SCRIPT, tmp_path) == {
        "overflow": 0,
        "loaded": True,
        "inside": True,
        "proportion": [15] * 4,
        "columns": 2 if width > 900 else 1,
        "choices": ["original", "vq2", "A, quality 40", "B, quality 0"],
        "slider": ["inset(0px 0px 0px 50%)", "inset(0px 0px 0px 25%)", True, True],
        "sizes": [True, 900, 900],
        "captions": ["PNG, 9 bytes", "PSNR 31.50", "PSNR 31.50", "its smallest file"],
        "heading": "a<b>&.png",
    }
