"""Memory is asked for before it is taken."""

import ctypes
import re
import sys
from pathlib import Path

import pytest
from make_golden import padded
from tiny_model import WEIGHTS

from bitstream.errors import LimitError
from vqcodec import memory
from vqcodec.codec import Codec
from vqcodec.grids import draw_grids


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(WEIGHTS, "cpu")


def test_a_picture_that_does_not_fit_is_refused_with_both_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: memory.needed(4096, 4096))
    memory.require(4096, 4096)
    takes, free = (f"{memory.needed(4096, height) / 1e9:.1f} GB" for height in (4097, 4096))
    with pytest.raises(
        LimitError, match=f"^decoding 4096 x 4097 pixels takes up to {takes} of memory, {free} are free: "
    ) as caught:
        memory.require(4096, 4097)
    assert "\n" not in str(caught.value)


def test_where_the_system_does_not_say_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: None)
    memory.require(2**24, 2**24)


def test_nothing_is_decoded_without_memory_for_it(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    data = padded(codec, 160, 160)
    assert codec.decode(data).size == (160, 160)
    monkeypatch.setattr(memory, "available", lambda: memory.needed(160, 160) - 1)
    monkeypatch.setattr("bitstream.walk.decode", lambda *_: pytest.fail("decoded"))
    for read in (
        codec.decode,
        lambda data: codec.decode(data, preview=True),
        codec.sample_from,
        lambda data: draw_grids(codec.indices, data, 160 * 160),
    ):
        with pytest.raises(LimitError, match="160 x 160"):
            read(data)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_available_is_what_this_machine_has() -> None:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total = 1024 * sum(int(fields[name].split()[0]) for name in ("MemTotal", "SwapTotal"))
    there = memory.available()
    assert there is not None and 0 < there <= total


@pytest.mark.parametrize(
    ("group", "limits", "expected"),
    [
        ("/", {}, 3000 * 1024),
        ("/", {"": ("max", 5, 0)}, 3000 * 1024),
        ("/", {"": (1000, 300, 100)}, 800),
        ("/a/b", {"a/b": (1000, 300, 0), "a": (900, 400, 0)}, 500),
        ("/a/b", {"a/b": ("max", 300, 0), "a": (900, 400, 50)}, 550),
        ("/elsewhere", {"a": (900, 400, 50)}, 3000 * 1024),
    ],
)
def test_the_limits_of_containers_count(
    group: str, limits: dict[str, tuple[int | str, int, int]], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 2000 kB\nSwapFree: 1000 kB\n",
        "/proc/self/cgroup": f"4:memory:/docker\n0::{group}\n",
    }
    for name, (most, used, cache) in limits.items():
        folder = f"/sys/fs/cgroup/{name}".rstrip("/")
        files[f"{folder}/memory.max"], files[f"{folder}/memory.current"] = f"{most}\n", f"{used}\n"
        files[f"{folder}/memory.stat"] = f"anon 7\ninactive_file {cache}\n"

    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert memory.available() == expected
    del files["/proc/meminfo"]
    assert memory.available() is None


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "malloc_trim"), reason="glibc")
def test_freed_memory_goes_back_to_the_system() -> None:
    def used() -> int:
        (kilobytes,) = re.findall(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(kilobytes)

    size, number = 2**15, 2**11
    blocks = [b"x" * size for _ in range(number)]
    kept = blocks[::64]  # here and there, as tensors are that outlive a network
    blocks.clear()
    before = used()
    memory.give_back()
    assert used() < before - size * number // 2
    assert len(kept) == number // 64
