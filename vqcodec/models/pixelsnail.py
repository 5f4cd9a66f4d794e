"""PixelSNAIL on a grid of vector-quantized cells, in exact arithmetic.

Source: Chen et al., "PixelSNAIL: An Improved Autoregressive Generative Model" (2018), as used for the priors of
VQ-VAE-2 (Razavi et al., 2019): gated residual causal convolutions, causal self-attention for the coarsest grid, a
conditioning stack over the decoded coarser grid for the others. Ours differs in three ways: a cell holds M indices,
coded one after the other; the causal neighbourhood is (0,-1), (-1,-1), (-1,0), (-1,+1), so that the cells of a wave
(wavefront.py) are independent; and all arithmetic is dyadic (dyadic.py).

``PixelSNAIL.forward`` computes a whole grid in parallel (training); ``Walk`` computes it wave by wave (coding). Both
apply the same functions to the same numbers: in eval mode they agree bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqcodec.models import Modules, dyadic
from vqcodec.models.dyadic import DyadicLinear

if TYPE_CHECKING:
    from vqcodec.models.wavefront import Wave

# Attention sees this many rows above the cell (its own row included) and this many earlier steps.
ATTENTION_ROWS, ATTENTION_STEPS = 9, 16
HISTORY = 3  # steps back that a causal neighbourhood reaches


@dataclass(frozen=True)
class PriorConfig:
    """channels: width of the residual stream; blocks: gated residual blocks; hidden: width of a group's head;
    heads: attention heads, 0 for none; head_channels: channels of a query, key or value."""

    channels: int
    blocks: int
    hidden: int
    heads: int = 0
    head_channels: int = 16


Update = Callable[[Tensor, Tensor], Tensor]


def shifted(x: Tensor, offsets: list[tuple[int, int]]) -> Tensor:
    """Neighbours side by side: (B, h, w, C) -> (B, h, w, len(offsets) * C), zeros outside the grid."""
    h, w = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    return torch.cat([padded[:, 1 + i : 1 + i + h, 1 + j : 1 + j + w] for i, j in offsets], -1)


CAUSAL = [(0, -1), (-1, 1), (-1, 0), (-1, -1)]  # 1, 1, 2 and 3 steps back
AROUND = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]


class GatedBlock(nn.Module):
    """Gated residual block: stream + value * gate, two layers, the first over ``taps`` cells."""

    def __init__(self, channels: int, taps: int, levels: int) -> None:
        super().__init__()
        self.spatial = DyadicLinear(taps * channels, channels, levels, gain=1.4)
        self.gate = DyadicLinear(channels, 2 * channels, levels, gain=0.5)

    def at(self, level: Tensor) -> Update:
        spatial, gate = self.spatial.at(level), self.gate.at(level)

        def update(stream: Tensor, taps: Tensor) -> Tensor:
            return dyadic.stream(stream + dyadic.gated(gate(dyadic.relu(spatial(taps)))))

        return update


class CausalAttention(nn.Module):
    """Attention of a cell to cells of earlier waves, with a learned bias per relative position.

    The window is a rectangle in (row, step): at most ``ATTENTION_ROWS`` rows up, ``ATTENTION_STEPS`` steps back. Time
    and memory are linear in the number of cells.
    """

    def __init__(self, channels: int, codes: int, config: PriorConfig, levels: int) -> None:
        super().__init__()
        self.heads, self.head_channels = config.heads, config.head_channels
        width = self.heads * self.head_channels
        self.query = DyadicLinear(channels, width, levels)
        self.key_value = DyadicLinear(channels + codes, 2 * width, levels)
        self.gate = DyadicLinear(width, 2 * channels, levels, gain=0.5)
        self.position = nn.Parameter(torch.zeros(self.heads, ATTENTION_ROWS, ATTENTION_STEPS))

    def split(self, x: Tensor) -> Tensor:
        """(..., heads * c) -> (..., heads, c) activations."""
        return dyadic.activation(x).unflatten(-1, (-1, self.head_channels))

    def scores(self, query: Tensor, key: Tensor, position: Tensor) -> Tensor:
        return dyadic.logit(dyadic.wide(query @ key.transpose(-1, -2)) * 0.5 + dyadic.logit(position))

    def forward(self, x: Tensor, codes: Tensor, level: Tensor) -> Tensor:
        """x: (B, h, w, C) activations; codes: (B, h, w, D) activations. Returns (B, h, w, 2C) sums for the gate."""
        h, w = x.shape[1:3]
        query = self.split(self.query.at(level)(x)).flatten(1, 2).transpose(1, 2)
        key_value = self.key_value.at(level)(torch.cat([x, codes], -1))
        key, value = self.split(key_value).flatten(1, 2).transpose(1, 2).chunk(2, 1)
        i, j = torch.arange(h * w, device=x.device) // w, torch.arange(h * w, device=x.device) % w
        row, age = i[:, None] - i, (j + 2 * i)[:, None] - (j + 2 * i)
        seen = (row >= 0) & (row < ATTENTION_ROWS) & (age >= 1) & (age <= ATTENTION_STEPS)
        position = self.position[:, row.clamp(0, ATTENTION_ROWS - 1), (age - 1).clamp(0, ATTENTION_STEPS - 1)]
        scores = self.scores(query, key, position).masked_fill(~seen, -torch.inf)
        if self.training:
            out = dyadic.attend_smoothly(scores, value)
        else:
            in_steps = value.double() * 2.0**dyadic.ACTIVATION_BITS
            out = dyadic.attend(scores * 2.0**dyadic.LOGIT_BITS, in_steps).to(x.dtype) * 2.0**-dyadic.ACTIVATION_BITS
        return self.gate.at(level)(out.transpose(1, 2).flatten(2).unflatten(1, (h, w)))


class PixelSNAIL(nn.Module):
    """Prior of one grid.

    groups, dim, codes: the grid's M, d and K. condition_dim: channels of the coarser grid's code activations, 0 for
    the coarsest grid. levels: quality levels, each with its own biases but for the last
    layers.
    """

    def __init__(
        self, config: PriorConfig, groups: int, dim: int, codes: int, condition_dim: int, levels: int
    ) -> None:
        super().__init__()
        self.config, self.groups, self.dim, self.codes = config, groups, dim, codes
        c, width = config.channels, groups * dim
        self.embed = DyadicLinear(len(CAUSAL) * width, c, levels, gain=2.0)
        self.blocks: Modules[GatedBlock] = Modules(
            GatedBlock(c, 1 + len(CAUSAL), levels) for _ in range(config.blocks)
        )
        self.attention = CausalAttention(c, width, config, levels) if config.heads else None
        self.attention_after = (config.blocks + 1) // 2
        self.condition = ConditioningStack(condition_dim, c, levels) if condition_dim else None
        self.hidden: Modules[DyadicLinear] = Modules(
            DyadicLinear(c + g * dim, config.hidden, levels, gain=2.0) for g in range(groups)
        )
        self.out: Modules[DyadicLinear] = Modules(
            DyadicLinear(config.hidden, codes, 1) for _ in range(groups)
        )

    def forward(self, codes: Tensor, level: Tensor, condition: Tensor | None = None) -> list[Tensor]:
        """Logits of every cell given the cells before it.

        codes: (B, h, w, M * d) code activations; level: (B,) int64; condition: (B, h, w, C) stream values.
        Returns M tensors (B, h, w, K): log2 probabilities up to a constant, exact sums before ``dyadic.logit``.
        """
        stream = dyadic.stream(self.embed.at(level)(shifted(codes, CAUSAL)))
        if condition is not None:
            stream = dyadic.stream(stream + condition)
        for k, block in enumerate(self.blocks):
            if self.attention is not None and k == self.attention_after:
                x = dyadic.activation(stream)
                stream = dyadic.stream(stream + dyadic.gated(self.attention(x, codes, level)))
            x = dyadic.activation(stream)
            stream = block.at(level)(stream, torch.cat([x, shifted(x, CAUSAL)], -1))
        known = torch.cat([dyadic.activation(stream), codes], -1)
        return [self.head(g, level)(known) for g in range(self.groups)]

    def head(self, group: int, level: Tensor) -> dyadic.Affine:
        """The logits of a group from the features and the codes of the groups before it, (..., C + M * d)."""
        hidden, out = self.hidden[group].at(level), self.out[group].at(level)
        width = self.config.channels + group * self.dim
        return lambda known: out(dyadic.relu(hidden(known[..., :width])))


class ConditioningStack(nn.Module):
    """From the coarser grid's codes to stream values at twice the resolution; not causal."""

    def __init__(self, condition_dim: int, channels: int, levels: int, *, width: int = 96, blocks: int = 2) -> None:
        super().__init__()
        self.embed = DyadicLinear(len(AROUND) * condition_dim, width, levels, gain=2.0)
        self.blocks: Modules[GatedBlock] = Modules(
            GatedBlock(width, len(AROUND), levels) for _ in range(blocks)
        )
        self.up = DyadicLinear(width, 4 * channels, levels)

    def forward(self, codes: Tensor, level: Tensor) -> Tensor:
        """codes: (B, h, w, condition_dim) activations -> (B, 2h, 2w, C) stream values."""
        stream = dyadic.stream(self.embed.at(level)(shifted(codes, AROUND)))
        for block in self.blocks:
            stream = block.at(level)(stream, shifted(dyadic.activation(stream), AROUND))
        x = dyadic.stream(self.up.at(level)(dyadic.activation(stream)))
        b, h, w = x.shape[:3]
        return x.reshape(b, h, w, 2, 2, -1).transpose(2, 3).reshape(b, 2 * h, 2 * w, -1)


class LevelPrior:
    """A prior made ready to code at one quality level: weights in whole steps, which saves the scaling of every layer,
    and tables of what each code adds."""

    def __init__(self, prior: PixelSNAIL, vectors: Tensor, level: int) -> None:
        """vectors: (M, K, d) code activations; level: from 0."""
        config, d = prior.config, prior.dim
        self.config, self.groups, self.attention_after = config, prior.groups, prior.attention_after
        self.vectors = vectors * 2.0**dyadic.ACTIVATION_BITS
        self.embed = prior.embed.in_steps(level, dyadic.STREAM_BITS)
        self.blocks = [_Block(block, level) for block in prior.blocks]
        self.attention = _Attention(prior.attention, level) if prior.attention else None
        # The heads' hidden layers in two parts: the features' share of all groups at once, and what each code of a
        # group adds to the groups after it, from a table (K, later groups * hidden).
        hidden = [layer.in_steps(level, dyadic.ACTIVATION_BITS) for layer in prior.hidden]
        c = config.channels
        shared = torch.cat([w[:, :c] for w, _ in hidden])
        self.features = shared.t().contiguous().t(), torch.cat([bias for _, bias in hidden])
        self.added = [
            torch.cat([codes @ w[:, c + g * d : c + (g + 1) * d].t() for w, _ in hidden[g + 1 :]], -1)
            for g, codes in enumerate(self.vectors[:-1])
        ]
        self.out = [layer.in_steps(level, dyadic.LOGIT_BITS) for layer in prior.out]


class Walk:
    """A prior at work on one batch of grids: the state between waves, of size O(rows), however wide the grid.

    All numbers here are whole steps of their grids.
    """

    def __init__(self, prior: LevelPrior, shape: tuple[int, int, int]) -> None:
        """shape: (B, h, w)."""
        config, (b, h, _), vectors = prior.config, shape, prior.vectors
        self.prior, self.hidden = prior, config.hidden
        self.groups = torch.arange(prior.groups, device=vectors.device)[:, None, None]
        # One ring of steps per layer that looks at neighbours; row -1 of the grid is row 0 here and stays zero.
        depth = [vectors.shape[0] * vectors.shape[2]] + [config.channels] * config.blocks
        self.rings = [vectors.new_zeros(HISTORY + 1, b, h + 1, channels) for channels in depth]
        self.attention = AttentionWalk(prior.attention, vectors, shape) if prior.attention else None
        self.sums = torch.empty(0)
        self.chosen: list[Tensor] = []

    def _taps(self, layer: int, wave: "Wave") -> list[Tensor]:
        """Neighbours, four of (B, n, C), in the order of CAUSAL: plain slices of the ring."""
        ring, t, rows = self.rings[layer], wave.step, wave.rows
        below, above = slice(rows.start + 1, rows.stop + 1), slice(rows.start, rows.stop)
        back = [ring[(t - k) % (HISTORY + 1)] for k in (1, 2, 3)]
        return [back[0][:, below], back[0][:, above], back[1][:, above], back[2][:, above]]

    def _keep(self, layer: int, wave: "Wave", x: Tensor | None) -> None:
        slot = self.rings[layer][wave.step % (HISTORY + 1)]
        # Rows that have just ended must read as outside the grid; older ones are not read, later ones are still zero.
        slot[:, max(0, wave.rows.start - HISTORY) + 1 : wave.rows.start + 1] = 0
        if x is not None:
            slot[:, wave.rows.start + 1 : wave.rows.stop + 1] = x

    def skip(self, wave: "Wave") -> None:
        """Pass over a step without cells."""
        for layer in range(len(self.rings)):
            self._keep(layer, wave, None)
        if self.attention is not None:
            self.attention.end(wave, None)

    def begin(self, wave: "Wave", condition: Tensor | None) -> None:
        """Features of the wave's n cells; condition: (B, n, C) stream values."""
        stream = _clip_stream(F.linear(torch.cat(self._taps(0, wave), -1), *self.prior.embed).floor_())
        if condition is not None:
            stream = _clip_stream(stream.add_(condition, alpha=2**dyadic.STREAM_BITS))
        for k, block in enumerate(self.prior.blocks):
            if self.attention is not None and k == self.prior.attention_after:
                stream = self.attention.begin(stream, wave)
            x = _read(stream)
            self._keep(1 + k, wave, x)
            stream = block.update(stream, torch.cat([x, *self._taps(1 + k, wave)], -1))
        self.sums = F.linear(_read(stream), *self.prior.features)
        self.chosen = []

    def logits(self, group: int) -> Tensor:
        """(B, n, K) in whole steps, given the indices of this wave's earlier groups."""
        hidden = self.sums[..., group * self.hidden : (group + 1) * self.hidden]
        x = F.linear(hidden.floor().clamp_(0, dyadic.ACTIVATION_MAX), *self.prior.out[group])
        return x.floor_().clamp_(-dyadic.LOGIT_MAX, dyadic.LOGIT_MAX)

    def put(self, group: int, index: Tensor) -> None:
        """Note the indices (B, n) of a group; groups come in order."""
        self.chosen.append(index)
        if group < len(self.prior.added):
            added = self.prior.added[group].index_select(0, index.flatten())
            self.sums[..., (group + 1) * self.hidden :] += added.view(*index.shape, -1)

    def end(self, wave: "Wave") -> Tensor:
        """All groups are put: the wave becomes history. Returns its indices (B, M, n)."""
        chosen = torch.stack(self.chosen)
        codes = self.prior.vectors[self.groups, chosen].permute(1, 2, 0, 3).flatten(2)
        self._keep(0, wave, codes)
        if self.attention is not None:
            self.attention.end(wave, codes)
        return chosen.transpose(0, 1)


def _clip_stream(x: Tensor) -> Tensor:
    return x.clamp_(-dyadic.STREAM_MAX, dyadic.STREAM_MAX)


def _clip(x: Tensor) -> Tensor:
    return x.clamp_(-dyadic.ACTIVATION_MAX, dyadic.ACTIVATION_MAX)


def _read(stream: Tensor) -> Tensor:
    """Stream steps -> activation steps."""
    return _clip((stream * 2.0 ** (dyadic.ACTIVATION_BITS - dyadic.STREAM_BITS)).add_(0.5).floor_())


class _Gate:
    """``dyadic.gated`` of a layer, added to the stream, in steps."""

    def __init__(self, layer: DyadicLinear, level: int) -> None:
        channels = layer.weight.shape[0] // 2
        # The gate's b/4 + 1/2 in steps of 2**-6: sums in steps of 2**-4, plus 32 steps.
        bits = torch.tensor([dyadic.ACTIVATION_BITS] * channels + [4] * channels)
        self.weight, bias = layer.in_steps(level, bits)
        self.bias = bias + torch.tensor([0.0] * channels + [32.0] * channels).to(bias)

    def add_to(self, stream: Tensor, x: Tensor) -> Tensor:
        value, gate = F.linear(x, self.weight, self.bias).floor_().chunk(2, -1)
        # Products are in steps of 2**-11, a quarter of the stream's.
        return _clip_stream(torch.addcmul(stream, _clip(value), gate.clamp_(0, 64), value=0.25).add_(0.5).floor_())


class _Block:
    """A GatedBlock in steps."""

    def __init__(self, block: GatedBlock, level: int) -> None:
        self.spatial = block.spatial.in_steps(level, dyadic.ACTIVATION_BITS)
        self.gate = _Gate(block.gate, level)

    def update(self, stream: Tensor, taps: Tensor) -> Tensor:
        hidden = F.linear(taps, *self.spatial).floor_().clamp_(0, dyadic.ACTIVATION_MAX)
        return self.gate.add_to(stream, hidden)


class _Attention:
    """A CausalAttention in steps."""

    def __init__(self, layer: CausalAttention, level: int) -> None:
        self.heads, self.head_channels = layer.heads, layer.head_channels
        self.query, self.key_value = (m.in_steps(level, dyadic.ACTIVATION_BITS) for m in (layer.query, layer.key_value))
        self.gate = _Gate(layer.gate, level)
        # Slot s of step t holds what is age = (t - 1 - s) mod S + 1 steps back; rows go up from the cell's own.
        slots, steps = torch.arange(ATTENTION_STEPS, device=layer.position.device), ATTENTION_STEPS
        ages = (slots[:, None] - 1 - slots) % steps
        position = dyadic.logit(layer.position).flip(1)[..., ages] * 2.0**dyadic.LOGIT_BITS  # (heads, rows, t, slots)
        self.position = position.permute(2, 0, 1, 3).flatten(2).unsqueeze(2) + 0.5  # (t, heads, 1, rows * slots)


class AttentionWalk:
    """Causal attention wave by wave: rings of keys and values over the last ATTENTION_STEPS steps.

    A row of the rings holds its steps side by side, so the window of a cell, the ATTENTION_ROWS rows that end at its
    own, is one piece of memory: all windows of a wave are one overlapping view, and nothing is copied.
    """

    def __init__(self, layer: _Attention, like: Tensor, shape: tuple[int, int, int]) -> None:
        b, h, _ = shape
        self.layer, size = layer, (h + ATTENTION_ROWS - 1, ATTENTION_STEPS)
        self.keys = like.new_zeros(b, layer.heads, *size, layer.head_channels)
        self.values = torch.zeros_like(self.keys, dtype=torch.float64)  # what the exact sums need
        # Minus infinity where a slot holds no cell of the grid and window.
        self.absent = like.new_full(size, -torch.inf)
        self.x = torch.empty(0)

    def _windows(self, ring: Tensor, wave: "Wave") -> Tensor:
        """(rows, S, ...) -> (n, ATTENTION_ROWS * S, ...), the windows of the wave's rows."""
        view = ring.flatten(0, 1)[wave.rows.start * ATTENTION_STEPS :]
        size, stride = (wave.rows.stop - wave.rows.start, ATTENTION_ROWS * ATTENTION_STEPS), view.stride(0)
        return view.as_strided((*size, *view.shape[1:]), (ATTENTION_STEPS * stride, *view.stride()))

    def begin(self, stream: Tensor, wave: "Wave") -> Tensor:
        """stream (B, n, C) -> stream (B, n, C), in steps."""
        self.x = _read(stream)
        query = _clip(F.linear(self.x, *self.layer.query).floor_()).unflatten(-1, (self.layer.heads, 1, -1))
        position, absent = self.layer.position[wave.step % ATTENTION_STEPS], self._windows(self.absent, wave)
        out = torch.empty_like(query)
        for b in range(len(stream)):
            for head in range(self.layer.heads):
                # Products are in steps of 2**-10; half of them, as logits, in steps of 2**-5.
                scores = torch.bmm(query[b, :, head], self._windows(self.keys[b, head], wave).transpose(1, 2))
                scores = scores[:, 0].mul_(2.0**-6).add_(position[head]).floor_()
                scores = scores.clamp_(-dyadic.LOGIT_MAX, dyadic.LOGIT_MAX).add_(absent)
                out[b, :, head] = dyadic.attend(scores[:, None], self._windows(self.values[b, head], wave))
        return self.layer.gate.add_to(stream, out.flatten(2))

    def end(self, wave: "Wave", codes: Tensor | None) -> None:
        """Keys and values of the finished wave, codes (B, n, M * d) in steps; None for a step without cells."""
        slot = wave.step % ATTENTION_STEPS
        ended = wave.rows.start + ATTENTION_ROWS - 1  # rows from here up held cells when the slot was last used
        self.absent[max(0, ended - ATTENTION_STEPS) : ended, slot] = -torch.inf
        if codes is not None:
            rows = slice(wave.rows.start + ATTENTION_ROWS - 1, wave.rows.stop + ATTENTION_ROWS - 1)
            known = _clip(F.linear(torch.cat([self.x, codes], -1), *self.layer.key_value).floor_())
            both = known.unflatten(-1, (2, self.layer.heads, -1)).permute(2, 0, 3, 1, 4)  # (2, B, heads, n, c)
            self.absent[rows, slot] = 0
            self.keys[:, :, rows, slot], self.values[:, :, rows, slot] = both[0], both[1].double()
