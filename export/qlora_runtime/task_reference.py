"""reference.json of a task: what the trained model says of some rows, and how far a bundle may be from it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlora_runtime.atomic import write_atomic
from qlora_runtime.encoder import FloatArray, Int64Array
from qlora_runtime.errors import FormatError
from qlora_runtime.reference import REFERENCE
from qlora_runtime.strict_json import Fields, JsonObject, dump, is_count, is_list_of, is_number, load_object


@dataclass(frozen=True)
class TaskTolerance:
    """How far a bundle may be from the trained model."""

    max_logit: float  # the largest difference allowed of any one logit
    min_agreement: float  # the share of decisions, 0 to 1, that must be the same; the odd ones are rounded up
    margin: (
        float  # a decision counts as the same where the trained model preferred its own by no more than this
    )


@dataclass(frozen=True)
class TaskRow:
    """One row, and the trained model's logits.

    Attributes:
        input_ids, type_ids: int64 [seq].
        places: tagging: the first token of each word; question answering: the context's first token and the
            one after its last; otherwise empty.
        logits: float32 [n, k]: classification and regression [1, labels], tagging [words, labels], question
            answering [seq, 2].
    """

    input_ids: Int64Array
    type_ids: Int64Array
    places: tuple[int, ...]
    logits: FloatArray


@dataclass(frozen=True)
class TaskReference:
    """All of a task's reference.json."""

    rows: list[TaskRow]
    tolerance: TaskTolerance


def read_task_reference(bundle_dir: Path | str) -> TaskReference:
    """The reference of the bundle in `bundle_dir`.

    Raises:
        MissingFileError: there is no reference.json.
        FormatError: it has no rows, or its fields or their lengths are not as the format says.
    """
    return _parse(load_object(Path(bundle_dir) / REFERENCE))


def write_task_reference(bundle_dir: Path | str, reference: TaskReference) -> None:
    """Put reference.json into the folder, atomically. Raises FormatError where it could not be read back."""
    rows = [
        {
            "input_ids": row.input_ids.tolist(),
            "token_type_ids": row.type_ids.tolist(),
            "places": list(row.places),
            "logits": [[round(float(logit), 6) for logit in logits] for logits in row.logits],
        }
        for row in reference.rows
    ]
    value = {"rows": rows, "tolerance": asdict(reference.tolerance)}
    _parse(value)
    write_atomic(Path(bundle_dir) / REFERENCE, dump(value))


def _parse(value: JsonObject) -> TaskReference:
    fields = Fields(value, REFERENCE, {"rows", "tolerance"})
    rows = fields.take("rows", "a list of at least one row", lambda v: isinstance(v, list) and len(v) > 0)
    limits = Fields(
        fields.object("tolerance"), f"{REFERENCE}: tolerance", {"max_logit", "min_agreement", "margin"}
    )
    return TaskReference(
        [_parse_row(row, f"{REFERENCE}: rows[{index}]") for index, row in enumerate(rows)],
        TaskTolerance(limits.number("max_logit"), limits.number("min_agreement"), limits.number("margin")),
    )


def _parse_row(value: Any, where: str) -> TaskRow:
    fields = Fields(value, where, {"input_ids", "token_type_ids", "places", "logits"})
    ids, numbers = is_list_of(is_count), is_list_of(is_number)
    input_ids = fields.take("input_ids", "a list of token ids", lambda v: ids(v) and len(v) > 0)
    type_ids = fields.take("token_type_ids", "a list of integers", ids)
    places = fields.take("places", "a list of places in the row", ids)
    logits = fields.take(
        "logits", "a list of lists of numbers", lambda v: is_list_of(numbers)(v) and len(v) > 0
    )
    if (
        len(type_ids) != len(input_ids)
        or len({len(row) for row in logits}) > 1
        or max(places, default=0) > len(input_ids)
    ):
        raise FormatError(
            f"{where}: lengths disagree. Expected: one of token_type_ids for each of the {len(input_ids)} "
            "input_ids, places among them, and lists of logits of one length. Export again."
        )
    return TaskRow(
        np.array(input_ids, np.int64),
        np.array(type_ids, np.int64),
        tuple(places),
        np.array(logits, np.float32),
    )
