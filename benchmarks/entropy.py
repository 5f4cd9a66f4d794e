"""Where the bits of files made for PSNR go: payload against the ideal code length, framing, grids, and what the groups
spend them on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import corpus, indices, machine
from bitstream import container
from vqcodec import Codec
from vqcodec.codec import PictureEncoder
from vqcodec.image import from_array
from vqcodec.models.quantizer import Codebook


@dataclass
class Tally:
    """What was coded in one grid, over many images. usage: (M, 1 + N), how often each group was null and each of its
    outcomes; bits: (2, M), ideal, of flags and of outcomes with their escapes; payload: bytes."""

    usage: NDArray[np.int64]
    bits: NDArray[np.float64]
    payload: int = 0

    @classmethod
    def empty(cls, book: Codebook) -> "Tally":
        return cls(np.zeros((book.groups, 1 + book.outcomes), np.int64), np.zeros((2, book.groups)))


def perplexity(used: NDArray[np.int64]) -> NDArray[np.float64]:
    """2 to the entropy of counts (M, N), by group: (M,); 1 where nothing was counted."""
    p = used / np.maximum(used.sum(1, keepdims=True), 1)
    return np.exp2(-(p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum(1))


def run(
    folder: Path,
    output: Path,
    *,
    weights: Path | None = None,
    qualities: tuple[float, ...] | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Encode every image at every quality, count, and save OUTPUT.json."""
    codec = Codec.load(weights, device="cpu")
    model = codec.model
    levels = qualities or range(1, model.config.levels + 1)
    tallies = {q: [Tally.empty(book) for book in model.codebooks] for q in levels}
    sizes = dict.fromkeys(tallies, 0)
    skipped: dict[str, str] = {}
    names: list[str] = []
    pixels = 0
    for name, picture in corpus.photos(folder, skipped):
        picture = indices.middle(picture)
        names.append(name)
        pixels += picture.shape[0] * picture.shape[1]
        encoder = PictureEncoder(codec, from_array(picture), tune="psnr")
        for quality, counts in tallies.items():
            data = encoder.encode(quality)
            sizes[quality] += len(data)
            parts = container.unpack(data)
            for k, tally in enumerate(counts):
                tally.usage += indices.usage(encoder.grids[k], model.codebooks[k])
                tally.bits += indices.prior_bits(model, k, encoder.grids, parts.header.level - 1)
                tally.payload += len(parts.grids[k])
        tell(f"{name}: done")
    for name, reason in skipped.items():
        tell(f"{name}: skipped, {reason}")
    if not names:
        raise ValueError(f"{folder}: none of the images can be read")
    result = {
        "benchmark": "entropy",
        "machine": machine.describe(codec, weights),
        "corpus": corpus.summary(folder, names, pixels, skipped),
        "strides": [grid.stride for grid in model.config.grids],
        "levels": [
            {
                "quality": quality,
                **_level(counts, sizes[quality], len(names), pixels),
                "grids": [_grid(tally, book, pixels) for tally, book in zip(counts, model.codebooks, strict=True)],
            }
            for quality, counts in tallies.items()
        ],
    }
    corpus.save_json(output, result)
    return result


def _level(tallies: list[Tally], size: int, images: int, pixels: int) -> dict[str, Any]:
    """size: bytes of all files of this quality."""
    payload, ideal = sum(t.payload for t in tallies), sum(t.bits.sum() for t in tallies) / 8
    return {
        "bpp": 8 * size / pixels,
        "file_bytes": size,
        "payload_bytes": payload,
        "ideal_bytes": ideal,
        "rans_overhead_percent": 100 * (payload / ideal - 1),
        "framing_bytes_per_image": (size - payload) / images,
    }


def _grid(tally: Tally, book: Codebook, pixels: int) -> dict[str, Any]:
    """Lists have one entry per group, in coding order. The bits of outcomes are without the places of escapes but in
    ``bits_per_outcome``."""
    (flags, outcomes), used = tally.bits, tally.usage
    escapes = indices.escape_bits(used, book).sum()
    coded = used[:, 1:].sum(1)
    return {
        "codes": book.codes,
        "indices": int(used.sum()),
        "payload_bytes": tally.payload,
        "ideal_bytes": tally.bits.sum() / 8,
        "bpp": tally.bits.sum() / pixels,
        "bpp_of_flags": flags.sum() / pixels,
        "bpp_of_outcomes": (outcomes.sum() - escapes) / pixels,
        "bpp_of_escapes": escapes / pixels,
        "bits_per_flag": (flags / used.sum(1)).tolist(),
        "percent_not_null": (100 * coded / used.sum(1)).tolist(),
        "bits_per_outcome": (outcomes / np.maximum(coded, 1)).tolist(),
        "perplexity": perplexity(used[:, 1:]).tolist(),
        "codes_used": (used[:, 1 : 1 + book.codes] > 0).sum(1).tolist(),
        "escapes": used[:, 1 + book.codes :].sum(1).tolist(),
    }


def table(result: dict[str, Any]) -> str:
    images, folder = result["corpus"]["images"], result["corpus"]["folder"]
    lines = [machine.title(result["machine"]), f"{folder}: {images} images, all together"]
    lines += [f"skipped {name}: {reason}" for name, reason in result["corpus"]["skipped"].items()]
    lines += ["", "by group: bits per flag, % not null, bits per outcome / perplexity of outcomes / codes used"]
    for level in result["levels"]:
        lines += [f"quality {level['quality']:g}: {level['bpp']:.4f} bpp"]
        for stride, grid in zip(result["strides"], level["grids"], strict=True):
            kinds = " + ".join(f"{kind} {grid[f'bpp_of_{kind}']:.4f}" for kind in ("flags", "outcomes", "escapes"))
            lines += [f"  stride {stride}, K {grid['codes']}: {grid['bpp']:.4f} bpp = {kinds}"]
            keys = "bits_per_flag", "percent_not_null", "bits_per_outcome", "perplexity", "codes_used"
            groups = zip(*(grid[key] for key in keys), strict=True)
            cells = ["{:5.3f} {:5.1f} {:4.1f}/{:5.1f}/{:3d}".format(*group) for group in groups]
            lines += ["    " + "   ".join(cells[start : start + 4]) for start in range(0, len(cells), 4)]
    lines += ["", "  vq2  payload bytes  sum -log2 p  rANS adds  header, framing"]
    for level in result["levels"]:
        lines.append(
            f"{level['quality']:>5g} {level['payload_bytes']:>14} {level['ideal_bytes']:>12.1f} "
            f"{level['rans_overhead_percent']:>8.3f} % {level['framing_bytes_per_image']:>7.1f} an image"
        )
    return "\n".join(lines)
