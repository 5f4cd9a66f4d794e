"""Where networks compute in bfloat16 and where they must not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def fast_bfloat16(device: torch.device) -> bool:
    """Whether an x86 CPU multiplies bfloat16 itself, some four times as fast as float32; others would emulate it."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in old versions of torch
    return device.type == "cpu" and any(known.get(name) for name in ("avx512_bf16", "amx_bf16"))


def inference_precision(device: torch.device) -> torch.autocast:
    """bfloat16, in which the networks were trained, where it is fast; whatever autocast the caller may have set."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


@contextmanager
def inference(device: torch.device) -> Iterator[None]:
    """Without gradients, in the networks' precision; of this thread alone, as both are."""
    with torch.inference_mode(), inference_precision(device):
        yield


def full_precision(device: torch.device) -> torch.autocast:
    """float32 within autocast: on the linear path are the pixels themselves, of which bfloat16 loses whole levels."""
    return torch.autocast(device.type, torch.bfloat16, enabled=False)


def inner_type(device: torch.device) -> torch.dtype:
    """In which layers compute here."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
