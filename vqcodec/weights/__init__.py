"""Weights on disk: safetensors, tensors only, never pickle; the shipped weights lie beside this file.

The priors are stored as the whole numbers they are: ``NAME.weight`` int8 with ``NAME.exponent`` int8 (one power of
two per output channel) and ``NAME.bias`` int32 (in steps of 2**(exponent - 5)), positions of the attention int16 in
steps of 1/32. Code vectors, encoder and decoder are float16. The configuration is JSON in the file's metadata.
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
from vqcodec.models.dyadic import ACTIVATION_BITS, LOGIT_BITS, DyadicLinear, logit, weight_exponent
from vqcodec.models.pixelsnail import CausalAttention, PriorConfig
from vqcodec.models.vqvae import VQVAE, GridConfig, ModelConfig

SHIPPED = Path(__file__).parent / "vqcodec.safetensors"
FORMAT = "vqcodec-1"


def config_from_dict(fields: dict[str, Any]) -> ModelConfig:
    grids = tuple(GridConfig(**{**g, "prior": PriorConfig(**g["prior"])}) for g in fields["grids"])
    tuples = {key: tuple(fields[key]) for key in ("lambdas", "channels", "decoder_channels")}
    return ModelConfig(**{**fields, **tuples, "grids": grids})


def to_file(model: VQVAE) -> dict[str, Tensor]:
    """The tensors of a weights file."""
    tensors = {name: value.detach().cpu().half() for name, value in model.named_parameters()}
    tensors |= {name: value.detach().cpu().float() for name, value in model.named_buffers()}
    for name, module in model.named_modules():
        if isinstance(module, DyadicLinear):
            weight, bias = (x.detach().cpu() for x in module.on_grid())
            exponent = weight_exponent(weight)
            tensors[f"{name}.weight"] = torch.ldexp(weight, -exponent).to(torch.int8)
            tensors[f"{name}.exponent"] = exponent.to(torch.int8)
            tensors[f"{name}.bias"] = torch.ldexp(bias, ACTIVATION_BITS - exponent.squeeze(-1)).to(torch.int32)
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
            value = torch.ldexp(value, tensors[f"{stem}.exponent"].int())
        elif tensor.dtype == torch.int32:
            value = torch.ldexp(value, tensors[f"{stem}.exponent"].int().squeeze(-1) - ACTIVATION_BITS)
        elif tensor.dtype == torch.int16:
            value = value * 2.0**-LOGIT_BITS
        state[name] = value
    return state


def fingerprint(model: VQVAE) -> bytes:
    """First 8 bytes of the SHA-256 of what must match to read a file: the priors and the code vectors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(to_file(model).items()):
        if name.startswith("priors.") or name.endswith(".vectors"):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.digest()[:8]


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
        model.load_state_dict(from_file(tensors))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: the tensors do not fit the configuration ({error})") from None
    return model.eval().requires_grad_(False)
