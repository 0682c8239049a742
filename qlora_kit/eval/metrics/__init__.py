"""The metrics of the toolkit, as modules of Hugging Face `evaluate` that live in the package.

Every module that `METRICS` names is a script `evaluate.load(path)` accepts: it imports by full names alone.
`load_metric` builds the class from the package itself: `evaluate.load` would copy the script into a cache below the
home folder first, and for a bare name it would ask a hub. So nothing here opens a socket or needs a writable home.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sized
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from qlora_kit.errors import EvalError

if TYPE_CHECKING:
    import evaluate

    from qlora_kit.eval.metrics.additive import AdditiveScore


class MetricEntry(NamedTuple):
    """Where a metric is, and what to look at first."""

    class_name: str
    headline: str
    """Key of the value it is known by."""
    higher_is_better: bool = True


METRICS = {
    "accuracy": MetricEntry("Accuracy", "accuracy"),
    "bleu": MetricEntry("Bleu", "bleu"),
    "cer": MetricEntry("Cer", "cer", higher_is_better=False),
    "chrf": MetricEntry("Chrf", "chrf"),
    "exact_match": MetricEntry("ExactMatch", "exact_match"),
    "f1": MetricEntry("F1", "f1"),
    "last_number": MetricEntry("LastNumber", "last_number"),
    "matthews": MetricEntry("Matthews", "matthews"),
    "meteor_exact_stem": MetricEntry("MeteorExactStem", "meteor_exact_stem"),
    "mse": MetricEntry("Mse", "mse", higher_is_better=False),
    "nist": MetricEntry("Nist", "nist"),
    "pearson": MetricEntry("Pearson", "pearson"),
    "perplexity": MetricEntry("Perplexity", "perplexity", higher_is_better=False),
    "rouge": MetricEntry("Rouge", "rougeL"),
    "seqeval": MetricEntry("Seqeval", "f1"),
    "spearman": MetricEntry("Spearman", "spearman"),
    "squad": MetricEntry("Squad", "f1"),
    "squad_v2": MetricEntry("SquadV2", "f1"),
    "wer": MetricEntry("Wer", "wer", higher_is_better=False),
}
"""Every metric by name, which is its module's here."""

ADDITIVE = ("bleu", "chrf", "f1", "matthews", "nist", "pearson", "seqeval", "spearman")
"""Metrics that are no mean over rows, yet can be had from sums over rows: see `additive_score`."""
_COLUMNS = ("predictions", "references", "loss", "loss_tokens")  # all other inputs are options


def load_metric(name: str) -> evaluate.Metric:
    """A metric by name, ready for `add_batch` and `compute`; keeps what it is given in memory.

    Raises:
        EvalError: there is no metric of that name.
    """
    if name not in METRICS:
        raise EvalError(f"no metric {name}", allowed=", ".join(METRICS), fix="Name one of these")
    metric_class = getattr(import_module(f"{__name__}.{name}"), METRICS[name].class_name)
    # evaluate makes a cache folder even for a metric that is kept in memory; it is never used again.
    with tempfile.TemporaryDirectory(prefix="qlora-kit-metric-") as scratch:
        return metric_class(keep_in_memory=True, cache_dir=scratch)


def compute_metric(name: str, **inputs: Any) -> dict[str, Any]:
    """A metric over all rows at once.

    Args:
        name: a key of `METRICS`.
        inputs: the metric's columns ([rows] each) and its options, as its module documents them.

    Returns:
        The metric's values, the one it is known by below its `headline`, and where rows can be right or wrong
        `correct`: 0 or 1 a row.

    Raises:
        EvalError: no such metric, no rows, columns of different lengths, or values of the wrong type.
    """
    _check_lengths(name, inputs)
    try:
        return load_metric(name).compute(**inputs)
    except (ValueError, TypeError) as error:
        raise EvalError(f"{name}: the rows cannot be scored: {error}") from error


def additive_score(name: str, **inputs: Any) -> AdditiveScore:
    """A metric of `ADDITIVE` as counts that add up over rows, for `score_intervals.bootstrap_additive`.

    Args:
        name: one of `ADDITIVE`.
        inputs: as for `compute_metric`; `f1` and `seqeval` take `average` besides: macro, micro or weighted.

    Returns:
        The metric's headline value, row by row.

    Raises:
        EvalError: as `compute_metric`; also a metric whose rows do not add up.
    """
    if name not in ADDITIVE:
        raise EvalError(
            f"{name} does not add up over rows",
            allowed=", ".join(ADDITIVE),
            fix="Use bootstrap_mean on a value a row, or bootstrap_score",
        )
    _check_lengths(name, inputs)
    try:
        return cast("AdditiveScore", import_module(f"{__name__}.{name}").additive_score(**inputs))
    except (ValueError, TypeError) as error:
        raise EvalError(f"{name}: the rows cannot be scored: {error}") from error


def _check_lengths(name: str, inputs: Mapping[str, Any]) -> None:
    lengths = {key: len(inputs[key]) for key in _COLUMNS if isinstance(inputs.get(key), Sized)}
    if not lengths or 0 in lengths.values():
        raise EvalError(f"{name}: no rows to score", got=lengths, allowed="at least one row")
    if len(set(lengths.values())) > 1:
        raise EvalError(f"{name}: columns of different lengths", got=lengths, allowed="one value a row in each")
