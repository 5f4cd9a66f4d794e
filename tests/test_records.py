from typing import Annotated, Any, NamedTuple

import numpy as np
import pytest

from bitstream import products
from bitstream.records import Packed, pack


class Both(NamedTuple):
    count: int
    rows: Annotated[Any, np.int16, 2]
    flag: bool
    factor: float
    last: Annotated[Any, np.uint8, 1]


@products.njit
def read(record, out):  # type: ignore[no-untyped-def]
    out[0], out[1], out[2] = record.count, record.flag, record.factor
    out[3], out[4], out[5] = record.rows.shape[0], record.rows.shape[1], len(record.last)
    out[6] = record.rows[1, 2]
    record.last[1] = 7


@pytest.mark.skipif(products.INTERPRETED, reason="a record is itself then")
def test_a_kernel_reads_what_was_packed_and_writes_to_its_arrays() -> None:
    record = Both(-3, np.arange(6, dtype=np.int16).reshape(2, 3), True, 0.1, np.zeros(4, np.uint8))
    out = np.zeros(7)
    read(pack(record), out)
    assert out.tolist() == [-3, 1, 0.1, 2, 3, 4, 5] and record.last.tolist() == [0, 7, 0, 0]


@pytest.mark.parametrize(
    "rows", [np.zeros((2, 3), np.int32), np.zeros(3, np.int16), np.zeros((3, 2), np.int16).T], ids=str
)
def test_other_arrays_are_refused(rows: Any) -> None:
    with pytest.raises(TypeError, match="Both.rows is int"):
        Packed(Both(0, rows, False, 0.0, np.zeros(1, np.uint8)))
