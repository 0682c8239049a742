"""Runs the benchmarks whose data are at hand, one after the other: the demo with its record, adapter storage, NF4."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent
GSM8K = Path("data/gsm8k")


def main() -> None:
    commands = [["demo.py", "--record"], ["bench_precision.py"], ["check_resume.py"]]
    if (GSM8K / "train.jsonl").exists():
        commands.append(["bench_nf4.py", "--data", str(GSM8K)])
    else:
        print(f"bench_nf4.py is left out: put GSM8K's train.jsonl and test.jsonl into {GSM8K}/", file=sys.stderr)
    for script, *arguments in commands:
        subprocess.run([sys.executable, str(SCRIPTS / script), *arguments], check=True)


if __name__ == "__main__":
    main()
