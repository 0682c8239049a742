"""Settings of the methods that start from a singular value decomposition and change the base to fit."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from qlora_kit.adapters.low_rank_settings import LowRankSettings


class SvdSettings(LowRankSettings):
    """What PiSSA and LoftQ have.

    The base is loaded whole, in base.compute_dtype, and then quantized layer by layer: loading takes more memory than
    training. Dropout leaves out parts of what the base lacks, which with PiSSA is most of a weight.
    """

    loads_whole: ClassVar[bool] = True

    niter: Annotated[int, Field(ge=0, le=100)] = 16
    """Turns of the fast decomposition, randomized by run.seed; 0 takes the exact one, which is slow on wide layers."""


class PissaSettings(SvdSettings):
    """PiSSA's."""

    method: Literal["pissa"] = "pissa"
    """LoRA starts as the principal part of each weight, the base as the rest (Meng et al. 2024); loads it whole."""


class LoftqSettings(SvdSettings):
    """LoftQ's."""

    method: Literal["loftq"] = "loftq"
    """LoRA starts as the best it can do for what quantization lost (Li et al. 2023); loads the base whole."""
    iterations: Annotated[int, Field(ge=1, le=100)] = 5
    """Turns of quantizing and decomposing; 1 leaves the codes of the base as they are."""
    calibration_rows: Annotated[int, Field(ge=0)] = 0
    """Training rows, from the whole data, whose inputs say which errors matter (Zhang et al. 2024); 0: all alike."""
    calibration: Literal["diagonal", "full"] = "diagonal"
    """Of inputs, their mean squares, or all products of two features: wins back more, takes 4 in² bytes a layer."""

    @field_validator("calibration")
    @classmethod
    def _has_rows(cls, calibration: str, info: ValidationInfo) -> str:
        if calibration == "full" and info.data.get("calibration_rows") == 0:
            raise ValueError("full needs rows to look at; set calibration_rows, to 64 for example")
        return calibration
