"""Do a bundle's runtimes say the same? Greedy answers of plain onnxruntime, onnxruntime-genai and transformers.js.

    python scripts/check_runtimes.py BUNDLE [BUNDLE ...] [--tokens 48] [--node export/examples/node]

Plain onnxruntime is qlora-runtime's session. --node is a folder with generate.mjs and its node_modules; without one
transformers.js is left out. Writes benchmarks/runtimes.json and .md, which keep what they hold of other profiles.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from bench_runs import RESULTS, hardware_line, this_machine, write
from by_genai import greedy_by_genai
from qlora_runtime import Bundle, Sampling
from qlora_runtime.generate import generate

PROMPTS = (
    "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many did she sell in all?",
    "What is a lighthouse for? Explain in two sentences.",
    "Is this review positive or negative? The film is a delight from start to end.",
)
PEERS = ("onnxruntime-genai", "transformers.js")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--node", type=Path, help="folder with generate.mjs and node_modules")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results are written")
    options = parser.parse_args()
    file = options.out / "runtimes.json"
    found = json.loads(file.read_text(encoding="utf-8"))["profiles"] if file.is_file() else {}
    for folder in options.bundles:
        found[folder.name] = _compare(folder, options)
    _report(options, found)


def _compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """How many tokens were compared, and of how many prompts each peer says the same."""
    bundle, same = Bundle.open(folder, threads=1), dict.fromkeys(PEERS, 0)
    tokens = 0
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ours = generate(bundle, chat, Sampling(max_new_tokens=options.tokens))
        tokens += len(ours.token_ids)
        same["onnxruntime-genai"] += (
            greedy_by_genai(folder, bundle.encode_prompt(chat), options.tokens) == ours.token_ids
        )
        if options.node:
            same["transformers.js"] += _node(options.node, folder, prompt, options.tokens) == ours.text.strip()
    counts: dict[str, int | None] = {**same} if options.node else {**same, "transformers.js": None}
    return {"model": bundle.manifest.provenance.base.get("model"), "tokens": tokens, "same": counts}


def _node(node: Path, folder: Path, prompt: str, tokens: int) -> str:
    command = [shutil.which("node") or "node", str(node / "generate.mjs"), str(folder), prompt, str(tokens)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _report(options: argparse.Namespace, found: dict[str, Any]) -> None:
    def words(count: int | None) -> str:
        return "not tested" if count is None else f"{count} of {len(PROMPTS)}"

    rows = [
        f"| {profile} | {one['tokens']} | " + " | ".join(words(one["same"][peer]) for peer in PEERS) + " |"
        for profile, one in sorted(found.items())
    ]
    env = this_machine()
    table = (
        "# The same greedy text from every runtime\n\n"
        f"Answers to {len(PROMPTS)} chats, up to {options.tokens} tokens each, that are plain onnxruntime's.\n\n"
        f"| profile | tokens | {' | '.join(PEERS)} |\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"`python scripts/check_runtimes.py BUNDLE ... --node PATH` on {hardware_line(env)}"
    )
    write("runtimes", {"profiles": found, **env}, table, options.out)


if __name__ == "__main__":
    main()
