"""Who may import whom, and what no file may contain. See docs/design.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "qlora_kit").rglob("*.py"), *(ROOT / "export" / "qlora_runtime").rglob("*.py")])
LAYERS = {  # part of qlora_kit: the parts it may import, besides itself, errors and atomic
    "errors": set(),
    "atomic": set(),
    "kernels": set(),
    "model": {"kernels"},
    "section": set(),
    "adapters": {"section", "kernels", "model"},
    "task_settings": {"section"},
    "recipe": {"section", "adapters", "task_settings", "recipe_checks"},
    "recipe_checks": {"recipe"},  # its types
    "recipe_file": {"section", "recipe", "adapters", "task_settings"},
    "doctor": set(),
    "plan": {"recipe", "recipe_file", "section", "model", "adapters"},
    "data": {"recipe", "task_settings"},
    "tasks": {"recipe", "task_settings", "data", "kernels", "adapters"},
    "train": {"recipe", "recipe_file", "kernels", "adapters", "model", "data", "generate", "tasks", "plan"},
    "generate": {"adapters", "model", "data", "train"},
    "options": {"options_adapters", "section"},
    "options_adapters": set(),
    "adapter_tools": {"adapters", "model", "train", "report"},
    "report": {"train", "recipe", "recipe_file", "eval"},
    "export": {"recipe", "adapters", "model", "data", "task_settings", "tasks", "train", "generate", "plan"},
    "eval": {"recipe", "model", "data", "task_settings", "tasks", "train", "export", "generate"},
    "cli": {
        "options",
        "recipe_file",
        "doctor",
        "plan",
        "data",
        "model",
        "train",
        "eval",
        "export",
        "generate",
        "report",
        "adapter_tools",
        "tasks",
    },
}
OF_DATA = {"DataSection", "DataSource"}  # all of the recipe that data may see
RUNTIME_FORBIDS = {"qlora_kit", "torch", "transformers", "accelerate", "bitsandbytes", "datasets"}
TOKENIZERS_RAISES_EXCEPTION = {"qlora_kit/model/load.py", "export/qlora_runtime/tokenizer.py"}  # nothing narrower
UNSAFE = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def imports(file: Path) -> list[tuple[str, set[str]]]:
    """(module, names taken from it) of every import, those inside functions included."""
    found: list[tuple[str, set[str]]] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, set()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", {alias.name for alias in node.names}))
    return found


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_run_one_way(file: Path) -> None:
    modules = imports(file)
    if "qlora_runtime" in file.parts:
        assert not {module.split(".")[0] for module, _ in modules} & RUNTIME_FORBIDS
        return
    part = file.relative_to(ROOT / "qlora_kit").with_suffix("").parts[0]
    for module, names in modules:
        if not module.startswith("qlora_kit.") or part == "__init__":
            continue
        other = module.split(".")[1]
        assert other in LAYERS[part] | {part, "errors", "atomic"}, f"{part} must not import {module}"
        if part == "data" and other == "recipe":
            assert names <= OF_DATA, "data sees its own section of the recipe alone"
        if part in ("recipe", "recipe_file", "plan") and other == "adapters":
            assert module == "qlora_kit.adapters.settings", f"{part} must import no torch"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_no_pickle_no_remote_code_no_blind_except(file: Path) -> None:
    assert not {module.split(".")[0] for module, _ in imports(file)} & UNSAFE
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            kinds = {ast.unparse(part) for part in ast.walk(node.type)} if node.type else {"Exception"}
            goes_on = isinstance(node.body[-1], ast.Raise)
            known = "BaseException" in kinds or name_of(file) in TOKENIZERS_RAISES_EXCEPTION
            assert not kinds & {"Exception", "BaseException"} or (goes_on and known), f"line {node.lineno}: too wide"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "eval", "exec", "compile", "__import__", "os.system"), called
            options = {key.arg: key.value for key in node.keywords}
            code = options.get("trust_remote_code")
            assert not (isinstance(code, ast.Constant) and code.value), f"{called} would run remote code"
            assert ast.unparse(options.get("weights_only", ast.Constant(True))) == "True"


def test_every_part_has_its_rule() -> None:
    parts = {
        path.stem for path in (ROOT / "qlora_kit").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert parts - {"__init__"} == set(LAYERS)


def test_files_stay_small() -> None:
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: length for name, length in lengths.items() if length > 250} == {}
