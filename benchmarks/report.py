"""A page of a rate-distortion result: one HTML file that needs nothing else, no network and no other file."""

import base64
import io
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks import codecs, corpus, machine, rd, speed
from benchmarks.corpus import Bytes
from benchmarks.metrics import METRICS, SCALES, psnr
from vqcodec import Codec
from vqcodec.config import DEFAULT_TUNE
from vqcodec.files import write_atomically

TEMPLATE = Path(__file__).parent / "report.html"
SIDE = 288  # pixels of a crop
CROPPED = ("jpeg", "webp", "avif-444-iq", "jxl", "jpeg2000")  # crops are for the eye


class Place(NamedTuple):
    """Where a crop begins; None: so that it is the middle."""

    image: str
    left: int | None
    top: int | None


def parse_place(text: str) -> Place:
    """NAME+X+Y"""
    found = re.fullmatch(r"(.+)\+(\d+)\+(\d+)", text)
    if not found:
        raise ValueError(f"{text!r} is not a place such as photo.png+240+120")
    return Place(found[1], int(found[2]), int(found[3]))


def run(
    folder: Path,
    output: Path,
    *,
    weights: Path | None = None,
    qualities: Sequence[float] = (3.0,),
    crops: int = 3,
    chosen: Sequence[Place] = (),
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write OUTPUT.html from OUTPUT.json, a result of rd, with crops of the folder's images and, if there is one of the
    same model beside it, the table of speed.json. chosen: the crops to show, instead of some from the middle."""
    result = _result(corpus.beside(output, ".json"), "rd")
    codec = Codec.load(weights, device="cpu")
    if codec.fingerprint.hex() != result["machine"]["fingerprint"]:
        raise ValueError(f"{output}.json is of model {result['machine']['fingerprint']}, not {codec.fingerprint.hex()}")
    names = list(dict.fromkeys(row["image"] for row in result["rows"]))
    spread = np.unique(np.linspace(0, len(names) - 1, 2 * crops + 1).round().astype(int)[1::2])
    places = chosen or [Place(names[k], None, None) for k in spread]
    rivals, _ = codecs.available([name for name in CROPPED if name in result["codecs"]])
    ours = codecs.vq2(codec, tune=result.get("tune", DEFAULT_TUNE))
    panels = []
    for place, quality in itertools.product(places, qualities):
        tell(f"{place.image}, quality {quality:g}: encoding with as many bytes as vq2 needs")
        panels.append(_crop(folder, place, ours, rivals, quality))
    beside = output.with_name("speed.json")
    times = _result(beside, "speed") if beside.exists() else None
    if times and times["machine"]["fingerprint"] != result["machine"]["fingerprint"]:
        tell(f"{beside}: left out, it is of model {times['machine']['fingerprint']}")
        times = None
    path = corpus.beside(output, ".html")
    with write_atomically(path, force=True) as file:
        file.write(page(result, panels, times).encode())
    return {"path": str(path), "images": [place.image for place in places]}


def table(result: dict[str, Any]) -> str:
    return f"{result['path']}, with crops of {', '.join(result['images'])}"


def _result(path: Path, kind: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if result.get("benchmark") != kind:
        raise ValueError(f"{path} is not a result of {kind}")
    return result


def _crop(folder: Path, place: Place, ours: codecs.Rival, rivals: list[codecs.Rival], quality: float) -> dict[str, Any]:
    """A part of an image, as each codec shows it with at most the bytes of vq2, or the fewest that it can."""
    path = folder / place.image
    pixels = corpus.load(path)
    if isinstance(pixels, str):
        raise ValueError(f"{path}: {pixels}")
    height, width = pixels.shape[:2]
    side = min(SIDE, height, width)
    left = (width - side) // 2 if place.left is None else min(place.left, width - side)
    top = (height - side) // 2 if place.top is None else min(place.top, height - side)

    def panel(decoded: Bytes, caption: str) -> dict[str, str]:
        return {"src": _data_uri(decoded[top : top + side, left : left + side]), "caption": caption}

    data = ours.encode(pixels, quality)
    files = [(ours, (quality, data)), *((rival, codecs.largest_within(rival, pixels, len(data))) for rival in rivals)]
    panels = {"original": panel(pixels, f"{pixels.size:,} bytes as pixels")}
    for codec, (setting, written) in files:
        decoded = codec.decode(written)
        score = f"{len(written):,} bytes, {psnr(pixels, decoded):.2f} dB"
        panels[codec.name] = panel(decoded, f"{codec.name}, quality {setting:g}: {score}")
    return {"image": f"{path.name}, {8 * len(data) / (height * width):.2f} bits per pixel", "panels": panels}


def _data_uri(pixels: Bytes) -> str:
    """Lossless, in the smallest format that every browser shows."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", lossless=True, quality=100, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def page(result: dict[str, Any], crops: list[dict[str, Any]], times: dict[str, Any] | None) -> str:
    """HTML; every text of the data reaches the page as text, never as markup."""
    data = {
        "about": f"{result['corpus']['folder']}, {result['corpus']['images']} images.",
        "machine": _machine(result),
        "metrics": {metric: {"title": SCALES[metric].title, "unit": SCALES[metric].unit} for metric in METRICS},
        "what": result["codecs"]
        | {f"{c['name']} *": f"{c['what']} ({c['source']})" for c in result.get("published", {}).get("curves", [])},
        "curves": _curves(result),
        "bd": _bd_rates(result),
        "ranges": _ranges(result),
        "levels": _levels(result),
        "crops": crops,
        "speed": times and {"about": f"{_machine(times)}. {speed.about(times)}", "rows": speed.cells(times)},
    }
    return TEMPLATE.read_text("utf-8").replace("DATA", json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


def _machine(result: dict[str, Any]) -> str:
    return machine.title(result["machine"]).replace("\n", "; ")


def _curves(result: dict[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Points by codec and metric, on the metric's scale, with the value as text."""
    qualities = {(row["codec"], row["bpp"]): row["quality"] for row in result["means"]}
    drawn: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, scores in rd.all_curves(result).items():
        for metric, curve in scores.items():
            points: list[dict[str, Any]] = []
            for bpp, score in zip(*curve, strict=True):
                point = {"bpp": bpp, "score": SCALES[metric].on(score), "text": f"{SCALES[metric].title} {score:.5g}"}
                if (name, bpp) in qualities:
                    point["quality"] = qualities[name, bpp]
                points.append(point)
            drawn.setdefault(name, {})[metric] = points
    return drawn


def _bd_rates(result: dict[str, Any]) -> list[list[str]]:
    metrics = list(result["bd_rate"])
    rows = [["", *(f"by {SCALES[metric].title}" for metric in metrics), "PSNR-RGB over"]]
    for name, bd in result["bd_rate"]["psnr"].items():
        found = [result["bd_rate"][metric].get(name, {"percent": None})["percent"] for metric in metrics]
        rates = ["–" if percent is None else _signed(f"{percent:+.1f} %") for percent in found]
        rows.append([name, *rates, bd["reason"] or f"{bd['low']:.1f} to {bd['high']:.1f} dB"])
    return rows


def _ranges(result: dict[str, Any]) -> list[list[str]]:
    """BD-rates by PSNR over ranges of it."""
    rates = result["bd_rate"]["psnr"]
    ranges = rd.covered(rates)
    rows = [["by PSNR-RGB", *(f"{key} dB" for key in ranges)]]
    for name, bd in rates.items():
        parts = (_signed(f"{bd['ranges'][key]:+.1f} %") if key in bd["ranges"] else "–" for key in ranges)
        rows.append([name, *parts])
    return rows


def _levels(result: dict[str, Any]) -> list[list[str]]:
    metrics = [metric for metric in METRICS if metric in result["means"][0]]
    rows = [["quality", "bpp", *(SCALES[metric].title for metric in metrics)]]
    for row in result["means"]:
        if row["codec"] == "vq2":
            scores = [
                "–" if row[metric] is None else _signed(f"{row[metric]:{SCALES[metric].format}}") for metric in metrics
            ]
            rows.append([f"{row['quality']:g}", f"{row['bpp']:.3f}", *scores])
    return rows


def _signed(number: str) -> str:
    """With a minus as wide as the plus."""
    return number.replace("-", "\N{MINUS SIGN}")
