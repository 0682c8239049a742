"""HumanEval from a model to pass@k: completions, programs, outcomes, results as JSON."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.atomic import write_json
from qlora_kit.errors import EvalError
from qlora_kit.eval.code.completers import Complete, completer_of
from qlora_kit.eval.code.humaneval import STOP, Problem, program_of, question, read_problems
from qlora_kit.eval.code.pass_at_k import pass_at_k_interval
from qlora_kit.eval.code.sandbox import Kind, Limits, Outcome, require_sandbox, run_program
from qlora_kit.eval.intervals import Interval
from qlora_kit.eval.scorers import BundleScorer, TorchScorer


@dataclass(frozen=True)
class Settings:
    """How a model is asked, and its programs are run."""

    samples: int = 1
    """Programs drawn for each problem: n of the paper."""
    ks: tuple[int, ...] = (1,)
    temperature: float = 0.0
    """0 always takes the likeliest token, for one sample; the paper draws at 0.2 for pass@1, 0.8 for pass@100."""
    max_new_tokens: int = 512
    chat: bool = False
    """Asks in the model's chat template, and takes the code from the answer's ```python block."""
    seed: int = 0
    workers: int = 2
    """Programs run at one time."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Sample:
    """One answer to a problem, and what came of it."""

    outcome: Kind
    reason: str
    answer: str


@dataclass(frozen=True)
class CodeResult:
    """pass@k over all problems, and each problem's samples."""

    pass_at_k: dict[int, Interval]
    samples: dict[str, list[Sample]]
    """By task_id, in the file's order."""
    settings: Settings
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A tree for json.dumps."""
        outcomes = Counter(sample.outcome for drawn in self.samples.values() for sample in drawn)
        return {
            "benchmark": "HumanEval",
            "problems": len(self.samples),
            "pass_at_k": {str(k): asdict(interval) for k, interval in self.pass_at_k.items()},
            "confidence": 0.95,
            "outcomes": dict(outcomes.most_common()),
            "settings": asdict(self.settings),
            "seconds": self.seconds,
            "per_problem": {task: [asdict(sample) for sample in drawn] for task, drawn in self.samples.items()},
        }


def run_humaneval(
    form: TorchScorer | BundleScorer,
    file: Path,
    settings: Settings | None = None,
    *,
    out: Path | None = None,
    max_problems: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> CodeResult:
    """pass@k of one form of a model on HumanEval.

    Args:
        form: as `eval.run.find_forms` makes them.
        file: HumanEval.jsonl.
        out: where to write the result as JSON.
        max_problems: only so many, from the first on; for a quick look, since the problems get harder.
        tell: gets a line after each problem.

    Raises:
        EvalError: the settings do not fit together, a prompt does not fit the model, or this system cannot keep
            model-written programs from the network and from its files; then the model is not asked at all.
        DataError: the file is not HumanEval's.
    """
    settings = settings or Settings()
    problems = read_problems(file)[:max_problems]
    complete = completer_of(form, chat=settings.chat, seed=settings.seed)
    result = score_completer(problems, complete, settings, tell)
    if out is not None:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, {**result.to_json(), "file": file.name, "file_sha256": digest})
    return result


def score_completer(
    problems: Sequence[Problem], complete: Complete, settings: Settings, tell: Callable[[str], None] | None = None
) -> CodeResult:
    """Asks `complete` problem by problem, and runs the programs meanwhile.

    Raises:
        EvalError: as `run_humaneval`.
    """
    check_settings(settings)
    require_sandbox()
    started = time.perf_counter()
    stop = () if settings.chat else STOP
    pending: dict[str, list[tuple[str, Future[Outcome]]]] = {}
    with ThreadPoolExecutor(settings.workers) as pool:
        try:
            for problem in problems:
                asked = [question(problem, settings.chat)]
                [answers] = complete(asked, settings.samples, settings.temperature, settings.max_new_tokens, stop)
                programs = [program_of(problem, answer, settings.chat) for answer in answers]
                futures = [pool.submit(run_program, text, problem.checks, settings.limits) for text in programs]
                pending[problem.task_id] = [*zip(answers, futures, strict=True)]
                if tell is not None:
                    tell(f"{problem.task_id}: {len(answers)} answers, problem {len(pending)} of {len(problems)}")
            samples = {
                task: [_sample(answer, future.result()) for answer, future in drawn] for task, drawn in pending.items()
            }
        finally:
            pool.shutdown(cancel_futures=True)
    passed = [sum(sample.outcome == "passed" for sample in drawn) for drawn in samples.values()]
    rates = {k: pass_at_k_interval(passed, settings.samples, k, seed=settings.seed) for k in settings.ks}
    return CodeResult(rates, samples, settings, time.perf_counter() - started)


def _sample(answer: str, outcome: Outcome) -> Sample:
    return Sample(outcome.kind, outcome.reason, answer)


def check_settings(settings: Settings) -> None:
    """Nothing where the settings fit together.

    Raises:
        EvalError: a number is too small, more samples are needed than drawn, or all would be the same.
    """
    if not settings.ks:
        raise EvalError("ks of HumanEval", got=settings.ks, allowed="one number or more, for example 1, 10")
    for name in ("samples", "workers", "max_new_tokens"):
        if getattr(settings, name) < 1:
            raise EvalError(f"{name} of HumanEval", got=getattr(settings, name), allowed="1 or more")
    if min(settings.ks) < 1:
        raise EvalError("k of HumanEval", got=min(settings.ks), allowed="1 or more")
    if (needed := max(settings.ks)) > settings.samples:
        raise EvalError(f"pass@{needed} needs {needed} samples of each problem", got=settings.samples, fix="Draw more")
    if settings.temperature < 0:
        raise EvalError("temperature of HumanEval", got=settings.temperature, allowed="0 or more")
    if settings.samples > 1 and settings.temperature == 0:
        fix = "Draw one, or raise the temperature"
        raise EvalError("at temperature 0 all samples of a problem are the same", got=settings.samples, fix=fix)
