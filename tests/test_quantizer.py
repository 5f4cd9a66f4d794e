"""The choice of indices, the codebooks' learning, and rows of groups."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitstream.exact import ESCAPE_SIDE, ESCAPE_STEP
from vqcodec.config import PriorConfig
from vqcodec.models import pixelsnail
from vqcodec.models.pixelsnail import PixelSNAIL, Units, grouped, per_row, rows_of
from vqcodec.models.quantizer import Choice, Codebook, code_length, flag_bits, put

GROUPS, CODES, CELLS = 3, 8, 60
LEVEL = torch.arange(CELLS) % 2


def make_book(learning: str = "ema", escape: bool = True, seed: int = 0) -> Codebook:
    torch.manual_seed(seed)
    book = Codebook(GROUPS, CODES, 2, levels=2, escape=escape, learning=learning)  # type: ignore[arg-type]
    book.initialise(torch.randn(GROUPS, 200, 2) * 3)
    return book.requires_grad_(False)


def nearest(book: Codebook, z: Tensor) -> Choice:
    """Without rate; the outcome that is not null is never wrong about itself."""
    bits = torch.zeros(z.shape[:2])
    logits = torch.zeros(1, book.outcomes)
    return book.choose(z, bits, bits, lambda rows: (logits, torch.zeros_like(rows.place)), torch.zeros(z.shape[1]))


def everything(book: Codebook, z: Tensor) -> tuple[Tensor, Tensor]:
    """All candidates of each latent: vectors (M, cells, 1 + N, d), null first, a point of the lattice last."""
    cells = z.shape[1]
    vectors = torch.nn.functional.pad(book.vectors, (0, 0, 1, 0))[:, None].expand(-1, cells, -1, -1)
    if book.escape:
        half = ESCAPE_SIDE // 2
        point = (z / ESCAPE_STEP).round().clamp(-half, half - 1) * ESCAPE_STEP
        vectors = torch.cat([vectors, point[:, :, None]], 2)
    return vectors, (z[:, :, None] - vectors).pow(2).sum(-1)


@given(st.integers(0, 1000), st.booleans(), st.sampled_from([0.0, 0.7, 1.0]), st.sampled_from([1.0, 5.0, 40.0]))
def test_the_choice_has_the_least_cost_of_all(seed: int, escape: bool, weight: float, spread: float) -> None:
    book = make_book(escape=escape, seed=seed)
    z = torch.randn(GROUPS, CELLS, 2) * spread
    null, active = flag_bits(2 * torch.randn(GROUPS, CELLS))
    table = torch.randn(GROUPS, CELLS, book.outcomes).log_softmax(-1) / math.log(2)
    logits = table + torch.randn(GROUPS, CELLS, 1)  # a constant changes nothing
    weights = weight * (0.5 + torch.rand(CELLS))
    choice = book.choose(z, null, active, lambda rows: (logits.flatten(0, 1), rows.place), weights)
    _, distance = everything(book, z)
    bits = torch.cat([null[..., None], active[..., None] - table], -1)
    if escape:
        bits[..., -1] += 2 * math.log2(ESCAPE_SIDE)
    cost = distance + weights[:, None] * bits
    found = cost.gather(-1, book.outcome(choice.indices)[..., None])[..., 0]
    torch.testing.assert_close(found, cost.amin(-1), rtol=1e-4, atol=1e-3)
    assert torch.equal(choice.vectors, book.lookup(choice.indices))


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("escape", [False, True])
def test_the_compiled_choice_is_that_of_torch(escape: bool, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    book = make_book(escape=escape)
    weights = weight * torch.rand(CELLS)
    z = (torch.randn(CELLS, GROUPS, 2) * 4).transpose(0, 1)  # as it lies in a channels-last tensor
    null, active = flag_bits(torch.randn(CELLS, GROUPS).t())
    logits = torch.randn(GROUPS * CELLS, book.outcomes)
    compiled = book.choose(z, null, active, lambda rows: (logits, rows.place), weights, True)
    monkeypatch.setattr(book, "_choose_compiled", book._choose)
    plain = book.choose(z, null, active, lambda rows: (logits, rows.place), weights, True)
    assert torch.equal(compiled.indices, plain.indices) and torch.equal(compiled.vectors, plain.vectors)
    torch.testing.assert_close(compiled.rate_gradient, plain.rate_gradient, rtol=1e-3, atol=1e-3)


def test_a_latent_that_no_code_is_near_goes_to_the_lattice_and_back() -> None:
    book = make_book()
    z = torch.tensor([[[100.3, -255.0], [251.0, 400.0], [0.01, 0.0]]]).expand(GROUPS, -1, -1)
    choice = nearest(book, z)
    assert choice.vectors[0].tolist() == [[100.0, -256.0], [252.0, 252.0], [0.0, 0.0]]
    assert (choice.indices[0] == torch.tensor([CODES + 1 + 128 * 89, CODES + 1 + 128 * 127 + 127, 0])).all()
    assert int(choice.indices.max()) < 2**16


def test_the_rate_gradient_is_that_of_the_expected_rate() -> None:
    book, weight = make_book(), torch.ones(CELLS)
    z = torch.randn(GROUPS, CELLS, 2) * 4
    null, active = flag_bits(torch.randn(GROUPS, CELLS))
    table = torch.randn(GROUPS, CELLS, book.outcomes).log_softmax(-1) / math.log(2)
    choice = book.choose(z, null, active, lambda rows: (table.flatten(0, 1), rows.place), weight, True)
    vectors, _ = everything(book, z)
    bits = torch.cat([null[..., None], active[..., None] - table], -1)
    bits[..., -1] += 2 * math.log2(ESCAPE_SIDE)
    moved = z.clone().requires_grad_()
    cost = (moved[:, :, None] - vectors).pow(2).sum(-1) + bits
    (expected,) = torch.autograd.grad((torch.softmax(-cost, -1) * bits).sum(), moved)
    sure = z.pow(2).sum(-1) + weight * null <= weight * active
    assert 0 < sure.sum() < sure.numel() and not choice.rate_gradient[sure].any()
    torch.testing.assert_close(choice.rate_gradient[~sure], expected[~sure], rtol=1e-3, atol=1e-3)


def test_without_the_prior_frequent_codes_are_preferred() -> None:
    book = make_book()
    book.usage.fill_(1e-6)
    book.usage[0, :, 0], book.usage[1, :, 3] = 1.0, 1.0
    z = torch.zeros(GROUPS, CELLS, 2) + book.vectors[:, None, 2] / 2  # between null and a code
    index = book.guess(z, LEVEL, torch.full((CELLS,), 100.0))
    assert index[:, LEVEL == 0].unique().tolist() == [0] and index[:, LEVEL == 1].unique().tolist() == [3]


def test_code_length_and_its_gradient_are_those_of_cross_entropy() -> None:
    logits = torch.randn(5, 7, 16, requires_grad=True)
    index = torch.randint(16, (5, 7))
    bits = code_length(logits, index)
    (gradient,) = torch.autograd.grad((bits * torch.arange(7)).sum(), logits)
    reference = -torch.log_softmax(logits * math.log(2), -1).gather(-1, index[..., None])[..., 0] / math.log(2)
    (expected,) = torch.autograd.grad((reference * torch.arange(7)).sum(), logits)
    torch.testing.assert_close(bits, reference)
    torch.testing.assert_close(gradient, expected)


@given(st.integers(0, 1000), st.floats(0, 1))
def test_grouped_products_and_their_gradients_are_those_of_each_group(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    rows = rows_of(torch.rand(GROUPS, CELLS) < share)
    x = torch.randn(len(rows.place), 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(GROUPS, 4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(GROUPS, 4, dtype=torch.float64, requires_grad=True)
    out = grouped(x, weight, rows, bias)
    reference = (weight[rows.place // CELLS] @ x[..., None])[..., 0] + bias[rows.place // CELLS]
    torch.testing.assert_close(out, reference)
    torch.testing.assert_close(
        torch.autograd.grad(out.square().sum(), (x, weight, bias)),
        torch.autograd.grad(reference.square().sum(), (x, weight, bias)),
    )
    back = put(out.detach(), rows, GROUPS, CELLS)
    assert torch.equal(back.flatten(0, 1)[rows.place], out.detach())


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_rows_of_fixed_number_are_the_same_and_padding(share: float) -> None:
    torch.manual_seed(0)
    mask = torch.rand(GROUPS, CELLS) < share
    exact, fixed = rows_of(mask), pixelsnail.fixed_rows_of(mask, 100)
    n = min(len(exact.place), 100)
    assert torch.equal(fixed.place[:n], exact.place[:n]) and (fixed.place[n:] == GROUPS * CELLS).all()
    assert torch.equal(fixed.ends[:-1], exact.ends[:-1].clamp(max=100)) and fixed.ends[-1] == 100
    values = torch.arange(100.0)
    back = put(values, fixed, GROUPS, CELLS).flatten()
    assert torch.equal(back[fixed.place[:n]], values[:n]) and back.count_nonzero() <= n
    assert per_row(torch.arange(GROUPS), fixed, CELLS).max() < GROUPS


def test_only_asked_rows_are_computed_and_they_are_those_of_all() -> None:
    torch.manual_seed(0)
    prior = PixelSNAIL(PriorConfig(16, 1, flags=4, hidden=8), GROUPS, 2, CODES, 0, 2).eval()
    codes = torch.randint(-5, 6, (2, 5, 6, GROUPS * 2)) / 32
    level = torch.tensor([0, 1])
    _, units = prior(codes, level)
    everywhere = rows_of(torch.ones(GROUPS, CELLS, dtype=torch.bool))
    mask = torch.rand(GROUPS, CELLS) < 0.3
    some = rows_of(mask)
    assert torch.equal(prior.logits(units, some), prior.logits(units, everywhere)[some.place])


def test_fused_logits_and_their_gradients_are_those_of_separate_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    prior = PixelSNAIL(PriorConfig(16, 1, flags=4, hidden=8), GROUPS, 2, CODES, 0, 2)
    known = (torch.randint(-127, 128, (2, 5, 6, 16 + GROUPS * 2)) / 32).bfloat16()
    rows = rows_of(torch.rand(GROUPS, CELLS) < 0.3)
    found = []
    for fused in (True, False):
        monkeypatch.setattr(pixelsnail.dyadic, "fused", lambda sums, fused=fused: fused)
        with torch.autocast("cpu", torch.bfloat16):
            units = Units(*prior.hidden.sums(known, torch.tensor([0, 1])))
            logits = prior.logits(units, rows)
        gradients = torch.autograd.grad(logits.square().sum(), (prior.hidden.weight, prior.hidden.bias))
        found.append((logits.float(), *gradients))
    for fused_part, plain in zip(*found, strict=True):
        assert (fused_part - plain).norm() < 0.02 * plain.norm()


def test_ema_moves_codes_to_the_mean_of_their_latents() -> None:
    torch.manual_seed(0)
    book = Codebook(1, codes=2, dim=2, levels=1)
    centres = torch.tensor([[5.0, 5.0], [-5.0, -5.0]])
    book.initialise(centres[None].repeat(1, 8, 1))
    for _ in range(1500):
        z = centres[torch.randint(2, (1, 64))] + 0.1 * torch.randn(1, 64, 2)
        book.update(z, nearest(book, z), torch.zeros(64, dtype=torch.long))
    assert torch.cdist(book.vectors[0].detach(), centres).amin(0).max() < 0.1


def test_the_first_codes_reach_rare_latents_too() -> None:
    torch.manual_seed(0)
    z = 0.01 * torch.randn(2, 1000, 2)
    far = torch.tensor([[10.0, 0], [0, 10], [-10, 0], [0, -10]])
    z[:, ::250] = far
    book = Codebook(2, codes=8, dim=2, levels=1)
    book.initialise(z)
    for vectors in book.vectors.detach():
        assert torch.cdist(far, vectors).amin(1).max() < 0.1


def test_fewer_latents_than_codes_are_enough_to_begin() -> None:
    book = Codebook(1, codes=8, dim=2, levels=1)
    book.initialise(torch.ones(1, 3, 2))
    assert torch.equal(book.vectors, torch.ones(1, 8, 2))


def test_dead_codes_go_where_latents_are_fitted_worst() -> None:
    torch.manual_seed(0)
    book = Codebook(1, codes=4, dim=2, levels=1)
    book.vectors.data[0] = torch.tensor([[3.0, 0], [1, 0], [0, 1], [1e4, 1e4]])  # the last is never chosen
    book.count[0] = torch.tensor([100.0, 100, 100, 0])
    book.total.copy_(book.vectors * book.count[..., None])
    z = 0.1 * torch.randn(1, 400, 2)
    z[0, 7] = torch.tensor([30.0, 30])
    for _ in range(8):
        book.update(z, nearest(book, z), torch.zeros(400, dtype=torch.long))
    assert (book.vectors[0, 3] - 30).abs().max() < 1e-4


def test_use_is_counted_by_level_and_kept_where_a_level_is_not_seen() -> None:
    book = make_book()
    index = torch.zeros(GROUPS, CELLS, dtype=torch.long)
    index[:, LEVEL == 1] = 5
    for _ in range(500):
        book.update(torch.zeros(GROUPS, CELLS, 2), Choice(index, book.lookup(index), torch.zeros(0)), LEVEL)
    before = book.usage.clone()
    assert book.log2_usage().argmax(-1).tolist() == [[0] * GROUPS, [5] * GROUPS]
    book.update(
        torch.zeros(GROUPS, CELLS, 2), Choice(index, book.lookup(index), torch.zeros(0)), torch.ones_like(LEVEL)
    )
    assert torch.equal(book.usage[0], before[0]) and not torch.equal(book.usage[1], before[1])


@pytest.mark.parametrize("learning", ["ema", "loss"])
def test_codes_learn_by_gradient_only_with_the_codebook_loss(learning: str) -> None:
    book = Codebook(1, codes=2, dim=2, levels=1, learning=learning)  # type: ignore[arg-type]
    assert book.vectors.requires_grad == (learning == "loss")


def test_indices_fit_two_bytes_or_the_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="65536"):
        Codebook(1, codes=10, dim=3, levels=1, escape=True)
