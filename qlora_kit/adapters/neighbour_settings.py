"""Settings of the methods that are not low-rank: bottleneck adapters, prompt tuning, BitFit, full fine-tuning."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from qlora_kit.adapters.base_settings import AdapterSettings
from qlora_kit.section import Positive, Text, TextOrTexts

ATTENTION_OUTPUT = (
    r".*attn\.(o_proj|out_proj|dense|c_proj|Wo|o)|.*attention\.(o_proj|out_proj|dense|out_lin|output\.dense)"
)
FEED_FORWARD_OUTPUT = (
    r".*\.(mlp|ffn|feed_forward)\.(down_proj|fc2|fc_out|c_proj|lin2|dense_4h_to_h|Wo)"
    r"|.*\.layers?\.\d+\.(fc2|output\.dense)|.*\.ffn_output"
)
"""Names of the last layer of attention and of the feed-forward part in transformers' models, BERT's kin included."""


class BottleneckSettings(AdapterSettings):
    """The bottleneck adapters' own."""

    method: Literal["bottleneck"] = "bottleneck"
    """Bottleneck adapters (Houlsby et al. 2019): a small network with a residual path after parts of each layer."""
    placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """After attention and feed-forward part (Houlsby et al. 2019), or after the latter alone (Pfeiffer et al. 2020)."""
    reduction_factor: Positive = 16
    """The bottleneck is this many times narrower than the layer's output, and at least 1 wide."""
    activation: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    """Between the two projections."""
    target_modules: TextOrTexts = "auto"
    """`auto`: the output projections that `placement` means; else a regular expression or a list of name endings."""

    @property
    def wanted_layers(self) -> str | list[str]:
        return "|".join(self.parts().values()) if self.target_modules == "auto" else self.target_modules

    def parts(self) -> dict[str, str]:
        """The parts of a layer that `placement` puts an adapter after, and the regular expressions of their names."""
        parts = {"attention": ATTENTION_OUTPUT, "feed-forward part": FEED_FORWARD_OUTPUT}
        return parts if self.placement == "houlsby" else {"feed-forward part": FEED_FORWARD_OUTPUT}

    def width(self, out_features: int) -> int:
        """Width of the bottleneck after a layer of this output."""
        return max(1, out_features // self.reduction_factor)

    def layer_sizes(self, name: str, in_features: int, out_features: int) -> list[int]:
        width = self.width(out_features)
        return [width * out_features, width, out_features * width, out_features]


class PromptTuningSettings(AdapterSettings):
    """Prompt tuning's."""

    method: Literal["prompt_tuning"] = "prompt_tuning"
    """Prompt tuning (Lester et al. 2021): trained vectors before the input; wants a high lr, 0.01 to 0.1."""
    tokens: Annotated[int, Field(ge=1, le=4096)] = 20
    """Virtual tokens before the input; they count into the model's context."""
    init: Literal["random", "vocabulary", "text"] = "vocabulary"
    """Uniform in ±0.5; embeddings of tokens drawn from the first 5000; or those of `init_text`."""
    init_text: Text | None = None
    """With `init: text`: its tokens, repeated or cut to `tokens`."""

    def model_sizes(self, hidden: int) -> list[int]:
        return [self.tokens * hidden]

    @model_validator(mode="after")
    def _text_where_it_is_used(self) -> PromptTuningSettings:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init_text and init: text go together; give both or neither")
        return self


class BitFitSettings(AdapterSettings):
    """BitFit's."""

    method: Literal["bitfit"] = "bitfit"
    """BitFit (Ben Zaken et al. 2022): the base's own biases are trained, in its dtype; the base must have some."""

    @property
    def bias(self) -> str:
        """Which biases of the base are trained."""
        return "all"


class FullSettings(AdapterSettings):
    """Full fine-tuning's."""

    method: Literal["full"] = "full"
    """Every weight is trained, in the base's dtype; needs `base.quant: none`. The yardstick, for small models."""
    trains_all: ClassVar[bool] = True

    @field_validator("modules_to_save")
    @classmethod
    def _all_are_saved(cls, names: list[str]) -> list[str]:
        if names:
            raise ValueError("full trains and saves every module; leave it out")
        return names
