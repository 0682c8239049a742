"""SQuAD JSON, versions 1.1 and 2.0: articles of paragraphs, each with its questions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_kit.data.examples import RowError
from qlora_kit.data.raw_rows import RawRow


def is_squad(tree: Any) -> bool:
    """True for an object with a list `data`, where an article has `paragraphs`."""
    articles = tree.get("data") if isinstance(tree, dict) else None
    return isinstance(articles, list) and any(isinstance(part, dict) and "paragraphs" in part for part in articles)


def squad_rows(tree: dict[str, Any]) -> Iterator[RawRow]:
    """Rows with `id`, `question`, `context`, `answers` ([{text, answer_start}]) and, in version 2.0, `is_impossible`.

    Numbered by question, from 1; a part of the tree that is not as it should be takes one number.
    """
    seen: dict[str, int] = {}
    for number, value in enumerate(_questions(tree), 1):
        if isinstance(value, dict) and isinstance(value["id"], str) and value["id"]:
            first = seen.setdefault(value["id"], number)
            if first != number:
                problem = f"id {value['id']!r} stands at question {first} already"
                value = RowError(problem, reason="id twice", fix="Give each question an id of its own")
        yield RawRow(number, value)


def _questions(tree: dict[str, Any]) -> Iterator[dict[str, Any] | RowError]:
    for at, article in _objects(tree, "data", ""):
        for place, paragraph in _objects(article, "paragraphs", at):
            context = paragraph.get("context") if isinstance(paragraph, dict) else None
            for where, question in _objects(paragraph, "qas", place):
                if isinstance(question, RowError):
                    yield question
                elif not isinstance(context, str):
                    yield RowError(f"{place}.context is no text", reason="no context", got=context)
                elif not isinstance(question.get("answers", []), list):
                    got = question["answers"]
                    yield RowError(f"{where}.answers is no list", reason="no answers", got=got)
                else:
                    yield _row(question, context)


def _row(question: dict[str, Any], context: str) -> dict[str, Any]:
    row = {"id": question.get("id"), "question": question.get("question"), "context": context}
    row["answers"] = question.get("answers")
    return row | {name: question[name] for name in ("is_impossible",) if name in question}


def _objects(parent: Any, name: str, place: str) -> Iterator[tuple[str, Any]]:
    """(place, object) of each part of a list; an error in the place of what is no object, and it has no parts."""
    where = f"{place}.{name}" if place else name
    if isinstance(parent, RowError):
        yield place, parent
        return
    parts = parent.get(name)
    if not isinstance(parts, list):
        yield where, RowError(f"{where} is no list", reason="not as in SQuAD", got=parts, allowed="a list of objects")
        return
    for k, part in enumerate(parts):
        here = f"{where}[{k}]"
        if isinstance(part, dict):
            yield here, part
        else:
            yield here, RowError(f"{here} is no object", reason="not as in SQuAD", got=part, allowed="an object")
