"""The metrics of the toolkit, as modules of Hugging Face `evaluate` that live in the package.

Every module is a script `evaluate.load(path)` accepts, and imports nothing of its neighbours for that reason.
`load_metric` builds the class from the package itself: `evaluate.load` would copy the script into a cache below the
home folder first, and for a bare name it would ask a hub. So nothing here opens a socket or needs a writable home.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import EvalError

if TYPE_CHECKING:
    import evaluate

METRICS = {"accuracy": "Accuracy", "exact_match": "ExactMatch", "last_number": "LastNumber", "perplexity": "Perplexity"}
"""Name of each metric (its module here, and the key of its value) and the class in it."""


def load_metric(name: str) -> evaluate.Metric:
    """A metric by name, ready for `add_batch` and `compute`; keeps what it is given in memory.

    Raises:
        EvalError: there is no metric of that name.
    """
    if name not in METRICS:
        raise EvalError(f"no metric {name}", allowed=", ".join(METRICS), fix="Name one of these")
    metric_class = getattr(import_module(f"{__name__}.{name}"), METRICS[name])
    # evaluate makes a cache folder even for a metric that is kept in memory; it is never used again.
    with tempfile.TemporaryDirectory(prefix="qlora-kit-metric-") as scratch:
        return metric_class(keep_in_memory=True, cache_dir=scratch)


def compute_metric(name: str, **inputs: Any) -> dict[str, Any]:
    """A metric over all rows at once.

    Args:
        name: a key of `METRICS`.
        inputs: the metric's columns ([rows] each) and its options, as its module documents them.

    Returns:
        The value below the metric's name, and where rows can be right or wrong `correct`: 0 or 1 a row.

    Raises:
        EvalError: no such metric, no rows, columns of different lengths, or values of the wrong type.
    """
    lengths = {key: len(value) for key, value in inputs.items() if isinstance(value, Sequence)}
    if not lengths or 0 in lengths.values():
        raise EvalError(f"{name}: no rows to score", got=lengths, allowed="at least one row")
    if len(set(lengths.values())) > 1:
        raise EvalError(f"{name}: columns of different lengths", got=lengths, allowed="one value a row in each")
    try:
        return load_metric(name).compute(**inputs)
    except (ValueError, TypeError) as error:
        raise EvalError(f"{name}: the rows cannot be scored: {error}") from error
