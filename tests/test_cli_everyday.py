"""The command line's conveniences: previews, targets, folders, samples, comparisons, drawings, completion."""

import errno
import io
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from test_cli import on_terminal, png, posix, refused, run, succeeded
from tiny_model import WEIGHTS

import cli
from bitstream import container
from bitstream.errors import LimitError
from vqcodec import files
from vqcodec.batch import Encode, Tally
from vqcodec.codec import Codec
from vqcodec.jobs import Job

PHOTO = Path(__file__).parent / "images" / "photo.png"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(WEIGHTS, "cpu")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: Codec) -> Path:
    """The working folder, with the model in memory; workers that are not forked would load it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Codec, "load", lambda *_: codec)
    return tmp_path


@pytest.fixture
def photos(here: Path) -> Path:
    """A tree with four pictures, two bad ones, and what is to be left alone."""
    folder = here / "photos"
    (folder / "trip" / "day 2").mkdir(parents=True)
    small = Image.open(PHOTO).resize((40, 30)).convert("RGB")
    for name in ("a.png", "a.jpg", "trip/b.webp", "trip/day 2/c.PNG"):
        small.save(folder / name)
    (folder / "bad.png").write_bytes(b"not a picture")
    (folder / "trip" / "cut.png").write_bytes(png()[:-200])
    (folder / "notes.txt").write_text("no picture")
    (folder / ".trash.png").write_bytes(b"")
    return folder


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def encode(*args: object) -> Result:
    return run("encode", *args)


# --- folders ---

PICTURES = ["a.jpg.vq2", "a.png.vq2", "trip/b.vq2", "trip/day 2/c.vq2"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_folder_keeps_its_tree_and_bad_files_stop_nothing(here: Path, photos: Path, jobs: int) -> None:
    result = encode("photos", "-o", "out", "-q", 2, "--jobs", jobs)
    assert result.exit_code == 1
    assert tree(here / "out") == PICTURES
    bad, cut = sorted(result.stderr.splitlines())
    assert bad.startswith("vqcodec: photos/bad.png: not an image")
    assert cut.startswith("vqcodec: photos/trip/cut.png: the image cannot be decoded")
    table = result.stdout
    assert "files   4 done, 0 skipped, 2 failed" in table
    before = sum(os.path.getsize(photos / name) for name in ("a.png", "a.jpg", "trip/b.webp", "trip/day 2/c.PNG"))
    after = sum(os.path.getsize(here / "out" / name) for name in PICTURES)
    assert f"bytes   {before:,} before, {after:,} after" in table
    assert f"ratio   {before / after:.1f} : 1" in table
    assert len(re.findall(r"^failed  photos/", table, re.MULTILINE)) == 2
    back = run("decode", "out", "-o", "back", "--jobs", jobs)
    assert back.exit_code == 0 and "4 done" in back.stdout
    assert tree(here / "back") == [name.replace(".vq2", ".png") for name in PICTURES]


def test_without_an_output_the_files_of_a_folder_are_written_beside_it(here: Path, photos: Path) -> None:
    before = tree(photos)
    encode("photos", "-q", 2)
    assert set(tree(photos)) == {*before, *PICTURES}


def test_resume_does_what_is_left(here: Path, photos: Path) -> None:
    encode("photos", "-o", "out", "-q", 2)
    (here / "out" / "trip" / "b.vq2").unlink()
    (here / "out" / "a.png.vq2").write_bytes(b"done by another")
    refused(encode("photos", "-o", "out", "-q", 2), "exists already")
    result = encode("photos", "-o", "out", "-q", 2, "--resume")
    assert "files   1 done, 3 skipped, 2 failed" in result.stdout
    assert (here / "out" / "a.png.vq2").read_bytes() == b"done by another"
    (photos / "bad.png").unlink()
    (photos / "trip" / "cut.png").unlink()
    assert "0 done, 4 skipped, 0 failed" in succeeded(encode("photos", "-o", "out", "-q", 2, "--resume")).stdout
    assert "0 done, 1 skipped" in succeeded(run("decode", "out/a.jpg.vq2", "-o", "photos/a.jpg", "--resume")).stdout
    assert encode("photos", "-o", "out", "--resume", "-f").exit_code == 2
    unnamed = encode("-", "-o", "out/a.png.vq2", "--resume")
    assert unnamed.exit_code == 2 and "standard input" in unnamed.stderr


def test_standard_output_holds_one_file(here: Path, photos: Path) -> None:
    for inputs in (["photos"], ["photos/a.png", "photos/trip/b.webp"]):
        result = encode(*inputs, "-o", "-")
        assert result.exit_code == 2 and "- (standard output) holds one file: name a folder with -o" in result.output
    assert not (here / "-").exists()


def test_a_folder_in_an_output_s_place_is_known_before_any_work(
    here: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "a.vq2").mkdir()
    monkeypatch.setattr("vqcodec.codec.PictureEncoder", None)
    refused(encode("photos/a.png"), "a.vq2: is a folder: name a file")


def test_compare_leaves_out_what_cannot_hold_the_picture(here: Path) -> None:
    Image.new("RGB", (16_384, 1), "red").save("wide.png")
    page = Path(succeeded(run("compare", "wide.png", "-q", 1)).stdout.strip()).read_text()
    assert "JPEG" in page and "WEBP" not in page


def test_json_is_a_line_per_file_and_a_summary(here: Path, photos: Path) -> None:
    result = encode("photos", "-o", "out", "-q", 2, "--json")
    *files, summary = map(json.loads, result.stdout.splitlines())
    assert [file["status"] for file in files].count("failed") == 2
    (one,) = (file for file in files if file["file"] == "photos/trip/b.webp")
    size = (here / "out" / "trip" / "b.vq2").stat().st_size
    assert one["output"] == "out/trip/b.vq2" and (one["width"], one["height"]) == (40, 30)
    assert (one["bytes_after"], one["bpp"]) == (size, round(8 * size / 1200, 4))
    assert one["bytes_before"] == (photos / "trip" / "b.webp").stat().st_size and one["seconds"] > 0
    assert {"done": 4, "skipped": 0, "failed": 2}.items() <= summary["summary"].items()
    (alone,) = succeeded(encode("photos/a.png", "-q", 2, "--json")).stdout.splitlines()
    assert json.loads(alone)["file"] == "photos/a.png"
    assert encode("photos/a.png", "-o", "-", "--json").exit_code == 2


def test_folders_without_work_and_outputs_that_are_files_are_refused(here: Path, photos: Path) -> None:
    (here / "empty").mkdir()
    (here / "file").write_bytes(b"")
    refused(encode("empty", "-o", "out"), "empty: no files to work on")
    refused(run("decode", "photos", "-o", "out"), "photos: no files to work on")
    refused(encode("photos", "-o", "file"), "file: is a file, not a folder")
    refused(encode("photos", "-o", "missing/out"), "there is no folder")
    assert not (here / "out").exists()


def test_a_bar_counts_the_files_on_a_terminal(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    jobs = [Job(str(photos / name), "") for name in ("a.png", "a.jpg")]
    with cli._whole_bar(jobs) as (watch, advance):
        for done, job in enumerate(jobs, start=1):
            with watch(job.source) as progress:
                assert progress
                progress(0.5)
            advance(job, Tally(done=done, pixels=10**6))
            time.sleep(0.2)
    assert "2 of 2 files" in terminal.getvalue() and "MP/s" in terminal.getvalue()


# --- folders in the field ---


def touch(path: Path, seconds: float) -> None:
    """Moves a file's time on."""
    time = path.stat().st_mtime_ns + round(seconds * 10**9)
    os.utime(path, ns=(time, time))


def size_of(path: Path) -> tuple[int, int]:
    facts = json.loads(run("info", "--json", path).stdout)
    return facts["width"], facts["height"]


def test_outputs_of_a_folder_carry_the_times_of_their_inputs(here: Path, photos: Path) -> None:
    touch(photos / "a.png", -(10**8))
    encode("photos", "-o", "out", "-q", 2)
    run("decode", "out", "-o", "back")
    for name in ("a.png", "trip/b.webp"):
        time = (photos / name).stat().st_mtime_ns
        encoded = "a.png.vq2" if name == "a.png" else "trip/b.vq2"
        for made in (here / "out" / encoded, here / "back" / encoded.replace(".vq2", ".png")):
            assert made.stat().st_mtime_ns // 10**6 == time // 10**6


@pytest.mark.parametrize("jobs", [1, 2])
def test_resume_does_again_what_is_older_than_its_input(here: Path, jobs: int) -> None:
    (here / "in").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10)).save(here / "in" / name)
    options = ["in", "-o", "out", "-q", 2, "--resume", "--jobs", jobs]
    assert "2 done, 0 skipped" in succeeded(encode(*options)).stdout
    Image.new("RGB", (30, 40)).save(here / "in" / "a.png")
    touch(here / "in" / "a.png", 1)
    assert "1 done, 1 skipped" in succeeded(encode(*options)).stdout
    assert size_of(here / "out" / "a.vq2") == (30, 40)
    assert "0 done, 2 skipped" in succeeded(encode(*options)).stdout
    (here / "in" / "b.png").unlink()
    Image.new("RGB", (50, 60)).save(here / "in" / "b.webp")  # under another ending
    touch(here / "in" / "b.webp", 1)
    assert "1 done, 1 skipped" in succeeded(encode(*options)).stdout
    assert size_of(here / "out" / "b.vq2") == (50, 60)
    touch(here / "in" / "a.png", 9)
    listed = encode("in/a.png", "in/b.webp", "-o", "out/", *options[3:])
    assert "1 done, 1 skipped" in succeeded(listed).stdout


@posix
def test_an_output_that_is_a_link_to_nothing_is_replaced_if_one_asks(here: Path, photos: Path) -> None:
    (here / "a.vq2").symlink_to(here / "elsewhere")
    refused(encode("photos/a.png", "-o", "a.vq2", "-q", 2), "a.vq2: exists already: use -f")
    succeeded(encode("photos/a.png", "-o", "a.vq2", "-q", 2, "--resume"))
    assert size_of(here / "a.vq2") == (40, 30) and not (here / "elsewhere").exists()
    (here / "a.vq2").unlink()
    (here / "a.vq2").symlink_to(here / "elsewhere")
    succeeded(encode("photos/a.png", "-o", "a.vq2", "-q", 2, "-f"))
    assert not (here / "a.vq2").is_symlink()


def test_names_of_outputs_stay_when_siblings_come_and_go(here: Path) -> None:
    (here / "in").mkdir()
    options = ["in", "-o", "out", "-q", 2, "--resume"]

    def add(name: str, size: tuple[int, int], seconds: float) -> None:
        Image.new("RGB", size).save(here / "in" / name)
        touch(here / "in" / name, seconds)

    def made() -> dict[str, tuple[int, int]]:
        return {name: size_of(here / "out" / name) for name in tree(here / "out")}

    add("a.jpg", (11, 1), 0)
    succeeded(encode(*options))
    for png_is_newer in (100, -100):
        add("a.png", (22, 2), png_is_newer)
        assert "1 done, 1 skipped" in succeeded(encode(*options)).stdout
        assert made() == {"a.vq2": (11, 1), "a.png.vq2": (22, 2)}
        (here / "out" / "a.png.vq2").unlink()
    succeeded(encode(*options))
    add("a.jpg", (33, 3), 200)  # edited
    assert "1 done, 1 skipped" in succeeded(encode(*options)).stdout
    assert made() == {"a.vq2": (33, 3), "a.png.vq2": (22, 2)}
    (here / "in" / "a.jpg").unlink()
    assert "0 done, 1 skipped" in succeeded(encode(*options)).stdout


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_folder_that_cannot_be_read_stops_nothing(
    here: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    (photos / "private").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if os.path.basename(path) == "private":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = encode("photos", "-o", "out", "-q", 2, "--jobs", jobs)
    assert result.exit_code == 1 and tree(here / "out") == PICTURES
    assert result.stderr.startswith("vqcodec: photos/private: permission denied: ")
    assert "4 done, 0 skipped, 3 failed" in result.stdout and "failed  photos/private: permission" in result.stdout
    refused(encode("photos/private", "-o", "out"), "photos/private: permission denied")


@posix
def test_a_pipe_in_a_folder_is_left_out_by_name(here: Path, photos: Path) -> None:
    os.mkfifo(photos / "trip" / "pipe.png")
    os.mkfifo(photos / "trip" / "other")
    result = encode("photos", "-o", "out", "-q", 2)
    assert tree(here / "out") == PICTURES
    assert (
        "warning: 1 file is left out that cannot be read: photos/trip/pipe.png (a pipe or the like)\n" in result.stderr
    )
    assert "2 failed, 1 left out" in result.stdout


def test_an_output_place_that_cannot_be_written_is_noticed_before_the_work(
    here: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = files._create

    def refuse(temporary: Path) -> object:
        if temporary.parent.name in closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(temporary.parent))
        return create(temporary)

    monkeypatch.setattr(files, "_create", refuse)
    closed = {"out"}
    with monkeypatch.context() as patch:
        patch.setattr(Codec, "load", lambda *_: pytest.fail("work has begun"))
        (here / "out").mkdir()
        for target in ("out", "out/a.vq2"):
            refused(encode("photos/a.png", "-o", target, "-q", 2), f"{here}/out: permission denied")
        refused(encode("photos", "-o", "out", "-q", 2), f"{here}/out: permission denied")
    closed = {"trip"}  # one of several folders
    with monkeypatch.context() as patch:
        worked: list[str] = []
        encode_one = Encode.__call__
        patch.setattr(Encode, "__call__", lambda self, *args: worked.append("") or encode_one(self, *args))
        result = encode("photos", "-q", 2)
    assert len(worked) == 4  # for none of the two in trip
    expected = f"photos/trip/b.webp: {photos}/trip: permission denied"
    assert expected in result.stderr and f"failed  {expected}" in result.stdout


def test_a_disk_that_fills_up_names_the_picture(here: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vqcodec.files.os.fsync", full)
    result = encode("photos", "-o", "out", "-q", 2)
    assert "failed  photos/a.png: out/a.png.vq2: the disk is full" in result.stdout


HEIC = b"\0\0\0\x18ftypheic"


def test_pictures_that_cannot_be_read_are_counted_and_named(
    here: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_picture_endings", lambda: {".png", ".jpg", ".webp"})  # plugins or not
    for name in ("trip/b.DNG", "c.NEF", "e.svg"):
        (photos / name).write_bytes(b"II*\0")
    for name in ("d.HEIC", "heic"):
        (photos / name).write_bytes(HEIC)
    (photos / "Makefile").write_text("all:")
    for name in ("noending", "2026.11.26", "2026.11.27"):
        (photos / name).write_bytes(png())
    (photos / "2026.11.28").write_bytes(b"a diary")
    result = encode("photos", "-o", "out", "-q", 2)
    assert tree(here / "out") == sorted([*PICTURES, "noending.vq2", "2026.11.26.vq2", "2026.11.27.vq2"])
    named = [f"photos/{name}" for name in ("c.NEF", "d.HEIC", "e.svg", "heic", "trip/b.DNG")]
    advice = "develop raw files first, HEIC needs pip install 'vqcodec[heif]'"
    assert f"warning: 5 files are left out that cannot be read: {', '.join(named)}: {advice}\n" in result.stderr
    assert "2 failed, 5 left out" in result.stdout
    (photos / "f.jxr").write_bytes(b"")
    assert "photos/heic and 1 more (-v names them)" in encode("photos", "-o", "out", "-q", 2, "-f").stderr
    assert "photos/heic, photos/trip/b.DNG: develop" in encode("photos", "-o", "out", "-q", 2, "-f", "-v").stderr
    (here / "raw").mkdir()
    (here / "raw" / "a.NEF").write_bytes(b"")
    refused(encode("raw", "-o", "out"), "raw: no files to work on", "1 in it cannot be read: develop raw")


def test_pictures_of_phones_are_read_where_the_package_for_them_is_installed(here: Path, photos: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    (here / "phone").mkdir()
    Image.open(PHOTO).convert("RGB").resize((64, 48)).save(here / "phone" / "a.HEIC", "HEIF")
    os.link(here / "phone" / "a.HEIC", here / "phone" / "b")
    assert "2 done, 0 skipped, 0 failed\n" in succeeded(encode("phone", "-o", "out", "-q", 2)).stdout
    assert size_of(here / "out" / "a.vq2") == size_of(here / "out" / "b.vq2") == (64, 48)


# --- how much is said ---


def test_verbose_has_a_line_for_every_file_and_quiet_has_errors_alone(here: Path, photos: Path) -> None:
    loud = encode("photos", "-o", "out", "-q", 2, "-v")
    assert re.search(r"^out/trip/b.vq2  40 x 30  ", loud.stdout, re.MULTILINE) and "4 done" in loud.stdout
    loud = encode("photos", "-o", "out", "-q", 2, "-v", "--resume")
    assert "out/trip/b.vq2  is up to date\n" in loud.stdout
    (photos / "x.nef").write_bytes(b"")
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(photos / "deep.png")
    quiet = encode("photos", "-o", "out", "-q", 2, "-f", "--quiet")
    assert quiet.exit_code == 1 and quiet.stdout == "" and len(quiet.stderr.splitlines()) == 2  # the bad ones
    assert json.loads(encode("photos/a.png", "-f", "-q", 2, "--quiet", "--json").stdout)["status"] == "done"
    assert encode("photos/a.png", "-v", "--quiet").exit_code == 2


def test_an_interrupt_says_how_far_it_got_and_how_to_go_on(
    here: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_one, calls = Encode.__call__, iter(range(9))

    def interrupt(self: Encode, *args: object) -> object:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return encode_one(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Encode, "__call__", interrupt)
        result = encode("photos", "-o", "out", "-q", 2, "-f")
    assert result.exit_code == 130
    going_on = "give the same command with --resume instead of -f to go on"
    assert result.stderr.splitlines()[-1] == f"vqcodec: interrupted after 2 of 6 files: {going_on}"
    assert "2 done, 2 skipped" in encode("photos", "-o", "out", "-q", 2, "--resume").stdout


def test_an_output_given_as_an_input_gets_the_right_command(here: Path, photos: Path) -> None:
    for existing in (False, True):
        result = encode("photos/a.png", "out.vq2")
        assert result.exit_code == 2 and "out.vq2 is no input: to name the output, write -o out.vq2" in result.stderr
        result = run("decode", "out.vq2", "new.jpg")
        assert result.exit_code == 2 and "new.jpg is no input: to name the output, write -o new.jpg" in result.stderr
        if not existing:
            succeeded(encode("photos/a.png", "-o", "out.vq2", "-q", 2))
    result = encode("photos/a.png", "photos/a.jpg", "new.vq2")
    assert result.exit_code == 2 and "new.vq2 is no input: to name a folder for the outputs" in result.stderr


@pytest.mark.parametrize("command", ["encode", "compare", "sample"])
def test_a_quality_of_jpeg_gets_a_hint(here: Path, photos: Path, command: str) -> None:
    args = ["-o", "drawn"] if command == "sample" else ["photos/a.png"]
    result = run(command, *args, "-q", "85")
    assert result.exit_code == 2 and "85 is not in the range from 1 to 8: it is not a JPEG's" in result.stderr


def test_a_file_that_is_larger_than_its_original_is_called_so(here: Path, photos: Path) -> None:
    Image.new("L", (1, 1)).save("dot.gif")
    small = os.path.getsize("dot.gif")
    result = succeeded(encode("dot.gif", "-q", 3))
    assert small < os.path.getsize("dot.vq2")
    assert result.stdout.endswith(f"  larger than the original's {small:,} bytes\n")
    assert "larger" not in succeeded(run("decode", "dot.vq2")).stdout
    (here / "in").mkdir()
    os.link("dot.gif", "in/dot.gif")
    assert "larger  1 than their originals" in succeeded(encode("in", "-o", "out", "-q", 3)).stdout
    assert "larger" not in succeeded(encode("photos/a.png", "-q", 2)).stdout


def test_a_file_that_is_larger_than_a_lossless_one_is_called_so(here: Path) -> None:
    """A drawing, from a format that does not compress."""
    x, y = np.meshgrid(range(96), range(64))
    pixels = np.where((x % 24 == 3) | (y % 16 == 5), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save("drawing.bmp")
    webp = io.BytesIO()
    Image.fromarray(pixels).save(webp, "WEBP", lossless=True, method=0)
    size = len(webp.getvalue())
    line = succeeded(encode("drawing.bmp", "-q", 3)).stdout
    assert size < os.path.getsize("drawing.vq2") < os.path.getsize("drawing.bmp")
    assert line.endswith(f"  larger than a lossless WebP file's {size:,} bytes\n")
    assert json.loads(succeeded(encode("drawing.bmp", "-q", 3, "-f", "--json")).stdout)["bytes_lossless"] == size


# --- targets ---


@pytest.fixture
def photo(here: Path) -> Path:
    Image.open(PHOTO).resize((192, 160)).save(here / "photo.png")
    return here / "photo.png"


def test_targets_are_met_within_their_tolerance(photo: Path, codec: Codec) -> None:
    ends = [len(codec.encode(Image.open(photo), quality)) for quality in (1, 3)]
    wanted = round((ends[0] * ends[1]) ** 0.5)
    for option, value in (("--target-size", wanted), ("--target-bpp", 8 * wanted / (192 * 160))):
        result = succeeded(encode("-f", "photo.png", option, value))
        assert re.search(r"  quality [123]\.\d\d\n", result.stdout)
        assert abs(os.path.getsize("photo.vq2") / wanted - 1) <= 0.02
    encoded = codec.encode(Image.open(photo), 2)
    original = np.asarray(Image.open(photo).convert("RGB"), float)

    def db(data: bytes) -> float:
        return float(10 * np.log10(255**2 / np.mean((original - np.asarray(codec.decode(data), float)) ** 2)))

    facts = json.loads(succeeded(encode("-f", "--json", "photo.png", "--target-psnr", db(encoded))).stdout)
    assert abs(db(Path("photo.vq2").read_bytes()) - db(encoded)) <= 0.1
    assert 1 <= facts["quality"] <= 3 and facts["target_met"] is True
    succeeded(encode("-f", "photo.png", "--target-psnr", db(encoded), "--strict"))


def test_a_target_out_of_reach_is_a_warning_with_both_values(photo: Path) -> None:
    result = encode("photo.png", "--target-size", "10kB", "--strip")
    assert result.exit_code == 0
    size = os.path.getsize("photo.vq2")
    assert json.loads(encode("-f", "--json", "photo.png", "--target-size", "10kB").stdout)["target_met"] is False
    assert encode("-f", "photo.png", "--target-size", "10kB", "--strict").exit_code == 1
    assert "warning: 10,000 bytes" in encode("-f", "photo.png", "--target-size", "10kB", "--strict", "--quiet").stderr
    expected = f"photo.png: warning: 10,000 bytes cannot be reached: the nearest is {size:,} bytes, at quality 3.00"
    assert expected in result.stderr


BAD_TARGETS = {
    "two": ["--target-bpp", "1", "--target-psnr", "30"],
    "with a quality": ["-q", "2", "--target-bpp", "1"],
    "no size": ["--target-size", "small"],
    "zero": ["--target-size", "0"],
    "negative": ["--target-psnr", "-3"],
    "not finite": ["--target-bpp", "inf"],
}


@pytest.mark.parametrize("args", BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_bad_targets_are_bad_usage(photo: Path, args: list[str]) -> None:
    assert encode("photo.png", *args).exit_code == 2
    assert not Path("photo.vq2").exists()


# --- previews ---


def test_a_preview_shows_a_file_that_is_cut_off_behind_its_first_grid(photo: Path, codec: Codec) -> None:
    image = Image.open(photo).convert("RGBA")
    image.putalpha(100)
    image.save("photo.png")
    succeeded(encode("photo.png", "-q", 2))
    data = Path("photo.vq2").read_bytes()
    succeeded(run("decode", "--preview", "photo.vq2", "-o", "whole.png"))
    assert Image.open("whole.png").mode == "RGBA"
    end = 25 + 3 + json.loads(run("info", "--json", "photo.vq2").stdout)["chunks"]["grid1"]
    Path("cut.vq2").write_bytes(data[:end])
    refused(run("decode", "cut.vq2"), "truncated")
    result = run("decode", "--preview", "cut.vq2")
    assert result.exit_code == 0 and "cut.vq2: warning: only a preview without alpha" in result.stderr
    expected = codec.decode(data, preview=True)
    assert Image.open("cut.png").tobytes() == expected.convert("RGB").tobytes()
    original = np.asarray(Image.open("photo.png").convert("RGB"), float)
    both = [np.asarray(image.convert("RGB"), float) for image in (codec.decode(data), expected)]
    near, far = (np.abs(decoded - original).mean() for decoded in both)
    assert near < far < 40
    Path("short.vq2").write_bytes(data[: end - 6])
    refused(run("decode", "--preview", "short.vq2"), "short.vq2: chunk 0x01 has", "truncated")
    for bad in (b"", b"GIF89a", data[:13] + bytes(8) + data[21:]):
        Path("bad.vq2").write_bytes(bad)
        assert run("decode", "--preview", "bad.vq2").exit_code == 1


# --- samples ---


def test_samples_are_named_by_their_seeds_and_come_again(here: Path) -> None:
    args = ["sample", "--size", "48x32", "-q", 2, "--temperature", 0.8]
    succeeded(run(*args, "-n", 2, "--seed", 5, "-o", "drawn/"))
    assert tree(here / "drawn") == ["sample-5.png", "sample-6.png"]
    succeeded(run(*args, "--seed", 6, "-o", "again"))
    first, second, again = (Image.open(f) for f in ("drawn/sample-5.png", "drawn/sample-6.png", "again/sample-6.png"))
    assert first.size == (48, 32)
    assert first.tobytes() != second.tobytes() == again.tobytes()
    refused(run(*args, "--seed", 6, "-o", "again"), "exists already")
    warm = codec_sample(Codec.load(), 1.0)
    assert warm != codec_sample(Codec.load(), 0.1)


def test_samples_are_calmer_than_the_model_s_odds_unless_one_asks(here: Path, codec: Codec) -> None:
    args = ["sample", "--size", "48x32", "-q", 2]
    succeeded(run(*args, "-o", "calm"))
    succeeded(run(*args, "-o", "odds", "--temperature", 1))
    calm, odds = (Image.open(f"{folder}/sample-0.png").tobytes() for folder in ("calm", "odds"))
    assert calm == codec_sample(codec, 0.8) and odds == codec_sample(codec, 1.0)


def codec_sample(codec: Codec, temperature: float) -> bytes:
    return codec.sample(48, 32, 2, temperature=temperature).tobytes()


def test_samples_around_the_coarse_grid_of_a_file_differ(photo: Path, codec: Codec) -> None:
    succeeded(encode("photo.png", "-q", 2))
    succeeded(run("sample", "-n", 2, "--top-from", "photo.vq2", "-o", "drawn"))
    one, two = (Image.open(f"drawn/sample-{n}.png") for n in range(2))
    assert one.size == two.size == (192, 160) and one.tobytes() != two.tobytes()
    refused(run("sample", "--top-from", "none.vq2", "-o", "drawn", "-f"), "none.vq2: no such file")
    refused(run("sample", "--top-from", "photo.png", "-o", "drawn", "-f"), "photo.png: not a .vq2 file")
    refused(run("sample", "--top-from", "photo.vq2", "-o", "drawn", "-f", "--max-pixels", 9), "limit is 9")


BAD_SAMPLES = (
    *(["--size", size] for size in ("10", "0x5", "16777217x1", "9" * 5000 + "x1")),
    *(["--temperature", number] for number in ("0", "inf", "nan")),
    ["-q", "5"],
    ["-n", "0"],
)


@pytest.mark.parametrize("args", BAD_SAMPLES, ids=lambda args: " ".join(args)[:30])
def test_impossible_samples_are_bad_usage(here: Path, args: list[str]) -> None:
    assert run("sample", "-o", "drawn", "-q", "2", *args).exit_code == 2
    assert not (here / "drawn").exists()


def test_samples_have_the_limits_of_decoding(here: Path, codec: Codec) -> None:
    for size, limit, named in (("9000000x9000000", 2**27, "limit is"), ("100x1", 100, "allows 80 a side")):
        refused(run("sample", "-q", 2, "--size", size, "-o", "drawn", "--max-pixels", limit), named)
    with pytest.raises(LimitError, match="100 x 1 pixels"):
        codec.sample(100, 1, 2, max_pixels=100)
    for width, height in ((0, 5), (5, -1), (2**24 + 1, 1)):
        with pytest.raises(ValueError, match=f"{width} x {height}"):
            codec.sample(width, height, 2)


# --- looking ---


def test_compare_writes_one_page_with_everything_in_it(photo: Path) -> None:
    assert succeeded(run("compare", "photo.png", "-q", 1, "-q", 2.5)).stdout == "photo.html\n"
    page = Path("photo.html").read_text("utf-8")
    titles = re.findall(r"<figcaption><b>([^<]+)</b>", page)
    assert titles[0] == "original" and titles.count("JPEG") == titles.count("WEBP") == 2
    assert {"vq2, quality 1, tune visual", "vq2, quality 2.5, tune visual"} <= set(titles)
    assert page.count("<img") == len(titles) and "http" not in page
    size = os.path.getsize("photo.png")
    assert f"<b>original</b><br>PNG, 192 x 160 pixels, {size:,} bytes" in page
    assert len(re.findall(r"<b>(JPEG|WEBP)</b>, quality \d+<br>", page)) == 4
    assert page.count('<figure data-name="JPEG, quality ') == 2 and 'id="slider"' in page
    sizes = [int(size.replace(",", "")) for size in re.findall(r"<br>([\d,]+) bytes, [\d.]+ bpp<br>PSNR \d+", page)]
    assert len(sizes) == len(titles) - 1
    refused(run("compare", "photo.png", "-q", 1), "photo.html: exists already")
    refused(run("compare", "none.png"), "none.png: no such file")
    refused(run("compare", "."), ".: is a folder: name a file")
    assert run("compare", "photo.png", "-q", 4, "-o", "x.html").exit_code == 2


@posix
def test_compare_shows_a_file_whose_name_is_no_text(photo: Path) -> None:
    photo.rename("caf\udce9.png")
    succeeded(run("compare", "caf\udce9.png", "-q", 1))
    assert "<h1>caf?.png</h1>" in Path("caf\udce9.html").read_text("utf-8")


@posix
def test_compare_measures_what_the_machine_can(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = photo.parent / "bin" / "ssimulacra2"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ntest -s "$1" && test -s "$2" && echo 71.25\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    succeeded(run("compare", "photo.png", "-q", 2))
    page = Path("photo.html").read_text("utf-8")
    assert page.count("SSIMULACRA2 71.25") == page.count("PSNR ") >= 3
    program.write_text("#!/bin/sh\nexit 1\n")  # the picture is too small for it
    succeeded(run("compare", "-f", "photo.png", "-q", 2))
    assert "SSIMULACRA2" not in Path("photo.html").read_text("utf-8")


def test_rivals_are_as_large_as_they_can_be_without_being_larger(photo: Path) -> None:
    from vqcodec.look import _file, _nearest

    pixels = np.asarray(Image.open(photo).convert("RGB"))
    files = [_file(pixels, "JPEG", quality=quality) for quality in range(101)]
    wanted = len(files[40]) + 1
    quality, found = _nearest(pixels, "JPEG", {}, wanted)
    assert found == files[quality] and len(files[39]) <= len(found) <= wanted
    assert _nearest(pixels, "JPEG", {}, 1) == (0, files[0])


def test_info_draws_the_grids_and_their_bits(photo: Path, codec: Codec) -> None:
    succeeded(encode("photo.png", "-q", 2))
    data = Path("photo.vq2").read_bytes()
    assert "photo.vq2" in succeeded(run("info", "--grids", "grids.png", "photo.vq2", "--weights", WEIGHTS)).stdout
    assert Image.open("grids.png").format == "PNG"
    chunks = json.loads(run("info", "--json", "photo.vq2").stdout)["chunks"]
    looks = codec.indices.examine(container.unpack(data))
    for (indices, bits), grid, size in zip(looks, codec.model.config.grids, chunks.values(), strict=True):
        assert indices.shape == bits.shape == (grid.groups, 160 // grid.stride, 192 // grid.stride)
        assert bits.sum() / 8 <= size + 1 <= bits.sum() / 8 + 10  # what the coder adds
    refused(run("info", "--grids", "grids.png", "photo.vq2", "--weights", WEIGHTS), "grids.png: exists already")
    assert run("info", "--grids", "g.png", "photo.vq2", "photo.vq2").exit_code == 2
    mixed = run("info", "--grids", "-", "photo.vq2", "--weights", WEIGHTS)
    assert mixed.exit_code == 2 and mixed.stdout == ""
    Path("bad.vq2").write_bytes(data[:21] + bytes(4) + data[25:])
    bad = run("info", "--grids", "g.png", "bad.vq2", "--weights", WEIGHTS)
    assert bad.exit_code == 1 and "do not match the file's checksum" in bad.stderr and not Path("g.png").exists()


# --- completion ---


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell: str) -> None:
    assert "_VQCODEC_COMPLETE" in succeeded(run("completion", shell)).stdout


def test_what_the_script_asks_is_answered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_VQCODEC_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "vqcodec encode --target")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit):
        cli.main(prog_name="vqcodec", complete_var="_VQCODEC_COMPLETE")
    assert "--target-size" in capsys.readouterr().out


def test_every_command_is_in_the_help_and_completes() -> None:
    out = succeeded(run("--help")).stdout
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in cli.main.commands)
    assert io.StringIO(out).readline().startswith("Usage:")
