"""Training images: any folder of pictures, decoded once into an uncompressed cache, served as random crops."""

import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from bitstream.errors import ImageError
from vqcodec.image import read

SUFFIXES = {".avif", ".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def find_images(folder: Path) -> list[Path]:
    """Pictures directly in a folder, by name. Raises FileNotFoundError if there are none."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))})")
    return found


class Cache:
    """All images of a folder as uint8 RGB in one file, mapped into memory: crops cost no decoding.

    Made once: ``cache / KEY.bin`` with the pixels and ``KEY.npy`` with the shapes; KEY hashes paths, sizes and times.
    """

    def __init__(self, folder: Path, cache: Path) -> None:
        paths = find_images(folder)
        files = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        key = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
        data, index = cache / f"{key}.bin", cache / f"{key}.npy"
        if not index.exists():
            cache.mkdir(parents=True, exist_ok=True)
            self._build(paths, data, index)
        self.shapes = np.load(index)  # (images, 3): offset, height, width
        self.pixels = np.memmap(data, np.uint8, "r")

    @staticmethod
    def _build(paths: list[Path], data: Path, index: Path) -> None:
        rows, offset = [], 0
        partial = data.with_suffix(f".{os.getpid()}")  # several processes may start at once
        with open(partial, "wb") as file:
            for path in paths:
                try:
                    array = read(path).pixels
                except ImageError as error:
                    raise ImageError(f"{path}: {error}") from None
                file.write(array.tobytes())
                rows.append((offset, *array.shape[:2]))
                offset += array.size
        os.replace(partial, data)
        scratch = index.with_suffix(f".{os.getpid()}.npy")
        np.save(scratch, np.array(rows, np.int64))
        os.replace(scratch, index)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, k: int) -> np.ndarray:
        offset, h, w = map(int, self.shapes[k])
        return self.pixels[offset : offset + h * w * 3].reshape(h, w, 3)


class Crops(IterableDataset[Tensor]):
    """An endless stream of square crops (3, size, size) in 0..1: random place, flip and scale (0.5..1 of the image,
    half of the time), images drawn by the root of their area."""

    def __init__(self, cache: Cache, size: int, seed: int) -> None:
        self.cache, self.size, self.seed = cache, size, seed
        self.usable = [k for k in range(len(cache)) if min(cache.shapes[k, 1:]) >= size]
        if not self.usable:
            raise ImageError(f"no training image is as large as a crop, {size} x {size}: choose a smaller --crop")
        # Between one image, one vote and one pixel, one vote: large photographs hold more, but not in proportion.
        self.weights = [float(cache.shapes[k, 1] * cache.shapes[k, 2]) ** 0.5 for k in self.usable]

    def __iter__(self) -> Iterator[Tensor]:
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(self.seed * 1000 + (worker.id if worker else 0))
        while True:
            yield self.crop(rng)

    def crop(self, rng: random.Random) -> Tensor:
        image = self.cache[rng.choices(self.usable, self.weights)[0]]
        h, w = image.shape[:2]
        scale = rng.uniform(max(0.5, self.size / min(h, w)), 1) if rng.random() < 0.5 else 1.0
        side = min(round(self.size / scale), h, w)
        y, x = rng.randint(0, h - side), rng.randint(0, w - side)
        crop = image[y : y + side, x : x + side]
        if side != self.size:
            resized = Image.fromarray(crop).resize((self.size, self.size), Image.Resampling.LANCZOS)
            crop = np.asarray(resized)
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        return torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 255
