"""The walk: against the specification, between its directions, and whatever runs it."""

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_weights
import reference_decoder
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from random_weights import TINY, Tensors

from bitstream import container, indices, kernels, products, walk
from bitstream.container import ColourMode, Container, Header
from bitstream.errors import DamagedError, WeightsError
from bitstream.exact import TABLE_TOTAL, lanes
from bitstream.indices import IndexCoder
from bitstream.prior import Prior
from bitstream.walk import Diffusion, Grid
from bitstream.weights import Weights

HERE = Path(__file__).parent
LEVEL = 1
sizes = st.tuples(st.integers(1, 120), st.integers(1, 120))
activities = st.sampled_from([-4.0, -1.5, 0.0, 3.0])


def latents(coder: IndexCoder, size: tuple[int, int], k: int, seed: int) -> NDArray[np.float32]:
    """Mostly small ones, some far from every code."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (*coder.weights.shape(k, *size), coder.weights.grids[k].depth)).astype(np.float32)
    z[rng.random(z.shape) < 0.02] *= 30
    return z


def encode(
    coder: IndexCoder,
    size: tuple[int, int],
    seed: int = 0,
    rate_weight: float = 0.7,
    row: int = LEVEL,
    shares: tuple[float, float] | None = None,
) -> tuple[list[Grid], list[bytes]]:
    """shares: of channels and of cells, that go on to their neighbours."""
    grids: list[Grid] = []
    payloads = []
    for k in range(len(coder.weights.grids)):
        z = latents(coder, size, k, seed)
        diffusion = shares and Diffusion(np.full(z.shape[2], shares[0]), np.full(z.shape[:2], shares[1]))
        grid, payload = coder.encode(row, size, grids, z, rate_weight, diffusion)
        grids.append(grid)
        payloads.append(payload)
    return grids, payloads


def header(coder: IndexCoder, size: tuple[int, int]) -> Header:
    return Header(LEVEL + 1, size[1], size[0], ColourMode.RGB, coder.weights.fingerprint)


def decode(coder: IndexCoder, size: tuple[int, int], payloads: list[bytes]) -> list[Grid]:
    return coder.pop(header(coder, size), payloads)


def same(a: list[Grid], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def to_file(config: dict[str, Any], tensors: Tensors) -> bytes:
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return safetensors.numpy.save(whole, {"format": "vqcodec-2", "config": json.dumps(config)})


@pytest.fixture(scope="module")
def coder() -> IndexCoder:
    return IndexCoder(random_weights.random_weights(active=-1.0))


# --- against the specification ---


@pytest.mark.bounds
@settings(max_examples=8)
@given(st.tuples(st.integers(1, 60), st.integers(1, 60)), activities, st.integers(0, 1000))
def test_the_reference_decoder_reads_what_the_walk_writes(size: tuple[int, int], active: float, seed: int) -> None:
    weights = random_weights.random_weights(active=active, seed=seed)
    coder = IndexCoder(weights)
    reference = reference_decoder.read_weights(to_file({"lambdas": [0.01] * 2, "grids": TINY}, weights.tensors))
    assert reference.fingerprint == weights.fingerprint
    against_reference(coder, reference, size, seed)


@pytest.mark.bounds
def test_attention_beside_a_single_block_is_none() -> None:
    config = {"lambdas": [0.01] * 2, "grids": [{**TINY[0], "prior": {**TINY[0]["prior"], "blocks": 1}}, TINY[1]]}
    weights = Weights(config, random_weights.random_tensors(config, active=-1.0))
    reference = reference_decoder.read_weights(to_file(config, weights.tensors))
    against_reference(IndexCoder(weights), reference, (40, 24), 0)


def against_reference(
    coder: IndexCoder, reference: reference_decoder.Weights, size: tuple[int, int], seed: int
) -> None:
    grids, payloads = encode(coder, size, seed)
    given, codes = None, np.zeros((0, 0, 0), np.int64)
    for k, payload in enumerate(payloads):
        if k:
            given = reference_decoder.condition(reference, k, LEVEL, codes)
        shape = coder.weights.shape(k, *size)
        indices, codes = reference_decoder.decode_grid(reference, k, LEVEL, shape, given, payload)
        assert np.array_equal(indices, grids[k])


@pytest.mark.parametrize("visual", [False, True])
@pytest.mark.parametrize("banks", [1, 2])
def test_a_tune_has_biases_of_its_own_if_the_model_has(banks: int, visual: bool) -> None:
    config, size = {"lambdas": [0.01] * 2, "grids": TINY, "banks": banks}, (40, 24)
    weights = Weights(config, random_weights.random_tensors(config))
    header = Header(LEVEL + 1, size[1], size[0], ColourMode.RGB, weights.fingerprint, visual)
    row = weights.row(header)
    assert row == LEVEL + (2 if banks == 2 and visual else 0)
    grids, payloads = encode(IndexCoder(weights), size, row=row)
    data = container.pack(Container(header, container.checksum(header, grids), tuple(payloads)))
    assert same(indices.decode(data, weights), grids)
    assert same(reference_decoder.decode(data, reference_decoder.read_weights(to_file(config, weights.tensors))), grids)


@pytest.mark.parametrize("rows", [1, 63, 64, 127, 128, 255, 256, 10**6])
def test_lanes_follow_from_the_height_alone(rows: int) -> None:
    assert lanes(rows) == {1: 1, 63: 1, 64: 2, 127: 2, 128: 4, 255: 4}.get(rows, 8)


# --- between its directions ---


@given(sizes, activities, st.integers(0, 1000))
def test_what_is_encoded_comes_back(size: tuple[int, int], active: float, seed: int) -> None:
    coder = IndexCoder(random_weights.random_weights(active=active, seed=seed % 3))
    grids, payloads = encode(coder, size, seed)
    assert same(decode(coder, size, payloads), grids)


@pytest.mark.parametrize("size", [(1100, 40), (40, 1700), (700, 900)])
def test_lanes_and_blocks_of_large_grids_come_back(coder: IndexCoder, size: tuple[int, int]) -> None:
    grids, payloads = encode(coder, size)
    assert same(decode(coder, size, payloads), grids)


@pytest.mark.bounds
@pytest.mark.parametrize("size", [(1100, 40), (40, 1700), (700, 900)])
def test_the_largest_wave_has_room_for_its_intervals(
    coder: IndexCoder, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that is all the room there is, as in pictures of 60 megapixels."""
    expected, payloads = encode(coder, size)
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:  # alone, one waits no more than once for room in a wave
        sleeps.append(seconds)
        assert len(sleeps) < 1000

    monkeypatch.setattr(walk, "INTERVALS", 1)
    monkeypatch.setattr(walk, "cores", lambda: 1)
    monkeypatch.setattr("time.sleep", sleep)
    grids, written = encode(coder, size)
    assert same(grids, expected) and written == payloads


def test_what_goes_on_to_neighbours_does_not_depend_on_threads(
    coder: IndexCoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (600, 200)
    _, plain = encode(coder, size)
    assert all(encode(coder, size, shares=shares)[1] == plain for shares in ((0.0, 1.0), (0.4, 0.0)))
    grids, payloads = encode(coder, size, shares=(0.4, 1.0))
    assert payloads != plain and same(decode(coder, size, payloads), grids)
    for count in (1, 2, 5):
        monkeypatch.setattr(walk, "cores", lambda count=count: count)
        assert encode(coder, size, shares=(0.4, 1.0))[1] == payloads


@pytest.mark.bounds
def test_what_goes_on_to_neighbours_keeps_the_mean(coder: IndexCoder) -> None:
    """Latents too small for any code, as of a sky that is a little off."""
    grid, shape = coder.weights.grids[0], coder.weights.shape(0, 640, 640)
    vectors = Prior(coder.weights, 0, LEVEL).model.vectors
    toward = vectors[0, :, int(np.abs(vectors[0]).sum(0).argmin())]  # the shortest code's
    z = np.zeros((*shape, grid.depth), np.float32)
    z[..., : grid.dim] = 0.45 * toward

    def mean(share: float) -> float:
        diffusion = Diffusion(np.full(grid.depth, share), np.ones(shape))
        indices, _ = coder.encode(LEVEL, (640, 640), [], z, 0.05, diffusion)
        book = np.concatenate([np.zeros((grid.dim, 1)), vectors[0]], 1)
        chosen = book[:, np.minimum(indices[0], grid.codes)].mean((1, 2))
        return float(chosen @ toward / (toward @ toward))

    assert abs(mean(0.0)) < 0.05 and mean(0.48) == pytest.approx(0.45, abs=0.1)


def test_codes_null_and_escapes_all_occur(coder: IndexCoder) -> None:
    grids, _ = encode(coder, (200, 200))
    for grid, config in zip(grids, coder.weights.grids, strict=True):
        assert (grid == 0).any() and ((grid > 0) & (grid <= config.codes)).any()
        assert (grid > config.codes).any() == config.escape


def test_payloads_are_as_long_as_the_bits_say(coder: IndexCoder) -> None:
    size = (600, 300)
    _, payloads = encode(coder, size)
    bits: list[NDArray[np.float32]] = []
    coder.pop(header(coder, size), payloads, bits=bits)
    for k, (payload, cells) in enumerate(zip(payloads, bits, strict=True)):
        ideal = float(cells.sum(dtype=np.float64)) / 8
        assert ideal - 1 <= len(payload) <= 1.005 * ideal + 12 * lanes(coder.weights.shape(k, *size)[0])


def test_without_rate_the_nearest_vector_is_chosen(coder: IndexCoder) -> None:
    size = (64, 48)
    grids: list[Grid] = []
    for k, config in enumerate(coder.weights.grids):
        z = latents(coder, size, k, 3)
        grid, _ = coder.encode(LEVEL, size, grids, z, 0.0)
        grids.append(grid)
        vectors = coder.weights.tensors[f"codebooks.{k}.vectors"].astype(np.float64)
        for g in range(config.groups):
            x = z[..., g * config.dim : (g + 1) * config.dim].astype(np.float64)
            table = np.concatenate([np.zeros((1, config.dim)), vectors[g]])
            if config.escape:
                line = 4.0 * (np.arange(128) - 64)
                table = np.concatenate([table, np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)])
            distance = np.square(x[..., None, :] - table).sum(-1)
            chosen = np.take_along_axis(distance, grid[g][..., None].astype(np.int64), -1)[..., 0]
            assert np.allclose(chosen, distance.min(-1), atol=1e-3)


def test_a_cell_is_chosen_by_its_own_rate_weight(coder: IndexCoder) -> None:
    size = 80, 60
    shape = coder.weights.shape(0, *size)
    dear = np.zeros(shape)
    dear[:, shape[1] // 2 :] = 3
    z = latents(coder, size, 0, seed=0)
    mixed, _ = coder.encode(LEVEL, size, [], z, dear)
    cheap, payload = coder.encode(LEVEL, size, [], z, 0)
    assert same([mixed[:, :, : shape[1] // 2]], [cheap[:, :, : shape[1] // 2]])  # the nearest, whatever it costs
    left, right = np.split(np.count_nonzero(mixed, (0, 1)) / np.count_nonzero(cheap, (0, 1)), 2)
    assert left.min() == 1 and right.max() < 1
    assert coder.encode(LEVEL, size, [], z, np.zeros(shape))[1] == payload


def test_a_higher_rate_weight_costs_less_and_is_further_away(coder: IndexCoder) -> None:
    sizes = [sum(map(len, encode(coder, (200, 200), rate_weight=weight)[1])) for weight in (0.0, 0.5, 2.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_latents_that_are_no_numbers_are_refused(coder: IndexCoder) -> None:
    z = latents(coder, (40, 40), 0, 0)
    for wrong in (np.nan, np.inf):
        z[0, 0, 0] = wrong
        with pytest.raises(ValueError, match="finite"):
            coder.encode(LEVEL, (40, 40), [], z, 1.0)


def test_progress_rises_to_one(coder: IndexCoder) -> None:
    size, seen = (300, 90), []
    _, payloads = encode(coder, size)
    coder.pop(header(coder, size), payloads, seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0 and len(seen) > 4


class Stop(Exception):
    pass


def test_a_progress_function_may_raise(coder: IndexCoder) -> None:
    size = (600, 90)
    _, payloads = encode(coder, size)

    def stop(done: float) -> None:
        raise Stop

    with pytest.raises(Stop):
        coder.pop(header(coder, size), payloads, stop)


# --- the sampler ---


def test_samples_are_reproducible_and_follow_the_temperature(coder: IndexCoder) -> None:
    def active(temperature: float, seed: int = 0) -> float:
        grids = coder.sample(LEVEL, (200, 200), np.random.default_rng(seed), temperature)
        return sum(float((grid > 0).sum()) for grid in grids)

    first, again, other = (coder.sample(LEVEL, (60, 60), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert same(first, again) and not same(first, other)
    assert active(0.3) < active(1.0) < active(3.0)


@pytest.mark.bounds
@pytest.mark.parametrize("temperature", [1e-320, 1e-6, 1e6, 1e300])
def test_extreme_temperatures_are_safe(coder: IndexCoder, temperature: float) -> None:
    draws = [coder.sample(LEVEL, (60, 60), np.random.default_rng(0), temperature) for _ in range(2)]
    assert same(*draws)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_temperatures_that_are_none_are_refused(coder: IndexCoder, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        coder.sample(LEVEL, (60, 60), np.random.default_rng(0), temperature)


def test_a_sample_is_coded_at_the_cost_that_the_prior_expects(coder: IndexCoder) -> None:
    """What is drawn from a prior costs its entropy: a decoder of random words uses one bit of them for each bit."""
    size = (400, 400)
    setting = coder._setting(0, LEVEL, size, [])
    bits = np.zeros((coder.weights.grids[0].groups, *setting.shape), np.float32)
    walk.sample(setting._replace(bits=bits), np.random.default_rng(0))
    assert 0.5 < bits.mean() < 8


# --- damage ---


@pytest.mark.bounds
def test_any_damage_to_a_payload_decodes_or_is_refused(coder: IndexCoder) -> None:
    size = (1100, 30)
    grids, payloads = encode(coder, size)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(payloads[1])
        for at in rng.integers(0, len(damaged), rng.integers(1, 4)):
            damaged[at] ^= 1 << int(rng.integers(8))
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(len(damaged))]
        try:
            found = decode(coder, size, [payloads[0], bytes(damaged)])
        except DamagedError:
            continue
        assert not same(found, grids)


def test_bits_left_in_any_lane_are_refused(coder: IndexCoder) -> None:
    size = (1100, 30)
    _, (top, bottom) = encode(coder, size)
    rows = coder.weights.shape(1, *size)[0]
    words, bounds = walk.rans.split(bottom, lanes(rows))
    streams = [words[a:b].astype("<u4").tobytes() for a, b in zip(bounds, bounds[1:], strict=False)]
    assert walk.rans.join(streams) == bottom
    for n in range(len(streams)):
        longer = [b"\1\2\3\4" + lane if k == n else lane for k, lane in enumerate(streams)]
        with pytest.raises(DamagedError, match="bits are left"):
            decode(coder, size, [top, walk.rans.join(longer)])


def test_an_empty_payload_is_all_null(coder: IndexCoder) -> None:
    size = (1100, 30)
    empty = [walk.rans.join([b""] * lanes(coder.weights.shape(k, *size)[0])) for k in range(2)]
    assert not any(grid.any() for grid in decode(coder, size, empty))


# --- whatever runs it ---


@pytest.mark.bounds
@pytest.mark.parametrize("threads", [1, 2, 4, 8])
def test_the_number_of_threads_changes_nothing(
    coder: IndexCoder, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (1100, 420)  # the coarser grid has two lanes as well
    expected, payloads = encode(coder, size)
    monkeypatch.setattr(walk, "cores", lambda: threads)
    grids, written = encode(coder, size)
    assert same(grids, expected) and written == payloads
    assert same(decode(coder, size, payloads), expected)


def test_many_threads_at_once_get_the_serial_results(coder: IndexCoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "cores", lambda: 2)
    seeds = range(24)
    size = (520, 40)
    expected = [encode(coder, size, seed) for seed in seeds]

    def both(seed: int) -> tuple[list[Grid], list[bytes]]:
        grids, payloads = encode(coder, size, seed)
        assert same(decode(coder, size, payloads), grids)
        return grids, payloads

    with ThreadPoolExecutor(8) as pool:
        for (grids, payloads), (found, written) in zip(expected, pool.map(both, seeds), strict=True):
            assert same(found, grids) and written == payloads


def test_without_threads_one_does_it(coder: IndexCoder, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (1100, 64)
    expected, payloads = encode(coder, size)

    def refuse(self: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(walk, "cores", lambda: 8)
    monkeypatch.setattr("threading.Thread.start", refuse)
    assert same(decode(coder, size, payloads), expected)


def _in_a_process(arguments: tuple[tuple[int, int], list[bytes]]) -> list[Grid]:
    walk.cores = lambda: 2  # type: ignore[assignment]
    return decode(IndexCoder(random_weights.random_weights(active=-1.0)), *arguments)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_decode_alike(coder: IndexCoder, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    monkeypatch.setattr(walk, "cores", lambda: 2)
    size = (600, 40)
    expected, payloads = encode(coder, size)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert same(pool.apply(_in_a_process, ((size, payloads),)), expected)


SETTINGS = {
    "generic processor": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
    "without compiling": {"NUMBA_DISABLE_JIT": "1"},
}
SCRIPT = """
import pickle, sys
from test_walk import IndexCoder, decode, random_weights, same
size, grids, payloads = pickle.load(sys.stdin.buffer)
assert same(decode(IndexCoder(random_weights.random_weights(active=-1.0)), size, payloads), grids)
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_way_to_compute_gives_the_same_indices(coder: IndexCoder, setting: str) -> None:
    size = (40, 50)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), **SETTINGS[setting]}
    message = pickle.dumps((size, *encode(coder, size)))
    subprocess.run([sys.executable, "-c", SCRIPT], input=message, env=environment, check=True)


def test_bitstream_imports_neither_torch_nor_vqcodec() -> None:
    names = [path.stem for path in (HERE.parent / "bitstream").glob("*.py")]
    code = f"import sys, importlib; [importlib.import_module('bitstream.' + n) for n in {names}]; " + (
        "assert not {'torch', 'vqcodec'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)


# --- kernels ---


@products.function
def _table(logits, frequencies):  # type: ignore[no-untyped-def]
    kernels.table(logits, len(logits), frequencies)


@products.njit
def tables_of(logits, out):  # type: ignore[no-untyped-def]
    for r in range(len(logits)):
        _table(logits[r], out[r])


@products.njit
def product_of(x, n, inputs, weight, at, outputs, sums, column):  # type: ignore[no-untyped-def]
    products.add_product(x, n, inputs, weight, at, outputs, sums, column)


@given(st.integers(2, 600), st.integers(0, 10**6), st.sampled_from([1, 20, 300, 5000]))
def test_tables_are_those_of_the_specification(n: int, seed: int, spread: int) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, (3, n)).clip(-2047, 2047).astype(np.int32)
    found = np.empty_like(logits)
    tables_of(logits, found)
    assert found.tolist() == [reference_decoder.table(row.astype(np.int64)).tolist() for row in logits]
    assert (found >= 1).all() and (found.sum(1) == TABLE_TOTAL).all()


def test_the_table_of_every_flag_is_that_of_the_specification() -> None:
    flags = range(-2047, 2048)
    expected = [int(reference_decoder.table(np.array([0, s]))[0]) for s in flags]
    assert kernels._NULL.tolist() == expected


@given(st.integers(0, 32), st.integers(1, 70), st.integers(1, 9), st.integers(0, 9), st.integers(0, 10**6))
def test_products_are_exact(n: int, inputs: int, units: int, first: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps, outputs, column = -(-inputs // 4), 16 * units, 16 * min(first, units)
    x = rng.choice(np.array([0, 1, 128, 255], np.uint8), (32, 4 * steps))
    layer = rng.choice(np.array([-127, 0, 127], np.int8), (outputs, 4 * steps))
    weight = np.concatenate([np.zeros(64, np.int8), layer.reshape(outputs, steps, 4).transpose(1, 0, 2).ravel()])
    sums = rng.integers(-(2**20), 2**20, (32, outputs)).astype(np.int32)
    expected = sums + x.astype(np.int64) @ layer.T.astype(np.int64)
    before = sums.copy()
    product_of(x, n, inputs, weight, 64, outputs, sums, column)
    assert np.array_equal(sums[:n, column:], expected[:n, column:])
    assert np.array_equal(sums[:, :column], before[:, :column])


@pytest.mark.parametrize(
    "change",
    [{"n": 33}, {"n": -1}, {"inputs": 41}, {"at": 1}, {"at": -1}, {"outputs": 48}, {"outputs": 17}, {"column": 8}],
)
def test_products_outside_of_their_arrays_are_refused(change: dict[str, int]) -> None:
    fields = {"n": 32, "inputs": 40, "at": 0, "outputs": 32, "column": 0, **change}
    x, weight, sums = np.zeros((32, 40), np.uint8), np.zeros(40 * 32, np.int8), np.zeros((32, 32), np.int32)
    if products.INTERPRETED:
        pytest.skip("NumPy checks itself")
    with pytest.raises(IndexError):
        product_of(x, fields["n"], fields["inputs"], weight, fields["at"], fields["outputs"], sums, fields["column"])


# --- the cache of compiled code ---

COMPILING = "import bitstream.kernels as a, vqcodec.compiled as b; a.compile_ahead(); b.compile_ahead()"  # as build.py

CACHED = """
import sys
import bitstream, vqcodec
from test_walk import IndexCoder, decode, encode, random_weights, same
from bitstream import kernels
coder = IndexCoder(random_weights.random_weights(active=-1.0))
grids, payloads = encode(coder, (20, 20))
assert same(decode(coder, (20, 20), payloads), grids)
assert bitstream.__file__.startswith(sys.argv[1]), bitstream.__file__
print(sum(sum(kernel.stats.cache_hits.values()) for kernel in (kernels.run, kernels.condition)))
"""

NOWHERE_TO_WRITE = """
from numba.core.caching import _CacheLocator
def refuse(self):
    raise PermissionError
_CacheLocator.ensure_cache_path = refuse
"""

USED = """
import numpy as np, vqcodec, vqcodec.compiled
image = np.random.default_rng(1).integers(0, 256, (40, 72, 3), np.uint8)
for tune in ("psnr", "visual"):
    vqcodec.decode(vqcodec.encode(image, 5, tune=tune))
kernels = {name: kernel for name, kernel in vars(vqcodec.compiled).items() if hasattr(kernel, "stats")}
print([name for name, kernel in kernels.items() if kernel.stats.cache_misses])
"""


def test_what_is_compiled_at_installation_is_found_and_is_enough(tmp_path: Path) -> None:
    site, user = tmp_path / "site", tmp_path / "user"
    for package in ("bitstream", "vqcodec"):
        shutil.copytree(HERE.parent / package, site / package, ignore=shutil.ignore_patterns("__pycache__"))
    plain = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    plain |= {"PYTHONPATH": os.pathsep.join([str(site), str(HERE)]), "OMP_NUM_THREADS": "1"}
    # What numba may write goes elsewhere, as if the packages were another user's.
    reading = {**plain, "NUMBA_CACHE_DIR": str(user)}

    def run(program: str, environment: dict[str, str]) -> str:
        command = [sys.executable, "-c", program, str(site)]
        return subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    run(COMPILING, plain)
    for path in site.rglob("*.py"):
        os.utime(path)  # an installation copies the files
    assert (int(run(CACHED, reading)), run(USED, reading).strip()) == (2, "[]")
    assert not list(user.rglob("*.nb?"))
    assert int(run(NOWHERE_TO_WRITE + CACHED, plain)) == 2
    # Damaged code is compiled afresh, into the user's folder.
    for path in (site / "bitstream").rglob("*.nb?"):
        data = bytearray(path.read_bytes())
        if path.suffix == ".nbi" and "condition" in path.name:  # the index of one
            del data[len(data) // 3 :]
        elif path.suffix == ".nbc" and "run" in path.name:  # the code of the other
            data[len(data) // 2] ^= 255
        path.write_bytes(data)
    assert (int(run(CACHED, reading)), int(run(CACHED, reading))) == (0, 2)


# --- the weights file ---


def changed(**fields: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps({"lambdas": [0.01] * 2, "grids": TINY, "banks": 1}))
    grid = config["grids"][0]
    for name, value in fields.items():
        if name in config:
            config[name] = value
        elif name in grid:
            grid[name] = value
        else:
            grid["prior"][name] = value
    return config


WRONG: list[dict[str, Any]] = [
    {"banks": 0},
    {"banks": 3},
    {"banks": True},
    {"grids": []},
    {"grids": None},
    {"grids": [{}]},
    {"lambdas": []},
    {"lambdas": 3},
    {"blocks": 10**7},
    {"blocks": 5},
    {"blocks": -1},
    {"blocks": 2.0},
    {"groups": 0},
    {"groups": True},
    {"groups": 10**9},
    {"dim": 3},
    {"codes": 60000},
    {"codes": "15"},
    {"escape": 1},
    {"escape": None},
    {"stride": 8},
    {"channels": 10**4},
    {"heads": 3},
    {"flags": None},
    {"hidden": float("nan")},
]


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_a_configuration_that_does_not_fit_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(to_file(changed(**fields), random_weights.random_weights().tensors))
    with pytest.raises(WeightsError, match=str(path)):
        Weights.load(path)


def test_tensors_that_do_not_fit_are_refused() -> None:
    config = changed()
    good = random_weights.random_tensors(config)
    Weights(config, good)
    for name, wrong in {
        "codebooks.0.vectors": np.full((2, 15, 2), np.nan, np.float16),
        "codebooks.1.vectors": np.full((3, 7, 3), np.inf, np.float16),
        "priors.0.embed.weight": good["priors.0.embed.weight"].astype(np.int16),
        "priors.0.embed.exponent": good["priors.0.embed.exponent"] * 0,
        "priors.1.hidden.bias": good["priors.1.hidden.bias"] + 2**20,
        "priors.1.out.weight": np.full_like(good["priors.1.out.weight"], -128),
        "priors.0.attention.position": good["priors.0.attention.position"][:1],
    }.items():
        with pytest.raises(WeightsError, match=name):
            Weights(config, {**good, name: wrong})
    missing = {name: tensor for name, tensor in good.items() if name != "priors.0.embed.bias"}
    with pytest.raises(WeightsError, match=r"priors\.0\.embed\.bias"):
        Weights(config, missing)
    with pytest.raises(WeightsError, match=r"priors\.9"):
        Weights(config, {**good, "priors.9.more": good["priors.0.embed.bias"]})


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(WeightsError, match="no such"):
        Weights.load(path)
    good = to_file(changed(), random_weights.random_weights().tensors)
    for data in (
        b"",
        b"nonsense" * 10,
        good[:200],
        good[:-1],
        safetensors.numpy.save({}),
        good.replace(b"vqcodec-2", b"vqcodec-1"),
    ):
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=str(path)):
            Weights.load(path)


def test_code_of_an_older_state_is_never_taken_for_that_of_a_newer_one(tmp_path: Path) -> None:
    """Not even after a process that stopped between the index of the cache and the code."""
    module = tmp_path / "older.py"
    source = "import sys\nfrom bitstream.kernels import kernel\n@kernel\ndef f(x):\n    return {}\n"
    source += "if __name__ == '__main__':\n    exec(sys.argv[1])\n    print(f(1))\n"
    stop = "import os; f._cache._cache_file._save_data = lambda *_: os._exit(9)"

    def run(text: str, before: str = "") -> tuple[int, str]:
        module.write_text(source.format(text))
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run([sys.executable, module, before], env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout

    assert run("x + 1") == (0, "2\n")
    assert run("100 * x", stop) == (9, "")
    assert run("100 * x") == (0, "100\n")
