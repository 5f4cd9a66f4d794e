"""Exact layers: everything that feeds a probability is computed without rounding error.

A value is *dyadic* when it is a whole number times a power of two. Three grids are used:

===========  ==========  ==========================  =======================================
name         step        range                       where
===========  ==========  ==========================  =======================================
activation   2**-5       -127 .. 127 steps           what enters a dot product
stream       2**-9       -2047 .. 2047 steps         the residual stream between blocks
logit        2**-5       -2047 .. 2047 steps         log2 probabilities and attention scores
===========  ==========  ==========================  =======================================

Weights are whole numbers in [-127, 127] times a power of two, one power per output channel. A dot product of at
most ``MAX_FAN_IN`` activations with weights, bias included, stays below 2**24 steps: every partial sum is exact
in float32, so the order of summation, the number of threads, fused multiply-adds, TF32 and bf16 inputs (8-bit
numbers pass through them unchanged) make no difference. Rounding is ``floor(x / step + 1/2)``.

Training uses the same layers with straight-through gradients: the trained network *is* the exact network.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitstream.exact import (
    ACTIVATION_BITS,
    ACTIVATION_MAX,
    BIAS_MAX,
    EXPONENT_MAX,
    EXPONENT_MIN,
    GATE_MAX,
    LOGIT_BITS,
    LOGIT_MAX,
    MAX_FAN_IN,
    POWERS,
    STREAM_BITS,
    STREAM_MAX,
    TABLE_BITS,
    WEIGHT_MAX,
)
from vqcodec import compiled
from vqcodec.compiled import rows_of

_POWERS = torch.from_numpy(POWERS).double()  # whole numbers, for exact sums

Affine = Callable[[Tensor], Tensor]
Offsets = tuple[tuple[int, int], ...]  # rows and columns to other cells


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent for whole exponents in -126..127; exact on every device, as ``pow`` and ``ldexp`` need not be."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


class _Snap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        y = _snap(x, bits, low, high).to(dtype)
        ctx.save_for_backward(y)
        ctx.range = low * 2.0**-bits, high * 2.0**-bits
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        low, high = ctx.range
        return gradient * ((y > low) & (y < high)), None, None, None, None


def _snap(x: Tensor, bits: int, low: int, high: int) -> Tensor:
    return (x * 2.0**bits).add_(0.5).floor_().clamp_(low, high).mul_(2.0**-bits)


def snap(x: Tensor, bits: int, low: int, high: int, dtype: torch.dtype | None = None) -> Tensor:
    """Round to steps of 2**-bits and clip to [low, high] steps; the gradient passes inside of the limits."""
    dtype = dtype or x.dtype
    if torch.is_grad_enabled() and x.requires_grad:
        return _Snap.apply(x, bits, low, high, dtype)
    return _snap(x, bits, low, high).to(dtype)


def activation(x: Tensor, low: int = -ACTIVATION_MAX) -> Tensor:
    """Under autocast in its narrow type, which holds activations exactly: what follows moves half the bytes."""
    device = x.device.type
    narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return snap(x, ACTIVATION_BITS, low, ACTIVATION_MAX, narrow)


def relu(x: Tensor) -> Tensor:
    return activation(x, 0)


def wide(x: Tensor) -> Tensor:
    """Out of autocast's narrow type, which holds neither stream nor logit values."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def stream(x: Tensor) -> Tensor:
    return snap(wide(x), STREAM_BITS, -STREAM_MAX, STREAM_MAX)


def logit(x: Tensor) -> Tensor:
    return snap(wide(x), LOGIT_BITS, -LOGIT_MAX, LOGIT_MAX)


def gated(x: Tensor) -> Tensor:
    """(..., 2C) -> (..., C): value times gate, where gate = clip(b/4 + 1/2, 0, 1) in steps of 2**-6."""
    value, gate = x.chunk(2, -1)
    return activation(value) * snap(gate * 0.25 + 0.5, 6, 0, GATE_MAX)


def shifted(x: Tensor, offsets: Offsets) -> Tensor:
    """Neighbours side by side: (B, h, w, C) -> (B, h, w, len(offsets) * C), zeros outside the grid."""
    h, w = x.shape[1:3]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    return torch.cat([padded[:, 1 + i : 1 + i + h, 1 + j : 1 + j + w] for i, j in offsets], -1)


def fused(sums: Tensor) -> bool:
    """Whether what follows these sums runs compiled, in one pass: in training on a CPU."""
    return sums.dtype == torch.bfloat16 and sums.device.type == "cpu"


def biased(sums: Tensor, bias: Tensor) -> Tensor:
    """Sums (B, ..., C) with the biases (B, C) of their samples."""
    return sums + bias.view(len(bias), *(1,) * (sums.ndim - 2), -1).to(sums.dtype)


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, bias: Tensor) -> Tensor:
        out = sums.new_empty(sums.shape)
        compiled.relu(*map(rows_of, (sums, bias, out)))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        (out,) = ctx.saved_tensors
        to_sums, to_bias = torch.empty_like(out), out.new_zeros(len(out), out.shape[-1], dtype=torch.float32)
        compiled.relu_backward(*map(rows_of, (out, gradient, to_sums, to_bias)))
        return to_sums, to_bias


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, sums: Tensor, bias: Tensor, gates: bool, offsets: Offsets
    ) -> tuple[Tensor, Tensor]:
        b, h, w, c = values.shape
        ctx.layout = gates, h, np.array(offsets)
        out, taps = values.new_empty(values.shape, dtype=torch.float32), sums.new_empty(b, h, w, len(offsets) * c)
        compiled.add(*map(rows_of, (values, sums, bias)), *ctx.layout, rows_of(out), rows_of(taps))
        ctx.save_for_backward(sums, bias, out)
        return out, taps

    @staticmethod
    def backward(ctx: Any, to_out: Tensor, to_taps: Tensor) -> tuple[Tensor | None, ...]:
        sums, bias, out = ctx.saved_tensors
        found = torch.empty_like(out), torch.empty_like(sums), torch.zeros_like(bias)
        rest = (out, to_out, to_taps, *found)
        total = np.empty(out.shape[-1], np.float32)
        compiled.add_backward(rows_of(sums), rows_of(bias), *ctx.layout, total, *map(rows_of, rest))
        return *found, None, None


def relu_of(sums: Tensor, bias: Tensor) -> Tensor:
    """Activations from 0 up of sums (B, h, w, C) and biases (B, C)."""
    return _Relu.apply(sums, bias) if fused(sums) else relu(biased(sums, bias))


def add(
    values: Tensor | None, sums: Tensor, bias: Tensor, offsets: Offsets, gates: bool = True
) -> tuple[Tensor, Tensor]:
    """To stream values (B, h, w, C), None for zeros, what sums and biases say: values and gates, (B, h, w, 2 C), or
    stream values, (B, h, w, C). Returns the new stream values, and their activations in the cells at the offsets, side
    by side: (B, h, w, len(offsets) * C)."""
    if fused(sums):
        values = sums.new_zeros(sums.shape, dtype=torch.float32) if values is None else values
        return _Add.apply(values, sums, bias, gates, offsets)
    x = biased(sums, bias)
    x = gated(x) if gates else stream(x)
    x = x if values is None else stream(values + x)
    return x, shifted(activation(x), offsets)


class _SnapWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.mask = mask
        weight = weight if mask is None else weight * mask
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            out = weight.new_empty(weight.shape)
            exponent = weight.new_empty(*weight.shape[:-1], 1, dtype=torch.int32)
            compiled.snap_weight(*map(rows_of, (weight, out, exponent)))
        else:
            step = power_of_two(weight_exponent(weight))
            out = (weight / step + 0.5).floor_().clamp_(-WEIGHT_MAX, WEIGHT_MAX) * step
            exponent = weight_exponent(out)
        ctx.mark_non_differentiable(exponent)
        return out, exponent.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, None]:
        return gradient if ctx.mask is None else gradient * ctx.mask, None


def weight_exponent(weight: Tensor) -> Tensor:
    """Smallest power of two, per output channel, in which the largest weight is at most 127: (..., out, 1) int32.

    Guarantee: weights already on their grid keep it, so saving and loading changes nothing.
    """
    mantissa, exponent = torch.frexp(weight.abs().amax(-1, keepdim=True))
    exponent = exponent - 7 + (mantissa >= (WEIGHT_MAX + 0.5) / (WEIGHT_MAX + 1)).int()
    return exponent.clamp(EXPONENT_MIN, EXPONENT_MAX)


def on_grid(weight: Tensor, bias: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights (..., out, in) and biases (..., out) as the exact numbers that are used.

    The bias has the step of the sums: the activation step times the weight step of its channel.
    """
    weight, exponent = _SnapWeight.apply(weight, mask)
    step = power_of_two(exponent - ACTIVATION_BITS)
    return weight, snap(bias / step, 0, -BIAS_MAX, BIAS_MAX) * step


class DyadicLinear(nn.Module):
    """Affine map from activations (..., in) to exact sums (..., out).

    levels: number of biases, one for each quality level; with 1 all levels share it. mask: (out, in) bool, the weights
    that may differ from 0, None for all.
    """

    mask: Tensor | None

    def __init__(
        self, fan_in: int, fan_out: int, levels: int, *, gain: float = 1.0, mask: Tensor | None = None
    ) -> None:
        super().__init__()
        if fan_in > MAX_FAN_IN:
            raise ValueError(f"a dot product of {fan_in} terms is not exact in float32: the limit is {MAX_FAN_IN}")
        self.weight = nn.Parameter(torch.randn(fan_out, fan_in) * gain / fan_in**0.5)
        self.bias = nn.Parameter(torch.zeros(levels, fan_out))
        self.register_buffer("mask", mask, persistent=False)

    def on_grid(self) -> tuple[Tensor, Tensor]:
        """The weight (out, in) and the biases (levels, out) as the exact numbers that are used."""
        return on_grid(self.weight, self.bias, self.mask)

    def at(self, level: Tensor) -> Affine:
        """The map at one quality level, (), or at a level for each leading entry of what it is applied to, (B,)."""
        weight, biases = self.on_grid()
        bias = biases[level if len(biases) > 1 else torch.zeros_like(level)]
        return lambda x: biased(F.linear(x, weight), bias) if level.ndim else F.linear(x, weight, bias)

    def sums(self, x: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Of activations (B, ..., in) at the levels (B,): the sums without biases, (B, ..., out), and the biases of the
        samples, (B, out)."""
        weight, biases = self.on_grid()
        return F.linear(x, weight), biases[level]


@functools.cache
def _powers(device: torch.device) -> Tensor:
    return _POWERS.to(device)


def weights_of_two(distance: Tensor) -> Tensor:
    """2**-distance on the integer table: distance in 0 .. 2 * LOGIT_MAX steps held as floats; float64 whole numbers."""
    return _powers(distance.device).index_select(0, distance.int().flatten()).view_as(distance)


def frequencies(logits: Tensor) -> Tensor:
    """Integer coding tables from the prior's logits.

    logits: (..., K) exact sums.  Returns (..., K) int32, rows sum to 2**20, every entry >= 1.
    Guarantee: the same on every device, and the same as ``kernels.table``. Every number is a whole number below 2**53;
    the one division is correctly rounded, and its quotient is further from the next whole number than that rounding
    can move it.
    """
    steps = logit(logits) * 2.0**LOGIT_BITS
    weights = weights_of_two(steps.amax(-1, keepdim=True) - steps)
    total = weights.sum(-1, keepdim=True)
    table = weights.mul_(2**TABLE_BITS - steps.shape[-1]).div_(total).floor_().add_(1)
    table[..., 0] += 2**TABLE_BITS - table.sum(-1)
    return table.int()


def table_bits(logits: Tensor) -> Tensor:
    """Bits of every symbol, (..., K) float64, by the tables of ``frequencies``."""
    return TABLE_BITS - frequencies(logits).double().log2()


def attend(scores: Tensor, values: Tensor) -> Tensor:
    """Exact softmax attention, base 2, with a silent extra key (score 0, value 0) so that no row is empty.

    scores: (..., Q, N) logits in whole steps, -inf where a key is not allowed; values: (..., N, C) float64 activations
    in whole steps. Returns (..., Q, C) float64 activations in whole steps.
    """
    top = scores.amax(-1, keepdim=True).clamp_(min=0)
    weights = weights_of_two((top - scores).clamp_(max=2 * LOGIT_MAX))
    total = weights.sum(-1, keepdim=True) + weights_of_two(top)
    return torch.floor((2 * (weights @ values) + total) / (2 * total))


def attend_smoothly(scores: Tensor, values: Tensor) -> Tensor:
    """The differentiable form of ``attend`` for training: equal up to a step, but not in steps."""
    silent = torch.zeros_like(scores[..., :1])
    weights = torch.softmax(torch.cat([scores, silent], -1) * 0.6931471805599453, -1)[..., :-1]
    return activation(wide(weights @ values.to(weights.dtype)))
