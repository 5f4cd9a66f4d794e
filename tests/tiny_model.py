"""The small frozen model behind the golden files: tests/golden/tiny.safetensors.

It is trained once and never again: `python tests/tiny_model.py IMAGES` made it, and would make another one.
"""

import sys
from pathlib import Path

from vqcodec.config import GridConfig, ModelConfig, PriorConfig

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = GOLDEN / "tiny.safetensors"

TINY = ModelConfig(
    name="tiny",
    lambdas=(0.002, 0.01, 0.05),
    channels=(16, 24, 24),
    blocks=1,
    grids=(
        GridConfig(
            16, 2, 2, codes=15, prior=PriorConfig(16, 2, flags=4, hidden=16, heads=2, head_channels=8), escape=True
        ),
        GridConfig(8, 6, 2, codes=31, prior=PriorConfig(16, 2, flags=4, hidden=16), escape=True),
    ),
    linear_path=True,
)


def main(images: Path) -> None:
    from vqcodec.training.trainer import Run, train

    train(Run(TINY, images, Path("runs/tiny"), steps=600, batch=9, crop=96, seed=1))
    WEIGHTS.parent.mkdir(exist_ok=True)
    WEIGHTS.write_bytes(Path("runs/tiny/model.safetensors").read_bytes())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
