"""What each part buys: the choice of indices, and the parts of the prior, on the same indices.

The priors are evaluated in their parallel form, which gives the bits that the walk would spend.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import corpus, machine
from benchmarks.corpus import Bytes
from benchmarks.metrics import Curve, bd_rate, bits_per_pixel, psnr, relative_size
from vqcodec import Codec
from vqcodec.codec import PictureEncoder
from vqcodec.image import from_array
from vqcodec.models import dyadic
from vqcodec.models.pixelsnail import PixelSNAIL
from vqcodec.models.quantizer import code_length
from vqcodec.models.vqvae import VQVAE
from vqcodec.weights import load_weights

MOST_SIDE = 768  # pixels: in its parallel form attention takes memory with the square of the image
CHOICES = ("nearest", "rate-constrained")
ORDER0 = {
    "ideal order 0": "the entropy of the use of codes over all images, by group: what a fixed table could reach",
    "adaptive order 0": "a table of counts by group that every image starts anew (Krichevsky and Trofimov)",
}
PARTS = {
    "no attention, no conditioning": "neither of them",
    "no attention": "the prior without its attention",
    "no conditioning": "the prior without what it sees of the coarser grid",
    "full": "the prior as it codes",
    "full, not rounded": "the same network in floating point, without rounding to the dyadic grid",
}


class NearestCodec(Codec):
    """Chooses the nearest code, whatever it costs."""

    def level_for(self, *args: Any, **kwargs: Any) -> tuple[int, float]:
        return super().level_for(*args, **kwargs)[0], 0.0


def run(
    folder: Path,
    output: Path,
    *,
    weights: Path | None = None,
    priors: Sequence[Path] = (),
    qualities: tuple[float, ...] | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure and save OUTPUT.json.

    priors: weights files with the same codebooks, whose priors are evaluated on the same indices.
    """
    codec = Codec.load(weights, device="cpu")
    codecs = {"nearest": NearestCodec.load(weights, device="cpu"), "rate-constrained": codec}
    model = codec.model
    others = {f"prior of {path.stem}": _with_same_codebooks(path, model) for path in priors}
    levels = qualities or tuple(float(level) for level in range(1, model.config.levels + 1))
    bits: dict[tuple[float, int], defaultdict[str, float]] = {
        (q, k): defaultdict(float) for q in levels for k in range(len(model.priors))
    }
    counts = {(q, k): np.zeros((g.groups, g.codes), np.int64) for q in levels for k, g in enumerate(model.config.grids)}
    points: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
    skipped: dict[str, str] = {}
    images, pixels = 0, 0
    for name, picture in corpus.photos(folder, skipped):
        picture = _middle(picture)
        images, pixels = images + 1, pixels + picture.shape[0] * picture.shape[1]
        encoders = {choice: PictureEncoder(codecs[choice], from_array(picture)) for choice in CHOICES}
        for quality in levels:
            for choice, encoder in encoders.items():
                size = len(encoder.encode(quality))
                bpp = bits_per_pixel(size, encoder.width * encoder.height)
                points[choice, quality].append((bpp, psnr(picture, encoder.decoded())))
            grids = encoders["rate-constrained"].grids
            level = torch.tensor([codec.level_for(quality)[0]])
            for k in range(len(grids)):
                used = usage(grids[k], model.config.grids[k].codes)
                counts[quality, k] += used
                found = bits[quality, k]
                found["adaptive order 0"] += adaptive_bits(used)
                for part, spent in part_bits(model, k, grids, level).items():
                    found[part] += spent
                for title, other in others.items():
                    found[title] += prior_bits(other, k, grids, level)
        tell(f"{name}: done")
    for name, reason in skipped.items():
        tell(f"{name}: skipped, {reason}")
    if not images:
        raise ValueError(f"{folder}: none of the images can be read")
    for key, used in counts.items():
        bits[key]["ideal order 0"] = ideal_bits(used)
    result = {
        "benchmark": "ablate",
        "machine": machine.describe(codec, weights),
        "corpus": {"folder": folder.resolve().name, "images": images, "pixels": pixels, "skipped": skipped},
        "variants": ORDER0 | PARTS | {title: "trained separately" for title in others},
        "choice": _choices(points, levels),
        "priors": [
            {
                "quality": q,
                "stride": model.config.grids[k].stride,
                "indices": int(counts[q, k].sum()),
                "bits_per_index": {name: spent / int(counts[q, k].sum()) for name, spent in bits[q, k].items()},
            }
            for q, k in bits
        ],
    }
    corpus.save_json(output, result)
    return result


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
    points: dict[tuple[str, float], list[tuple[float, float]]], levels: Sequence[float]
) -> dict[str, Any]:
    """Mean bpp and PSNR of either choice at each quality; what the nearest code needs at its PSNR in percent of what
    the rate-constrained choice needs, interpolated; and the BD-rate."""
    means = {choice: [np.mean(points[choice, q], 0).tolist() for q in levels] for choice in CHOICES}
    nearest, chosen = (Curve(*zip(*sorted(map(tuple, means[choice])), strict=True)) for choice in CHOICES)
    rows = {
        choice: [{"quality": q, "bpp": bpp, "psnr": db} for q, (bpp, db) in zip(levels, means[choice], strict=True)]
        for choice in CHOICES
    }
    for row in rows["nearest"]:
        row["percent_of_size_at_equal_psnr"] = relative_size(row["bpp"], row["psnr"], chosen)
    return {**rows, "bd_rate": bd_rate(nearest, chosen)._asdict()}


# --- order 0 ---


def usage(grid: Tensor, codes: int) -> Any:
    """How often each code is used: grid (1, M, h, w) -> (M, K)."""
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
    """Bits of grid k under the prior and under what is left of it without some parts; without parts that it does not
    have, nothing."""
    prior = model.priors[k]
    found = {"full": prior_bits(model, k, grids, level)}
    if k:
        found["no conditioning"] = prior_bits(model, k, grids, level, conditioned=False)
    if prior.attention is not None:
        with _without_attention(prior):
            found["no attention"] = prior_bits(model, k, grids, level)
            if k:
                found["no attention, no conditioning"] = prior_bits(model, k, grids, level, conditioned=False)
    with _without_rounding(prior):
        found["full, not rounded"] = prior_bits(model, k, grids, level, exact=False)
    return found


@torch.inference_mode()
def prior_bits(
    model: VQVAE, k: int, grids: Sequence[Tensor], level: Tensor, *, conditioned: bool = True, exact: bool = True
) -> float:
    """Bits of grid k by a model's prior. exact: by its integer tables, as in a file; otherwise by its logits."""
    book, index = model.codebooks[k], grids[k].long()
    condition = model.condition(k, grids[k - 1], level) if k and conditioned else None
    logits = model.priors[k](book.lookup(index, book.activations()), level, condition)
    total = 0.0
    for g, row in enumerate(logits):
        if exact:
            chosen = dyadic.frequencies(row).gather(-1, index[:, g, ..., None])
            total += float((dyadic.TABLE_BITS - chosen.double().log2()).sum())
        else:
            total += float(code_length(row, index[:, g]).double().sum())
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
    titles = "   ".join(f"{choice:>22}" for choice in CHOICES)
    lines += ["", f"choice of indices   {titles}   nearest at equal PSNR"]
    for rows in zip(*(result["choice"][choice] for choice in CHOICES), strict=True):
        numbers = "   ".join(f"{row['bpp']:.4f} bpp {row['psnr']:8.2f} dB" for row in rows)
        percent = rows[0]["percent_of_size_at_equal_psnr"]
        size = "out of range" if percent is None else f"{percent:.0f} % of the size"
        lines.append(f"quality {rows[0]['quality']:<12g}{numbers}   {size:>21}")
    bd = result["choice"]["bd_rate"]
    percent = f"none, {bd['reason']}" if bd["percent"] is None else f"{bd['percent']:+.2f} %"
    lines += [f"BD-rate of the rate-constrained choice against the nearest code: {percent}"]
    lines += ["", "bits per index, of the same indices"]
    names = [name for name in result["variants"] if any(name in row["bits_per_index"] for row in result["priors"])]
    heads = [f"{row['quality']:g}/{row['stride']}" for row in result["priors"]]
    lines.append(f"{'quality/stride':<31}" + " ".join(f"{head:>7}" for head in heads))
    for name in names:
        values = [row["bits_per_index"].get(name) for row in result["priors"]]
        lines.append(f"{name:<31}" + " ".join(f"{'-' if v is None else f'{v:.3f}':>7}" for v in values))
    cost = [100 * (b["full"] / b["full, not rounded"] - 1) for b in (row["bits_per_index"] for row in result["priors"])]
    lines.append(f"{'cost of rounding, %':<31}" + " ".join(f"{value:+7.2f}" for value in cost))
    return "\n".join(lines)
