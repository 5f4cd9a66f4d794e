"""The hierarchical VQ-VAE: encoder, quantized grids from coarse to fine, decoder.

Source: Razavi et al., "Generating Diverse High-Fidelity Images with VQ-VAE-2" (2019). The encoder halves the
resolution stage by stage; the coarsest grid is quantized first, and each finer one is computed from its own stage
and the decoded coarser grids. Ours adds: product groups in a cell, the choice of indices by distance plus rate, and
quality levels (gains per channel in every stage).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqcodec.models import Modules
from vqcodec.models.pixelsnail import PixelSNAIL, PriorConfig
from vqcodec.models.quantizer import COMMITMENT, Codebook, Learning, choose, code_length, log2_softmax, rate_gradient

STEM = 4  # pixels per cell of the first stage: space-to-depth, because convolutions at full resolution are slow


@dataclass(frozen=True)
class GridConfig:
    """One grid: a cell of stride x stride pixels holds ``groups`` indices into codebooks of ``codes`` vectors of
    ``dim`` channels."""

    stride: int
    groups: int
    dim: int
    codes: int
    prior: PriorConfig


@dataclass(frozen=True)
class ModelConfig:
    """A model.

    lambdas: one per quality level, weight of the squared error (0..255) against bits per pixel; one level without
    rate, (0.0,), is the plain VQ-VAE. channels: encoder width per stage, strides 4, 8, 16, ...; decoder_channels:
    the same for the decoder; blocks: residual blocks per stage of either. grids: coarsest first.
    """

    name: str
    lambdas: tuple[float, ...]
    channels: tuple[int, ...]
    decoder_channels: tuple[int, ...]
    blocks: int
    grids: tuple[GridConfig, ...]
    codebook: Learning = "ema"

    @property
    def levels(self) -> int:
        return len(self.lambdas)

    @property
    def stride(self) -> int:
        """Image sides are padded to a multiple of this."""
        return self.grids[0].stride

    @property
    def rate_constrained(self) -> bool:
        return self.lambdas[0] > 0

    def halo(self) -> int:
        """Pixels, a multiple of the stride: no network's output depends on inputs further away than this."""
        reach, stride = 0, STEM
        while stride <= self.stride:
            reach += stride * (2 * self.blocks + 3)
            stride *= 2
        return -(-reach // self.stride) * self.stride


class ResBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.b.weight.data *= 0.3
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.act(self.a(self.act(x))))


class Stage(nn.Module):
    """Gain per channel and level, then residual blocks."""

    def __init__(self, channels: int, blocks: int, levels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(levels, channels))
        self.blocks = nn.Sequential(*(ResBlock(channels) for _ in range(blocks)))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.blocks(x * self.gain[level][:, :, None, None].to(x.dtype))


class Latent(nn.Module):
    """Projection to and from the latents of a grid, with gains per level that start at the square root of lambda:
    distances are then in bits at every level."""

    def __init__(self, channels: int, width: int, lambdas: tuple[float, ...]) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, 1)
        middle = lambdas[len(lambdas) // 2] or 1.0
        gain = torch.tensor([(value or middle) / middle for value in lambdas]).log() / 2
        self.log_gain = nn.Parameter(gain[:, None].repeat(1, width))
        self.log_inverse = nn.Parameter(-gain[:, None].repeat(1, width))

    def encode(self, x: Tensor, level: Tensor) -> Tensor:
        # The latents start with a spread comparable to the distance between codes.
        return 4 * self.project(x).float() * self.log_gain[level].exp()[:, :, None, None]

    def decode(self, codes: Tensor, level: Tensor) -> Tensor:
        return 0.25 * codes * self.log_inverse[level].exp()[:, :, None, None]


class Output(NamedTuple):
    """What training needs. x_hat: (B, 3, H, W); bits: (grids, B), by the priors; penalty: (B,), commitment, codebook
    and rate gradients, in bits."""

    x_hat: Tensor
    bits: Tensor
    penalty: Tensor


class VQVAE(nn.Module):
    """Encoder, codebooks, priors and decoder of one model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        levels, blocks = config.levels, config.blocks
        enc, dec = config.channels, config.decoder_channels
        strides = [STEM * 2**k for k in range(len(enc))]
        if len(dec) != len(enc) or strides[-1] != config.stride:
            raise ValueError(f"{config.name}: stages of stride {strides}, coarsest grid of stride {config.stride}")
        self.strides = strides
        self.stem = nn.Sequential(nn.PixelUnshuffle(STEM), nn.Conv2d(3 * STEM**2, enc[0], 3, padding=1))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(enc, enc[1:], strict=False))
        self.analysis: Modules[Stage] = Modules(Stage(c, blocks, levels) for c in enc)

        self.latents: Modules[Latent] = Modules()
        self.merge = nn.ModuleList()
        self.codebooks: Modules[Codebook] = Modules()
        self.priors: Modules[PixelSNAIL] = Modules()
        self.join = nn.ModuleDict()
        for k, grid in enumerate(config.grids):
            stage, width = strides.index(grid.stride), grid.groups * grid.dim
            self.latents.append(Latent(enc[stage], width, config.lambdas))
            self.merge.append(
                nn.Sequential(nn.Conv2d(enc[stage] + dec[stage], enc[stage], 1), ResBlock(enc[stage]))
                if k
                else nn.Identity()
            )
            self.codebooks.append(Codebook(grid.groups, grid.codes, grid.dim, levels, config.codebook))
            above = config.grids[k - 1].groups * config.grids[k - 1].dim if k else 0
            self.priors.append(PixelSNAIL(grid.prior, grid.groups, grid.dim, grid.codes, above, levels))
            self.join[str(grid.stride)] = nn.Conv2d(width + (dec[stage] if k else 0), dec[stage], 3, padding=1)
        self.synthesis: Modules[Stage] = Modules(Stage(c, blocks, levels) for c in dec)
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2)) for a, b in zip(dec, dec[1:], strict=False)
        )
        self.tail = nn.Sequential(nn.Conv2d(dec[0], 3 * STEM**2, 3, padding=1), nn.PixelShuffle(STEM))

    # The journey of an image. x: (B, 3, H, W) in 0..1, sides multiples of config.stride; level: (B,).

    def analyse(self, x: Tensor, level: Tensor) -> list[Tensor]:
        """Features of each grid's stage, coarsest first: (B, C, H / stride, W / stride)."""
        y, found = self.stem(x - 0.5), {}
        for k, stage in enumerate(self.analysis):
            y = stage(y if k == 0 else self.down[k - 1](y), level)
            found[self.strides[k]] = y
        return [found[grid.stride] for grid in self.config.grids]

    def latent(self, k: int, features: Tensor, context: Tensor | None, level: Tensor) -> Tensor:
        """Latents z (B, M * d, h, w) of grid k from its features and the decoded coarser grids."""
        if context is not None:
            features = self.merge[k](torch.cat([features, context], 1))
        return self.latents[k].encode(features, level)

    def decode_grid(self, k: int, codes: Tensor, context: Tensor | None, level: Tensor) -> Tensor:
        """Decode grid k: code vectors (B, M * d, h, w) and the context from coarser grids -> the context of the next
        finer grid (B, C, h', w'); after the finest grid, the image (B, 3, H, W)."""
        grids = self.config.grids
        y = self.latents[k].decode(codes, level)
        y = self.join[str(grids[k].stride)](y if context is None else torch.cat([y, context], 1))
        stage = self.strides.index(grids[k].stride)
        last = self.strides.index(grids[k + 1].stride) + 1 if k + 1 < len(grids) else 0
        y = self.synthesis[stage](y, level)
        for s in range(stage - 1, last - 1, -1):
            y = self.synthesis[s](self.up[s](y), level)
        return self.up[last - 1](y) if last else self.tail(y).float() + 0.5

    def decode(self, indices: Sequence[Tensor], level: Tensor) -> Tensor:
        """Index grids (B, M, h, w), coarsest first -> image (B, 3, H, W)."""
        context = None
        for k, (book, index) in enumerate(zip(self.codebooks, indices, strict=True)):
            codes = book.lookup(index, book.vectors).permute(0, 3, 1, 2)
            context = self.decode_grid(k, codes, context, level)
        assert context is not None
        return context

    def condition(self, k: int, indices: Tensor, level: Tensor) -> Tensor:
        """What grid k's prior sees of the next coarser grid's indices (B, M, h, w): (B, 2h, 2w, C), exact."""
        book, stack = self.codebooks[k - 1], self.priors[k].condition
        assert stack is not None
        return stack(book.lookup(indices, book.activations()), level)

    def forward(self, x: Tensor, level: Tensor, rate_weight: float) -> Output:
        """The whole journey with the training form of the choice: one pass of the prior over indices chosen by
        marginal frequencies gives the rates for the final choice. rate_weight: 0 nearest code, 1 the full rate."""
        context: Tensor | None = None
        coarser: Tensor | None = None
        bits, penalty = [], x.new_zeros(x.shape[0])
        for k, features in enumerate(self.analyse(x, level)):
            z = self.latent(k, features, context, level)
            condition = None if coarser is None else self.condition(k, coarser, level)
            index, straight, loss = self._quantize(k, z, condition, level, rate_weight)
            bits.append(self.code_lengths(k, index, condition, level))
            penalty = penalty + loss
            context = self.decode_grid(k, straight, context, level)
            coarser = index
        assert context is not None
        return Output(context, torch.stack(bits), penalty)

    def code_lengths(self, k: int, index: Tensor, condition: Tensor | None, level: Tensor) -> Tensor:
        """Bits of grid k, (B,), differentiable in the prior's parameters."""
        book = self.codebooks[k]
        logits = self.priors[k](book.lookup(index, book.activations()), level, condition)
        lengths = [code_length(row, index[:, g]).sum((1, 2)) for g, row in enumerate(logits)]
        return torch.stack(lengths).sum(0)

    def _quantize(
        self, k: int, z: Tensor, condition: Tensor | None, level: Tensor, rate_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices (B, M, h, w), code vectors with straight-through gradient (B, M * d, h, w), penalty (B,)."""
        book = self.codebooks[k]
        b, _, h, w = z.shape
        v = book.split(z)
        values = v.detach()
        if book.training and not book.initialised:
            book.initialise(values)
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            usage = book.log2_usage()[level][:, :, None]
            chosen = [choose(book.closeness(values[g], g), usage[:, g], rate_weight) for g in range(book.groups)]
            gradient = torch.zeros_like(values)
        if rate_weight > 0:
            with torch.no_grad():
                guess = torch.stack(chosen, 1).unflatten(2, (h, w))
                logits = self.priors[k](book.lookup(guess, book.activations()), level, condition)
            with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
                for g, row in enumerate(logits):
                    log2_p = log2_softmax(row.flatten(1, 2))
                    cost = book.closeness(values[g], g)
                    chosen[g] = choose(cost, log2_p, rate_weight)
                    gradient[g] = rate_gradient(cost, log2_p, book.vectors[g])
        index = torch.stack(chosen)
        e = torch.stack([book.vectors[g][index[g]] for g in range(book.groups)])
        penalty = COMMITMENT * (v - e.detach()).pow(2).sum((0, 2, 3))
        penalty = penalty + rate_weight * ((v - values) * gradient).sum((0, 2, 3))  # zero, but for its gradient
        if book.learning == "loss":
            penalty = penalty + (values - e).pow(2).sum((0, 2, 3))
        if book.training:
            book.update(values, index, level)
        straight = v + (e - v).detach()
        joined = straight.permute(1, 0, 3, 2).reshape(b, -1, h, w)
        return index.transpose(0, 1).unflatten(2, (h, w)), joined, penalty

