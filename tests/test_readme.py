"""The README's commands, recipes and links are ones that exist."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from qlora_runtime.cli import build_parser as build_runtime_parser
from qlora_runtime.cli import main as runtime_main
from tiny_models import save_tiny_model
from tiny_run import write_recipe

from qlora_kit.cli import main
from qlora_kit.options import parse_options
from qlora_kit.recipe_file import load_recipe, parse_recipe, shipped_recipes

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
OWN_MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAKE_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands() -> list[str]:
    """Lines of ```bash blocks and of indented blocks that are commands, and commands in `code` of the text."""
    lines = [line for block in blocks("bash", TEXT + METHODS) for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"^    ((?:make|qlora-kit|qlora-runtime) .+)$", TEXT, re.M)
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)
    lines += [" ".join(text.split()) for text in re.findall(r"`((?:make|qlora-kit|qlora-runtime) [^`]+)`", prose)]
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def check_recipe(name: str, overrides: list[str]) -> None:
    """A recipe that the command names is shipped, or written out in the README, or one of a run."""
    if name in shipped_recipes():
        load_recipe(name, overrides)
    else:
        assert name.startswith("runs/") or f"`{name}`" in TEXT, f"{name} is neither shipped nor in the README"


def test_there_are_commands() -> None:
    found = {command.split()[0] for command in commands()}
    assert {"make", "qlora-kit", "qlora-runtime", "pip"} <= found and len(commands()) >= 20


@pytest.mark.parametrize("command", commands())
def test_command(command: str) -> None:
    tool, *arguments = shlex.split(command, comments=True)
    if tool == "make":
        assert arguments and set(arguments) - {a for a in arguments if "=" in a} <= MAKE_TARGETS
    elif tool == "qlora-kit":
        options = parse_options(arguments)
        if getattr(options, "recipe", None):
            check_recipe(options.recipe, options.overrides)
    elif tool == "qlora-runtime":
        build_runtime_parser().parse_args(arguments)
    elif tool == "pip":
        places = [argument.split("[")[0] for argument in arguments[1:] if not argument.startswith("-")]
        assert places and all((ROOT / place / "pyproject.toml").is_file() for place in places)
    else:
        assert tool in {"cd", "git", "python", "source"}, f"nothing checks {tool}"


def run_in_order(section: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the section's qlora-kit and qlora-runtime commands; those that read a recipe with `overrides`."""
    text = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    for line in lines:
        tool, *arguments = shlex.split(line, comments=True)
        if getattr(parse_options(arguments) if tool == "qlora-kit" else None, "recipe", None):
            arguments += overrides
        monkeypatch.setattr("sys.stdin", io.StringIO("What do bees make?\n"))
        assert (runtime_main if tool == "qlora-runtime" else main)(arguments) == 0, line
    assert len(lines) >= 4


def test_the_section_on_own_data_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(blocks("json")[0], encoding="utf-8")
    (tmp_path / "my.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    model = save_tiny_model(tmp_path / "model")
    run_in_order("Your own data", [f"base.model={model}", "eval.max_new_tokens=4"], monkeypatch)
    run = tmp_path / "runs" / "first"
    assert (run / "adapter" / "adapter_model.safetensors").is_file() and (run / "bundles" / "int8").is_dir()
    assert main(["train", "--resume", "runs/first", "--quiet"]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "demo" / OWN_MODEL).exists(), reason="`make demo-data` fetches the model")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_section_on_own_data_runs_with_its_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whichever row the seed holds out, four rows are enough for a bundle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "rows.jsonl").write_text(blocks("json")[0], encoding="utf-8")
    (tmp_path / "my.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    run_in_order("Your own data", [f"run.seed={seed}"], monkeypatch)
    manifest = json.loads((tmp_path / "runs/first/bundles/int8/manifest.json").read_text(encoding="utf-8"))
    found = manifest["verification"]["distances"]
    assert (found["rows"], found["training_rows"], found["calibration_rows"]) == (4, 3, 3)
    assert found["perplexity_over"] == "all tokens" and found["perplexity_tokens"] > 50
    assert found["greedy_tokens_equal"] == found["greedy_tokens_compared"] >= 4


def test_the_quick_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "tiny", save_tiny_model(tmp_path / "model"))
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    fields = ["base.model", "data.train", "data.eval", "train.threads", "eval.max_new_tokens", "eval.choices"]
    overrides = ["train.max_steps=12", "adapter.rank=4", "export.verify_prompts=4"]
    for field in fields:
        section, key = field.split(".")
        overrides.append(f"{field}={json.dumps(tree[section][key])}")
    run_in_order("A quick tour", overrides, monkeypatch)
    run_in_order("Other methods, several adapters, a teacher", overrides, monkeypatch)
    results = json.loads((tmp_path / "runs/smollm2-sentiment/eval/results.json").read_text(encoding="utf-8"))
    assert len(results["forms"]) == 6


def test_fields_in_the_text_are_fields_of_the_recipe() -> None:
    base = {"run": {"name": "a"}, "base": {"model": "b"}, "data": {"train": "c"}, "train": {"max_steps": 10}}
    found = re.findall(r"`((?:run|base|adapter|data|train|eval|export)\.\w+)[:=] ?([^`]+)`", TEXT)
    assert len(found) >= 5
    for field, value in found:
        section, key = field.split(".")
        tree = base | {section: {**base.get(section, {}), key: yaml.safe_load(value)}}
        parse_recipe(tree, f"README.md: {field}")


def test_pages_that_are_named_exist() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "qlora_kit").glob("recipes/*.yaml")]
    for file in [*pages, *(ROOT / "qlora_kit").rglob("*.py")]:
        for named in re.findall(r"(?<![\w/])docs/[\w./-]+\.md\b", file.read_text(encoding="utf-8")):
            assert (ROOT / named).is_file(), f"{file.relative_to(ROOT)} names {named}"


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
