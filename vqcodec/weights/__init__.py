"""Weights on disk: safetensors, tensors only, never pickle; the shipped weights lie beside this file.

The priors are stored as the whole numbers they are: ``NAME.weight`` int8 with ``NAME.exponent`` int8 (one power of
two per output channel) and ``NAME.bias`` int32 (in steps of 2**(exponent - 5)), positions of the attention int16 in
steps of 1/32. Code vectors, encoder and decoder are float16, the training state of the codebooks is float32. The
configuration is JSON in the file's metadata.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bitstream.errors import WeightsError
from bitstream.exact import ACTIVATION_BITS, LOGIT_BITS
from bitstream.weights import FORMAT, Weights
from vqcodec.config import SHIPPED, ModelConfig
from vqcodec.files import write_atomically
from vqcodec.models.dyadic import DyadicLinear, logit, power_of_two, weight_exponent
from vqcodec.models.pixelsnail import CausalAttention
from vqcodec.models.vqvae import VQVAE


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


def as_coded(model: VQVAE) -> tuple[VQVAE, Weights]:
    """A copy of a model, on the CPU, as it were saved and loaded, and the integers that its priors code with."""
    tensors = to_file(model)
    return _built(model.config, tensors), _integers(model.config, tensors)


def fingerprint(model: VQVAE) -> bytes:
    """Names a model in its files, see ``Weights.fingerprint``."""
    return _integers(model.config, to_file(model)).fingerprint


def _integers(config: ModelConfig, tensors: dict[str, Tensor]) -> Weights:
    return Weights(asdict(config), {name: tensor.numpy() for name, tensor in tensors.items()})


def _built(config: ModelConfig, tensors: dict[str, Tensor]) -> VQVAE:
    with torch.device("cpu"):  # whatever the caller's default is
        model = VQVAE(config)
    model.load_state_dict(from_file(tensors), assign=True)
    return model.eval().requires_grad_(False)


def _half(name: str, value: Tensor) -> Tensor:
    half = value.detach().cpu().half()
    if not torch.isfinite(half).all():
        raise WeightsError(f"{name} has values that float16 cannot hold (up to {value.abs().max():g}): not saved")
    return half


def save_weights(model: VQVAE, path: Path) -> None:
    metadata = {"format": FORMAT, "config": json.dumps(asdict(model.config))}
    with write_atomically(path, force=True) as file:  # safetensors' own file would be for its owner alone
        file.write(save(to_file(model), metadata))


def load_weights(path: Path = SHIPPED) -> VQVAE:
    """A model from a weights file, on the CPU, in eval mode.

    Guarantee: saving it again gives the same tensors. Raises WeightsError.
    """
    return load(path)[0]


def load(path: Path = SHIPPED) -> tuple[VQVAE, Weights]:
    """As ``load_weights``, and the integers that the priors code with. Raises WeightsError."""
    numbers = Weights.load(path)  # which is sure of the grids before anything is built
    try:
        with safe_open(path, "pt") as file:
            fields = json.loads(file.metadata()["config"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        _check(fields, tensors)
        return _built(ModelConfig.from_dict(fields), tensors), numbers
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a readable weights file ({error})") from None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: the tensors do not fit the configuration ({error})") from None


def _check(fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError where the networks would be larger than the file, or have numbers that are none."""
    blocks = fields["blocks"] if isinstance(fields["blocks"], list) else [fields["blocks"]]
    sizes = [*fields["channels"], *blocks]
    most = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    if not all(type(size) is int and 0 <= size <= max(most, len(tensors)) for size in sizes) or len(sizes) > len(
        tensors
    ):
        raise ValueError(f"channels and blocks {sizes}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite")
