"""The numbers of the format that a prior's arithmetic is made of; FORMAT.md, sections 8 to 11, says what they mean.

A value is stored as its number of units: activations in units of 2^-5, the stream of 2^-9, logits of 2^-5.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ACTIVATION_BITS, ACTIVATION_MAX = 5, 127
STREAM_BITS, STREAM_MAX = 9, 2047
LOGIT_BITS, LOGIT_MAX = 5, 2047
GATE_BITS, GATE_MAX = 4, 64
WEIGHT_MAX = 127
# A sum has steps of 2**(exponent - 5). From EXPONENT_MAX down, half a step of any output is a whole number of them;
# from EXPONENT_MIN up, the largest constant added to a sum, 32.5 steps of 2**-4 in a gate, is at most 1,064,960.
EXPONENT_MIN, EXPONENT_MAX = -14, -5
BIAS_MAX = 2**19
MAX_FAN_IN = 940  # 940 * 127^2 + 2^19 + 1,064,960 < 2^24: float32 holds every sum exactly, as training must

TABLE_BITS = 20
TABLE_TOTAL = 1 << TABLE_BITS
_OCTAVE = [int(2 ** (TABLE_BITS - f / 32) + 0.5) for f in range(32)]
# Powers of two by the distance of two logits: 2^(20 - a/32), rounded in the first octave, shifted in the others.
POWERS: NDArray[np.int32] = np.array([_OCTAVE[a % 32] >> (a // 32) for a in range(2 * LOGIT_MAX + 1)], np.int32)

CAUSAL = ((0, -1), (-1, 1), (-1, 0), (-1, -1))  # row, column: 1, 1, 2 and 3 waves back
AROUND = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1))
ATTENTION_ROWS, ATTENTION_WAVES = 9, 16  # what attention sees: rows up, its own included, and waves back
CONDITION_WIDTH, CONDITION_BLOCKS = 96, 2

CODE_SCALE_BITS = 3  # a code vector's entry as an activation is an eighth of its value
ESCAPE_STEP, ESCAPE_SIDE = 4, 128  # the lattice of escapes: entries ESCAPE_STEP (a - ESCAPE_SIDE / 2)
ESCAPE_BITS = 7  # of one entry
INDICES = 2**16  # an index is less

MAX_LANES, ROWS_PER_LANE = 8, 32


def lanes(rows: int) -> int:
    """The number of rANS streams of a grid: a power of two that its height alone decides."""
    most = max(1, min(MAX_LANES, rows // ROWS_PER_LANE))
    return 1 << most.bit_length() - 1


def code_activations(vectors: NDArray[Any]) -> NDArray[np.int8]:
    """Code vectors as the prior sees them: floor(4 v + 1/2), clipped.  Exact for float16 values."""
    units = np.floor(vectors.astype(np.float64) * 2 ** (ACTIVATION_BITS - CODE_SCALE_BITS) + 0.5)
    return units.clip(-ACTIVATION_MAX, ACTIVATION_MAX).astype(np.int8)
