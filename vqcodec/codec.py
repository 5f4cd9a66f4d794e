"""Pictures to .vq2 bytes and back: the one junction of tensors and bytes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from bitstream import container, rans
from bitstream.container import DEFAULT_MAX_PIXELS, MAX_SIDE, ColourMode, Container, Header
from bitstream.errors import DamagedError, DeviceError, ImageError, ModelMismatchError
from vqcodec import DEFAULT_EFFORT, DEFAULT_QUALITY, flat, memory
from vqcodec.alpha import prepared
from vqcodec.image import (
    Picture,
    Source,
    Strip,
    bounded_icc,
    checked_exif,
    contents,
    pack_alpha,
    picture_of,
    stripped,
    to_pil,
    unpack_alpha,
)
from vqcodec.metrics import psnr
from vqcodec.models import kernels, refine
from vqcodec.models.dyadic import LOGIT_BITS
from vqcodec.models.quantizer import Codebook
from vqcodec.models.tiling import Step, run_tiled
from vqcodec.models.vqvae import VQVAE
from vqcodec.models.wavefront import Choose, CoarserGrid, Floats, Indices, LevelPrior, Wave, coding_tables, fill_grid
from vqcodec.targets import Reached, Target, reach
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
        model = model.to(self.device).eval().requires_grad_(False)
        # Without this layout every convolution on a CPU rearranges what it reads and writes.
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._priors: dict[tuple[int, int], LevelPrior] = {}

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str = "auto") -> "Codec":
        """The shipped model, or one from a weights file. Raises WeightsError, DeviceError."""
        return cls(load_weights(Path(weights) if weights else SHIPPED), device)

    def encode(
        self,
        image: "Image.Image | ArrayLike | Picture | Source",
        quality: float = DEFAULT_QUALITY,
        *,
        strip: Strip = False,
        effort: int = DEFAULT_EFFORT,
        progress: Progress | None = None,
    ) -> bytes:
        """Compress an image.

        image: PIL image of any mode, uint8 array (H, W), (H, W, 3) or (H, W, 4), or Picture; or a picture file: its
        path, its bytes, or an open file. quality: 1 (smallest) to 8 (best), fractions allowed. strip: leave ICC, EXIF
        and XMP out; "keep-icc" all but the ICC profile, "gps" the location alone. effort: 0 to 3, from 1 on the latents
        are fitted to this very image: for more time smaller files at equal PSNR, or a better picture in as many bytes.
        progress: called with 0..1.
        An alpha that is opaque everywhere is left out, and colours under an alpha of 0 are not kept.
        Returns the bytes of a .vq2 file. Raises ImageError, ValueError for a quality or effort out of range.
        """
        picture = picture_of(image)
        return PictureEncoder(self, stripped(picture, strip), effort).encode(quality, progress)

    def decode(
        self,
        data: Source,
        *,
        preview: bool = False,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        progress: Progress | None = None,
    ) -> Image.Image:
        """Decompress a .vq2 file: an image of mode L, RGB, LA or RGBA with its metadata in ``info``.

        data: the bytes of the file, its path, or an open file.

        preview: decode the coarsest grid alone, which gives a blurred image of full size in a fraction of the time, of
        a file cut off behind that grid too (then without alpha and metadata). The file's checksum covers all grids, so
        a preview is not verified.

        Raises BitstreamError, by kind: not a .vq2 file, damaged, of another version, written with other weights,
        larger than ``max_pixels`` or the free memory allow.
        """
        return to_pil(decode_picture(self, contents(data), max_pixels, progress, preview))

    def encode_to(
        self,
        image: "Image.Image | ArrayLike | Picture | Source",
        target: Target,
        *,
        strip: Strip = False,
        effort: int = DEFAULT_EFFORT,
        progress: Progress | None = None,
    ) -> Reached:
        """Compress an image to a size, a rate or a PSNR: searches the quality for it, in some 3 to 10 encodings.

        Returns the file nearest to the target of all those tried; ``met`` tells whether it is within the tolerance.
        strip, effort: as in ``encode``. progress: called with 0..1 for every file tried. Raises ImageError.
        """
        picture = picture_of(image)
        encoder = PictureEncoder(self, stripped(picture, strip), effort)

        def attempt(quality: float, level: int) -> tuple[bytes, float]:
            data = encoder.encode(quality, progress, level - 1)
            if target.kind == "psnr":
                return data, psnr(encoder.picture.pixels, encoder.decoded(), encoder.picture.alpha)
            scale = 8 / (encoder.width * encoder.height) if target.kind == "bpp" else 1
            return data, scale * len(data)

        return reach(target, attempt, self.model.config.levels)

    def sample(
        self,
        width: int,
        height: int,
        quality: float = DEFAULT_QUALITY,
        *,
        seed: int = 0,
        temperature: float = 1.0,
    ) -> Image.Image:
        """Draw an image from the priors, by the walk that codes.

        temperature: below 1 the likely indices are drawn more often than the priors say, which gives calmer images.
        """
        number, _ = self.level_for(quality)
        return self._sample((height, width), number, [], seed, temperature)

    def sample_from(
        self, data: bytes, *, seed: int = 0, temperature: float = 1.0, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> Image.Image:
        """Keep the coarsest grid of a .vq2 file and draw the others. Raises BitstreamError, as a preview does."""
        header, payload = container.unpack_coarsest(data, max_pixels=max_pixels)
        grids = _pop_grids(self, header, [payload])
        return self._sample((header.height, header.width), header.level - 1, grids, seed, temperature)

    def _sample(
        self, size: tuple[int, int], number: int, grids: list[Tensor], seed: int, temperature: float
    ) -> Image.Image:
        """An image of size (H, W) from grids that are given, coarsest first, and others that are drawn."""
        cells, level = self.cells(*size), torch.tensor([number], device=self.device)
        generator = np.random.default_rng(seed)

        def draw(wave: Wave, group: int, logits: Floats) -> Indices:
            # Whole steps again: the tables are made of integers.
            ends = coding_tables(np.rint(logits / np.float32(temperature))).cumsum(1)
            return (generator.integers(ends[:, -1:], size=(len(ends), 1)) >= ends).sum(1)

        with _exactly(self.device):
            for k in range(len(grids), len(self.model.priors)):
                grids.append(_fill(self, k, cells, grids, level, draw))
        return Image.fromarray(_pixels(self, grids, number, size, ColourMode.RGB))

    def level_for(self, quality: float, level: int | None = None) -> tuple[int, float]:
        """The quality level (from 0) that codes a quality, and the factor on its rates that moves it there.

        level: to be taken instead of the nearest.
        """
        lambdas = self.model.config.lambdas
        if not 1 <= quality <= len(lambdas):
            raise ValueError(f"quality {quality:g} is not in 1..{len(lambdas)}")
        if not self.model.config.rate_constrained:
            return 0, 0.0
        if level is None:
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
        self,
        network: Callable[..., Sequence[Tensor]],
        cells: tuple[int, int],
        *sources: Tensor | None,
    ) -> list[Tensor]:
        config = self.model.config
        return run_tiled([Step(network, sources, config.halo())], cells, config.stride, self.device)


class PictureEncoder:
    """One picture on its way to a file, at any number of qualities.

    What the networks find before the first walk hangs on the level alone: it is kept until another one is asked for.
    """

    def __init__(self, codec: Codec, picture: Picture, effort: int = DEFAULT_EFFORT) -> None:
        self.height, self.width = picture.pixels.shape[:2]
        if max(self.height, self.width) > MAX_SIDE:
            raise ImageError(
                f"the image has {self.width} x {self.height} pixels, the format holds up to {MAX_SIDE} a side"
            )
        if not 0 <= effort < len(refine.STEPS):
            raise ValueError(f"effort {effort} is not in 0..{len(refine.STEPS) - 1}")
        self.codec, self.picture, self.cells = codec, prepared(picture), codec.cells(self.height, self.width)
        # Without rate the nearest codes are what was asked for.
        self.steps = refine.STEPS[effort] if codec.model.config.rate_constrained else 0
        picture = self.picture
        self.alpha = None if picture.alpha is None else pack_alpha(picture.alpha)
        equal = (picture.pixels == picture.pixels[..., :1]).all()
        self.colour = picture.colour.equal if equal else picture.colour
        self.flat = flat.find(picture.pixels[..., : 1 if self.colour.one_plane else 3])
        self.grids: list[Tensor] = []  # of the last file
        self._level = torch.tensor([-1], device=codec.device)
        self._found: list[Tensor] = []  # latents of the coarsest grid, features of the others

    def encode(self, quality: float, progress: Progress | None = None, level: int | None = None) -> bytes:
        """The bytes of a file. level: as in ``Codec.level_for``. Raises ValueError for a quality out of range."""
        codec, model = self.codec, self.codec.model
        number, rate_weight = codec.level_for(quality, level)
        tell = _Steps(model, self.cells, progress)
        self.grids, payloads, context = [], [], None
        finest = len(model.codebooks) - 1
        with _exactly(codec.device):
            self._analyse(number)
            for k, book in enumerate(model.codebooks):
                if k == 0:
                    z = self._found[0]
                else:
                    (z,) = codec.tiled(
                        lambda f, c, k=k: [model.latent(k, f, c, self._level)], self.cells, self._found[k], context
                    )
                if k == finest:
                    if self.steps:
                        z = self._fitted(z, context, rate_weight)
                    context = None  # one of the largest of what is in memory
                walk = _Encoding(book, z, rate_weight, tell)
                self.grids.append(_fill(codec, k, self.cells, self.grids, self._level, walk.choose))
                payloads.append(walk.payload())
                if k < finest:
                    (context,) = codec.tiled(
                        lambda q, c, k=k: [model.decode_grid(k, q, c, self._level)],
                        self.cells,
                        model.codes(k, self.grids),
                        context,
                    )
        picture = self.picture
        header = Header(number + 1, self.width, self.height, self.colour, codec.fingerprint)
        checksum = container.checksum(header, [grid[0].numpy() for grid in self.grids], self.flat)
        optional = (self.flat, self.alpha, picture.icc, picture.exif, picture.xmp)
        return container.pack(Container(header, checksum, tuple(payloads), *optional))

    def decoded(self) -> NDArray[np.uint8]:
        """What the last file decodes to, (H, W, 3), without another walk."""
        size = self.height, self.width
        return _pixels(self.codec, self.grids, int(self._level), size, self.colour, self.flat)

    def _analyse(self, number: int) -> None:
        """The networks' work on the level ``number`` (from 0), unless it is at hand."""
        if number == int(self._level):
            return
        codec, model = self.codec, self.codec.model
        self._found = []
        self._level = torch.tensor([number], device=codec.device)

        def analyse(x: Tensor) -> list[Tensor]:
            return model.analyse(x.float() / 255, self._level)

        def latent(features: Tensor) -> list[Tensor]:
            return [model.latent(0, features, None, self._level)]

        coarsest, *finer = codec.tiled(analyse, self.cells, self._padded())
        self._found = [*codec.tiled(latent, self.cells, coarsest), *finer]

    def _fitted(self, z: Tensor, context: Tensor | None, rate_weight: float) -> Tensor:
        """Latents of the finest grid, fitted to the picture and to the coarser grids that there are."""
        model, finest = self.codec.model, len(self.grids)

        def fit(x: Tensor, z: Tensor, context: Tensor | None, *known: Tensor) -> list[Tensor]:
            x = x.float() / 255
            return [refine.refined_latents(model, x, z, context, self._level, rate_weight, self.steps, known)]

        # A gradient reaches twice as far, but what comes from there is next to nothing.
        step = Step(fit, [self._padded(), z, context, *self.grids], model.config.halo(finest))
        (z,) = run_tiled([step], self.cells, model.config.stride, self.codec.device, tile=refine.TILE)
        return z

    def _padded(self) -> Tensor:
        """The pixels (1, 3, H, W), repeated at the edges up to whole cells."""
        stride = self.codec.model.config.stride
        pad = (0, self.cells[0] * stride - self.height), (0, self.cells[1] * stride - self.width), (0, 0)
        return torch.from_numpy(np.pad(self.picture.pixels, pad, "edge")).permute(2, 0, 1)[None]


def decode_picture(
    codec: Codec,
    data: bytes,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    progress: Progress | None = None,
    preview: bool = False,
) -> Picture:
    """The inverse of ``PictureEncoder.encode``, up to the loss. Raises BitstreamError.

    preview: the coarsest grid alone, see ``Codec.decode``; the picture's notes say what a damaged file lacks.
    """
    notes: list[str] = []
    try:
        parts = container.unpack(data, max_pixels=max_pixels)
    except DamagedError as error:
        if not preview:
            raise
        header, payload = container.unpack_coarsest(data, max_pixels=max_pixels)
        parts = Container(replace(header, colour=header.colour.opaque), 0, (payload,))
        notes.append(f"only a preview without alpha and metadata can be shown ({error})")
    header = parts.header
    alpha = None if parts.alpha is None else unpack_alpha(parts.alpha, header.width, header.height)
    grids = _pop_grids(codec, header, parts.grids[:1], progress) if preview else decode_indices(codec, parts, progress)
    blocks = None if preview else parts.flat  # sharp edges do not suit what is blurred
    pixels = _pixels(codec, grids, header.level - 1, (header.height, header.width), header.colour, blocks)
    icc, exif = bounded_icc(parts.icc, notes), checked_exif(parts.exif, notes)
    return Picture(pixels, header.colour.shown, alpha, icc, exif, parts.xmp, notes)


def decode_indices(
    codec: Codec,
    parts: Container,
    progress: Progress | None = None,
    bits: list[NDArray[np.float64]] | None = None,
) -> list[Tensor]:
    """The index grids of a file, (1, M, h, w) each, checked against its checksum. Raises BitstreamError.

    bits: gets the ideal code length of every cell (h * w,), grid by grid.
    """
    if len(parts.grids) != len(codec.model.config.grids):
        raise DamagedError(
            f"{len(parts.grids)} grids, the model has {len(codec.model.config.grids)} grids: the file is damaged"
        )
    grids = _pop_grids(codec, parts.header, parts.grids, progress, bits)
    container.verify(parts, [grid[0].numpy() for grid in grids])
    return grids


def examine(
    codec: Codec, data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS
) -> list[tuple[NDArray[np.int16], NDArray[np.float64]]]:
    """Of each grid of a file the indices (M, h, w) and the bits of every cell (h, w). Raises BitstreamError."""
    parts = container.unpack(data, max_pixels=max_pixels)
    bits: list[NDArray[np.float64]] = []
    grids = decode_indices(codec, parts, bits=bits)
    return [(grid[0].numpy(), cells.reshape(grid.shape[2:])) for grid, cells in zip(grids, bits, strict=True)]


def _pop_grids(
    codec: Codec,
    header: Header,
    payloads: Sequence[bytes],
    progress: Progress | None = None,
    bits: list[NDArray[np.float64]] | None = None,
) -> list[Tensor]:
    """The index grids in payloads, coarsest first, (1, M, h, w) each, not yet checked against the checksum."""
    model = codec.model
    if header.fingerprint != codec.fingerprint:
        raise ModelMismatchError(
            f"the file was written with model {header.fingerprint.hex()}, this installation has "
            f"{codec.fingerprint.hex()}: install the vqcodec version that wrote it, or pass its --weights"
        )
    if header.level > model.config.levels:
        raise DamagedError(f"level {header.level}, the model has {model.config.levels} levels: the file is damaged")
    memory.require(header.width, header.height)
    cells = codec.cells(header.height, header.width)
    level = torch.tensor([header.level - 1], device=codec.device)
    tell = _Steps(model, cells, progress, len(payloads))
    grids: list[Tensor] = []
    with _exactly(codec.device):
        for k, payload in enumerate(payloads):
            walk = _Decoding(payload, tell)
            if bits is not None:
                ratio = model.config.stride // model.config.grids[k].stride
                walk.bits = np.zeros(cells[0] * ratio * cells[1] * ratio)
                bits.append(walk.bits)
            grids.append(_fill(codec, k, cells, grids, level, walk.choose))
            walk.coder.finish()
    return grids


def _pixels(
    codec: Codec,
    grids: Sequence[Tensor],
    number: int,
    size: tuple[int, int],
    colour: ColourMode,
    blocks: bytes | None = None,
) -> NDArray[np.uint8]:
    """The image (H, W, 3), (H, W) = size, of index grids at a level (from 0) and the content of a flat chunk."""
    level = torch.tensor([number], device=codec.device)
    pixels = _decode_pixels(codec, grids, level, size)
    if colour.one_plane:
        # The mean of the channels, rounded, in integers.
        pixels = ((2 * pixels.sum(2, keepdims=True, dtype=np.uint16) + 3) // 6).astype(np.uint8)
    if blocks is not None:
        flat.paste(pixels, blocks)
    return np.repeat(pixels, 3, axis=2) if colour.one_plane else pixels


class _Encoding:
    """The encoder's part in a walk: the index of least distance + rate, its interval noted for the coder."""

    def __init__(self, book: Codebook, z: Tensor, rate_weight: float, tell: "_Steps") -> None:
        self.values = book.split(z)[:, 0].cpu().contiguous().numpy()
        self.vectors = book.vectors.detach().mT.cpu().contiguous().numpy()
        self.norms = np.square(self.vectors).sum(1)
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
        # Neither one by one, which takes time, nor all at once, which takes several times their memory.
        for start in range(0, len(self.intervals), 256):
            coder.push(*np.concatenate(self.intervals[start : start + 256], 1))
        return coder.finish()


class _Decoding:
    """The decoder's part in a walk: the index that the coder finds in the table."""

    def __init__(self, payload: bytes, tell: "_Steps") -> None:
        self.coder, self.tell = rans.Decoder(payload), tell
        self.bits: NDArray[np.float64] | None = None  # of each cell, if somebody wants to know

    def choose(self, wave: Wave, group: int, logits: Floats) -> Indices:
        self.tell(len(logits))
        tables = coding_tables(logits)
        index = self.coder.pop(tables)
        if self.bits is not None:
            self.bits[wave.cells] += rans.TOTAL_BITS - np.log2(np.take_along_axis(tables, index[:, None], 1)[:, 0])
        return index


def _fill(
    codec: Codec, k: int, cells: tuple[int, int], grids: Sequence[Tensor], level: Tensor, choose: Choose
) -> Tensor:
    """Walk grid k with the condition that the coarser grids give: (1, M, h, w) int16."""
    model, condition, stack = codec.model, None, codec.model.priors[k].condition
    if stack is not None:
        condition = CoarserGrid(
            lambda indices: model.condition(k, indices.to(codec.device), level), stack.reach, grids[k - 1]
        )
    ratio = model.config.stride // model.config.grids[k].stride
    shape = (cells[0] * ratio, cells[1] * ratio)
    return torch.from_numpy(fill_grid(codec.prior(k, int(level)), shape, condition, choose))[None]


def _decode_pixels(codec: Codec, grids: Sequence[Tensor], level: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The image (H, W, 3), (H, W) = size, of index grids."""

    model, config = codec.model, codec.model.config

    def step(k: int) -> Step:
        def decode(*parts: Tensor) -> list[Tensor]:
            indices, context = parts[: len(grids)], parts[len(grids) :]
            found = model.decode_grid(k, model.codes(k, indices), context[0] if context else None, level)
            return [(found * 255).round_().clamp_(0, 255).to(torch.uint8) if k + 1 == len(config.grids) else found]

        return Step(decode, grids, config.halo(k))

    cells = (grids[0].shape[2], grids[0].shape[3])
    with _exactly(codec.device):
        (x,) = run_tiled([step(k) for k in range(len(config.grids))], cells, config.stride, codec.device, size)
    return x[0].permute(1, 2, 0).contiguous().numpy()


@contextmanager
def _exactly(device: torch.device) -> Iterator[None]:
    """Without gradients, and without an autocast that the caller may have set: it would narrow the prior's sums."""
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        yield


class _Steps:
    """Tells a progress function which part of the indices is coded."""

    def __init__(
        self, model: VQVAE, cells: tuple[int, int], progress: Progress | None, grids: int | None = None
    ) -> None:
        """grids: how many are coded, None for all."""
        layout = [(grid.groups, model.config.stride // grid.stride) for grid in model.config.grids[:grids]]
        self.total = sum(groups * cells[0] * ratio * cells[1] * ratio for groups, ratio in layout)
        self.progress, self.done = progress, 0

    def __call__(self, indices: int) -> None:
        self.done += indices
        if self.progress is not None:
            self.progress(self.done / self.total)
