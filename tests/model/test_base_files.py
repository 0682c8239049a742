"""Which files of a base model are fetched and hashed, and that big ones are hashed once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from qlora_kit.errors import ModelError
from qlora_kit.model import weights as weights_module
from qlora_kit.model.source import find_base
from qlora_kit.model.weights import sha256_file, sha256_once

REPOSITORY = [
    "config.json",
    "consolidated.safetensors",
    "consolidated.00.pth",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "onnx/config.json",
    "original/consolidated.safetensors",
    "original/deep/params.json",
    "pytorch_model.bin",
    "tokenizer.json",
    "tokenizer.model",
]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the files that were read to be hashed; all files count as big."""
    read: list[str] = []

    def hash_file(path: Path) -> str:
        read.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(weights_module, "sha256_file", hash_file)
    monkeypatch.setattr(weights_module, "_BIG", 0)
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    return read


def write(path: Path, text: str, age: int = 100) -> Path:
    path.write_text(text)
    stamp = path.stat().st_mtime_ns - age * 10**9
    os.utime(path, ns=(stamp, stamp))
    return path


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_model_comes_without_its_doubles(weights: bool, tiny_llama: Path, monkeypatch: Any) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _, **options: asked.update(options) or tiny_llama)
    source = find_base("owner/name", "v1", weights=weights)
    assert asked.pop("revision") == "v1"
    wanted = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted += ["tokenizer.json", "tokenizer.model"]
    assert list(filter_repo_objects(REPOSITORY, **asked)) == [
        name for name in wanted if weights or not name.endswith(".safetensors")
    ]
    assert ("model.safetensors" in source.sha256) == weights and "tokenizer.json" in source.sha256


def test_without_weights_a_folder_needs_none(tmp_path: Path) -> None:
    write(tmp_path / "config.json", '{"model_type": "llama"}')
    write(tmp_path / "consolidated.safetensors", "the other form")
    assert list(find_base(str(tmp_path), weights=False).sha256) == ["config.json"]
    with pytest.raises(ModelError, match="holds no weights"):
        find_base(str(tmp_path))


def test_a_big_file_is_hashed_once(counted: list[str], tmp_path: Path) -> None:
    path, cache = write(tmp_path / "model.safetensors", "old"), tmp_path / "cache"
    first = sha256_once(path, cache)
    assert sha256_once(path, cache) == first == sha256_file(path)
    assert counted == ["model.safetensors"]
    write(path, "new", age=50)  # as long, at another time
    assert sha256_once(path, cache) == sha256_file(path) != first
    os.utime(path, ns=(10**9, 10**9))
    sha256_once(path, cache)
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    assert sha256_once(link, cache) == sha256_file(path)
    assert len(counted) == 3


def test_a_file_written_a_moment_ago_is_hashed_again(counted: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", "young", age=0)
    assert sha256_once(path, tmp_path / "cache") == sha256_once(path, tmp_path / "cache")
    assert len(counted) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": 1}', "\udcff"])
def test_a_damaged_memory_is_ignored(text: str, counted: list[str], tmp_path: Path) -> None:
    path, cache = write(tmp_path / "model.safetensors", "weights"), tmp_path / "cache"
    digest = sha256_once(path, cache)
    (entry,) = cache.rglob("*.json")
    entry.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert sha256_once(path, cache) == digest and len(counted) == 2
    tree = json.loads(entry.read_text())
    entry.write_text(json.dumps({**tree, "sha256": "no digest"}))
    assert sha256_once(path, cache) == digest and len(counted) == 3


def test_a_cache_that_cannot_be_written_costs_only_time(counted: list[str], tmp_path: Path) -> None:
    path, cache = write(tmp_path / "model.safetensors", "weights"), write(tmp_path / "file", "no folder")
    assert sha256_once(path, cache) == sha256_once(path, cache) == sha256_file(path)
    assert len(counted) == 2


def test_small_files_are_not_remembered(tmp_path: Path) -> None:
    sha256_once(write(tmp_path / "config.json", "{}"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
