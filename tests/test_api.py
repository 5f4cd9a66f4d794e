"""What `import vqcodec` gives: names, errors, warnings, types."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_model import WEIGHTS

import vqcodec
from bitstream import errors
from vqcodec.codec import Codec
from vqcodec.image import Picture, from_pil

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model as the default one."""
    monkeypatch.setitem(vqcodec._default, "auto", Codec.load(WEIGHTS, "cpu"))


def subclasses(error: type[Exception]) -> set[type[Exception]]:
    return {error}.union(*map(subclasses, error.__subclasses__()))


def test_every_error_stands_in_one_file_and_can_be_caught_by_its_name_in_vqcodec() -> None:
    import vqcodec.batch
    import vqcodec.jobs
    import vqcodec.training.trainer  # noqa: F401

    for error in subclasses(vqcodec.VqcodecError):
        assert error.__module__ == "bitstream.errors"
        assert error.__name__ in vqcodec.__all__ and getattr(vqcodec, error.__name__) is error
        assert error.__name__ in (errors.__doc__ or "")


def test_importing_vqcodec_and_the_plan_of_jobs_imports_nothing_slow() -> None:
    check = "import sys, vqcodec, vqcodec.jobs; print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", check], cwd=ROOT, text=True) == "set()\n"


def deep() -> Image.Image:
    return Image.fromarray(np.full((20, 30), 40000, np.uint16))


ENCODERS: dict[str, Callable[..., object]] = {
    "encode": lambda image, **options: vqcodec.encode(image, 2, **options),
    "encode_to": lambda image, **options: vqcodec.encode_to(image, vqcodec.Target("bpp", 1.0), **options),
    "Codec.encode": lambda image, **options: vqcodec._default["auto"].encode(image, 2, **options),
    "Codec.encode_to": lambda image: vqcodec._default["auto"].encode_to(image, vqcodec.Target("bpp", 1.0)),
}


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_what_a_file_cannot_hold_is_a_warning_in_the_caller_s_line(encode: Callable[..., object]) -> None:
    with pytest.warns(UserWarning, match="^16-bit samples were reduced to 8 bits$") as caught:
        encode(deep())
    assert [Path(warning.filename) for warning in caught] == [Path(__file__)]


def test_the_notes_of_a_picture_are_its_owner_s_and_those_of_stripping_are_told() -> None:
    picture = from_pil(deep())
    assert picture.notes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vqcodec.encode(picture, 2) == vqcodec._default["auto"].encode(picture, 2)
        vqcodec.encode(np.zeros((8, 8), np.uint8), 2, strip=True)
    broken = Picture(picture.pixels, picture.colour, icc=b"no profile", notes=["old"])
    with pytest.warns(UserWarning) as caught:
        vqcodec.encode(broken, 2, strip=True)
    assert [str(warning.message) for warning in caught] == ["the ICC profile cannot be used and was dropped"]


def test_what_a_preview_lacks_is_a_warning_in_the_caller_s_line() -> None:
    image = Image.open(ROOT / "tests" / "images" / "photo.png").resize((64, 64))
    data = vqcodec.encode(image, 2)
    for decode in (vqcodec.decode, vqcodec._default["auto"].decode):
        with pytest.warns(UserWarning, match="^only a preview without alpha, metadata and areas of one") as caught:
            decode(data[:-20], preview=True)
        assert [Path(warning.filename) for warning in caught] == [Path(__file__)]


def test_the_packages_say_that_they_are_typed() -> None:
    assert all((ROOT / package / "py.typed").exists() for package in ("bitstream", "vqcodec"))
    assert (ROOT / "pyproject.toml").read_text().count('"py.typed"') == 2


FORK = """
import multiprocessing, sys, torch, vqcodec
from PIL import Image

torch.set_num_threads(2)
vqcodec._default["cpu"] = vqcodec.Codec.load(sys.argv[1], "cpu")
image = Image.open(sys.argv[2]).convert("RGB")


def encode(quality):
    return vqcodec.encode(image, quality, device="cpu")


before = encode(2)
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map_async(encode, [2, 2]).get(60) == [before, before]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_that_has_encoded_with_several_threads_may_fork(tmp_path: Path) -> None:
    (tmp_path / "fork.py").write_text(FORK)
    command = [sys.executable, str(tmp_path / "fork.py"), str(WEIGHTS), str(ROOT / "tests" / "images" / "photo.png")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    subprocess.run(command, env=env, check=True, timeout=120)
