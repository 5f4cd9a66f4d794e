"""From a file to its indices, and from latents to indices and payloads: what every machine does alike.

``IndexCoder`` knows weights and formats, and nothing of pictures. Grids come coarsest first, each (M, h, w) uint16.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bitstream import container, walk
from bitstream.container import DEFAULT_MAX_PIXELS, Container, Header
from bitstream.errors import DamagedError, ModelMismatchError
from bitstream.prior import Prior
from bitstream.walk import Diffusion, Grid, Setting, Tell
from bitstream.weights import Weights

Progress = Callable[[float], None]


def decode(
    data: bytes,
    weights: Weights | str | Path,
    progress: Progress | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> list[Grid]:
    """The index grids of a file, checked against its checksum. Raises BitstreamError, WeightsError."""
    coder = IndexCoder(weights if isinstance(weights, Weights) else Weights.load(weights))
    return coder.decode(container.unpack(data, max_pixels=max_pixels), progress)


class IndexCoder:
    """Reads and writes the indices of files that belong to some weights.

    Guarantee: indices and bytes are the same whatever the number of threads; an object may be used by several threads
    at once.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._priors: dict[tuple[int, int], Prior] = {}

    def decode(self, parts: Container, progress: Progress | None = None) -> list[Grid]:
        """The grids of a file, checked against its checksum. Raises BitstreamError."""
        grids = self.pop(parts.header, self._all(parts), progress)
        container.verify(parts, grids)
        return grids

    def examine(self, parts: Container) -> list[tuple[Grid, NDArray[np.float32]]]:
        """As ``decode``, and the bits of every index (M, h, w)."""
        bits: list[NDArray[np.float32]] = []
        grids = self.pop(parts.header, self._all(parts), bits=bits)
        container.verify(parts, grids)
        return list(zip(grids, bits, strict=True))

    def pop(
        self,
        header: Header,
        payloads: Sequence[bytes],
        progress: Progress | None = None,
        bits: list[NDArray[np.float32]] | None = None,
    ) -> list[Grid]:
        """The grids of payloads, not yet checked against a checksum: for a preview, of the first ones alone.

        bits: gets the bits of every index (M, h, w), grid by grid. Raises BitstreamError.
        """
        if header.fingerprint != self.weights.fingerprint:
            raise ModelMismatchError(
                f"the file was written with model {header.fingerprint.hex()}, this installation has "
                f"{self.weights.fingerprint.hex()}: install the vqcodec version that wrote it, or pass its --weights"
            )
        row = self.weights.row(header)
        size = header.height, header.width
        counter = Counter(progress, sum(self._indices(k, size) for k in range(len(payloads))))
        grids: list[Grid] = []
        for k, payload in enumerate(payloads):
            setting = self._setting(k, row, size, grids, counter)
            if bits is not None:
                bits.append(np.zeros((self.weights.grids[k].groups, *setting.shape), np.float32))
                setting = setting._replace(bits=bits[k])
            grids.append(walk.decode(setting, payload))
        return grids

    def encode(
        self,
        row: int,
        size: tuple[int, int],
        grids: Sequence[Grid],
        latents: NDArray[np.float32],
        rate_weights: ArrayLike,
        diffusion: Diffusion | None = None,
        progress: Progress | None = None,
    ) -> tuple[Grid, bytes]:
        """The next finer grid of an image and its payload.

        row: as of ``Weights.row``; size: (height, width) of the image; grids: all coarser ones; latents: (h, w, M d);
        rate_weights: one for all cells, or one for each, (h, w). The indices are those of least |z - e|^2 + rate_weight
        * bits, one after the other. diffusion: none by default. ValueError for latents that are not finite.
        """
        k = len(grids)
        counter = Counter(progress, self._indices(k, size))
        return walk.encode(self._setting(k, row, size, grids, counter), latents, rate_weights, diffusion)

    def sample(
        self,
        row: int,
        size: tuple[int, int],
        generator: np.random.Generator,
        temperature: float = 1.0,
        grids: Sequence[Grid] = (),
    ) -> list[Grid]:
        """All grids of an image: those that are given, and finer ones drawn from the priors.

        temperature: below 1 likely indices are drawn more often than the priors say. ValueError unless it is positive
        and finite.
        """
        drawn = list(grids)
        for k in range(len(drawn), len(self.weights.grids)):
            drawn.append(walk.sample(self._setting(k, row, size, drawn), generator, temperature))
        return drawn

    def _all(self, parts: Container) -> Sequence[bytes]:
        if len(parts.grids) != len(self.weights.grids):
            found, expected = len(parts.grids), len(self.weights.grids)
            raise DamagedError(f"{found} grids, the model has {expected} grids: the file is damaged")
        return parts.grids

    def _setting(
        self, k: int, row: int, size: tuple[int, int], grids: Sequence[Grid], counter: "Counter | None" = None
    ) -> Setting:
        if (k, row) not in self._priors:  # kept: making one ready takes as long as a small picture
            self._priors[k, row] = Prior(self.weights, k, row)
        tell = counter.of(self.weights.grids[k].groups) if counter else None
        coarser = np.ascontiguousarray(grids[k - 1]) if k else None
        return Setting(self._priors[k, row], self.weights.shape(k, *size), coarser, tell=tell)

    def _indices(self, k: int, size: tuple[int, int]) -> int:
        """How many grid k has."""
        return self.weights.grids[k].groups * int(np.prod(self.weights.shape(k, *size)))


class Counter:
    """Tells a progress function which part of ``total`` indices is coded."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def of(self, groups: int) -> Tell | None:
        """Counts cells of so many indices."""
        progress = self.progress
        if progress is None:
            return None

        def tell(cells: int) -> None:
            self.done += cells * groups
            progress(self.done / self.total)

        return tell
