"""The one loop behind encoding, decoding and sampling: fill a grid of indices wave by wave.

Cell (i, j) belongs to step t = j + 2i. Everything its probability depends on, (i, j-1), (i-1, j-1), (i-1, j) and
(i-1, j+1), belongs to earlier steps, so all cells of a step are coded as one batch: w + 2(h-1) steps for a grid of
h x w cells. The walk is a long chain of small operations, which suits a CPU: it runs there wherever the networks run.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqcodec.models import dyadic, kernels
from vqcodec.models.dyadic import DyadicLinear
from vqcodec.models.pixelsnail import ATTENTION_ROWS, ATTENTION_STEPS, CAUSAL, CausalAttention, GatedBlock, PixelSNAIL

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
BLOCK = 128  # cells a side of what the condition computes at once: enough for the margin to cost little


class Wave(NamedTuple):
    """The cells of one step: rows ``rows`` of the grid, at ``cells`` of the flattened grid (i * w + j)."""

    step: int
    rows: slice
    cells: slice


def waves(h: int, w: int) -> Iterator[Wave]:
    """Every cell of an h x w grid exactly once, in coding order."""
    for t in range(w + 2 * (h - 1)):
        first, last = max(0, (t - w + 2) // 2), min(h - 1, t // 2)
        if first > last:  # one column wide: every other step is empty
            continue
        # (i, t - 2i) lies at t + i (w - 2): the cells of a step are evenly spaced.
        start, stride = t + first * (w - 2), max(1, w - 2)
        yield Wave(t, slice(first, last + 1), slice(start, start + (last - first) * stride + 1, stride))


Choose = Callable[[Wave, int, Floats], Indices]
Condition = Callable[[Wave], NDArray[np.int16]]


class CoarserGrid:
    """A Condition from the next coarser grid, in blocks: computed when the walk gets there, forgotten behind it.

    For the whole grid it would be the largest array of all, 4 bytes for each pixel of the picture.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], reach: int, indices: Tensor) -> None:
        """network: indices (1, M, h, w) -> exact stream values (1, 2h, 2w, C) that hang on no index more than ``reach``
        cells away; indices: of the whole coarser grid."""
        self.network, self.reach, self.indices = network, reach, indices
        self.blocks: dict[tuple[int, int], NDArray[np.int16]] = {}

    def __call__(self, wave: Wave) -> NDArray[np.int16]:
        i = np.arange(wave.rows.start, wave.rows.stop)
        j = wave.step - 2 * i
        down, right = i // BLOCK, j // BLOCK
        places = dict.fromkeys(zip(down.tolist(), right.tolist(), strict=True))
        # The steps that cross a block follow one another: what this one does not need, no later one needs.
        self.blocks = {place: self.blocks[place] if place in self.blocks else self._block(*place) for place in places}
        out = np.empty((len(i), next(iter(self.blocks.values())).shape[2]), np.int16)
        for (a, b), block in self.blocks.items():
            here = (down == a) & (right == b)
            out[here] = block[i[here] - a * BLOCK, j[here] - b * BLOCK]
        return out

    def _block(self, down: int, right: int) -> NDArray[np.int16]:
        side = BLOCK // 2
        top, left = down * side, right * side
        y, x = max(0, top - self.reach), max(0, left - self.reach)
        far = side + self.reach
        found = self.network(self.indices[:, :, y : top + far, x : left + far])[0, 2 * (top - y) :, 2 * (left - x) :]
        steps = found[:BLOCK, :BLOCK] * 2**dyadic.STREAM_BITS
        return steps.to(torch.int16).cpu().contiguous().numpy()


def coding_tables(logits: Floats) -> NDArray[np.int32]:
    """Tables (n, K) of logits (n, K) in whole steps: rows sum to 2**20, every entry >= 1."""
    out = np.empty(logits.shape, np.int32)
    kernels.tables(logits, out)
    return out


@torch.no_grad()
def fill_grid(
    prior: "LevelPrior", shape: tuple[int, int], condition: Condition | None, choose: Choose
) -> NDArray[np.int16]:
    """Fill a grid, (h, w) = shape; returns the indices (M, h, w).

    condition: called once with each wave, in coding order; returns the stream steps (n, C) that its n cells get from
    the coarser grid. None for the coarsest.
    choose: called in coding order, wave by wave and group by group, with the wave, the group and the logits (n, K) of
    its n cells in whole steps (``coding_tables`` makes tables of them), a buffer that is used again; returns
    the indices (n,). The encoder chooses and notes, the decoder pops, the sampler draws.
    """
    h, w = shape
    walk = Walk(prior, shape, condition)
    grid = np.empty((prior.groups, h * w), np.int16)
    for wave in waves(h, w):
        walk.begin(wave)
        for group in range(prior.groups):
            index = choose(wave, group, walk.logits(group))
            grid[group, wave.cells] = index
            walk.put(group, index)
        walk.end(wave)
    return grid.reshape(prior.groups, h, w)


class LevelPrior:
    """A prior made ready to code at one quality level: weights in whole steps, which saves scaling in every layer."""

    def __init__(self, prior: PixelSNAIL, vectors: Tensor, level: int) -> None:
        """vectors: (M, K, d) code activations; level: from 0."""
        config = prior.config
        self.config, self.groups, self.codes = config, prior.groups, prior.codes
        self.attention_after = prior.attention_after
        in_steps = vectors.detach().float().cpu() * 2.0**dyadic.ACTIVATION_BITS
        self.vectors = in_steps.numpy()
        self.embed = _Layer(prior.embed, level, dyadic.STREAM_BITS)
        self.blocks = [_Block(block, level) for block in prior.blocks]
        self.attention = _Attention(prior.attention, level) if prior.attention else None
        # The heads' hidden layers in two parts: the features' share of all groups at once, and that of the codes.
        hidden = [layer.in_steps(level, dyadic.ACTIVATION_BITS) for layer in prior.hidden]
        c = config.channels
        self.features = torch.cat([w[:c] for w, _ in hidden], 1).contiguous()
        self.known = [w[c:].numpy() for w, _ in hidden]
        self.hidden_bias: list[Floats] = [bias.numpy() for _, bias in hidden]
        self.out = [tuple(x.numpy() for x in layer.in_steps(level, dyadic.LOGIT_BITS)) for layer in prior.out]


class _Layer:
    """A dyadic layer in steps: weight (in, out), bias (out,)."""

    def __init__(self, layer: DyadicLinear, level: int, bits: int | Tensor) -> None:
        self.weight, bias = layer.in_steps(level, bits)
        self.bias: Floats = bias.numpy()


class _Gate(_Layer):
    """A layer before ``kernels.add_gated``."""

    def __init__(self, layer: DyadicLinear, level: int) -> None:
        channels = layer.weight.shape[0] // 2
        # The gate's b/4 + 1/2 in steps of 2**-6: sums in steps of 2**-4, plus 32 steps.
        super().__init__(layer, level, torch.tensor([dyadic.ACTIVATION_BITS] * channels + [4] * channels))
        self.bias[channels:] += 32


class _Block:
    """A GatedBlock in steps."""

    def __init__(self, block: GatedBlock, level: int) -> None:
        self.spatial, self.gate = _Layer(block.spatial, level, dyadic.ACTIVATION_BITS), _Gate(block.gate, level)


class _Attention:
    """A CausalAttention in steps."""

    def __init__(self, layer: CausalAttention, level: int) -> None:
        self.width = layer.heads * layer.head_channels
        self.query, self.key_value = (_Layer(m, level, dyadic.ACTIVATION_BITS) for m in (layer.query, layer.key_value))
        self.gate = _Gate(layer.gate, level)
        position = dyadic.logit(layer.position.detach().float().cpu()) * 2.0**dyadic.LOGIT_BITS
        self.position = position.numpy().astype(np.int64)


class _Buffer:
    """Memory for the largest wave, seen by torch for products and by NumPy for everything else."""

    def __init__(self, rows: int, width: int) -> None:
        self.tensor = torch.zeros(rows, width)
        self.array: Floats = self.tensor.numpy()

    def product(self, x: "_Buffer", weight: Tensor, n: int) -> Floats:
        torch.mm(x.tensor[:n], weight, out=self.tensor[:n])
        return self.array


class Walk:
    """A prior at work on one grid: the state between waves, of size O(cells of the largest wave)."""

    def __init__(self, prior: LevelPrior, shape: tuple[int, int], condition: Condition | None = None) -> None:
        """shape: (h, w); condition: as in ``fill_grid``."""
        self.prior, config, (h, self.width) = prior, prior.config, shape
        most, c = min(h, (self.width + 1) // 2), config.channels
        nothing = np.empty((0, c), np.int16)
        self.condition = condition or (lambda wave: nothing)
        self.t, self.first, self.n = 0, 0, 0
        # One ring of steps per layer that looks at neighbours, with room for the row above the wave.
        depth = prior.vectors.shape[0] * prior.vectors.shape[2]
        self.code_ring = np.zeros((kernels.SLOTS, most + 1, depth), np.int8)
        self.rings = [np.zeros((kernels.SLOTS, most + 1, c), np.int8) for _ in prior.blocks]
        self.neighbours = _Buffer(most, len(CAUSAL) * depth)
        self.stream = np.zeros((most, c), np.float32)
        self.taps = _Buffer(most, (1 + len(CAUSAL)) * c)
        self.narrow, self.wide = _Buffer(most, c), _Buffer(most, 2 * c)
        self.sums = _Buffer(most, prior.groups * config.hidden)
        self.scores = np.empty((most, prior.codes), np.float32)
        self.codes = _Buffer(most, depth)
        if prior.attention is not None:
            rows, a = most + ATTENTION_ROWS - 1, prior.attention.width
            self.keys, self.values = (np.zeros((rows, ATTENTION_STEPS, a), np.int8) for _ in range(2))
            self.query, self.attended, self.known = _Buffer(most, a), _Buffer(most, a), _Buffer(most, 2 * a)
            self.seen = _Buffer(most, c + depth)

    def begin(self, wave: Wave) -> None:
        """Features of the wave's cells."""
        prior, stream = self.prior, self.stream
        self.t, self.first, self.n = t, first, n = wave.step, wave.rows.start, wave.rows.stop - wave.rows.start
        kernels.gather(self.code_ring, t, first, n, self.width, self.neighbours.array, 0)
        sums = self.narrow.product(self.neighbours, prior.embed.weight, n)
        kernels.begin_stream(sums, prior.embed.bias, self.condition(wave), n, stream)
        for k, block in enumerate(prior.blocks):
            if prior.attention is not None and k == prior.attention_after:
                self._attend(prior.attention)
            kernels.read_stream(stream, n, self.taps.array)
            kernels.gather(self.rings[k], t, first, n, self.width, self.taps.array, stream.shape[1])
            kernels.keep(self.rings[k], t, first, n, self.taps.array)
            sums = self.narrow.product(self.taps, block.spatial.weight, n)
            kernels.activate(sums, block.spatial.bias, n, 0, sums)
            kernels.add_gated(self.wide.product(self.narrow, block.gate.weight, n), block.gate.bias, n, stream)
        kernels.read_stream(stream, n, self.narrow.array)
        self.sums.product(self.narrow, prior.features, n)

    def _attend(self, layer: _Attention) -> None:
        t, first, n = self.t, self.first, self.n
        kernels.read_stream(self.stream, n, self.seen.array)
        kernels.read_stream(self.stream, n, self.narrow.array)
        query = self.query.product(self.narrow, layer.query.weight, n)
        kernels.activate(query, layer.query.bias, n, -dyadic.ACTIVATION_MAX, query)
        kernels.attend(query, self.keys, self.values, layer.position, t, first, n, self.width, self.attended.array)
        sums = self.wide.product(self.attended, layer.gate.weight, n)
        kernels.add_gated(sums, layer.gate.bias, n, self.stream)

    def logits(self, group: int) -> Floats:
        """(n, K) in whole steps, given the indices of this wave's earlier groups."""
        prior, column = self.prior, group * self.prior.config.hidden
        known, hidden_bias, (weight, bias) = prior.known[group], prior.hidden_bias[group], prior.out[group]
        codes, out = self.codes.array, self.scores
        kernels.head(self.sums.array, column, codes, known, hidden_bias, weight, bias, self.n, out)
        return self.scores[: self.n]

    def put(self, group: int, index: Indices) -> None:
        """Note the indices (n,) of a group; groups come in order."""
        d = self.prior.vectors.shape[2]
        self.codes.array[: self.n, group * d : (group + 1) * d] = self.prior.vectors[group][index]

    def end(self, wave: Wave) -> None:
        """All groups are put: the wave becomes history."""
        n, layer = self.n, self.prior.attention
        kernels.keep(self.code_ring, self.t, self.first, n, self.codes.array)
        if layer is not None:
            self.seen.array[:n, self.stream.shape[1] :] = self.codes.array[:n]
            sums = self.known.product(self.seen, layer.key_value.weight, n)
            kernels.activate(sums, layer.key_value.bias, n, -dyadic.ACTIVATION_MAX, sums)
            kernels.keep_attention(sums, self.t, self.first, n, self.keys, self.values)
