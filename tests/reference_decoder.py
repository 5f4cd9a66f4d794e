"""A second decoder of a file's indices, written from the specification (bitstream/container.py, bitstream/FORMAT.md).

Whole numbers only: NumPy's int64 and Python's own. No torch, no constriction, nothing of the product is imported. It
computes cell by cell, in the plainest way; the product must agree with it on every index.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

CAUSAL = [(0, -1), (-1, 1), (-1, 0), (-1, -1)]
AROUND = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
ACTIVATION, STREAM, LOGIT, GATE = 5, 9, 5, 4  # what sums are rounded to: steps of 2^-5, ...
WINDOW_ROWS, WINDOW_STEPS = 9, 16


class Refused(Exception):
    """The file is damaged, or not for these weights."""


# --- sections 1 to 4: the file ---


class File(NamedTuple):
    width: int
    height: int
    level: int  # from 0
    visual: bool
    fingerprint: bytes
    checksum: int
    covered: bytes  # what the checksum covers before the indices
    payloads: list[bytes]


def parse(data: bytes) -> File:
    if data[:5] != b"\xf6VQ2\x02" or len(data) < 25:
        raise Refused("header")
    width, height = 1 + int.from_bytes(data[7:10], "little"), 1 + int.from_bytes(data[10:13], "little")
    short, long = sorted([(width + 15) // 16, (height + 15) // 16])
    least = (max(8, short) * long + 3) // 4
    if data[5] % 128 == 0 or data[6] not in (0, 1, 2, 3, 5, 7) or len(data) < least:
        raise Refused("header")
    chunks: dict[int, bytes] = {}
    at = 25
    while True:
        if at >= len(data):
            raise Refused("no end mark")
        kind, at = data[at], at + 1
        if kind == 0x7F:
            break
        length, at = varint(data, at)
        if at + length > len(data):
            raise Refused("length")
        if not (1 <= kind <= 8 or 0x3F <= kind <= 0x44) or kind <= max(chunks, default=0):
            raise Refused("chunk type")
        chunks[kind], at = data[at : at + length], at + length
    if data[at:] != bytes(max(0, least - at)):
        raise Refused("what follows the end mark")
    grids = [kind for kind in chunks if kind <= 8]
    if not grids or grids != list(range(1, len(grids) + 1)) or (0x41 in chunks) != bool(data[6] & 2):
        raise Refused("chunks")
    for kind, payload in chunks.items():
        if kind > 8 and payload[-4:] != zlib.crc32(bytes([kind]) + payload[:-4]).to_bytes(4, "little"):
            raise Refused("CRC of a chunk")
    offset = chunks.get(0x3F, b"")[:-4]
    if 0x3F in chunks and (len(offset) != (3 if data[6] in (1, 3) else 1) or not any(offset)):
        raise Refused("offset")
    checksum = int.from_bytes(data[21:25], "little")
    covered = data[:21] + offset + chunks.get(0x40, b"")[:-4]
    return File(
        width, height, data[5] % 128 - 1, data[5] >= 128, data[13:21], checksum, covered, [chunks[k] for k in grids]
    )


def verify(file: File, grids: Sequence[Ints]) -> None:
    crc = zlib.crc32(file.covered)
    for grid in grids:
        crc = zlib.crc32(grid.astype("<u2").tobytes(), crc)
    if crc != file.checksum:
        raise Refused("checksum")


# --- section 6: tables ---


def powers() -> list[int]:
    """floor(2^(20 - d/32) + 1/2) for the first octave, d = 0..31, halved for the others, d = 0..4094."""
    octave = []
    for d in range(32):
        n = 2**20  # the largest n with n - 1/2 <= 2^(20 - d/32), that is (2n - 1)^32 <= 2^(672 - d)
        while (2 * n - 1) ** 32 > 2 ** (672 - d):
            n -= 1 if (2 * n - 1001) ** 32 <= 2 ** (672 - d) else 500
        octave.append(n)
    return [octave[d % 32] >> (d // 32) for d in range(4095)]


POWERS = np.array(powers(), np.int64)


def table(logits: Ints) -> Ints:
    w = POWERS[logits.max() - logits]
    u = 1 + (2**20 - len(w)) * w // w.sum()
    u[0] += 2**20 - u.sum()
    return u


# --- section 7: rANS ---


class Coder:
    """One lane: its words, and the state."""

    def __init__(self, words: list[int]) -> None:
        if words and words[-1] == 0:
            raise Refused("payload")
        self.words, self.x = words, 0

    def pop(self, u: Ints) -> int:
        while self.x < 2**32 and self.words:
            self.x = 2**32 * self.x + self.words.pop()
        s = self.x % 2**24
        k = int(np.searchsorted(16 * np.cumsum(u), s, side="right"))
        self.x = 16 * int(u[k]) * (self.x // 2**24) + s - 16 * int(u[:k].sum())
        return k

    def finish(self) -> None:
        if self.x or self.words:
            raise Refused("bits are left")


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if shift == 35 or at >= len(data):
            raise Refused("length")
        byte, at = data[at], at + 1
        value += (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    if shift > 7 and byte == 0:
        raise Refused("length")
    return value, at


def coders(payload: bytes, rows: int) -> list[Coder]:
    """The lanes of a grid with this many rows."""
    lanes = 1
    while lanes < 8 and 2 * lanes * 32 <= rows:
        lanes *= 2
    at, lengths = 0, []
    for _ in range(lanes - 1):
        length, at = varint(payload, at)
        lengths.append(length)
    if (len(payload) - at) % 4:
        raise Refused("payload")
    words = [int.from_bytes(payload[k : k + 4], "little") for k in range(at, len(payload), 4)]
    if sum(lengths) > len(words):
        raise Refused("payload")
    found = []
    for length in [*lengths, len(words) - sum(lengths)]:
        found.append(Coder(words[:length]))
        words = words[length:]
    return found


# --- section 8: the weights file ---

DTYPES = {"I8": "<i1", "I16": "<i2", "I32": "<i4", "F16": "<u2"}  # F16: the bits


class Weights(NamedTuple):
    levels: int
    banks: int
    grids: list[dict[str, Any]]
    tensors: dict[str, Ints]
    fingerprint: bytes


def read_weights(data: bytes) -> Weights:
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = header.pop("__metadata__")
    if metadata["format"] != "vqcodec-2":
        raise Refused("format of the weights")
    config = json.loads(metadata["config"])
    grids = config["grids"]
    tensors = {}
    digest = hashlib.sha256((" ".join(str(grid["stride"]) for grid in grids) + "\n").encode())
    names = {"I8": "int8", "I16": "int16", "I32": "int32", "F16": "float16"}
    for name in sorted(header):
        if name.startswith("priors.") or name.endswith(".vectors"):
            kind, shape, (start, end) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
            raw = body[start:end]
            tensors[name] = np.frombuffer(raw, DTYPES[kind]).astype(np.int64).reshape(shape)
            digest.update(" ".join([name, names[kind], *map(str, shape)]).encode() + b"\n" + raw)
    return Weights(len(config["lambdas"]), config.get("banks", 1), grids, tensors, digest.digest()[:8])


def code_activations(bits: Ints) -> Ints:
    """floor(4 v + 1/2), clipped, of float16 numbers v given by their bits."""
    exponent, mantissa = bits >> 10 & 31, bits & 1023
    mantissa = np.where(exponent > 0, mantissa + 1024, mantissa)  # v = mantissa 2^(exponent - 25)
    number = np.where(bits >> 15, -mantissa, mantissa)
    right = 23 - np.maximum(exponent, 1)
    rounded = (number + (1 << np.maximum(right, 1) - 1)) >> np.maximum(right, 1)
    return np.clip(np.where(right > 0, rounded, number << np.maximum(-right, 0)), -127, 127)


class Codes:
    """Code activations by index: null, the codes, escapes."""

    def __init__(self, weights: Weights, k: int) -> None:
        self.table = code_activations(weights.tensors[f"codebooks.{k}.vectors"])

    def __call__(self, group: int, index: int) -> Ints:
        codes, d = self.table.shape[1:]
        if index == 0:
            return np.zeros(d, np.int64)
        if index <= codes:
            return self.table[group, index - 1]
        a, b = divmod(index - codes - 1, 128)
        return activation(16 * (np.array([a, b] if d == 2 else [b]) - 64))


# --- section 9: layers ---


class Linear:
    """Sums of activations, rounded to steps of 2^-bits."""

    def __init__(self, weights: Weights, name: str, row: int) -> None:
        self.weight = weights.tensors[f"{name}.weight"]
        self.exponent = weights.tensors[f"{name}.exponent"][:, 0]
        biases = weights.tensors[f"{name}.bias"]
        self.bias = biases[row if len(biases) > 1 else 0]

    def __call__(self, x: Ints, bits: int, rows: slice = slice(None)) -> Ints:
        """Of some rows of outputs, from the first inputs: those that x has."""
        right = 5 - self.exponent[rows] - bits
        return (self.weight[rows, : len(x)] @ x + self.bias[rows] + (1 << right - 1)) >> right


def activation(steps: Ints, low: int = -127) -> Ints:
    return np.clip(steps, low, 127)


def clip12(steps: Ints) -> Ints:
    """Onto the range of stream values and logits."""
    return np.clip(steps, -2047, 2047)


def read_stream(stream: Ints) -> Ints:
    return activation((stream + 8) >> 4)


def add_gated(stream: Ints, layer: Linear, x: Ints) -> Ints:
    half = len(stream)
    value = activation(layer(x, ACTIVATION)[:half])
    gate = np.clip(layer(x, GATE)[half:] + 32, 0, 64)
    return clip12((4 * stream + value * gate + 2) >> 2)


def taps(grid: Ints, i: int, j: int, offsets: list[tuple[int, int]]) -> Ints:
    """Neighbours of cell (i, j) side by side, zeros outside of the grid (h, w, C)."""
    h, w, channels = grid.shape
    places = [(i + a, j + b) for a, b in offsets]
    zeros = np.zeros(channels, np.int64)
    return np.concatenate([grid[a, b] if 0 <= a < h and 0 <= b < w else zeros for a, b in places])


class Block:
    def __init__(self, weights: Weights, name: str, row: int) -> None:
        self.spatial = Linear(weights, f"{name}.spatial", row)
        self.gate = Linear(weights, f"{name}.gate", row)

    def __call__(self, stream: Ints, x: Ints) -> Ints:
        return add_gated(stream, self.gate, activation(self.spatial(x, ACTIVATION), 0))


# --- section 10: the condition ---


def condition(weights: Weights, k: int, row: int, codes: Ints) -> Ints:
    """Stream values (2h, 2w, C) for grid k from the code activations (h, w, D) of grid k - 1."""
    name = f"priors.{k}.condition"
    h, w = codes.shape[:2]
    cells = list(np.ndindex(h, w))
    embed = Linear(weights, f"{name}.embed", row)
    stream = np.array([clip12(embed(taps(codes, i, j, AROUND), STREAM)) for i, j in cells]).reshape(h, w, -1)
    for b in range(2):
        block = Block(weights, f"{name}.blocks.{b}", row)
        x = read_stream(stream)
        stream = np.array([block(stream[i, j], taps(x, i, j, AROUND)) for i, j in cells]).reshape(h, w, -1)
    up = Linear(weights, f"{name}.up", row)
    channels = len(up.bias) // 4
    out = np.zeros((2 * h, 2 * w, channels), np.int64)
    for i, j in cells:
        quad = clip12(up(read_stream(stream[i, j]), STREAM)).reshape(2, 2, channels)
        out[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = quad
    return out


# --- sections 11 and 5: the prior, in coding order ---


class Attention:
    def __init__(self, weights: Weights, name: str, row: int, shape: tuple[int, int], heads: int) -> None:
        self.query, self.key_value, self.gate = (
            Linear(weights, f"{name}.{part}", row) for part in ("query", "key_value", "gate")
        )
        self.position = weights.tensors[f"{name}.position"]
        self.known = np.zeros((*shape, 2, heads, len(self.query.bias) // heads), np.int64)  # keys, values

    def keep(self, x: Ints, codes: Ints, i: int, j: int) -> None:
        known = activation(self.key_value(np.concatenate([x, codes]), ACTIVATION))
        self.known[i, j] = known.reshape(self.known.shape[2:])

    def attend(self, x: Ints, i: int, j: int) -> Ints:
        query = activation(self.query(x, ACTIVATION)).reshape(self.known.shape[3:])
        w = self.known.shape[1]
        window = [
            (up, age, i - up, j - age + 2 * up)
            for up in range(min(WINDOW_ROWS, i + 1))
            for age in range(1, WINDOW_STEPS + 1)
            if 0 <= j - age + 2 * up < w
        ]
        out = []
        for head, q in enumerate(query):
            scores, values = [0], [np.zeros_like(q)]
            for up, age, a, b in window:
                key, value = self.known[a, b, :, head]
                scores.append(clip12((q @ key + 32 >> 6) + self.position[head, up, age - 1]))
                values.append(value)
            weight = POWERS[max(scores) - np.array(scores)]
            out.append((2 * (weight @ np.array(values)) + weight.sum()) // (2 * weight.sum()))
        return np.concatenate(out)


def steps(h: int, w: int) -> Iterator[list[tuple[int, int]]]:
    """The cells of each step, by ascending row."""
    for t in range(w + 2 * (h - 1)):
        yield [(i, t - 2 * i) for i in range(h) if 0 <= t - 2 * i < w]


def part(group: int, size: int) -> slice:
    return slice(group * size, (group + 1) * size)


def decode_grid(
    weights: Weights, k: int, row: int, shape: tuple[int, int], given: Ints | None, payload: bytes
) -> tuple[Ints, Ints]:
    """Indices (M, h, w) and code activations (h, w, M d) of grid k."""
    name, grid = f"priors.{k}", weights.grids[k]
    groups, d, prior = grid["groups"], grid["dim"], grid["prior"]
    vectors, outcomes, escape = Codes(weights, k), grid["codes"] + grid["escape"], grid["codes"]
    embed = Linear(weights, f"{name}.embed", row)
    blocks = [Block(weights, f"{name}.blocks.{b}", row) for b in range(prior["blocks"])]
    attention = Attention(weights, f"{name}.attention", row, shape, prior["heads"]) if prior["heads"] else None
    flag_hidden, flag_out, hidden, out = (
        Linear(weights, f"{name}.{layer}", row) for layer in ("flag_hidden", "flag_out", "hidden", "out")
    )
    uniform = np.full(128, 2**13, np.int64)

    indices, codes = np.zeros((groups, *shape), np.int64), np.zeros((*shape, groups * d), np.int64)
    seen = np.zeros((len(blocks), *shape, prior["channels"]), np.int64)  # what each block reads
    lanes = coders(payload, shape[0])
    for cells in steps(*shape):
        features, queried = {}, {}
        for i, j in cells:
            stream = clip12(embed(taps(codes, i, j, CAUSAL), STREAM))
            if given is not None:
                stream = clip12(stream + given[i, j])
            for b, block in enumerate(blocks):
                if attention and b == (len(blocks) + 1) // 2:
                    queried[i, j] = read_stream(stream)
                    stream = add_gated(stream, attention.gate, attention.attend(queried[i, j], i, j))
                seen[b, i, j] = read_stream(stream)
                stream = block(stream, np.concatenate([seen[b, i, j], taps(seen[b], i, j, CAUSAL)]))
            features[i, j] = read_stream(stream)
        for i, j in cells:
            coder, units = lanes[i % len(lanes)], np.zeros(0, np.int64)
            for g in range(groups):
                known = np.concatenate([features[i, j], codes[i, j, : g * d]])
                mine = activation(flag_hidden(known, ACTIVATION, part(g, prior["flags"])), 0)
                units = np.concatenate([units, mine])
                flag = clip12(flag_out(units, LOGIT, part(g, 1)))
                if coder.pop(table(np.array([0, flag[0]]))) == 0:
                    continue
                logits = out(
                    activation(hidden(known, ACTIVATION, part(g, prior["hidden"])), 0), LOGIT, part(g, outcomes)
                )
                index = 1 + coder.pop(table(clip12(logits)))
                if index == escape + 1:
                    for c in range(d):
                        index += 128 ** (d - 1 - c) * coder.pop(uniform)
                indices[g, i, j] = index
                codes[i, j, g * d : (g + 1) * d] = vectors(g, index)
        if queried:  # a grid of one block has none
            for i, j in cells:
                attention.keep(queried[i, j], codes[i, j], i, j)
    for coder in lanes:
        coder.finish()
    return indices, codes


def decode(data: bytes, weights: Weights) -> list[Ints]:
    """The index grids (M, h, w) of a file, coarsest first."""
    file = parse(data)
    if file.fingerprint != weights.fingerprint:
        raise Refused("weights")
    if file.level >= weights.levels or len(file.payloads) != len(weights.grids):
        raise Refused("level or number of grids")
    row = file.level + (weights.levels if file.visual and weights.banks == 2 else 0)
    stride = weights.grids[0]["stride"]
    high, wide = -(-file.height // stride), -(-file.width // stride)
    grids: list[Ints] = []
    given = None
    codes = np.zeros((0, 0, 0), np.int64)
    for k, payload in enumerate(file.payloads):
        ratio = stride // weights.grids[k]["stride"]
        if k:
            given = condition(weights, k, row, codes)
        indices, codes = decode_grid(weights, k, row, (high * ratio, wide * ratio), given, payload)
        grids.append(indices)
    verify(file, grids)
    return grids
