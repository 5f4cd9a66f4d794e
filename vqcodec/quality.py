"""Model configurations by name, and their quality levels."""

from vqcodec.models.pixelsnail import PriorConfig
from vqcodec.models.vqvae import GridConfig, ModelConfig

# Quality levels 1..8: from about 0.1 to 1 bit per pixel on photographs, a factor of 1.75 in lambda between levels, of 2
# before the last.
LAMBDAS = (0.0007, 0.00122, 0.00214, 0.00375, 0.00657, 0.01149, 0.02011, 0.04)

PRODUCT = ModelConfig(
    name="vqcodec",
    lambdas=LAMBDAS,
    channels=(96, 160, 160),
    blocks=2,
    grids=(
        GridConfig(16, 8, 2, codes=255, prior=PriorConfig(128, blocks=4, flags=16, hidden=64, heads=4), escape=True),
        GridConfig(8, 48, 2, codes=127, prior=PriorConfig(128, blocks=3, flags=16, hidden=48), escape=True),
    ),
    linear_path=True,
)


def _paper(name: str, strides: tuple[int, ...]) -> ModelConfig:
    """VQ-VAE-2 as published: one index per cell, K = 512, 64 dimensions, nearest code, no rate in the loss."""
    return ModelConfig(
        name=name,
        lambdas=(0.0,),
        channels=(128,) * len(strides),
        blocks=2,
        grids=tuple(
            GridConfig(
                stride,
                groups=1,
                dim=64,
                codes=512,
                prior=PriorConfig(128, 4, flags=16, hidden=128, heads=0 if k else 4),
            )
            for k, stride in enumerate(strides)
        ),
    )


CONFIGS = {
    config.name: config
    for config in (PRODUCT, _paper("vqvae2-paper", (8, 4)), _paper("vqvae2-paper-large", (16, 8, 4)))
}
