"""What the command line's verbs do once their options are read."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from qlora_runtime.bundle import Bundle
from qlora_runtime.chat import Message
from qlora_runtime.errors import ArgumentError
from qlora_runtime.generate import TextStream, stream_text
from qlora_runtime.generating import GeneratingBundle, open_generating
from qlora_runtime.sampling import Sampling
from qlora_runtime.schema import Manifest, Verification
from qlora_runtime.task import task_to_json
from qlora_runtime.task_verify import TaskReport
from qlora_runtime.verify import Report


def sampling_from(options: argparse.Namespace) -> Sampling:
    """The sampling options as one value. Raises ArgumentError for values out of range."""
    return Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        stop=options.stop,
    )


def open_for_use(options: argparse.Namespace) -> GeneratingBundle:
    """The bundle, with a warning on stderr where it is not known to answer as the trained model."""
    bundle = open_generating(options.bundle, not options.no_hashes, options.threads)
    warn_unverified(bundle.manifest)
    if options.adapter is None:
        return bundle
    if not isinstance(bundle, Bundle):
        raise ArgumentError("--adapter is for bundles of decoders; this one has an encoder too.")
    return bundle.with_adapter(options.adapter)


def warn_unverified(manifest: Manifest) -> None:
    """A line on stderr where a bundle is not known to answer as the trained model."""
    if manifest.verification is None or not manifest.verification.passed:
        print(f"qlora-runtime: warning: this bundle {_state(manifest.verification)}.", file=sys.stderr)


def as_messages(system: str | None, user: str) -> list[Message]:
    """The messages of a first turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": user}]


def say(bundle: GeneratingBundle, prompt: str | Sequence[Message], sampling: Sampling) -> str:
    """Print the answer as it comes, and return it."""
    answer = stream_text(bundle, prompt, sampling)
    text = "".join(_printed(answer))
    print()
    return text


def converse(bundle: GeneratingBundle, system: str | None, sampling: Sampling) -> None:
    """Read a line, answer it, and so on until an empty line or the end of stdin."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    while line := _ask():
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": say(bundle, messages, sampling)})


def print_info(manifest: Manifest, as_json: bool) -> None:
    """The manifest, without the list of files, on stdout."""
    if as_json:
        value = manifest.to_json()
        del value["files"]
        print(json.dumps(value, indent=2, ensure_ascii=False))
        return
    model = manifest.model
    size_bytes = sum(record.bytes for record in manifest.files.values())
    facts = {
        "model": f"{model.architecture}, vocabulary {model.vocab_size}, context {model.context_length}",
        "task": "causal_lm" if manifest.task is None else _one_line(task_to_json(manifest.task)),
        "profile": manifest.profile,
        "created": manifest.created,
        "files": f"{len(manifest.files)}, {size_bytes / 2**20:.1f} MiB",
        "base": _one_line(manifest.provenance.base),
        "adapter": _one_line(manifest.provenance.adapter),
        "adapters": ", ".join(manifest.adapters) or "none to swap",
        "verification": _state(manifest.verification),
        "tools": _one_line(manifest.tools),
    }
    for name, fact in facts.items():
        print(f"{name:<13}{fact}")


def print_report(report: Report | TaskReport, as_json: bool) -> None:
    """The report on stdout."""
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
        return
    for reason in report.reasons:
        print(f"- {reason}")
    for line in report.in_words():
        print(line)
    print("PASSED" if report.passed else "FAILED")


def _ask() -> str:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _printed(pieces: TextStream) -> Iterator[str]:
    for piece in pieces:
        print(piece, end="", flush=True)
        yield piece


def _state(verification: Verification | None) -> str:
    if verification is None:
        return "has not been verified"
    return "passed verification" if verification.passed else "did not pass verification"


def _one_line(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
