import multiprocessing
import os
import time

import pytest
from tiny_model import GOLDEN, WEIGHTS

from bitstream.errors import WorkerError
from vqcodec.batch import Decode, LocalPool, Result, spread
from vqcodec.codec import Codec, Progress
from vqcodec.files import find
from vqcodec.jobs import new_names

FILES = sorted((GOLDEN / "decode").glob("photo*.vq2"))


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(WEIGHTS, "cpu")


def work(codec: Codec, data: bytes, progress: Progress | None = None) -> Result:
    """What the bytes say."""
    if data == b"die":
        os._exit(9)
    if data == b"fail":
        raise ValueError("on purpose")
    if data == b"model":
        return Result(codec.fingerprint, 1, 1, 0.0)
    time.sleep(600 if data == b"wait" else 0.02)
    return Result(data.upper(), 1, 1, 0.0)


def outcomes(jobs: list[str], codec: Codec, workers: int = 2) -> dict[str, bytes | type[Exception]]:
    found: dict[str, bytes | type[Exception]] = {}

    def read(job: str) -> bytes:
        if job == "missing":
            raise FileNotFoundError(job)
        return job.rstrip("0123456789").encode()

    for job, outcome in spread(work, jobs, read, LocalPool(codec, str(WEIGHTS), workers)):
        try:
            size, made = outcome()
            assert size == len(read(job))
            found[job] = made.data
        except Exception as error:
            found[job] = type(error)
    return found


def test_every_job_is_done_and_failures_stay_their_own(codec: Codec) -> None:
    jobs = ["a1", "missing", "b2", "fail3", "c4", "d5", "missing", "e6"]
    found = outcomes(jobs, codec)
    assert found == {
        "a1": b"A", "b2": b"B", "c4": b"C", "d5": b"D", "e6": b"E", "missing": FileNotFoundError, "fail3": ValueError
    }  # fmt: skip


def test_a_worker_that_dies_takes_one_job_with_it(codec: Codec) -> None:
    jobs = ["a1", "die2", "b3", "c4", "die5", "d6"]
    found = outcomes(jobs, codec)
    assert found == {"a1": b"A", "die2": WorkerError, "b3": b"B", "c4": b"C", "die5": WorkerError, "d6": b"D"}


def test_who_stops_listening_stops_the_workers(codec: Codec) -> None:
    spreading = spread(work, ["a", "wait", "wait"], str.encode, LocalPool(codec, str(WEIGHTS), 2))
    assert next(spreading)[0] == "a"
    spreading.close()
    assert not multiprocessing.active_children()


def test_nothing_to_do_is_done_at_once(codec: Codec) -> None:
    assert outcomes([], codec) == {} and outcomes(["missing"], codec) == {"missing": FileNotFoundError}


def test_workers_decode_like_this_process(codec: Codec) -> None:
    decode = Decode("png", False, 10**6)
    spreading = spread(decode, FILES[:2], lambda path: path.read_bytes(), LocalPool(codec, str(WEIGHTS), 2))
    found = {path: outcome()[1].data for path, outcome in spreading}
    assert found == {path: decode(codec, path.read_bytes()).data for path in FILES[:2]}


def test_workers_load_the_model_where_they_cannot_inherit_it(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqcodec.batch.sys.platform", "elsewhere")
    assert outcomes(["model"], codec, workers=1) == {"model": codec.fingerprint}


def test_files_are_found_in_the_tree_by_their_endings(tmp_path: os.PathLike[str]) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png", "sub/c.png", "sub/deep/d.png", ".git/e.png"):
        path = os.path.join(tmp_path, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "w").close()
    os.symlink(tmp_path, os.path.join(tmp_path, "sub", "loop"))
    found = find(str(tmp_path), {".png", ".jpg"})
    assert found.paths == ["a.JPG", "b.png", os.path.join("sub", "c.png"), os.path.join("sub", "deep", "d.png")]
    with pytest.raises(OSError):
        find(os.path.join(tmp_path, "none"), {".png"})


def test_new_names_keep_the_ending_where_they_would_clash(tmp_path: os.PathLike[str]) -> None:
    paths = dict.fromkeys(["a.png", "b.png", "b.jpg", "s/b.png", "c"])
    assert list(new_names(paths, ".vq2", str(tmp_path)).values()) == [
        "a.vq2",
        "b.png.vq2",
        "b.jpg.vq2",
        "s/b.vq2",
        "c.vq2",
    ]
