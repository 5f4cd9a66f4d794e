"""The walk over one grid: what encoder, decoder and sampler do between a file's lanes and a grid's indices.

Cells (i, j) of a wave t = j + 2 i do not depend on each other: everything that a cell's probabilities depend on belongs
to earlier waves. Within a wave, each thread has the rows of some lanes, and goes to the next wave when all threads have
done the last one.

Why plain threads, and not numba's: its default layer aborts when two threads of a program enter it at once, OpenMP's
hangs after a fork. Threads of Python know no such rules. They live for one walk, spend it in compiled code without the
interpreter's lock, and wait for each other by looking at a number in memory. A thread that looks in vain for some
microseconds goes to sleep for a while, so that a machine with fewer cores than threads gets on.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitstream import kernels, rans
from bitstream.errors import UsageError
from bitstream.exact import AROUND, ATTENTION_ROWS, ATTENTION_WAVES, CAUSAL, CONDITION_BLOCKS, lanes
from bitstream.kernels import BLOCK, CHUNK, CONDITION_COLUMNS, WAVES, ZERO, Coder, ConditionRoom, Room, Walk
from bitstream.prior import Prior, aligned, padded
from bitstream.records import pack
from bitstream.team import Team

Grid = NDArray[np.uint16]
Floats = NDArray[np.float32]
Tell = Callable[[int], None]

PAUSE = 50e-6  # seconds that a thread sleeps when others are behind
AT_ONCE = 16  # waves between two reports
INTERVALS = 2**14  # of a lane, in the memory of the kernel, or more where a wave has more


class Setting(NamedTuple):
    """What all walks have in common. coarser: indices (M, h / 2, w / 2) of the next coarser grid, if there is one;
    bits: (M, h, w), gets the bits of each index; tell: called with numbers of cells that are done."""

    prior: Prior
    shape: tuple[int, int]
    coarser: Grid | None = None
    bits: Floats | None = None
    tell: Tell | None = None


class Diffusion(NamedTuple):
    """What is left of a cell's latents, less its codes, goes on to the cells to the right and below (error diffusion:
    Floyd and Steinberg, 1976). To each, in channel c of a cell: channels[c] (M d,) times that cell's entry of cells
    (h, w), float32, together less than 1/2."""

    channels: Floats
    cells: Floats


def decode(setting: Setting, payload: bytes) -> Grid:
    """The indices (M, h, w) of a payload. Raises DamagedError."""
    words, bounds = rans.split(payload, lanes(setting.shape[0]))
    coder = _reading(words, bounds)
    grid = _fill(setting, coder, [])
    rans.finish([int(x) for x in coder.state[:, 0]], [int(end - first) for end, first in coder.place[:, :2]])
    return grid


def encode(
    setting: Setting, latents: Floats, rate_weights: ArrayLike, diffusion: Diffusion | None = None
) -> tuple[Grid, bytes]:
    """The indices (M, h, w) of least |z - e|^2 + rate_weight * bits for latents z (h, w, M d), and their payload.

    rate_weights: one for all cells, or one for each, (h, w). diffusion: none by default.

    ValueError for latents that are not finite.
    """
    grid, streams = setting.prior.grid, lanes(setting.shape[0])
    if latents.shape != (*setting.shape, grid.depth) or not np.isfinite(latents).all():
        raise ValueError(f"latents must be finite, (h, w, M d) = {(*setting.shape, grid.depth)}, not {latents.shape}")
    most = -(-_most(setting.shape) // streams) * grid.groups * (2 + grid.dim)
    channels, cells = diffusion or (np.zeros(grid.depth, np.float32), np.zeros((0, 0), np.float32))
    coder = Coder(
        encode=True,
        state=aligned((streams, 8), np.uint64),
        place=aligned((streams, 8), np.int64),
        words=np.zeros(0, np.uint32),
        intervals=np.empty((streams, 2, max(most, INTERVALS)), np.int32),
        latents=np.array(latents, np.float32, order="C"),  # a copy: what is left of them takes their place
        rate_weights=np.array(np.broadcast_to(rate_weights, setting.shape), np.float64),
        channels=np.ascontiguousarray(channels, np.float32),
        cells=np.ascontiguousarray(cells, np.float32),
        temperature=1.0,
    )
    encoders = [rans.Encoder() for _ in range(streams)]
    found = _fill(setting, coder, encoders)
    return found, rans.join([encoder.finish() for encoder in encoders])


def sample(setting: Setting, generator: np.random.Generator, temperature: float = 1.0) -> Grid:
    """Indices (M, h, w) drawn from the prior: a decoder of random words does that.

    temperature: logits are divided by it, so that below 1 the likely indices come more often. UsageError unless it is
    positive and finite.
    """
    if not 0 < temperature < float("inf"):
        raise UsageError(f"the temperature must be positive and finite, not {temperature}")
    (h, w), streams = setting.shape, lanes(setting.shape[0])
    # One word for each index: on average it takes a few bits at most, 9 of 32 if all of a group's codes are alike.
    each = -(-h // streams) * w * setting.prior.grid.groups + 2
    words = generator.integers(1, 2**32, streams * each, np.uint32)
    return _fill(setting, _reading(words, np.arange(streams + 1) * each, temperature), [])


def _reading(words: NDArray[np.uint32], bounds: NDArray[np.int64], temperature: float = 1.0) -> Coder:
    """A decoder of lanes: the words of lane n from bounds[n] to bounds[n + 1]."""
    streams = len(bounds) - 1
    place = aligned((streams, 8), np.int64)
    place[:, 0], place[:, 1] = bounds[1:], bounds[:-1]
    return Coder(
        encode=False,
        state=aligned((streams, 8), np.uint64),
        place=place,
        words=words,
        intervals=np.empty((streams, 2, 0), np.int32),
        latents=np.empty((0, 0, 0), np.float32),
        channels=np.empty(0, np.float32),
        cells=np.empty((0, 0), np.float32),
        rate_weights=np.empty((0, 0)),
        temperature=float(temperature),
    )


def cores() -> int:
    """Threads that a walk may use: the cores that this process may run on, fewer if OMP_NUM_THREADS says so."""
    affinity = getattr(os, "sched_getaffinity", None)  # not everywhere
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(count, int(wanted))) if wanted.isdecimal() else count


def _most(shape: tuple[int, int]) -> int:
    """Cells of the largest wave."""
    return min(shape[0], (shape[1] + 1) // 2)


def _fill(setting: Setting, coder: Coder, encoders: Sequence[rans.Encoder]) -> Grid:
    """The one loop behind encoding, decoding and sampling: fills a grid (M, h, w), wave by wave."""
    prior, (h, w) = setting.prior, setting.shape
    model, streams = prior.model, len(coder.place)
    # A power of two divides the number of lanes, which is one as well.
    with Team(1 << min(streams, cores()).bit_length() - 1) as team:
        walk = _walk(setting, team.size)
        shared = [pack(record) for record in (prior.net, model, walk, coder)]
        rooms = [pack(_room(model)) for _ in range(team.size)]

        def conditions(part: int) -> None:
            assert prior.condition is not None and setting.coarser is not None
            net, room = pack(prior.condition), pack(_condition_room(prior.condition, setting.coarser.shape))
            for down, right in blocks[part :: team.size]:
                kernels.condition(net, room, setting.coarser, prior.coarser, down, right, walk.condition)

        def waves(part: int) -> None:
            t = first
            while t < last and not team.failed:
                reached = kernels.run(*shared, rooms[part], part, t, min(t + AT_ONCE, last))
                for lane in range(part, streams, team.size) if coder.encode else ():
                    encoders[lane].push(*coder.intervals[lane, :, : coder.place[lane, 2]])
                    coder.place[lane, 2] = 0
                if reached == t:
                    time.sleep(PAUSE)
                elif part == 0 and setting.tell:
                    setting.tell(sum(_cells(setting.shape, wave) for wave in range(t, reached)))
                t = reached

        # The waves that cross a block begin and end with multiples of BLOCK: a block is computed when the first one
        # comes, and its place is free when the last one has gone.
        for first in range(0, w + 2 * (h - 1), BLOCK):
            last = min(first + BLOCK, w + 2 * (h - 1))
            if prior.condition is not None:
                blocks = list(_blocks(setting.shape, first // BLOCK))
                team.run(conditions)
            team.run(waves)
    return walk.grid


def _cells(shape: tuple[int, int], t: int) -> int:
    """Cells of a wave."""
    h, w = shape
    return max(0, min(h - 1, t // 2) - max(0, (t - w + 2) // 2) + 1)


def _blocks(shape: tuple[int, int], number: int) -> Iterator[tuple[int, int]]:
    """Blocks whose first wave is number * BLOCK."""
    for down in range(-(-shape[0] // BLOCK)):
        if 0 <= (right := number - 2 * down) < -(-shape[1] // BLOCK):
            yield down, right


def _walk(setting: Setting, parts: int) -> Walk:
    model, (h, w) = setting.prior.model, setting.shape
    rows = _most(setting.shape) + 1  # with the row above the wave
    conditioned = h if setting.prior.condition is not None else 0
    # With this wave's place, because some of its cells still look at the oldest wave when others are known already.
    ring = (rows + ATTENTION_ROWS - 1 if model.heads else 0, ATTENTION_WAVES + 1, model.attention)
    bits = np.zeros((0, 0, 0), np.float32) if setting.bits is None else setting.bits
    return Walk(
        height=h,
        width=w,
        published=aligned((parts, 8), np.int64),
        condition=aligned((conditioned, min(w, CONDITION_COLUMNS), model.channels), np.int16),
        code_ring=np.full((WAVES, rows, model.codes), ZERO, np.uint8),
        rings=np.full((model.blocks, WAVES, rows, model.channels), ZERO, np.uint8),
        keys=np.zeros(ring, np.int8),
        values=np.zeros(ring, np.int8),
        grid=np.zeros((model.groups, h, w), np.uint16),
        bits=bits,
    )


def _room(model: kernels.Model) -> Room:
    m, d, c, codes, attention = model.groups, model.dim, model.channels, model.codes, model.attention
    units, window = m * model.flags, ATTENTION_ROWS * ATTENTION_WAVES

    def rows(width: int, dtype: type, count: int = CHUNK) -> NDArray[np.generic]:
        return aligned((count, width), dtype)

    return Room(
        taps=rows(max(len(CAUSAL) * codes, (1 + len(CAUSAL)) * c, 2 * attention), np.uint8),
        narrow=rows(max(c, attention), np.uint8),
        known=rows(c + codes, np.uint8),
        seen=rows(c + codes, np.uint8),
        sums=rows(max(2 * c, 2 * attention), np.int32),
        units=rows(units, np.int32),
        stream=rows(c, np.int32),
        query=rows(attention, np.int8),
        score=np.zeros(window, np.int32),
        place=np.zeros((window, 2), np.int32),
        weighted=np.zeros(model.head_channels, np.int64),
        flag=rows(padded(m), np.int32, 1),
        unit=rows(model.flags, np.uint8, 1),
        hidden=rows(model.hidden, np.uint8, 1),
        hidden_sums=rows(model.hidden, np.int32, 1),
        logits=rows(padded(model.outcomes), np.int32, 1),
        frequencies=np.zeros(model.outcomes, np.int32),
        distance=np.zeros(model.vectors.shape[2], np.float32),
        code=np.full((1, padded(2 * d)), ZERO, np.uint8),
        entry=np.zeros(d, np.int64),
    )


def _condition_room(net: kernels.Network, shape: tuple[int, ...]) -> ConditionRoom:
    """shape: of the coarser grid."""
    inputs, width = net.layers[0, 2:]
    rows, columns = (min(size, BLOCK // 2 + 2 * (1 + CONDITION_BLOCKS)) for size in shape[1:])
    return ConditionRoom(
        cells=np.empty((rows + 2, columns + 2, inputs // len(AROUND)), np.uint8),
        read=np.empty((rows + 2, columns + 2, width), np.uint8),
        stream=np.empty((rows, columns, width), np.int32),
        taps=np.empty((CHUNK, max(inputs, len(AROUND) * width)), np.uint8),
        narrow=np.empty((CHUNK, width), np.uint8),
        sums=np.empty((CHUNK, net.layers[:, 3].max()), np.int32),
    )
