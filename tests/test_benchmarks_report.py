"""The page of a rate-distortion result: it holds everything it shows, and a browser shows it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from browser import WIDTHS, ask, needs_browser
from PIL import Image
from tiny_model import WEIGHTS

from benchmarks import rd, report, speed

DATA = re.compile(r'<script id="data" type="application/json">(.*?)</script>', re.DOTALL)
NAME = "a<b>&.png"  # a text that is not markup


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With two pictures, published curves and a table of speed."""
    folder = tmp_path_factory.mktemp("images")
    for k, name in enumerate((NAME, "b.png")):
        Image.fromarray(speed.pink_noise(96, 80, seed=k)).save(folder / name)
    output = tmp_path_factory.mktemp("results") / "small"
    result = rd.run(folder, output, weights=WEIGHTS, rivals=("jpeg",), published=True, tell=lambda line: None)
    cost = {"codec": "vq2", "device": "cpu", "threads": 1, "width": 96, "height": 80, "seconds": {"total": 0.5}}
    rows = [
        {**cost, "direction": direction, "megapixels_per_second": 0.1, "peak_memory_bytes": 1e8}
        for direction in ("encode", "decode")
    ]
    times = {
        "benchmark": "speed",
        "machine": result["machine"],
        "rows": rows,
        "image": "x.png",
        "quality": 3,
        "tune": "psnr",
    }
    beside = output.with_name("speed.json")
    beside.write_text(json.dumps({**times, "machine": {**result["machine"], "fingerprint": "0" * 16}}))
    told = list[str]()
    foreign = report.run(folder, output, weights=WEIGHTS, crops=1, tell=told.append)
    assert f"{beside}: left out, it is of model {'0' * 16}" in told
    assert data_of(Path(foreign["path"]).read_text("utf-8"))["speed"] is None
    beside.write_text(json.dumps({**times, "repeat": 3, "long_seconds": 20.0}))
    place = report.parse_place("b.png+999+0")  # as far to the right as there is
    chosen = report.run(folder, output, weights=WEIGHTS, qualities=(1,), chosen=[place], tell=lambda line: None)
    assert chosen["images"] == ["b.png"]
    made = report.run(folder, output, weights=WEIGHTS, crops=2, qualities=(1, 3), tell=lambda line: None)
    assert made["images"] == [NAME, "b.png"]
    return Path(made["path"]).read_text("utf-8")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(DATA, page)
    assert found
    return dict(json.loads(found[1]))


def test_the_page_needs_no_other_file(page: str) -> None:
    frame = re.sub(DATA, "", page)
    assert set(re.findall(r"\w+://[^\"' ]*", frame)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", frame) == ["data:,"]
    assert not re.search(r"@import|\bfetch\(|XMLHttpRequest|import\(", frame)


@pytest.mark.parametrize("text", ["photo.png", "photo.png+1", "+1+2", "photo.png+a+b"])
def test_a_place_is_a_name_and_two_numbers(text: str) -> None:
    assert report.parse_place("a+b.png+1+20") == ("a+b.png", 1, 20)
    with pytest.raises(ValueError, match="is not a place such as"):
        report.parse_place(text)


def test_the_page_holds_curves_tables_and_crops(page: str) -> None:
    data = data_of(page)
    assert set(data["curves"]) > {"vq2", "jpeg", "VTM *"}
    assert [point["quality"] for point in data["curves"]["vq2"]["psnr"]] == [1, 2, 3]
    assert len(data["levels"]) == 1 + 3
    about = "quality 3, tune psnr; median of 3 calls, or one call if it takes more than 20 s"
    assert data["speed"]["about"].endswith(about)
    assert data["speed"]["rows"][1][:4] == ["vq2, 1 thread", "96x80", "0.500", "0.500"]
    assert [row[0] for row in data["bd"][1:]] == [name for name in data["curves"] if name != "vq2"]
    assert [row[0] for row in data["ranges"]] == ["by PSNR-RGB", *(row[0] for row in data["bd"][1:])]
    titles = [crop["image"].removesuffix(" bits per pixel").rsplit(", ", 1) for crop in data["crops"]]
    assert [name for name, _ in titles] == [NAME, NAME, "b.png", "b.png"]
    rates = [float(rate) for _, rate in titles]
    assert rates[0] < rates[1] and rates[2] < rates[3]
    for crop in data["crops"]:
        assert list(crop["panels"]) == ["original", "vq2", "jpeg"]
        assert all(panel["src"].startswith("data:image/webp;base64,") for panel in crop["panels"].values())
        sizes = {
            name: int(re.findall(r"([\d,]+) bytes", panel["caption"])[0].replace(",", ""))
            for name, panel in crop["panels"].items()
        }
        assert sizes["original"] == 96 * 80 * 3


def test_a_report_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"benchmark": "rd", "machine": {"fingerprint": "00"}}))
    with pytest.raises(ValueError, match="is of model 00"):
        report.run(tmp_path, tmp_path / "x", weights=WEIGHTS)


SCRIPT = """
const event = (type, at) => new frame.contentWindow.PointerEvent(type, { ...at, bubbles: true });
const svg = page.querySelector("#plot svg"), dot = svg.querySelector("circle[fill='#000']").getBoundingClientRect();
svg.dispatchEvent(event("pointermove", { clientX: dot.x + dot.width / 2, clientY: dot.y + dot.height / 2 }));
const tip = page.getElementById("tip"), shown = !tip.hidden && tip.textContent;
page.querySelectorAll("#metrics button")[1]?.click();
const slider = page.querySelector(".crop input");
slider.value = 20;
slider.dispatchEvent(new frame.contentWindow.Event("input"));
return {
  curves: svg.querySelectorAll("path").length,
  tip: shown,
  rows: page.querySelectorAll("#bd tbody tr").length,
  crops: [...page.querySelectorAll("figcaption")].map(caption => caption.textContent),
  clip: page.querySelector(".pair img:nth-child(2)").style.clipPath,
  loaded: [...page.querySelectorAll(".pair img")].every(image => image.complete && image.naturalWidth === 80),
  markup: page.querySelectorAll("figcaption *").length,
};
"""


@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_shows_the_page_at_desktop_and_phone_width(page: str, width: int, tmp_path: Path) -> None:
    found = ask(page, width, SCRIPT, tmp_path)
    data = data_of(page)
    assert found.pop("tip").startswith("vq2, quality 1: ")
    assert found == {
        "overflow": 0,
        "curves": len(data["curves"]),
        "rows": len(data["curves"]) - 1,
        "crops": [NAME, "b.png"],
        "clip": "inset(0px 80% 0px 0px)",
        "loaded": True,
        "markup": 0,
    }
