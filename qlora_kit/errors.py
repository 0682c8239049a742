"""The exceptions of the toolkit: each says what it got, what is allowed and what to do."""

from __future__ import annotations

_MISSING = object()


class QloraKitError(Exception):
    """Root of all errors a user can cause or mend. The command line prints it and exits with `exit_code`.

    Args:
        problem: what is wrong, naming the file, row or field.
        got: the offending value, shown with `repr`.
        allowed: what would have been accepted.
        fix: the next thing to do.
    """

    exit_code = 2

    def __init__(self, problem: str, *, got: object = _MISSING, allowed: str = "", fix: str = "") -> None:
        parts = [problem.rstrip(".")]
        if got is not _MISSING:
            parts[0] += f" (got {got!r})"
        if allowed:
            parts.append(f"Allowed: {allowed.rstrip('.')}")
        if fix:
            parts.append(fix.rstrip("."))
        super().__init__(". ".join(parts) + ".")


class RecipeError(QloraKitError):
    """The recipe, or a key=value override, is not valid."""


class DataError(QloraKitError):
    """A dataset, a row of it or the chat template cannot be used."""


class ModelError(QloraKitError):
    """A base model cannot be found, read or quantized."""


class AdapterError(QloraKitError):
    """An adapter cannot be injected, read or merged."""


class RunError(QloraKitError):
    """A run folder is missing, incomplete, in use by another process, or belongs to another recipe."""


class CheckpointError(RunError):
    """A checkpoint is damaged, incomplete or made by another recipe or data."""


class TrainingError(QloraKitError):
    """Training cannot go on: a loss or gradient that is not finite, no trainable token."""

    exit_code = 4


class OutOfMemory(TrainingError, MemoryError):
    """Memory, or what `train.memory_limit` allows of it, does not hold even one row's micro batch."""


class EvalError(QloraKitError):
    """A metric or benchmark cannot be computed."""


class ExportError(QloraKitError):
    """A model cannot be merged or written as a bundle."""


class VerificationError(ExportError):
    """A bundle is further from the trained model than its profile allows."""

    exit_code = 3


class Interrupted(QloraKitError):
    """Ctrl-C: the run was left resumable."""

    exit_code = 130
