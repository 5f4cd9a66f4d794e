"""What each part buys, by PSNR and in files that are made for it: the choice of indices, the encoder's effort, and the
parts of the prior, on the same indices."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import corpus, indices, machine
from benchmarks.corpus import Bytes
from benchmarks.metrics import Curve, bd_rate, bits_per_pixel, psnr, relative_size
from bitstream.walk import Grid
from vqcodec import Codec
from vqcodec.codec import PictureEncoder
from vqcodec.config import DEFAULT_EFFORT
from vqcodec.image import from_array
from vqcodec.models.vqvae import VQVAE
from vqcodec.weights import load_weights

REFERENCE = "rate-constrained"  # the choice that all others are compared with
ORDER0 = {
    "ideal order 0": "the entropy of the use of null, codes and escape over all images, by group: what a fixed table "
    "could reach",
    "adaptive order 0": "a table of counts by group that every image starts anew (Krichevsky and Trofimov)",
}
PARTS = {
    "no attention, no conditioning": "convolutions alone",
    "no attention": "the prior without its attention",
    "no conditioning": "the prior without what it sees of the coarser grid",
    "full": "the prior as it codes",
    "full, not rounded": "the same network in floating point, without rounding to the dyadic grid",
}

Way = Callable[[int, Sequence[Grid], int], float]  # of coding: grid number, grids, level from 0 -> bits


class NearestCodec(Codec):
    """Chooses the nearest vector, whatever it costs: of null, of a code, or of an escape."""

    def level_for(self, *args: Any, **kwargs: Any) -> tuple[int, float]:
        return super().level_for(*args, **kwargs)[0], 0.0


class Point(NamedTuple):
    """A file. cost: lambda MSE (of 0..255) + bits per pixel, what the encoder minimises; seconds: of encoding."""

    bpp: float
    psnr: float
    cost: float
    seconds: float


def run(
    folder: Path,
    output: Path,
    *,
    weights: Path | None = None,
    priors: Sequence[Path] = (),
    qualities: tuple[float, ...] | None = None,
    efforts: Sequence[int] = (DEFAULT_EFFORT,),
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure and save OUTPUT.json.

    priors: weights files with the same codebooks, whose priors are evaluated on the same indices. efforts: of the
    encoder, to be compared with 0. Raises ValueError for qualities and efforts out of range and for other codebooks.
    """
    codec = Codec.load(weights, device="cpu")
    encoders = {"nearest": (NearestCodec.load(weights, device="cpu"), 0), REFERENCE: (codec, 0)}
    encoders |= {f"effort {effort}": (codec, effort) for effort in efforts}
    model = codec.model
    others = {f"prior of {path.stem}": _with_same_codebooks(path, model) for path in priors}
    ways = prior_ways(model) | {title: partial(total_bits, other) for title, other in others.items()}
    levels = qualities or tuple(float(level) for level in range(1, model.config.levels + 1))
    bits: dict[tuple[float, int], defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    counts: dict[tuple[float, int], NDArray[np.int64]] = {}
    points: dict[tuple[str, float], list[Point]] = defaultdict(list)
    skipped: dict[str, str] = {}
    names: list[str] = []
    pixels = 0
    for name, picture in corpus.photos(folder, skipped):
        picture = indices.middle(picture)
        names.append(name)
        pixels += picture.shape[0] * picture.shape[1]
        for quality in levels:
            level = codec.level_for(quality)
            grids: dict[str, list[Grid]] = {}
            for choice, (used_codec, effort) in encoders.items():
                encoder = PictureEncoder(used_codec, from_array(picture), effort, "psnr")
                points[choice, quality].append(_point(encoder, picture, quality, level))
                grids[choice] = encoder.grids
            chosen = grids[REFERENCE]
            for k, book in enumerate(model.codebooks):
                used = indices.usage(chosen[k], book)
                counts[quality, k] = used + counts.get((quality, k), 0)
                found = bits[quality, k]
                found["adaptive order 0"] += adaptive_bits(used) + indices.escape_bits(used, book).sum()
                for title, way in ways.items():
                    found[title] += way(k, chosen, level[0])
        tell(f"{name}: done")
    for name, reason in skipped.items():
        tell(f"{name}: skipped, {reason}")
    if not names:
        raise ValueError(f"{folder}: none of the images can be read")
    for (quality, k), used in counts.items():
        escapes = indices.escape_bits(used, model.codebooks[k]).sum()
        bits[quality, k]["ideal order 0"] = ideal_bits(used) + escapes
    variants = ORDER0 | PARTS | {title: "trained separately" for title in others}
    strides = [grid.stride for grid in model.config.grids]

    def row(quality: float, grid: str, parts: Sequence[int]) -> dict[str, Any]:
        rates = {name: sum(bits[quality, k][name] for k in parts) / pixels for name in variants}
        return {"quality": quality, "grid": grid, "bits_per_pixel": rates}

    result = {
        "benchmark": "ablate",
        "machine": machine.describe(codec, weights),
        "corpus": corpus.summary(folder, names, pixels, skipped),
        "variants": variants,
        "choice": _choices(points, tuple(encoders), levels, pixels / len(names)),
        "priors": [
            *(row(q, f"stride {stride}", [k]) for q in levels for k, stride in enumerate(strides)),
            *(row(q, "all", range(len(strides))) for q in levels),
        ],
    }
    corpus.save_json(output, result)
    return result


def _point(encoder: PictureEncoder, picture: Bytes, quality: float, level: tuple[int, float]) -> Point:
    """level: of the quality, and the factor on its rates, as the product codes it."""
    start = time.perf_counter()
    size = len(encoder.encode(quality))
    seconds = time.perf_counter() - start
    bpp, db = bits_per_pixel(size, encoder.width * encoder.height), psnr(picture, encoder.decoded())
    number, rate_weight = level
    distortion = encoder.codec.model.config.lambdas[number] * 255**2 * 10 ** (-db / 10)
    return Point(bpp, db, distortion + rate_weight * bpp, seconds)


def _with_same_codebooks(path: Path, model: VQVAE) -> VQVAE:
    other = load_weights(path)
    grids = [[(grid.stride, grid.escape) for grid in m.config.grids] for m in (model, other)]
    books = zip(model.codebooks, other.codebooks, strict=False)
    same = all(a.vectors.equal(b.vectors) for a, b in books) and grids[0] == grids[1]
    if not same or model.config.levels != other.config.levels:
        raise ValueError(f"{path} has other codebooks or levels: its priors cannot be evaluated on the same indices")
    return other


def _choices(
    points: dict[tuple[str, float], list[Point]], choices: Sequence[str], levels: Sequence[float], pixels: float
) -> dict[str, Any]:
    """Of every choice the means at each quality, its size at its PSNR in percent of what the reference needs,
    interpolated, and its cost in percent of the reference's; and the BD-rate against the reference.

    pixels: mean of the images.
    """
    means = {c: [Point(*np.mean(points[c, q], 0).tolist()) for q in levels] for c in choices}
    curves = {c: Curve(*zip(*sorted((point.bpp, point.psnr) for point in means[c]), strict=True)) for c in choices}
    return {
        c: {
            "rows": [
                {
                    "quality": q,
                    "bpp": point.bpp,
                    "psnr": point.psnr,
                    "percent_of_size_at_equal_psnr": relative_size(point.bpp, point.psnr, curves[REFERENCE]),
                    "percent_of_cost": 100 * point.cost / base.cost,
                    "seconds_per_megapixel": 1e6 * point.seconds / pixels,
                }
                for q, point, base in zip(levels, means[c], means[REFERENCE], strict=True)
            ],
            "bd_rate": bd_rate(curves[REFERENCE], curves[c])._asdict(),
        }
        for c in choices
    }


# --- order 0 ---


def ideal_bits(used: NDArray[np.int64]) -> float:
    """Bits of symbols with these counts (M, K) under fixed tables made of the counts themselves."""
    total = used.sum(1, keepdims=True)
    share = np.divide(used, total, where=used > 0, out=np.ones(used.shape))
    return float(-(used * np.log2(share)).sum())


def adaptive_bits(used: NDArray[np.int64]) -> float:
    """Bits of symbols with these counts (M, K) under tables that count while they code and start with 1/2 each: the
    same in every order."""
    half = math.lgamma(0.5)
    nats = 0.0
    for group in used.tolist():
        nats += math.lgamma(sum(group) + len(group) / 2) - math.lgamma(len(group) / 2)
        nats -= sum(math.lgamma(n + 0.5) - half for n in group)
    return nats / math.log(2)


# --- parts of the prior ---


def prior_ways(model: VQVAE) -> dict[str, Way]:
    """Ways to code with the prior and with what is left of it without some parts. A part that the prior does not have
    anyway changes nothing."""
    return {
        "no attention, no conditioning": partial(total_bits, _without(model, "attention", "condition")),
        "no attention": partial(total_bits, _without(model, "attention")),
        "no conditioning": partial(total_bits, _without(model, "condition")),
        "full": partial(total_bits, model),
        "full, not rounded": partial(_unrounded_bits, _smooth(model)),
    }


def total_bits(model: VQVAE, k: int, grids: Sequence[Grid], level: int) -> float:
    """Bits of grid k by a model's prior, as in a file."""
    return float(indices.prior_bits(model, k, grids, level).sum())


def _without(model: VQVAE, *parts: str) -> VQVAE:
    model = deepcopy(model)
    for prior in model.priors:
        for part in parts:
            setattr(prior, part, None)
    return model


def _smooth(model: VQVAE) -> VQVAE:
    """With attention in floating point."""
    model = deepcopy(model)
    for prior in model.priors:
        if prior.attention is not None:
            prior.attention.train()
    return model


class Unrounded(TorchFunctionMode):
    """Exact layers keep the limits of their values, but not their steps: they round by adding a half step and going
    down to a whole one, instead of which the half is taken off again. Weights stay on their grid."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].sub_(0.5) if func is Tensor.floor_ else func(*args, **(kwargs or {}))


def _unrounded_bits(model: VQVAE, k: int, grids: Sequence[Grid], level: int) -> float:
    with Unrounded():
        return float(indices.prior_bits(model, k, grids, level, exact=False).sum())


# --- telling ---


def table(result: dict[str, Any]) -> str:
    images, folder = result["corpus"]["images"], result["corpus"]["folder"]
    lines = [machine.title(result["machine"]), f"{folder}: {images} images"]
    lines += [f"skipped {name}: {reason}" for name, reason in result["corpus"]["skipped"].items()]
    for choice, found in result["choice"].items():
        lines += ["", f"{choice:<18}    bpp      PSNR   size at equal PSNR   cost    s/megapixel"]
        for row in found["rows"]:
            percent = row["percent_of_size_at_equal_psnr"]
            size = "out of range" if percent is None else f"{percent:.1f} %"
            numbers = f"{row['bpp']:.4f} {row['psnr']:6.2f} dB {size:>20} {row['percent_of_cost']:6.1f} %"
            lines.append(f"quality {row['quality']:<11g} {numbers} {row['seconds_per_megapixel']:11.1f}")
        bd = found["bd_rate"]
        percent = f"none, {bd['reason']}" if bd["percent"] is None else f"{bd['percent']:+.2f} %"
        lines += [f"BD-rate against {REFERENCE}: {percent}"] if choice != REFERENCE else []
    return "\n".join([*lines, "", *_prior_lines(result["priors"])])


def _prior_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The bits of the same indices, coded in each way, and what rounding costs."""
    heads = (f"{row['quality']:g}/{row['grid'].removeprefix('stride ')}" for row in rows)
    columns = [row["bits_per_pixel"] for row in rows]
    lines = [f"{'bits per pixel: quality/stride':<31}" + " ".join(f"{head:>7}" for head in heads)]
    lines += [f"{name:<31}" + " ".join(f"{column[name]:7.4f}" for column in columns) for name in columns[0]]
    cost = [100 * (column["full"] / column["full, not rounded"] - 1) for column in columns]
    return [*lines, f"{'cost of rounding, %':<31}" + " ".join(f"{value:+7.2f}" for value in cost)]
