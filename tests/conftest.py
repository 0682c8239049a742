"""Fixtures for all tests: offline, deterministic, nothing written outside the test's own folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM"):
    os.environ.setdefault(name, "false" if name.startswith("TOKENIZERS") else "1")  # before any library is imported


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted models go to a folder of this test session, never to the user's cache."""
    if "QLORA_KIT_CACHE" not in os.environ:
        monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path_factory.getbasetemp() / "qlora-kit-cache"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny Llama's folder with a tied head; shared, so only to be read."""
    from tiny_models import save_tiny_model

    yield save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")
