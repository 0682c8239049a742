"""A combined adapter becomes a run, which is scored, asked, merged and proven like one that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapter_folders import adapter
from refusals import refused
from tiny_models import tiny_ids

from qlora_kit.cli import main
from qlora_kit.train.restore import load_tuned
from qlora_kit.train.run_folder import RunFolder


@pytest.fixture
def halved(tmp_path: Path, trained_run: Path) -> Path:
    """The run's adapter at half of its weight, by itself."""
    folder = tmp_path / "halved"
    assert main(["adapters", "combine", str(trained_run), "--method", "cat", "--weights=0.5", "-o", str(folder)]) == 0
    return folder


def test_every_verb_takes_an_attached_adapter(
    tmp_path: Path, trained_run: Path, halved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    assert main(["adapters", "attach", str(halved), str(trained_run), "-o", str(made), "--json"]) == 0
    run = RunFolder.open(made)
    assert run.manifest()["attached"]["run"] == str(trained_run) and run.recipe().run.name == "made"
    with torch.no_grad():
        ours = load_tuned(run)(tiny_ids()).logits
        assert torch.equal(ours, load_tuned(RunFolder.open(trained_run), adapter=halved)(tiny_ids()).logits)
        assert not torch.equal(ours, load_tuned(RunFolder.open(trained_run))(tiny_ids()).logits)
    assert main(["eval", str(made), "--forms", "tuned"]) == 0
    assert main(["export", str(made), "--profiles", "fp32"]) == 0
    proof = json.loads((made / "bundles/fp32/manifest.json").read_text())
    assert (
        proof["verification"]["passed"]
        and proof["provenance"]["adapter"]["sha256"] == run.manifest()["adapter"]["sha256"]
    )
    assert main(["train", "--resume", str(made), "--quiet"]) == 0  # finished: nothing is left to do
    assert main(["generate", str(made), "--chat", "a", "--max-new-tokens", "2"]) == 0


def test_what_cannot_be_attached(
    tmp_path: Path, trained_run: Path, halved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made"
    command = ["adapters", "attach", str(halved), str(trained_run), "-o", str(target)]
    refused([*command[:-1], str(halved)], "is there already", tmp_path, capsys)
    config = json.loads((halved / "adapter_config.json").read_text())
    (halved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "another"}))
    refused(command, "adapters of different bases", tmp_path, capsys)
    assert main([*command, "--force"]) == 0
    unfinished = Path(shutil.copytree(trained_run, tmp_path / "unfinished"))
    manifest = json.loads((unfinished / "manifest.json").read_text())
    del manifest["adapter"]
    (unfinished / "manifest.json").write_text(json.dumps(manifest))
    refused(["adapters", "attach", str(halved), str(unfinished), "-o", "new"], "is not finished", tmp_path, capsys)
    other = adapter(tmp_path / "other", 1)
    refused(["adapters", "attach", str(other), str(tmp_path), "-o", "new"], "is no run folder", tmp_path, capsys)
