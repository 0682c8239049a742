"""How many rows of each source make an epoch, and which."""

from __future__ import annotations

import numpy as np

from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSource


def shares(sources: list[DataSource]) -> list[float] | None:
    """Each source's share of the rows drawn, summing to 1; None where no source has a weight.

    Raises:
        DataError: some sources have a weight and some have none.
    """
    weights = [source.weight for source in sources]
    given = [weight for weight in weights if weight is not None]
    if not given:
        return None
    if len(given) < len(weights):
        bare = [source.path for source in sources if source.weight is None]
        raise DataError(f"data.train: no weight for {', '.join(bare)}", fix="Give every source a weight, or none")
    return [weight / sum(given) for weight in given]


def draw_counts(sources: list[DataSource], of_rows: np.ndarray) -> list[int]:
    """Rows of each source in one epoch.

    An epoch has as many rows as there are training rows in all. Without weights each source gives all of its
    own. With weights source k gives weight_k / sum(weights) of the epoch, rounded by largest remainder (ties to
    the earlier source): a source smaller than its share is repeated, one larger is drawn from.

    Args:
        of_rows: int [rows], the source of each training row.

    Raises:
        DataError: a weighted source has no usable row, or a share of no row at all.
    """
    have = np.bincount(of_rows, minlength=len(sources))
    parts = shares(sources)
    if parts is None:
        return have.tolist()
    exact = np.array(parts) * len(of_rows)
    counts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(-(exact - counts), kind="stable")
    counts[by_remainder[: len(of_rows) - counts.sum()]] += 1
    for source, count, rows in zip(sources, counts, have):
        if rows == 0:
            raise DataError(f"{source.path} has a weight and no usable row", fix="Leave it out, or mend its rows")
        if count == 0:
            raise DataError(
                f"{source.path}: its weight is less than one row an epoch", got=source.weight, fix="Raise it"
            )
    return counts.tolist()


def draw_rows(of_rows: np.ndarray, counts: list[int], seed: int) -> np.ndarray:
    """int64 [epoch]: positions of the rows of one epoch, source after source (the order comes later).

    A source asked for more rows than it has gives each of them floor(count / rows) times, and the remainder
    as a sample without replacement that depends on the seed and the source's index alone; the same rows
    make up every epoch of a run.
    """
    drawn = []
    for source, count in enumerate(counts):
        own = np.flatnonzero(of_rows == source)
        whole, rest = divmod(count, len(own)) if len(own) else (0, 0)
        extra = np.random.default_rng([seed, source, 0x6D6978]).permutation(len(own))[:rest]
        drawn += [own] * whole + [own[np.sort(extra)]]
    return np.concatenate(drawn).astype(np.int64)
