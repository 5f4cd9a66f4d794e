"""The page of a rate-distortion result: it holds everything it shows, and a browser shows it."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny_model import WEIGHTS

from benchmarks import rd, report, speed

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
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
    times = {"benchmark": "speed", "machine": result["machine"], "rows": rows}
    output.with_name("speed.json").write_text(json.dumps(times))
    made = report.run(folder, output, weights=WEIGHTS, crops=2, tell=lambda line: None)
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


def test_the_page_holds_curves_tables_and_crops(page: str) -> None:
    data = data_of(page)
    assert set(data["curves"]) > {"vq2", "jpeg", "VTM *"}
    assert [point["quality"] for point in data["curves"]["vq2"]["psnr"]] == [1, 2, 3]
    assert len(data["levels"]) == 1 + 3
    assert data["speed"]["rows"][1][:4] == ["vq2, 1 thread", "96x80", "0.500", "0.500"]
    assert [row[0] for row in data["bd"][1:]] == [name for name in data["curves"] if name != "vq2"]
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


PROBE = """
<title>waiting</title>
<iframe id="frame" style="width: WIDTHpx; height: 800px; border: 0"></iframe>
<script>
const frame = document.getElementById("frame");
const fail = text => { document.title = "failed: " + text; };
frame.srcdoc = SOURCE;
frame.onload = () => setTimeout(() => {
  try {
    const page = frame.contentDocument, root = page.documentElement;
    const event = (type, at) => new frame.contentWindow.PointerEvent(type, { ...at, bubbles: true });
    const svg = page.querySelector("#plot svg"), dot = svg.querySelector("circle[fill='#000']").getBoundingClientRect();
    svg.dispatchEvent(event("pointermove", { clientX: dot.x + dot.width / 2, clientY: dot.y + dot.height / 2 }));
    const tip = page.getElementById("tip"), shown = !tip.hidden && tip.textContent;
    page.querySelectorAll("#metrics button")[1]?.click();
    const slider = page.querySelector(".crop input");
    slider.value = 20;
    slider.dispatchEvent(new frame.contentWindow.Event("input"));
    document.title = "done";
    document.body.append(Object.assign(document.createElement("pre"), { id: "found", textContent: JSON.stringify({
      overflow: root.scrollWidth - root.clientWidth,
      curves: svg.querySelectorAll("path").length,
      tip: shown,
      rows: page.querySelectorAll("#bd tbody tr").length,
      crops: [...page.querySelectorAll("figcaption")].map(caption => caption.textContent),
      clip: page.querySelector(".pair img:nth-child(2)").style.clipPath,
      loaded: [...page.querySelectorAll(".pair img")].every(image => image.complete && image.naturalWidth === 80),
      markup: page.querySelectorAll("figcaption *").length,
    }) }));
  } catch (error) { fail(error); }
}, 300);
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_the_page_at_desktop_and_phone_width(page: str, width: int, tmp_path: Path) -> None:
    source = json.dumps(page).replace("</", "<\\/")
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.replace("WIDTH", str(width)).replace("SOURCE", source), "utf-8")
    assert BROWSER
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--window-size=1400,900", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = re.search(r'<pre id="found">(.*?)</pre>', dom)
    assert shown, re.findall("<title>(.*?)</title>", dom)
    found = json.loads(unescape(shown[1]))
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
