import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_rans
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden import IMAGES
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_model import GOLDEN, WEIGHTS

import vqcodec
from bitstream import container, rans
from bitstream.container import Container, Header
from bitstream.errors import BitstreamError, DamagedError, DeviceError, LimitError, ModelMismatchError, WeightsError
from bitstream.walk import Grid
from vqcodec.codec import Codec, PictureEncoder
from vqcodec.config import BEST_QUALITY, EFFORTS, PRODUCT, TUNES, GridConfig, ModelConfig, PriorConfig, Tune
from vqcodec.image import from_pil, read
from vqcodec.metrics import psnr
from vqcodec.models import precision, refine, tiling
from vqcodec.models.vqvae import VQVAE
from vqcodec.ssimulacra2 import WORTH, Ssimulacra2
from vqcodec.training.trainer import with_two_banks
from vqcodec.weights import load_weights, save_weights

TABLE = [line.split() for line in (GOLDEN / "decode.txt").read_text().splitlines()]
REFUSED = [line.split() for line in (GOLDEN / "refuse.txt").read_text().splitlines()]
PHOTO = IMAGES / "photo.png"


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(WEIGHTS, "cpu")


def index_crc(codec: Codec, data: bytes) -> str:
    parts = container.unpack(data)
    return f"{container.checksum(parts.header, codec.indices.decode(parts)):08x}"


@pytest.mark.parametrize(("crc", "name"), TABLE)
def test_golden_files_decode_to_the_same_indices_forever(codec: Codec, crc: str, name: str) -> None:
    data = (GOLDEN / "decode" / name).read_bytes()
    assert index_crc(codec, data) == crc
    first, second = codec.decode(data), codec.decode(data)
    assert first.tobytes() == second.tobytes()
    header = container.unpack(data).header
    assert first.size == (header.width, header.height)


@pytest.mark.parametrize(("error", "name"), REFUSED)
def test_wrong_files_are_refused_with_the_same_error_forever(codec: Codec, error: str, name: str) -> None:
    with pytest.raises(BitstreamError) as caught:
        codec.decode((GOLDEN / "refuse" / name).read_bytes())
    assert type(caught.value).__name__ == error


@pytest.mark.parametrize(("folder", "table"), [("decode", TABLE), ("refuse", REFUSED)])
def test_the_tables_of_the_conformance_set_name_every_file(folder: str, table: list[list[str]]) -> None:
    assert sorted(name for _, name in table) == sorted(path.name for path in (GOLDEN / folder).iterdir())


SETTINGS = {
    "two threads": {"OMP_NUM_THREADS": "2"},
    "oldest instructions": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
    "bf16 fast-math": {"PRECISION": "medium", "ONEDNN_DEFAULT_FPMATH_MODE": "BF16"},
    "tf32 fast-math": {"PRECISION": "high", "ONEDNN_DEFAULT_FPMATH_MODE": "TF32"},
}
SCRIPT = """
import os, sys, torch
torch.set_float32_matmul_precision(os.environ.get("PRECISION", "highest"))
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
from pathlib import Path
from test_codec import GOLDEN, TABLE, WEIGHTS, Codec, index_crc
codec = Codec.load(WEIGHTS, "cpu")
for crc, name in TABLE:
    assert index_crc(codec, (GOLDEN / "decode" / name).read_bytes()) == crc, name
# Sums as long and as large as they get, enough of them for every thread: the golden files' are short.
from test_dyadic import integers_of, worst_case
from vqcodec.models.dyadic import MAX_FAN_IN
layer, x = worst_case(MAX_FAN_IN)
x = x.repeat(200, 1)
y = layer.at(torch.tensor(0))(x).double() * 2**15
assert torch.equal(y.long(), integers_of(layer, x))
"""


@pytest.mark.parametrize("setting", SETTINGS)
def test_indices_are_the_same_under_every_setting_of_the_machine(setting: str) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **SETTINGS[setting]}
    subprocess.run([sys.executable, "-c", SCRIPT], env=environment, check=True)


def test_an_autocast_of_the_caller_changes_nothing(codec: Codec) -> None:
    image = Image.open(PHOTO)
    expected = codec.encode(image, 2)
    decoded = codec.decode(expected).tobytes()
    for narrow in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", narrow):
            assert codec.encode(image, 2) == expected
            assert codec.decode(expected).tobytes() == decoded


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16, "meta"])
def test_defaults_of_the_caller_change_nothing(codec: Codec, default: torch.dtype | str) -> None:
    """Neither for a model that is there, nor for one that is loaded under them."""
    image = Image.open(PHOTO)
    tunes = {tune: codec.encode(image, 2, effort=2, tune=tune) for tune in TUNES}
    decoded = {tune: codec.decode(data).tobytes() for tune, data in tunes.items()}
    drawn = codec.sample(40, 30, 2).tobytes()
    before = torch.get_default_dtype(), torch.get_default_device()
    try:
        (torch.set_default_device if default == "meta" else torch.set_default_dtype)(default)
        for each in (codec, Codec.load(WEIGHTS, "cpu")):
            for tune, data in tunes.items():
                assert each.encode(image, 2, effort=2, tune=tune) == data
                assert each.decode(data).tobytes() == decoded[tune]
            assert each.sample(40, 30, 2).tobytes() == drawn
    finally:
        torch.set_default_dtype(before[0])
        torch.set_default_device(before[1])


def test_a_codec_shared_by_threads_gives_the_serial_results(codec: Codec) -> None:
    rng = np.random.default_rng(0)
    sizes = [tuple(int(side) for side in rng.integers(1, 48, 2)) for _ in range(200)]
    images = [rng.integers(0, 256, (-(-h // 8), -(-w // 8), 3), np.uint8) for h, w in sizes]
    images = [image.repeat(8, 0).repeat(8, 1)[:h, :w] for image, (h, w) in zip(images, sizes, strict=True)]
    images = [(image + rng.integers(0, 20, image.shape, np.uint8)).astype(np.uint8) for image in images]

    def both(number: int) -> tuple[bytes, bytes]:
        data = codec.encode(images[number], 1 + number % 3, effort=number % 2)
        return data, codec.decode(data).tobytes()

    numbers = range(len(images))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(both, numbers)) == [both(number) for number in numbers]


def test_a_model_codes_like_its_weights_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = load_weights(WEIGHTS)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 1e-3 * p.std())
    data = Codec(model, "cpu").encode(Image.open(PHOTO), 2)
    save_weights(model, tmp_path / "w.safetensors")
    Codec.load(tmp_path / "w.safetensors", "cpu").decode(data)


def test_a_weights_file_is_for_whom_any_new_file_is(tmp_path: Path) -> None:
    save_weights(load_weights(WEIGHTS), tmp_path / "w.safetensors")
    (tmp_path / "any").touch()
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_sample_keeps_the_coarse_grid_that_it_is_drawn_around() -> None:
    codec = Codec.load(device="cpu")  # the tiny model's prior has learned too little to be followed so far
    photo = Image.open(IMAGES / "photo.png").convert("RGB")
    drawn = codec.sample_from(codec.encode(photo, 2), seed=1)
    small = [np.asarray(x.resize((12, 10), Image.Resampling.BOX), float) for x in (photo, drawn)]
    assert 0 < np.abs(small[0] - small[1]).mean() < 15


def test_sampled_images_are_reproducible_and_code_like_any_other(codec: Codec) -> None:
    first, again, other = (codec.sample(50, 40, 2, seed=seed) for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert first.size == codec.decode(codec.encode(first, 2)).size == (50, 40)


def test_every_single_bit_flip_of_a_file_is_refused(codec: Codec) -> None:
    data = (GOLDEN / "decode" / "metadata.vq2").read_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            # Flipped sizes make large images: the limit keeps the test short.
            codec.decode(bytes(damaged), max_pixels=128 * 128)


def test_every_truncation_and_appended_bytes_are_refused(codec: Codec) -> None:
    data = (GOLDEN / "decode" / "grey-alpha.vq2").read_bytes()
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            codec.decode(data[:length])
    for tail in (b"\0", b"\x7f", b"\x41\x00", data):
        with pytest.raises(BitstreamError):
            codec.decode(data + tail)


def test_files_of_another_model_are_refused_by_both_names(codec: Codec) -> None:
    parts = container.unpack((GOLDEN / "decode" / "grey.vq2").read_bytes())
    header = Header(**{**vars(parts.header), "fingerprint": b"stranger"})
    other = Container(**{**vars(parts), "header": header})
    with pytest.raises(ModelMismatchError, match=f"{b'stranger'.hex()}.*{codec.fingerprint.hex()}"):
        codec.decode(container.pack(other))


def test_a_level_or_a_grid_that_the_model_has_not_is_refused(codec: Codec) -> None:
    parts = container.unpack((GOLDEN / "decode" / "grey.vq2").read_bytes())
    header = Header(**{**vars(parts.header), "level": 100})
    with pytest.raises(DamagedError, match="level 100"):
        codec.decode(container.pack(Container(**{**vars(parts), "header": header})))
    with pytest.raises(DamagedError, match="3 grids"):
        codec.decode(container.pack(Container(**{**vars(parts), "grids": (*parts.grids, b"")})))


def test_large_images_are_refused_before_they_are_decoded(codec: Codec) -> None:
    data = (GOLDEN / "decode" / "grey.vq2").read_bytes()
    with pytest.raises(LimitError):
        codec.decode(data[:7] + b"\xff" * 6 + data[13:])


modes = st.sampled_from(["L", "RGB", "LA", "RGBA"])


@settings(max_examples=40)
@given(modes, st.integers(1, 64), st.integers(1, 64), st.integers(0, 10**6), st.sampled_from([1, 1.5, 2, 3]))
def test_any_image_comes_back_in_its_size_and_mode_with_its_alpha(
    codec: Codec, mode: str, width: int, height: int, seed: int, quality: float
) -> None:
    bands = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), np.uint8)
    image = Image.fromarray(bands.squeeze(2) if len(mode) == 1 else bands, mode)
    back = codec.decode(codec.encode(image, quality))
    assert (back.mode, back.size) == (mode, image.size)
    if "A" in mode:
        assert back.getchannel("A").tobytes() == image.getchannel("A").tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1), (17, 33), (16, 16), (15, 64)])
def test_odd_sizes_round_trip(codec: Codec, size: tuple[int, int]) -> None:
    image = Image.open(PHOTO).resize(size)
    assert codec.decode(codec.encode(image, 2)).size == size


def test_metadata_comes_back_and_strip_leaves_it_out(codec: Codec) -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "a description"
    Image.open(PHOTO).save(file, "JPEG", icc_profile=b"profile", exif=exif, xmp=b"<x:xmpmeta/>")
    picture = read(file.getvalue())
    parts = container.unpack(codec.encode(picture, 2))
    assert (parts.icc, parts.exif, parts.xmp) == (picture.icc, picture.exif, picture.xmp)
    assert parts.exif is not None and parts.xmp is not None
    bare = container.unpack(codec.encode(picture, 2, strip=True))
    assert (bare.icc, bare.exif, bare.xmp) == (None, None, None)


def test_arrays_and_images_give_the_same_bytes(codec: Codec) -> None:
    image = Image.open(PHOTO)
    assert codec.encode(np.asarray(image), 2) == codec.encode(image, 2)
    grey = image.convert("L")
    assert codec.encode(np.asarray(grey), 2) == codec.encode(grey, 2)


def test_framing_of_a_plain_picture_takes_at_most_40_bytes(codec: Codec) -> None:
    data = codec.encode(Image.open(PHOTO), 3)
    assert len(data) - sum(map(len, container.unpack(data).grids)) <= 40


def test_the_payload_is_as_short_as_the_prior_says(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    ideal = []
    push = rans.Encoder.push
    monkeypatch.setattr(
        rans.Encoder,
        "push",
        lambda self, low, size: (ideal.append(reference_rans.bits(size)), push(self, low, size))[1],
    )
    parts = container.unpack(codec.encode(Image.open(IMAGES / "otters.png").crop((200, 100, 600, 400)), 3))
    coded, wanted = sum(map(len, parts.grids)), sum(ideal) / 8
    assert wanted <= coded + 1 and coded <= 1.005 * wanted + 8 * len(parts.grids)


def test_more_quality_costs_more_and_gives_more(codec: Codec) -> None:
    image = Image.open(IMAGES / "otters.png").crop((200, 100, 456, 356))
    original = np.asarray(image, np.float64)
    errors, sizes = [], []
    for quality in (1, 1.4, 2.6, 3):
        data = codec.encode(image, quality)
        errors.append(np.mean((np.asarray(codec.decode(data), np.float64) - original) ** 2))
        sizes.append(len(data))
    assert sizes[0] < sizes[-1] and errors[0] > errors[-1]
    assert sizes[1] > sizes[0] and sizes[2] < sizes[3]  # the encoder's lambda moves within a level


def test_tiles_give_the_picture_that_one_piece_gives(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.open(IMAGES / "otters.png").crop((100, 100, 497, 411))  # no whole cells
    data = codec.encode(image, 2)
    whole = np.asarray(codec.decode(data), np.int16)
    monkeypatch.setattr(tiling, "TILE", 128)
    tiled = np.asarray(codec.decode(data), np.int16)
    assert np.abs(tiled - whole).max() <= 1
    assert abs(len(codec.encode(image, 2)) / len(data) - 1) <= 0.003


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_threads_that_share_the_tiles_make_what_one_makes(
    codec: Codec, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    monkeypatch.setattr(tiling, "TILE", 64)
    image = Image.open(IMAGES / "otters.png").crop((100, 100, 397, 311))
    made = []
    for number in (1, 2, 5):
        threads(number)
        data = codec.encode(image, 2)
        made.append((data, codec.decode(data).tobytes()))
        assert torch.get_num_threads() == number
    assert made[0] == made[1] == made[2]


def test_files_for_the_eye_do_not_depend_on_the_number_of_threads(threads: Callable[[int], None]) -> None:
    torch.manual_seed(0)
    model, found = VQVAE(PRODUCT).eval(), []
    for number in (1, 3, 8):
        threads(number)
        one = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), torch.ones(1, 1, 1, 1)
        with torch.no_grad():
            found.append(refine._Eye(model, *one).to_blocks)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_gradient_of_the_rate_is_what_later_codes_make_of_a_code() -> None:
    """Moves one code, and the bits of all others change about as the gradient says."""
    torch.manual_seed(0)
    model = load_weights(WEIGHTS).eval().requires_grad_(False)
    image = torch.from_numpy(np.array(Image.open(IMAGES / "otters.png").convert("RGB").crop((200, 100, 264, 164))))
    x, level = image.permute(2, 0, 1)[None] / 255, torch.tensor([1])
    with torch.no_grad():
        top = model.guess(0, model.latent(0, x, model.analyse(x, level)[0], None, level), level, 0.0)
        book, weights = model.codebooks[0], torch.rand(1, 1, *top.shape[2:])
        gradient = model.rate_gradient(0, top, None, level, weights)
        assert gradient.shape == (1, book.groups * book.dim, *top.shape[2:])
        assert not gradient[0, -book.dim :, -1, -1].any(), "no index comes after the last one"
        assert not model.rate_gradient(0, top, None, level, torch.zeros_like(weights)).any()

        def bits(seen: torch.Tensor) -> float:
            flags, outcomes = model.bits(0, top, seen, None, level)
            return float(((flags + outcomes).double().sum(0) * weights.flatten()).sum())

        seen = model.seen(0, top)
        step = 0.5 * torch.randn(20, *seen.shape)
        change = [bits(seen + s) - bits(seen - s) for s in step]
        said = [float((8 * gradient.permute(0, 2, 3, 1) * 2 * s).sum()) for s in step]
    assert np.corrcoef(change, said)[0, 1] > 0.6


def test_what_goes_wrong_in_a_tile_comes_out(
    codec: Codec, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    monkeypatch.setattr(tiling, "TILE", 64)
    threads(2)
    image = Image.open(IMAGES / "otters.png").crop((100, 100, 397, 311))

    def stop(done: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        codec.encode(image, 2, progress=stop)
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("size", [(96, 72), (8, 8), (16, 400)])
def test_progress_rises_to_one(codec: Codec, size: tuple[int, int]) -> None:
    seen: list[float] = []
    data = codec.encode(Image.open(PHOTO).resize(size), 2, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0
    seen.clear()
    codec.decode(data, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_progress_goes_on_in_the_networks(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile by tile: no stage is passed over in one jump."""
    monkeypatch.setattr(tiling, "TILE", 64)
    image = Image.open(IMAGES / "otters.png").crop((100, 100, 420, 420))
    encoder = PictureEncoder(codec, from_pil(image))
    first: list[float] = []
    again: list[float] = []  # of the same level: it is analysed already
    back: list[float] = []
    data = encoder.encode(2, first.append)
    encoder.encode(2.2, again.append)
    codec.decode(data, progress=back.append)
    for seen in (first, again, back):
        assert seen == sorted(seen) and seen[-1] == 1.0
        assert np.diff([0.0, *seen]).max() < 0.15


def test_qualities_out_of_range_are_refused_with_the_range(codec: Codec) -> None:
    for quality in (0.99, 3.01, float("nan"), -1):
        with pytest.raises(ValueError, match=r"not in 1\.\.3"):
            codec.encode(Image.open(PHOTO), quality)


def test_a_missing_gpu_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DeviceError, match="cuda"):
        Codec.load(WEIGHTS, "cuda")


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, vqcodec, bitstream.container, bitstream.rans, cli; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
    assert vqcodec.Codec is Codec


@pytest.mark.filterwarnings("ignore:only a preview")
def test_a_preview_of_any_bytes_is_an_image_or_an_error_of_its_own(codec: Codec) -> None:
    data = (GOLDEN / "decode" / "grey-alpha.vq2").read_bytes()
    shown = 0
    for length in range(len(data)):
        try:
            image = codec.decode(data[:length], preview=True)
        except BitstreamError:
            continue
        shown += 1
        assert (image.mode, image.size) == ("L", codec.decode(data).size)
    assert shown > 0  # those cut off behind the first grid
    for bit in range(0, 8 * 60, 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(BitstreamError):
            codec.decode(bytes(damaged), preview=True, max_pixels=128 * 128)


def test_an_encoder_gives_the_same_file_whatever_it_has_encoded_before(codec: Codec) -> None:
    picture = from_pil(Image.open(PHOTO))
    encoder = PictureEncoder(codec, picture)
    for quality in (2, 2.4, 3, 1, 2):
        data = encoder.encode(quality)
        assert data == codec.encode(picture, quality)
        assert encoder.decoded().tobytes() == codec.decode(data).tobytes()


def cost(codec: Codec, effort: int, tune: Tune) -> float:
    """What the encoder minimises, lambda 255^2 error + bpp, at quality 2."""
    image = Image.open(PHOTO)
    data = codec.encode(image, 2, effort=effort, tune=tune)
    x, decoded = (torch.from_numpy(np.array(each)).permute(2, 0, 1)[None] / 255 for each in (image, codec.decode(data)))
    error = (x - decoded).square().mean().item()
    if tune == "visual":
        error = 0.5 * error + 0.5 * WORTH * Ssimulacra2()(x, decoded).item()
    return codec.model.config.lambdas[1] * 255**2 * error + 8 * len(data) / (image.width * image.height)


def texture_beside_a_slope() -> Image.Image:
    """The slope has grain: where cells are all alike, rate counts for less without the tune, too."""
    pixels = np.tile(np.linspace(90, 160, 128)[:, None, None], (1, 128, 3))
    deviation = np.where(np.arange(128) < 64, 12, 25)[:, None]
    pixels += deviation * np.random.default_rng(0).normal(0, 1, (128, 128, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("effort", [0, 2])
def test_for_the_eye_bits_go_from_texture_to_flat_parts(codec: Codec, effort: int) -> None:
    def share(tune: Tune) -> float:
        _, (_, bits) = codec.indices.examine(
            container.unpack(codec.encode(texture_beside_a_slope(), 2, tune=tune, effort=effort))
        )
        return float(bits[..., : bits.shape[2] // 2].sum() / bits.sum())

    assert share("visual") > 1.01 * share("psnr")


def test_what_squared_error_has_in_a_step_is_not_limited_for_the_eye(
    codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def even(x: torch.Tensor, cell: int = 1) -> torch.Tensor:
        return torch.ones(1, 1, x.shape[2] // cell, x.shape[3] // cell)

    monkeypatch.setattr("vqcodec.codec.visibility", lambda variance, lambda_: torch.ones_like(variance))
    monkeypatch.setattr("vqcodec.codec.rate_share", even)
    monkeypatch.setattr(refine, "VISUAL_LIMIT", 0.01)
    monkeypatch.setattr(refine, "STEP_LIMIT", float("inf"))

    def grids(tune: Tune, share: float) -> list[Grid]:
        monkeypatch.setattr(refine, "VISUAL_SHARE", share)
        encoder = PictureEncoder(codec, from_pil(Image.open(PHOTO)), tune=tune)
        encoder.encode(2)
        return encoder.grids

    plain = grids("psnr", 0.0)
    assert all(map(np.array_equal, plain, grids("visual", 0.0)))
    assert not all(map(np.array_equal, plain, grids("visual", 0.5)))


@pytest.mark.parametrize("visual", [False, True])
def test_coarse_latents_are_fitted_to_the_picture(codec: Codec, visual: bool) -> None:
    model, level = codec.model, torch.tensor([1])
    x = torch.from_numpy(np.array(Image.open(PHOTO).resize((128, 96)))).permute(2, 0, 1)[None]
    features = model.analyse(x / 255, level)
    right = model.latent(0, x, features[0], None, level)
    bits, weights = torch.tensor([model.config.sample_bits(1)]), torch.ones(1, 1, x.shape[2] // 8, x.shape[3] // 8)
    wrong = right + 4
    fitted = refine.refined_latents(model, x, wrong, features[1:], None, level, bits, weights, 4, [], visual)
    assert (fitted - right).square().mean() < 0.95 * (wrong - right).square().mean()


def test_without_a_linear_path_the_fit_for_the_eye_is_that_by_squared_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_weights(WEIGHTS)
    torch.manual_seed(0)
    encoder = PictureEncoder(Codec(VQVAE(replace(model.config, linear_path=False))), from_pil(Image.open(PHOTO)))
    encoder.encode(2)
    fitted = encoder.grids
    monkeypatch.setattr(refine, "VISUAL_SHARE", 0.9)
    encoder.encode(2)
    assert all(map(np.array_equal, fitted, encoder.grids))


def test_an_unknown_tune_is_refused(codec: Codec) -> None:
    with pytest.raises(ValueError, match="'ear' is not one of psnr, visual"):
        codec.encode(Image.open(PHOTO), 2, tune="ear")  # type: ignore[arg-type]


def test_a_bank_for_the_eye_leaves_the_other_one_as_it_is(codec: Codec) -> None:
    grown = with_two_banks(load_weights(WEIGHTS))
    for latent in grown.latents:  # a finer choice at each level for the eye
        latent.log_gain.data[3:] += 0.7
        latent.log_inverse.data[3:] -= 0.7
        latent.null.data[3:] *= 2
    two, photo = Codec(grown, "cpu"), Image.open(PHOTO)
    files = {(c, tune): c.encode(photo, 2, tune=tune) for c in (codec, two) for tune in TUNES}
    grids = {key: [grid for grid, _ in key[0].indices.examine(container.unpack(data))] for key, data in files.items()}

    def same(a: tuple[Codec, Tune], b: tuple[Codec, Tune]) -> bool:
        return all(map(np.array_equal, grids[a], grids[b]))

    assert same((codec, "psnr"), (two, "psnr")) and not same((codec, "visual"), (two, "visual"))
    assert codec.decode(files[codec, "psnr"]).tobytes() == two.decode(files[two, "psnr"]).tobytes()
    coarse, fine = (psnr(np.array(photo), np.array(two.decode(files[two, tune]))) for tune in TUNES)
    assert fine > coarse + 0.3


def test_an_effort_out_of_range_is_refused(codec: Codec) -> None:
    with pytest.raises(ValueError, match="effort 4"):
        codec.encode(Image.open(PHOTO), 2, effort=4)


@pytest.mark.skipif(not precision.fast_bfloat16(torch.device("cpu")), reason="emulated bfloat16 is not used")
def test_bfloat16_costs_less_than_a_hundredth_of_a_decibel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped model's pictures, at every level."""
    image, codec = Image.open(PHOTO), Codec.load(device="cpu")
    original = np.asarray(image)
    for quality in range(1, BEST_QUALITY + 1):
        data, found = codec.encode(image, quality, effort=0), []
        for fast in (False, True):
            monkeypatch.setattr(precision, "fast_bfloat16", lambda device, fast=fast: fast)
            found.append(psnr(original, np.asarray(codec.decode(data))))
        assert found[1] == pytest.approx(found[0], abs=0.01)


@pytest.mark.parametrize("size", [(1, 200), (16, 400), (17, 400), (400, 16)])
def test_narrow_pictures_are_coded_alike_in_either_precision(
    codec: Codec, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's bfloat16 convolutions go wrong where an output is one column wide."""
    image, found = Image.open(PHOTO).resize(size), []
    for fast in (False, True):
        monkeypatch.setattr(precision, "fast_bfloat16", lambda device, fast=fast: fast)
        found.append(psnr(np.asarray(image), np.asarray(codec.decode(codec.encode(image, 2)))))
    assert found[1] == pytest.approx(found[0], abs=0.5)


@pytest.mark.parametrize(("tune", "effort"), [("psnr", 1), ("visual", 3)])  # limited steps, and a model hardly trained
@pytest.mark.parametrize("fast", [False, True])
def test_effort_gives_a_better_file_in_either_precision(
    codec: Codec, fast: bool, tune: Tune, effort: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: fast)
    assert cost(codec, effort, tune) < cost(codec, 0, tune)


@pytest.mark.parametrize("lambdas", [(0.01, 0.02), (0.0,)])
@pytest.mark.parametrize("strides", [(16, 8, 4), (4,)])
def test_models_of_one_or_three_grids_code_at_every_effort(
    strides: tuple[int, ...], lambdas: tuple[float, ...]
) -> None:
    prior = PriorConfig(8, blocks=2, flags=2, hidden=8)
    grids = tuple(GridConfig(stride, groups=2, dim=2, codes=8, prior=prior) for stride in strides)
    model = VQVAE(ModelConfig("small", lambdas, channels=(8,) * len(strides), blocks=1, grids=grids))
    small = Codec(model, "cpu")
    image = Image.open(PHOTO).resize((56, 40))
    for effort in range(len(EFFORTS)):
        for tune in TUNES:
            assert small.decode(small.encode(image, 1, effort=effort, tune=tune)).size == image.size


@pytest.mark.parametrize(
    "fields",
    [
        {"blocks": 10**7},
        {"blocks": [1, 10**7, 1]},
        {"blocks": [1, 1]},
        {"blocks": [1, 1, "1"]},
        {"blocks": 3},
        {"blocks": -1},
        {"blocks": "2"},
        {"channels": [10**6, 24, 24]},
    ],
    ids=str,
)
def test_networks_that_do_not_fit_their_weights_are_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    with safe_open(WEIGHTS, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = {**json.loads(metadata["config"]), **fields}
    save_file(tensors, path, {**metadata, "config": json.dumps(config)})
    with pytest.raises(WeightsError, match=str(path)):
        load_weights(path)


def test_stages_may_differ_in_blocks(tmp_path: Path) -> None:
    small = load_weights(WEIGHTS)
    model = VQVAE(replace(small.config, blocks=(2, 0, 0)))
    for k in (0, 1):
        for part in ("features", "decoder"):
            assert model.config.halo(k, part) < VQVAE(replace(small.config, blocks=2)).config.halo(k, part)
    save_weights(model, tmp_path / "w")
    loaded = load_weights(tmp_path / "w")
    assert loaded.config == model.config
    assert [[len(stage.blocks) for stage in part] for part in (loaded.analysis, loaded.synthesis)] == [[2, 0, 0]] * 2
    image, codec = Image.open(PHOTO).resize((56, 40)), Codec(loaded, "cpu")
    assert codec.decode(codec.encode(image, 2)).size == image.size
