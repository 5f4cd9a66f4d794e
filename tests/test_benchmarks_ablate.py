"""The ablations: code lengths against brute force and against real files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import WEIGHTS

from benchmarks import ablate, speed
from bitstream import container
from vqcodec import Codec
from vqcodec.codec import decode_indices
from vqcodec.weights import load_weights, save_weights


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


def test_use_of_codes_is_counted_by_group() -> None:
    grid = torch.tensor([[[[0, 1]], [[2, 2]]]], dtype=torch.int16)
    assert ablate.usage(grid, 3).tolist() == [[1, 1, 0], [0, 0, 2]]


def test_bits_of_the_full_prior_are_those_of_the_file_and_parts_are_put_back() -> None:
    codec = Codec.load(WEIGHTS, device="cpu")
    parts = container.unpack(codec.encode(speed.pink_noise(96, 80), 2))
    grids, level = decode_indices(codec, parts), torch.tensor([parts.header.level - 1])
    for k, payload in enumerate(parts.grids):
        found = ablate.part_bits(codec.model, k, grids, level)
        assert 0 <= len(payload) - found["full"] / 8 <= 12  # rANS rounds up to words
        assert ablate.part_bits(codec.model, k, grids, level) == found
        assert found["full, not rounded"] != found["full"]
        assert found["full, not rounded"] == pytest.approx(found["full"], rel=0.1)
        without = {name: bits for name, bits in found.items() if name.startswith("no ")}
        assert set(without) == ({"no conditioning"} if k else {"no attention"})
        assert all(bits != found["full"] for bits in without.values())


def test_ablate_measures_and_saves(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(speed.pink_noise(80, 64)).save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:1000])
    result = ablate.run(
        folder, tmp_path / "ablate", weights=WEIGHTS, priors=[WEIGHTS], qualities=(1.0, 3.0), tell=lambda line: None
    )
    assert json.loads((tmp_path / "ablate.json").read_text()) == result
    assert list(result["corpus"]["skipped"]) == ["broken.png"]
    assert [(row["quality"], row["stride"]) for row in result["priors"]] == [(1, 16), (1, 8), (3, 16), (3, 8)]
    for row in result["priors"]:
        bits = row["bits_per_index"]
        assert 0 < bits["ideal order 0"] < bits["adaptive order 0"]
        assert bits["prior of tiny"] == bits["full"]
    codec = Codec.load(WEIGHTS, device="cpu")
    data = codec.encode(Image.open(folder / "a.png"), 3)
    chosen, nearest = (result["choice"][choice][1] for choice in ("rate-constrained", "nearest"))
    assert chosen["bpp"] == 8 * len(data) / (80 * 64)
    assert nearest["bpp"] > chosen["bpp"]
    assert nearest["psnr"] > chosen["psnr"]
    text = ablate.table(result)
    assert "skipped broken.png" in text
    assert "cost of rounding" in text


def test_priors_over_other_codebooks_are_refused(tmp_path: Path) -> None:
    model = load_weights(WEIGHTS)
    model.codebooks[1].vectors.data += 1
    save_weights(model, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other codebooks"):
        ablate.run(tmp_path, tmp_path / "x", weights=WEIGHTS, priors=[tmp_path / "other.safetensors"])
