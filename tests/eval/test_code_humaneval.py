"""HumanEval: reading, programs from answers, and the benchmark on itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qlora_kit.errors import DataError, EvalError
from qlora_kit.eval.code.completers import Complete
from qlora_kit.eval.code.humaneval import Problem, code_of, cut, program_of, question, read_problems
from qlora_kit.eval.code.run import Settings, score_completer

FILE = Path(__file__).parents[2].parent / "shared" / "data" / "humaneval" / "HumanEval.jsonl"
PROBLEM = Problem(
    "Own/0",
    'import math\n\n\ndef hypotenuse(a: float, b: float) -> float:\n    """The long side."""\n',
    "hypotenuse",
    "    return math.sqrt(a * a + b * b)\n",
    "def check(candidate):\n    assert candidate(3, 4) == 5\n    assert candidate(0, 2) == 2\n",
)
OTHER = Problem("Own/1", "def twice(n: int) -> int:\n", "twice", "    return 2 * n\n", "def check(f): assert f(2) == 4")


def answering(problems: Sequence[Problem], answer: Callable[[Problem, int], str], chat: bool = False) -> Complete:
    """A completer that knows the problems."""
    by_question = {question(problem, chat): problem for problem in problems}

    def complete(
        prompts: Sequence[str], n: int, temperature: float, max_new_tokens: int, stop: Sequence[str]
    ) -> list[list[str]]:
        return [[answer(by_question[prompt], place) for place in range(n)] for prompt in prompts]

    return complete


def published(count: int | None = None) -> list[Problem]:
    if not FILE.is_file():
        pytest.skip("HumanEval.jsonl is not here")
    return read_problems(FILE)[:count]


def outcomes(problems: Sequence[Problem], answer: Callable[[Problem, int], str], **fields: object) -> list[str]:
    settings = Settings(**fields)  # type: ignore[arg-type]
    result = score_completer(problems, answering(problems, answer, settings.chat), settings)
    return [sample.outcome for drawn in result.samples.values() for sample in drawn]


@pytest.mark.usefixtures("sandbox")
def test_published_solutions_pass_and_nothing_fails() -> None:
    problems = published(10)
    assert outcomes(problems, lambda problem, place: problem.canonical_solution) == ["passed"] * 10
    assert "passed" not in outcomes(problems, lambda problem, place: "")


@pytest.mark.slow
@pytest.mark.usefixtures("sandbox")
def test_all_published_solutions_pass_and_nothing_fails() -> None:
    problems = published()
    assert len(problems) == 164
    assert outcomes(problems, lambda problem, place: problem.canonical_solution) == ["passed"] * 164
    assert "passed" not in outcomes(problems, lambda problem, place: "")
    chat = outcomes(problems, lambda p, _: f"So:\n```python\n{p.prompt}{p.canonical_solution}```\nDone.", chat=True)
    assert chat == ["passed"] * 164


@pytest.mark.usefixtures("sandbox")
def test_samples_are_counted_by_problem() -> None:
    def answer(problem: Problem, place: int) -> str:
        return problem.canonical_solution if problem is OTHER or place == 2 else "    return 0\n"

    problems, lines = [PROBLEM, OTHER], list[str]()
    settings = Settings(samples=4, ks=(1, 2, 4), temperature=0.8)
    result = score_completer(problems, answering(problems, answer), settings, lines.append)
    assert [sample.outcome for sample in result.samples["Own/0"]].index("passed") == 2
    rates = {k: interval.value for k, interval in result.pass_at_k.items()}
    assert rates == pytest.approx({1: (1 / 4 + 1) / 2, 2: (1 / 2 + 1) / 2, 4: 1.0})
    assert lines == ["Own/0: 4 answers, problem 1 of 2", "Own/1: 4 answers, problem 2 of 2"]
    tree = json.loads(json.dumps(result.to_json()))
    assert tree["outcomes"] == {"passed": 5, "wrong answer": 3} and tree["problems"] == 2
    assert tree["per_problem"]["Own/0"][0] == {
        "outcome": "wrong answer",
        "reason": "AssertionError: ",
        "answer": "    return 0\n",
    }


@pytest.mark.usefixtures("sandbox")
def test_a_chat_answer_may_lean_on_the_prompts_imports() -> None:
    answer = "```python\ndef hypotenuse(a, b):\n    return math.hypot(a, b)\n```"
    assert outcomes([PROBLEM], lambda problem, place: answer, chat=True) == ["passed"]
    body = "The body:\n```\n    return math.hypot(a, b)\nprint(1)\n```"
    assert outcomes([PROBLEM], lambda problem, place: body, chat=True) == ["passed"]
    assert outcomes([PROBLEM], lambda problem, place: "I will not.", chat=True) == ["error"]


@pytest.mark.parametrize("stop", ["\nclass A", "\ndef f", "\n# note", "\nif __name__", "\nprint(1)"])
def test_a_completion_ends_at_the_first_stop_string(stop: str) -> None:
    body = "    if a:\n        return 1  # one\n    return 2"
    assert cut(body + stop + "\nclass B") == body
    assert cut(body) == body
    assert program_of(PROBLEM, body + stop, chat=False) == PROBLEM.prompt + body


def test_code_comes_from_the_block_that_defines_the_function() -> None:
    first, second = "def helper():\n    pass\n", "def f(a):\n    return 1\n"
    answer = f"Hm.\n```python\n{first}```\nand\n```py\n{second}```\nand run it:\n```\nf(1)\n```"
    assert code_of(answer, "f") == second
    assert code_of(answer, "g") == first
    assert code_of(f"```Python\n{second}", "f") == second  # cut off by its length
    assert code_of(second, "f") == second
    assert code_of("def ff(): pass", "f") == "def ff(): pass"


def test_a_chat_is_asked_for_a_block() -> None:
    asked = question(PROBLEM, chat=True)
    assert (
        '```python\nimport math\n\n\ndef hypotenuse(a: float, b: float) -> float:\n    """The long side."""\n```'
        in asked
    )
    assert question(PROBLEM, chat=False) == PROBLEM.prompt


def row(**changes: object) -> str:
    fields = {"task_id": "a", "prompt": "p", "entry_point": "f", "canonical_solution": "c", "test": "t"}
    return json.dumps({**fields, **changes}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{row()}\n{{", r"problems\.jsonl, row 2 is not JSON"),
        (f"{row()}\n\n[1]", r"problems\.jsonl, row 3 is no JSON object \(got 'list'\)"),
        (row(test=None), r"row 1: test is not a text \(got None\)"),
        (row(entry_point="f()"), r"row 1: entry_point \(got 'f\(\)'\)\. Allowed: the name of a function"),
        (row(entry_point="sum"), r"row 1: entry_point \(got 'sum'\)"),
        ("\n", r"problems\.jsonl holds no problem"),
    ],
)
def test_rows_that_are_no_problems(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_problems(file)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl cannot be read: No such file.*Give the path"):
        read_problems(tmp_path / "missing.jsonl")
    (tmp_path / "latin").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="latin is not UTF-8"):
        read_problems(tmp_path / "latin")


def test_unicode_line_ends_within_a_row(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(row(prompt="one\u2028two") + "\r\n" + row(), encoding="utf-8", newline="")
    assert [problem.prompt for problem in read_problems(file)] == ["one\u2028two", "p"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(samples=3, ks=(1, 5), temperature=0.8), r"pass@5 needs 5 samples of each problem \(got 3\)"),
        (Settings(samples=3), r"at temperature 0 all samples of a problem are the same \(got 3\)"),
        (Settings(temperature=-1.0), r"temperature of HumanEval \(got -1\.0\)\. Allowed: 0 or more"),
        (Settings(workers=0), r"workers of HumanEval \(got 0\)\. Allowed: 1 or more"),
        (Settings(ks=(0,)), r"k of HumanEval \(got 0\)"),
        (Settings(ks=()), r"ks of HumanEval \(got \(\)\)"),
        (Settings(max_new_tokens=0), r"max_new_tokens of HumanEval \(got 0\)"),
    ],
)
def test_settings_that_do_not_fit(settings: Settings, message: str) -> None:
    with pytest.raises(EvalError, match=message):
        score_completer([PROBLEM], answering([PROBLEM], lambda problem, place: ""), settings)
