"""The training form of a prior, a whole grid at once, against the walk that codes with it."""

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from bitstream import rans
from bitstream.exact import ESCAPE_BITS, TABLE_BITS
from bitstream.indices import IndexCoder
from bitstream.walk import Grid
from vqcodec.config import GridConfig, ModelConfig, PriorConfig
from vqcodec.models.dyadic import frequencies
from vqcodec.models.pixelsnail import rows_of
from vqcodec.models.vqvae import VQVAE
from vqcodec.weights import as_coded

STRIDE, LEVELS = 8, 2
shapes = st.tuples(st.integers(1, 20), st.integers(1, 13))
Interval = tuple[int, int]


def make_model(seed: int = 0) -> tuple[VQVAE, IndexCoder]:
    """A small model of two grids, and its coder."""
    torch.manual_seed(seed)
    priors = PriorConfig(24, blocks=3, flags=5, hidden=12, heads=2, head_channels=8), PriorConfig(16, 2, 4, 8)
    grids = (
        GridConfig(8, groups=3, dim=2, codes=9, prior=priors[0], escape=True),
        GridConfig(4, groups=2, dim=3, codes=7, prior=priors[1]),
    )
    model = VQVAE(ModelConfig("small", (0.01, 0.02), channels=(8, 8), blocks=1, grids=grids))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("priors."):
                p.add_(torch.randn_like(p) * 0.1)
            elif name.endswith(".vectors"):
                p.copy_(torch.randn_like(p) * 3)
    model, weights = as_coded(model)
    return model, IndexCoder(weights)


MODEL, CODER = make_model()


def encode(shape: tuple[int, int], level: int, seed: int) -> tuple[list[Grid], list[list[Interval]]]:
    """Grids of random latents for a coarsest grid of this shape, and what the walk gives the coder, in coding order."""
    rng, grids, intervals = np.random.default_rng(seed), [], []
    size = STRIDE * shape[0], STRIDE * shape[1]
    for k, config in enumerate(CODER.weights.grids):
        z = rng.normal(0, 2.5, (*CODER.weights.shape(k, *size), config.depth)).astype(np.float32)
        z[rng.random(z.shape) < 0.02] *= 20
        pushed: list[Interval] = []
        with pytest.MonkeyPatch.context() as patch:

            def push(self: Any, low: Any, frequency: Any, pushed: list[Interval] = pushed) -> None:
                pushed.extend(zip(low.tolist(), frequency.tolist(), strict=True))

            patch.setattr(rans.Encoder, "push", push)
            grid, _ = CODER.encode(level, size, grids, z, 0.5)
        grids.append(grid)
        intervals.append(pushed)
    return grids, intervals


def tensor(grid: Grid) -> Tensor:
    return torch.from_numpy(grid.astype(np.int64))[None]


@torch.no_grad()
def tables(k: int, grids: list[Grid], level: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """By the training form: the tables of all flags (M, cells, 2), and of all outcomes (M, cells, N)."""
    levels, index = torch.tensor([level]), tensor(grids[k])
    condition = MODEL.condition(k, tensor(grids[k - 1]), levels) if k else None
    book, prior = MODEL.codebooks[k], MODEL.priors[k]
    flat = index[0].flatten(1)
    seen = book.activations(book.lookup(flat), 1, *index.shape[2:])
    flags, units = prior(seen, levels, condition)
    logits = prior.logits(units, rows_of(torch.ones_like(flat, dtype=torch.bool)))
    both = torch.stack([torch.zeros_like(flags), flags], -1)
    return frequencies(both).numpy(), frequencies(logits).unflatten(0, flat.shape).numpy()


def expected(k: int, grids: list[Grid], level: int, lane: tuple[int, int] = (0, 1)) -> list[Interval]:
    """The intervals of a lane, number and of how many, in coding order, by the training form's tables."""
    flags, outcomes = tables(k, grids, level)
    config = CODER.weights.grids[k]
    _, h, w = grids[k].shape
    found = []
    number, count = lane
    cells = ((i, j) for i, j in np.ndindex(h, w) if i % count == number)
    for i, j in sorted(cells, key=lambda cell: (cell[1] + 2 * cell[0], cell[0])):
        for g in range(config.groups):
            index, cell = int(grids[k][g, i, j]), i * w + j
            null = int(flags[g, cell, 0])
            found.append((0, null) if index == 0 else (null, int(flags[g, cell, 1])))
            if index:
                outcome = min(index - 1, config.codes)
                table = outcomes[g, cell]
                found.append((int(table[:outcome].sum()), int(table[outcome])))
                if outcome == config.codes:
                    one = 1 << TABLE_BITS - ESCAPE_BITS
                    place = index - 1 - config.codes
                    found += [(one * (place // 128**c % 128), one) for c in reversed(range(config.dim))]
    return found


@settings(max_examples=30)
@given(shapes, st.integers(0, LEVELS - 1), st.integers(0, 1000))
def test_training_and_coding_agree_bit_for_bit(shape: tuple[int, int], level: int, seed: int) -> None:
    grids, intervals = encode(shape, level, seed)
    for k in range(len(grids)):
        assert intervals[k] == expected(k, grids, level)


def test_they_agree_where_a_wave_is_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """35 cells of the coarsest grid, in two lanes."""
    size, pushed = (68 * STRIDE, 70 * STRIDE), defaultdict(list)

    def push(self: rans.Encoder, low: NDArray[Any], frequency: NDArray[Any]) -> None:
        pushed[id(self)].extend(zip(low.tolist(), frequency.tolist(), strict=True))

    monkeypatch.setattr(rans.Encoder, "push", push)
    shape = CODER.weights.shape(0, *size)
    z = np.random.default_rng(0).normal(0, 3, (*shape, CODER.weights.grids[0].depth)).astype(np.float32)
    grid, _ = CODER.encode(0, size, [], z, 0.5)
    lanes = [expected(0, [grid], 0, (lane, 2)) for lane in range(2)]
    assert sorted(pushed.values()) == sorted(lanes)


@settings(max_examples=30)
@given(shapes, st.integers(0, 10**6), st.integers(0, 1))
def test_an_index_never_changes_an_earlier_probability(shape: tuple[int, int], seed: int, k: int) -> None:
    grids, _ = encode(shape, 0, seed % 7)
    m, h, w = grids[k].shape
    g, i, j = np.unravel_index(seed % grids[k].size, (m, h, w))
    changed = list(grids)
    changed[k] = grids[k].copy()
    changed[k][g, i, j] = (changed[k][g, i, j] + 3) % 8
    for before, after in zip(tables(k, grids, 0), tables(k, changed, 0), strict=True):
        moved = (before != after).any(-1).reshape(m, h, w)
        for other, a, b in np.argwhere(moved):
            assert b + 2 * a > j + 2 * i or (a == i and b == j and other > g)


def test_the_prior_uses_its_whole_causal_neighbourhood_and_the_coarser_grid() -> None:
    grids, _ = encode((5, 6), 0, 5)
    base = tables(1, grids, 0)[0][:, 4 * 12 + 5]
    for k, i, j in ((1, 4, 4), (1, 3, 4), (1, 3, 5), (1, 3, 6), (0, 2, 2), (0, 3, 3)):
        changed = list(grids)
        changed[k] = grids[k].copy()
        changed[k][:, i, j] = (changed[k][:, i, j] + 3) % 8
        assert not np.array_equal(tables(1, changed, 0)[0][:, 4 * 12 + 5], base)


def test_tables_are_the_same_in_float64_and_under_every_precision_setting() -> None:
    grids, _ = encode((6, 9), 0, 11)
    wanted = [tables(k, grids, 0) for k in range(2)]
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()

    def check() -> None:
        for k, (flags, outcomes) in enumerate(wanted):
            found = tables(k, grids, 0)
            assert np.array_equal(found[0], flags) and np.array_equal(found[1], outcomes)

    try:
        for setting in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(setting)
            for count in (1, 2):
                torch.set_num_threads(count)
                check()
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_training_logits_are_close_to_the_exact_ones() -> None:
    grids, _ = encode((9, 9), 0, 3)
    prior, book, level = MODEL.priors[0], MODEL.codebooks[0], torch.tensor([0])
    seen = book.activations(book.lookup(tensor(grids[0])[0].flatten(1)), 1, 9, 9)
    with torch.no_grad():
        exact, _ = prior(seen, level)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                rough, _ = prior.train()(seen, level)
        finally:
            prior.eval()
    assert (exact - rough.float()).abs().mean() < 0.05 * exact.std()
