"""Which columns of a row a task reads: those that data.columns names, otherwise those with usual names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qlora_kit.data.examples import RowError
from qlora_kit.errors import DataError

TEXT = ("text", "sentence", "review", "utterance", "question", "query", "content", "comment", "message", "document")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("text", "pair"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
)
LABEL = ("label", "labels", "category", "class", "intent", "sentiment", "target", "topic", "emotion")
NUMBER = ("label", "score", "rating", "stars", "target", "value", "similarity", "similarity_score")
FILE = ("path", "file", "file_name", "filename")

Usual = dict[str, tuple[str, ...]]
INPUTS: dict[str, Usual] = {  # task: field: usual names of its column
    "classification": {"text": TEXT},
    "regression": {"text": TEXT},
    "tagging": {"words": ("words", "tokens")},
    "question_answering": {
        "question": ("question", "query"),
        "context": ("context", "passage", "paragraph", "document"),
    },
    "seq2seq": {"source": ("source", "src", "document", "article", "dialogue", "text", "input", "mr")},
    "image_classification": {"image": ("image", "image_path", *FILE)},
    "speech_recognition": {"audio": ("audio", "audio_path", "wav", *FILE)},
}
ANSWERS: dict[str, Usual] = {  # the same of what rows that are only to be predicted lack
    "classification": {"label": LABEL},
    "regression": {"label": NUMBER},
    "tagging": {"tags": ("tags", "ner_tags", "pos_tags", "labels")},
    "question_answering": {"answers": ("answers",)},
    "seq2seq": {"target": ("target", "tgt", "summary", "highlights", "output", "ref")},
    "image_classification": {"label": LABEL},
    "speech_recognition": {"text": ("text", "sentence", "transcript", "transcription")},
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "classification": ("pair",),
    "regression": ("pair",),
    "question_answering": ("id", "is_impossible"),
}


@dataclass(frozen=True)
class Cells:
    """A row's cells under the names of the task's fields; messages name the row's own columns."""

    row: dict[str, Any]
    columns: dict[str, str]
    """Field to column."""

    def name(self, field: str) -> str:
        """The column of a field."""
        return self.columns[field]

    def get(self, field: str) -> Any:
        """The cell of a field; None where the row has none."""
        return self.row.get(self.columns.get(field, field))

    def value(self, field: str) -> Any:
        """The cell of a field that must be there.

        Raises:
            RowError: the row has no such column, or nothing in it.
        """
        column = self.name(field)
        if self.row.get(column) is None:
            state = "is null" if column in self.row else f"is missing: the row has {', '.join(self.row) or 'no column'}"
            raise RowError(f"{column} {state}", reason=f"missing {column}", fix="Fill it, or set data.bad_rows: skip")
        return self.row[column]

    def text(self, field: str) -> str:
        """The text in a cell, which is more than white space.

        Raises:
            RowError: it is missing, no text, empty, or half a surrogate pair is in it.
        """
        value, column = self.value(field), self.name(field)
        if not isinstance(value, str):
            raise RowError(f"{column} is {type(value).__name__}, not text", reason=f"{column} not text", got=value)
        if not value.strip():
            raise RowError(f"{column} is empty", reason=f"empty {column}", fix="Fill it, or set data.bad_rows: skip")
        check_characters(value, column)
        return value


def check_characters(text: str, place: str) -> None:
    """Half a surrogate pair, which JSON's escapes can make, is no character: tokenizers and files refuse it.

    Raises:
        RowError: the text holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"{place} holds half a surrogate pair",
            reason="half a surrogate pair",
            got=text[error.start],
            fix="Mend the text, or set data.bad_rows: skip",
        ) from None


def find_columns(
    task: str, row: dict[str, Any], renamed: dict[str, str], place: str, labelled: bool = True
) -> dict[str, str]:
    """The columns of a task by the source's first row: {field: column}, in the order of the task's fields.

    A pair of texts is taken for one where both its usual columns are there. Where words are only to be tagged a
    column of raw text does too.

    Args:
        task: type of the task.
        row: the first row.
        renamed: data.columns, {field: column}.
        place: file and row, for messages.
        labelled: whether the column of the answer is wanted.

    Raises:
        DataError: a field has no column or several, or data.columns names what is not there.
    """
    if task == "tagging" and not labelled and (texts := _raw_texts(row, renamed)):
        return {"words": _only("words", texts, TEXT, row, place)}
    wanted = INPUTS[task] | (ANSWERS[task] if labelled else {})
    columns = _named(task, row, renamed, place, labelled)
    taken = set(columns.values())
    if "pair" in OPTIONAL.get(task, ()) and not {"text", "pair"} & set(columns):
        columns |= _pair(row, taken, place)
    if task == "seq2seq" and not columns:
        columns |= _translation(row, labelled)
    for field, usual in wanted.items():
        if field not in columns:
            columns[field] = _only(
                field, [name for name in usual if name in row and name not in taken], usual, row, place
            )
            taken.add(columns[field])
    for field in OPTIONAL.get(task, ()):
        if field != "pair" and field not in columns and field in row:
            columns[field] = field
    fields = [*wanted, *OPTIONAL.get(task, ())]
    return {field: columns[field] for field in fields if field in columns}


def _raw_texts(row: dict[str, Any], renamed: dict[str, str]) -> list[str]:
    """Columns of raw text; none where the row has words already."""
    if {renamed.get("words", "words"), *INPUTS["tagging"]["words"]} & set(row):
        return []
    return [name for name in TEXT if name in row]


def _named(task: str, row: dict[str, Any], renamed: dict[str, str], place: str, labelled: bool) -> dict[str, str]:
    fields = [*INPUTS[task], *ANSWERS[task], *OPTIONAL.get(task, ())]
    columns = {}
    for field, column in renamed.items():
        if field not in fields:
            raise DataError(f"data.columns: {task} has no {field!r}", got=renamed, allowed=", ".join(fields))
        if column in row or field in row:
            columns[field] = column if column in row else field
        elif labelled or field not in ANSWERS[task]:
            problem = f"no column {column!r}, which data.columns names for {field!r}"
            fix = "Correct data.columns (predict: --column): {expected: actual}"
            raise DataError(f"{place}: {problem}", got=list(row), fix=fix)
    return columns


def _pair(row: dict[str, Any], taken: set[str], place: str) -> dict[str, str]:
    pairs = [pair for pair in PAIRS if set(pair) <= set(row) - taken]
    if not pairs:
        return {}
    texts = {*sum(pairs, ()), *(name for name in TEXT if name in row and name not in taken)}
    if len(texts) > 2:
        raise _several("text", sorted(texts), row, place)
    return {"text": pairs[0][0], "pair": pairs[0][1]}


def _translation(row: dict[str, Any], labelled: bool) -> dict[str, str]:
    """The first two languages of a `translation` cell, which `flat` has spread over columns of their own."""
    languages = [name for name in row if name.startswith(TRANSLATION)]
    return dict(zip(("source", "target") if labelled else ("source",), languages))


TRANSLATION = "translation."


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a `translation` cell such as {en: ..., de: ...} as columns `translation.en`, `translation.de`."""
    cell = row.get("translation")
    if not isinstance(cell, dict):
        return row
    spread = {f"{TRANSLATION}{language}": text for language, text in cell.items()}
    return {name: value for name, value in row.items() if name != "translation"} | spread


def _only(field: str, found: list[str], usual: Iterable[str], row: dict[str, Any], place: str) -> str:
    if len(found) > 1:
        raise _several(field, found, row, place)
    if not found:
        raise DataError(
            f"{place}: no column for {field!r}",
            got=list(row),
            allowed=", ".join(usual),
            fix=f"Name it with data.columns (predict: --column), for example {{{field}: {next(iter(row), 'actual')}}}",
        )
    return found[0]


def _several(field: str, found: list[str], row: dict[str, Any], place: str) -> DataError:
    return DataError(
        f"{place}: several columns for {field!r}: {', '.join(found)}",
        got=list(row),
        fix=f"Name the one meant with data.columns (predict: --column), for example {{{field}: {found[0]}}}",
    )
