"""Weights files of random integers, for tests of what codes: nothing is trained, everything is used."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitstream.weights import Weights, _configured, layers

Tensors = dict[str, NDArray[Any]]

TINY: list[dict[str, Any]] = [
    {
        "stride": 16, "groups": 2, "dim": 2, "codes": 15, "escape": True,
        "prior": {"channels": 16, "blocks": 2, "flags": 4, "hidden": 12, "heads": 2, "head_channels": 8},
    },
    {
        "stride": 8, "groups": 3, "dim": 3, "codes": 7, "escape": False,
        "prior": {"channels": 20, "blocks": 1, "flags": 3, "hidden": 8, "heads": 0, "head_channels": 16},
    },
]  # fmt: skip
PRODUCT: list[dict[str, Any]] = [
    {
        "stride": 16, "groups": 8, "dim": 2, "codes": 255, "escape": True,
        "prior": {"channels": 128, "blocks": 4, "flags": 16, "hidden": 64, "heads": 4, "head_channels": 16},
    },
    {
        "stride": 8, "groups": 48, "dim": 2, "codes": 127, "escape": True,
        "prior": {"channels": 128, "blocks": 3, "flags": 16, "hidden": 48, "heads": 0, "head_channels": 16},
    },
]  # fmt: skip


def random_weights(grids: list[dict[str, Any]] = TINY, levels: int = 2, seed: int = 0, active: float = 0.0) -> Weights:
    """active: the logits of the flags are about this, so that about 1 / (1 + 2^-active) of the groups are not null."""
    config = {"lambdas": [0.01] * levels, "grids": grids}
    return Weights(config, random_tensors(config, seed, active))


def random_tensors(config: dict[str, Any], seed: int = 0, active: float = 0.0) -> Tensors:
    rng = np.random.default_rng(seed)
    levels, banks, grids = _configured(config)
    tensors: Tensors = {}
    for k, grid in enumerate(grids):
        for name, layer in layers(grids, k, levels * banks):
            # Sums of about the size of one activation's range: nothing is always clipped, nothing always zero.
            weight = rng.integers(-127, 128, (layer.outputs, layer.inputs))
            weight[rng.random(weight.shape) < 0.5] = 0
            exponent = np.clip(rng.integers(-2, 1, (layer.outputs, 1)) - 6 - round(np.log2(layer.inputs) / 2), -14, -5)
            bias = rng.integers(-(2**10), 2**10, (layer.biases, layer.outputs))
            if name.endswith("flag_out"):
                exponent = exponent.clip(-11)
                bias += (active * 2.0 ** (5 - exponent[:, 0])).astype(np.int64)
            tensors[f"{name}.weight"] = weight.astype(np.int8)
            tensors[f"{name}.exponent"] = exponent.astype(np.int8)
            tensors[f"{name}.bias"] = bias.astype(np.int32)
        if grid.heads:
            shape = (grid.heads, 9, 16)
            tensors[f"priors.{k}.attention.position"] = rng.integers(-200, 200, shape).astype(np.int16)
        vectors = rng.normal(0, 4, (grid.groups, grid.codes, grid.dim))
        tensors[f"codebooks.{k}.vectors"] = vectors.astype(np.float16)
    return tensors
