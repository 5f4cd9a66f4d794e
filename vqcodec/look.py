"""A page for the eye that compares codecs at equal size."""

import base64
import contextlib
import html
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, features

from bitstream.container import NO_LIMIT
from vqcodec.codec import Codec
from vqcodec.config import Tune
from vqcodec.image import MOST_WEBP, Bytes, Picture, stripped
from vqcodec.metrics import psnr, ssimulacra2

# --- vq2 beside what browsers show ---

# Pillow's name of each rival, the feature it needs, the longest side it can hold, and options that give small files at
# a bearable speed.
RIVALS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "JPEG": ("jpg", 65_500, {"optimize": True, "progressive": True}),
    "WEBP": ("webp", MOST_WEBP, {"method": 6}),
    "AVIF": ("avif", 65_536, {"speed": 6}),
}
QUALITIES = 101  # of all rivals: 0..100


class Panel(NamedTuple):
    """A picture on the page. file: in a format that browsers show; size: bytes of the codec's own file; quality: on the
    codec's own scale."""

    title: str
    file: bytes
    kind: str
    size: int
    scores: dict[str, float]
    quality: int | None = None


def metrics() -> dict[str, Callable[[Bytes, Bytes], float | None]]:
    """What this machine can measure."""
    found: dict[str, Callable[[Bytes, Bytes], float | None]] = {"PSNR": psnr}
    if shutil.which("ssimulacra2"):
        found["SSIMULACRA2"] = ssimulacra2
    return found


def compare(codec: Codec, picture: Picture, qualities: Sequence[float], tune: Tune) -> Iterator[list[Panel]]:
    """For each quality ours, then each rival that this Pillow has and that can hold the picture, as large as it can be
    without being larger.

    Pixels as one sees them: upright, in sRGB, without alpha.
    """
    pixels = stripped(picture).pixels
    plain = Picture(pixels, picture.colour.opaque)
    for quality in qualities:
        data = codec.encode(plain, quality, tune=tune)
        decoded = codec.decode_picture(data, max_pixels=NO_LIMIT).pixels
        row = [_shown(f"vq2, quality {quality:g}, tune {tune}", pixels, _file(decoded, "PNG"), "png", len(data))]
        for name, (feature, most, options) in RIVALS.items():
            if features.check(feature) and max(pixels.shape) <= most:
                best, file = _nearest(pixels, name, options, len(data))
                row.append(_shown(name, pixels, file, name.lower(), len(file))._replace(quality=best))
        yield row


def _nearest(pixels: Bytes, name: str, options: dict[str, Any], size: int) -> tuple[int, bytes]:
    """Quality and file: the largest file of at most ``size`` bytes, or the smallest there is."""
    low, high = 0, QUALITIES
    best = _file(pixels, name, quality=0, **options)
    while high - low > 1:
        middle = (low + high) // 2
        file = _file(pixels, name, quality=middle, **options)
        if len(file) <= size:
            low, best = middle, file
        else:
            high = middle
    return low, best


def _file(pixels: Bytes, name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, name, **options)
    return file.getvalue()


def _shown(title: str, original: Bytes, file: bytes, kind: str, size: int) -> Panel:
    with Image.open(io.BytesIO(file)) as image:
        decoded = np.array(image.convert("RGB"))
    scores = {name: metric(original, decoded) for name, metric in metrics().items()}
    return Panel(title, file, kind, size, {name: score for name, score in scores.items() if score is not None})


def source_facts(data: bytes, picture: Picture) -> str:
    """What a picture file is: format, size in pixels and bytes."""
    height, width = picture.pixels.shape[:2]
    with (
        contextlib.suppress(Exception),
        Image.open(io.BytesIO(data)) as image,
    ):  # it may be too large for Pillow's limit
        return f"{image.format}, {width} x {height} pixels, {len(data):,} bytes"
    return f"{width} x {height} pixels, {len(data):,} bytes"


_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem; background: #fff; color: #111 }
h1 { overflow-wrap: anywhere }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); gap: 1rem }
.row { margin-bottom: 2.5rem }
figure { margin: 0 } img { display: block; max-width: 100% }
figcaption { margin-top: 0.3rem; font-variant-numeric: tabular-nums }
#slider { margin-bottom: 2.5rem } #slider label { margin-right: 1rem } select { max-width: 100% }
#stage { overflow: auto } #pair { position: relative; display: inline-block; max-width: 100% }
#split { display: block; box-sizing: border-box; width: 100%; margin: 0.5rem 0 }
#images { position: relative } #images img + img { position: absolute; inset: 0 }
#pair.full, #pair.full img { max-width: none }
"""
_VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
_HINT = "Pictures are shrunk to fit the window, but for those of the slider at full size."
_SLIDER = """<section id="slider" hidden>
<p><label>left <select id="left"></select></label> <label>right <select id="right"></select></label>
<label><input id="full" type="checkbox"> full size</label></p>
<div id="stage"><div id="pair"><input id="split" type="range" min="0" max="100" step="0.1" value="50"
aria-label="border between left and right"><div id="images"></div></div></div>
</section>"""
_SCRIPT = """
const get = id => document.getElementById(id), figures = [...document.querySelectorAll("figure")];
const [left, right] = ["left", "right"].map((side, first) => {
  const image = get("images").appendChild(document.createElement("img")), choice = get(side);
  figures.forEach((figure, number) => choice.add(new Option(figure.dataset.name, number)));
  choice.onchange = () => { image.src = figures[choice.value].querySelector("img").src; };
  choice.value = first;
  choice.onchange();
  image.alt = side;
  return image;
});
get("split").oninput = () => { right.style.clipPath = `inset(0 0 0 ${get("split").value}%)`; };
get("split").oninput();
get("full").onchange = () => { get("pair").classList.toggle("full", get("full").checked); };
get("slider").hidden = false;
"""


def page(name: str, picture: Picture, rows: Sequence[Sequence[Panel]], original: str = "") -> bytes:
    """A page of HTML with everything in it: a slider between any two pictures, the original, then a row for each
    quality. original: facts about its file."""
    pixels = stripped(picture).pixels
    file = _file(pixels, "PNG")
    body = [f"<h1>{html.escape(name)}</h1>", f"<p>{_HINT}</p>", _SLIDER]
    facts = f"<br>{html.escape(original)}" if original else ""
    body += ['<div class="row">', _figure("original", file, "png", facts), "</div>"]
    for row in rows:
        body.append('<div class="row">')
        for shown in row:
            bpp = 8 * shown.size / (pixels.shape[0] * pixels.shape[1])
            quality = "" if shown.quality is None else f", quality {shown.quality}"
            scores = "".join(f"<br>{metric} {value:.2f}" for metric, value in shown.scores.items())
            over = "<br>its smallest file" if shown.size > row[0].size else ""
            facts = f"<br>{shown.size:,} bytes, {bpp:.3f} bpp{scores}{over}"
            body.append(_figure(shown.title, shown.file, shown.kind, facts, quality))
        body.append("</div>")
    body.append(f"<script>{_SCRIPT}</script>")
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8">{_VIEWPORT}'
    head += f"<title>{html.escape(name)}</title><style>{_STYLE}</style>"
    return "\n".join([head, *body, ""]).encode(errors="replace")  # a file name may be no text


def _figure(title: str, file: bytes, kind: str, facts: str, quality: str = "") -> str:
    data = base64.b64encode(file).decode()
    caption = f"<figcaption><b>{title}</b>{quality}{facts}</figcaption>"
    image = f'<img alt="{title}" src="data:image/{kind};base64,{data}">'
    return f'<figure data-name="{title}{quality}">{image}{caption}</figure>'
