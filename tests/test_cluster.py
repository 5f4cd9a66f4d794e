"""`--engine ray`: what it makes is what the local engine makes, whatever happens to the workers. One small cluster."""

import importlib.metadata
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import click.testing
import pytest
from PIL import Image
from test_cli import refused, run
from tiny_model import WEIGHTS

from bitstream.errors import ClusterError, WorkerError
from vqcodec.batch import Encode, Result, spread
from vqcodec.codec import Codec, Progress

ray = pytest.importorskip("ray")

from vqcodec.cluster import RayPool  # noqa: E402

PHOTO = Path(__file__).parent / "images" / "photo.png"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(WEIGHTS, "cpu")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """Two workers on this machine, for all tests. They are sent the model and load none."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with three pictures and a bad one, in the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    photo = Image.open(PHOTO).convert("RGB")
    for number, name in enumerate(["a.png", "b.png", "trip/c.webp"]):
        photo.resize((40 + number, 30)).save(folder / name)
    (folder / "bad.png").write_bytes(b"not a picture")
    return folder


def encode(*args: object) -> click.testing.Result:
    return run("encode", "--weights", WEIGHTS, "--device", "cpu", "-q", 2, *args)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_becomes_the_same_files_as_on_one_machine(tmp_path: Path) -> None:
    local = encode("photos", "-o", "local", "--jobs", 2)
    spread = encode("photos", "-o", "ray", "--engine", "ray")
    assert spread.exit_code == local.exit_code == 1
    assert spread.stderr == local.stderr and "photos/bad.png: not an image" in spread.stderr
    assert tree(tmp_path / "ray") == tree(tmp_path / "local") and len(tree(tmp_path / "ray")) == 3
    (table, time), (other, _) = (re.split("^(?=time)", result.stdout, flags=re.MULTILINE) for result in (local, spread))
    assert table == other and "3 done, 0 skipped, 1 failed" in table and "failed  photos/bad.png" in time
    back = run("decode", "--weights", WEIGHTS, "ray", "-o", "back", "--engine", "ray")
    assert back.exit_code == 0 and "3 done" in back.stdout and len(tree(tmp_path / "back")) == 3


def test_urls_resume_and_json_are_as_on_one_machine(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.vq2").write_bytes(b"by another")
    source, out = f"file://{tmp_path}/photos", f"file://{tmp_path}/out"
    result = encode(source, "-o", out, "--engine", "ray", "--json", "--resume")
    *files, summary = map(json.loads, result.stdout.splitlines())
    assert {(file["file"], file["output"], file["status"]) for file in files} == {
        (f"{source}/b.png", f"{out}/b.vq2", "done"),
        (f"{source}/bad.png", f"{out}/bad.vq2", "failed"),
        (f"{source}/trip/c.webp", f"{out}/trip/c.vq2", "done"),
    }
    assert {"done": 2, "skipped": 1, "failed": 1}.items() <= summary["summary"].items()
    assert tree(tmp_path / "out")["a.vq2"] == b"by another"


def test_a_killed_worker_loses_nothing(
    tmp_path: Path, photos: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqcodec.cluster.RETRIES", 1)  # new workers take seconds
    encode_one, marks = Encode(2, None, tune="psnr", strip=False, effort=0, max_pixels=10**6), tmp_path / "marks"
    marks.mkdir()

    def work(codec: Codec, data: bytes, progress: Progress | None = None) -> Result:
        name, _, picture = data.partition(b"\n")
        mark = marks / name.decode()
        if name == b"always" or name.startswith(b"once") and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return encode_one(codec, picture)

    picture = (photos / "a.png").read_bytes()
    jobs = [b"a", b"once1", b"always", b"b", b"once2", b"c"]
    found = {}
    for job, outcome in spread(work, jobs, lambda job: job + b"\n" + picture, RayPool(codec, 2)):
        try:
            found[job] = outcome()[1].data
        except WorkerError as error:
            assert job == b"always" and "died" in str(error)
    assert len(list(marks.iterdir())) == 3
    assert found == dict.fromkeys(set(jobs) - {b"always"}, encode_one(codec, picture).data)


def test_errors_of_a_worker_are_those_of_one_machine(codec: Codec) -> None:
    def work(codec: Codec, data: bytes, progress: Progress | None = None) -> Result:
        raise ZeroDivisionError("a bug")

    ((_, outcome),) = spread(work, ["a"], str.encode, RayPool(codec, 2))
    with pytest.raises(ZeroDivisionError, match="^a bug$") as caught:
        outcome()
    assert "in work" in str(caught.value.__cause__)  # where it came from


def test_a_cluster_without_this_vqcodec_is_refused(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vqcodec.cluster.__version__", "9.9")
        with pytest.raises(ClusterError, match="this is 9.9: make them the same"):
            RayPool(codec)

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("vqcodec.cluster.importlib.metadata.version", version)
    with pytest.raises(ClusterError, match="the cluster has no vqcodec: install"):
        RayPool(codec)


def test_a_cluster_out_of_reach_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    ended: list[bool] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    refused(encode("photos", "-o", "out", "--engine", "ray"), "no Ray cluster to work on", "RAY_ADDRESS")
    assert ended and tree(tmp_path / "out") == {}
