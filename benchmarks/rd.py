"""Rate-distortion: every image of a folder through real files of vq2 and its rivals."""

import csv
import functools
import io
import itertools
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import codecs, corpus, machine
from benchmarks.codecs import Bytes, Rival
from benchmarks.metrics import (
    BD_METHOD,
    METRICS,
    SCALES,
    SKIPPED,
    Curve,
    bd_rate,
    bits_per_pixel,
    relative_size,
)
from vqcodec import Codec
from vqcodec.config import DEFAULT_TUNE, Tune
from vqcodec.files import write_atomically
from vqcodec.image import find_images

Row = dict[str, Any]
Tell = Callable[[str], None]
Step = Callable[[int, int], None]
Curves = dict[str, dict[str, Curve]]  # by codec and metric

PUBLISHED = Path(__file__).parent / "published" / "kodak.json"
COLUMNS = ("image", "width", "height", "crc32", "codec", "quality", "bytes", "bpp", *METRICS)
STYLES: dict[str, dict[str, Any]] = {
    "vq2": {"marker": "o", "color": "black", "linewidth": 2.5, "zorder": 3},
    "rival": {"marker": "."},
    "published": {"marker": ".", "linestyle": "--", "linewidth": 1.2},
}
MEAN_COLUMNS = ("codec", "quality", "images", "bpp", *METRICS)


def run(
    folder: Path,
    output: Path,
    *,
    weights: Path | None = None,
    qualities: tuple[float, ...] | None = None,
    tune: Tune = DEFAULT_TUNE,
    rivals: tuple[str, ...] = tuple(codecs.RIVALS),
    jobs: int = 1,
    fresh: bool = False,
    published: bool = False,
    tell: Tell = print,
    step: Step = lambda done, total: None,
) -> dict[str, Any]:
    """Measure, compare and save OUTPUT.json, OUTPUT.csv, OUTPUT-mean.csv, OUTPUT.png and OUTPUT.svg.

    The JSON file is saved after every image. What it has of the rivals is not computed again unless `fresh`; what it
    has of vq2 only if code and weights are the same. step: called with the number of images done, and of all.
    """
    paths, lineup = find_images(folder), Lineup(weights, qualities, tune, rivals)
    codec, contestants, missing = assemble(lineup)
    described = machine.describe(codec, weights)
    result: dict[str, Any] = {
        "benchmark": "rd",
        "machine": described if jobs == 1 else {**described, "threads": 1},
        "corpus": {"folder": corpus.name_of(folder), "images": 0, "skipped": {}},
        "jobs": jobs,
        "tune": tune,
        "codecs": {rival.name: rival.what for rival in contestants},
        "skipped": {**missing, **SKIPPED},
    }
    rows = {} if fresh else _known(output, result)
    measured: list[Row] = []
    for done, (path, found) in enumerate(zip(paths, _measure_all(paths, rows, lineup, jobs), strict=True), 1):
        step(done, len(paths))
        rows.pop(path.name, None)
        if isinstance(found, str):
            result["corpus"]["skipped"][path.name] = found
            tell(f"{path.name}: skipped, {found}")
            continue
        measured += found
        result["corpus"]["images"] += 1
        tell(f"{path.name}: done")
        corpus.save_json(output, {**result, "rows": [*measured, *itertools.chain(*rows.values())]})
    if not measured:
        raise ValueError(f"{folder}: none of the {len(paths)} images can be read")
    result |= {"rows": measured, "means": means(measured)}
    if published:
        result["published"] = json.loads(PUBLISHED.read_text("utf-8"))
    curves = all_curves(result)
    result |= compare(curves, result["means"])
    corpus.save_json(output, result)
    _save_csv(output, ".csv", COLUMNS, measured)
    _save_csv(output, "-mean.csv", MEAN_COLUMNS, result["means"])
    plot(output, curves, f"{result['corpus']['folder']}, {result['corpus']['images']} images")
    return result


# --- measuring ---


class Lineup(NamedTuple):
    """Who competes, in a form that other processes can be sent."""

    weights: Path | None
    qualities: tuple[float, ...] | None
    tune: Tune
    rivals: tuple[str, ...]


@functools.cache
def assemble(lineup: Lineup) -> tuple[Codec, list[Rival], dict[str, str]]:
    """The model, vq2 and the rivals that are there, and why the others are not."""
    codec = Codec.load(lineup.weights, device="cpu")
    found, missing = codecs.available(lineup.rivals)
    return codec, [codecs.vq2(codec, lineup.qualities, lineup.tune), *found], missing


def measure(rival: Rival, quality: float, pixels: Bytes) -> Row:
    """One file, written and read back."""
    data = rival.encode(pixels, quality)
    decoded = rival.decode(data)
    scores = {name: metric(pixels, decoded) for name, metric in METRICS.items()}
    bpp = bits_per_pixel(len(data), pixels.shape[0] * pixels.shape[1])
    return {"codec": rival.name, "quality": quality, "bytes": len(data), "bpp": bpp, **scores}


def _measure_file(path: Path, known: list[Row], lineup: Lineup) -> list[Row] | str:
    """Rows of one image, or the reason to skip it: unreadable, or a rival failed (all codecs are averaged over the
    same images). known: earlier rows of an image of this name."""
    pixels = corpus.load(path)
    if isinstance(pixels, str):
        return pixels
    image = corpus.describe(path.name, pixels)
    old = {(row["codec"], row["quality"]): row for row in known if image.items() <= row.items()}
    rows = []
    for rival in assemble(lineup)[1]:
        for quality in rival.qualities:
            try:
                row = old.get((rival.name, quality)) or {**image, **measure(rival, quality, pixels)}
            except (OSError, ValueError) as error:  # what Pillow's codecs raise, of a side of over 16383 in WebP
                if rival.name == "vq2":
                    raise
                return f"{rival.name} at quality {quality:g}: {error}"
            rows.append(row)
    return rows


def _measure_all(
    paths: list[Path], known: dict[str, list[Row]], lineup: Lineup, jobs: int
) -> Iterator[list[Row] | str]:
    """In this process if jobs is 1, otherwise in processes with one thread each."""
    arguments = paths, [known.get(path.name, []) for path in paths], itertools.repeat(lineup)
    if jobs == 1:
        yield from map(_measure_file, *arguments)
        return
    import torch

    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        yield from pool.map(_measure_file, *arguments)


def _known(output: Path, result: dict[str, Any]) -> dict[str, list[Row]]:
    """Rows of an earlier result that hold for this one, by image: of rivals with the same library and settings; of vq2
    with the same weights and the same commit, if no file differs from that."""
    path = corpus.beside(output, ".json")
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text())
    if earlier.get("benchmark") != "rd":
        raise ValueError(f"{path} is not a result of rd: choose another name with -o")
    same = {name for name, text in earlier["codecs"].items() if text == result["codecs"].get(name)}
    now, then = ([r["machine"][key] for key in ("commit", "weights_sha256")] for r in (result, earlier))
    if now != then or now[0].endswith("+") or now[0] == "unknown":
        same.discard("vq2")
    known: dict[str, list[Row]] = {}
    for row in earlier["rows"]:
        if row["codec"] in same and row.keys() >= METRICS.keys():
            known.setdefault(row["image"], []).append({key: row[key] for key in COLUMNS})
    return known


# --- comparing ---


def means(rows: Sequence[Row]) -> list[Row]:
    """The mean over images of bpp and every metric, for each codec and quality; None if an image has None."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["codec"], row["quality"]), []).append(row)
    return [
        {
            "codec": codec,
            "quality": quality,
            "images": len(group),
            **{name: _mean([row[name] for row in group]) for name in ("bpp", *METRICS)},
        }
        for (codec, quality), group in groups.items()
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def all_curves(result: dict[str, Any]) -> Curves:
    """The mean curves of a result; published ones are marked with an asterisk."""
    points = {name: [row for row in result["means"] if row["codec"] == name] for name in result["codecs"]}
    for entry in result.get("published", {"curves": []})["curves"]:
        columns = ("bpp", "psnr", "ms_ssim")
        points[f"{entry['name']} *"] = [dict(zip(columns, point, strict=False)) for point in entry["points"]]
    curves: Curves = {}
    for name, rows in points.items():
        for metric in METRICS:
            pairs = sorted((row["bpp"], row[metric]) for row in rows if row.get(metric) is not None)
            if pairs:
                curves.setdefault(name, {})[metric] = Curve(*zip(*pairs, strict=True))
    return curves


def compare(curves: Curves, mean_rows: Sequence[Row]) -> dict[str, Any]:
    """vq2 against every other curve: BD-rate by each metric, and the size at equal mean PSNR of each quality."""
    anchors = {name: scores for name, scores in curves.items() if name != "vq2"}
    ours = curves["vq2"]
    return {
        "bd_method": BD_METHOD,
        "bd_rate": {
            metric: {
                name: bd_rate(scores[metric], ours[metric], metric)._asdict()
                for name, scores in anchors.items()
                if metric in scores
            }
            for metric in ours
        },
        "percent_of_size_at_equal_psnr": [
            {
                "quality": row["quality"],
                **{name: relative_size(row["bpp"], row["psnr"], scores["psnr"]) for name, scores in anchors.items()},
            }
            for row in mean_rows
            if row["codec"] == "vq2"
        ],
    }


def covered(rates: dict[str, dict[str, Any]]) -> list[str]:
    """All ranges of a metric's BD-rates, ascending."""
    return sorted({key for bd in rates.values() for key in bd["ranges"]}, key=lambda key: float(key.split()[0]))


# --- telling ---


def table(result: dict[str, Any]) -> str:
    images, folder = result["corpus"]["images"], result["corpus"]["folder"]
    skipped = {**result["corpus"]["skipped"], **result["skipped"]}
    lines = [
        machine.title(result["machine"]),
        f"{folder}: {images} images, means over them",
        f"vq2: {result['codecs']['vq2']}",
    ]
    lines += [f"skipped {name}: {reason}" for name, reason in skipped.items()]
    anchors = [name for name in result["codecs"] if name != "vq2"]
    levels = [row for row in result["means"] if row["codec"] == "vq2"]
    lines += ["", " ".join(["  vq2     bpp", *(f"{SCALES[metric].title:>12}" for metric in METRICS)])]
    for row in levels:
        scores = [_number(row[metric], SCALES[metric].format).rjust(12) for metric in METRICS]
        lines.append(" ".join([f"{row['quality']:>5g} {row['bpp']:7.4f}", *scores]))
    lines += ["", "size in percent of theirs at the same mean PSNR"]
    lines += [" ".join(["  vq2", *(f"{name:>9}" for name in anchors)])]
    for row, sizes in zip(levels, result["percent_of_size_at_equal_psnr"], strict=True):
        percents = [_number(sizes[name], ".1f").rjust(max(9, len(name))) for name in anchors]
        lines.append(" ".join([f"{row['quality']:>5g}", *percents]))
    lines += ["", f"BD-rate of vq2 ({result['bd_method']} over the mean curves, negative: vq2 is smaller)"]
    for metric, found in result["bd_rate"].items():
        ranges = covered(found)
        heads = "".join(f"{r:>11}" for r in ranges)
        lines.append(f"  by {SCALES[metric].title:<65}{heads}")
        for name, bd in found.items():
            percent = _number(bd["percent"], "+.2f")
            about = bd["reason"] or f"{bd['low']:.2f} to {bd['high']:.2f} {SCALES[metric].unit}"
            parts = "".join(_number(bd["ranges"].get(r), "+.1f").rjust(11) for r in ranges if bd["ranges"])
            lines.append(f"    against {name:<22} {percent:>8} % {about:<24}{parts}".rstrip())
    if "published" in result:
        lines.append(f"* published numbers, for {result['published']['corpus']}: not measured here")
    return "\n".join(lines)


def _number(value: float | None, format: str) -> str:
    return "-" if value is None else f"{value:{format}}"


def _save_csv(output: Path, ending: str, columns: Sequence[str], rows: Sequence[Row]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    with write_atomically(corpus.beside(output, ending), force=True) as file:
        file.write(text.getvalue().encode())


def plot(output: Path, curves: Curves, title: str) -> None:
    """Mean PSNR over bits per pixel as PNG and SVG, over the range of vq2 and a margin."""
    pyplot = corpus.pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 6), layout="constrained")
    for name, scores in curves.items():
        bpp, psnr = scores["psnr"]
        style = STYLES["vq2" if name == "vq2" else "published" if name.endswith(" *") else "rival"]
        axes.plot(bpp, psnr, label=name, **style)
    bpp, psnr = curves["vq2"]["psnr"]
    axes.set_xlim(0, 1.25 * max(bpp))
    axes.set_ylim(min(psnr) - 2, max(psnr) + 2)
    axes.set(xlabel="bits per pixel", ylabel="mean PSNR-RGB (dB)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    corpus.save_figure(output, figure)
