"""One picture that says it all: a crop of the original, and of what each codec makes of it with the same bytes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks import codecs, corpus
from benchmarks.metrics import psnr
from vqcodec import Codec

Crop = tuple[int, int, int, int]


def parse_crop(text: str) -> Crop:
    """WxH+X+Y -> left, top, right, bottom."""
    found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)\+(\d+)", text)
    if not found:
        raise ValueError(f"{text!r} is not a crop such as 288x256+240+120")
    width, height, left, top = map(int, found.groups())
    return left, top, left + width, top + height


def run(image: Path, output: Path, *, weights: Path | None, quality: float, crop: Crop) -> dict[str, Any]:
    """Write the picture; returns what is in it."""
    pixels = corpus.load(image)
    if isinstance(pixels, str):
        raise ValueError(f"{image}: {pixels}")
    codec = Codec.load(weights, device="cpu")
    ours = codec.encode(pixels, quality)
    panels = [("original", pixels, f"{pixels.size:,} bytes as pixels")]
    rivals, _ = codecs.available(("jpeg", "webp"))
    files = [(r.name, codecs.largest_within(r, pixels, len(ours))[1], r.decode) for r in rivals]
    rows = []
    for name, data, decode in [*files, ("vq2", ours, lambda data: np.array(codec.decode(data)))]:
        decoded = decode(data)
        rows.append({"codec": name, "bytes": len(data), "psnr": psnr(pixels, decoded)})
        panels.append((name, decoded, f"{len(data):,} bytes, {rows[-1]['psnr']:.2f} dB"))
    width, height = crop[2] - crop[0], crop[3] - crop[1]
    sheet = Image.new("RGB", (len(panels) * (width + 8) - 8, height + 44), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for k, (name, array, caption) in enumerate(panels):
        left = k * (width + 8)
        sheet.paste(Image.fromarray(array).crop(crop), (left, 0))
        draw.text((left, height + 2), name, "black", font)
        draw.text((left, height + 22), caption, "#555555", font)
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output, optimize=True)
    return {"image": image.name, "rows": rows}


def table(result: dict[str, Any]) -> str:
    return "\n".join(f"{row['codec']:6} {row['bytes']:9,} bytes {row['psnr']:6.2f} dB" for row in result["rows"])
