"""The command line as its users see it: what it writes, what it prints, and how it fails."""

import errno
import inspect
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageCms

import cli
from bitstream import container
from vqcodec import __version__

ROOT = Path(cli.__file__).parent
WIDTH, HEIGHT = 40, 30
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


def picture(mode: str = "RGB") -> Image.Image:
    """A gradient and some noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    bands = np.stack([3 * x, 6 * y, 3 * x + 2 * y, 5 * x], axis=-1) + rng.integers(0, 30, (HEIGHT, WIDTH, 4))
    return Image.fromarray(bands.astype(np.uint8)).convert(mode)


def png(mode: str = "RGB", **options: Any) -> bytes:
    file = io.BytesIO()
    picture(mode).save(file, "PNG", **options)
    return file.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A small file that claims to be a large picture."""

    data = bytearray(png())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def run(*args: object, input: bytes | None = None) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args], input=input)


Command = Callable[..., Result]


@pytest.fixture
def encode(tiny_weights: Path) -> Command:
    return lambda *args, **input: run("encode", "-q", 2, "--weights", tiny_weights, *args, **input)


@pytest.fixture
def decode(tiny_weights: Path) -> Command:
    return lambda *args, **input: run("decode", "--weights", tiny_weights, *args, **input)


@pytest.fixture(scope="session")
def vq2(tiny_weights: Path) -> bytes:
    result = run("encode", "-q", 2, "--weights", tiny_weights, "-", "-o", "-", input=png())
    assert result.exit_code == 0
    return result.stdout_bytes


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vq2: bytes) -> Path:
    """The working folder, with a picture and a .vq2 file of another name."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "photo.png").write_bytes(png())
    (folder / "file.vq2").write_bytes(vq2)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


UNTOUCHED = ["file.vq2", "photo.png"]


def succeeded(result: Result) -> Result:
    assert (result.exit_code, result.stderr) == (0, "")
    return result


def refused(result: Result, *words: str, code: int = 1) -> None:
    """One line on standard error, nothing on standard output, no traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert re.fullmatch(r"vqcodec: [^\n]+\n", result.stderr), result.stderr
    for word in words:
        assert word in result.stderr


# --- what is written where ---


def test_a_picture_comes_back_at_its_size_from_files_beside_the_inputs(
    here: Path, encode: Command, decode: Command
) -> None:
    succeeded(encode("photo.png"))
    os.rename("photo.png", "original.png")
    succeeded(decode("photo.vq2"))
    assert names(here) == ["file.vq2", "original.png", "photo.png", "photo.vq2"]
    decoded = np.array(Image.open("photo.png"), int)
    assert decoded.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(decoded - np.array(picture())).mean() < 40


def test_a_line_sums_up_what_was_written(encode: Command, decode: Command) -> None:
    pattern = r"photo\.vq2  40 x 30  ([\d,]+) bytes  \d+\.\d{3} bpp  \d+\.\d s\n"
    match = re.fullmatch(pattern, succeeded(encode("photo.png")).stdout)
    assert match and int(match[1].replace(",", "")) == os.path.getsize("photo.vq2")
    assert re.fullmatch(r"file\.png  40 x 30  .* s\n", succeeded(decode("file.vq2")).stdout)


@pytest.mark.parametrize("quality, level", [("1", 1), ("2.2", 2), ("2.8", 3)])
def test_the_level_nearest_to_the_quality_is_used(encode: Command, quality: str, level: int) -> None:
    succeeded(encode("-q", quality, "photo.png"))
    assert json.loads(run("info", "--json", "photo.vq2").stdout)["level"] == level


@pytest.mark.parametrize("output", [["-o", "-"], ["-o", "/dev/stdout"], []])
def test_with_standard_output_the_summary_goes_to_standard_error(
    here: Path, encode: Command, decode: Command, output: list[str]
) -> None:
    encoded = encode("-", *output, input=png())
    decoded = decode("-", *output, input=encoded.stdout_bytes)
    assert Image.open(io.BytesIO(decoded.stdout_bytes)).format == "PNG"
    for result in encoded, decoded:
        assert re.fullmatch(r"-  40 x 30  .* s\n", result.stderr)
    assert names(here) == UNTOUCHED


def test_a_process_encodes_from_pipe_to_pipe(tiny_weights: Path, vq2: bytes) -> None:
    args = ["encode", "-q", "2", "-", "-o", "-", "--weights", str(tiny_weights)]
    process = vqcodec(*args, stdin=subprocess.PIPE)
    out, err = process.communicate(png(), timeout=60)
    assert (process.returncode, out) == (0, vq2)
    assert err.startswith(b"-  40 x 30  ")


@pytest.mark.parametrize("folder", ["new/", "old", "old/"])
def test_several_inputs_go_to_a_folder_that_exists_or_ends_in_a_slash(
    here: Path, encode: Command, decode: Command, folder: str
) -> None:
    (here / "old").mkdir()
    (here / "other.png").write_bytes(png("L"))
    succeeded(encode("photo.png", "other.png", "-o", folder))
    assert names(here / folder) == ["other.vq2", "photo.vq2"]
    succeeded(decode(f"{folder}/other.vq2", f"{folder}/photo.vq2", "-o", folder))
    assert Image.open(here / folder / "other.png").mode == "L"


def test_several_inputs_without_a_folder_are_bad_usage(here: Path, encode: Command) -> None:
    result = encode("photo.png", "file.vq2", "-o", "out.vq2")
    assert result.exit_code == 2
    assert "several inputs need a folder" in result.stderr
    assert names(here) == UNTOUCHED


@pytest.mark.parametrize("args", [["-", "photo.png"], ["-", "-o", "new/"]])
def test_standard_input_needs_a_name_for_its_output(here: Path, encode: Command, args: list[str]) -> None:
    result = encode(*args, input=png())
    assert result.exit_code == 2
    assert "has no name" in result.stderr
    assert names(here) == UNTOUCHED


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.avif", "a.tiff", "a.bmp", "a.ppm", "a"])
def test_the_name_of_the_output_decides_on_its_format(decode: Command, name: str) -> None:
    succeeded(decode("file.vq2", "-o", name))
    with Image.open(name) as decoded:
        assert (decoded.format or "").lower() == {".jpg": "jpeg", "": "png"}.get(Path(name).suffix, name[2:])
        assert decoded.size == (WIDTH, HEIGHT)


def test_strip_leaves_metadata_out(encode: Command) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Path("photo.png").write_bytes(png(exif=exif))
    succeeded(encode("photo.png", "-o", "kept.vq2"))
    succeeded(encode("photo.png", "-o", "stripped.vq2", "--strip"))
    kept, stripped = map(json.loads, run("info", "--json", "kept.vq2", "stripped.vq2").stdout.splitlines())
    assert "exif" in kept["chunks"] and "exif" not in stripped["chunks"]
    assert (kept["width"], kept["height"]) == (stripped["height"], stripped["width"]) == (WIDTH, HEIGHT)


def test_what_is_lost_is_a_warning_and_not_an_error(encode: Command, decode: Command) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.uint16)).save("deep.png", exif=exif)
    encoded = encode("deep.png")
    decoded = decode("deep.vq2", "-o", "deep.bmp")
    assert (encoded.exit_code, decoded.exit_code) == (0, 0)
    assert encoded.stderr == "vqcodec: deep.png: warning: 16-bit samples were reduced to 8 bits\n"
    assert re.fullmatch("vqcodec: deep.bmp: warning: BMP cannot hold metadata.*\n", decoded.stderr)


# --- refused before any work ---


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("work has begun"))


def test_an_output_that_exists_is_refused_without_force(
    here: Path, monkeypatch: pytest.MonkeyPatch, encode: Command, decode: Command
) -> None:
    (here / "other.png").write_bytes(png())
    (here / "other.vq2").write_bytes(b"old")
    with monkeypatch.context() as patch:
        no_work(patch)
        refused(encode("photo.png", "other.png"), "other.vq2: exists already: use -f")
        refused(decode("file.vq2", "-o", "photo.png"), "photo.png: exists already: use -f")
    assert Path("other.vq2").read_bytes() == b"old"
    succeeded(encode("-f", "photo.png", "other.png"))
    assert Path("other.vq2").read_bytes() == Path("photo.vq2").read_bytes()


def test_two_inputs_with_one_output_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch, encode: Command) -> None:
    no_work(monkeypatch)
    (here / "photo.jpg").write_bytes(b"")
    refused(encode("-f", "photo.png", "photo.jpg"), "photo.vq2: would hold photo.png and photo.jpg")
    refused(encode("-f", "photo.png", here / "photo.png", "-o", "new/"), "photo.vq2: would hold")
    assert names(here) == ["file.vq2", "photo.jpg", "photo.png"]


@posix
def test_an_output_that_is_an_input_is_refused_under_any_name(
    here: Path, monkeypatch: pytest.MonkeyPatch, encode: Command, decode: Command
) -> None:
    no_work(monkeypatch)
    os.symlink("file.vq2", "link")
    os.link("file.vq2", "again")
    for name in ("file.vq2", "./file.vq2", here / "file.vq2", "link", "again"):
        refused(decode("-f", "file.vq2", "-o", name), "is an input: choose another name")


def test_the_wrong_command_is_told_the_right_one(
    here: Path, monkeypatch: pytest.MonkeyPatch, encode: Command, decode: Command
) -> None:
    no_work(monkeypatch)
    refused(encode("-f", "file.vq2"), "file.vq2: ends in .vq2 already", "did you mean decode?")
    refused(decode("photo.png"), "photo.png: ends in .png already", "did you mean encode?")


@pytest.mark.parametrize("out", ["missing/out.vq2", "missing/folder/", "photo.png/out.vq2"])
def test_a_missing_folder_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch, encode: Command, out: str) -> None:
    no_work(monkeypatch)
    refused(encode("photo.png", "-o", out), f"{out}: there is no folder", "create it first")
    assert names(here) == UNTOUCHED


def test_a_file_is_refused_as_the_folder(monkeypatch: pytest.MonkeyPatch, encode: Command) -> None:
    no_work(monkeypatch)
    refused(encode("-f", "photo.png", "-o", "photo.png/"), "photo.png/: is a file, not a folder")


def test_a_format_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch, decode: Command) -> None:
    no_work(monkeypatch)
    refused(decode("file.vq2", "-o", "a.xyz"), "a.xyz: cannot write images as 'xyz': choose one of avif")


@posix
def test_a_terminal_is_refused_as_the_output() -> None:
    import pty

    terminal, end = pty.openpty()
    process = vqcodec("encode", "photo.png", "-o", "-", stdout=end)
    os.close(end)
    _, err = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 1
    assert err == b"vqcodec: standard output: is a terminal: redirect it, or name a file with -o\n"


# --- inputs that fail ---


BAD_PICTURES = {
    "not an image": (b"#!/bin/sh\n", "bad: not an image"),
    "empty": (b"", "bad: the file is empty"),
    "truncated": (png()[:-200], "bad: the image cannot be decoded, it is truncated or damaged"),
    "a .vq2 file": (b"\xf6VQ2\1", "bad: it is a .vq2 file already: decode it"),
    "a raw photograph": (
        b"II*\0\x10\0\0\0CR\2\0" + bytes(64),
        "bad: of a raw photograph only a small preview can be read",
    ),
    "pixel bomb": (huge_png(60000, 60000), "bad: the image has 60000 x 60000 pixels, the limit is"),
}


@pytest.mark.parametrize("data, message", BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_a_bad_picture_is_one_line_and_leaves_the_old_output(
    here: Path, encode: Command, data: bytes, message: str
) -> None:
    (here / "bad").write_bytes(data)
    (here / "bad.vq2").write_bytes(b"old")
    refused(encode("-f", "bad"), message)
    assert Path("bad.vq2").read_bytes() == b"old"
    assert names(here) == ["bad", "bad.vq2", *UNTOUCHED]
    refused(encode("-", "-o", "-", input=data), message.replace("bad", "standard input", 1))


BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a .vq2 file (starts with nothing"),
    "another kind of file": (lambda data: png(), "not a .vq2 file (starts with 89504e47"),
    "truncated in the header": (lambda data: data[:20], "truncated"),
    "truncated in a chunk": (lambda data: data[:-10], "truncated"),
    "without its end": (lambda data: data[:-1], "truncated"),
    "with bytes appended": (lambda data: data + b"..", "2 wrong bytes follow the end mark"),
    "of a later version": (lambda data: data[:4] + b"\xff" + data[5:], "format version 255, this release reads"),
    "of other weights": (lambda data: data[:13] + bytes(8) + data[21:], "with model 0000000000000000"),
    "of a level too high": (lambda data: data[:5] + b"\7" + data[6:], "level 7"),
    "of wrong indices": (lambda data: data[:21] + bytes(4) + data[25:], "(stored 00000000, computed"),
    "too large": (lambda data: data[:7] + b"\xff" * 6 + data[13:], "16777216 x 16777216 pixels, the limit"),
}


@pytest.mark.parametrize("damage, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_one_line_and_leaves_the_old_output(
    here: Path, decode: Command, vq2: bytes, damage: Callable[[bytes], bytes], message: str
) -> None:
    (here / "bad.vq2").write_bytes(damage(vq2))
    (here / "bad.png").write_bytes(b"old")
    refused(decode("-f", "bad.vq2"), "vqcodec: bad.vq2: ", message)
    assert Path("bad.png").read_bytes() == b"old"
    assert names(here) == ["bad.png", "bad.vq2", *UNTOUCHED]


def test_flipping_a_bit_anywhere_is_refused(
    monkeypatch: pytest.MonkeyPatch, decode: Command, vq2: bytes, tiny_weights: Path
) -> None:
    from vqcodec.codec import Codec

    codec = Codec.load(tiny_weights, "cpu")
    monkeypatch.setattr(Codec, "load", lambda *_: codec)
    for position in range(0, len(vq2), 4):
        damaged = bytearray(vq2)
        damaged[position] ^= 1 << position % 8
        refused(decode("--max-pixels", 2000, "-", input=bytes(damaged)), "vqcodec: standard input: ")


def test_the_pixel_limit_holds_for_both_directions(here: Path, encode: Command, decode: Command) -> None:
    refused(encode("photo.png", "--max-pixels", 1199), "photo.png: ", "40 x 30", "limit is 1199")
    refused(decode("file.vq2", "--max-pixels", 1199), "file.vq2: ", "40 x 30", "limit is 1199")
    assert names(here) == UNTOUCHED
    succeeded(encode("photo.png", "--max-pixels", 1200))
    succeeded(decode("file.vq2", "--max-pixels", 1200))


def test_one_bad_input_does_not_stop_the_others(here: Path, encode: Command) -> None:
    (here / "bad.png").write_bytes(b"")
    result = encode("missing.png", "bad.png", "photo.png")
    assert result.exit_code == 1
    assert result.stdout.startswith("photo.vq2  40 x 30")
    missing, bad = result.stderr.splitlines()
    assert missing == "vqcodec: missing.png: no such file or folder: check the name"
    assert bad.startswith("vqcodec: bad.png: the file is empty")
    assert "photo.vq2" in names(here) and "bad.vq2" not in names(here)


def test_names_of_files_cannot_command_the_terminal(encode: Command) -> None:
    refused(encode("a\x1b[2J\nb\udcff.png"), "vqcodec: a?[2J b?.png: no such file")


# --- machines that fail ---


def test_a_full_disk_leaves_the_folder_as_it_was(
    here: Path, monkeypatch: pytest.MonkeyPatch, encode: Command, decode: Command
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vqcodec.files.os.fsync", full)
    (here / "photo.vq2").write_bytes(b"old")
    refused(encode("-f", "photo.png"), "photo.vq2: the disk is full: make room")
    refused(decode("file.vq2"), "file.png: the disk is full: make room")
    assert Path("photo.vq2").read_bytes() == b"old"
    assert names(here) == sorted([*UNTOUCHED, "photo.vq2"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        process = vqcodec("info", "file.vq2", stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == b"vqcodec: standard output: the disk is full: make room, or choose another place\n"


def test_a_name_that_standard_output_cannot_show_stops_nothing(
    here: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    for name in ("漢字.png", "z.png"):
        os.link("photo.png", name)
    process = vqcodec("encode", "-q", "2", "--weights", str(tiny_weights), "漢字.png", "z.png")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out.startswith(b"??.vq2  40 x 30") and b"2 done" in out
    assert {"漢字.vq2", "z.vq2"} <= set(names(here))
    out, err = vqcodec("info", "漢字.vq2").communicate(timeout=60)
    assert (out.splitlines()[0], err) == (b"??.vq2", b"")


def test_a_broken_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = vqcodec("info", "file.vq2", stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, b"")


def test_a_target_without_permission_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch, encode: Command) -> None:
    def locked(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(here))

    monkeypatch.setattr("vqcodec.files.write_atomically", locked)
    refused(encode("photo.png"), f"{here}: permission denied")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("not enough memory: you tried to allocate 9")])
def test_too_little_memory_is_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, encode: Command, error: Exception
) -> None:
    fail_at(monkeypatch, "Codec.encode", error)
    refused(encode("photo.png"), "photo.png: out of memory: free some")
    assert names(here) == UNTOUCHED


def test_an_interrupt_is_one_line_and_leaves_nothing_behind(
    here: Path, monkeypatch: pytest.MonkeyPatch, encode: Command, decode: Command
) -> None:
    fail_at(monkeypatch, "Codec.encode", KeyboardInterrupt())
    fail_at(monkeypatch, "Codec.decode_picture", KeyboardInterrupt())
    (here / "photo.vq2").write_bytes(b"old")
    for result in encode("-f", "photo.png"), decode("-f", "file.vq2"):
        refused(result, "interrupted", code=130)
    assert Path("photo.vq2").read_bytes() == b"old"
    assert names(here) == sorted([*UNTOUCHED, "photo.vq2"])


def workers_of(process: "subprocess.Popen[bytes]", number: int) -> list[int]:
    """Process ids of the children, once there are so many."""
    for _ in range(600):
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if len(found) == number:
            return [int(pid) for pid in found]
        time.sleep(0.1)
    raise AssertionError(f"no {number} workers")


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_workers_end_with_their_parent(here: Path, tiny_weights: Path, number: signal.Signals) -> None:
    os.mkfifo("pipe")  # reading it never ends
    args = ["encode", "-q", "2", "--jobs", "2", "--weights", str(tiny_weights), "pipe", "photo.png", "-o", "out/"]
    process = vqcodec(*args)
    workers = workers_of(process, 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    for _ in range(100):
        if all(map(gone, workers)):
            break
        time.sleep(0.1)
    assert all(map(gone, workers))
    if number == signal.SIGKILL:
        return
    assert process.returncode == 128 + number
    assert err == b"vqcodec: terminated after 0 of 2 files: give the same command with --resume to go on\n"


@posix
@pytest.mark.parametrize(
    ("closed", "args", "words"),
    [
        ("2", ["photo.png"], ""),
        ("0 1 2", ["photo.png"], ""),
        ("0", ["photo.png", "--quiet", "-o", "-"], ""),
        ("1", ["photo.png", "-o", "-"], "vqcodec: standard output: is closed: redirect it, or name a file with -o\n"),
        ("0", ["-", "-o", "photo.vq2"], "vqcodec: standard input: is closed: redirect it, or name a file\n"),
    ],
)
def test_closed_streams_are_missed_only_where_they_are_needed(
    here: Path, tiny_weights: Path, vq2: bytes, closed: str, args: list[str], words: str
) -> None:
    """As daemons start programs."""
    redirections = "".join(f" {number}>&-" for number in closed.split())
    command = [sys.executable, ROOT / "cli.py", "encode", "-q", "2", "--weights", tiny_weights, *args]
    done = subprocess.run(["sh", "-c", f'exec "$@"{redirections}', "sh", *command], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr.decode()) == (1 if words else 0, words)
    if not words:
        assert (done.stdout if "-" in args else (here / "photo.vq2").read_bytes()) == vq2


FORKING = """
import os, signal, sys
import cli
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGTERM))
cli.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")
def test_a_signal_while_workers_are_forked_ends_the_program(here: Path, tiny_weights: Path) -> None:
    os.mkfifo("pipe")  # reading it never ends
    args = ["encode", "-q", "2", "--jobs", "2", "--weights", str(tiny_weights), "pipe", "photo.png", "-o", "out/"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FORKING, *args]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert b"Traceback" not in done.stderr and b"ignored" not in done.stderr


@pytest.mark.parametrize("bug", [ZeroDivisionError(), RuntimeError("shapes differ"), ValueError()])
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, encode: Command, bug: Exception) -> None:
    fail_at(monkeypatch, "Codec.encode", bug)
    assert encode("photo.png").exception is bug


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(f"vqcodec.codec.{name}", fail)


def test_a_missing_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, encode: Command, decode: Command) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused(encode("photo.png", "--device", "cuda"), "use --device cpu or auto")
    refused(decode("file.vq2", "--device", "cuda"), "use --device cpu or auto")


def test_missing_and_unreadable_weights_are_one_line(here: Path, encode: Command, decode: Command) -> None:
    refused(encode("photo.png", "--weights", "none"), "vqcodec: none: no such weights file")
    refused(decode("file.vq2", "--weights", "photo.png"), "vqcodec: photo.png: not a readable weights file")
    assert names(here) == UNTOUCHED


@pytest.mark.parametrize("quality", ["0.9", "8.1", "nan", "good", "3.5"])
def test_a_quality_without_a_level_is_bad_usage(here: Path, encode: Command, quality: str) -> None:
    result = encode("photo.png", "-q", quality)
    assert result.exit_code == 2
    assert "--quality" in result.stderr
    assert names(here) == UNTOUCHED


# --- the progress bar ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error as a terminal that shows bars at once."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(cli, "_PATIENCE", 0)
    return terminal


def screen(text: str) -> list[str]:
    """What stands on a terminal in the end."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part.endswith("A"):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\r\x1b":
            lines[row] += part
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("patience, shown", [(60, False), (0, True)])
def test_a_bar_is_shown_on_a_terminal_after_a_while(
    monkeypatch: pytest.MonkeyPatch, patience: float, shown: bool
) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(cli, "_PATIENCE", patience)
    with cli._bar("photo [bold].png") as progress:
        time.sleep(0.3)  # the work tells nothing yet
        assert ("photo [bold].png" in terminal.getvalue()) == shown
        assert progress is not None
        progress(0.3)
        progress(1.0)
    assert not any(screen(terminal.getvalue()))


def test_a_bar_moves_while_the_work_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with cli._bar("photo.png"):
        time.sleep(1.5)
        assert "0:00:00" in terminal.getvalue() and "0:00:01" in terminal.getvalue()


def test_lines_do_not_tear_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with cli._bar("photo.png"):
        time.sleep(0.2)
        for number in range(20):
            cli._warn(f"{number}.png", ["a note"])
        time.sleep(0.2)
        assert "photo.png" in screen(terminal.getvalue())[-1]  # the bar is there again
    expected = [f"vqcodec: {number}.png: warning: a note" for number in range(20)]
    assert [line for line in screen(terminal.getvalue()) if line] == expected


def test_no_bar_is_shown_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with cli._bar("photo.png") as progress:
        assert progress is None


# --- info ---


def test_info_shows_size_rate_model_and_chunks(vq2: bytes) -> None:
    out = succeeded(run("info", "file.vq2")).stdout
    for fact in ("file.vq2", "40 x 30 pixels, RGB", "level 2", f"{len(vq2)} bytes", "bpp", vq2[13:21].hex()):
        assert fact in out
    assert re.search(r"grid1 +\d+ bytes", out) and re.search(r"grid2 +\d+ bytes", out)


def test_info_prints_one_json_object_per_file(here: Path, encode: Command, vq2: bytes) -> None:
    (here / "rgba.png").write_bytes(png("RGBA"))
    succeeded(encode("rgba.png"))
    rgb, rgba = map(json.loads, succeeded(run("info", "--json", "file.vq2", "rgba.vq2")).stdout.splitlines())
    chunks = rgb.pop("chunks")
    for found in (chunks, rgba["chunks"]):
        found.pop("offset", None)  # whether there is one, networks say, in floating point
    assert rgb == {
        "file": "file.vq2",
        "bytes": len(vq2),
        "version": container.VERSION,
        "width": WIDTH,
        "height": HEIGHT,
        "mode": "RGB",
        "level": 2,
        "tune": "visual",
        "bpp": round(8 * len(vq2) / (WIDTH * HEIGHT), 4),
        "fingerprint": vq2[13:21].hex(),
    }
    assert list(chunks) == ["grid1", "grid2"]
    assert len(vq2) - 50 <= sum(chunks.values()) < len(vq2)
    assert rgba["mode"] == "RGBA" and list(rgba["chunks"]) == ["grid1", "grid2", "alpha"]


def described(name: str) -> None:
    """A picture that says who made it."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0132] = "Maker", "Maker X\x1b[2J", "2024:05:01 11:00:00"
    exif.get_ifd(0x8769)[0x9003] = "2024:05:01 10:30:00"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture().save(name, exif=exif, icc_profile=profile)


def test_info_tells_camera_date_and_profile_and_which_grid_is_which(encode: Command) -> None:
    described("photo.png")
    succeeded(encode("photo.png"))
    facts = json.loads(run("info", "--json", "photo.vq2").stdout)
    assert (facts["camera"], facts["date"]) == ("Maker X\x1b[2J", "2024-05-01 10:30:00")
    assert facts["profile"] == "sRGB built-in"
    out = succeeded(run("info", "photo.vq2")).stdout
    for line in ("camera +Maker X\\?\\[2J", "date +2024-05-01 10:30:00", "profile +sRGB built-in"):
        assert re.search(f"^ *{line} *$", out, re.MULTILINE), out
    assert re.search(r"grid1 .* bytes, top: ", out) and re.search(r"grid2 .* bytes, bottom: ", out)


@pytest.mark.parametrize(
    "options, tune",
    [
        ("-q 2 --tune psnr", "psnr"),
        ("-q 2", "visual"),
        ("--quiet --target-psnr 20", "psnr"),
        ("--quiet --target-psnr 20 --tune visual", "visual"),
    ],
)
def test_the_tune_is_that_of_the_file(here: Path, tiny_weights: Path, options: str, tune: str) -> None:
    succeeded(run("encode", "--weights", tiny_weights, *options.split(), "photo.png", "-o", "tuned.vq2"))
    assert json.loads(run("info", "--json", "tuned.vq2").stdout)["tune"] == tune
    assert f"tune {tune}" in succeeded(run("info", "tuned.vq2")).stdout


def test_an_unknown_tune_is_refused(here: Path, encode: Command) -> None:
    assert "'ear' is not one of 'psnr', 'visual'" in encode("--tune", "ear", "photo.png").stderr


@pytest.mark.parametrize("exif, icc", [(b"II*\0", b"no"), (b"MM\0*\0\0\0\x08\xff\xff", b"\0" * 200), (b"", None)])
def test_broken_metadata_says_nothing_about_a_picture(exif: bytes, icc: bytes | None) -> None:
    from vqcodec.about import metadata_facts

    assert metadata_facts(exif, icc) == {}


def test_the_help_of_info_names_every_field(encode: Command) -> None:
    described("photo.png")
    succeeded(encode("photo.png"))
    facts = json.loads(run("info", "--json", "photo.vq2").stdout)
    fields = run("info", "--help").stdout.split("Fields of the JSON object:")[1]
    for field in (*facts, *facts["chunks"]):
        assert re.search(rf"\b{field}\b", fields)


def test_info_shows_the_other_files_when_one_is_damaged(here: Path, vq2: bytes) -> None:
    (here / "bad.vq2").write_bytes(vq2[:-10])
    result = run("info", "bad.vq2", "missing.vq2", "file.vq2")
    assert result.exit_code == 1
    assert result.stdout.startswith("file.vq2\n")
    bad, missing = result.stderr.splitlines()
    assert bad.startswith("vqcodec: bad.vq2: ") and "truncated" in bad
    assert missing.startswith("vqcodec: missing.vq2: no such file")


def test_info_reads_standard_input_and_sizes_beyond_every_limit(vq2: bytes) -> None:
    wide = (vq2[:7] + b"\xff" * 3 + vq2[10:]).ljust(2**21, b"\0")  # with the padding that its size asks for
    result = succeeded(run("info", "--json", "-", input=wide))
    assert (json.loads(result.stdout)["file"], json.loads(result.stdout)["width"]) == ("-", 2**24)


# --- help, and what it promises ---


@pytest.mark.parametrize("command", [[], *([name] for name in cli.main.commands)])
def test_help_has_examples_and_exit_codes_and_fits_80_columns(command: list[str]) -> None:
    out = succeeded(run(*command, "--help")).stdout
    assert "Examples:" in out and "Exit codes:" in out
    assert max(map(len, out.splitlines())) <= 80


def test_version_is_that_of_the_package() -> None:
    assert succeeded(run("--version")).stdout == f"vqcodec, version {__version__}\n"


@pytest.mark.parametrize(
    "args, absent",
    [
        ("--help", ("torch", "numpy", "PIL", "rich")),
        ("encode --help", ("torch", "numpy", "PIL", "rich")),
        ("--version", ("torch", "numpy", "PIL", "rich")),
        ("info file.vq2", ("torch", "PIL", "rich")),
        ("info --grids grids.png --weights tiny.safetensors file.vq2", ("torch", "rich")),
        ("encode -q 2 --weights tiny.safetensors photo.png", ("_dynamo", "rich")),
        ("decode --weights tiny.safetensors file.vq2", ("_dynamo", "rich")),
        ("info --json file.vq2", ("torch", "PIL", "rich")),
    ],
)
def test_commands_do_not_import_slow_packages_that_they_do_not_need(
    here: Path, tiny_weights: Path, args: str, absent: tuple[str, ...]
) -> None:
    (here / "tiny.safetensors").symlink_to(tiny_weights)
    process = vqcodec(*args.split(), python=["-X", "importtime"])
    _, err = process.communicate(timeout=60)
    imported = set(re.findall(r"\| +(?:torch\.)?(\w+)$", err.decode(), re.MULTILINE))
    assert process.returncode == 0
    assert "cli" in imported and not imported & set(absent)


def test_defaults_are_those_of_the_library() -> None:
    from vqcodec.training.trainer import Run

    def option(command: str, name: str) -> Any:
        return next(p for p in cli.main.commands[command].params if p.name == name)

    for name in ("stage", "batch", "crop", "seed"):
        assert option("train", name).default == inspect.signature(Run).parameters[name].default


# --- train ---


@pytest.fixture
def pictures(here: Path) -> Path:
    folder = here / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    return folder


def test_training_starts_from_weights_and_resumes_with_the_same_command(
    pictures: Path, tiny_weights: Path, encode: Command
) -> None:
    command = ["train", pictures, "-o", "runs/a", "--stage", "joint", "--start", tiny_weights]
    command += ["--steps", "1", "--batch", "2", "--crop", "16"]
    first, *_, last = succeeded(run(*command)).stdout.splitlines()
    assert first.startswith("step 1 ") and last == str(Path("runs/a/model.safetensors"))
    again = succeeded(run(*command)).stdout.splitlines()
    assert again[0].startswith("resuming at step 1")
    succeeded(encode("photo.png", "--weights", "runs/a/model.safetensors"))


def test_options_of_train_reach_the_run(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    from vqcodec.config import CONFIGS
    from vqcodec.training.trainer import Run

    runs: list[Run] = []

    def train(run: Run, report: Callable[[str], None]) -> None:
        runs.append(run)
        report("a line")

    monkeypatch.setattr("vqcodec.training.trainer.train", train)
    args = ["--config", "vqvae2-paper", "--hours", "0.5", "--batch", "3", "--crop", "32", "--seed", "4"]
    args += ["--mix", str(pictures), "0.25"]
    assert succeeded(run("train", pictures, "-o", "out", *args)).stdout.startswith("a line\n")
    paper, mix = CONFIGS["vqvae2-paper"], ((pictures, 0.25),)
    assert runs == [Run(paper, pictures, Path("out"), hours=0.5, batch=3, crop=32, seed=4, mix=mix)]
    monkeypatch.setenv("RANK", "1")
    assert succeeded(run("train", pictures, "-o", "out", *args)).stdout == ""


BAD_TRAINING = {
    "no length": [],
    "two lengths": ["--steps", "1", "--hours", "1"],
    "two layouts": ["--steps", "1", "--start", "w", "--config", "vqcodec"],
    "no start": ["--steps", "1", "--stage", "joint"],
    "nothing left": ["--steps", "1", "--mix", "a", "0.5", "--mix", "b", "0.5"],
    "a file for a folder": ["--steps", "1", "-o", "photo.png"],
}


@pytest.mark.parametrize("args", BAD_TRAINING.values(), ids=BAD_TRAINING)
def test_contradictions_in_training_are_bad_usage(pictures: Path, args: list[str]) -> None:
    assert run("train", pictures, "-o", "out", *args).exit_code == 2


def test_missing_pictures_and_weights_are_one_line_and_no_folder_is_made(here: Path, pictures: Path) -> None:
    (here / "none").mkdir()
    refused(run("train", "missing", "-o", "out", "--steps", 1), "missing: no such file or folder")
    refused(run("train", "photo.png", "-o", "out", "--steps", 1), "photo.png: Not a directory")
    refused(run("train", "none", "-o", "out", "--steps", 1), "vqcodec: none: no images")
    refused(run("train", pictures, "-o", "out", "--steps", 1, "--start", "w"), "vqcodec: w: no such weights")
    assert "out" not in names(here)


def test_a_run_that_diverges_is_one_line(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    def diverge(*_: object) -> None:
        raise FloatingPointError("the loss is nan at step 7: lower the learning rate")

    monkeypatch.setattr("vqcodec.training.trainer.train", diverge)
    refused(run("train", pictures, "-o", "out", "--steps", 9), "vqcodec: the loss is nan at step 7")


# --- processes ---


def vqcodec(*args: str, python: list[str] | None = None, **streams: Any) -> "subprocess.Popen[bytes]":
    """`python -m vqcodec` as a process of its own, for what needs real streams."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *(python or []), "-m", "vqcodec", *args]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **{**pipes, **streams})


def test_threads_that_wait_leave_the_processor_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user wants it otherwise."""
    for chosen, used in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen or "")
        if chosen is None:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        run("info", "missing.vq2")
        assert os.environ["OMP_WAIT_POLICY"] == used
