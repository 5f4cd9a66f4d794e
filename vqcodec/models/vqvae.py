"""The hierarchical VQ-VAE: encoder, quantized grids from coarse to fine, decoder.

Source: Razavi et al., "Generating Diverse High-Fidelity Images with VQ-VAE-2" (2019). The encoder halves the
resolution stage by stage; the coarsest grid is quantized first, and each finer one is computed from its own stage
and the decoded coarser grids. Ours adds: product groups in a cell, the choice of indices by distance plus rate,
quality levels (gains per channel in every stage), and a linear path beside the networks that starts as a DCT: with it a
model begins as a plain transform codec and spends its training on what is better than that.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitstream.exact import CODE_SCALE_BITS, ESCAPE_BITS
from vqcodec.config import STEM, ModelConfig
from vqcodec.models import Modules
from vqcodec.models.blocks import Drawn, to_blocks
from vqcodec.models.dyadic import table_bits
from vqcodec.models.pixelsnail import PixelSNAIL, Rows, Units, rows_of, take
from vqcodec.models.precision import full_precision, inference_precision, inner_type
from vqcodec.models.quantizer import COMMITMENT, Choice, Codebook, code_length, flag_bits, put
from vqcodec.models.transform import block_basis

SPREAD = 4.0  # on the linear path coefficients are this many times larger, of the order of the features
QUIET = 0.1  # factor on the first weights of what is added to the linear path


class Downsample(nn.Conv2d):
    """Halves the resolution."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(fan_in, fan_out, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[3] < 4:
            # In bfloat16 oneDNN's kernel (of torch 2.13) makes rubbish of an output that is one column wide.
            with full_precision(x.device):
                return super().forward(x.float())
        return super().forward(x)


class ResBlock(nn.Module):
    """Pre-activation residual block of two 3x3 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 3, padding=1)
        self.b.weight.data *= 0.3

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(F.relu(x)), inplace=True))
        return y.add_(x) if y.dtype == x.dtype else y + x


class Stage(nn.Module):
    """Gain per channel and level, then residual blocks."""

    def __init__(self, channels: int, blocks: int, levels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(levels, channels))
        self.blocks = nn.Sequential(*(ResBlock(channels) for _ in range(blocks)))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        x = x * self.gain[level][:, :, None, None].to(x.dtype)
        if self.training or x.dtype != torch.float32:
            return self.blocks(x)
        with inference_precision(x.device):  # of what is added: x itself stays in float32
            return self.blocks(x)


class Latent(nn.Module):
    """Latents of a grid: a projection of the features, plus the linear path, in units in which distances are bits, less
    what the null code of a level stands for.

    An error d in a coefficient of an orthonormal transform costs lambda 255^2 d^2 / 3 bits per cell: the gain of a
    level starts as the root of that. Without rate it starts as a spread comparable to the distance between codes.
    """

    def __init__(self, channels: int, width: int, lambdas: tuple[float, ...]) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, 1)
        gain = torch.tensor([255 * (value / 3) ** 0.5 / SPREAD or SPREAD for value in lambdas]).log()
        self.log_gain = nn.Parameter(gain[:, None].repeat(1, width))
        self.log_inverse = nn.Parameter(-gain[:, None].repeat(1, width))
        self.null = nn.Parameter(torch.zeros(len(lambdas), width))

    def encode(self, features: Tensor, linear: Tensor | None, level: Tensor) -> Tensor:
        """Latents (B, D, h, w) of features (B, C, h, w), coefficients (B, D, h, w) and level (B,)."""
        y = self.project(features).float()
        y = (y if linear is None else y + linear) * self.log_gain[level].exp()[:, :, None, None]
        return y - self.null[level][:, :, None, None]

    def decode(self, codes: Tensor, level: Tensor) -> Tensor:
        return (codes + self.null[level][:, :, None, None]) * self.log_inverse[level].exp()[:, :, None, None]


# Latents (B, M * d, h, w) of a grid, the features of the finer grids, the context and the coarser grids' indices ->
# better latents, without a gradient, and what the rates count for in each cell, (B, 1, h, w).
Fit = Callable[[Tensor, Sequence[Tensor], Tensor | None, Sequence[Tensor]], tuple[Tensor, Tensor]]


class Rates(NamedTuple):
    """Of a grid's indices. null, active: bits of a null flag and of its opposite, (M, B h w); units: what the bits of
    the outcomes are computed from."""

    null: Tensor
    active: Tensor
    units: Units


class Output(NamedTuple):
    """What training needs. x_hat: (B, 3, H, W); bits: (grids, n), by the priors, of the first n samples;
    penalty: (B,), commitment, codebook and rate gradients, in bits; distance: (B,), in bits, of the finest latents from
    what a fit makes of them, 0 without one; indices: (B, M, h, w) of each grid."""

    x_hat: Tensor
    bits: Tensor
    penalty: Tensor
    distance: Tensor
    indices: Sequence[Tensor]


class Base(NamedTuple):
    """What the coarser grids give of a grid's picture, whatever its own codes are: coefficients (B, D, h, w), if this
    is the finest grid of a model with a linear path, and features (B, C, h, w)."""

    coefficients: Tensor | None
    features: Tensor


class VQVAE(nn.Module):
    """Encoder, codebooks, priors and decoder of one model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        levels, widths = config.rows, config.channels
        strides = [STEM * 2**k for k in range(len(widths))]
        if strides[-1] != config.stride:
            raise ValueError(f"{config.name}: stages of stride {strides}, coarsest grid of stride {config.stride}")
        self.strides = strides
        self.stem = nn.Sequential(nn.PixelUnshuffle(STEM), nn.Conv2d(3 * STEM**2, widths[0], 3, padding=1))
        self.down = nn.ModuleList(Downsample(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.analysis: Modules[Stage] = Modules(
            Stage(c, n, levels) for c, n in zip(widths, config.stage_blocks, strict=True)
        )

        self.latents: Modules[Latent] = Modules()
        self.merge = nn.ModuleList()
        self.codebooks: Modules[Codebook] = Modules()
        self.priors: Modules[PixelSNAIL] = Modules()
        self.join = nn.ModuleDict()
        for k, grid in enumerate(config.grids):
            stage, width = strides.index(grid.stride), grid.groups * grid.dim
            c = widths[stage]
            self.latents.append(Latent(c, width, config.lambdas * config.banks))
            count = min(1, config.stage_blocks[stage])
            merge = nn.Sequential(nn.Conv2d(2 * c, c, 1), *(ResBlock(c) for _ in range(count))) if k else nn.Identity()
            self.merge.append(merge)
            self.codebooks.append(Codebook(grid.groups, grid.codes, grid.dim, levels, grid.escape, config.codebook))
            above = config.grids[k - 1].groups * config.grids[k - 1].dim if k else 0
            outcomes = self.codebooks[k].outcomes
            self.priors.append(PixelSNAIL(grid.prior, grid.groups, grid.dim, outcomes, above, levels))
            self.join[str(grid.stride)] = nn.Conv2d(width + (c if k else 0), c, 3, padding=1)
        self.synthesis: Modules[Stage] = Modules(
            Stage(c, n, levels) for c, n in zip(widths, config.stage_blocks, strict=True)
        )
        self.up: Modules[nn.Sequential] = Modules(
            nn.Sequential(nn.Conv2d(b, 4 * a, 1), nn.PixelShuffle(2)) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.tail = nn.Sequential(nn.Conv2d(widths[0], 3 * STEM**2, 3, padding=1), nn.PixelShuffle(STEM))
        if config.linear_path:
            self._lay_linear_path()

    def _lay_linear_path(self) -> None:
        """Adds three linear layers: pixel blocks to coefficients (all grids); a prediction of the finest coefficients
        from the coarser grids, subtracted before coding and added after; coefficients to pixels."""
        finest = self.config.grids[-1]
        width = finest.groups * finest.dim
        self.coefficients: Modules[nn.Conv2d] = Modules()
        for grid, latent in zip(self.config.grids, self.latents, strict=True):
            layer = nn.Conv2d(3, grid.groups * grid.dim, grid.stride, grid.stride, bias=False)
            basis = block_basis(grid.stride, grid.groups, grid.dim)
            layer.weight.data.copy_(SPREAD * basis)
            self.coefficients.append(layer)
            latent.project.weight.data *= QUIET
        self.expect = nn.Conv2d(self.config.channels[self.strides.index(finest.stride)], width, 1)
        self.expect.weight.data *= QUIET
        self.pixels = nn.ConvTranspose2d(width, 3, finest.stride, finest.stride, bias=False)
        self.pixels.weight.data.copy_(basis / SPREAD)
        next(self.tail.parameters()).data *= QUIET

    # The journey of an image. x: (B, 3, H, W) in 0..1, sides multiples of config.stride; level: (B,).

    def analyse(self, x: Tensor, level: Tensor) -> list[Tensor]:
        """Features (B, C, H / stride, W / stride) of each grid's stage, coarsest first."""
        found: list[Tensor] = []
        for k in reversed(range(len(self.config.grids))):
            found.insert(0, self.features(k, found[0] if found else x, level))
        return found

    def features(self, k: int, x: Tensor, level: Tensor) -> Tensor:
        """Features (B, C, H / stride, W / stride) of grid k's stage, from those of the next finer grid; those of the
        finest grid from the pixels."""
        last = self.strides.index(self.config.grids[k].stride)
        first = 0 if self._finest(k) else self.strides.index(self.config.grids[k + 1].stride) + 1
        for stage in range(first, last + 1):
            x = self.down[stage - 1](x) if stage else self.stem[1](to_blocks(x, STEM, inner_type(x.device)))
            x = self.analysis[stage](x, level)
        return x

    def latent(self, k: int, x: Tensor, features: Tensor, context: Tensor | None, level: Tensor) -> Tensor:
        """Latents z (B, M * d, h, w) of grid k from the pixels, their features and the decoded coarser grids."""
        if context is not None:
            features = self.merge[k](torch.cat([features, context.to(features.dtype)], 1))
        linear = None
        if self.config.linear_path:
            with full_precision(x.device):
                linear = pointwise(to_blocks(x, self.config.grids[k].stride), self.coefficients[k].weight)
                if context is not None and self._finest(k):
                    linear = linear - pointwise(context.float(), self.expect.weight, self.expect.bias)
        return self.latents[k].encode(features, linear, level)

    def decode_grid(self, k: int, codes: Tensor, context: Tensor | None, level: Tensor) -> Tensor:
        """Decode grid k: code vectors (B, M * d, h, w) and the context from coarser grids -> the context of the next
        finer grid (B, C, h', w'); after the finest grid, the image (B, 3, H, W)."""
        base = None if context is None else self.base(k, context)
        return self.draw(codes, base, level).image if self._finest(k) else self.context(k, codes, base, level)

    def context(self, k: int, codes: Tensor, base: Base | None, level: Tensor) -> Tensor:
        """The context that the code vectors of grid k, not the finest, give the next finer one, as ``decode_grid``;
        base: of their own context."""
        return self._synthesise(k, codes, base, level)[0]

    def draw(self, codes: Tensor, base: Base | None, level: Tensor) -> Drawn:
        """The picture of the finest grid's code vectors, as ``decode_grid``; base: of their context."""
        y, linear = self._synthesise(len(self.codebooks) - 1, codes, base, level)
        return Drawn(self.tail[0](y), linear)

    def base(self, k: int, context: Tensor) -> Base:
        """What grid k's code vectors add to, of the context from coarser grids."""
        coefficients = None
        if self.config.linear_path and self._finest(k):
            with full_precision(context.device):
                coefficients = pointwise(context.float(), self.expect.weight, self.expect.bias)
        join, width = self._join(k), self.latents[k].null.shape[1]
        return Base(coefficients, F.conv2d(context, join.weight[:, width:], join.bias, padding=1))

    def _join(self, k: int) -> nn.Conv2d:
        layer = self.join[str(self.config.grids[k].stride)]
        assert isinstance(layer, nn.Conv2d)
        return layer

    def _synthesise(self, k: int, codes: Tensor, base: Base | None, level: Tensor) -> tuple[Tensor, Tensor | None]:
        """The context of the next finer grid, or of the tail; and what the linear path draws, after the finest grid."""
        y, linear, join = self.latents[k].decode(codes, level), None, self._join(k)
        if self.config.linear_path and self._finest(k):
            with full_precision(codes.device):
                if base is not None and base.coefficients is not None:
                    y = y + base.coefficients
                linear = pointwise(y, self.pixels.weight.flatten(1).t())
        y = join(y) if base is None else base.features + F.conv2d(y, join.weight[:, : y.shape[1]], padding=1)
        stage = self.strides.index(self.config.grids[k].stride)
        last = 0 if self._finest(k) else self.strides.index(self.config.grids[k + 1].stride) + 1
        y = self.synthesis[stage](y, level)
        for s in range(stage - 1, last - 1, -1):
            y = self.synthesis[s](self._double(s, y), level)
        return (self._double(last - 1, y) if last else y), linear

    def _double(self, s: int, y: Tensor) -> Tensor:
        """What stage s gets of the next coarser one: twice the resolution."""
        # As the pixel shuffle of the layers, but with whole vectors of channels to move, forwards and backwards.
        b, _, h, w = y.shape
        weight, bias = (
            p.view(len(p), -1).unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1) for p in self.up[s][0].parameters()
        )
        y = pointwise(y, weight, bias[:, 0]).permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))
        return y.transpose(2, 3).reshape(b, 2 * h, 2 * w, -1).permute(0, 3, 1, 2)

    def _finest(self, k: int) -> bool:
        return k == len(self.config.grids) - 1

    def codes(self, k: int, indices: Sequence[Tensor]) -> Tensor:
        """Code vectors (B, M * d, h, w) of grid k; zeros stand for those of a grid that is not among the indices."""
        book = self.codebooks[k]
        if k < len(indices):
            b, _, h, w = indices[k].shape
            return book.join(book.lookup(indices[k].transpose(0, 1).flatten(1)), b, h, w)
        grid, (b, _, h, w) = self.config.grids[k], indices[0].shape
        ratio = self.config.stride // grid.stride
        return book.vectors.new_zeros(b, grid.groups * grid.dim, h * ratio, w * ratio)

    def condition(self, k: int, indices: Tensor, level: Tensor) -> Tensor:
        """What grid k's prior sees of the next coarser grid's indices (B, M, h, w): (B, 2h, 2w, C), exact."""
        stack = self.priors[k].condition
        assert stack is not None
        return stack(self.seen(k - 1, indices), level)

    def seen(self, k: int, indices: Tensor) -> Tensor:
        """Grid k's indices (B, M, h, w) as priors see them: (B, h, w, M * d), on the activation grid."""
        book, (b, _, h, w) = self.codebooks[k], indices.shape
        return book.activations(book.lookup(indices.transpose(0, 1).flatten(1)), b, h, w)

    def guess(self, k: int, z: Tensor, level: Tensor, rate_weight: float | Tensor) -> Tensor:
        """Indices (B, M, h, w) of latents z by distance and the frequencies of the codes, without the prior.

        rate_weight: one for all cells, or one for each, (B, 1, h, w).
        """
        b, _, h, w = z.shape
        index = self.codebooks[k].guess(
            self.codebooks[k].split(z), level.repeat_interleave(h * w), _by_cell(rate_weight, z)
        )
        return _grid(index, z)

    def forward(
        self,
        x: Tensor,
        level: Tensor,
        rate_weight: float,
        dropped: Tensor | None = None,
        fit: Fit | None = None,
        given: Sequence[Tensor] = (),
    ) -> Output:
        """The whole journey with the training form of the choice: one pass of the prior over indices chosen by
        marginal frequencies gives the rates for the final choice. rate_weight: 0 nearest code, 1 the full rate.
        dropped: (B,) bool, samples whose image is decoded from the coarsest grid alone. fit: what an encoder does to
        latents and to the weights of rates; then code vectors learn from the image, and latents from the distance.
        given: the indices of all grids: then the encoder has nothing to do, penalty and distance are 0.

        The priors learn from the first n = ceil(B / 2) samples: they see thousands of cells in each, and their backward
        pass is the most expensive part of a step. From indices that are given they learn from all.
        """
        context: Tensor | None = None
        seen: Tensor | None = None
        n = len(x) if given else (len(x) + 1) // 2
        bits, penalty, distance = [], x.new_zeros(len(x)), x.new_zeros(len(x))
        known: list[Tensor] = []
        features = [] if given else self.analyse(x, level)
        for k in range(len(self.codebooks)):
            stack = self.priors[k].condition
            condition = None if stack is None or seen is None else stack(seen, level)
            if given:
                index = given[k]
            else:
                z = self.latent(k, x, features[k], context, level)
                weight: float | Tensor = rate_weight
                if fit:
                    fitted, weight = fit(z, features[k + 1 :], context, known)
                    if self._finest(k):
                        distance = (z - fitted).pow(2).sum((1, 2, 3))
                    z = fitted
                index, straight, loss = self.quantize(k, z, condition, level, weight)
                penalty = penalty + loss
            known.append(index)
            if fit or given:
                straight = self.codes(k, known)
            with torch.no_grad():
                seen = self.codebooks[k].activations(self.codebooks[k].split(straight), len(x), *straight.shape[2:])
            bits.append(
                self.code_lengths(k, index[:n], seen[:n], None if condition is None else condition[:n], level[:n])
            )
            context = self.decode_grid(k, self._kept(k, straight, dropped), context, level)
        assert context is not None
        return Output(context, torch.stack(bits), penalty, distance, known)

    @staticmethod
    def _kept(k: int, codes: Tensor, dropped: Tensor | None) -> Tensor:
        """Code vectors of grid k without those of samples whose finer grids are dropped."""
        return codes if not k or dropped is None else codes * ~dropped[:, None, None, None]

    def code_lengths(self, k: int, index: Tensor, seen: Tensor, condition: Tensor | None, level: Tensor) -> Tensor:
        """Bits of grid k, (B,), differentiable in the prior's parameters; arguments as of ``bits``."""
        flags, outcomes = self.bits(k, index, seen, condition, level)
        return (flags + outcomes).unflatten(1, (len(index), -1)).sum((0, 2))

    def bits(
        self, k: int, index: Tensor, seen: Tensor, condition: Tensor | None, level: Tensor, exact: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Bits of grid k's flags and of its outcomes, escapes included, (M, B h w) each.

        index: (B, M, h, w); seen: its vectors as ``Codebook.activations`` gives them. exact: by the integer tables of a
        file, float64; otherwise by the logits that training learns from.
        """
        book, prior = self.codebooks[k], self.priors[k]
        flags, units = prior(seen, level, condition)
        outcome = book.outcome(index.transpose(0, 1).flatten(1))
        rows = rows_of(outcome > 0)
        logits, chosen = prior.logits(units, rows), take(outcome.flatten(), rows.place) - 1
        if exact:
            null, active = table_bits(torch.stack([torch.zeros_like(flags), flags], -1)).unbind(-1)
            lengths = table_bits(logits).gather(-1, chosen[:, None])[:, 0]
        else:
            null, active = flag_bits(flags)
            lengths = code_length(logits, chosen)
        outcomes = put(lengths, rows, book.groups, outcome.shape[1])
        if book.escape:
            outcomes = outcomes + (outcome > book.codes) * (book.dim * ESCAPE_BITS)
        return torch.where(outcome == 0, null, active), outcomes

    def quantize(
        self, k: int, z: Tensor, condition: Tensor | None, level: Tensor, rate_weight: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Indices (B, M, h, w), code vectors with straight-through gradient (B, M * d, h, w), penalty (B,).

        rate_weight: as in ``guess``.
        """
        book = self.codebooks[k]
        b, _, h, w = z.shape
        v = book.split(z)
        values, cell_level, weight = v.detach(), level.repeat_interleave(h * w), _by_cell(rate_weight, z)
        if book.training and not book.initialised:
            book.initialise(values)
        choice = self._choose(k, values, self.rates(k, z, condition, level, rate_weight), weight)
        # The second term is zero but for its gradient.
        loss = COMMITMENT * (v - choice.vectors).pow(2) + weight[:, None] * (v - values) * choice.rate_gradient
        if book.learning == "loss":
            loss = loss + (values - book.lookup(choice.indices)).pow(2)
        penalty = loss.unflatten(1, (b, h * w)).sum((0, 2, 3))
        if book.training:
            book.update(values, choice, cell_level)
        return _grid(choice.indices, z), book.join(v + (choice.vectors - v).detach(), b, h, w), penalty

    @torch.no_grad()
    def rates(self, k: int, z: Tensor, condition: Tensor | None, level: Tensor, rate_weight: float | Tensor) -> Rates:
        """What indices cost, by one pass of the prior over those that are guessed for latents z."""
        flags, units = self.priors[k](self.seen(k, self.guess(k, z, level, rate_weight)), level, condition)
        return Rates(*flag_bits(flags), units)

    def rate_gradient(
        self, k: int, index: Tensor, condition: Tensor | None, level: Tensor, rate_weight: float | Tensor
    ) -> Tensor:
        """Of the bits of all indices (B, M, h, w), those of a cell times its weight, with respect to the code vectors
        that the prior sees of them: (B, M * d, h, w). Of an index's own bits it has nothing."""
        with torch.enable_grad():
            seen = self.seen(k, index).requires_grad_()
            flags, outcomes = self.bits(k, index, seen, condition, level)
            bits = ((flags + outcomes).sum(0) * _by_cell(rate_weight, index)).sum()
            (gradient,) = torch.autograd.grad(bits, seen)
        return gradient.permute(0, 3, 1, 2) * 2.0**-CODE_SCALE_BITS

    def choose(self, k: int, z: Tensor, rates: Rates, rate_weight: float | Tensor) -> Tensor:
        """Indices (B, M, h, w) of latents z by distance and rates."""
        values = self.codebooks[k].split(z.detach())
        return _grid(self._choose(k, values, rates, _by_cell(rate_weight, z)).indices, z)

    @torch.no_grad()
    def _choose(self, k: int, values: Tensor, rates: Rates, weight: Tensor) -> Choice:
        book = self.codebooks[k]

        def logits(rows: Rows) -> tuple[Tensor, Tensor]:
            return self.priors[k].logits(rates.units, rows), torch.arange(len(rows.place), device=values.device)

        return book.choose(values, rates.null, rates.active, logits, weight, book.training)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution of x (B, C, h, w), as a product: in float32 torch's convolutions take longer. weight: (D, ...),
    C numbers for each output."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def _grid(index: Tensor, z: Tensor) -> Tensor:
    """Indices (M, B h w) as those of a grid, (B, M, h, w), of latents z (B, M * d, h, w)."""
    b, _, h, w = z.shape
    return index.unflatten(1, (b, h * w)).transpose(0, 1).unflatten(2, (h, w))


def _by_cell(weight: float | Tensor, z: Tensor) -> Tensor:
    """Rate weights as the codebooks take them, (B h w,), of latents z (B, M * d, h, w)."""
    if isinstance(weight, Tensor):
        return weight.flatten()
    return z.new_full((len(z) * z.shape[2] * z.shape[3],), weight, dtype=torch.float32)
