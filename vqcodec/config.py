"""What can be chosen: qualities, tunes, efforts, and the layouts of models by name. Knows no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

SHIPPED = Path(__file__).parent / "weights" / "vqcodec.safetensors"

DEFAULT_QUALITY = 5.0
DEFAULT_EFFORT = 1
Tune = Literal["psnr", "visual"]  # what a picture is to be near to its original in: squared error, or what the eye sees
TUNES: tuple[Tune, ...] = ("psnr", "visual")
DEFAULT_TUNE: Tune = "visual"

# Quality levels 1..8: from about 0.07 to 1.1 bits per pixel on photographs, a factor of 1.93 in lambda between levels.
LAMBDAS = (0.0007, 0.00135, 0.00261, 0.00504, 0.00973, 0.0188, 0.0363, 0.07)
BEST_QUALITY = len(LAMBDAS)


class Steps(NamedTuple):
    """Gradient steps of latents towards what the very image needs, of the finest grid and of the others."""

    finest: int
    coarser: int


EFFORTS = (Steps(0, 0), Steps(4, 0), Steps(6, 2), Steps(9, 2))  # efforts 0..3

# Pixels around a tile that the fit looks at. Of the finest grid on 8 validation crops in tiles of 256 pixels 32 cost as
# much as 64 do, to 0.01 % of the bits, 16 cost 0.05 % and 0 cost 2 to 12 %.
FIT_HALO = 32

STEM = 4  # pixels per cell of the first stage: space-to-depth, because convolutions at full resolution are slow

Learning = Literal["ema", "loss"]  # of the code vectors

Stage = Literal["vqvae", "joint", "finish", "recorded", "distill", "visual"]  # of training
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True)
class PriorConfig:
    """channels: width of the residual stream; blocks: gated residual blocks; flags, hidden: units of a group's flag and
    of its head; heads: attention heads, 0 for none; head_channels: channels of a query, key or value."""

    channels: int
    blocks: int
    flags: int
    hidden: int
    heads: int = 0
    head_channels: int = 16


@dataclass(frozen=True)
class GridConfig:
    """One grid: a cell of stride x stride pixels holds ``groups`` indices into codebooks of ``codes`` vectors of
    ``dim`` channels, beside null and, with ``escape``, the points of a lattice."""

    stride: int
    groups: int
    dim: int
    codes: int
    prior: PriorConfig
    escape: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A model.

    lambdas: one per quality level, weight of the squared error (0..255) against bits per pixel; one level without
    rate, (0.0,), is the plain VQ-VAE. channels: width of the stages of encoder and decoder, strides 4, 8, 16, ...;
    blocks: residual blocks of each stage of either, or one number for all. grids: coarsest first. linear_path: a linear
    transform of pixel blocks runs beside the networks. codebook: how code vectors are learned. banks: 2 if there is a
    row of gains and biases for each level of each tune, those for squared error first, then those for the eye; 1 if
    both tunes share them.
    """

    name: str
    lambdas: tuple[float, ...]
    channels: tuple[int, ...]
    blocks: int | tuple[int, ...]
    grids: tuple[GridConfig, ...]
    linear_path: bool = False
    codebook: Learning = "ema"
    banks: int = 1

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelConfig":
        """The inverse of ``dataclasses.asdict``, also after JSON. KeyError or TypeError for other fields."""
        grids = tuple(GridConfig(**{**grid, "prior": PriorConfig(**grid["prior"])}) for grid in fields["grids"])
        tuples = {key: tuple(x) for key, x in fields.items() if isinstance(x, list) and key != "grids"}
        return cls(**{**fields, **tuples, "grids": grids})

    @property
    def levels(self) -> int:
        return len(self.lambdas)

    @property
    def rows(self) -> int:
        """Of gains and biases: what the networks call a level is the number of one of them."""
        return self.levels * self.banks

    @property
    def stage_blocks(self) -> tuple[int, ...]:
        """Residual blocks of each stage, finest first."""
        return self.blocks if isinstance(self.blocks, tuple) else (self.blocks,) * len(self.channels)

    @property
    def stride(self) -> int:
        """Image sides are padded to a multiple of this."""
        return self.grids[0].stride

    @property
    def rate_constrained(self) -> bool:
        return self.lambdas[0] > 0

    def lambda_at(self, row: int) -> float:
        """Lambda of a row of the gains."""
        return self.lambdas[row % self.levels]

    def sample_bits(self, row: int) -> float:
        """Bits that a squared error of 1 in one sample of 0..1 is worth at a row of the gains."""
        return self.lambda_at(row) * 255**2 / 3

    def halo(self, k: int, part: Literal["features", "latents", "decoder", "fit"]) -> int:
        """Pixels, a multiple of the stride: nothing that a part of grid k computes depends on inputs further away.

        features: from those of the next finer grid, or of the finest grid from pixels; latents: from features and
        context; decoder: ``decode_grid``; fit: the gradient steps of the encoder, which depend on more, but not so that
        it matters.
        """
        if part == "fit":
            return self._whole(FIT_HALO)
        if part == "latents":
            return self._whole(2 * self.grids[k].stride * min(1, self._blocks(self.grids[k].stride)) if k else 0)
        stride, coarsest = STEM if k + 1 == len(self.grids) else 2 * self.grids[k + 1].stride, self.grids[k].stride
        reach = 0
        while stride <= coarsest:
            reach += stride * (2 * self._blocks(stride) + 1)  # and a convolution before or after
            stride *= 2
        return self._whole(reach)

    def _blocks(self, stride: int) -> int:
        return self.stage_blocks[(stride // STEM).bit_length() - 1]

    def _whole(self, reach: int) -> int:
        return -(-reach // self.stride) * self.stride


PRODUCT = ModelConfig(
    name="vqcodec",
    lambdas=LAMBDAS,
    channels=(96, 160, 160),
    blocks=(2, 0, 0),
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
