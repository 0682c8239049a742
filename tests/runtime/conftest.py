"""One tiny random Llama, exported once per session and arranged as a bundle."""

import shutil
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from qlora_runtime import Bundle, Reference, TaskBundle, Tolerance, write_reference
from tiny_run import made_once
from tiny_tasks import TASKS, make_tiny_bundle, save_task_model

from .tiny import Tiny, build_graph, make_tiny, reference_prompt, write_tiny_manifest


@pytest.fixture
def caches(bundle, monkeypatch) -> list[weakref.ref]:
    """The cache of each answer that is begun from now on, as long as it lives."""
    real, born = bundle._decoder.empty_cache, []

    def empty_cache(batch: int, capacity: int):
        values = real(batch, capacity)
        born.extend(weakref.ref(value) for value in values)
        return values

    monkeypatch.setattr(bundle._decoder, "empty_cache", empty_cache)
    return born


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def pristine_bundle(tiny, tmp_path_factory) -> Path:
    """The bundle's folder, shared by the session: do not write into it."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    build_graph(tiny.folder, folder, tmp_path_factory.mktemp("cache"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny.folder / name, folder / name)
    shutil.copy(tiny.folder / "chat_template.jinja", folder / "chat_template.jinja")
    prompts = ["The bridge was", "Where does the road end?", "Bread, salt"]
    write_reference(
        folder,
        Reference(
            prompts=[reference_prompt(tiny, tiny.tokenizer(text).input_ids) for text in prompts],
            tolerance=Tolerance(max_logit=1e-3, min_top1=1.0, greedy_margin=1e-3),
        ),
    )
    write_tiny_manifest(folder)
    return folder


@pytest.fixture
def bundle_dir(pristine_bundle, tmp_path) -> Path:
    """A bundle of the test's own, to damage."""
    return Path(shutil.copytree(pristine_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def bundle(pristine_bundle) -> Bundle:
    return Bundle.open(pristine_bundle, threads=1)


@pytest.fixture(scope="session")
def task_bundle(tmp_path_factory) -> Callable[[str], TaskBundle]:
    """Opens the bundle of one of TASKS, which is made once: do not write into its folder."""

    @cache
    def opened(name: str) -> TaskBundle:
        def make(folder: Path) -> Path:
            merged = save_task_model(folder / "merged", TASKS[name])
            make_tiny_bundle(TASKS[name], merged, folder / "bundle")
            return folder / "bundle"

        return TaskBundle.open(made_once(tmp_path_factory, name.replace(" ", "-"), make), threads=1)

    return opened


@pytest.fixture
def task_dir(task_bundle, tmp_path) -> Path:
    """A bundle that classifies, of the test's own, to damage."""
    return Path(shutil.copytree(task_bundle("bert classifies").directory, tmp_path / "task"))
