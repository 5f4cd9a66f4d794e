"""The ablations: code lengths against brute force and against real files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import WEIGHTS

from benchmarks import ablate
from benchmarks.metrics import psnr
from bitstream import container
from vqcodec import Codec
from vqcodec.models import dyadic
from vqcodec.weights import load_weights, save_weights

PHOTO = Path(__file__).parent / "images" / "photo.png"


def test_ideal_bits_are_the_entropy_of_each_group() -> None:
    assert ablate.ideal_bits(np.array([[4, 4, 0, 0], [8, 0, 0, 0], [2, 2, 2, 2]])) == pytest.approx(8 + 0 + 16)


def test_adaptive_bits_are_those_of_counting_while_coding() -> None:
    indices, codes = [2, 0, 2, 2, 1, 2], 4
    counts, bits = [0.5] * codes, 0.0
    for index in indices:
        bits -= math.log2(counts[index] / sum(counts))
        counts[index] += 1
    used = np.bincount(indices, minlength=codes)
    assert ablate.adaptive_bits(np.array([used, used])) == pytest.approx(2 * bits)


def test_bits_of_the_full_prior_are_those_of_the_file_and_parts_are_missed_where_they_are() -> None:
    codec = Codec.load(WEIGHTS, device="cpu")
    parts = container.unpack(codec.encode(Image.open(PHOTO), 2))
    grids, ways = codec.indices.decode(parts), ablate.prior_ways(codec.model)
    for k, payload in enumerate(parts.grids):
        found = {name: way(k, grids, parts.header.level - 1) for name, way in ways.items()}
        assert 0 <= len(payload) - found["full"] / 8 <= 12  # rANS rounds up to words
        assert found["full, not rounded"] != found["full"]
        assert found["full, not rounded"] == pytest.approx(found["full"], rel=0.1)
        attention = found["no attention"], found["no attention, no conditioning"]
        assert (attention == (found["full"], found["no conditioning"])) == bool(k)  # only the coarser grid has it
        assert (found["no conditioning"] == found["full"]) == (not k)
        assert (found["no attention, no conditioning"] == found["no attention"]) == (not k)


def test_without_rounding_values_keep_their_limits_and_weights_their_grid() -> None:
    x, layer = torch.tensor([-9.0, 0.3, 9.0]), load_weights(WEIGHTS).priors[0].flag_hidden
    with ablate.Unrounded():
        assert dyadic.activation(x).tolist() == pytest.approx([-127 / 32, 0.3, 127 / 32])
        assert all(torch.equal(a, b) for a, b in zip(layer.on_grid(), (layer.weight, layer.bias), strict=True))
    assert dyadic.activation(x).tolist() == [-127 / 32, 10 / 32, 127 / 32]


def test_ablate_measures_and_saves(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.open(PHOTO).crop((0, 0, 80, 64)).save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:1000])
    result = ablate.run(
        folder, tmp_path / "ablate", weights=WEIGHTS, priors=[WEIGHTS], qualities=(1.0, 3.0), tell=lambda line: None
    )
    assert json.loads((tmp_path / "ablate.json").read_text()) == result
    assert list(result["corpus"]["skipped"]) == ["broken.png"]
    rows = {(row["quality"], row["grid"]): row["bits_per_pixel"] for row in result["priors"]}
    strides = "stride 16", "stride 8"
    assert list(rows) == [*((q, stride) for q in (1, 3) for stride in strides), (1, "all"), (3, "all")]
    for bits in rows.values():
        assert 0 < bits["ideal order 0"] < bits["adaptive order 0"]
        assert bits["prior of tiny"] == bits["full"]
        assert bits.keys() == result["variants"].keys()
    for q in (1, 3):
        assert rows[q, "all"]["full"] == pytest.approx(sum(rows[q, stride]["full"] for stride in strides))
    codec = Codec.load(WEIGHTS, device="cpu")
    data = codec.encode(Image.open(folder / "a.png"), 3, effort=0, tune="psnr")
    chosen, nearest = (result["choice"][choice]["rows"][1] for choice in ("rate-constrained", "nearest"))
    assert chosen["bpp"] == 8 * len(data) / (80 * 64)
    assert nearest["bpp"] > chosen["bpp"]
    assert nearest["psnr"] > chosen["psnr"]
    assert chosen["percent_of_cost"] == chosen["percent_of_size_at_equal_psnr"] == 100
    payloads = sum(len(payload) for payload in container.unpack(data).grids)
    assert 0 < payloads - rows[3, "all"]["full"] * 80 * 64 / 8 <= 2 * 12
    text = ablate.table(result)
    assert "skipped broken.png" in text
    assert "cost of rounding" in text


def test_ablate_compares_efforts_by_what_the_encoder_minimises(tmp_path: Path) -> None:
    Image.open(PHOTO).crop((0, 0, 80, 64)).save(tmp_path / "a.png")
    options = {"weights": WEIGHTS, "qualities": (2.0, 2.5), "tell": lambda line: None}
    result = ablate.run(tmp_path, tmp_path / "ablate", efforts=[2], **options)
    assert list(result["choice"]) == ["nearest", "rate-constrained", "effort 2"]
    codec, picture = Codec.load(WEIGHTS, device="cpu"), Image.open(tmp_path / "a.png")
    for row, base in zip(*(result["choice"][name]["rows"] for name in ("effort 2", "rate-constrained")), strict=True):
        data = codec.encode(picture, row["quality"], effort=2, tune="psnr")
        assert row["bpp"] == 8 * len(data) / (80 * 64)
        assert row["psnr"] == psnr(np.array(picture), np.array(codec.decode(data)))
        wanted = (0.01, math.sqrt(0.01 * 0.05))[row["quality"] == 2.5]  # between two levels the mean of their logs
        cost, least = (wanted * 255**2 * 10 ** (-found["psnr"] / 10) + found["bpp"] for found in (base, row))
        assert row["percent_of_cost"] == pytest.approx(100 * least / cost)
        assert row["percent_of_cost"] < 100
        assert row["seconds_per_megapixel"] > base["seconds_per_megapixel"] > 0
    assert result["choice"]["effort 2"]["bd_rate"]["reason"]
    assert "\neffort 2 " in ablate.table(result)
    with pytest.raises(ValueError, match="effort 4"):
        ablate.run(tmp_path, tmp_path / "ablate", efforts=[4], **options)


def test_priors_over_other_codebooks_are_refused(tmp_path: Path) -> None:
    model = load_weights(WEIGHTS)
    model.codebooks[1].vectors.data += 1
    save_weights(model, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other codebooks"):
        ablate.run(tmp_path, tmp_path / "x", weights=WEIGHTS, priors=[tmp_path / "other.safetensors"])
