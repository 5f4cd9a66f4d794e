"""What a decoder spends on a small file: `python tests/trust/limits.py [--weights FILE] [--long]`.

The worst files there are: pictures as large as the size in bytes allows, of several shapes, that decode to the end.
Prints time and memory for each, and exits with 1 if one takes more memory than the promise. Needs Linux.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from make_golden import padded  # noqa: E402

from vqcodec import memory  # noqa: E402
from vqcodec.codec import Codec  # noqa: E402

SIZES = [(320, 320), (800, 1), (1, 800)]  # all that 100 bytes allow
LONG_SIZES = [(2048, 2048), (2**15, 1), (1, 2**15)]  # 4 KB


def cost(codec: Codec, data: bytes) -> tuple[float, float]:
    """Seconds of a processor, and megabytes at the peak."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, started = used("VmRSS"), time.process_time()
    codec.decode(data)
    return time.process_time() - started, used("VmHWM") - before


def used(field: str) -> float:
    """Megabytes of this process."""
    (kilobytes,) = re.findall(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024 / 1e6


def report(codec: Codec, width: int, height: int) -> int:
    """Prints the cost of a size; 1 if it is more than allowed."""
    data = padded(codec, width, height)
    seconds, megabytes = cost(codec, data)
    allowed = memory.needed(width, height) / 1e6
    spent = f"{seconds:.1f} s, {megabytes:.0f} MB (promised {allowed:.0f})"
    print(f"{len(data):6,} bytes, {width} x {height} pixels: {spent}", flush=True)
    return int(megabytes > allowed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="a model; the shipped one if not named")
    parser.add_argument("--long", action="store_true", help="larger pictures too, which take minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more would not survive a fork
    codec = Codec.load(options.weights, "cpu")
    codec.decode(codec.encode(np.zeros((64, 64, 3), np.uint8), 1))  # compiles what is to be compiled
    failed = False
    for width, height in SIZES + LONG_SIZES * options.long:
        child = os.fork()  # what one leaves in the allocator is not there for the next
        if not child:
            os._exit(report(codec, width, height))
        failed |= os.waitpid(child, 0)[1] != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
