"""Training images: folders of pictures, decoded once into an uncompressed cache, served as batches of random crops."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitstream.errors import ImageError
from vqcodec.files import write_atomically
from vqcodec.image import find_images, read

SHRINK = 2.0  # half of the crops show up to so many times the side of the others
FLAT = 0.02  # share of the crops of which a part gets one colour: margins and backgrounds are rare in photographs


class Cache:
    """All images of a folder as uint8 RGB in one file, mapped into memory: crops cost no decoding.

    Made once: ``cache / KEY.bin`` with the pixels and ``KEY.npy`` with the shapes; KEY hashes paths, sizes and times.
    An image that cannot be read is reported and left out, a cache that is damaged is made again.
    """

    def __init__(self, folder: Path, cache: Path, report: Callable[[str], None] = print) -> None:
        paths = [path for path in find_images(folder) if path.exists()]  # no links to nothing
        files = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        key = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
        data, index = cache / f"{key}.bin", cache / f"{key}.npy"
        if not self._whole(data, index):
            cache.mkdir(parents=True, exist_ok=True)
            self._build(folder, paths, data, index, report)
        self.folder = folder
        self.shapes = np.load(index)  # (images, 3): offset in bytes, height, width
        # As if it could be written to, which torch asks for.
        self.pixels = torch.from_numpy(np.memmap(data, np.uint8, "c")).view(-1, 3)

    @staticmethod
    def _whole(data: Path, index: Path) -> bool:
        try:
            shapes = np.load(index)
            return bool(len(shapes)) and data.stat().st_size == int(shapes[-1, 0] + 3 * shapes[-1, 1] * shapes[-1, 2])
        except (OSError, ValueError, EOFError, IndexError):
            return False

    @staticmethod
    def _build(folder: Path, paths: list[Path], data: Path, index: Path, report: Callable[[str], None]) -> None:
        rows, offset = [], 0
        with write_atomically(data, force=True) as file:  # several runs may start at once
            for path in paths:
                try:
                    array = read(path).pixels
                except (ImageError, OSError) as error:
                    report(f"{path} is left out: {error}")
                    continue
                file.write(array.tobytes())
                rows.append((offset, *array.shape[:2]))
                offset += array.size
            if not rows:
                raise ImageError(f"{folder}: no image there can be read")
        with write_atomically(index, force=True) as file:
            np.save(file, np.array(rows, np.int64))


class Crops:
    """Batches of random square crops: random place, flip and scale (down to a half, half of the time).

    Within a folder images are drawn by the root of their area: large photographs hold more, but not in proportion. All
    work is done on the device. A CPU reads what it needs from the caches, a GPU has all pixels in its memory, as uint8,
    and cuts crops in shapes that depend on no data: nothing waits for it.
    """

    def __init__(
        self,
        folders: Sequence[tuple[Cache, float]],
        largest: int,
        device: torch.device,
        report: Callable[[str], None] = print,
    ) -> None:
        """folders: each with its share of the crops. largest: side of the largest crops. Images that are not as large
        are left out, which is reported. Raises ImageError if none of a folder is."""
        chances: list[np.ndarray] = []
        shapes: list[np.ndarray] = []
        before = 0
        for number, (cache, share) in enumerate(folders):
            usable = cache.shapes[:, 1:].min(1) >= largest
            if not usable.any():
                raise ImageError(
                    f"no image of {cache.folder} is as large as the largest crops, {largest} x {largest} pixels: "
                    "choose a smaller --crop"
                )
            if not usable.all():
                report(
                    f"{cache.folder}: {(~usable).sum()} of {len(usable)} images are smaller than the largest crops, "
                    f"{largest} x {largest} pixels, and left out"
                )
            root = np.sqrt(cache.shapes[:, 1] * cache.shapes[:, 2]) * usable
            chances.append(root / root.sum() * share)
            offset = cache.shapes[:, :1] // 3 + before
            shapes.append(np.hstack([np.full_like(offset, number), offset, cache.shapes[:, 1:]]))
            before += 0 if device.type == "cpu" else len(cache.pixels)
        self.chances = torch.from_numpy(np.concatenate(chances)).to(device)
        self.shapes = torch.from_numpy(np.concatenate(shapes)).to(device)  # (images, 4): folder, offset, height, width
        self.pixels = [cache.pixels for cache, _ in folders]
        if device.type != "cpu":
            parts, self.pixels = self.pixels, [torch.empty(before, 3, dtype=torch.uint8, device=device)]
            for part, place in zip(parts, self.pixels[0].split([len(part) for part in parts]), strict=True):
                place.copy_(part)

    def draw(self, batch: int, size: int) -> Tensor:
        """(batch, 3, size, size) in 0..1, channels last, by the device's random numbers."""
        device = self.chances.device
        chosen = self.shapes[torch.multinomial(self.chances, batch, replacement=True)]
        sides = chosen[:, 2:]
        most = (sides.amin(1) / size).clamp(max=SHRINK)
        scale = torch.where(uniform(batch, device) < 0.5, 1.0, 1 + (most - 1) * uniform(batch, device)).float()
        span = (scale * size).floor().long()
        corner = (torch.rand(batch, 2, device=device) * (sides - span[:, None] + 1)).long()
        corner = torch.minimum(corner, sides - span[:, None])
        flip = uniform(batch, device) < 0.5
        cut = self._cut if device.type == "cpu" else self._cut_alike
        x = cut(chosen, corner, span, scale, flip, size).clamp_(0, 255).div_(255)
        return self._with_flat_parts(x).contiguous(memory_format=torch.channels_last)

    def _cut(self, chosen: Tensor, corner: Tensor, span: Tensor, scale: Tensor, flip: Tensor, size: int) -> Tensor:
        """Crops (batch, 3, size, size) of span x span pixels at a corner (batch, 2) of chosen images (batch, 4)."""
        x = torch.empty(len(span), 3, size, size).contiguous(memory_format=torch.channels_last)
        for k, (folder, start, _, w) in enumerate(chosen.tolist()):
            (top, left), n = corner[k].tolist(), int(span[k])
            patch = self.pixels[folder][start + top * w :][: n * w].view(n, w, 3)[:, left : left + n]
            if scale[k] == 1:
                x[k] = (patch.flip(1) if flip[k] else patch).permute(2, 0, 1)
                continue
            one = scale[k : k + 1], span[k : k + 1], size
            (down,), (across,) = (
                resampling(*one, mirror, n) for mirror in (torch.zeros(1, dtype=torch.bool), flip[k : k + 1])
            )
            small = (down @ patch.float().flatten(1)).view(size, n, 3)
            x[k] = small.permute(2, 0, 1) @ across.t()
        return x

    def _cut_alike(
        self, chosen: Tensor, corner: Tensor, span: Tensor, scale: Tensor, flip: Tensor, size: int
    ) -> Tensor:
        """The same by shapes that depend on no data."""
        # The pixels that a crop is made of, and as many beyond its end as the largest would have, repeated at the edge.
        reach = int(SHRINK * size)
        ahead = torch.arange(reach, device=span.device)
        rows, columns = (torch.minimum(ahead, span[:, None] - 1) + corner[:, c, None] for c in (0, 1))
        offset, width = chosen[:, 1, None, None], chosen[:, 3, None, None]
        place = offset + rows[:, :, None] * width + columns[:, None]
        patch = self.pixels[0].index_select(0, place.flatten()).view(*place.shape, 3).float()
        down, across = (resampling(scale, span, size, mirror, reach) for mirror in (torch.zeros_like(flip), flip))
        small = torch.einsum("bir,brsc->bisc", down, patch)
        return torch.einsum("bjs,bisc->bcij", across, small)

    @staticmethod
    def _with_flat_parts(x: Tensor) -> Tensor:
        """A rectangle of some crops gets one colour, often black or white."""
        batch, size, device = len(x), x.shape[-1], x.device
        colour = (torch.rand(batch, 3, device=device) * 1.5 - 0.25).clamp_(0, 1)
        grey = uniform(batch, device)[:, None].round()
        colour = torch.where(uniform(batch, device)[:, None] < 0.5, grey, colour)[:, :, None, None]
        ends = torch.rand(2, 2, batch, device=device).mul_(1.4).sub_(0.2).sort(1).values * size
        at = torch.arange(size, device=device)
        inside = [(at >= ends[c, 0, :, None]) & (at < ends[c, 1, :, None]) for c in (0, 1)]
        flat = inside[0][:, None, :, None] & inside[1][:, None, None]
        return torch.where(flat & (uniform(batch, device) < FLAT)[:, None, None, None], colour, x)


def uniform(n: int, device: torch.device) -> Tensor:
    return torch.rand(n, device=device)


def resampling(scale: Tensor, span: Tensor, size: int, flip: Tensor, reach: int) -> Tensor:
    """Weights (B, size, reach) that make the pixels of a crop from the first span (B,) of a row: the cubic of
    Keys (1981), stretched by scale (B,); exact copies where that is 1. flip: (B,), from right to left."""
    at = torch.arange(size, device=scale.device)
    at = torch.where(flip[:, None], size - 1 - at, at)
    source = torch.arange(reach, device=scale.device)
    centre = (at + 0.5) * scale[:, None] - 0.5
    t = (source - centre[:, :, None]).abs_().div_(scale[:, None, None]).clamp_(max=2)
    near, far = (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2
    weight = torch.where(t < 1, near, far).mul_(source < span[:, None, None])
    return weight.div_(weight.sum(-1, keepdim=True))
