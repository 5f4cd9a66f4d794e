"""The command line's conveniences: previews, targets, folders, samples, comparisons, drawings, completion."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image
from test_cli import Terminal, png, posix, refused, run, succeeded
from tiny_model import WEIGHTS

import cli
from vqcodec.codec import Codec

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
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    jobs = [cli._Job(str(photos / name), "") for name in ("a.png", "a.jpg")]
    with cli._whole_bar(jobs) as advance:
        assert advance
        for done, job in enumerate(jobs, start=1):
            advance(job, cli._Tally(done=done, pixels=10**6))
    assert "2 of 2 files" in terminal.getvalue() and "MP/s" in terminal.getvalue()


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
    assert 1 <= facts["quality"] <= 3


def test_a_target_out_of_reach_is_a_warning_with_both_values(photo: Path) -> None:
    result = encode("photo.png", "--target-size", "10kB", "--strip")
    assert result.exit_code == 0
    size = os.path.getsize("photo.vq2")
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


def codec_sample(codec: Codec, temperature: float) -> bytes:
    return codec.sample(48, 32, 2, temperature=temperature).tobytes()


def test_samples_keep_the_coarse_grid_of_a_file(photo: Path, codec: Codec) -> None:
    succeeded(encode("photo.png", "-q", 2))
    succeeded(run("sample", "-n", 2, "--top-from", "photo.vq2", "-o", "drawn"))
    one, two = (Image.open(f"drawn/sample-{n}.png") for n in range(2))
    assert one.size == two.size == (192, 160) and one.tobytes() != two.tobytes()
    blurred = np.asarray(Image.open(photo).convert("RGB").resize((12, 10), Image.Resampling.BOX), float)
    drawn = np.asarray(one.resize((12, 10), Image.Resampling.BOX), float)
    assert np.abs(drawn - blurred).mean() < 40
    refused(run("sample", "--top-from", "none.vq2", "-o", "drawn", "-f"), "none.vq2: no such file")
    refused(run("sample", "--top-from", "photo.png", "-o", "drawn", "-f"), "photo.png: not a .vq2 file")
    refused(run("sample", "--top-from", "photo.vq2", "-o", "drawn", "-f", "--max-pixels", 9), "limit is 9")


BAD_SAMPLES = (["--size", "10"], ["--size", "0x5"], ["--temperature", "0"], ["-q", "5"], ["-n", "0"])


@pytest.mark.parametrize("args", BAD_SAMPLES)
def test_impossible_samples_are_bad_usage(here: Path, args: list[str]) -> None:
    assert run("sample", "-o", "drawn", "-q", "2", *args).exit_code == 2
    assert not (here / "drawn").exists()


def test_samples_have_a_limit_of_pixels() -> None:
    refused(run("sample", "--size", "9000000x9000000", "-o", "drawn"), "9000000 x 9000000 pixels, the limit is")


# --- looking ---


def test_compare_writes_one_page_with_everything_in_it(photo: Path) -> None:
    succeeded(run("compare", "photo.png", "-q", 1, "-q", 2.5))
    page = Path("photo.html").read_text("utf-8")
    titles = re.findall(r"<figcaption><b>([^<]+)</b>", page)
    assert titles[0] == "original" and titles.count("JPEG") == titles.count("WEBP") == 2
    assert "vq2, quality 1" in titles and "vq2, quality 2.5" in titles
    assert page.count("<img") == len(titles) and "http" not in page
    sizes = [int(size.replace(",", "")) for size in re.findall(r"<br>([\d,]+) bytes, [\d.]+ bpp<br>PSNR \d+", page)]
    assert len(sizes) == len(titles) - 1
    refused(run("compare", "photo.png", "-q", 1), "photo.html: exists already")
    refused(run("compare", "none.png"), "none.png: no such file")
    assert run("compare", "photo.png", "-q", 4, "-o", "x.html").exit_code == 2


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
    found = len(_nearest(pixels, "JPEG", {}, wanted))
    assert found <= wanted and found >= len(files[39])
    assert len(_nearest(pixels, "JPEG", {}, 1)) == len(files[0])


def test_info_draws_the_grids_and_their_bits(photo: Path, codec: Codec) -> None:
    from vqcodec.codec import examine

    succeeded(encode("photo.png", "-q", 2))
    data = Path("photo.vq2").read_bytes()
    assert "photo.vq2" in succeeded(run("info", "--grids", "grids.png", "photo.vq2")).stdout
    assert Image.open("grids.png").format == "PNG"
    chunks = json.loads(run("info", "--json", "photo.vq2").stdout)["chunks"]
    looks = examine(codec, data)
    for (indices, bits), grid, size in zip(looks, codec.model.config.grids, chunks.values(), strict=True):
        assert indices.shape == (grid.groups, *bits.shape)
        assert bits.shape == (160 // grid.stride, 192 // grid.stride)
        assert bits.sum() / 8 <= size + 1 <= bits.sum() / 8 + 10  # what the coder adds
    refused(run("info", "--grids", "grids.png", "photo.vq2"), "grids.png: exists already")
    assert run("info", "--grids", "g.png", "photo.vq2", "photo.vq2").exit_code == 2
    Path("bad.vq2").write_bytes(data[:21] + bytes(4) + data[25:])
    bad = run("info", "--grids", "g.png", "bad.vq2")
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
