"""What these tests share: the tiny run, and a skip where the sandbox cannot be."""

import pytest
from tiny_run import exported_run, trained_run

from qlora_kit.errors import EvalError
from qlora_kit.eval.code.sandbox import require_sandbox

__all__ = ["exported_run", "trained_run"]


@pytest.fixture(scope="module")
def sandbox() -> None:
    """Model-written programs can be run safely here."""
    try:
        require_sandbox()
    except EvalError as error:
        if "cannot be run safely here" not in str(error) and "on Linux only" not in str(error):
            raise
        pytest.skip(str(error))
