"""PixelSNAIL on a grid of vector-quantized cells, in exact arithmetic.

Source: Chen et al., "PixelSNAIL: An Improved Autoregressive Generative Model" (2018), as used for the priors of
VQ-VAE-2 (Razavi et al., 2019): gated residual causal convolutions, causal self-attention for the coarsest grid, a
conditioning stack over the decoded coarser grid for the others. Ours differs in three ways: a cell holds M indices,
coded one after the other; the causal neighbourhood is (0,-1), (-1,-1), (-1,0), (-1,+1), so that the cells of a wave
(wavefront.py) are independent; and all arithmetic is dyadic (dyadic.py).

``PixelSNAIL.forward`` computes a whole grid in parallel (training); ``wavefront.Walk`` computes it wave by wave
(coding). In eval mode they agree bit for bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqcodec.models import Modules, dyadic
from vqcodec.models.dyadic import DyadicLinear

# Attention sees this many rows above the cell (its own row included) and this many earlier steps.
ATTENTION_ROWS, ATTENTION_STEPS = 9, 16
TOGETHER = 8  # groups whose logits are computed at once: enough for efficient products, little enough for a cache


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

    def __init__(self, config: PriorConfig, groups: int, dim: int, codes: int, condition_dim: int, levels: int) -> None:
        super().__init__()
        self.config, self.groups, self.dim, self.codes = config, groups, dim, codes
        c, width = config.channels, groups * dim
        self.embed = DyadicLinear(len(CAUSAL) * width, c, levels, gain=2.0)
        self.blocks: Modules[GatedBlock] = Modules(GatedBlock(c, 1 + len(CAUSAL), levels) for _ in range(config.blocks))
        self.attention = CausalAttention(c, width, config, levels) if config.heads else None
        self.attention_after = (config.blocks + 1) // 2
        self.condition = ConditioningStack(condition_dim, c, levels) if condition_dim else None
        self.hidden: Modules[DyadicLinear] = Modules(
            DyadicLinear(c + g * dim, config.hidden, levels, gain=2.0) for g in range(groups)
        )
        self.out: Modules[DyadicLinear] = Modules(DyadicLinear(config.hidden, codes, 1) for _ in range(groups))

    def forward(self, codes: Tensor, level: Tensor, condition: Tensor | None = None) -> Iterator[Tensor]:
        """Logits of every cell given the cells before it.

        codes: (B, h, w, M * d) code activations; level: (B,) int64; condition: (B, h, w, C) stream values.
        Yields M tensors (B, h, w, K): log2 probabilities up to a constant, exact sums before ``dyadic.logit``. They are
        made when they are asked for: together they are by far the largest thing in a model.
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
        for first in range(0, self.groups, TOGETHER):
            yield from self.heads(slice(first, first + TOGETHER), known, level)

    def heads(self, groups: slice, known: Tensor, level: Tensor) -> Tensor:
        """The logits (n, B, h, w, K) of some groups from the features and all code activations, (B, h, w, C + M * d).

        A head sees the codes of the groups before its own: in the common product the weights of the others are zeros.
        """
        layers, width = list(self.hidden)[groups], known.shape[-1]
        weights = torch.cat([F.pad(layer.weight, (0, width - layer.weight.shape[1])) for layer in layers])
        weight, biases = dyadic.on_grid(weights, torch.cat([layer.bias for layer in layers], 1))
        sums = F.linear(known, weight)
        hidden = dyadic.relu(sums + biases[level][:, None, None].to(sums.dtype))
        layers = list(self.out)[groups]
        weight, bias = dyadic.on_grid(
            torch.stack([layer.weight for layer in layers]), torch.stack([layer.bias[0] for layer in layers])
        )
        rows = hidden.flatten(0, 2).unflatten(1, (len(layers), -1)).transpose(0, 1)
        return torch.baddbmm(bias[:, None], rows, weight.mT).unflatten(1, known.shape[:3])


class ConditioningStack(nn.Module):
    """From the coarser grid's codes to stream values at twice the resolution; not causal."""

    def __init__(self, condition_dim: int, channels: int, levels: int, *, width: int = 96, blocks: int = 2) -> None:
        super().__init__()
        self.reach = 1 + blocks  # coarser cells: how far it looks
        self.embed = DyadicLinear(len(AROUND) * condition_dim, width, levels, gain=2.0)
        self.blocks: Modules[GatedBlock] = Modules(GatedBlock(width, len(AROUND), levels) for _ in range(blocks))
        self.up = DyadicLinear(width, 4 * channels, levels)

    def forward(self, codes: Tensor, level: Tensor) -> Tensor:
        """codes: (B, h, w, condition_dim) activations -> (B, 2h, 2w, C) stream values."""
        stream = dyadic.stream(self.embed.at(level)(shifted(codes, AROUND)))
        for block in self.blocks:
            stream = block.at(level)(stream, shifted(dyadic.activation(stream), AROUND))
        x = dyadic.stream(self.up.at(level)(dyadic.activation(stream)))
        b, h, w = x.shape[:3]
        return x.reshape(b, h, w, 2, 2, -1).transpose(2, 3).reshape(b, 2 * h, 2 * w, -1)
