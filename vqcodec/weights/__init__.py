"""Weights on disk: safetensors, tensors only, never pickle; the shipped weights lie beside this file.

The priors are stored as the whole numbers they are: ``NAME.weight`` int8 with ``NAME.exponent`` int8 (one power of
two per output channel) and ``NAME.bias`` int32 (in steps of 2**(exponent - 5)), positions of the attention int16 in
steps of 1/32. Code vectors, encoder and decoder are float16, the training state of the codebooks is float32. The
configuration is JSON in the file's metadata.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitstream.errors import WeightsError
from vqcodec.models.dyadic import ACTIVATION_BITS, LOGIT_BITS, DyadicLinear, logit, power_of_two, weight_exponent
from vqcodec.models.pixelsnail import CausalAttention, PriorConfig
from vqcodec.models.vqvae import VQVAE, GridConfig, ModelConfig

SHIPPED = Path(__file__).parent / "vqcodec.safetensors"
FORMAT = "vqcodec-2"


def config_from_dict(fields: dict[str, Any]) -> ModelConfig:
    grids = tuple(GridConfig(**{**g, "prior": PriorConfig(**g["prior"])}) for g in fields["grids"])
    tuples = {key: tuple(fields[key]) for key in ("lambdas", "channels")}
    return ModelConfig(**{**fields, **tuples, "grids": grids})


def to_file(model: VQVAE) -> dict[str, Tensor]:
    """The tensors of a weights file."""
    learned = dict(model.named_parameters())
    tensors = {
        name: _half(name, value) if name in learned else value.detach().cpu().float()
        for name, value in model.state_dict(keep_vars=True).items()
    }
    for name, module in model.named_modules():
        if isinstance(module, DyadicLinear):
            weight, bias = (x.detach().cpu() for x in module.on_grid())
            exponent = weight_exponent(weight)
            tensors[f"{name}.weight"] = (weight / power_of_two(exponent)).to(torch.int8)
            tensors[f"{name}.exponent"] = exponent.to(torch.int8)
            tensors[f"{name}.bias"] = (bias / power_of_two(exponent.squeeze(-1) - ACTIVATION_BITS)).to(torch.int32)
        elif isinstance(module, CausalAttention):
            position = logit(module.position.detach().cpu()) * 2**LOGIT_BITS
            tensors[f"{name}.position"] = position.to(torch.int16)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def from_file(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: a state dict of float32."""
    state = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "exponent":
            continue
        value = tensor.float()
        if tensor.dtype == torch.int8:
            value = value * power_of_two(tensors[f"{stem}.exponent"])
        elif tensor.dtype == torch.int32:
            value = value * power_of_two(tensors[f"{stem}.exponent"].squeeze(-1) - ACTIVATION_BITS)
        elif tensor.dtype == torch.int16:
            value = value * 2.0**-LOGIT_BITS
        state[name] = value
    return state


def fingerprint(model: VQVAE) -> bytes:
    """First 8 bytes of the SHA-256 of what must match to read a file: strides, priors and code vectors.

    Hashed are a line with the grids' strides, as in "16 8", then by name each tensor of the weights file that belongs
    to a prior or holds code vectors: a line with name, type and shape, as in "codebooks.0.vectors float16 4 256 4", and
    the values, little-endian, in C order. Lines end with one newline.
    """
    digest = hashlib.sha256((" ".join(str(grid.stride) for grid in model.config.grids) + "\n").encode())
    for name, tensor in sorted(to_file(model).items()):
        if name.startswith("priors.") or name.endswith(".vectors"):
            values = tensor.numpy()
            digest.update(" ".join([name, str(values.dtype), *map(str, values.shape)]).encode() + b"\n")
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.digest()[:8]


def _half(name: str, value: Tensor) -> Tensor:
    half = value.detach().cpu().half()
    if not torch.isfinite(half).all():
        raise WeightsError(f"{name} has values that float16 cannot hold (up to {value.abs().max():g}): not saved")
    return half


def save_weights(model: VQVAE, path: Path) -> None:
    metadata = {"format": FORMAT, "config": json.dumps(asdict(model.config))}
    save_file(to_file(model), path, metadata)


def load_weights(path: Path = SHIPPED) -> VQVAE:
    """A model from a weights file, on the CPU, in eval mode.

    Guarantee: saving it again gives the same tensors. Raises WeightsError.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such weights file") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable weights file ({error})") from None
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path}: weights of format {metadata.get('format')}, this version reads {FORMAT}")
    try:
        model = VQVAE(config_from_dict(json.loads(metadata["config"])))
        model.load_state_dict(from_file(tensors), assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: the tensors do not fit the configuration ({error})") from None
    return model.eval().requires_grad_(False)
