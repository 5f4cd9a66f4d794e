"""What tests/TRUST.md promises, in short: the scripts of tests/trust and tests/fuzz are the long form."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_decoder
from fuzz import targets
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import GOLDEN, WEIGHTS

from bitstream import container, rans
from bitstream.container import ColourMode, Container, Header
from bitstream.errors import BitstreamError, WeightsError
from vqcodec.alpha import prepared
from vqcodec.codec import Codec
from vqcodec.image import Picture
from vqcodec.weights import load_weights

HERE = Path(__file__).parent
DECODE = [path.read_bytes() for path in sorted((GOLDEN / "decode").iterdir())]
REFUSE = [path.read_bytes() for path in sorted((GOLDEN / "refuse").iterdir())]
# The padded one is large for its size, and the long ones take long: small files are as easily damaged.
SMALL = [data for data in DECODE if len(data) < 300 and container.unpack(data).header.width < 200]
# Metadata may be taken out of a file, chunk by chunk; nothing else may.
BARE = [data for data in SMALL if (parts := container.unpack(data)) and not (parts.icc or parts.exif or parts.xmp)]
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return targets.CODEC


def test_the_table_of_promises_names_tests_and_files_that_exist() -> None:
    text = (HERE / "TRUST.md").read_text("utf-8")
    for file in re.findall(r"\w+/\w+\.py|test_\w+\.py", text.replace(" tests/", " ")):
        assert (HERE / file).is_file(), file
    for file, test in re.findall(r"(test_\w+\.py)::(\w+)", text):
        assert f"def {test}(" in (HERE / file).read_text("utf-8")
    assert f"`decode/`, {len(DECODE)} files" in text and f"| {len(REFUSE)} of {len(REFUSE)} |" in text


# --- any bytes ---


@pytest.mark.filterwarnings("ignore:only a preview")
@pytest.mark.parametrize("target", targets.TARGETS)
def test_fuzz_targets_pass_on_the_conformance_set(target: str, pillow_plugin: None) -> None:
    for data in [*DECODE, *REFUSE]:
        targets.TARGETS[target](data)


@pytest.mark.filterwarnings("ignore:only a preview")
@settings(max_examples=40)
@given(st.sampled_from([*SMALL, *REFUSE]), st.data())
def test_fuzz_targets_pass_on_mutations(pillow_plugin: None, seed: bytes, data: st.DataObject) -> None:
    """A slice of one file in the place of a slice of another, with all checks satisfied that a forger can satisfy."""
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(seed))] * 2)))
    insert = data.draw(st.binary(max_size=40) | st.sampled_from(SMALL).map(lambda other: other[start:end]))
    mutated = seed[:start] + insert + seed[end:]
    structure = targets.restructured(seed, data.draw(st.integers(0, 10**6)))
    for content in (mutated, targets.repaired(mutated), structure):
        for target in targets.TARGETS.values():
            target(content)


@settings(max_examples=150)
@given(st.sampled_from(BARE), st.data())
def test_any_single_corruption_is_refused(codec: Codec, file: bytes, data: st.DataObject) -> None:
    """A byte changed, a slice removed, repeated or zeroed, bytes inserted: a changed file never decodes."""
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(file))] * 2)))
    middle = data.draw(
        st.sampled_from([b"", 2 * file[start:end], bytes(end - start)])
        | st.binary(min_size=1, max_size=end - start + 4)
        | st.integers(1, 255).map(lambda flip: bytes(byte ^ flip for byte in file[start:end]))
    )
    damaged = file[:start] + middle + file[end:]
    if damaged != file:
        with pytest.raises(BitstreamError):
            codec.decode(damaged, max_pixels=2**14)


# --- any picture ---


@st.composite
def pictures(draw: st.DrawFn) -> Picture:
    sides = draw(st.integers(1, 64)), draw(st.integers(1, 64))
    rng, colour = np.random.default_rng(draw(st.integers(0, 10**6))), draw(st.sampled_from(ColourMode)).shown
    pixels = rng.integers(0, 256, (*sides, 3), np.uint8)
    if colour.opaque is ColourMode.GREY:
        pixels = np.repeat(pixels[..., :1], 3, axis=2)
    alpha = rng.integers(0, 256, sides, np.uint8) if colour.has_alpha else None
    icc, exif, xmp = (draw(st.none() | st.binary(max_size=200)) for _ in range(3))
    return Picture(pixels, colour, alpha, icc, None if exif is None else b"MM\0*" + exif, xmp)


@settings(max_examples=60)
@given(pictures(), st.floats(1, 3))
def test_size_mode_alpha_and_metadata_of_any_picture_come_back(codec: Codec, picture: Picture, quality: float) -> None:
    back, picture = codec.decode_picture(codec.encode(picture, quality)), prepared(picture)
    assert (back.pixels.shape, back.colour) == (picture.pixels.shape, picture.colour)
    assert (back.icc, back.exif, back.xmp) == (picture.icc, picture.exif, picture.xmp)
    assert np.array_equal(back.alpha, picture.alpha) if picture.colour.has_alpha else back.alpha is None


# --- any payload ---


@settings(max_examples=25)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 3),
    st.tuples(*[st.lists(st.integers(0, 2**32 - 1), max_size=30)] * 2),
)
def test_any_payload_means_the_same_to_the_reference_decoder(
    size: tuple[int, int], level: int, words: tuple[list[int], list[int]]
) -> None:
    """Random payloads give indices that no encoder would choose: the arithmetic far from what training has seen."""
    codec, weights = targets.CODEC, reference_decoder.read_weights(WEIGHTS.read_bytes())
    payloads = tuple(np.array([*part, 1], "<u4").tobytes() for part in words)
    header = Header(level, *size, ColourMode.RGB, codec.fingerprint)
    with pytest.MonkeyPatch.context() as patch:  # the end of such a payload is hardly ever in order
        for place, name in ((rans, "finish"), (reference_decoder.Coder, "finish"), (container, "verify")):
            patch.setattr(place, name, lambda *_: None)
        patch.setattr(reference_decoder, "verify", lambda *_: None)
        parts = Container(header, 0, payloads)
        found = [grid.tolist() for grid in codec.indices.decode(parts)]
        expected = [grid.tolist() for grid in reference_decoder.decode(container.pack(parts), weights)]
    assert found == expected


# --- weights ---


def test_weights_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(WeightsError):
        load_weights(path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "sprung").exists()  # so that the test can fail


@pytest.mark.parametrize("length", [0, 7, 8, 100, 10_000, -1])
def test_weights_that_are_cut_off_are_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(WEIGHTS.read_bytes()[:length])
    with pytest.raises(WeightsError):
        load_weights(path)


# --- the long scripts, in short ---


def script(name: str, *options: str) -> str:
    result = subprocess.run([sys.executable, HERE / "trust" / name, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@linux
def test_faults_leave_the_old_file_or_a_complete_new_one() -> None:
    report = script("faults.py", "--kills", "10", "--seconds", "0.5")
    assert "10 kills" in report


@linux
def test_a_small_file_takes_little_memory() -> None:
    report = script("limits.py", "--weights", str(WEIGHTS))
    assert report.count("100 bytes") == 3
    assert all(f" {width} x {height} pixels" in report for width, height in ((320, 320), (800, 1), (1, 800)))


@linux
def test_many_round_trips_in_one_process_keep_memory_flat() -> None:
    assert " 0 wrong" in script("soak.py", "100")
