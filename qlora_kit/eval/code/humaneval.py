"""HumanEval: its problems, how a model is asked, and the program that an answer makes.

Source: Chen et al., Evaluating Large Language Models Trained on Code, 2021.
"""

from __future__ import annotations

import builtins
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qlora_kit.errors import DataError

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a completion ends: what follows belongs to the function no more (Chen et al., section 3.2)."""
_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
_FIX = "Take the file as it was published: one JSON object a line"


@dataclass(frozen=True)
class Problem:
    """One row of the file."""

    task_id: str
    prompt: str
    """The beginning of a program, up to the signature and docstring of the function that is asked for."""
    entry_point: str
    """That function's name."""
    canonical_solution: str
    """A body for it that passes."""
    test: str
    """Defines `check(candidate)`."""

    @property
    def checks(self) -> str:
        """Tests to run after a program that defines `entry_point`."""
        return f"{self.test}\ncheck({self.entry_point})\n"


def read_problems(file: Path) -> list[Problem]:
    """The problems of HumanEval.jsonl, in their order.

    Raises:
        DataError: the file is not there, or a row is not a problem; names file and row.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}", fix="Give the path of HumanEval.jsonl") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error}", fix=_FIX) from None
    problems = [_problem(line, f"{file}, row {row}") for row, line in enumerate(lines, 1) if line.strip()]
    if not problems:
        raise DataError(f"{file} holds no problem", fix=_FIX)
    return problems


def question(problem: Problem, chat: bool) -> str:
    """What the model is given: the prompt to continue, or a user turn that asks for the whole function."""
    if not chat:
        return problem.prompt
    return (
        "Complete this Python function. Answer with the whole function in one ```python block.\n\n"
        f"```python\n{problem.prompt.rstrip()}\n```"
    )


def program_of(problem: Problem, answer: str, chat: bool) -> str:
    """The program to test: the prompt, and after it the completion, or the function from a chat's code block.

    The prompt stays in front of a whole function too, for its imports and the functions it speaks of; its own
    function, a docstring alone, is then defined anew.
    """
    if not chat:
        return problem.prompt + cut(answer)
    code = code_of(answer, problem.entry_point)
    if _defines(code, problem.entry_point):
        return f"{problem.prompt}\n{code}"
    return problem.prompt + cut(code)


def cut(completion: str) -> str:
    """`completion` before the first of STOP."""
    return completion[: min((at for stop in STOP if (at := completion.find(stop)) >= 0), default=len(completion))]


def code_of(answer: str, entry_point: str) -> str:
    """The last ```python block that defines `entry_point`, else the first block, else the whole answer.

    A block that the answer's length cut off counts as far as it goes.
    """
    blocks: list[str] = _BLOCK.findall(answer)
    whole = [block for block in blocks if _defines(block, entry_point)]
    return whole[-1] if whole else blocks[0] if blocks else answer


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:async[ ]+)?def[ ]+{re.escape(name)}\b", code, re.MULTILINE) is not None


def _problem(line: str, place: str) -> Problem:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}", fix=_FIX) from None
    names = [field.name for field in fields(Problem)]
    if not isinstance(row, dict):
        raise DataError(f"{place} is no JSON object", got=type(row).__name__, fix=_FIX)
    for name in names:
        if not isinstance(row.get(name), str):
            raise DataError(f"{place}: {name} is not a text", got=row.get(name), fix=_FIX)
    entry_point = row["entry_point"]
    if not entry_point.isidentifier() or hasattr(builtins, entry_point):
        allowed = "the name of a function that is not one of Python's own"
        raise DataError(f"{place}: entry_point", got=entry_point, allowed=allowed)
    return Problem(**{name: row[name] for name in names})
