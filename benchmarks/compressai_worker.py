"""One model of CompressAI with its own entropy coder, timed in the environment of CompressAI, where vqcodec's packages
are not: `python -m benchmarks.compressai_worker MODEL IMAGE THREADS REPEAT` prints costs as JSON, see timing.py.

The weights are random, so nothing is downloaded. Time hardly depends on them: the same networks run over the same
number of latents. The files are meaningless.
"""

import importlib
import json
import sys
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.timing import Cost, peak_bytes, seconds

QUALITY = 5  # of 1..8 (cheng2020: 1..6): about half a bit per pixel if it were trained


def costs(name: str, image: str, threads: int, repeat: int) -> dict[str, Cost]:
    torch = importlib.import_module("torch")
    zoo = importlib.import_module("compressai.zoo.image")
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = getattr(zoo, name.replace("-", "_"))(quality=QUALITY, pretrained=False).eval()
    model.update(force=True)
    pixels = np.array(Image.open(image))
    pad = [(0, -side % 64) for side in pixels.shape[:2]]
    x = torch.from_numpy(np.pad(pixels, (*pad, (0, 0)), "edge")).permute(2, 0, 1)[None].float() / 255
    coded: dict[str, Any] = {}
    with torch.inference_mode():
        spent = seconds(lambda: coded.update(model.compress(x)), repeat)
        size = sum(len(string) for strings in coded["strings"] for string in strings)
        encode = Cost(spent, peak_bytes(), size)
        spent = seconds(lambda: model.decompress(coded["strings"], coded["shape"]), repeat)
        return {"encode": encode, "decode": Cost(spent, peak_bytes(), size)}


if __name__ == "__main__":
    model, image, threads, repeat = sys.argv[1:]
    print(json.dumps(costs(model, image, int(threads), int(repeat))))
