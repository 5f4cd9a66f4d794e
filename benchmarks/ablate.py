"""What each part buys: the choice of indices, the encoder's effort, and the parts of the prior, on the same indices.

The priors are evaluated in their parallel form, which gives the bits that the walk would spend.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import corpus, machine
from benchmarks.corpus import Bytes
from benchmarks.metrics import Curve, bd_rate, bits_per_pixel, psnr, relative_size
from bitstream.exact import ESCAPE_BITS
from vqcodec import DEFAULT_EFFORT, Codec
from vqcodec.codec import PictureEncoder
from vqcodec.image import from_array
from vqcodec.models import dyadic
from vqcodec.models.pixelsnail import PixelSNAIL, rows_of, take
from vqcodec.models.quantizer import code_length
from vqcodec.models.vqvae import VQVAE
from vqcodec.weights import load_weights

MOST_SIDE = 768  # pixels: in its parallel form attention takes memory with the square of the image
REFERENCE = "rate-constrained"  # the choice that all others are compared with
ORDER0 = {
    "ideal order 0": "the entropy of the use of codes over all images, by group: what a fixed table could reach",
    "adaptive order 0": "a table of counts by group that every image starts anew (Krichevsky and Trofimov)",
}
PARTS = {
    "no attention, no conditioning": "convolutions alone",
    "no attention": "the prior without its attention",
    "no conditioning": "the prior without what it sees of the coarser grid",
    "full": "the prior as it codes",
    "full, not rounded": "the same network in floating point, without rounding to the dyadic grid",
}


class NearestCodec(Codec):
    """Chooses the nearest code, whatever it costs."""

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
    levels = qualities or tuple(float(level) for level in range(1, model.config.levels + 1))
    bits: dict[tuple[float, int], defaultdict[str, float]] = {
        (q, k): defaultdict(float) for q in levels for k in range(len(model.priors))
    }
    counts = {
        (q, k): np.zeros((g.groups, 1 + g.codes + g.escape), np.int64)
        for q in levels
        for k, g in enumerate(model.config.grids)
    }
    points: dict[tuple[str, float], list[Point]] = defaultdict(list)
    skipped: dict[str, str] = {}
    images, pixels = 0, 0
    for name, picture in corpus.photos(folder, skipped):
        picture = _middle(picture)
        images, pixels = images + 1, pixels + picture.shape[0] * picture.shape[1]
        for quality in levels:
            grids: dict[str, list[Tensor]] = {}
            for choice, (used_codec, effort) in encoders.items():
                encoder = PictureEncoder(used_codec, from_array(picture), effort)
                points[choice, quality].append(_point(encoder, picture, quality, codec.level_for(quality)))
                grids[choice] = [torch.from_numpy(grid.astype(np.int64))[None] for grid in encoder.grids]
            chosen = grids[REFERENCE]
            level = torch.tensor([codec.level_for(quality)[0]])
            for k in range(len(chosen)):
                book = model.codebooks[k]
                used = usage(book.outcome(chosen[k]), 1 + book.outcomes)
                counts[quality, k] += used
                found = bits[quality, k]
                found["adaptive order 0"] += adaptive_bits(used)
                for part, spent in part_bits(model, k, chosen, level).items():
                    found[part] += spent
                for title, other in others.items():
                    found[title] += prior_bits(other, k, chosen, level)
        tell(f"{name}: done")
    for name, reason in skipped.items():
        tell(f"{name}: skipped, {reason}")
    if not images:
        raise ValueError(f"{folder}: none of the images can be read")
    for key, used in counts.items():
        bits[key]["ideal order 0"] = ideal_bits(used)
    variants = ORDER0 | PARTS | {title: "trained separately" for title in others}
    all_grids = range(len(model.config.grids))
    result = {
        "benchmark": "ablate",
        "machine": machine.describe(codec, weights),
        "corpus": {"folder": folder.resolve().name, "images": images, "pixels": pixels, "skipped": skipped},
        "variants": variants,
        "choice": _choices(points, tuple(encoders), levels, pixels / images),
        "priors": [
            {
                "quality": q,
                "stride": model.config.grids[k].stride,
                "indices": int(counts[q, k].sum()),
                "bits_per_index": {name: bits[q, k][name] / int(counts[q, k].sum()) for name in variants},
            }
            for q, k in bits
        ],
        "priors_of_all_grids": [
            {
                "quality": q,
                "bits_per_pixel": {name: sum(bits[q, k][name] for k in all_grids) / pixels for name in variants},
            }
            for q in levels
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


def _middle(pixels: Bytes) -> Bytes:
    top, left = (max(0, side - MOST_SIDE) // 2 for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + MOST_SIDE, left : left + MOST_SIDE])


def _with_same_codebooks(path: Path, model: VQVAE) -> VQVAE:
    other = load_weights(path)
    books = [[book.vectors.half() for book in m.codebooks] for m in (model, other)]
    same = [a.shape == b.shape and torch.equal(a, b) for a, b in zip(*books, strict=False)]
    if len(books[0]) != len(books[1]) or not all(same) or model.config.levels != other.config.levels:
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


def usage(grid: Tensor, codes: int) -> Any:
    """How often null and each outcome is used: (1, M, h, w) -> (M, codes)."""
    return np.stack([np.bincount(group.flatten().numpy(), minlength=codes) for group in grid[0]])


def ideal_bits(used: Any) -> float:
    """Bits of indices with these counts (M, K) under fixed tables made of the counts themselves."""
    total = used.sum(1, keepdims=True)
    share = np.divide(used, total, where=used > 0, out=np.ones(used.shape))
    return float(-(used * np.log2(share)).sum())


def adaptive_bits(used: Any) -> float:
    """Bits of indices with these counts (M, K) under tables that count while they code and start with 1/2 each: the
    same in every order."""
    half = math.lgamma(0.5)
    nats = 0.0
    for group in used.tolist():
        nats += math.lgamma(sum(group) + len(group) / 2) - math.lgamma(len(group) / 2)
        nats -= sum(math.lgamma(n + 0.5) - half for n in group)
    return nats / math.log(2)


# --- parts of the prior ---


def part_bits(model: VQVAE, k: int, grids: Sequence[Tensor], level: Tensor) -> dict[str, float]:
    """Bits of grid k under the prior and under what is left of it without some parts. A part that the prior does not
    have anyway changes nothing."""
    prior = model.priors[k]

    def bits(conditioned: bool = True) -> float:
        return prior_bits(model, k, grids, level, conditioned=conditioned)

    found = {"full": bits()}
    found["no conditioning"] = bits(conditioned=False) if k else found["full"]
    found["no attention"], found["no attention, no conditioning"] = found["full"], found["no conditioning"]
    if prior.attention is not None:
        with _without_attention(prior):
            found["no attention"] = bits()
            found["no attention, no conditioning"] = bits(conditioned=False) if k else found["no attention"]
    with _without_rounding(prior):
        found["full, not rounded"] = prior_bits(model, k, grids, level, exact=False)
    return found


@torch.inference_mode()
def prior_bits(
    model: VQVAE, k: int, grids: Sequence[Tensor], level: Tensor, *, conditioned: bool = True, exact: bool = True
) -> float:
    """Bits of grid k by a model's prior. exact: by its integer tables, as in a file; otherwise by its logits."""
    book, prior, index = model.codebooks[k], model.priors[k], grids[k][0].flatten(1)
    condition = model.condition(k, grids[k - 1], level) if k and conditioned else None
    flags, known = prior(book.activations(book.lookup(index), 1, *grids[k].shape[2:]), level, condition)
    outcome = book.outcome(index)
    rows = rows_of(outcome > 0)
    of_outcomes = prior.logits(known, level, rows), take(outcome.flatten(), rows.place) - 1
    of_flags = torch.stack([torch.zeros_like(flags), flags], -1), (outcome > 0).long()
    total = float((outcome > book.codes).sum()) * book.dim * ESCAPE_BITS
    for logits, symbol in (of_flags, of_outcomes):
        if exact:
            chosen = dyadic.frequencies(logits).gather(-1, symbol[..., None])
            total += float((dyadic.TABLE_BITS - chosen.double().log2()).sum())
        else:
            total += float(code_length(logits, symbol).double().sum())
    return total


@contextmanager
def _without_attention(prior: PixelSNAIL) -> Iterator[None]:
    attention, prior.attention = prior.attention, None
    try:
        yield
    finally:
        prior.attention = attention


@contextmanager
def _without_rounding(prior: PixelSNAIL) -> Iterator[None]:
    """The network with the limits of its values, but without their steps; its weights stay on their grid."""

    def clip(x: Tensor, bits: int, low: int, high: int) -> Tensor:
        return x.clamp(low * 2.0**-bits, high * 2.0**-bits)

    with mock.patch.object(dyadic, "_snap", clip):
        if prior.attention is not None:
            prior.attention.train()  # attention in floating point
        try:
            yield
        finally:
            if prior.attention is not None:
                prior.attention.eval()


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
    rows = result["priors"]
    heads = [f"{row['quality']:g}/{row['stride']}" for row in rows]
    lines += ["", *_prior_lines("bits per index: quality/stride", heads, [row["bits_per_index"] for row in rows])]
    rows = result["priors_of_all_grids"]
    heads = [f"{row['quality']:g}" for row in rows]
    lines += ["", *_prior_lines("bits per pixel: quality", heads, [row["bits_per_pixel"] for row in rows])]
    return "\n".join(lines)


def _prior_lines(title: str, heads: Sequence[str], columns: Sequence[dict[str, float]]) -> list[str]:
    """The bits of the same indices, coded in each way, and what rounding costs."""
    lines = [f"{title:<31}" + " ".join(f"{head:>7}" for head in heads)]
    lines += [f"{name:<31}" + " ".join(f"{column[name]:7.3f}" for column in columns) for name in columns[0]]
    cost = [100 * (column["full"] / column["full, not rounded"] - 1) for column in columns]
    return [*lines, f"{'cost of rounding, %':<31}" + " ".join(f"{value:+7.2f}" for value in cost)]
