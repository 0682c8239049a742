"""lm-eval is an extra: what needs it asks here first."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from qlora_kit.errors import EvalError


def lm_eval_version() -> str:
    """The installed lm-eval's version.

    Raises:
        EvalError: there is none.
    """
    try:
        return version("lm-eval")
    except PackageNotFoundError:
        raise EvalError("lm-eval is not installed", fix='pip install "qlora-kit[benchmarks]"') from None
