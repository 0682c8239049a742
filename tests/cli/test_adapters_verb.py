"""`qlora-kit adapters` as a user types it: what it writes, prints and refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_folders import adapter, logits
from refusals import refused
from tiny_models import tiny_model
from tiny_run import changed_copy

from qlora_kit.adapters.combine import RULES
from qlora_kit.adapters.deltas import read_deltas
from qlora_kit.adapters.inject import adapted_layers
from qlora_kit.adapters.peft_format import load_adapter, read_adapter
from qlora_kit.cli import main
from qlora_kit.export.merge import merge_adapter
from qlora_kit.model.source import sha256_file
from qlora_kit.options_adapters import COMBINATIONS
from qlora_kit.train.restore import load_tuned
from qlora_kit.train.run_folder import RunFolder


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Two adapters on one base, of different ranks, scalings, dtypes and targets."""
    return [
        str(adapter(tmp_path / "a", 1, rank=4, alpha=6.0, rank_pattern={"v_proj": 2})),
        str(adapter(tmp_path / "b", 2, rank=3, use_rslora=True, target_modules=["q_proj", "up_proj"], dtype="bf16")),
    ]


def run(*arguments: str) -> None:
    assert main(["adapters", *arguments]) == 0


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON that an action prints."""
    capsys.readouterr()
    run(*arguments, "--json")
    return json.loads(capsys.readouterr().out)


def change_config(folder: str | Path, **fields: object) -> None:
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def dense(folder: Path | str) -> dict[str, torch.Tensor]:
    return {name: d.dense() for name, d in read_deltas(read_adapter(Path(folder)), Path(folder)).items()}


def tuned(folder: Path | str) -> torch.Tensor:
    model = tiny_model("llama")
    load_adapter(model, Path(folder))
    return logits(model)


def test_the_rules_are_those_that_can_be_named() -> None:
    assert set(COMBINATIONS) == set(RULES)


def test_combine_gives_the_sum_here_and_in_peft(
    tmp_path: Path, pair: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "sum"
    note = printed(capsys, "combine", "--method", "cat", "--weights=0.5,-0.25", "-o", str(target), *pair)
    assert note == json.loads((target / "combined.json").read_text())
    one, other, whole = dense(pair[0]), dense(pair[1]), dense(target)
    for name, delta in one.items():
        wanted = 0.5 * delta - (0.25 * other[name] if name in other else 0)
        torch.testing.assert_close(whole[name], wanted, rtol=1e-5, atol=1e-6)
    q_proj = "model.layers.1.self_attn.q_proj"
    assert note["layers"][q_proj]["rank"] == 7 and note["layers"]["model.layers.1.self_attn.v_proj"]["rank"] == 2
    assert [source["weight"] for source in note["sources"]] == [0.5, -0.25]
    assert [source["sha256"] for source in note["sources"]] == [
        sha256_file(Path(folder) / "adapter_model.safetensors") for folder in pair
    ]
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(target))
    assert theirs.base_model.model.model.layers[1].self_attn.q_proj.scaling["default"] == 1
    torch.testing.assert_close(logits(theirs), tuned(target), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", RULES)
def test_every_rule_makes_an_adapter_that_loads(tmp_path: Path, method: str) -> None:
    folders = [str(adapter(tmp_path / name, seed, rank=3)) for seed, name in enumerate("ab")]
    rule = RULES[method]
    options = ["--density", "0.5", "--seed", "3"] if rule.drop else []
    options += ["--rank", "2"] if rule.cut else []
    for target in ("one", "two"):
        command = ["combine", "--method", method, "--weights", "1,0.5", *options, "--dtype", "bf16"]
        run(*command, "-o", str(tmp_path / target), *folders)
    assert torch.isfinite(tuned(tmp_path / "one")).all()
    files = [(tmp_path / target / "adapter_model.safetensors").read_bytes() for target in ("one", "two")]
    assert files[0] == files[1]
    assert {t.dtype for t in read_adapter(tmp_path / "one").tensors.values()} == {torch.bfloat16}


def test_what_is_trained_in_full_is_taken_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}
    one, two = adapter(tmp_path / "a", 1, **full), adapter(tmp_path / "b", 2, target_modules=["q_proj"])
    command = ["combine", "--method", "svd", "--weights", "0.5,0.5", "-o", str(tmp_path / "sum")]
    run(*command, str(one), str(two))
    assert "taken as they are, without a weight: base_model.model.lm_head.weight" in capsys.readouterr().out
    key = "base_model.model.lm_head.weight"
    assert torch.equal(read_adapter(tmp_path / "sum").tensors[key], read_adapter(one).tensors[key])
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "sum"))
    torch.testing.assert_close(logits(theirs), tuned(tmp_path / "sum"), rtol=0, atol=1e-5)
    three = adapter(tmp_path / "c", 3, **full)
    again = [*command[:-1], str(tmp_path / "again")]
    refused(["adapters", *again, str(one), str(three)], "lm_head.weight is trained in full, and not", tmp_path, capsys)
    head = adapter(tmp_path / "d", 4, target_modules=["lm_head"])
    refused(["adapters", *again, str(one), str(head)], "trains lm_head in full, where another", tmp_path, capsys)


def test_a_configuration_may_leave_out_what_has_a_default(tmp_path: Path, pair: list[str]) -> None:
    path = Path(pair[0]) / "adapter_config.json"
    fields = ("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern")
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({name: whole[name] for name in fields}))
    run("convert", pair[0], "--rank", "2", "-o", str(tmp_path / "small"))
    run("combine", "--method", "svd", "--weights", "1,1", "-o", str(tmp_path / "sum"), *pair, "--force")
    assert torch.isfinite(tuned(tmp_path / "sum")).all() and torch.isfinite(tuned(tmp_path / "small")).all()


def test_trained_biases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [adapter(tmp_path / "a", 1, "qwen2", bias="lora_only"), adapter(tmp_path / "b", 2, "qwen2")]
    command = ["combine", "--method", "cat", "--weights", "1,1", "-o"]
    run(*command, str(tmp_path / "sum"), *map(str, folders))
    model = tiny_model("qwen2")
    load_adapter(model, tmp_path / "sum")
    theirs = peft.PeftModel.from_pretrained(tiny_model("qwen2"), str(tmp_path / "sum"))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)
    few = adapter(tmp_path / "c", 3, "qwen2", bias="lora_only", target_modules=["q_proj"])
    arguments = ["adapters", *command, str(tmp_path / "no"), str(few), str(folders[1])]
    refused(arguments, "trains biases, and the other adapters have other layers", tmp_path, capsys)


def test_bases(tmp_path: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = changed_copy(trained_run, tmp_path / "run")
    there = changed_copy(trained_run, tmp_path / "copy")
    change_config(there / "adapter", base_model_name_or_path="elsewhere/the-same")
    command = ["combine", "--method", "svd", "--weights", "1,1", "-o"]
    run(*command, str(tmp_path / "runs"), str(here), str(there))  # the manifests know: the same files
    shutil.copytree(there / "adapter", tmp_path / "alone")
    alone = [str(here / "checkpoints" / "step-000003"), str(tmp_path / "alone")]
    message = (
        r"adapters of different bases: .*step-000003/adapter is of .*model, .*alone of elsewhere/the-same.*--force"
    )
    refused(["adapters", *command, str(tmp_path / "no"), *alone], message, tmp_path, capsys)
    run(*command, str(tmp_path / "forced"), *alone, "--force")
    change_manifest = json.loads((there / "manifest.json").read_text())
    change_manifest["base"]["fingerprint"] = "0" * 64
    (there / "manifest.json").write_text(json.dumps(change_manifest))
    refused(["adapters", *command, str(tmp_path / "no"), str(here), str(there)], "different bases", tmp_path, capsys)


def test_convert(tmp_path: Path, pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for index, dtype in ((0, "bf16"), (1, "fp32")):
        target = tmp_path / dtype
        result = printed(capsys, "convert", pair[index], "-o", str(target), "--dtype", dtype)
        assert set(result["lost"].values()) == {0.0}
        before, after = read_adapter(Path(pair[index])), read_adapter(target)
        assert after.config == before.config
        wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        assert all(torch.equal(after.tensors[key], tensor.to(wanted)) for key, tensor in before.tensors.items())
    small = tmp_path / "small"
    lost = printed(capsys, "convert", pair[0], "-o", str(small), "--rank", "3")["lost"]
    for name, delta in dense(small).items():
        u, s, vh = torch.linalg.svd(dense(pair[0])[name])
        torch.testing.assert_close(delta, u[:, :3] @ torch.diag(s[:3]) @ vh[:3], rtol=1e-4, atol=1e-5)
        assert lost[name] == pytest.approx((s[3:].norm() / s.norm()).item(), abs=1e-5)
    torch.testing.assert_close(
        dense(small)["model.layers.0.self_attn.v_proj"].norm(), dense(pair[0])["model.layers.0.self_attn.v_proj"].norm()
    )


@pytest.mark.parametrize("rank", [None, 8])
def test_convert_pissa(tmp_path: Path, rank: int | None) -> None:
    folder = adapter(tmp_path / "pissa", 1, method="pissa", rank=4)
    run("convert", str(folder), "-o", str(tmp_path / "lora"), *(["--rank", str(rank)] if rank else []))
    assert read_adapter(tmp_path / "lora").config["r"] == 8
    torch.testing.assert_close(tuned(tmp_path / "lora"), tuned(folder), rtol=0, atol=1e-4)


def test_list(
    tmp_path: Path,
    trained_run: Path,
    pair: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "adapter_config.json").write_text("{")
    rows = printed(capsys, "list", str(trained_run.parent), str(tmp_path))
    tiny, a, b, torn = rows
    assert (tiny["name"], tiny["method"], tiny["ranks"]) == ("tiny", "lora", [4])
    assert tiny["sha256"] == sha256_file(trained_run / "adapter" / "adapter_model.safetensors")
    model = tiny_model("llama")
    load_adapter(model, Path(pair[0]))
    count = sum(p.numel() for _, layer in adapted_layers(model) for p in layer.parameters() if p.requires_grad)
    assert (a["name"], a["ranks"], a["trained_parameters"]) == (pair[0], [2, 4], count)
    assert b["targets"] == "q_proj, up_proj" and b["base"] == "tiny" and not b["problem"]
    assert "is not JSON" in torn["problem"] and torn["trained_parameters"] is None
    run("list", str(tmp_path))
    text = capsys.readouterr().out
    assert "2–4" in text and "is not JSON" in text and b["sha256"][:12] in text


@pytest.mark.parametrize("quant", ["nf4", "none"])
def test_inspect_a_run_beside_its_base(
    tmp_path: Path, trained_run: Path, quant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = changed_copy(trained_run, tmp_path / "run", base={"quant": quant})
    tree = printed(capsys, "inspect", str(here), "--base")
    assert tree["format"] == "qlora-inspect/1" and tree["other"] is None and tree["notes"] == []
    merged = {layer.name: layer for layer in merge_adapter(load_tuned(RunFolder.open(here)))}
    for layer in tree["layers"]:
        by_merge = merged[layer["name"]]
        assert layer["norm"] == pytest.approx(by_merge.delta_norm, rel=1e-4)
        assert layer["ratio"] == pytest.approx(by_merge.ratio, rel=1e-3)
        assert 1 <= layer["effective_rank"] <= 4 and 1 <= layer["energy_rank"] <= 4 and layer["amplification"] > 0
    assert len(tree["layers"]) == len(merged)


def test_inspect_two_and_write_a_page(tmp_path: Path, pair: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    run("inspect", *pair, "-o", str(page), "--base")
    said = capsys.readouterr().out
    assert "q_proj (2)" in said and "model.layers.1.mlp.up_proj" in said and said.strip().endswith(str(page))
    assert "no weights to compare with" in said and "in one of the two adapters only" in said
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html and not re.search(r"(src|href)=", html)
    charts = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(charts) == 2 * 7 + 2 * 2
    assert all(ET.fromstring(chart) is not None for chart in charts)
    same = printed(capsys, "inspect", pair[0], pair[0])
    for layer in same["layers"]:
        assert layer["overlap"]["input"][-1][-1] == pytest.approx(1, abs=1e-3)
        assert layer["overlap"]["output_by_chance"] == pytest.approx(
            layer["rank"] / dense(pair[0])[layer["name"]].shape[0]
        )


def test_generate_with_another_adapter(tmp_path: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def say(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["generate", *arguments, "--chat", "a film by the sea", "--max-new-tokens", "12"]) == 0
        return capsys.readouterr().out

    run("convert", str(trained_run), "-o", str(tmp_path / "same"), "--dtype", "bf16")
    none = ["combine", "--method", "cat", "--weights", "0,0", "-o", str(tmp_path / "none"), str(tmp_path / "same")]
    run(*none, str(tmp_path / "same"))
    own = say(str(trained_run))
    assert say(str(trained_run), "--adapter", str(tmp_path / "same")) == own
    assert say(str(trained_run), "--adapter", str(trained_run / "checkpoints" / "step-000006")) == own
    assert say(str(trained_run), "--adapter", str(tmp_path / "none")) != own
    base = str(trained_run.parents[1] / "model")
    assert say(base, "--adapter", str(tmp_path / "none")) == say(base)
    assert say(str(trained_run), "--adapter", str(adapter(tmp_path / "pissa", 1, method="pissa"))) != own
    refused(
        ["generate", str(trained_run), "--adapter", "nowhere", "--chat", "a"], "no folder nowhere", tmp_path, capsys
    )
    bundle = tmp_path / "bundle"
    (bundle / "onnx").mkdir(parents=True)
    refused(["generate", str(bundle), "--adapter", "a"], "is a bundle: its adapter is merged", tmp_path, capsys)


@pytest.mark.parametrize("action", ["list", "combine", "convert", "attach", "inspect"])
def test_help_imports_nothing_heavy(action: str) -> None:
    code = (
        "import sys, qlora_kit.cli as cli\n"
        f"try: cli.main(['adapters', {action!r}, '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "print([name for name in ('torch', 'pydantic', 'numpy', 'rich') if name in sys.modules], file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]" and f"adapters {action}" in result.stdout


def test_an_odd_configuration_hides_no_other_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(tmp_path / "good", 1)
    odd = {
        "marks": {"peft_type": "ADALORA", "rank_pattern": {"q.lora_E": [True, False, True], "k.lora_E": [True]}},
        "pattern": {"rank_pattern": [1]},
        "rank": {"r": "four", "rank_pattern": {"q_proj": 2}},
        "ranks": {"r": [4]},
        "targets": {"target_modules": [1, 2]},
    }
    for name, fields in odd.items():
        folder = adapter(tmp_path / name, 1)
        config = json.loads((folder / "adapter_config.json").read_text()) | fields
        (folder / "adapter_config.json").write_text(json.dumps(config))
    assert main(["adapters", "list", str(tmp_path), "--json"]) == 0
    rows = {Path(row["folder"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"good", *odd} and not rows["good"]["problem"]
    assert set(rows["marks"]["ranks"]) >= {1, 2}
    for name, words in {
        "pattern": "rank_pattern: got [1], allowed names with their ranks",
        "rank": "rank: got 'four', allowed a whole number",
        "ranks": "rank: got [4], allowed a whole number",
        "targets": "target_modules: got [1, 2], allowed a name or names",
    }.items():
        assert words in rows[name]["problem"]
    assert main(["adapters", "list", str(tmp_path)]) == 0


def test_inspect_what_changed_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its delta is that to the plain base, which the converted adapter has."""
    folder = adapter(tmp_path / "pissa", 1, method="pissa")
    run("convert", str(folder), "-o", str(tmp_path / "plain"), "--dtype", "fp32")
    found, plain = (printed(capsys, "inspect", str(path)) for path in (folder, tmp_path / "plain"))
    assert len(found["layers"]) == 14
    for ours, theirs in zip(found["layers"], plain["layers"], strict=True):
        assert ours["name"] == theirs["name"] and ours["norm"] == pytest.approx(theirs["norm"], rel=1e-4)


def test_inspect_leaves_out_what_is_not_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter(tmp_path / "both", 1, target_modules=["q_proj", "embed_tokens"])
    found = printed(capsys, "inspect", str(folder))
    assert [layer["name"].rpartition(".")[2] for layer in found["layers"]] == ["q_proj", "q_proj"]
    assert any("left out, as they are no linear layers: model.embed_tokens" in note for note in found["notes"])
