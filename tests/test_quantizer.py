import math

import pytest
import torch

from vqcodec.models.quantizer import Codebook, choose, code_length, rate_gradient


def make_book(learning: str = "ema", groups: int = 2, codes: int = 8, dim: int = 3) -> Codebook:
    torch.manual_seed(0)
    book = Codebook(groups, codes, dim, levels=2, learning=learning)  # type: ignore[arg-type]
    book.initialise(torch.randn(groups, 4, 50, dim) * 3)
    return book


def test_without_rate_the_nearest_code_is_chosen() -> None:
    book = make_book()
    z = torch.randn(4, 50, 3) * 3
    index = choose(book.closeness(z, 1), torch.zeros(8), 0.0)
    assert torch.equal(index, torch.cdist(z, book.vectors[1].expand(4, -1, -1)).argmin(-1))


def test_with_rate_a_likely_code_wins_over_a_slightly_nearer_one() -> None:
    closeness = -torch.tensor([[1.0, 1.2]])
    log2_p = torch.log2(torch.tensor([[0.1, 0.9]]))
    assert choose(closeness.clone(), log2_p, 0.0).item() == 0
    assert choose(closeness.clone(), log2_p, 1.0).item() == 1


def test_code_length_and_its_gradient_are_those_of_cross_entropy() -> None:
    logits = torch.randn(5, 7, 16, requires_grad=True)
    index = torch.randint(16, (5, 7))
    bits = code_length(logits, index)
    (gradient,) = torch.autograd.grad((bits * torch.arange(7)).sum(), logits)
    reference = -torch.log_softmax(logits * math.log(2), -1).gather(-1, index[..., None])[..., 0] / math.log(2)
    (expected,) = torch.autograd.grad((reference * torch.arange(7)).sum(), logits)
    torch.testing.assert_close(bits, reference)
    torch.testing.assert_close(gradient, expected)


def test_rate_gradient_is_that_of_the_expected_rate() -> None:
    vectors, log2_p = torch.randn(16, 3).double(), torch.randn(10, 16).double().softmax(-1).log2()
    z = torch.randn(10, 3).double().requires_grad_()
    cost = -(z[:, None] - vectors).pow(2).sum(-1) + log2_p
    expected_rate = -(torch.softmax(cost, -1) * log2_p).sum()
    (expected,) = torch.autograd.grad(expected_rate, z)
    torch.testing.assert_close(rate_gradient(cost.detach(), log2_p, vectors), expected)


def test_ema_moves_codes_to_the_mean_of_their_latents() -> None:
    book = make_book(groups=1, codes=2, dim=2)
    centres = torch.tensor([[5.0, 5.0], [-5.0, -5.0]])
    for _ in range(1500):
        z = centres[torch.randint(2, (1, 1, 64))] + 0.1 * torch.randn(1, 1, 64, 2)
        index = choose(book.closeness(z[0], 0), torch.zeros(2), 0.0)[None]
        book.update(z, index, torch.zeros(1, dtype=torch.long))
    assert torch.cdist(book.vectors[0], centres).amin(0).max() < 0.1


def test_the_first_codes_reach_rare_latents_too() -> None:
    torch.manual_seed(0)
    z = 0.01 * torch.randn(2, 1, 1000, 2)
    far = torch.tensor([[10.0, 0], [0, 10], [-10, 0], [0, -10]])
    z[:, 0, ::250] = far
    book = Codebook(2, codes=8, dim=2, levels=1)
    book.initialise(z)
    for vectors in book.vectors:
        assert torch.cdist(far, vectors).amin(1).max() < 0.1


def test_fewer_latents_than_codes_are_enough_to_begin() -> None:
    book = Codebook(1, codes=8, dim=2, levels=1)
    book.initialise(torch.ones(1, 1, 3, 2))
    assert torch.equal(book.vectors, torch.ones(1, 8, 2))


def test_dead_codes_go_where_latents_are_fitted_worst() -> None:
    torch.manual_seed(0)
    book = make_book(groups=1, codes=4, dim=2)
    book.vectors.data[0] = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1e4, 1e4]])  # the last is never chosen
    book.count[0] = torch.tensor([100.0, 100, 100, 0])
    book.total.copy_(book.vectors * book.count[..., None])
    z = 0.1 * torch.randn(1, 1, 400, 2)
    z[0, 0, 7] = torch.tensor([30.0, 30])
    index = choose(book.closeness(z[0, 0], 0), torch.zeros(4), 0.0)[None, None]
    book.update(z, index, torch.zeros(1, dtype=torch.long))
    assert (book.vectors[0, 3] - 30).abs().max() < 1e-4


def test_dead_codes_are_seeded_anew_from_data() -> None:
    book = make_book()
    book.vectors.data[0, 3] = 1e4  # never chosen
    for _ in range(1000):
        z = torch.randn(2, 2, 50, 3)
        index = torch.stack([choose(book.closeness(z[g], g), torch.zeros(8), 0.0) for g in range(2)])
        book.update(z, index, torch.tensor([0, 1]))
    assert book.vectors[0, 3].norm() < 20


def test_use_is_counted_by_level() -> None:
    book = make_book()
    z, index = torch.randn(2, 2, 50, 3), torch.zeros(2, 2, 50, dtype=torch.long)
    index[:, 1] = 5
    for _ in range(500):
        book.update(z, index, torch.tensor([0, 1]))
    assert book.log2_usage().argmax(-1).tolist() == [[0, 0], [5, 5]]


@pytest.mark.parametrize("learning", ["ema", "loss"])
def test_codes_learn_by_gradient_only_with_the_codebook_loss(learning: str) -> None:
    assert make_book(learning).vectors.requires_grad == (learning == "loss")
