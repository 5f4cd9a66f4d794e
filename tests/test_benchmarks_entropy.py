"""Where the bits go: index grids by hand and of real files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import WEIGHTS

from benchmarks import entropy, indices
from bitstream import container
from vqcodec import Codec
from vqcodec.models.quantizer import Codebook

PHOTO = Path(__file__).parent / "images" / "photo.png"


def test_the_use_of_null_codes_and_escapes_is_counted_by_group() -> None:
    book = Codebook(2, 3, 2, levels=1, escape=True)
    grid = np.array([[[0, 3, 1, 3]], [[4, 0, 4 + 128**2 - 1, 4 + 200]]], np.uint16)  # 4 is the first of the escapes
    used = indices.usage(grid, book)
    assert used.tolist() == [[1, 1, 0, 2, 0], [1, 0, 0, 0, 3]]
    assert indices.escape_bits(used, book).tolist() == [0, 3 * 14]
    assert indices.usage(grid[:1], Codebook(1, 3, 2, levels=1)).tolist() == [[1, 1, 0, 2]]


def test_the_middle_is_at_most_768_pixels_a_side() -> None:
    picture = np.zeros((770, 20, 3), np.uint8)
    picture[1:769] = 255
    assert indices.middle(picture).shape == (768, 20, 3)
    assert indices.middle(picture).all()


def test_bits_are_those_of_the_walk_over_a_file() -> None:
    codec = Codec.load(WEIGHTS, device="cpu")
    grids, walked = zip(
        *codec.indices.examine(container.unpack(codec.encode(Image.open(PHOTO), 2, tune="psnr"))), strict=True
    )
    level, _ = codec.level_for(2)
    for k, book in enumerate(codec.model.codebooks):
        flags, outcomes = indices.prior_bits(codec.model, k, grids, level)
        used = indices.usage(grids[k], book)
        assert used[:, -1].any(), "the photograph no longer tests escapes"
        assert flags + outcomes == pytest.approx(walked[k].sum((1, 2)), rel=1e-6)
        assert (outcomes >= indices.escape_bits(used, book)).all()
        assert indices.prior_bits(codec.model, k, grids, level, exact=False) == pytest.approx(
            np.stack([flags, outcomes]), rel=0.01
        )


def test_only_flags_of_null_take_bits() -> None:
    model = Codec.load(WEIGHTS, device="cpu").model
    grids = [np.zeros((grid.groups, 32 // grid.stride, 32 // grid.stride), np.uint16) for grid in model.config.grids]
    for k, book in enumerate(model.codebooks):
        flags, outcomes = indices.prior_bits(model, k, grids, 0)
        assert flags.shape == outcomes.shape == (book.groups,)
        assert (flags > 0).all()
        assert not outcomes.any()


def test_training_counts_the_same_bits() -> None:
    model = Codec.load(WEIGHTS, device="cpu").model
    book, generator = model.codebooks[0], torch.Generator().manual_seed(1)
    index = torch.randint(book.outcomes + 1, (2, book.groups, 3, 4), generator=generator)
    seen = book.activations(book.lookup(index.transpose(0, 1).flatten(1)), 2, 3, 4)
    found = model.code_lengths(0, index, seen, None, torch.tensor([0, 1]))
    for sample, level in enumerate((0, 1)):
        exact = indices.prior_bits(model, 0, [index[sample].numpy()], level)
        assert found[sample] == pytest.approx(exact.sum(), rel=0.01)


def test_perplexity_counts_equally_likely_codes() -> None:
    used = np.array([[5, 5, 5, 5, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0], [0] * 8])
    assert entropy.perplexity(used) == pytest.approx([4, 1, 1])


def test_entropy_accounts_for_every_byte(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with Image.open(PHOTO) as photo:
        photo.save(folder / "b.png")
        photo.crop((0, 0, 71, 51)).save(folder / "a.png")
    (folder / "broken.png").write_bytes((folder / "b.png").read_bytes()[:2000])
    result = entropy.run(folder, tmp_path / "entropy", weights=WEIGHTS, qualities=(2.0,), tell=lambda line: None)
    assert json.loads((tmp_path / "entropy.json").read_text()) == result
    assert (result["corpus"]["images"], list(result["corpus"]["skipped"])) == (2, ["broken.png"])
    (level,) = result["levels"]
    codec = Codec.load(WEIGHTS, device="cpu")
    files = [container.unpack(codec.encode(Image.open(folder / name), 2, tune="psnr")) for name in ("a.png", "b.png")]
    assert level["file_bytes"] == level["payload_bytes"] + 2 * level["framing_bytes_per_image"]
    assert level["framing_bytes_per_image"] <= 40
    assert 0 < level["payload_bytes"] - level["ideal_bytes"] <= 2 * 2 * 12  # rANS rounds each payload up to words
    for k, (grid, found) in enumerate(zip(codec.model.config.grids, level["grids"], strict=True)):
        assert found["payload_bytes"] == sum(len(file.grids[k]) for file in files)
        cells = sum(-(-h // 16) * -(-w // 16) * (16 // grid.stride) ** 2 for h, w in ((72, 96), (51, 71)))
        assert found["indices"] == cells * grid.groups
        coded = cells * np.array(found["percent_not_null"]) / 100
        assert ((np.array(found["codes_used"]) <= grid.codes) & (found["escapes"] <= coded)).all()
        assert all(1 <= p <= max(n, 1) for p, n in zip(found["perplexity"], coded, strict=True))
        spent = cells * sum(found["bits_per_flag"]) + coded @ found["bits_per_outcome"]
        assert spent / 8 == pytest.approx(found["ideal_bytes"])
        kinds = [found[f"bpp_of_{kind}"] for kind in ("flags", "outcomes", "escapes")]
        assert sum(kinds) == pytest.approx(found["bpp"])
        assert kinds[2] == sum(found["escapes"]) * 14 / result["corpus"]["pixels"]
    assert sum(found["ideal_bytes"] for found in level["grids"]) == pytest.approx(level["ideal_bytes"])
    text = entropy.table(result)
    assert "skipped broken.png" in text
    assert "stride 8, K 31: " in text
