"""Where the bits go: payload against the ideal code length, framing, grids, groups, and the use of codes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import corpus, machine
from bitstream import container
from vqcodec import Codec


class Tally:
    """What was coded in one grid, over many images. bits: (M,), ideal. usage: (M, K + 1 or K + 2), how often null, each
    code, and the escape if there is one."""

    def __init__(self, groups: int, codes: int) -> None:
        self.bits = np.zeros(groups)
        self.usage = np.zeros((groups, codes), np.int64)
        self.payload = 0

    def add(self, indices: NDArray[np.uint16], bits: NDArray[np.float32]) -> None:
        """indices, bits: (M, h, w)."""
        self.bits += bits.sum((1, 2), dtype=np.float64)
        most = self.usage.shape[1]
        for group, index in enumerate(indices):
            self.usage[group] += np.bincount(np.minimum(index, most - 1).ravel(), minlength=most)

    def perplexity(self) -> Any:
        """2 to the entropy of the use of codes, per group: (M,)."""
        p = self.usage / self.usage.sum(1, keepdims=True)
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
    grids, levels = codec.model.config.grids, range(1, codec.model.config.levels + 1)
    tallies = {q: [Tally(grid.groups, 1 + grid.codes + grid.escape) for grid in grids] for q in qualities or levels}
    sizes = dict.fromkeys(tallies, 0)
    skipped: dict[str, str] = {}
    images, pixels = 0, 0
    for name, picture in corpus.photos(folder, skipped):
        for quality, counts in tallies.items():
            data = codec.encode(picture, quality)
            sizes[quality] += len(data)
            looks = codec.examine(data, container.MAX_SIDE**2)
            for tally, payload, look in zip(counts, container.unpack(data).grids, looks, strict=True):
                tally.payload += len(payload)
                tally.add(*look)
        images, pixels = images + 1, pixels + picture.shape[0] * picture.shape[1]
        tell(f"{name}: done")
    for name, reason in skipped.items():
        tell(f"{name}: skipped, {reason}")
    if not images:
        raise ValueError(f"{folder}: none of the images can be read")
    result = {
        "benchmark": "entropy",
        "machine": machine.describe(codec, weights),
        "corpus": {"folder": folder.resolve().name, "images": images, "pixels": pixels, "skipped": skipped},
        "strides": [grid.stride for grid in grids],
        "levels": [_level(q, counts, sizes[q], images, pixels) for q, counts in tallies.items()],
    }
    corpus.save_json(output, result)
    return result


def _level(quality: float, tallies: list[Tally], size: int, images: int, pixels: int) -> dict[str, Any]:
    """size: bytes of all files of this quality."""
    payload, ideal = sum(t.payload for t in tallies), sum(t.bits.sum() for t in tallies) / 8
    return {
        "quality": quality,
        "bpp": 8 * size / pixels,
        "file_bytes": size,
        "payload_bytes": payload,
        "ideal_bytes": ideal,
        "rans_overhead_percent": 100 * (payload / ideal - 1),
        "framing_bytes_per_image": (size - payload) / images,
        "grids": [_grid(tally, pixels) for tally in tallies],
    }


def _grid(tally: Tally, pixels: int) -> dict[str, Any]:
    """Lists have one entry per group, in coding order."""
    return {
        "bpp": tally.bits.sum() / pixels,
        "indices": int(tally.usage.sum()),
        "payload_bytes": tally.payload,
        "ideal_bytes": tally.bits.sum() / 8,
        "codes": tally.usage.shape[1],
        "bits_per_index": (tally.bits / tally.usage.sum(1)).tolist(),
        "perplexity": tally.perplexity().tolist(),
        "codes_used": (tally.usage > 0).sum(1).tolist(),
    }


def table(result: dict[str, Any]) -> str:
    images, folder = result["corpus"]["images"], result["corpus"]["folder"]
    lines = [machine.title(result["machine"]), f"{folder}: {images} images, all together"]
    lines += [f"skipped {name}: {reason}" for name, reason in result["corpus"]["skipped"].items()]
    lines += ["", "by group: bits per index / perplexity / codes used"]
    for level in result["levels"]:
        lines += [f"quality {level['quality']:g}: {level['bpp']:.4f} bpp"]
        for stride, grid in zip(result["strides"], level["grids"], strict=True):
            groups = zip(grid["bits_per_index"], grid["perplexity"], grid["codes_used"], strict=True)
            cells = [f"{bits:5.2f}/{perplexity:5.1f}/{used:3d}" for bits, perplexity, used in groups]
            head = f"  stride {stride:>2}, K {grid['codes']:>3}, {grid['bpp']:.4f} bpp "
            lines += [
                (head if start == 0 else " " * len(head)) + "  ".join(cells[start : start + 4])
                for start in range(0, len(cells), 4)
            ]
    lines += ["", "  vq2  payload bytes  sum -log2 p  rANS adds  header, framing"]
    for level in result["levels"]:
        lines.append(
            f"{level['quality']:>5g} {level['payload_bytes']:>14} {level['ideal_bytes']:>12.1f} "
            f"{level['rans_overhead_percent']:>8.3f} % {level['framing_bytes_per_image']:>7.1f} an image"
        )
    return "\n".join(lines)
