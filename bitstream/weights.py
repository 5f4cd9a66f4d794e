"""The part of a weights file that reads and writes indices: whole numbers, used as they lie in the file.

FORMAT.md, section 8, is the specification. Encoder and decoder networks in the same file are no business of this one.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from bitstream.container import FINGERPRINT_BYTES, MAX_GRIDS, MAX_LEVEL, Header
from bitstream.errors import DamagedError, WeightsError
from bitstream.exact import (
    AROUND,
    ATTENTION_ROWS,
    ATTENTION_WAVES,
    BIAS_MAX,
    CAUSAL,
    CONDITION_BLOCKS,
    CONDITION_WIDTH,
    ESCAPE_SIDE,
    EXPONENT_MAX,
    EXPONENT_MIN,
    INDICES,
    LOGIT_MAX,
    MAX_FAN_IN,
    WEIGHT_MAX,
)

FORMAT = "vqcodec-2"


@dataclass(frozen=True)
class Grid:
    """One grid, with the names of FORMAT.md."""

    stride: int
    groups: int
    dim: int
    codes: int
    escape: bool
    channels: int
    blocks: int
    flags: int
    hidden: int
    heads: int
    head_channels: int

    @property
    def outcomes(self) -> int:
        """Of a group that is not null."""
        return self.codes + self.escape

    @property
    def depth(self) -> int:
        """Channels of a cell."""
        return self.groups * self.dim


class Layer(NamedTuple):
    """What the file has of a layer: NAME.weight, NAME.exponent and NAME.bias."""

    inputs: int
    outputs: int
    biases: int


class Weights:
    """Configuration and tensors, checked against each other."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> None:
        """config: that of FORMAT.md; tensors: at least the priors' and the code vectors, others are left out.

        Raises WeightsError unless they are all there, of the types, shapes and ranges that FORMAT.md gives.
        """
        self.levels, self.banks, self.grids = _configured(config)
        expected = _expected(self.grids, self.levels * self.banks)
        ours = {name for name in tensors if _codes(name)}
        if ours != set(expected):
            names = sorted(ours ^ set(expected))
            raise WeightsError(f"the configuration and the tensors differ in {names[0]} and {len(names) - 1} others")
        self.tensors: dict[str, NDArray[Any]] = {}
        for name, (dtype, shape, low, high) in expected.items():
            tensor = tensors[name]
            if tensor.dtype != dtype or tensor.shape != shape:
                found = f"{tensor.dtype} {tensor.shape}"
                raise WeightsError(f"tensor {name} is {found}, by the configuration it is {np.dtype(dtype)} {shape}")
            if tensor.size and not (tensor.min() >= low and tensor.max() <= high):  # not: NaN
                raise WeightsError(f"tensor {name} has values out of {low:g}..{high:g}")
            self.tensors[name] = tensor

    @classmethod
    def load(cls, path: str | Path) -> "Weights":
        """Raises WeightsError."""
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise WeightsError(f"weights of format {metadata.get('format')}, this version reads {FORMAT}")
                tensors = {name: file.get_tensor(name) for name in file.keys() if _codes(name)}  # noqa: SIM118
            return cls(json.loads(metadata["config"]), tensors)
        except FileNotFoundError:
            raise WeightsError(f"{path}: no such weights file") from None
        except WeightsError as error:
            raise WeightsError(f"{path}: {error}") from None
        except Exception as error:  # of kinds that depend on the version of safetensors
            raise WeightsError(f"{path}: not a readable weights file ({error})") from None

    @cached_property
    def fingerprint(self) -> bytes:
        """Identifies all that must be equal to read the indices of a file."""
        digest = hashlib.sha256((" ".join(str(grid.stride) for grid in self.grids) + "\n").encode())
        for name in sorted(self.tensors):
            values = self.tensors[name]
            digest.update(" ".join([name, values.dtype.name, *map(str, values.shape)]).encode() + b"\n")
            digest.update(values.astype(values.dtype.newbyteorder("<"), order="C", copy=False).data)
        return digest.digest()[:FINGERPRINT_BYTES]

    def row(self, header: Header) -> int:
        """The row that the priors' biases have for a file. Raises DamagedError for a level that there is not."""
        if header.level > self.levels:
            raise DamagedError(f"level {header.level}, the model has {self.levels} levels: the file is damaged")
        return header.level - 1 + (self.levels if header.visual and self.banks == 2 else 0)

    def shape(self, k: int, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of grid k for an image of this size in pixels."""
        coarsest, ratio = self.grids[0].stride, self.grids[0].stride // self.grids[k].stride
        return -(-height // coarsest) * ratio, -(-width // coarsest) * ratio


def _codes(name: str) -> bool:
    """Whether a tensor has a part in reading indices."""
    return name.startswith("priors.") or name.endswith(".vectors")


def _configured(config: Mapping[str, Any]) -> tuple[int, int, tuple[Grid, ...]]:
    """Numbers of levels and banks, and grids: each field by itself, then what they are together."""
    try:
        levels, entries = len(config["lambdas"]), [{**entry, **entry["prior"]} for entry in config["grids"]]
        values = [{field.name: entry[field.name] for field in fields(Grid)} for entry in entries]
    except (KeyError, TypeError) as error:
        raise WeightsError(f"the configuration of the weights is incomplete ({error!r})") from None
    if not (1 <= levels <= MAX_LEVEL and 1 <= len(values) <= MAX_GRIDS):
        raise WeightsError(
            f"the weights have {levels} levels and {len(values)} grids, not 1..{MAX_LEVEL}, 1..{MAX_GRIDS}"
        )
    banks = config.get("banks", 1)
    if type(banks) is not int or banks not in (1, 2):
        raise WeightsError(f"the weights have banks = {banks!r}, not 1 or 2")
    for k, entry in enumerate(values):
        for name, value in entry.items():
            least = 0 if name in ("blocks", "heads", "escape") else 1
            if type(value) is not (bool if name == "escape" else int) or not least <= value <= INDICES:
                raise WeightsError(f"grid {k} of the weights has {name} = {value!r}")
    grids = tuple(Grid(**entry) for entry in values)
    for k, grid in enumerate(grids):
        escapes = ESCAPE_SIDE**grid.dim if grid.escape and grid.dim <= 2 else 0
        if grid.outcomes < 2 or grid.escape > (escapes > 0) or grid.codes + escapes >= INDICES:
            codes = f"{grid.codes} codes of {grid.dim} channels, escape: {grid.escape}"
            raise WeightsError(f"grid {k} of the weights has {codes}, which the format does not allow")
        if k and grids[k - 1].stride != 2 * grid.stride:
            raise WeightsError(f"grid {k} of the weights has stride {grid.stride} after {grids[k - 1].stride}")
        for name, layer in layers(grids, k, levels * banks):
            if layer.inputs > MAX_FAN_IN:
                raise WeightsError(f"layer {name} has {layer.inputs} inputs, the limit of exact sums is {MAX_FAN_IN}")
    return levels, banks, grids


def layers(grids: tuple[Grid, ...], k: int, rows: int) -> Iterator[tuple[str, Layer]]:
    """The layers of grid k, by name. Lazily: what a damaged configuration asks for is looked at one by one."""
    grid, name = grids[k], f"priors.{k}"
    c, depth, attention = grid.channels, grid.depth, grid.heads * grid.head_channels
    if k:
        wide = CONDITION_WIDTH
        yield f"{name}.condition.embed", Layer(len(AROUND) * grids[k - 1].depth, wide, rows)
        for n in range(CONDITION_BLOCKS):
            yield f"{name}.condition.blocks.{n}.spatial", Layer(len(AROUND) * wide, wide, rows)
            yield f"{name}.condition.blocks.{n}.gate", Layer(wide, 2 * wide, rows)
        yield f"{name}.condition.up", Layer(wide, 4 * c, rows)
    yield f"{name}.embed", Layer(len(CAUSAL) * depth, c, rows)
    if attention:
        yield f"{name}.attention.query", Layer(c, attention, rows)
        yield f"{name}.attention.key_value", Layer(c + depth, 2 * attention, rows)
        yield f"{name}.attention.gate", Layer(attention, 2 * c, rows)
    yield f"{name}.flag_hidden", Layer(c + depth, grid.groups * grid.flags, rows)
    yield f"{name}.flag_out", Layer(grid.groups * grid.flags, grid.groups, rows)
    yield f"{name}.hidden", Layer(c + depth, grid.groups * grid.hidden, rows)
    yield f"{name}.out", Layer(grid.hidden, grid.groups * grid.outcomes, 1)
    for n in range(grid.blocks):
        yield f"{name}.blocks.{n}.spatial", Layer((1 + len(CAUSAL)) * c, c, rows)
        yield f"{name}.blocks.{n}.gate", Layer(c, 2 * c, rows)


def _expected(grids: tuple[Grid, ...], rows: int) -> dict[str, tuple[Any, tuple[int, ...], float, float]]:
    """Type, shape and range of every tensor."""
    found: dict[str, tuple[Any, tuple[int, ...], float, float]] = {}
    for k, grid in enumerate(grids):
        for name, layer in layers(grids, k, rows):
            found[f"{name}.weight"] = np.int8, (layer.outputs, layer.inputs), -WEIGHT_MAX, WEIGHT_MAX
            found[f"{name}.exponent"] = np.int8, (layer.outputs, 1), EXPONENT_MIN, EXPONENT_MAX
            found[f"{name}.bias"] = np.int32, (layer.biases, layer.outputs), -BIAS_MAX, BIAS_MAX
        if grid.heads:
            shape = (grid.heads, ATTENTION_ROWS, ATTENTION_WAVES)
            found[f"priors.{k}.attention.position"] = np.int16, shape, -LOGIT_MAX, LOGIT_MAX
        most = float(np.finfo(np.float16).max)
        found[f"codebooks.{k}.vectors"] = np.float16, (grid.groups, grid.codes, grid.dim), -most, most
    return found
