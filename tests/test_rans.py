"""The coder against the specification (`reference_rans`), full tables, and its own guarantees."""

import numpy as np
import pytest
import reference_rans
from constriction import stream
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitstream import kernels, products, rans
from bitstream.errors import DamagedError

Array = NDArray[np.int64]
TOTAL = 2**20

alphabet_sizes = st.sampled_from([2, 3, 256, 512]) | st.integers(2, 512)
# From one column that has almost everything to columns that are all alike.
concentrations = st.sampled_from([1e-3, 0.05, 1.0, 100.0])
seeds = st.integers(0, 2**32 - 1)


def random_tables(rng: np.random.Generator, n: int, k: int, concentration: float) -> Array:
    """(n, k) frequencies: entries >= 1, rows sum to 2**20."""
    tables: Array = 1 + np.floor((TOTAL - k) * rng.dirichlet(np.full(k, concentration), n)).astype(np.int64)
    tables[np.arange(n), tables.argmax(axis=1)] += TOTAL - tables.sum(axis=1)
    return tables


@st.composite
def messages(draw: st.DrawFn) -> tuple[Array, Array]:
    """Tables (n, k) and symbols (n,): some as the tables predict, some drawn with no regard for them."""
    n, k = draw(st.integers(0, 60)), draw(alphabet_sizes)
    rng = np.random.default_rng(draw(seeds))
    tables = random_tables(rng, n, k, draw(concentrations))
    likely = (tables.cumsum(axis=1) <= rng.integers(0, TOTAL, (n, 1))).sum(axis=1)
    predicted = rng.random(n) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return tables, np.where(predicted, likely, rng.integers(0, k, n))


def intervals(tables: Array, symbols: Array) -> tuple[Array, Array]:
    rows = np.arange(len(symbols))
    return (tables.cumsum(axis=1) - tables)[rows, symbols], tables[rows, symbols]


def encode(tables: Array, symbols: Array) -> bytes:
    encoder = rans.Encoder()
    encoder.push(*intervals(tables, symbols))
    return encoder.finish()


@products.njit
def pop(words, place, x, tables, symbols):  # type: ignore[no-untyped-def]
    """What the walk does for each symbol: symbols (n,) of tables (n, k); place and x: the state before and after."""
    four = np.uint64(4)
    for n in range(len(tables)):
        state = kernels.refill(x[0], words, place)
        symbols[n], low = kernels.symbol(state, tables[n], tables.shape[1])
        x[0] = kernels.narrowed(state, np.uint64(low) << four, np.uint64(tables[n, symbols[n]]) << four)


def read(payload: bytes, tables: Array) -> tuple[list[int], bool]:
    """The symbols, and whether nothing is left."""
    words, bounds = rans.split(payload, 1)
    place, x, symbols = bounds[::-1].copy(), np.zeros(1, np.uint64), np.zeros(len(tables), np.int64)
    pop(words, place, x, np.ascontiguousarray(tables, np.int32), symbols)
    return symbols.tolist(), int(x[0]) == 0 and place[0] == place[1]


def decode(payload: bytes, tables: Array) -> Array:
    symbols, empty = read(payload, tables)
    assert empty
    return np.array(symbols, np.int64)


@given(messages())
def test_every_message_round_trips(message: tuple[Array, Array]) -> None:
    tables, symbols = message
    decoded = decode(encode(tables, symbols), tables)
    assert decoded.tolist() == symbols.tolist()


@given(messages())
def test_the_reference_decoder_reads_every_message(message: tuple[Array, Array]) -> None:
    tables, symbols = message
    assert reference_rans.decode(encode(tables, symbols), tables.tolist()) == (symbols.tolist(), True)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), alphabet_sizes, concentrations, seeds)
def test_any_payload_means_the_same_to_the_reference_decoder(
    words: list[int], k: int, concentration: float, seed: int
) -> None:
    payload = np.array([*words, 1], "<u4").tobytes()
    tables = random_tables(np.random.default_rng(seed), 60, k, concentration)
    assert read(payload, tables) == reference_rans.decode(payload, tables.tolist())


@given(messages())
def test_three_columns_give_the_words_of_full_tables(message: tuple[Array, Array]) -> None:
    tables, symbols = message
    coder = stream.stack.AnsCoder()
    model = stream.model.Categorical(perfect=False)
    coder.encode_reverse(symbols.astype(np.int32), model, (16 * tables - 1).astype(np.float32))
    assert encode(tables, symbols) == coder.get_compressed().astype("<u4").tobytes()


@given(messages())
def test_a_payload_is_at_most_8_bytes_and_half_a_percent_too_long(message: tuple[Array, Array]) -> None:
    tables, symbols = message
    ideal = reference_rans.bits(intervals(tables, symbols)[1]) / 8
    assert len(encode(tables, symbols)) <= 1.005 * ideal + 8


@pytest.mark.parametrize("k", [2, 3, 256, 512])
def test_a_long_message_has_the_ideal_length(k: int) -> None:
    rng = np.random.default_rng(k)
    tables = random_tables(rng, 5000, k, 0.3)
    symbols = (tables.cumsum(axis=1) <= rng.integers(0, TOTAL, (5000, 1))).sum(axis=1)
    payload = encode(tables, symbols)
    assert abs(len(payload) - reference_rans.bits(intervals(tables, symbols)[1]) / 8) <= 8 + len(payload) / 1000
    assert (decode(payload, tables) == symbols).all()


@settings(max_examples=20)
@given(messages(), st.integers(0, 60))
def test_how_a_message_is_cut_into_calls_makes_no_difference(message: tuple[Array, Array], at: int) -> None:
    tables, symbols = message
    cumulative, frequency = intervals(tables, symbols)
    encoder = rans.Encoder()
    encoder.push(cumulative[:at], frequency[:at])
    encoder.finish()  # has no effect on what follows
    encoder.push(cumulative[at:], frequency[at:])
    assert encoder.finish() == encode(tables, symbols)


def test_block_borders_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    tables = random_tables(rng, 100, 9, 1.0)
    symbols = rng.integers(0, 9, 100)
    whole = encode(tables, symbols)
    monkeypatch.setattr(rans, "_BLOCK", 7)
    assert encode(tables, symbols) == whole


def test_golden_words_have_not_changed() -> None:
    # If this fails, constriction or our use of it has changed, and no existing file can be read any more.
    four = [[1, TOTAL - 3, 2], [TOTAL - 2, 1, 1], [5, 5, TOTAL - 10], [300000, 400000, 348576]]
    tables = np.array(four * 3)
    symbols = np.array([0, 1, 2, 2, 1, 0, 1, 0, 2, 2, 0, 1])
    payload = bytes.fromhex("f0ffff00e0f9069de9ffff710f0000f1640f0000")
    assert encode(tables, symbols) == payload
    assert decode(payload, tables).tolist() == symbols.tolist()


def test_no_symbols_are_no_bytes() -> None:
    assert rans.Encoder().finish() == b""
    assert decode(b"", np.ones((0, 256), np.int64)).tolist() == []


@pytest.mark.parametrize("likely", [0, 1, 255])
def test_likely_symbols_cost_almost_nothing(likely: int) -> None:
    tables = np.ones((10000, 256), np.int64)
    tables[:, likely] = TOTAL - 255
    symbols = np.full(10000, likely)
    payload = encode(tables, symbols)
    assert len(payload) <= 8
    assert (decode(payload, tables) == symbols).all()


def test_the_smallest_and_the_largest_interval_code_at_both_ends() -> None:
    tables = np.array([[1, TOTAL - 1], [TOTAL - 1, 1]] * 2)
    for symbols in np.ndindex(2, 2, 2, 2):
        assert decode(encode(tables, np.array(symbols)), tables).tolist() == list(symbols)


@pytest.mark.parametrize("payload", [b"\1", b"\1\2\3", b"\1\0\0\0\1", bytes(4), b"\1\0\0\0" + bytes(4)])
def test_a_payload_that_no_encoder_writes_is_refused(payload: bytes) -> None:
    with pytest.raises(DamagedError):
        rans.split(payload, 1)


def test_lanes_that_have_more_words_than_there_are_are_refused_with_both_sizes() -> None:
    with pytest.raises(DamagedError, match="4 bytes of words, its lanes but the last one 8"):
        rans.split(b"\2\1\0\0\0", 2)
    with pytest.raises(DamagedError, match="0 bytes of words, its lanes but the last one 137438953468"):
        rans.split(b"\xff\xff\xff\xff\x7f", 2)


def test_what_is_left_is_refused_in_any_lane() -> None:
    rans.finish([0, 0], [0, 0])
    for states, words in (([1, 0], [0, 0]), ([0, 5], [0, 0]), ([0, 0], [0, 1]), ([0, 0], [3, 0])):
        with pytest.raises(DamagedError, match="bits are left"):
            rans.finish(states, words)


words = st.lists(st.integers(0, 2**32 - 1), max_size=300).map(lambda lane: [*lane, 1] if lane else lane)


@given(st.sampled_from([1, 2, 4, 8]).flatmap(lambda n: st.lists(words, min_size=n, max_size=n)))
def test_lanes_come_back(lanes: list[list[int]]) -> None:
    streams = [np.array(lane, "<u4").tobytes() for lane in lanes]
    found, bounds = rans.split(rans.join(streams), len(lanes))
    assert [found[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)] == lanes


@given(st.binary(max_size=40), st.sampled_from([1, 2, 4, 8]))
def test_any_bytes_are_lanes_or_refused(payload: bytes, lanes: int) -> None:
    try:
        found, bounds = rans.split(payload, lanes)
    except DamagedError:
        return
    streams = [found[a:b].astype("<u4").tobytes() for a, b in zip(bounds, bounds[1:], strict=False)]
    assert rans.join(streams) == payload  # there is one way to write them


@pytest.mark.parametrize(
    ("cumulative", "frequency"),
    [(-1, 5), (5, 0), (5, -3), (TOTAL, 1), (1, TOTAL), (0, TOTAL), (TOTAL - 4, 5), (2**62, 2**62)],
)
def test_intervals_outside_the_table_are_refused(cumulative: int, frequency: int) -> None:
    with pytest.raises(ValueError, match="interval"):
        rans.Encoder().push(np.array([3, cumulative]), np.array([4, frequency]))


def test_intervals_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="intervals"):
        rans.Encoder().push(np.array([3, 4]), np.array([4]))


def test_floats_do_not_get_past_the_door() -> None:
    with pytest.raises(TypeError):
        rans.Encoder().push(np.array([0.0]), np.array([5.0]))
