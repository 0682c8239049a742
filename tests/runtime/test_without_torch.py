"""The proof that the runtime needs no torch: it generates where only its declared dependencies are."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest
import qlora_runtime
from packaging.requirements import Requirement
from qlora_runtime import Sampling
from qlora_runtime.generate import generate

PACKAGE = Path(qlora_runtime.__file__).parent


def closure(requirements: list[str]) -> set[str]:
    """The names of all distributions that `requirements` need, with theirs, on this machine."""
    found: set[str] = set()
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += [Requirement(text) for text in distribution(name).requires or []]
    return found


def link_distribution(name: str, site_packages: Path) -> None:
    """Link every top-level file and folder of an installed distribution into `site_packages`."""
    installed = distribution(name)
    for top in {path.parts[0] for path in installed.files or []} - {"..", "__pycache__"}:
        target = site_packages / top
        if not target.exists():
            target.symlink_to(installed.locate_file(top))


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """The interpreter of an environment with the declared dependencies and the package, and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    for name in closure(project["dependencies"]):
        link_distribution(name, site_packages)
    shutil.copytree(PACKAGE, site_packages / "qlora_runtime", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "bin" / "python"


def run_bare(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", ["torch", "transformers", "onnxruntime_genai", "qlora_kit"])
def test_the_environment_has_no_torch(bare_python, tmp_path, name):
    result = run_bare(bare_python, "-c", f"import {name}", cwd=tmp_path)
    assert f"No module named '{name}'" in result.stderr


def test_it_generates_the_same_tokens_there(bare_python, bundle, pristine_bundle, tmp_path):
    prompts = ["The bridge was", "漢字 and 👍"]
    chat = [{"role": "user", "content": "Where does the road end?"}]
    lines = [*({"prompt": prompt} for prompt in prompts), {"messages": chat}]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    command = ["-m", "qlora_runtime.cli", "generate", str(pristine_bundle)]
    options = ["--file", "in.jsonl", "-o", "out.jsonl", "--max-new-tokens", "16", "--threads", "1"]
    result = run_bare(bare_python, *command, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n") if line]
    for answer, prompt in zip(answers, [*prompts, chat], strict=True):
        assert answer["token_ids"] == generate(bundle, prompt, Sampling(max_new_tokens=16)).token_ids


def test_it_classifies_there(bare_python, task_bundle, tmp_path):
    bundle = task_bundle("bert classifies")
    options = ["classify", str(bundle.directory), "--text", "The bridge", "--threads", "1"]
    result = run_bare(bare_python, "-m", "qlora_runtime.cli", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (expected,) = bundle.classify(["The bridge"])
    assert json.loads(result.stdout)["predicted_label"] == expected.labels[0]


def test_it_verifies_there(bare_python, pristine_bundle, tmp_path):
    result = run_bare(bare_python, "-m", "qlora_runtime.cli", "verify", str(pristine_bundle), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("PASSED\n")


def test_the_server_says_what_it_needs(bare_python, pristine_bundle, tmp_path):
    result = run_bare(bare_python, "-m", "qlora_runtime.cli", "serve", str(pristine_bundle), cwd=tmp_path)
    assert result.returncode == 2
    assert "is not installed: pip install 'qlora-runtime[serve]'" in result.stderr


@pytest.mark.parametrize(("folder", "extra"), [(".", set()), ("server", {"starlette", "uvicorn"})])
def test_the_sources_import_only_what_is_declared(folder, extra):
    allowed = {"onnxruntime", "numpy", "tokenizers", "jinja2", "qlora_runtime"} | set(sys.stdlib_module_names) | extra
    for source in (PACKAGE / folder).glob("*.py"):
        imported = re.findall(r"^\s*(?:from|import)\s+(\w+)", source.read_text(), flags=re.MULTILINE)
        assert set(imported) <= allowed, source
