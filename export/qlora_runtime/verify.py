"""Does the bundle still answer as the trained model did? Its reference.json is run again and compared."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_runtime.bundle import Bundle
from qlora_runtime.decoder import FloatArray
from qlora_runtime.errors import BundleError, ForeignFileError
from qlora_runtime.generating import GeneratingBundle, open_generating
from qlora_runtime.manifest import find_problems
from qlora_runtime.reference import Reference, ReferencePrompt, Tolerance, read_reference
from qlora_runtime.schema import ADAPTERS, read_manifest
from qlora_runtime.seq2seq import Seq2SeqBundle
from qlora_runtime.task import Seq2SeqTask
from qlora_runtime.task_bundle import TaskBundle
from qlora_runtime.task_reference import read_task_reference
from qlora_runtime.task_verify import TaskReport, compare_task
from qlora_runtime.verdict import Verdict

NO_GREEDY_TOKEN = "no greedy token was decided clearly enough to compare"


@dataclass
class Report(Verdict):
    """What verifying found."""

    prompts: int = 0
    positions: int = 0
    max_logit_difference: float | None = None  # the largest, over all stored logits; None: not run
    top1_agreement: float | None = None  # share of positions with the same most probable token
    greedy_tokens_compared: int = 0
    greedy_tokens_equal: int = 0

    def add(self, adapter: str, other: "Report") -> None:
        """Takes in what was found with an adapter beside the base."""
        self.prompts += other.prompts
        self.top1_agreement = _mean(self, other)
        self.positions += other.positions
        self.max_logit_difference = _largest(self.max_logit_difference, other.max_logit_difference)
        self.greedy_tokens_compared += other.greedy_tokens_compared
        self.greedy_tokens_equal += other.greedy_tokens_equal
        self.reasons += [f"with adapter {adapter}: {reason}" for reason in other.reasons]

    def in_words(self) -> list[str]:
        """The measured numbers, line by line; none where nothing was run."""
        if self.max_logit_difference is None:
            return []
        equal = f"greedy tokens equal       {self.greedy_tokens_equal} of {self.greedy_tokens_compared}"
        return [
            f"{self.prompts} prompts, {self.positions} positions",
            f"largest logit difference  {self.max_logit_difference:.6g}",
            f"same most probable token  {self.top1_agreement:.4%}",
            equal if self.greedy_tokens_compared else NO_GREEDY_TOKEN,
        ]


def _mean(one: Report, other: Report) -> float | None:
    """Share of positions of both with the same most probable token."""
    if one.top1_agreement is None or other.top1_agreement is None:
        return None
    same = one.top1_agreement * one.positions + other.top1_agreement * other.positions
    return same / (one.positions + other.positions)


def _largest(one: float | None, other: float | None) -> float | None:
    """The larger; np.maximum, unlike max, lets a NaN through."""
    return None if one is None or other is None else float(np.maximum(one, other))


@dataclass(frozen=True)
class _Distance:
    """How far one prompt's logits are: the largest difference, and how many top tokens are the same."""

    max_logit: float
    same_top1: int


def verify_directory(path: Path | str, threads: int | None = None) -> Report | TaskReport:
    """Open the bundle at `path` and verify it. Damaged files fail the report instead of raising.

    Raises:
        BundleError: the folder has no manifest that can be read, or files that are intact cannot be run.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    if problems := list(find_problems(directory, manifest)):
        return Report(reasons=[str(problem) for problem in problems])
    if manifest.task is not None and not isinstance(manifest.task, Seq2SeqTask):
        task_bundle = TaskBundle.open(directory, check_hashes=False, threads=threads)
        return compare_task(task_bundle, read_task_reference(directory))
    return verify(open_generating(directory, check_hashes=False, threads=threads), check_hashes=False)


def verify(bundle: GeneratingBundle, check_hashes: bool = True) -> Report:
    """Check the files' hashes again, then run every prompt of reference.json and hold it to its tolerance.

    Where files disagree with the manifest, the model is not run.

    Raises:
        MissingFileError, FormatError: reference.json is missing or not as the format says.
        ForeignFileError: reference.json has tokens or prompts that this model cannot have.
    """
    if check_hashes and (problems := list(find_problems(bundle.directory, bundle.manifest))):
        return Report(reasons=[str(problem) for problem in problems])
    report = compare(bundle, read_reference(bundle.directory))
    if isinstance(bundle, Bundle):
        for name in bundle.manifest.adapters:
            reference = read_reference(bundle.directory / ADAPTERS / name)
            report.add(name, compare(bundle.with_adapter(name), reference))
    return report


def compare(bundle: GeneratingBundle, reference: Reference) -> Report:
    """The bundle against a reference, which need not be the one it ships with."""
    for index, prompt in enumerate(reference.prompts):
        _check_fits(bundle, index, prompt)
    report = Report(prompts=len(reference.prompts))
    distances = [_compare_logits(bundle, prompt) for prompt in reference.prompts]
    report.positions = sum(len(prompt.scored_ids) for prompt in reference.prompts)
    # np.max, unlike max, lets a NaN through; and a NaN is within no tolerance.
    report.max_logit_difference = float(np.max([distance.max_logit for distance in distances]))
    report.top1_agreement = sum(distance.same_top1 for distance in distances) / report.positions
    report.reasons += _logit_reasons(report, reference.tolerance)
    for index, prompt in enumerate(reference.prompts):
        _compare_greedy(bundle, index, prompt, reference.tolerance, report)
    return report


def _compare_logits(bundle: GeneratingBundle, prompt: ReferencePrompt) -> _Distance:
    logits = scored_logits(bundle, prompt.input_ids, prompt.decoder_ids)  # [seq, vocab]
    ids = np.array(prompt.top_k_ids, dtype=np.int64)  # [seq, k]
    expected = np.array(prompt.top_k_logits, dtype=np.float64)  # [seq, k]
    difference = np.abs(np.take_along_axis(logits, ids, axis=1) - expected)
    expected_top1 = ids[np.arange(len(ids)), expected.argmax(axis=1)]  # [seq]
    return _Distance(float(difference.max()), int((logits.argmax(axis=1) == expected_top1).sum()))


def scored_logits(
    bundle: GeneratingBundle, input_ids: list[int], decoder_ids: list[int] | None
) -> FloatArray:
    """Logits float32 [seq, vocab] after each token of `decoder_ids`; of a decoder alone, of `input_ids`."""
    if isinstance(bundle, Seq2SeqBundle):
        logits: FloatArray = bundle.target_logits([input_ids], [decoder_ids or []])[0]
    else:
        logits = bundle.logits([input_ids])[0]
    return logits


def _logit_reasons(report: Report, tolerance: Tolerance) -> list[str]:
    reasons = []
    if report.max_logit_difference is None or not report.max_logit_difference <= tolerance.max_logit:
        reasons.append(f"a logit differs by {report.max_logit_difference}, allowed is {tolerance.max_logit}.")
    if report.top1_agreement is None or not report.top1_agreement >= tolerance.min_top1:
        reasons.append(
            f"the most probable token is the same at {report.top1_agreement} of the positions, required is "
            f"{tolerance.min_top1}."
        )
    return reasons


def _compare_greedy(
    bundle: GeneratingBundle, index: int, prompt: ReferencePrompt, tolerance: Tolerance, report: Report
) -> None:
    """Reads prompt and trained model's answer: each token that was won clearly must be the bundle's best too.

    Reading goes token by token through the cache, as in generating: so the cache is verified too.
    """
    steps = _decided_steps(prompt, tolerance)
    if not steps:
        return
    report.greedy_tokens_compared += len(steps)
    try:
        best = list(bundle.best_tokens(prompt.input_ids, prompt.greedy_ids[: steps[-1] + 1]))
    except BundleError as error:
        report.reasons.append(f"prompt {index}: {error}")
        return
    different = [step for step in steps if best[step] != prompt.greedy_ids[step]]
    report.greedy_tokens_equal += len(steps) - len(different)
    if different:
        step = different[0]
        report.reasons.append(
            f"prompt {index}: greedy token {step} is {best[step]}, the trained model's is "
            f"{prompt.greedy_ids[step]}, which it won by {prompt.margins[step]:.3g} (compared from "
            f"{tolerance.greedy_margin} up); {len(steps) - len(different)} of {len(steps)} are the same."
        )


def _decided_steps(prompt: ReferencePrompt, tolerance: Tolerance) -> list[int]:
    """Steps of the answer that the trained model won by the margin."""
    decided = [step for step, margin in enumerate(prompt.margins) if margin >= tolerance.greedy_margin]
    if tolerance.every_greedy_token:
        return decided
    return [step for place, step in enumerate(decided) if step == place]


def _check_fits(bundle: GeneratingBundle, index: int, prompt: ReferencePrompt) -> None:
    model, decoder = bundle.manifest.model, prompt.decoder_ids
    every = [prompt.input_ids, prompt.greedy_ids, decoder or [], *prompt.top_k_ids]
    highest = max(max(ids, default=0) for ids in every)
    length = len(prompt.input_ids) + len(prompt.greedy_ids)
    if isinstance(bundle, Seq2SeqBundle):
        length = max(len(prompt.input_ids), len(prompt.greedy_ids) + 1, len(decoder or []))
    other = isinstance(bundle, Seq2SeqBundle) != (decoder is not None)
    if highest >= model.vocab_size or length > model.context_length or other:
        raise ForeignFileError(
            f"reference.json: prompt {index} has token ids up to {highest} and {length} tokens with "
            f"its answer; the model has {model.vocab_size} ids and a context of "
            f"{model.context_length}. It is a file of another bundle: export again."
        )
