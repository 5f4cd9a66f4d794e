"""Pictures to .vq2 bytes and back: the one junction of tensors and bytes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from bitstream import container, rans
from bitstream.container import DEFAULT_MAX_PIXELS, MAX_SIDE, ColourMode, Container, Header
from bitstream.errors import DamagedError, DeviceError, ImageError, ModelMismatchError
from vqcodec import DEFAULT_QUALITY
from vqcodec.image import Picture, from_array, from_pil, pack_alpha, stripped, to_pil, unpack_alpha
from vqcodec.models import kernels
from vqcodec.models.dyadic import LOGIT_BITS, STREAM_BITS
from vqcodec.models.quantizer import Codebook
from vqcodec.models.tiling import run_tiled
from vqcodec.models.vqvae import VQVAE
from vqcodec.models.wavefront import Choose, Floats, Indices, LevelPrior, Wave, coding_tables, fill_grid
from vqcodec.weights import SHIPPED, fingerprint, from_file, load_weights, to_file

Progress = Callable[[float], None]


def pick_device(name: str) -> torch.device:
    """auto: a GPU if there is one, else the CPU. Raises DeviceError."""
    if name not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not one of auto, cpu, cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceError("device cuda was asked for, but torch finds no CUDA here: use --device cpu or auto")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


class Codec:
    """A loaded model, for repeated use.

    Guarantee: the indices read from a file are the same on every machine and device. Pixels may differ in the last
    bit between machines, and a little more on a GPU, because the decoder network is ordinary floating point.
    """

    def __init__(self, model: VQVAE, device: str = "auto") -> None:
        self.device = pick_device(device)
        # Code with what a weights file holds of the model, so that its files can be read with it.
        model.load_state_dict(from_file(to_file(model)))
        self.fingerprint = fingerprint(model)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._priors: dict[tuple[int, int], LevelPrior] = {}

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str = "auto") -> "Codec":
        """The shipped model, or one from a weights file. Raises WeightsError, DeviceError."""
        return cls(load_weights(Path(weights) if weights else SHIPPED), device)

    def encode(
        self,
        image: "Image.Image | ArrayLike | Picture",
        quality: float = DEFAULT_QUALITY,
        *,
        strip: bool = False,
        progress: Progress | None = None,
    ) -> bytes:
        """Compress an image.

        image: PIL image of any mode, uint8 array (H, W), (H, W, 3) or (H, W, 4), or Picture. quality: 1 (smallest)
        to 8 (best), fractions allowed. strip: leave ICC, EXIF and XMP out. progress: called with 0..1.
        Returns the bytes of a .vq2 file. Raises ImageError, ValueError for a quality out of range.
        """
        picture = image if isinstance(image, Picture) else _picture(image)
        return encode_picture(self, stripped(picture) if strip else picture, quality, progress)

    def decode(
        self, data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS, progress: Progress | None = None
    ) -> Image.Image:
        """Decompress a .vq2 file: an image of mode L, RGB, LA or RGBA with its metadata in ``info``.

        Raises BitstreamError, by kind: not a .vq2 file, damaged, of a newer version, written with other weights, more
        than ``max_pixels`` pixels.
        """
        return to_pil(decode_picture(self, data, max_pixels, progress))

    def sample(self, width: int, height: int, quality: float = DEFAULT_QUALITY, *, seed: int = 0) -> Image.Image:
        """Draw an image from the priors, by the walk that codes."""
        number, _ = self.level_for(quality)
        cells, level = self.cells(height, width), torch.tensor([number], device=self.device)
        generator = np.random.default_rng(seed)

        def draw(wave: Wave, group: int, logits: Floats) -> Indices:
            ends = coding_tables(logits).cumsum(1)
            return (generator.integers(ends[:, -1:], size=(len(ends), 1)) >= ends).sum(1)

        grids: list[Tensor] = []
        with _exactly(self.device):
            for k in range(len(self.model.priors)):
                grids.append(_fill(self, k, cells, grids, level, draw))
        return Image.fromarray(_decode_pixels(self, grids, level)[:height, :width])

    def level_for(self, quality: float) -> tuple[int, float]:
        """The quality level (from 0) that codes a quality, and the factor on its rates that moves it there."""
        lambdas = self.model.config.lambdas
        if not 1 <= quality <= len(lambdas):
            raise ValueError(f"quality {quality:g} is not in 1..{len(lambdas)}")
        if not self.model.config.rate_constrained:
            return 0, 0.0
        level = min(int(quality + 0.5), len(lambdas)) - 1
        wanted = np.exp(np.interp(quality - 1, np.arange(len(lambdas)), np.log(lambdas)))
        return level, lambdas[level] / float(wanted)

    def prior(self, k: int, level: int) -> LevelPrior:
        """The prior of grid k at a level (from 0); kept, because making it ready takes some 50 ms."""
        if (k, level) not in self._priors:
            self._priors[k, level] = LevelPrior(self.model.priors[k], self.model.codebooks[k].activations(), level)
        return self._priors[k, level]

    def cells(self, height: int, width: int) -> tuple[int, int]:
        """Size of the coarsest grid."""
        stride = self.model.config.stride
        return -(-height // stride), -(-width // stride)

    def tiled(
        self, network: Callable[..., Sequence[Tensor]], cells: tuple[int, int], *sources: Tensor | None
    ) -> list[Tensor]:
        config = self.model.config
        return run_tiled(network, sources, cells, config.stride, config.halo(), self.device)


def _picture(image: Any) -> Picture:
    return from_pil(image) if isinstance(image, Image.Image) else from_array(np.asarray(image))


def encode_picture(codec: Codec, picture: Picture, quality: float, progress: Progress | None = None) -> bytes:
    """The inverse of decode_picture, up to the loss."""
    model = codec.model
    number, rate_weight = codec.level_for(quality)
    height, width = picture.pixels.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise ImageError(f"the image has {width} x {height} pixels, the format holds up to {MAX_SIDE} a side")
    cells, stride = codec.cells(height, width), model.config.stride
    pad = (0, cells[0] * stride - height), (0, cells[1] * stride - width), (0, 0)
    pixels = torch.from_numpy(np.pad(picture.pixels, pad, "edge")).permute(2, 0, 1)[None]
    level = torch.tensor([number], device=codec.device)
    tell = _Steps(model, cells, progress)
    grids: list[Tensor] = []
    payloads: list[bytes] = []
    context: Tensor | None = None
    with _exactly(codec.device):
        features = codec.tiled(lambda x: model.analyse(x.float() / 255, level), cells, pixels)
        for k, book in enumerate(model.codebooks):
            (z,) = codec.tiled(lambda f, c, k=k: [model.latent(k, f, c, level)], cells, features.pop(0), context)
            context = None  # like the features, the largest of what is in memory
            walk = _Encoding(book, z, rate_weight, tell)
            grid = _fill(codec, k, cells, grids, level, walk.choose)
            payloads.append(walk.payload())
            if k + 1 < len(model.codebooks):
                codes = book.lookup(grid, book.vectors).permute(0, 3, 1, 2)
                (context,) = codec.tiled(lambda q, c, k=k: [model.decode_grid(k, q, c, level)], cells, codes, context)
            grids.append(grid)
    header = Header(number + 1, width, height, picture.colour, codec.fingerprint)
    checksum = container.checksum(header, [grid[0].numpy() for grid in grids])
    alpha = None if picture.alpha is None else pack_alpha(picture.alpha)
    return container.pack(
        Container(header, checksum, tuple(payloads), alpha, picture.icc, picture.exif, picture.xmp)
    )


def decode_picture(
    codec: Codec, data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS, progress: Progress | None = None
) -> Picture:
    """The inverse of encode_picture, up to the loss. Raises BitstreamError."""
    parts = container.unpack(data, max_pixels=max_pixels)
    header = parts.header
    alpha = None if parts.alpha is None else unpack_alpha(parts.alpha, header.width, header.height)
    grids = decode_indices(codec, parts, progress)
    level = torch.tensor([header.level - 1], device=codec.device)
    pixels = _decode_pixels(codec, grids, level)[: header.height, : header.width]
    if header.colour in (ColourMode.GREY, ColourMode.GREY_ALPHA):
        # The mean of the channels, rounded, in integers.
        grey = (2 * pixels.sum(2, keepdims=True, dtype=np.uint16) + 3) // 6
        pixels = np.repeat(grey.astype(np.uint8), 3, axis=2)
    return Picture(pixels, header.colour, alpha, parts.icc, parts.exif, parts.xmp)


def decode_indices(codec: Codec, parts: Container, progress: Progress | None = None) -> list[Tensor]:
    """The index grids of a file, (1, M, h, w) each, checked against its checksum. Raises BitstreamError."""
    model, header = codec.model, parts.header
    if header.fingerprint != codec.fingerprint:
        raise ModelMismatchError(
            f"the file was written with model {header.fingerprint.hex()}, this installation has "
            f"{codec.fingerprint.hex()}: install the vqcodec version that wrote it, or pass its --weights"
        )
    if header.level > model.config.levels or len(parts.grids) != len(model.config.grids):
        raise DamagedError(
            f"level {header.level} and {len(parts.grids)} grids, the model has {model.config.levels} levels and "
            f"{len(model.config.grids)} grids: the file is damaged"
        )
    cells = codec.cells(header.height, header.width)
    level = torch.tensor([header.level - 1], device=codec.device)
    tell = _Steps(model, cells, progress)
    grids: list[Tensor] = []
    with _exactly(codec.device):
        for k, payload in enumerate(parts.grids):
            walk = _Decoding(payload, tell)
            grids.append(_fill(codec, k, cells, grids, level, walk.choose))
            walk.coder.finish()
    container.verify(parts, [grid[0].numpy() for grid in grids])
    return grids


class _Encoding:
    """The encoder's part in a walk: the index of least distance + rate, its interval noted for the coder."""

    def __init__(self, book: Codebook, z: Tensor, rate_weight: float, tell: "_Steps") -> None:
        self.values = book.split(z)[:, 0].cpu().contiguous().numpy()
        self.vectors = book.vectors.detach().cpu().numpy()
        self.norms = np.square(self.vectors).sum(-1)
        self.bits_per_step, self.tell = rate_weight * 2.0**-LOGIT_BITS, tell
        self.intervals: list[NDArray[np.int32]] = []

    def choose(self, wave: Wave, group: int, logits: Floats) -> Indices:
        n = len(logits)
        self.tell(n)
        index, interval = np.empty(n, np.int64), np.empty((2, n), np.int32)
        latents = np.ascontiguousarray(self.values[group, wave.cells])
        # The logits lack their common share of log2 p, which does not change the choice.
        kernels.choose(latents, self.vectors[group], self.norms[group], logits, self.bits_per_step, index)
        kernels.intervals(coding_tables(logits), index, interval)
        self.intervals.append(interval)
        return index

    def payload(self) -> bytes:
        coder = rans.Encoder()
        coder.push(*np.concatenate(self.intervals, 1))
        return coder.finish()


class _Decoding:
    """The decoder's part in a walk: the index that the coder finds in the table."""

    def __init__(self, payload: bytes, tell: "_Steps") -> None:
        self.coder, self.tell = rans.Decoder(payload), tell

    def choose(self, wave: Wave, group: int, logits: Floats) -> Indices:
        self.tell(len(logits))
        return self.coder.pop(coding_tables(logits))


def _fill(
    codec: Codec, k: int, cells: tuple[int, int], grids: Sequence[Tensor], level: Tensor, choose: Choose
) -> Tensor:
    """Walk grid k with the condition that the coarser grids give: (1, M, h, w) int16."""
    model, condition = codec.model, None
    if k:

        def steps(indices: Tensor) -> list[Tensor]:
            found = model.condition(k, indices, level) * 2**STREAM_BITS
            return [found.to(torch.int16).permute(0, 3, 1, 2)]

        (found,) = codec.tiled(steps, cells, grids[k - 1])
        condition = found[0].permute(1, 2, 0).flatten(0, 1).contiguous().numpy()
    ratio = model.config.stride // model.config.grids[k].stride
    shape = (cells[0] * ratio, cells[1] * ratio)
    return torch.from_numpy(fill_grid(codec.prior(k, int(level)), shape, condition, choose))[None]


def _decode_pixels(codec: Codec, grids: Sequence[Tensor], level: Tensor) -> NDArray[np.uint8]:
    """The image (H, W, 3) of index grids, padding included."""

    def pixels(*indices: Tensor) -> list[Tensor]:
        return [(codec.model.decode(indices, level) * 255).round_().clamp_(0, 255).to(torch.uint8)]

    cells = (grids[0].shape[2], grids[0].shape[3])
    with _exactly(codec.device):
        (x,) = codec.tiled(pixels, cells, *grids)
    return x[0].permute(1, 2, 0).contiguous().numpy()


@contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    """Without gradients, and without an autocast that the caller may have set: it would narrow the prior's sums."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


class _Steps:
    """Tells a progress function which part of the indices is coded."""

    def __init__(self, model: VQVAE, cells: tuple[int, int], progress: Progress | None) -> None:
        grids = [(grid.groups, model.config.stride // grid.stride) for grid in model.config.grids]
        self.total = sum(groups * cells[0] * ratio * cells[1] * ratio for groups, ratio in grids)
        self.progress, self.done = progress, 0

    def __call__(self, indices: int) -> None:
        self.done += indices
        if self.progress is not None:
            self.progress(self.done / self.total)
