"""The specification of the network, bitstream/FORMAT.md, against the code, and a decoder written from it."""

import contextlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import reference_decoder
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reference_decoder import POWERS, Weights
from tiny_model import GOLDEN, WEIGHTS

from bitstream import container, exact
from bitstream.weights import FORMAT
from bitstream.weights import Weights as Numbers
from vqcodec.codec import Codec
from vqcodec.config import SHIPPED
from vqcodec.models import dyadic

TEXT = (Path(container.__file__).parent / "FORMAT.md").read_text("utf-8")
OF_PIXELS = "alpha-png-", "flat-content-"
NAMES = [line.split()[1] for line in (GOLDEN / "decode.txt").read_text().splitlines()]


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose first heading this is, without backquotes."""
    table = re.search(rf"^\| {heading} .*\n\|-.*\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert table is not None
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


# --- the text ---


def test_the_grids_of_values_are_as_specified() -> None:
    code = {
        "activations": (exact.ACTIVATION_BITS, exact.ACTIVATION_MAX),
        "stream": (exact.STREAM_BITS, exact.STREAM_MAX),
        "logits": (exact.LOGIT_BITS, exact.LOGIT_MAX),
    }
    found = {name: (unit, limits) for name, unit, limits in rows("values")}
    assert found == {name: (f"2^-{bits}", f"-{most}..{most}") for name, (bits, most) in code.items()}


def test_the_numbers_in_the_text_are_those_of_the_code() -> None:
    text = " ".join(TEXT.split())
    assert f"`format`, which is `{FORMAT}`" in text
    assert f"-{exact.WEIGHT_MAX}..{exact.WEIGHT_MAX}; `.exponent`" in text
    assert f"{exact.EXPONENT_MIN}..{exact.EXPONENT_MAX}; `.bias`" in text
    assert f"within +-2^{exact.BIAS_MAX.bit_length() - 1}." in text and exact.BIAS_MAX == 2**19
    for name, offsets in (("CAUSAL", exact.CAUSAL), ("AROUND", exact.AROUND)):
        assert f"{name} {' '.join(map(str, offsets))}" in text
    window = exact.ATTENTION_ROWS, exact.ATTENTION_WAVES
    assert f"u = 0..{window[0] - 1} and v = 1..{window[1]}" in text
    assert f"(A, {window[0]}, {window[1]})" in text
    assert f"No layer has more than {exact.MAX_FAN_IN} inputs" in text
    assert f"K + 1 + {exact.ESCAPE_SIDE} a + b stands for" in text
    assert f"({exact.ESCAPE_STEP} (a - {exact.ESCAPE_SIDE // 2}), {exact.ESCAPE_STEP} (b - 64))" in text
    assert f"first {container.FINGERPRINT_BYTES} bytes of the SHA-256" in text


def test_the_powers_of_two_are_as_specified() -> None:
    numbers = re.search(r"\n\n((?: +\d{6,7}){8}\n(?:(?: +\d{6}){8}\n){3})", TEXT)
    assert numbers is not None
    assert list(map(int, numbers[1].split())) == POWERS[:32].tolist()
    assert exact.POWERS.tolist() == dyadic.POWERS.tolist() == POWERS.tolist()


@pytest.mark.parametrize("path", [WEIGHTS, SHIPPED], ids=["tiny", "shipped"])
def test_a_weights_file_holds_the_tensors_of_the_specification(path: Path) -> None:
    numbers = Numbers.load(path)
    rows_of_biases = numbers.levels * numbers.banks
    expected = {}
    for k, grid in enumerate(numbers.grids):
        symbols = {"M": grid.groups, "d": grid.dim, "K": grid.codes, "D": grid.depth, "k": k, "N": grid.outcomes}
        symbols |= {"C": grid.channels, "B": grid.blocks, "F": grid.flags, "H": grid.hidden, "A": grid.heads}
        symbols |= {"E": grid.head_channels, "Dx": numbers.grids[k - 1].depth if k else 0}

        def value(formula: str, symbols: dict[str, int] = symbols, **more: int) -> int:
            product = re.sub(r"(?<=\w) (?=\w)", "*", formula.replace("D'", "Dx"))
            return int(eval(product, {}, {**symbols, **more}))

        for name, when, count, inputs, outputs in rows("tensor +\\| when +\\| n"):
            if when and not value(when):
                continue
            first, last = (value(end) for end in count.split("..")) if count else (0, 0)
            for n in range(first, last + 1):
                stem = name.replace(".k.", f".{k}.").replace(".n", f".{n}")
                wide, high = value(inputs, n=n), value(outputs, n=n)
                expected[f"{stem}.weight"] = ("I8", (high, wide))
                expected[f"{stem}.exponent"] = ("I8", (high, 1))
                expected[f"{stem}.bias"] = ("I32", (1 if stem.endswith(".out") else rows_of_biases, high))
        for name, when, dtype, shape, _ in rows("tensor +\\| when +\\| dtype"):
            if not when or value(when):
                sides = tuple(value(side) for side in shape.strip("()").split(","))
                expected[name.replace(".k.", f".{k}.")] = (dtype, sides)
    types = {"int8": "I8", "int16": "I16", "int32": "I32", "float16": "F16"}
    found = {name: (types[tensor.dtype.name], tensor.shape) for name, tensor in numbers.tensors.items()}
    assert found == expected


# --- the reference decoder ---


@pytest.fixture(scope="module")
def tiny() -> Weights:
    return reference_decoder.read_weights(WEIGHTS.read_bytes())


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.load(WEIGHTS, "cpu")


def product_indices(codec: Codec, data: bytes) -> list[list[int]]:
    return [grid.tolist() for grid in codec.indices.decode(container.unpack(data))]


def test_the_reference_decoder_stands_alone() -> None:
    source = Path(reference_decoder.__file__).read_text()
    imported = re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)
    assert set(imported) - sys.stdlib_module_names == {"numpy"}
    assert not re.search(r"float\(|np\.float|[^/]/[^/]|\d\.\d", re.sub(r'"""[^"]*"""|#.*', "", source))


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_decoder_reads_the_golden_files(codec: Codec, tiny: Weights, name: str) -> None:
    data = (GOLDEN / "decode" / name).read_bytes()
    assert tiny.fingerprint == codec.fingerprint
    grids = reference_decoder.decode(data, tiny)
    assert [grid.tolist() for grid in grids] == product_indices(codec, data)


def test_the_reference_decoder_reads_a_file_of_the_shipped_model() -> None:
    codec = Codec.load(None, "cpu")
    weights = reference_decoder.read_weights(SHIPPED.read_bytes())
    assert weights.fingerprint == codec.fingerprint
    noise = np.random.default_rng(0).integers(0, 256, (56, 60, 3), np.uint8)
    photo = Image.open(GOLDEN.parent / "images" / "photo.png").convert("RGB").crop((0, 0, 60, 56))
    for image, quality in ((photo, 2), (Image.fromarray(noise), codec.model.config.levels)):
        data = codec.encode(image, quality)
        assert [grid.tolist() for grid in reference_decoder.decode(data, weights)] == product_indices(codec, data)


def test_the_reference_decoder_refuses_what_is_to_be_refused(tiny: Weights) -> None:
    for path in (GOLDEN / "refuse").iterdir():
        refusal = pytest.raises(reference_decoder.Refused)
        if path.stem.startswith(OF_PIXELS):  # it takes no look at pixels
            refusal = contextlib.nullcontext()
        with refusal:
            reference_decoder.decode(path.read_bytes(), tiny)


@given(st.lists(st.integers(0, 2**16 - 1).filter(lambda bits: bits >> 10 & 31 < 31), min_size=1))
def test_code_vectors_become_activations_in_integers(bits: list[int]) -> None:
    halves = np.array(bits, np.uint16).view(np.float16)
    expected = dyadic.activation(torch.from_numpy(halves).float() / 8) * 2**dyadic.ACTIVATION_BITS
    assert exact.code_activations(halves).tolist() == expected.tolist()
    assert reference_decoder.code_activations(np.array(bits)).tolist() == expected.tolist()
