"""The real model: ten kills at random moments, evaluations and checkpoint writes included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason="`make demo-data` fetches the model")
def test_smollm2_killed_ten_times_ends_in_the_same_bytes(tmp_path: Path) -> None:
    short = [
        "train.max_steps=24",
        "train.micro_batch_size=4",
        "train.eval_every=6",
        "train.eval_batches=3",
        "train.save_every=4",
        "train.warmup_steps=2",
        "eval.batch_size=8",
        "eval.samples=0",
    ]
    command = [sys.executable, str(ROOT / "scripts" / "check_resume.py"), "smollm2-sentiment", *short]
    done = subprocess.run(
        [*command, "--kills", "10", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path)],
        cwd=ROOT,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0
    found = json.loads((tmp_path / "resume_identity.json").read_text())
    assert found["identical"] and len(found["kills"]) == 10
    assert {kill["kind"] for kill in found["kills"]} == {"step", "checkpoint", "evaluation"}
