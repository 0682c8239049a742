"""Texts, sentences and questions for bundles that classify, rate, tag or answer."""

from functools import partial

from qlora_runtime.server.engine import Turn
from qlora_runtime.server.errors import bad
from qlora_runtime.strict_json import JsonObject
from qlora_runtime.task import VERBS
from qlora_runtime.task_bundle import BATCH_SIZE, TaskBundle
from qlora_runtime.task_console import answer_rows

FIELDS = {
    "classify": {"text", "pair"},
    "rate": {"text", "pair"},
    "tag": {"text", "words"},
    "answer": {"question", "context"},
}


async def answer_request(bundle: TaskBundle, body: JsonObject, turn: Turn) -> list[JsonObject]:
    """The answer to each of the request's `input`, a row or a list of rows, a batch at a time.

    A row is an object of the verb's FIELDS; a text alone is {"text": TEXT}.

    Raises:
        ApiError: 400 for another shape; see also `Turn.run`.
        BundleError: a row that the runner refuses.
    """
    verb = VERBS[bundle.task.type]
    if odd := sorted(set(body) - {"model", "input"}):
        raise bad(f"Unknown parameter: {odd[0]!r}.", odd[0], "unknown_parameter")
    given = body.get("input")
    inputs = given if isinstance(given, list) else [given]
    if not inputs:
        raise bad("input: at least one row is expected.", "input")
    rows = [(f"input[{place}]", _row(value, verb, f"input[{place}]")) for place, value in enumerate(inputs)]
    answers: list[JsonObject] = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        answered = answer_rows(bundle, verb, batch, {}, BATCH_SIZE)
        found: list[JsonObject] = await turn.run(partial(list, answered))
        answers += [
            {name: value for name, value in answer.items() if name not in row}
            for answer, (_, row) in zip(found, batch, strict=True)
        ]
    return answers


def _row(value: object, verb: str, where: str) -> JsonObject:
    row = {"text": value} if isinstance(value, str) else value
    if not isinstance(row, dict) or not row or set(row) - FIELDS[verb]:
        raise bad(f"{where}: an object of {sorted(FIELDS[verb])} is expected.", where)
    return row
