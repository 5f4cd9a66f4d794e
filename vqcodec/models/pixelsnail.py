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
        out = (dyadic.attend_smoothly if self.training else dyadic.attend)(scores, value)
        return self.gate.at(level)(out.transpose(1, 2).flatten(2).unflatten(1, (h, w)))


class PixelSNAIL(nn.Module):
    """Prior of one grid.

    groups, dim, codes: the grid's M, d and K. condition_dim: channels of the coarser grid's code activations, 0 for
    the coarsest grid. levels: quality levels, each with its own biases.
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


class Walk:
    """A prior at work on one batch of grids: the state between waves, of size O(rows), however wide the grid."""

    def __init__(self, prior: PixelSNAIL, vectors: Tensor, shape: tuple[int, int, int], level: int) -> None:
        """vectors: (M, K, d) code activations; shape: (B, h, w)."""
        config, (b, h, w) = prior.config, shape
        self.vectors, self.dim, self.height, self.width = vectors, prior.dim, h, w
        self.channels = config.channels
        at = torch.tensor(level, device=vectors.device)
        self.embed = prior.embed.at(at)
        self.updates = [block.at(at) for block in prior.blocks]
        self.heads = [prior.head(g, at) for g in range(prior.groups)]
        # One ring of steps per layer that looks at neighbours; row -1 of the grid is row 0 here and stays zero.
        depth = [prior.groups * prior.dim] + [config.channels] * config.blocks
        self.rings = [vectors.new_zeros(HISTORY + 1, b, h + 1, c) for c in depth]
        self.attention = AttentionWalk(prior.attention, vectors, shape, at) if prior.attention else None
        self.attention_after = prior.attention_after
        self.known = torch.empty(0)

    def _taps(self, layer: int, wave: "Wave") -> Tensor:
        """Neighbours (B, n, 4C) in the order of CAUSAL: plain slices of the ring."""
        ring, t, rows = self.rings[layer], wave.step, wave.rows
        below, above = slice(rows.start + 1, rows.stop + 1), slice(rows.start, rows.stop)
        back = [ring[(t - k) % (HISTORY + 1)] for k in (1, 2, 3)]
        return torch.cat([back[0][:, below], back[0][:, above], back[1][:, above], back[2][:, above]], -1)

    def _keep(self, layer: int, wave: "Wave", x: Tensor | None) -> None:
        slot = self.rings[layer][wave.step % (HISTORY + 1)]
        slot.zero_()  # rows that have ended must read as outside the grid
        if x is not None:
            slot[:, wave.rows.start + 1 : wave.rows.stop + 1] = x

    def skip(self, wave: "Wave") -> None:
        """Pass over a step without cells."""
        for layer in range(len(self.rings)):
            self._keep(layer, wave, None)
        if self.attention is not None:
            self.attention.keep(wave, None)

    def begin(self, wave: "Wave", condition: Tensor | None) -> None:
        """Features of the wave's n cells; condition: (B, n, C) stream values."""
        stream = dyadic.stream(self.embed(self._taps(0, wave)))
        if condition is not None:
            stream = dyadic.stream(stream + condition)
        for k, update in enumerate(self.updates):
            if self.attention is not None and k == self.attention_after:
                stream = self.attention.begin(stream, wave)
            x = dyadic.activation(stream)
            self._keep(1 + k, wave, x)
            stream = update(stream, torch.cat([x, self._taps(1 + k, wave)], -1))
        codes = stream.new_zeros(stream.shape[:-1] + (self.rings[0].shape[-1],))
        self.known = torch.cat([dyadic.activation(stream), codes], -1)

    def logits(self, group: int) -> Tensor:
        """(B, n, K), given the indices of this wave's earlier groups."""
        return self.heads[group](self.known)

    def put(self, group: int, index: Tensor) -> None:
        """Note the indices (B, n) of a group."""
        start = self.channels + group * self.dim
        self.known[..., start : start + self.dim] = self.vectors[group][index]

    def end(self, wave: "Wave") -> None:
        codes = self.known[..., self.channels :]
        self._keep(0, wave, codes)
        if self.attention is not None:
            self.attention.keep(wave, codes)


class AttentionWalk:
    """Causal attention wave by wave: rings of keys and values over the last ATTENTION_STEPS steps."""

    def __init__(self, layer: CausalAttention, like: Tensor, shape: tuple[int, int, int], level: Tensor) -> None:
        b, h, self.width = shape
        self.layer = layer
        self.query, self.key_value, self.gate = (m.at(level) for m in (layer.query, layer.key_value, layer.gate))
        self.ring = like.new_zeros(ATTENTION_STEPS, b, h + ATTENTION_ROWS - 1, 2 * layer.heads, layer.head_channels)
        self.x = torch.empty(0)

    def begin(self, stream: Tensor, wave: "Wave") -> Tensor:
        """stream (B, n, C) -> stream (B, n, C)."""
        self.x = dyadic.activation(stream)
        t, first, last = wave.step, wave.rows.start, wave.rows.stop
        age = torch.arange(1, ATTENTION_STEPS + 1, device=stream.device)
        up = torch.arange(ATTENTION_ROWS, device=stream.device)
        # (steps, B, n, heads, c, rows), rows counted upwards -> (B, n, heads, rows * steps, c)
        window = self.ring[(t - age) % ATTENTION_STEPS, :, first : last + ATTENTION_ROWS - 1]
        window = window.unfold(2, ATTENTION_ROWS, 1).flip(-1).permute(1, 2, 3, 5, 0, 4).flatten(3, 4)
        key, value = window.chunk(2, 2)
        row = torch.arange(first, last, device=stream.device)[:, None, None] - up[:, None]
        column = t - age - 2 * row
        seen = ((row >= 0) & (column >= 0) & (column < self.width)).flatten(1)[None, :, None, None]
        query = self.layer.split(self.query(self.x))[..., None, :]
        scores = self.layer.scores(query, key, self.layer.position.flatten(1)[:, None])
        out = dyadic.attend(scores.masked_fill(~seen, -torch.inf), value).flatten(2)
        return dyadic.stream(stream + dyadic.gated(self.gate(out)))

    def keep(self, wave: "Wave", codes: Tensor | None) -> None:
        """Keys and values of the finished wave; nothing for a step without cells (never read: ``seen``)."""
        if codes is not None:
            key_value = self.layer.split(self.key_value(torch.cat([self.x, codes], -1)))
            start = wave.rows.start + ATTENTION_ROWS - 1
            self.ring[wave.step % ATTENTION_STEPS, :, start : start + codes.shape[1]] = key_value
