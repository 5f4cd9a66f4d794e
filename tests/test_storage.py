"""URLs as inputs and outputs: memory:// stands for all that is not a file of this machine."""

import json
import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from test_cli import refused, run, succeeded
from tiny_model import WEIGHTS

from vqcodec import storage
from vqcodec.codec import Codec

fsspec = pytest.importorskip("fsspec")

PHOTO = Path(__file__).parent / "images" / "photo.png"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(WEIGHTS, "cpu")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: Codec) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Codec, "load", lambda *_: codec)
    Image.open(PHOTO).resize((40, 30)).save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def memory() -> Iterator[dict[str, bytes]]:
    """Files in memory: two pictures, a bad one, and what is to be left alone."""
    system = fsspec.filesystem("memory")
    picture = (Path.cwd() / "photo.png").read_bytes()
    contents = {"a.png": picture, "trip/b.PNG": picture, "bad.png": b"bad", "notes.txt": b"", ".x/c.png": picture}
    for name, data in contents.items():
        system.pipe_file(f"/photos/{name}", data)
    yield contents
    system.rm("/", recursive=True)


def encode(*args: object) -> Result:
    return run("encode", "-q", 2, *args)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_remote_folder_is_encoded_like_a_local_one(here: Path, memory: dict[str, bytes], jobs: int) -> None:
    succeeded(encode("photo.png"))
    result = encode("memory://photos", "-o", "memory://small", "--jobs", jobs)
    assert result.exit_code == 1 and "2 done, 0 skipped, 1 failed" in result.stdout
    assert result.stderr.startswith("vqcodec: memory://photos/bad.png: not an image")
    assert storage.find("memory://small", {".vq2"}).paths == ["a.vq2", "trip/b.vq2"]
    assert storage.read("memory://small/trip/b.vq2") == (here / "photo.vq2").read_bytes()
    back = succeeded(run("decode", "memory://small", "-o", "back", "--json"))
    assert json.loads(back.stdout.splitlines()[0])["file"] == "memory://small/a.vq2"
    assert (here / "back" / "trip" / "b.png").is_file()


def test_remote_files_are_resumed_and_never_replaced_unasked(memory: dict[str, bytes]) -> None:
    url = "memory://photos/a.png"
    succeeded(encode(url, "-o", "memory://out/"))
    storage.write("memory://out/a.vq2", b"by another", force=True)
    refused(encode(url, "-o", "memory://out/"), "memory://out/a.vq2: exists already: use -f")
    result = encode("memory://photos", "-o", "memory://out", "--resume")
    assert "1 done, 1 skipped, 1 failed" in result.stdout
    assert storage.read("memory://out/a.vq2") == b"by another"
    with pytest.raises(FileExistsError):
        storage.write("memory://out/a.vq2", b"", force=False)
    refused(encode("-f", url, "-o", url), "is an input")
    succeeded(encode("-f", url, "-o", "memory://out/a.vq2"))
    succeeded(run("info", "memory://out/a.vq2"))


def test_urls_of_files_are_files_of_this_machine(here: Path) -> None:
    succeeded(encode("photo.png"))
    refused(encode(f"file://{here}/photo.png"), f"file://{here}/photo.vq2: exists already")
    refused(encode("-f", f"file://{here}/photo.png", "-o", "photo.png"), "is an input")
    refused(encode("photo.png", "-o", f"file://{here}/missing/a.vq2"), "there is no folder")
    succeeded(encode(f"file://{here}/photo.png", "-o", f"file://{here}/out/"))
    assert (here / "out" / "photo.vq2").read_bytes() == (here / "photo.vq2").read_bytes()


def test_what_is_wrong_with_a_url_is_one_line(memory: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    refused(encode("memory://none.png"), "memory://none.png: no such file")
    refused(encode("nowhere://a.png"), "nowhere://a.png: Protocol not known: nowhere")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    refused(encode("s3://bucket/a.png"), "pip install 'vqcodec[urls]'")


def test_without_ray_the_engine_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.find_spec", lambda _: None)
    refused(encode("photo.png", "--engine", "ray"), "--engine ray needs the package ray: pip install 'vqcodec[ray]'")


def test_a_folder_in_an_archive_is_encoded_like_any_other(here: Path, memory: dict[str, bytes]) -> None:
    picture = (here / "photo.png").read_bytes()
    with zipfile.ZipFile(here / "a.zip", "w") as archive:
        for name in ("a.png", "trip/b.png", "trip/day 2/c.png"):
            archive.writestr(name, picture)
    storage.write("memory://store/a.zip", (here / "a.zip").read_bytes(), force=False)
    for archive_url in (f"{here}/a.zip", f"file://{here}/a.zip", "memory://store/a.zip"):
        result = succeeded(encode(f"zip://trip::{archive_url}", "-o", "out", "--json", "-f"))
        first, second, _ = map(json.loads, result.stdout.splitlines())
        assert (first["file"], first["output"]) == (f"zip://trip/b.png::{archive_url}", "out/b.vq2")
        assert second["output"] == os.path.join("out", "day 2", "c.vq2")
    assert "3 done" in succeeded(encode("zip://::a.zip", "-o", "memory://all")).stdout
    assert "0 done, 3 skipped" in succeeded(encode("zip://::a.zip", "-o", "memory://all", "--resume")).stdout
    succeeded(encode("zip://trip/b.png::a.zip", "-o", "one/"))
    assert (here / "one" / "b.vq2").is_file()
    refused(encode("zip://none.png::a.zip", "-o", "none.vq2"), "zip://none.png::a.zip: no such file")
    refused(encode("zip://a.png::a.zip"), "zip://a.vq2::a.zip: an archive is only read: choose another place with -o")
    assert zipfile.ZipFile(here / "a.zip").namelist() == ["a.png", "trip/b.png", "trip/day 2/c.png"]


def test_names_in_chains_are_those_of_the_first_url() -> None:
    assert storage.split("zip://trip/a.png::s3://b/c.zip") == ("zip://trip::s3://b/c.zip", "a.png")
    assert storage.split("zip://a.png::c.zip") == ("zip://::c.zip", "a.png")
    assert storage.split("simplecache::s3://b/a.png") == ("simplecache::s3://b", "a.png")
    assert storage.join("zip://::c.zip", "x/a.png") == "zip://x/a.png::c.zip"
    assert storage.join("simplecache::s3://b", "a.png") == "simplecache::s3://b/a.png"
    assert storage.split("memory://a.png") == ("memory://", "a.png")


def test_resume_knows_the_times_of_what_lies_elsewhere(here: Path, memory: dict[str, bytes]) -> None:
    succeeded(encode("photo.png", "-o", "memory://new/"))
    skipped = succeeded(encode("photo.png", "-o", "memory://new/", "--resume")).stdout
    assert "0 done, 1 skipped" in skipped
    later = (here / "photo.png").stat().st_mtime_ns + 3600 * 10**9
    os.utime(here / "photo.png", ns=(later, later))
    again = succeeded(encode("photo.png", "-o", "memory://new/", "--resume")).stdout
    assert again.startswith("memory://new/photo.vq2  40 x 30")
    assert storage.modified("memory://none") is None and storage.modified("nowhere://a") is None


def test_a_list_of_urls_goes_to_a_remote_folder(memory: dict[str, bytes]) -> None:
    result = encode("memory://photos/a.png", "memory://photos/bad.png", "memory://none.png", "-o", "memory://list/")
    assert result.exit_code == 1 and "1 done, 0 skipped, 2 failed" in result.stdout
    names = ["memory://list/a.vq2", "memory://list/bad.vq2", "memory://none/a.vq2", "photo.png", "none"]
    assert storage.existing(names) == {names[0], "photo.png"}


@pytest.mark.parametrize("url", ["file:///photo.png", "file:///a/photo.png", "file://photo.png", "local://photo.png"])
def test_urls_of_files_are_split_like_other_urls(url: str) -> None:
    folder, name = storage.split(url)
    assert name == "photo.png" and storage.join(folder, name) == url


def test_names_are_paths_unless_they_have_a_protocol() -> None:
    assert storage.local("file:///a/b.png") == "/a/b.png" and storage.local("s3://a/b.png") is None
    assert storage.local("./a://b.png") == "./a://b.png" and storage.local("://") == "://"


def test_sizes_are_zero_where_nobody_knows(memory: dict[str, bytes]) -> None:
    names = ["memory://photos/a.png", "photo.png", "memory://none", "none", "nowhere://a"]
    assert [storage.size(name) for name in names] == [len(memory["a.png"])] * 2 + [0] * 3
