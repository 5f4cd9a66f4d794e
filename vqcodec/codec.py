"""Pictures to .vq2 bytes and back: the one junction of tensors and bytes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from bitstream import container
from bitstream.container import DEFAULT_MAX_PIXELS, MAX_SIDE, ColourMode, Container, Header, over_limit
from bitstream.errors import DamagedError, DeviceError, ImageError, LimitError, UsageError
from bitstream.indices import IndexCoder
from bitstream.walk import Diffusion, Grid
from bitstream.weights import Weights
from vqcodec import flat, memory, offset
from vqcodec.alpha import prepared
from vqcodec.config import DEFAULT_EFFORT, DEFAULT_QUALITY, DEFAULT_TUNE, EFFORTS, SHIPPED, TUNES, Tune
from vqcodec.image import (
    Picture,
    Source,
    Strip,
    bounded_icc,
    checked_exif,
    contents,
    pack_alpha,
    to_pil,
    told,
    unpack_alpha,
    warn,
)
from vqcodec.masking import smoothness, variance, visibility
from vqcodec.metrics import psnr
from vqcodec.models import refine
from vqcodec.models.precision import full_precision, inference
from vqcodec.models.tiling import TiledNetwork, run_tiled
from vqcodec.models.vqvae import VQVAE
from vqcodec.progress import Progress, Stages
from vqcodec.smooth import rate_share
from vqcodec.targets import SearchResult, Target, reach
from vqcodec.weights import as_coded, load

# What the stages of encoder and decoder take, about: seconds for 12 megapixels on two cores.
ANALYSIS, LATENTS, FIT_STEP, CONTEXT, COARSE_WALK, WALK = 3, 1, 6, 1, 1, 4
INDICES, PIXELS = 3, 2

# What codes leave of the mean colour of a flat cell goes on to the cells right and below, half to each, so that skies
# are not off as a whole, by up to 7 grey levels at low quality. By PSNR 8 validation crops take 0.3 % less, 0.9 % at
# qualities 1 and 3; for the eye 0.3 % more by SSIMULACRA 2.
PASSED_ON = 0.8
MEAN_COLOUR = 0.1  # share of a channel's function that is no more than a colour, from which on it counts as one
UNSEEN = 30.0  # rate weight of cells that nobody sees: what is likely will do, null or not
MOSTLY_FLAT = 0.5  # share of a picture that flat blocks draw; below it another way to code them gains nothing
# Bits of a file, and then for each pixel, up to which its picture is drawn to find its offset. That takes a tenth to a
# half of the time of encoding. More bits, as photographs take from quality 3 on, leave little to find. A picture of a
# kilobyte is drawn in no time.
FEW_BITS, FEW_BITS_PER_PIXEL, SMALL_BITS = 1000, 0.05, 8000
FAINT = 10  # grey levels of a picture's deviation from its mean, up to which it may be better to code that alone


if hasattr(os, "register_at_fork"):  # where there is fork
    # In a forked process the threads that torch has started are gone, and it would wait for them for ever.
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


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

    Guarantee: the indices read from a file are the same on every machine and device. Pixels may differ by
    a grey level between machines, because the decoder network is ordinary floating point, of the width that is fastest.
    """

    def __init__(self, model: VQVAE, device: str = "auto", weights: Weights | None = None) -> None:
        """model: stays as it is, a copy codes, rounded as by saving and loading. weights: those that the model was
        loaded with; then the model itself is used, and changed. Raises DeviceError."""
        self.device = pick_device(device)
        if weights is None:
            model, weights = as_coded(model)
        self.indices = IndexCoder(weights)
        model = model.to(self.device).eval().requires_grad_(False)
        # Without this layout every convolution on a CPU rearranges what it reads and writes.
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.passed_on = [_passed_on(self.model, k) for k in range(len(self.model.codebooks))]

    @classmethod
    def load(cls, weights: str | Path | None = None, device: str = "auto") -> "Codec":
        """The shipped model, or one from a weights file. Raises WeightsError, DeviceError."""
        model, numbers = load(Path(weights) if weights else SHIPPED)
        return cls(model, device, numbers)

    @property
    def fingerprint(self) -> bytes:
        """Names the model in its files."""
        return self.indices.weights.fingerprint

    def encode(
        self,
        image: "Image.Image | ArrayLike | Picture | Source",
        quality: float = DEFAULT_QUALITY,
        *,
        tune: Tune = DEFAULT_TUNE,
        strip: Strip = False,
        effort: int = DEFAULT_EFFORT,
        progress: Progress | None = None,
    ) -> bytes:
        """Compress an image.

        image: PIL image of any mode, uint8 array (H, W), (H, W, 3) or (H, W, 4), or Picture; or a picture file: its
        path, its bytes, or an open file. quality: 1 (smallest) to 8 (best), fractions allowed. tune: what about as
        many bytes are spent on, least squared error ("psnr"), or what the eye sees ("visual"). strip: leave ICC, EXIF
        and XMP out; "keep-icc" all but the ICC profile, "gps" the location alone. effort: 0 to 3, from 1 on the latents
        are fitted to this very image: for more time smaller files at equal PSNR, or a better picture in as many bytes.
        progress: called with 0..1.
        An alpha that is opaque everywhere is left out, and colours under an alpha of 0 are not kept.
        Returns the bytes of a .vq2 file. Raises ImageError, UsageError for a quality or effort out of range or a tune
        that there is not.
        """
        # Without names for what comes between, which would stay in memory.
        encoder = PictureEncoder(self, told(image, strip), effort, tune)
        return encoder.encode(quality, progress, last=True)

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

        preview: decode only the coarsest grid and areas of one colour: fast and blurred. Works on a file truncated
        after that grid, without alpha, metadata and these areas. The file's checksum covers all grids, so a preview is
        not verified.

        Raises BitstreamError, by kind: not a .vq2 file, damaged, of another version, written with other weights,
        larger than ``max_pixels`` or the free memory allow.
        """
        picture = self.decode_picture(contents(data), max_pixels, progress, preview)
        warn(picture.notes, stacklevel=3)
        return to_pil(picture)

    def decode_picture(
        self,
        data: bytes,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        progress: Progress | None = None,
        preview: bool = False,
    ) -> Picture:
        """As ``decode``, but a Picture: the inverse of ``PictureEncoder.encode``, up to the loss. Its notes say what a
        preview of a damaged file lacks."""
        notes: list[str] = []
        try:
            parts = container.unpack(data, max_pixels=max_pixels)
        except DamagedError as error:
            if not preview:
                raise
            header, payload = container.unpack_coarsest(data, max_pixels=max_pixels)
            parts = Container(replace(header, colour=header.colour.opaque), 0, (payload,))
            notes.append(f"only a preview without alpha, metadata and areas of one colour can be shown ({error})")
        header = parts.header
        memory.require(header.width, header.height)
        alpha = None if parts.alpha is None else unpack_alpha(parts.alpha, header.width, header.height)
        indices, stages = self.indices, Stages(progress, INDICES + PIXELS)
        tell = stages.next(INDICES)
        grids = indices.pop(header, parts.grids[:1], tell) if preview else indices.decode(parts, tell)
        size = header.height, header.width
        row = indices.weights.row(header)
        shift = None if preview else parts.offset
        pixels = _pixels(self, grids, row, size, header.colour, shift, parts.flat, stages.next(PIXELS))
        icc, exif = bounded_icc(parts.icc, notes), checked_exif(parts.exif, notes)
        return Picture(pixels, header.colour.shown, alpha, icc, exif, parts.xmp, notes)

    def encode_to(
        self,
        image: "Image.Image | ArrayLike | Picture | Source",
        target: Target,
        *,
        tune: Tune | None = None,
        strip: Strip = False,
        effort: int = DEFAULT_EFFORT,
        progress: Progress | None = None,
    ) -> SearchResult:
        """Compress an image to a size, a rate or a PSNR: searches the quality for it, in some 3 to 10 encodings.

        Returns the file nearest to the target of all those tried; ``met`` tells whether it is within the tolerance.
        tune, strip, effort: as in ``encode``; without a tune a PSNR is reached by files that are made for it. progress:
        called with 0..1 for every file tried. Raises ImageError.
        """
        encoder = PictureEncoder(self, told(image, strip), effort, tune or target.tune)

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
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> Image.Image:
        """Draw an image from the priors, by the walk that codes.

        temperature: below 1 the likely indices are drawn more often than the priors say, which gives calmer images.
        UsageError unless it is positive and finite, and for a size or quality out of range. Raises LimitError for a
        size that ``decode`` would refuse.
        """
        level, _ = self.level_for(quality)
        header = Header(level + 1, width, height, ColourMode.RGB, self.fingerprint)  # which checks the size
        if excess := over_limit(width, height, max_pixels):
            raise LimitError(f"{excess}: raise it (--max-pixels)")
        memory.require(width, height)
        return self._sample((height, width), self.indices.weights.row(header), [], seed, temperature)

    def sample_from(
        self, data: bytes, *, seed: int = 0, temperature: float = 1.0, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> Image.Image:
        """Keep the coarsest grid of a .vq2 file and draw the others. Raises BitstreamError, as a preview does."""
        header, payload = container.unpack_coarsest(data, max_pixels=max_pixels)
        memory.require(header.width, header.height)
        grids = self.indices.pop(header, [payload])
        return self._sample((header.height, header.width), self.indices.weights.row(header), grids, seed, temperature)

    def _sample(self, size: tuple[int, int], row: int, grids: list[Grid], seed: int, temperature: float) -> Image.Image:
        """An image of size (H, W) from grids that are given, coarsest first, and others that are drawn."""
        drawn = self.indices.sample(row, size, np.random.default_rng(seed), temperature, grids)
        return Image.fromarray(_pixels(self, drawn, row, size, ColourMode.RGB))

    def level_for(self, quality: float, level: int | None = None) -> tuple[int, float]:
        """The level (0-based) nearest to a quality, and the factor on the rate term that makes up the difference.

        level: one to take instead of the nearest. UsageError for a quality out of range.
        """
        lambdas = self.model.config.lambdas
        if not 1 <= quality <= len(lambdas):
            raise UsageError(f"quality {quality:g} is not in 1..{len(lambdas)}")
        if not self.model.config.rate_constrained:
            return 0, 0.0
        if level is None:
            level = min(int(quality + 0.5), len(lambdas)) - 1
        wanted = np.exp(np.interp(quality - 1, np.arange(len(lambdas)), np.log(lambdas)))
        return level, lambdas[level] / float(wanted)

    def tiled(
        self,
        network: Callable[..., Sequence[Tensor]],
        halo: int,
        cells: tuple[int, int],
        *sources: Tensor | None,
        progress: Progress | None = None,
    ) -> list[Tensor]:
        """What a network with a halo makes of a picture's views, tile by tile: see ``run_tiled``.

        cells: (rows, columns) of the coarsest grid. sources: (1, C, r rows, r columns) for any whole r, or None.
        """
        tiled = TiledNetwork(network, sources, halo)
        return run_tiled([tiled], cells, self.model.config.stride, self.device, progress=progress)


class PictureEncoder:
    """One picture on its way to a file, at any number of qualities.

    Encoder features depend only on the level, so they are cached until the level changes.
    """

    def __init__(self, codec: Codec, picture: Picture, effort: int = DEFAULT_EFFORT, tune: Tune = DEFAULT_TUNE) -> None:
        self.height, self.width = picture.pixels.shape[:2]
        if max(self.height, self.width) > MAX_SIDE:
            raise ImageError(
                f"the image has {self.width} x {self.height} pixels, the format holds up to {MAX_SIDE} a side"
            )
        if not 0 <= effort < len(EFFORTS):
            raise UsageError(f"effort {effort} is not in 0..{len(EFFORTS) - 1}")
        if tune not in TUNES:
            raise UsageError(f"tune {tune!r} is not one of {', '.join(TUNES)}")
        self.codec, self.picture, self.visual = codec, prepared(picture), tune == "visual"
        self.size = self.height, self.width
        self.cells = codec.indices.weights.shape(0, *self.size)
        # Without rate the nearest codes are what was asked for.
        self.steps = EFFORTS[effort if codec.model.config.rate_constrained else 0]
        picture = self.picture
        self.alpha = None if picture.alpha is None else pack_alpha(picture.alpha)
        equal = (picture.pixels == picture.pixels[..., :1]).all()
        self.colour = picture.colour.equal if equal else picture.colour
        planes = 1 if self.colour.one_plane else 3
        self.flat = flat.find(picture.pixels[..., :planes])
        self.offset: bytes | None = None  # of the last file
        self.unseen: NDArray[np.bool_] | None = None  # cells of the finest grid, see UNSEEN
        if self.flat is not None and codec.model.config.grids[-1].stride == flat.BLOCK:
            deep = flat.deep(self.flat, *self.size, planes)
            rows, columns = codec.indices.weights.shape(len(codec.model.config.grids) - 1, *self.size)
            self.unseen = np.pad(deep, ((0, rows - deep.shape[0]), (0, columns - deep.shape[1])), "edge")
        stride = codec.model.config.stride
        pad = [(0, n * stride - side) for n, side in zip(self.cells, self.size, strict=True)]
        padded = np.pad(picture.pixels, (*pad, (0, 0)), "edge")  # up to whole cells
        self.picture = replace(picture, pixels=padded[: self.height, : self.width])  # one copy in memory is enough
        self._pixels = torch.from_numpy(padded).permute(2, 0, 1)[None]
        self.grids: list[Grid] = []  # of the last file
        self._decoded: NDArray[np.uint8] | None = None
        self._row: int | None = None
        self._features: list[Tensor | None] = []

    def encode(
        self, quality: float, progress: Progress | None = None, level: int | None = None, *, last: bool = False
    ) -> bytes:
        """The bytes of a file. level: as in ``Codec.level_for``. last: features are let go as soon as they are used.
        Raises UsageError for a quality out of range."""
        codec = self.codec
        level, rate_weight = codec.level_for(quality, level)
        header = Header(level + 1, self.width, self.height, self.colour, codec.fingerprint, self.visual)
        row = codec.indices.weights.row(header)
        analysis = 0 if self._analysed(row) else ANALYSIS
        coarse = self.steps.coarser * FIT_STEP + COARSE_WALK + CONTEXT + LATENTS
        grids = (len(codec.model.codebooks) - 1) * coarse + self.steps.finest * FIT_STEP + WALK
        # To say nothing about flat blocks in coarse grids, too, halves the bytes beside strong colours, but costs some
        # beside white: what is next to them is easier to guess then.
        ways = (False, True) if self.unseen is not None and self.unseen.mean() >= MOSTLY_FLAT else (False,)
        stages = Stages(progress, analysis + len(ways) * grids)
        with inference(codec.device):
            self._analyse(row, stages.next(analysis))
        found = [self._coded(row, rate_weight, blank, stages, last and blank == ways[-1]) for blank in ways]
        self.grids, payloads = min(found, key=lambda way: sum(map(len, way[1])))
        self.offset = self._decoded = None
        bits = 8 * sum(map(len, payloads))
        few = bits <= FEW_BITS + FEW_BITS_PER_PIXEL * self.width * self.height
        if few or bits <= SMALL_BITS:
            self._find_offset(row)
        # For the eye grain is better than nothing, even if by squared error it is not.
        if (
            (few or not self.visual)
            and (plain := self._of_one_colour())
            and (data := self._nearer(plain, quality, level))
        ):
            return data
        picture = self.picture
        checksum = container.checksum(header, self.grids, self.offset, self.flat)
        optional = (self.offset, self.flat, self.alpha, picture.icc, picture.exif, picture.xmp)
        return container.pack(Container(header, checksum, tuple(payloads), *optional))

    def _coded(
        self, row: int, rate_weight: float, blank: bool, stages: Stages, last: bool
    ) -> tuple[list[Grid], list[bytes]]:
        """All grids and their payloads. blank: in coarse grids, too, what is likely will do where nobody sees it."""
        codec, model, number = self.codec, self.codec.model, _number(row, self.codec.device)
        payloads: list[bytes] = []
        self.grids, context, finest = [], None, len(model.codebooks) - 1
        with inference(codec.device):
            variance = self._variance
            rate_weights = torch.full_like(variance, rate_weight)
            if self.visual and rate_weight:
                rate_weights /= visibility(variance, model.config.lambda_at(row) / rate_weight)
            smooth = smoothness(variance)
            for k in range(len(model.codebooks)):

                def latent(x: Tensor, *parts: Tensor, k: int = k) -> list[Tensor]:
                    return [model.latent(k, x, *parts, number)]

                halo, tell = model.config.halo(k, "latents"), stages.next(LATENTS if k else 0)
                (z,) = codec.tiled(latent, halo, self.cells, self._pixels, self._features[k], context, progress=tell)
                if last:
                    self._features[k] = None
                if k == finest and not self.visual:  # whose weights do as much
                    rate_weights = rate_weights * self._rate_share(z)
                if steps := self.steps.finest if k == finest else self.steps.coarser:
                    z = self._fitted(z, context, rate_weights, steps, stages.next(steps * FIT_STEP))
                if k == finest:
                    context = None  # one of the largest of what is in memory
                latents = z[0].permute(1, 2, 0).float().cpu().numpy()
                weights, flatness = (
                    F.avg_pool2d(x, x.shape[2] // z.shape[2])[0, 0].numpy() for x in (rate_weights, smooth)
                )
                if self.unseen is not None and (blank or k == finest):
                    rows, columns, _ = latents.shape
                    unseen = self.unseen.reshape(rows, -1, columns, self.unseen.shape[1] // columns).all((1, 3))
                    latents = np.where(np.expand_dims(unseen, 2), np.float32(0), latents)
                    weights = np.where(unseen, np.float32(UNSEEN), weights)
                    flatness = np.where(unseen, np.float32(0), flatness)
                tell = stages.next(WALK if k == finest else COARSE_WALK)
                grid, payload = codec.indices.encode(
                    row, self.size, self.grids, latents, weights, Diffusion(codec.passed_on[k], flatness), tell
                )
                self.grids.append(grid)
                payloads.append(payload)
                if k < finest:

                    def decode(*parts: Tensor, k: int = k) -> list[Tensor]:
                        return [_context(model, k, parts[: k + 1], parts[k + 1], number)]

                    known = *map(_tensor, self.grids), context
                    tell = stages.next(CONTEXT)
                    (context,) = codec.tiled(decode, model.config.halo(k, "decoder"), self.cells, *known, progress=tell)
        return self.grids, payloads

    def decoded(self) -> NDArray[np.uint8]:
        """What the last file decodes to, (H, W, 3), without another walk."""
        assert self._row is not None
        if self._decoded is None:
            self._decoded = _pixels(self.codec, self.grids, self._row, self.size, self.colour, None, self.flat)
        return self._decoded

    def _find_offset(self, row: int) -> None:
        """Draw the picture of the grids, and set the offset if its error is less with one."""
        picture, drawn = self.picture, _drawn(self.codec, self.grids, row, self.size, self.colour)
        counts = np.ones(self.size, np.bool_) if picture.alpha is None else picture.alpha > 0
        if self.flat is not None:
            counts &= ~flat.covered(self.flat, *drawn.shape)
        found = offset.find(drawn, picture.pixels[..., : drawn.shape[2]], counts)
        # Both in full, because beside flat blocks an offset does not move pixels by as much.
        ways = {shift: _finished(drawn.copy(), self.colour, shift, self.flat) for shift in (None, found)}
        self.offset = max(ways, key=lambda shift: psnr(picture.pixels, ways[shift], picture.alpha))
        self._decoded = ways[self.offset]

    def _of_one_colour(self) -> Picture | None:
        """The picture in its mean colour alone; None if it is no faint noise or slope, or has but one colour anyway."""
        picture = self.picture
        if picture.pixels[:: flat.BLOCK, :: flat.BLOCK].var((0, 1)).mean() > FAINT**2:
            return None
        visible = picture.pixels.reshape(-1, 3) if picture.alpha is None else picture.pixels[picture.alpha > 0]
        if not len(visible):
            return None
        plain = np.broadcast_to(np.rint(visible.mean(0)).astype(np.uint8), picture.pixels.shape)
        return None if (picture.pixels == plain).all() else replace(picture, pixels=plain)

    def _nearer(self, plain: Picture, quality: float, level: int) -> bytes | None:
        """The file of another picture with this one's metadata, if it comes nearer to this one than this one's own.

        Codes are coarse where bits are few: faint noise may come back as a drift that is worse than nothing.
        """
        picture, reached = self.picture, psnr(self.picture.pixels, self.decoded(), self.picture.alpha)
        if psnr(picture.pixels, plain.pixels, picture.alpha) <= reached:
            return None
        encoder = PictureEncoder(self.codec, plain, 0, "visual" if self.visual else "psnr")
        data = encoder.encode(quality, level=level)
        if psnr(picture.pixels, encoder.decoded(), picture.alpha) <= reached:
            return None
        self.grids, self.offset, self._decoded = encoder.grids, encoder.offset, encoder.decoded()
        return data

    def _analysed(self, row: int) -> bool:
        return row == self._row and all(features is not None for features in self._features)

    def _analyse(self, row: int, progress: Progress | None) -> None:
        """The networks' work on a level, unless it is at hand."""
        if self._analysed(row):
            return
        codec, model = self.codec, self.codec.model
        self._features, self._row = [], row
        number = _number(row, codec.device)

        finest = len(model.codebooks) - 1
        for k in range(finest, -1, -1):

            def features(x: Tensor, k: int = k) -> list[Tensor]:
                return [model.features(k, x, number)]

            source = self._features[0] if self._features else self._pixels
            tell = progress if k == finest else None  # the others are a tenth of it
            halo = model.config.halo(k, "features")
            self._features[:0] = codec.tiled(features, halo, self.cells, source, progress=tell)

    def _fitted(
        self, z: Tensor, context: Tensor | None, rate_weights: Tensor, steps: int, progress: Progress | None
    ) -> Tensor:
        """Latents of the next grid, fitted to the picture and to the coarser grids that there are."""
        model, k = self.codec.model, len(self.grids)
        assert self._row is not None
        number = _number(self._row, self.codec.device)
        bits = torch.full((1,), model.config.sample_bits(self._row), dtype=torch.float32, device=self.codec.device)

        def fit(x: Tensor, z: Tensor, weights: Tensor, context: Tensor | None, *rest: Tensor) -> list[Tensor]:
            known, finer = rest[:k], rest[k:]
            return [
                refine.refined_latents(model, x, z, finer, context, number, bits, weights, steps, known, self.visual)
            ]

        sources = [self._pixels, z, rate_weights, context, *map(_tensor, self.grids), *self._features[k + 1 :]]
        tiled = TiledNetwork(fit, sources, model.config.halo(k, "fit"))
        (z,) = run_tiled([tiled], self.cells, model.config.stride, self.codec.device, progress=progress)
        return z

    def _rate_share(self, z: Tensor) -> Tensor:
        """Factors on the rate in the cells of the finest grid, (1, 1, h, w), by its latents."""
        halo = self.codec.model.config.stride  # a cell at least
        return self.codec.tiled(lambda z: [rate_share(z)], halo, self.cells, z)[0]

    @cached_property
    def _variance(self) -> Tensor:
        """Of luma around the cells of the finest grid, (1, 1, h, w)."""
        stride = self.codec.model.config.grids[-1].stride
        (found,) = self.codec.tiled(
            lambda x: [variance(x, stride)], self.codec.model.config.stride, self.cells, self._pixels
        )
        return found


def _passed_on(model: VQVAE, k: int) -> NDArray[np.float32]:
    """Shares (M d,) of what is left of a cell's latents that goes on to each of two neighbours: of channels that are
    about a mean colour, if the model has a linear path, which tells."""
    grid = model.config.grids[k]
    if not model.config.linear_path:
        return np.zeros(grid.groups * grid.dim, np.float32)
    functions = model.coefficients[k].weight.detach().float()
    means = functions.mean((2, 3)).square().sum(1) * grid.stride**2
    share = means / functions.square().sum((1, 2, 3)).clamp(min=1e-12)
    return np.asarray(np.where((share > MEAN_COLOUR).cpu().numpy(), PASSED_ON / 2, 0), np.float32)


def _pixels(
    codec: Codec,
    grids: Sequence[Grid],
    row: int,
    size: tuple[int, int],
    colour: ColourMode,
    shift: bytes | None = None,
    blocks: bytes | None = None,
    progress: Progress | None = None,
) -> NDArray[np.uint8]:
    """The image (H, W, 3), (H, W) = size, of index grids at a row of the gains and the contents of an offset and a flat
    chunk."""
    return _finished(_drawn(codec, grids, row, size, colour, progress), colour, shift, blocks)


def _drawn(
    codec: Codec,
    grids: Sequence[Grid],
    row: int,
    size: tuple[int, int],
    colour: ColourMode,
    progress: Progress | None = None,
) -> NDArray[np.uint8]:
    """The coded planes, (H, W, 3) or (H, W, 1), as the network gives them."""
    pixels = _decode_pixels(codec, [_tensor(grid) for grid in grids], _number(row, codec.device), size, progress)
    if colour.one_plane:
        # The mean of the channels, rounded, in integers.
        pixels = ((2 * pixels.sum(2, keepdims=True, dtype=np.uint16) + 3) // 6).astype(np.uint8)
    return pixels


def _finished(
    pixels: NDArray[np.uint8], colour: ColourMode, shift: bytes | None, blocks: bytes | None
) -> NDArray[np.uint8]:
    """The image (H, W, 3) of coded planes, which it may change, with an offset and flat blocks."""
    if shift is not None:
        offset.add(pixels, shift)
    if blocks is not None:
        flat.paste(pixels, blocks)
    return np.repeat(pixels, 3, axis=2) if colour.one_plane else pixels


def _decode_pixels(
    codec: Codec, grids: Sequence[Tensor], level: Tensor, size: tuple[int, int], progress: Progress | None
) -> NDArray[np.uint8]:
    """The image (H, W, 3), (H, W) = size, of index grids."""

    model, config = codec.model, codec.model.config

    def network(k: int) -> TiledNetwork:
        def decode(*parts: Tensor) -> list[Tensor]:
            indices, context = parts[: len(grids)], parts[len(grids) :]
            above = context[0] if context else None
            if k + 1 == len(config.grids):
                base = None if above is None else model.base(k, above)
                return [model.draw(model.codes(k, indices), base, level).pixels]
            return [_context(model, k, indices, above, level)]

        return TiledNetwork(decode, grids, config.halo(k, "decoder"))

    cells = (grids[0].shape[2], grids[0].shape[3])
    with inference(codec.device):
        networks = [network(k) for k in range(len(config.grids))]
        (x,) = run_tiled(networks, cells, config.stride, codec.device, size, progress=progress)
    return x[0].permute(1, 2, 0).contiguous().numpy()


def _context(model: VQVAE, k: int, indices: Sequence[Tensor], context: Tensor | None, level: Tensor) -> Tensor:
    """The context that grid k of some indices gives, in float32: the linear path starts from it."""
    codes = model.codes(k, indices)
    with full_precision(codes.device):
        return model.decode_grid(k, codes, context, level)


def _tensor(grid: Grid) -> Tensor:
    """A grid for the networks, (1, M, h, w), in a type that torch can do everything with."""
    return torch.from_numpy(grid.astype(np.int32))[None]


def _number(row: int, device: torch.device) -> Tensor:
    """A row of the gains, as the networks take it for their level."""
    return torch.tensor([row], dtype=torch.long, device=device)
