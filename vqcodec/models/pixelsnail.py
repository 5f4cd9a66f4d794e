"""PixelSNAIL on a grid of vector-quantized cells, in exact arithmetic.

Source: Chen et al., "PixelSNAIL: An Improved Autoregressive Generative Model" (2018), as used for the priors of
VQ-VAE-2 (Razavi et al., 2019): gated residual causal convolutions, causal self-attention for the coarsest grid, a
conditioning stack over the decoded coarser grid for the others. Ours differs in four ways: a cell holds M indices,
coded one after the other; each index is a flag, null or not, and an outcome where it is not null, because most are
null; the causal neighbourhood is (0,-1), (-1,-1), (-1,0), (-1,+1), so that the cells of a wave are independent; and all
arithmetic is dyadic (dyadic.py).

The flags come from one masked network over the features and the earlier codes of the cell (Germain et al., "MADE:
Masked Autoencoder for Distribution Estimation", 2015), the outcomes from a head per group that runs on the rows that
are asked for. This is the form for training, a whole grid at once; `bitstream` codes, wave by wave. In eval mode they
agree bit for bit.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitstream.exact import (
    ACTIVATION_BITS,
    AROUND,
    ATTENTION_ROWS,
    ATTENTION_WAVES,
    CAUSAL,
    CONDITION_BLOCKS,
    CONDITION_WIDTH,
    LOGIT_BITS,
)
from vqcodec import compiled
from vqcodec.config import PriorConfig
from vqcodec.models import Modules, dyadic
from vqcodec.models.dyadic import DyadicLinear, Offsets

# Largest share of all (group, cell) pairs whose outcomes are computed on a GPU, where shapes must not depend on data.
CAPACITY = 0.5


HERE = ((0, 0),)
TAPS = HERE + CAUSAL  # what a block sees


class GatedBlock(nn.Module):
    """Gated residual block: stream + value * gate, two layers, the first over ``taps`` cells."""

    def __init__(self, channels: int, taps: int, levels: int) -> None:
        super().__init__()
        self.spatial = DyadicLinear(taps * channels, channels, levels, gain=1.4)
        self.gate = DyadicLinear(channels, 2 * channels, levels, gain=0.5)

    def forward(self, stream: Tensor, taps: Tensor, level: Tensor, offsets: Offsets) -> tuple[Tensor, Tensor]:
        """The new stream values, and their activations at the offsets."""
        x = dyadic.relu_of(*self.spatial.sums(taps, level))
        return dyadic.add(stream, *self.gate.sums(x, level), offsets)


class CausalAttention(nn.Module):
    """Attention of a cell to cells of earlier waves, with a learned bias per relative position.

    The window is a rectangle in (row, step): at most ``ATTENTION_ROWS`` rows up, ``ATTENTION_WAVES`` steps back. Time
    and memory are linear in the number of cells.
    """

    def __init__(self, channels: int, codes: int, config: PriorConfig, levels: int) -> None:
        super().__init__()
        self.heads, self.head_channels = config.heads, config.head_channels
        width = self.heads * self.head_channels
        self.query = DyadicLinear(channels, width, levels)
        self.key_value = DyadicLinear(channels + codes, 2 * width, levels)
        self.gate = DyadicLinear(width, 2 * channels, levels, gain=0.5)
        self.position = nn.Parameter(torch.zeros(self.heads, ATTENTION_ROWS, ATTENTION_WAVES))

    def split(self, x: Tensor) -> Tensor:
        """(..., heads * c) -> (..., heads, c) activations."""
        return dyadic.activation(x).unflatten(-1, (-1, self.head_channels))

    def scores(self, query: Tensor, key: Tensor, position: Tensor) -> Tensor:
        """Logits (B, heads, Q, N) of attention. query: (B, heads, Q, c) activations; key: (B, heads, N, c); position:
        (heads, Q, N)."""
        return dyadic.logit(dyadic.wide(query @ key.transpose(-1, -2)) * 0.5 + dyadic.logit(position))

    def forward(self, x: Tensor, codes: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, h, w, C) activations; codes: (B, h, w, D) activations. Returns the gate's sums
        (B, h, w, 2C) and biases (B, 2C)."""
        h, w = x.shape[1:3]
        query = self.split(self.query.at(level)(x)).flatten(1, 2).transpose(1, 2)
        key_value = self.key_value.at(level)(torch.cat([x, codes], -1))
        key, value = self.split(key_value).flatten(1, 2).transpose(1, 2).chunk(2, 1)
        row = torch.arange(h * w, device=x.device) // w
        wave = torch.arange(h * w, device=x.device) % w + 2 * row
        found = []
        for top in range(0, h, ATTENTION_ROWS):
            first, bottom = max(0, top - ATTENTION_ROWS + 1), min(h, top + ATTENTION_ROWS)
            here, window = slice(top * w, bottom * w), slice(first * w, bottom * w)
            up, age = row[here, None] - row[window], wave[here, None] - wave[window]
            seen = (up >= 0) & (up < ATTENTION_ROWS) & (age >= 1) & (age <= ATTENTION_WAVES)
            position = self.position[:, up.clamp(0, ATTENTION_ROWS - 1), (age - 1).clamp(0, ATTENTION_WAVES - 1)]
            scores = self.scores(query[:, :, here], key[:, :, window], position).masked_fill(~seen, -torch.inf)
            found.append(self.attended(scores, value[:, :, window]))
        return self.gate.sums(torch.cat(found, 2).transpose(1, 2).flatten(2).unflatten(1, (h, w)), level)

    def attended(self, scores: Tensor, value: Tensor) -> Tensor:
        """(B, heads, Q, c) activations. scores: (B, heads, Q, N) logits; value: (B, heads, N, c) activations."""
        if self.training:
            return dyadic.attend_smoothly(scores, value)
        in_steps = value.double() * 2.0**ACTIVATION_BITS
        return dyadic.attend(scores * 2.0**LOGIT_BITS, in_steps).to(value.dtype) * 2.0**-ACTIVATION_BITS


class Units(NamedTuple):
    """Hidden units of all heads before their biases, (B, h, w, M * H), and the biases of the samples, (B, M * H)."""

    sums: Tensor
    biases: Tensor


class Rows(NamedTuple):
    """Chosen pairs of a group and a cell, group after group.

    place: (n,) their places in (M, cells), flattened; on a GPU padded with M * cells. ends: (M,) int32, where the rows
    of each group end; padding counts as of the last group.
    """

    place: Tensor
    ends: Tensor


def rows_of(mask: Tensor) -> Rows:
    """The pairs where the mask (M, cells) is set; on a GPU, which is not waited for, at most ``CAPACITY`` of all."""
    if mask.device.type != "cpu":
        return fixed_rows_of(mask, int(mask.numel() * CAPACITY))
    return Rows(mask.flatten().nonzero()[:, 0], mask.sum(1).cumsum(0).int())


def fixed_rows_of(mask: Tensor, size: int) -> Rows:
    """The first pairs where the mask is set, and padding: ``size`` rows, whatever the mask."""
    place = torch.nonzero_static(mask.flatten(), size=size, fill_value=mask.numel())[:, 0]
    ends = mask.sum(1).cumsum(0)[:-1].clamp(max=size)
    return Rows(place, F.pad(ends, (0, 1), value=size).int())


class _Grouped(torch.autograd.Function):
    """Rows of each group times its own matrix, on a CPU, where ``F.grouped_mm`` has no fast backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.biased = bias is not None
        out = x.new_empty(len(x), weight.shape[1])
        for g, rows in enumerate(_spans(ends)):
            if bias is None:
                torch.mm(x[rows], weight[g].t(), out=out[rows])
            else:
                torch.addmm(bias[g], x[rows], weight[g].t(), out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        to_x = torch.empty_like(x)
        to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = weight.new_empty(weight.shape[:2]) if ctx.biased else None
        for g, rows in enumerate(_spans(ends)):
            torch.mm(gradient[rows], weight[g], out=to_x[rows])
            if to_weight is not None:
                torch.mm(gradient[rows].t(), x[rows], out=to_weight[g])
            if to_bias is not None:
                to_bias[g] = gradient[rows].sum(0)
        return to_x, to_weight, to_bias, None


def _spans(ends: Tensor) -> list[slice]:
    stops: list[int] = ends.tolist()
    return [slice(a, b) for a, b in zip([0, *stops], stops, strict=False)]


def grouped(x: Tensor, weight: Tensor, rows: Rows, bias: Tensor | None = None, cells: int = 1) -> Tensor:
    """Each row of x (n, in) times the weight of its group, (M, out, in), plus its bias, (M, out): (n, out)."""
    if x.device.type == "cpu":
        # In float32, because narrow products prepare themselves anew for every number of rows.
        return _Grouped.apply(dyadic.wide(x), weight, bias, rows.ends)
    size = weight.shape[1]
    weight = F.pad(weight, (0, 0, 0, -size % 8)).bfloat16()  # whole 16 bytes
    out = F.grouped_mm(x.bfloat16(), weight.mT, offs=rows.ends)[:, :size]
    return out if bias is None else out + per_row(bias, rows, cells).to(out.dtype)


class PixelSNAIL(nn.Module):
    """Prior of one grid.

    groups, dim: the grid's M and d; outcomes: N of an index that is not null. condition_dim: channels of the coarser
    grid's code activations, 0 for the coarsest grid. levels: quality levels, each with biases of its own but for the
    logits of the outcomes.
    """

    def __init__(
        self, config: PriorConfig, groups: int, dim: int, outcomes: int, condition_dim: int, levels: int
    ) -> None:
        super().__init__()
        self.config, self.groups, self.outcomes = config, groups, outcomes
        c, width = config.channels, groups * dim
        self.embed = DyadicLinear(len(CAUSAL) * width, c, levels, gain=2.0)
        self.blocks: Modules[GatedBlock] = Modules(GatedBlock(c, 1 + len(CAUSAL), levels) for _ in range(config.blocks))
        self.attention = CausalAttention(c, width, config, levels) if config.heads else None
        self.attention_after = (config.blocks + 1) // 2
        self.condition = ConditioningStack(condition_dim, c, levels) if condition_dim else None
        # Features and codes of earlier groups: input c + g d + e belongs to group g, unit g F + f as well.
        group = torch.arange(groups)
        source = torch.cat([torch.full((c,), -1), group.repeat_interleave(dim)])
        units = group.repeat_interleave(config.flags)
        self.flag_hidden = DyadicLinear(
            c + width, groups * config.flags, levels, gain=2.0, mask=source < units[:, None]
        )
        self.flag_out = DyadicLinear(groups * config.flags, groups, levels, mask=units <= group[:, None])
        units = group.repeat_interleave(config.hidden)
        self.hidden = DyadicLinear(c + width, groups * config.hidden, levels, gain=2.0, mask=source < units[:, None])
        self.out = DyadicLinear(config.hidden, groups * outcomes, 1)

    def forward(self, codes: Tensor, level: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Units]:
        """Logits of every cell's flags given the cells before it, and what its heads start from.

        codes: (B, h, w, M * d) code activations; level: (B,) int64; condition: (B, h, w, C) stream values.
        Returns the logits (M, cells) of not null against null, cells = B h w, and what ``logits`` computes those of the
        outcomes from. All logits are log2 probabilities up to a constant per row, exact sums before ``dyadic.logit``.
        """
        x, bias = self.embed.sums(dyadic.shifted(codes, CAUSAL), level)
        stream, taps = dyadic.add(condition, x, bias, TAPS, gates=False)
        for k, block in enumerate(self.blocks):
            if self.attention is not None and k == self.attention_after:
                gate, bias = self.attention(taps[..., : self.config.channels], codes, level)
                stream, taps = dyadic.add(stream, gate, bias, TAPS)
            stream, taps = block(stream, taps, level, HERE if k == len(self.blocks) - 1 else TAPS)
        known = torch.cat([taps, codes], -1)
        flags = self.flag_out.at(level)(dyadic.relu_of(*self.flag_hidden.sums(known, level)))
        return flags.flatten(0, 2).t(), Units(*self.hidden.sums(known, level))

    def logits(self, units: Units, rows: Rows) -> Tensor:
        """Logits (n, N) of the outcomes of some rows; units: as ``forward`` returns them."""
        cells = units.sums[..., 0].numel()
        if dyadic.fused(units.sums):
            x = _Heads.apply(*units, rows.place, self.config.hidden)
        else:
            group, cell = (rows.place // cells).clamp(max=self.groups - 1), rows.place % cells
            sums = dyadic.biased(*units).view(-1, self.config.hidden)  # cell by cell, (cells * M, H)
            x = dyadic.relu(sums.index_select(0, cell * self.groups + group))
        weight, bias = self.out.on_grid()
        return grouped(x, weight.unflatten(0, (self.groups, -1)), rows, bias.view(self.groups, -1), cells)


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, bias: Tensor, place: Tensor, hidden: int) -> Tensor:
        out = sums.new_empty(len(place), hidden, dtype=torch.float32)
        compiled.heads(compiled.rows_of(sums), bias.detach().numpy(), place.numpy(), out.numpy())
        ctx.save_for_backward(out, place)
        ctx.shapes = sums.shape, bias.shape
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        out, place = ctx.saved_tensors
        to_sums, to_bias = out.new_zeros(ctx.shapes[0], dtype=torch.bfloat16), out.new_zeros(ctx.shapes[1])
        arrays = (x.contiguous().numpy() for x in (out, gradient, place))
        compiled.heads_backward(*arrays, compiled.rows_of(to_sums), to_bias.numpy())
        return to_sums, to_bias, None, None


def take(x: Tensor, place: Tensor) -> Tensor:
    """Rows of x (M * cells, ...) at places; padding reads the last row."""
    return x.index_select(0, place.clamp(max=len(x) - 1) if place.device.type != "cpu" else place)


def per_row(table: Tensor, rows: Rows, cells: int) -> Tensor:
    """The entry of a table (M, ...) that belongs to the group of each row: (n, ...)."""
    return table.index_select(0, (rows.place // cells).clamp(max=len(table) - 1))


class ConditioningStack(nn.Module):
    """From the coarser grid's codes to stream values at twice the resolution; not causal."""

    def __init__(self, condition_dim: int, channels: int, levels: int) -> None:
        super().__init__()
        width, blocks = CONDITION_WIDTH, CONDITION_BLOCKS
        self.embed = DyadicLinear(len(AROUND) * condition_dim, width, levels, gain=2.0)
        self.blocks: Modules[GatedBlock] = Modules(GatedBlock(width, len(AROUND), levels) for _ in range(blocks))
        self.up = DyadicLinear(width, 4 * channels, levels)

    def forward(self, codes: Tensor, level: Tensor) -> Tensor:
        """codes: (B, h, w, condition_dim) activations -> (B, 2h, 2w, C) stream values."""
        x, bias = self.embed.sums(dyadic.shifted(codes, AROUND), level)
        stream, taps = dyadic.add(None, x, bias, AROUND, gates=False)
        for k, block in enumerate(self.blocks):
            stream, taps = block(stream, taps, level, HERE if k == len(self.blocks) - 1 else AROUND)
        x = dyadic.stream(self.up.at(level)(taps))
        b, h, w = x.shape[:3]
        return x.reshape(b, h, w, 2, 2, -1).transpose(2, 3).reshape(b, 2 * h, 2 * w, -1)
