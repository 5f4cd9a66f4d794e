"""A page in headless Chromium, for tests of what people see: skipped where there is none."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = 1200, 390  # pixels, of a desktop's window and of a phone

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

# The window of headless Chromium cannot be as narrow as a phone; a frame can.
PROBE = """
<title>waiting</title>
<iframe id="frame" style="width: WIDTHpx; height: 800px; border: 0"></iframe>
<script>
const frame = document.getElementById("frame");
frame.srcdoc = SOURCE;
frame.onload = () => setTimeout(() => {
  const page = frame.contentDocument, root = page.documentElement;
  try {
    const found = (() => { SCRIPT })();
    document.title = "done";
    document.body.append(Object.assign(document.createElement("pre"), { id: "found", textContent: JSON.stringify({
      overflow: root.scrollWidth - root.clientWidth, ...found,
    }) }));
  } catch (error) { document.title = "failed: " + error; }
}, 300);
</script>
"""


def ask(page: str, width: int, script: str, folder: Path) -> dict[str, Any]:
    """What a script finds in a page that is shown in a width, and `overflow`, the pixels that do not fit into it.

    script: statements that return an object; they know `frame`, `page` (its document) and `root`. folder: for the
    browser's files.
    """
    source = json.dumps(page).replace("</", "<\\/")
    probe = folder / "probe.html"
    filled = {"WIDTH": str(width), "SCRIPT": script, "SOURCE": source}
    probe.write_text(re.sub("|".join(filled), lambda found: filled[found[0]], PROBE), "utf-8")
    assert BROWSER
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--window-size=1400,900", "--dump-dom", probe.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    shown = re.search(r'<pre id="found">(.*?)</pre>', dom)
    assert shown, re.findall("<title>(.*?)</title>", dom)
    return dict(json.loads(unescape(shown[1])))
