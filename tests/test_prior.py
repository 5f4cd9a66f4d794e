import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from vqcodec.models.wavefront import CoarserGrid, Floats, Indices, LevelPrior, Wave, coding_tables, fill_grid, waves

from vqcodec.models import dyadic, wavefront
from vqcodec.models.dyadic import frequencies
from vqcodec.models.pixelsnail import PixelSNAIL, PriorConfig

GROUPS, DIM, CODES, LEVELS = 3, 4, 16, 2
shapes = st.tuples(st.integers(1, 14), st.integers(1, 21))


def make_prior(heads: int = 2, condition: int = 0, seed: int = 0) -> PixelSNAIL:
    torch.manual_seed(seed)
    config = PriorConfig(32, blocks=3, hidden=16, heads=heads, head_channels=8)
    prior = PixelSNAIL(config, GROUPS, DIM, CODES, condition, LEVELS).eval().requires_grad_(False)
    for p in prior.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    return prior


def make_grid(seed: int, batch: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(CODES, (batch, GROUPS, h, w), generator=generator)
    return indices, dyadic.activation(torch.randn(GROUPS, CODES, DIM, generator=generator))


def lookup(indices: Tensor, vectors: Tensor) -> Tensor:
    return torch.cat([vectors[g][indices[:, g]] for g in range(GROUPS)], -1)


@torch.no_grad()
def parallel(prior: PixelSNAIL, indices: Tensor, vectors: Tensor, level: int, condition: Tensor | None) -> Tensor:
    """Tables of a whole grid, (M, B, h w, K)."""
    levels = torch.full((len(indices),), level)
    logits = prior(lookup(indices, vectors), levels, condition)
    return torch.stack([frequencies(row).flatten(1, 2) for row in logits])


def in_steps(condition: Tensor) -> NDArray[np.int16]:
    """Stream values (h, w, C) -> steps (h w, C)."""
    return (condition.flatten(0, 1) * 2**dyadic.STREAM_BITS).short().numpy()


def walk(prior: PixelSNAIL, indices: Tensor, vectors: Tensor, level: int, condition: Tensor | None) -> Tensor:
    """The same from the walk, which is told the indices."""
    h, w = indices.shape[2:]
    tables = torch.zeros(GROUPS, len(indices), h * w, CODES, dtype=torch.int32)
    for b, grid in enumerate(indices.numpy()):

        def told(wave: Wave, group: int, logits: Floats, b: int = b, grid: Indices = grid) -> Indices:
            tables[group, b, wave.cells] = torch.from_numpy(coding_tables(logits))
            return grid[group].reshape(-1)[wave.cells]

        steps = None if condition is None else in_steps(condition[b])
        known = None if steps is None else lambda wave, steps=steps: steps[wave.cells].copy()
        assert np.array_equal(fill_grid(LevelPrior(prior, vectors, level), (h, w), known, told), grid)
    return tables


@given(st.integers(1, 40), st.integers(1, 40))
def test_waves_visit_every_cell_once_after_its_neighbours(h: int, w: int) -> None:
    step_of = {}
    for wave in waves(h, w):
        rows = range(*wave.rows.indices(h))
        cells = list(range(h * w))[wave.cells] if rows else []
        assert [cell // w for cell in cells] == list(rows)
        for cell in cells:
            assert cell not in step_of
            step_of[cell] = wave.step
    assert len(step_of) == h * w and max(step_of.values()) == w + 2 * (h - 1) - 1
    for cell, step in step_of.items():
        i, j = divmod(cell, w)
        for a, b in ((i, j - 1), (i - 1, j - 1), (i - 1, j), (i - 1, j + 1)):
            if a >= 0 and 0 <= b < w:
                assert step_of[a * w + b] < step


@given(shapes, st.integers(0, LEVELS - 1), st.sampled_from([0, 2]), st.integers(0, 1000))
def test_forward_equals_step_bit_for_bit(shape: tuple[int, int], level: int, heads: int, seed: int) -> None:
    prior = make_prior(heads, seed=seed % 3)
    indices, vectors = make_grid(seed, 2, *shape)
    assert torch.equal(parallel(prior, indices, vectors, level, None), walk(prior, indices, vectors, level, None))


@given(shapes, st.integers(0, 1000))
def test_forward_equals_step_with_a_condition(half: tuple[int, int], seed: int) -> None:
    prior = make_prior(heads=0, condition=8)
    coarse = dyadic.activation(torch.randn(1, *half, 8, generator=torch.Generator().manual_seed(seed)))
    with torch.no_grad():
        condition = prior.condition(coarse, torch.tensor([1]))
    indices, vectors = make_grid(seed, 1, 2 * half[0], 2 * half[1])
    expected = parallel(prior, indices, vectors, 1, condition)
    assert torch.equal(expected, walk(prior, indices, vectors, 1, condition))


@given(shapes, st.integers(0, 10**6), st.sampled_from([0, 2]))
def test_an_index_never_changes_an_earlier_probability(shape: tuple[int, int], seed: int, heads: int) -> None:
    h, w = shape
    prior = make_prior(heads)
    indices, vectors = make_grid(seed, 1, h, w)
    cell, group = seed % (h * w), seed % GROUPS
    changed = indices.clone()
    changed.flatten(2)[0, group, cell] += 1
    changed %= CODES
    before, after = (parallel(prior, x, vectors, 0, None) for x in (indices, changed))
    moved = (before != after).any(-1)[:, 0]  # (M, h w)
    i, j = divmod(cell, w)
    for g in range(GROUPS):
        for other in range(h * w):
            a, b = divmod(other, w)
            later = b + 2 * a > j + 2 * i or (other == cell and g > group)
            assert later or not moved[g, other]


def test_the_prior_uses_its_whole_causal_neighbourhood() -> None:
    prior = make_prior(heads=0)
    indices, vectors = make_grid(5, 1, 9, 11)
    base = parallel(prior, indices, vectors, 0, None)[:, 0, 4 * 11 + 5]
    for i, j in ((4, 4), (3, 4), (3, 5), (3, 6)):
        changed = indices.clone()
        changed[:, :, i, j] = (changed[:, :, i, j] + 5) % CODES
        assert not torch.equal(parallel(prior, changed, vectors, 0, None)[:, 0, 4 * 11 + 5], base)


def test_a_wave_computed_in_pieces_gives_the_same_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make_prior()
    indices, vectors = make_grid(9, 1, 9, 14)
    expected = walk(prior, indices, vectors, 1, None)
    product, rng = torch.mm, random.Random(0)

    def in_pieces(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """Any split of the cells, and the inputs of each cell summed in two parts."""
        cut, half = rng.randint(0, x.shape[0]), rng.randint(0, x.shape[1])
        parts = [product(p[:, half:], weight[half:]) for p in (x[:cut], x[cut:])]
        return torch.add(torch.cat(parts), product(x[:, :half], weight[:half]), out=out)

    monkeypatch.setattr(wavefront.torch, "mm", in_pieces)
    assert torch.equal(walk(prior, indices, vectors, 1, None), expected)


def test_tables_are_the_same_in_float64_and_under_every_precision_setting() -> None:
    indices, vectors = make_grid(11, 2, 8, 13)
    expected = parallel(make_prior(), indices, vectors, 0, None)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(setting)
            for count in (1, 2):
                torch.set_num_threads(count)
                assert torch.equal(parallel(make_prior(), indices, vectors, 0, None), expected)
                assert torch.equal(walk(make_prior(), indices, vectors, 0, None), expected)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    double = parallel(make_prior().double(), indices, vectors.double(), 0, None)
    assert torch.equal(double, expected)


@pytest.mark.parametrize("heads", [0, 2])
def test_training_logits_are_close_to_the_exact_ones(heads: int) -> None:
    prior = make_prior(heads)
    indices, vectors = make_grid(3, 2, 10, 10)
    level = torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        exact = prior(lookup(indices, vectors), level)
        with torch.autocast("cpu", torch.bfloat16):
            rough = prior.train()(lookup(indices, vectors), level)
    for a, b in zip(exact, rough, strict=True):
        assert (a - b.float()).abs().mean() < 0.05 * a.std()


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(1, 1), (1, 40), (40, 1), (3, 2), (13, 29), (31, 12)])
def test_the_condition_is_the_same_in_blocks_each_computed_once(
    h: int, w: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wavefront, "BLOCK", 8)
    prior, level, blocks = make_prior(condition=GROUPS * DIM), torch.tensor([1]), 0
    indices, vectors = make_grid(0, 1, h, w)
    assert prior.condition is not None

    def network(indices: Tensor) -> Tensor:
        nonlocal blocks
        blocks += 1
        return prior.condition(lookup(indices, vectors), level)

    whole = in_steps(network(indices)[0])
    condition, blocks = CoarserGrid(network, prior.condition.reach, indices), 0
    for wave in waves(2 * h, 2 * w):
        assert np.array_equal(condition(wave), whole[wave.cells])
        assert len(condition.blocks) <= 3 * -(-h // 4)  # of 4 x 4 coarser cells: a diagonal, not the grid
    assert blocks == -(-h // 4) * -(-w // 4)
