"""reference.json: what the trained model answers, so that anyone can check that the bundle still does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_runtime.atomic import write_atomic
from qlora_runtime.errors import FormatError
from qlora_runtime.strict_json import Fields, JsonObject, dump, is_count, is_list_of, is_number, load_object

REFERENCE = "reference.json"


@dataclass(frozen=True)
class Tolerance:
    """How far a bundle may be from the trained model."""

    max_logit: float  # the largest difference allowed of any one logit
    min_top1: float  # the share of positions, 0 to 1, whose most probable token must be the same
    greedy_margin: float  # a token of a greedy answer is compared where it was won by at least this
    # True: all those tokens are compared. False, as in older bundles: those before the first won by less.
    every_greedy_token: bool = False


@dataclass(frozen=True)
class ReferencePrompt:
    """One prompt, and the trained model's logits and greedy answer.

    Of an encoder-decoder the prompt is the source, and the logits are those after each of `decoder_ids`.
    """

    input_ids: list[int]  # [seq]
    top_k_ids: list[list[int]]  # [seq, k], the most probable first
    top_k_logits: list[list[float]]  # [seq, k]
    greedy_ids: list[int]  # [answer]
    margins: list[float]  # [answer]: top-1 logit minus top-2 logit before each token of the answer
    decoder_ids: list[int] | None = None  # [target], the start token first; None: a decoder alone

    @property
    def scored_ids(self) -> list[int]:
        """The tokens that logits are kept of."""
        return self.input_ids if self.decoder_ids is None else self.decoder_ids


@dataclass(frozen=True)
class Reference:
    """All of reference.json."""

    prompts: list[ReferencePrompt]
    tolerance: Tolerance


def read_reference(bundle_dir: Path | str) -> Reference:
    """The reference of the bundle in `bundle_dir`.

    Raises:
        MissingFileError: there is no reference.json.
        FormatError: it has no prompts, or its fields or their lengths are not as the format says.
    """
    return _parse(load_object(Path(bundle_dir) / REFERENCE))


def write_reference(bundle_dir: Path | str, reference: Reference) -> None:
    """Put reference.json into the folder, atomically. Raises FormatError where it could not be read back."""
    tolerance = reference.tolerance
    value: dict[str, Any] = {
        "prompts": [
            {
                "input_ids": prompt.input_ids,
                "greedy_ids": prompt.greedy_ids,
                "margins": prompt.margins,
                "top_k": {"ids": prompt.top_k_ids, "logits": prompt.top_k_logits},
            }
            | ({} if prompt.decoder_ids is None else {"decoder_ids": prompt.decoder_ids})
            for prompt in reference.prompts
        ],
        "tolerance": {
            "max_logit": tolerance.max_logit,
            "min_top1": tolerance.min_top1,
            "greedy_margin": tolerance.greedy_margin,
        },
    }
    if tolerance.every_greedy_token:
        value["tolerance"]["every_greedy_token"] = True
    _parse(value)
    write_atomic(Path(bundle_dir) / REFERENCE, dump(value))


def _parse(value: JsonObject) -> Reference:
    fields = Fields(value, REFERENCE, {"prompts", "tolerance"})
    prompts = fields.take(
        "prompts", "a list of at least one prompt", lambda v: isinstance(v, list) and len(v) > 0
    )
    tolerance = _tolerance_fields(fields.object("tolerance"))
    return Reference(
        prompts=[
            _parse_prompt(prompt, f"{REFERENCE}: prompts[{index}]") for index, prompt in enumerate(prompts)
        ],
        tolerance=Tolerance(
            max_logit=tolerance.number("max_logit"),
            min_top1=tolerance.number("min_top1"),
            greedy_margin=tolerance.number("greedy_margin"),
            every_greedy_token=tolerance.take(
                "every_greedy_token", "true or false", lambda v: isinstance(v, bool)
            ),
        ),
    )


def _tolerance_fields(value: JsonObject) -> Fields:
    """The tolerance, with what bundles older than a field mean by its absence."""
    known = {"max_logit", "min_top1", "greedy_margin", "every_greedy_token"}
    return Fields({"every_greedy_token": False} | value, f"{REFERENCE}: tolerance", known)


def _parse_prompt(value: Any, where: str) -> ReferencePrompt:
    fields = Fields(value, where, {"input_ids", "greedy_ids", "margins", "top_k", "decoder_ids"})
    top_k = Fields(fields.object("top_k"), f"{where}: top_k", {"ids", "logits"})
    ids, numbers = is_list_of(is_count), is_list_of(is_number)
    prompt = ReferencePrompt(
        input_ids=fields.take("input_ids", "a list of token ids", lambda v: ids(v) and len(v) > 0),
        greedy_ids=fields.take("greedy_ids", "a list of token ids", ids),
        margins=fields.take("margins", "a list of numbers", numbers),
        top_k_ids=top_k.take("ids", "a list of token ids for each position", is_list_of(ids)),
        top_k_logits=top_k.take("logits", "a list of logits for each position", is_list_of(numbers)),
        decoder_ids=fields.take("decoder_ids", "a list of token ids", ids)
        if "decoder_ids" in value
        else None,
    )
    k = len(prompt.top_k_ids[0]) if prompt.top_k_ids else 0
    rows = [*map(len, prompt.top_k_ids), *map(len, prompt.top_k_logits)]
    if k == 0 or rows != [k] * (2 * len(prompt.scored_ids)) or len(prompt.margins) != len(prompt.greedy_ids):
        raise FormatError(
            f"{where}: lengths disagree. Expected: top_k.ids and top_k.logits of "
            f"[{len(prompt.scored_ids)}, k] for the tokens read, and one margin for each of the "
            f"{len(prompt.greedy_ids)} greedy_ids. Export again."
        )
    return prompt
