"""What a crash, a full disk or a rival leaves behind: `python tests/trust/faults.py [FAULT...]`.

The target is always either as it was or a complete new file, and no temporary files pile up. Prints a line for each
fault and exits with 1 if one is not survived. Needs Linux; as root it mounts a small tmpfs for the full disk.
"""

import argparse
import contextlib
import ctypes
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent)]

import torch  # noqa: E402
from click.testing import CliRunner, Result  # noqa: E402
from PIL import Image  # noqa: E402

import cli  # noqa: E402
from bitstream.errors import BitstreamError  # noqa: E402
from vqcodec.codec import Codec  # noqa: E402
from vqcodec.files import write_atomically  # noqa: E402

WEIGHTS = TESTS / "golden" / "tiny.safetensors"
torch.set_num_threads(1)  # more would not survive a fork
CODEC = Codec.load(WEIGHTS, "cpu")


def command(*args: object) -> Result:
    """The command line, in this process, with the model that is loaded already."""
    with mock.patch.object(Codec, "load", lambda *_: CODEC):
        return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def forked(work: Callable[[], object]) -> int:
    """The process number of a child that does this and exits, with 1 after an exception."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def temporaries(folder: Path) -> int:
    return len(list(folder.glob(".vqcodec-*")))


def pictures(folder: Path) -> list[Path]:
    """Two pictures, small enough for a write to be a good part of the work."""
    paths = [folder / "one.png", folder / "two.png"]
    image = Image.open(TESTS / "images" / "photo.png").convert("RGB")
    image.crop((0, 0, 24, 24)).save(paths[0])
    image.crop((20, 20, 60, 60)).save(paths[1])
    return paths


# --- the faults: each returns what it found wrong, and a figure to print ---

Finding = tuple[list[str], str]


def kills(folder: Path, count: int, seconds: float) -> Finding:
    """kill -9 at random moments of processes that encode and decode over an existing file, again and again."""
    sources = {"encode": pictures(folder), "decode": [folder / "one.vq2", folder / "two.vq2"]}
    target = {"encode": folder / "out.vq2", "decode": folder / "out.png"}
    options = {"encode": ["-f", "-q", 2], "decode": ["-f"]}
    writing, stale, wrong = 0, 0, []
    phase = mmap.mmap(-1, 1)  # shared with the children: 1 while one writes

    @contextlib.contextmanager
    def told(*args: Any) -> Iterator[BinaryIO]:
        phase[0] = 1
        with write_atomically(*args) as file:
            yield file
        phase[0] = 0

    for name, inputs in sources.items():
        complete = set()
        for source in inputs:
            assert command(name, *options[name], source, "-o", target[name]).exit_code == 0
            complete.add(target[name].read_bytes())
            if name == "encode":
                assert command(name, *options[name], source).exit_code == 0  # what decode reads

        def work(name: str = name, inputs: Collection[Path] = inputs) -> None:
            with mock.patch("vqcodec.files.write_atomically", told):
                while True:
                    for source in inputs:
                        assert command(name, *options[name], source, "-o", target[name]).exit_code == 0

        for _ in range(count // 2):
            phase[0] = 0
            child = forked(work)
            time.sleep(random.uniform(0, 0.3))
            os.kill(child, signal.SIGKILL)
            if ended(child) != -signal.SIGKILL:
                wrong.append(f"{name} ended by itself")
            writing += phase[0]
            if target[name].read_bytes() not in complete:
                wrong.append(f"{name} left a broken file")
    stale = temporaries(folder)
    if stale > max(1, count // 50):
        wrong.append(f"{stale} temporary files")
    return wrong, f"{count} kills, {writing} of them while a file was written: {stale} temporary files left"


def full_disk(folder: Path, count: int, seconds: float) -> Finding:
    """Writing to a disk that has no room for the file."""
    if ctypes.CDLL(None, use_errno=True).mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=256k"):
        return [], "not tried: a tmpfs cannot be mounted here"
    try:
        target, wrong, refused = folder / "out.vq2", [], 0
        target.write_bytes(b"old")
        for force, name in ((True, "out.vq2"), (False, "new.vq2")):
            for size in (300_000, 3_000_000):
                try:
                    with write_atomically(folder / name, force) as file:
                        file.write(os.urandom(size))
                    wrong.append(f"{size} bytes fit")
                except OSError:
                    refused += 1
        if sorted(os.listdir(folder)) != ["out.vq2"] or target.read_bytes() != b"old":
            wrong.append(f"left {sorted(os.listdir(folder))}")
        with write_atomically(target, force=True) as file:  # there is room again
            file.write(b"new")
        return wrong, f"{refused} writes refused, the old file as it was, no file left"
    finally:
        ctypes.CDLL(None).umount(os.fsencode(folder))


def read_only(folder: Path, count: int, seconds: float) -> Finding:
    """A folder that the user may not write to."""
    source = pictures(folder)[0]
    closed = folder / "closed"
    closed.mkdir()
    target = closed / "out.vq2"
    target.write_bytes(b"old")
    closed.chmod(0o555)
    folder.chmod(0o755)

    def work() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)
        for output in (target, closed / "new.vq2"):
            result = command("encode", "-f", "-q", 2, source, "-o", output)
            assert result.exit_code == 1 and "permission denied" in result.stderr, result.output

    wrong = [] if ended(forked(work)) == 0 else ["it was not refused"]
    closed.chmod(0o755)
    if os.listdir(closed) != ["out.vq2"] or target.read_bytes() != b"old":
        wrong.append(f"left {os.listdir(closed)}")
    return wrong, "2 outputs refused, the old file as it was"


def rivals(folder: Path, count: int, seconds: float) -> Finding:
    """Four processes that write one output, while a fifth reads it."""
    target, end = folder / "out.vq2", time.monotonic() + seconds
    contents = [bytes([number]) * 300_000 for number in range(1, 5)]

    def work(content: bytes) -> None:
        while time.monotonic() < end:
            with write_atomically(target, force=True) as file:
                file.write(content)

    target.write_bytes(contents[0])
    children = [forked(lambda content=content: work(content)) for content in contents]
    seen = []
    while time.monotonic() < end:
        seen.append(target.read_bytes())
        if seen[-1] not in contents:
            break
        seen[-1] = seen[-1][:1]
    wrong = [] if all(len(content) == 1 for content in seen) else ["a mixed or partial file was seen"]
    wrong += ["a writer failed" for child in children if ended(child)]
    if temporaries(folder):
        wrong.append(f"{temporaries(folder)} temporary files")
    return wrong, f"{len(seen):,} reads, of files of {len(set(seen))} writers, every one complete"


def replaced_while_read(folder: Path, count: int, seconds: float) -> Finding:
    """A file that changes under its reader: replaced as vqcodec does it, and overwritten in place by others."""
    image = Image.open(TESTS / "images" / "otters.png").crop((0, 0, 128, 128))
    files = [CODEC.encode(image, quality) for quality in (2, 2.2)]
    known = {CODEC.decode(data).tobytes() for data in files}
    target, wrong, figures = folder / "in.vq2", [], []

    def replace(data: bytes) -> None:
        with write_atomically(target, force=True) as file:
            file.write(data)

    def overwrite(data: bytes) -> None:
        with open(target, "r+b") as file:
            for at in range(0, len(data), 64):  # as slow as a network
                file.write(data[at : at + 64])
                file.flush()
            file.truncate()

    for change in (replace, overwrite):
        target.write_bytes(files[0])
        end = time.monotonic() + seconds / 2

        def work(change: Callable[[bytes], None] = change, end: float = end) -> None:
            while time.monotonic() < end:
                for data in files:
                    change(data)

        child, decoded, refused = forked(work), 0, 0
        while time.monotonic() < end:
            try:
                if CODEC.decode(target.read_bytes()).tobytes() not in known:
                    wrong.append(f"{change.__name__}: a picture that nobody encoded")
                decoded += 1
            except BitstreamError:
                refused += 1
        if ended(child):
            wrong.append(f"{change.__name__}: the writer failed")
        if change is replace and refused:
            wrong.append("a complete file was refused")
        figures.append(f"{change.__name__}: {decoded} decoded, {refused} refused")
    return wrong, ", ".join(figures)


FAULTS = (kills, full_disk, read_only, rivals, replaced_while_read)


@contextlib.contextmanager
def fresh() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vqcodec-faults-") as folder:
        yield Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("faults", metavar="FAULT", nargs="*", help="of " + ", ".join(f.__name__ for f in FAULTS))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20, help="of each race between processes")
    options = parser.parse_args()
    failed = False
    for fault in (f for f in FAULTS if f.__name__ in options.faults or not options.faults):
        with fresh() as folder:
            wrong, figure = fault(folder, options.kills, options.seconds)
        failed |= bool(wrong)
        print(f"{fault.__name__}: {'; '.join(wrong) if wrong else figure}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
