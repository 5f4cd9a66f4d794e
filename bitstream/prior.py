"""A prior made ready to code a grid at one level and tune: the integers of a weights file, laid out for the kernels."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitstream.exact import (
    ACTIVATION_BITS,
    AROUND,
    CAUSAL,
    CONDITION_BLOCKS,
    CONDITION_WIDTH,
    GATE_BITS,
    GATE_MAX,
    LOGIT_BITS,
    STREAM_BITS,
    code_activations,
)
from bitstream.kernels import ZERO, Model, Network
from bitstream.products import UNIT
from bitstream.weights import Weights

Array = NDArray[Any]


def padded(size: int) -> int:
    """What a vector of this size takes in memory."""
    return -(-size // UNIT) * UNIT


class Prior:
    """``net`` and ``model``: what the kernels need; ``condition``: the layers before them, None for the coarsest grid;
    ``coarser``: the code activations (M, K + 1, d) that the condition reads."""

    def __init__(self, weights: Weights, k: int, row: int) -> None:
        """row: of the biases, see ``Weights.row``."""
        self.grid = grid = weights.grids[k]
        name, m, d, c = f"priors.{k}", grid.groups, grid.dim, grid.channels
        attention = grid.heads * grid.head_channels
        vectors = weights.tensors[f"codebooks.{k}.vectors"]
        net = _Layers(weights, row)
        net.add(f"{name}.embed", STREAM_BITS, [grid.depth] * len(CAUSAL), [c])
        if attention:
            net.add(f"{name}.attention.query", ACTIVATION_BITS, [c], [attention])
            net.add(f"{name}.attention.key_value", ACTIVATION_BITS, [c, grid.depth], [attention] * 2)
            net.gate(f"{name}.attention.gate", attention, c)
        else:
            net.skip(3)
        for n in range(grid.blocks):
            net.add(f"{name}.blocks.{n}.spatial", ACTIVATION_BITS, [c] * (1 + len(CAUSAL)), [c])
            net.gate(f"{name}.blocks.{n}.gate", c, c)
        heads = len(net.layers)
        # Of a layer that sees groups one after the other, a group's rows and columns; what it does not see is left out.
        inputs, flags = [c, grid.depth], [grid.flags] * m
        group = np.repeat(np.arange(m), grid.flags)
        column = np.arange(c + grid.depth)
        seen = column < c
        net.add(f"{name}.flag_hidden", ACTIVATION_BITS, inputs, flags, mask=seen)
        net.add(f"{name}.flag_out", LOGIT_BITS, flags, [m], mask=group <= np.arange(m)[:, None])
        for g in range(m):
            seen = column < c + g * d
            net.codes(f"{name}.flag_hidden", slice(c + g * d, c + (g + 1) * d), flags, mask=group[:, None] > g)
            rows = slice(g * grid.hidden, (g + 1) * grid.hidden)
            net.add(f"{name}.hidden", ACTIVATION_BITS, inputs, [grid.hidden], rows, seen, padded(c) + g * d)
            rows = slice(g * grid.outcomes, (g + 1) * grid.outcomes)
            net.add(f"{name}.out", LOGIT_BITS, [grid.hidden], [grid.outcomes], rows)
        self.net = net.finish()
        position = weights.tensors.get(f"{name}.attention.position", np.zeros((0, 0, 0)))
        self.model = Model(
            groups=m,
            dim=d,
            outcomes=grid.outcomes,
            escape=grid.escape,
            blocks=grid.blocks,
            attention_after=(grid.blocks + 1) // 2 if attention else -1,
            heads=grid.heads,
            head_channels=grid.head_channels,
            head_layers=heads,
            channels=padded(c),
            codes=padded(grid.depth),
            attention=padded(attention),
            flags=padded(grid.flags),
            hidden=padded(grid.hidden),
            position=np.ascontiguousarray(position, np.int32),
            activations=_with_null(vectors),
            vectors=np.ascontiguousarray(vectors.transpose(0, 2, 1), np.float32),
        )
        self.condition: Network | None = None
        if k:
            stack = _Layers(weights, row)
            wide = CONDITION_WIDTH
            stack.add(f"{name}.condition.embed", STREAM_BITS, [weights.grids[k - 1].depth] * len(AROUND), [wide])
            for n in range(CONDITION_BLOCKS):
                spatial = f"{name}.condition.blocks.{n}.spatial"
                stack.add(spatial, ACTIVATION_BITS, [wide] * len(AROUND), [wide])
                stack.gate(f"{name}.condition.blocks.{n}.gate", wide, wide)
            stack.add(f"{name}.condition.up", STREAM_BITS, [wide], [c] * 4)
            self.condition = stack.finish()
            self.coarser = _with_null(weights.tensors[f"codebooks.{k - 1}.vectors"])


def _with_null(vectors: Array) -> NDArray[np.int8]:
    """Code activations (M, K + 1, d): of the null code, then of the vectors (M, K, d)."""
    return np.pad(code_activations(vectors), ((0, 0), (1, 0), (0, 0)))


class _Layers:
    """Layers one after the other, at the end a ``Network``."""

    def __init__(self, weights: Weights, row: int) -> None:
        self.tensors, self.row = weights.tensors, row
        self.weight: list[Array] = []
        self.bias: list[Array] = []
        self.shift: list[Array] = []
        self.layers: list[tuple[int, int, int, int]] = []
        self.bytes = self.outputs = 0

    def add(
        self,
        name: str,
        bits: int | Array,
        inputs: list[int],
        outputs: list[int],
        rows: slice = slice(None),
        mask: Array | bool = True,
        width: int | None = None,
        offset: Array | int = 0,
    ) -> None:
        """A layer whose sums are rounded to units of 2^-bits (of each output).

        inputs, outputs: sizes of the vectors side by side, each of which is padded. rows: outputs that are taken of the
        layer in the file. mask: weights that are used, the others are zero. width: inputs, where the last ones are
        masked. offset: units that are added to each output.
        """
        weight = self.tensors[f"{name}.weight"][rows] * np.asarray(mask, np.int8)
        biases = self.tensors[f"{name}.bias"]
        bias = biases[self.row if len(biases) > 1 else 0, rows].astype(np.int64)
        shift = ACTIVATION_BITS - self.tensors[f"{name}.exponent"][rows, 0].astype(np.int64) - bits
        # Half a unit, so that a shift to the right rounds; and without what the ZERO in the inputs' bytes adds.
        bias += (1 << shift - 1) + (np.asarray(offset) << shift) - ZERO * weight.sum(1, dtype=np.int64)
        self._lay(weight, bias, shift, inputs, outputs, width)

    def gate(self, name: str, inputs: int, channels: int) -> None:
        """A layer with values and gates."""
        bits = np.repeat([ACTIVATION_BITS, GATE_BITS], channels)
        offset = np.repeat([0, GATE_MAX // 2], channels)
        self.add(name, bits, [inputs], [channels] * 2, offset=offset)

    def codes(self, name: str, columns: slice, outputs: list[int], mask: Array) -> None:
        """What one group's codes, followed by as many zeros, add to the sums of a layer: the zeros' bytes take away
        what the ZERO in the codes' bytes adds."""
        weight = self.tensors[f"{name}.weight"][:, columns] * np.asarray(mask, np.int8)
        nothing = np.zeros(len(weight), np.int64)
        both = np.concatenate([weight, -weight], 1)
        self._lay(both, nothing, nothing, [both.shape[1]], outputs, both.shape[1])

    def skip(self, count: int) -> None:
        self.layers += [(0, 0, 0, 0)] * count

    def _lay(
        self, weight: Array, bias: Array, shift: Array, inputs: list[int], outputs: list[int], width: int | None
    ) -> None:
        rows, columns = _places(outputs), _places(inputs)
        high, wide = sum(map(padded, outputs)), sum(map(padded, inputs))
        room = np.zeros((high, wide), np.int8)
        room[np.ix_(rows, columns)] = weight
        wide = -(-min(wide, width or wide) // 4) * 4
        fours = room[:, :wide].reshape(high, wide // 4, 4).transpose(1, 0, 2)
        self.layers.append((self.bytes, self.outputs, wide, high))
        self.weight.append(fours.reshape(-1))
        for values, all_values in ((bias, self.bias), (shift, self.shift)):
            spread = np.zeros(high, np.int32)
            spread[rows] = values
            all_values.append(spread)
        self.bytes += fours.size
        self.outputs += high

    def finish(self) -> Network:
        weight = aligned((self.bytes,), np.int8)
        np.concatenate(self.weight, out=weight)
        layers = np.array(self.layers, np.int64)
        return Network(weight, np.concatenate(self.bias), np.concatenate(self.shift), layers)


def _places(sizes: list[int]) -> Array:
    """Where the numbers of vectors side by side are in memory."""
    starts = np.cumsum([0, *map(padded, sizes)])
    return np.concatenate([start + np.arange(size) for start, size in zip(starts, sizes, strict=False)])


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array of zeros that begins where a line of a cache does: 64 bytes cost one access then, not two."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = np.zeros(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(dtype).reshape(shape)
