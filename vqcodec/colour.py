"""Colour spaces that a file declares without an ICC profile, as ICC profiles.

Numbers of primaries and transfer functions are those of ITU-T H.273, which PNG (cICP) and AVIF (nclx) share.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

SRGB_CURVE = "sRGB"
# Chromaticities x, y of white, red, green, blue, in the order of PNG's cHRM.
_D65 = (0.3127, 0.3290)
BT709 = (*_D65, 0.640, 0.330, 0.300, 0.600, 0.150, 0.060)  # sRGB's
ADOBE_RGB = (*_D65, 0.640, 0.330, 0.210, 0.710, 0.150, 0.060)
ADOBE_GAMMA = 563 / 256
_PRIMARIES = {
    1: BT709,
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*_D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*_D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
    22: (*_D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
# Those of television (1, 6, 14, 15) are shown through sRGB's curve by browsers and viewers.
_TRANSFERS: dict[int, float | str] = {
    1: SRGB_CURVE,
    4: 2.2,
    5: 2.8,
    6: SRGB_CURVE,
    8: 1.0,
    13: SRGB_CURVE,
    14: SRGB_CURVE,
    15: SRGB_CURVE,
}
UNSPECIFIED = 2

_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


class Space(NamedTuple):
    """chromaticities: x, y of white, red, green and blue; curve: from samples to light, an exponent, "sRGB", or a table
    of 0..65535 for each channel."""

    chromaticities: Sequence[float] = BT709
    curve: float | str | Sequence[Sequence[int]] = SRGB_CURVE

    def is_srgb(self) -> bool:
        like = isinstance(self.curve, str) or (isinstance(self.curve, float) and abs(self.curve - 2.2) < 0.03)
        return like and max(abs(a - b) for a, b in zip(self.chromaticities, BT709, strict=True)) < 0.002


def coded(primaries: int, transfer: int) -> Space | None:
    """The space of two code points of H.273; None for one that these profiles cannot say, such as HDR's."""
    chromaticities = BT709 if primaries == UNSPECIFIED else _PRIMARIES.get(primaries)
    curve = SRGB_CURVE if transfer == UNSPECIFIED else _TRANSFERS.get(transfer)
    return Space(chromaticities, curve) if chromaticities and curve else None


def profile(space: Space, grey: bool) -> bytes:
    """An ICC profile, version 4, for RGB or grey. Raises ValueError for chromaticities of no real colours.

    Deterministic: the same space gives the same bytes.
    """
    curves = _curves(space)
    white = _xyz(space.chromaticities[:2])
    adapted = _adaptation(white)
    tags = {b"wtpt": _fixed(_D50), b"chad": b"sf32" + bytes(4) + _s15(adapted.ravel())}
    tags |= {b"desc": _text("as declared by the file"), b"cprt": _text("no copyright")}
    if grey:
        tags[b"kTRC"] = curves[1]
    else:
        columns = np.stack([_xyz(space.chromaticities[at : at + 2]) for at in (2, 4, 6)], axis=1)
        try:
            scale = np.linalg.solve(columns, white)
        except np.linalg.LinAlgError as error:
            raise ValueError("the primaries are on one line") from error
        columns = adapted @ (columns * scale)
        for name, column, curve in zip((b"r", b"g", b"b"), columns.T, curves, strict=True):
            tags |= {name + b"XYZ": _fixed(column), name + b"TRC": curve}
    return _file(b"GRAY" if grey else b"RGB ", tags)


def _curves(space: Space) -> list[bytes]:
    """Of red, green and blue."""
    if isinstance(space.curve, str):  # IEC 61966-2-1
        parts = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        return [b"para" + bytes(4) + struct.pack(">HH", 3, 0) + _s15(parts)] * 3
    if isinstance(space.curve, (int, float)):
        if not 0.1 <= space.curve <= 10:
            raise ValueError(f"a gamma of {space.curve:g}")
        return [b"para" + bytes(4) + struct.pack(">HH", 0, 0) + _s15([space.curve])] * 3
    return [b"curv" + struct.pack(f">4xI{len(table)}H", len(table), *table) for table in space.curve]


def _xyz(chromaticity: Sequence[float]) -> Matrix:
    """The colour of brightness 1."""
    x, y = chromaticity
    if not (0 <= x <= 1 and 0 < y <= 1):
        raise ValueError(f"no colour has the chromaticity {x:g}, {y:g}")
    return np.array([x / y, 1, (1 - x - y) / y])


def _adaptation(white: Matrix) -> Matrix:
    """From colours under this white to those under D50, in which profiles speak (Bradford)."""
    scale = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    return np.asarray(np.linalg.inv(_BRADFORD) @ np.diag(scale) @ _BRADFORD)


def _s15(values: Sequence[float] | Matrix) -> bytes:
    """As s15Fixed16."""
    try:
        return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)
    except (struct.error, OverflowError, ValueError) as error:
        raise ValueError("numbers that no profile holds") from error


def _fixed(xyz: Matrix) -> bytes:
    return b"XYZ " + bytes(4) + _s15(xyz)


def _text(text: str) -> bytes:
    letters = text.encode("utf-16-be")
    return b"mluc" + struct.pack(">4xII2s2sII", 1, 12, b"en", b"US", len(letters), 28) + letters


def _file(kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """The tags behind header and table; equal ones are stored once."""
    at, places, contents = 128 + 4 + 12 * len(tags), dict[bytes, int](), b""
    for content in tags.values():
        if content not in places:
            places[content] = at + len(contents)
            contents += content + bytes(-len(content) % 4)
    table = b"".join(name + struct.pack(">II", places[content], len(content)) for name, content in tags.items())
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x3i48x",
        at + len(contents),
        0x04200000,
        b"mntr",
        kind,
        b"XYZ ",
        b"acsp",
        *(round(value * 65536) for value in _D50),
    )
    return header + struct.pack(">I", len(tags)) + table + contents
