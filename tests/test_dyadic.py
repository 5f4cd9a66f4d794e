import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitstream.exact import AROUND, POWERS
from vqcodec.models import dyadic
from vqcodec.models.dyadic import DyadicLinear, Offsets, attend, attend_smoothly, frequencies, snap
from vqcodec.models.pixelsnail import HERE, TAPS


def random_sums(seed: int, *shape: int) -> torch.Tensor:
    """Numbers like a prior's sums: multiples of 2**-16."""
    return torch.round(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2**18) / 2**16


def python_table(logits: list[float]) -> list[int]:
    """Section 6 of the specification, in Python's integers."""
    steps = [max(-2047, min(2047, int(np.floor(x * 32 + 0.5)))) for x in logits]
    distance = [max(steps) - s for s in steps]
    weights = [int(2 ** (20 - (d % 32) / 32) + 0.5) >> (d // 32) for d in distance]
    table = [1 + (2**20 - len(weights)) * w // sum(weights) for w in weights]
    table[0] += 2**20 - sum(table)
    return table


@given(st.integers(0, 10**6), st.sampled_from([2, 3, 16, 256, 512]), st.sampled_from([0.0, 0.1, 1.0, 8.0, 100.0]))
def test_frequencies_are_the_specified_integers(seed: int, size: int, spread: float) -> None:
    logits = random_sums(seed, 3, size) * spread
    logits = torch.floor(logits * 2**12) / 2**12
    table = frequencies(logits)
    assert table.dtype == torch.int32
    assert table.tolist() == [python_table(row) for row in logits.tolist()]
    assert (table.sum(-1) == 2**20).all() and (table >= 1).all()


def test_the_remainder_goes_to_the_first_index() -> None:
    table = frequencies(torch.zeros(1, 3))[0].tolist()
    assert table == [349526, 349525, 349525]


def test_table_of_powers_is_frozen() -> None:
    numbers = POWERS.astype("<i8")
    assert hashlib.sha256(numbers.tobytes()).hexdigest()[:16] == "10f1cb69846b5aeb"


@given(st.integers(1, 9), st.integers(0, 10**6))
def test_snap_gives_steps_within_range(bits: int, seed: int) -> None:
    x = random_sums(seed, 100) * 10
    y = snap(x, bits, -127, 127) * 2**bits
    assert (y == y.round()).all() and y.abs().max() <= 127
    inside = (x * 2**bits).abs() < 127
    assert ((y - x * 2**bits).abs()[inside] <= 0.5).all()


@given(st.integers(0, 10**6), st.sampled_from([1e-6, 1e-3, 1.0, 30.0]))
def test_weights_on_their_grid_stay_there(seed: int, spread: float) -> None:
    layer = DyadicLinear(20, 7, levels=2)
    with torch.no_grad():
        layer.weight.copy_(random_sums(seed, 7, 20) * spread)
        layer.weight[3] = 0
        layer.bias.copy_(random_sums(seed + 1, 2, 7))
        weight, bias = layer.on_grid()
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        again = layer.on_grid()
    assert torch.equal(again[0], weight) and torch.equal(again[1], bias)


def worst_case(fan_in: int) -> tuple[DyadicLinear, torch.Tensor]:
    """The largest sums there are: every weight and activation at its limit, some of either sign."""
    layer = DyadicLinear(fan_in, 8, levels=1)
    signs = torch.sign(torch.randn(8, fan_in, generator=torch.Generator().manual_seed(0)))
    signs[0] = 1
    with torch.no_grad():
        layer.weight.copy_(signs * 127 * 2.0**-10)
        layer.bias.fill_(1e9)
    return layer, torch.cat([torch.full((5, fan_in), 127 * 2.0**-5), dyadic.activation(random_sums(1, 50, fan_in))])


def integers_of(layer: DyadicLinear, x: torch.Tensor) -> torch.Tensor:
    """The sums in steps of 2**-15, in int64."""
    with torch.no_grad():
        weight, bias = layer.on_grid()
    return (x.double() * 2**5).long() @ (weight.double() * 2**10).long().t() + (bias[0].double() * 2**15).long()


@pytest.mark.parametrize("fan_in", [1, 640, dyadic.MAX_FAN_IN])
def test_sums_are_exact_in_any_order_and_precision(fan_in: int) -> None:
    layer, x = worst_case(fan_in)
    integers = integers_of(layer, x)
    with torch.no_grad():
        y = layer.at(torch.tensor(0))(x)
        weight, bias = layer.on_grid()
        assert integers.abs().max() < 2**24 - 2**16
        assert torch.equal((y.double() * 2**15).long(), integers)
        order = torch.randperm(fan_in)
        assert torch.equal(x[:, order] @ weight[:, order].t() + bias, y)
        assert torch.equal((x.double() @ weight.double().t() + bias.double()).float(), y)
        # bf16 holds activations and weights unchanged, so hardware that narrows the inputs computes the same
        assert torch.equal(x.bfloat16().float(), x) and torch.equal(weight.bfloat16().float(), weight)


def test_too_long_dot_products_are_refused() -> None:
    with pytest.raises(ValueError, match="not exact"):
        DyadicLinear(dyadic.MAX_FAN_IN + 1, 1, levels=1)


@given(st.integers(0, 10**6))
def test_attention_is_exact_integer_arithmetic(seed: int) -> None:
    scores = dyadic.logit(random_sums(seed, 4, 9) * 3).masked_fill(random_sums(seed + 1, 4, 9) > 0, -torch.inf)
    values = dyadic.activation(random_sums(seed + 2, 9, 5))
    result = attend(scores * 32, values.double() * 32) / 32
    for row in range(4):
        keys = [(s, v) for s, v in zip(scores[row].tolist(), values.tolist(), strict=True) if s > -torch.inf]
        keys.append((0.0, [0.0] * 5))
        top = max(s for s, _ in keys)
        weights = [int(dyadic.POWERS[min(int((top - s) * 32), 4094)]) for s, _ in keys]
        for c in range(5):
            total = sum(w * round(v[c] * 32) for w, (_, v) in zip(weights, keys, strict=True))
            assert result[row, c] * 32 == (2 * total + sum(weights)) // (2 * sum(weights))
    order = torch.randperm(9)
    assert torch.equal(attend(scores[:, order] * 32, values[order].double() * 32) / 32, result)
    smooth = attend_smoothly(scores, values)
    assert (smooth - result).abs().max() <= 2.0**-5


def test_gradients_pass_straight_through_and_stop_at_the_clip() -> None:
    x = torch.tensor([0.1, -0.2, 100.0], requires_grad=True)
    dyadic.activation(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 1.0, 0.0]


def compared(seed: int, width: int, run: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]) -> None:
    """What training on a CPU computes from bfloat16 sums is what float32 gives, to the bit; gradients are near."""
    torch.manual_seed(seed)
    sums, bias, values = 3 * torch.randn(2, 3, 5, width).bfloat16(), torch.randn(2, width), 3 * torch.randn(2, 3, 5, 4)
    values = dyadic.stream(values)
    found = []
    for precision in (sums, sums.float()):
        leaves = [x.clone().requires_grad_() for x in (precision, bias, values)]
        out = run(*leaves)
        torch.manual_seed(seed)
        weights = [torch.randn(x.shape).bfloat16().float() for x in out]
        torch.autograd.backward(sum((x * w).sum() for x, w in zip(out, weights, strict=True)))
        found.append(([x.float() for x in out], [x.grad.float() for x in leaves if x.grad is not None]))
    (fused, gradients), (plain, expected) = found
    assert all(torch.equal(a, b) for a, b in zip(fused, plain, strict=True))
    torch.testing.assert_close(gradients, expected, rtol=0.02, atol=0.02)


@given(st.integers(0, 1000))
def test_activations_of_fused_sums_are_those_of_separate_steps(seed: int) -> None:
    compared(seed, 6, lambda sums, bias, values: [dyadic.relu_of(sums, bias) + 0 * values.sum()])


@given(st.integers(0, 1000), st.booleans(), st.sampled_from([HERE, TAPS, AROUND]))
def test_fused_additions_to_the_stream_are_those_of_separate_steps(seed: int, gates: bool, offsets: Offsets) -> None:
    compared(seed, 8 if gates else 4, lambda sums, bias, values: dyadic.add(values, sums, bias, offsets, gates))


@given(st.integers(0, 1000), st.sampled_from([0.0, 1e-40, 1e-6, 1e-2, 1.0, 30.0]))
def test_compiled_weights_on_their_grid_are_those_of_torch(seed: int, spread: float) -> None:
    weight = torch.randn(9, 20, generator=torch.Generator().manual_seed(seed)) * spread
    weight[0, 0], weight[1] = 127.49 / 2**9, 0.0
    weight[2], weight[3] = 127.5 / 2**9, -1.0 / 2**3
    bias, mask = torch.randn(2, 9), torch.rand(9, 20) < 0.8
    exact = dyadic.on_grid(weight.double(), bias, mask)  # float64 is left to torch
    compiled = dyadic.on_grid(weight, bias, mask)
    assert torch.equal(compiled[0].double(), exact[0]) and torch.equal(compiled[1], exact[1])
