"""The command line: qlora-runtime VERB BUNDLE.

Exit codes: 0 well; 1 the bundle did not pass verification; 2 an error, told in one line on stderr.
onnxruntime is loaded inside the verbs, so that --help answers at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_runtime.errors import BundleError

Verb = Callable[[argparse.Namespace], int]

PASSED, FAILED, ERROR, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        code = int(options.verb(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output has left, as `head` does, with some of it unsaid
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except (BundleError, OSError) as error:
        line = " ".join(str(error).split())
        print(f"qlora-runtime: {type(error).__name__}: {line}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    parser = argparse.ArgumentParser(
        prog="qlora-runtime", description="Check and run an ONNX bundle on a CPU."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    info = _verb(verbs, "info", run_info, "say what the bundle is; loads no model")
    info.add_argument("--json", action="store_true", help="print the manifest's facts as JSON")

    verify = _verb(verbs, "verify", run_verify, "check files and answers against the trained model's")
    verify.add_argument("--json", action="store_true", help="print the report as JSON")
    verify.add_argument("--threads", type=int, help="CPU threads (default: onnxruntime's choice)")

    generate = _verb(verbs, "generate", run_generate, "answer one prompt, or a file of them")
    source = generate.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="a plain text to continue")
    source.add_argument("--chat", metavar="TEXT", help="what the user says, put into the chat template")
    source.add_argument(
        "--file", type=Path, metavar="JSONL", help='one {"prompt": TEXT} or {"messages": [...]} per line'
    )
    generate.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    generate.add_argument("-o", "--output", type=Path, metavar="JSONL", help="with --file: where answers go")
    _add_sampling(generate)

    chat = _verb(verbs, "chat", run_chat, "talk with the model; an empty line or Ctrl-D ends")
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    _add_sampling(chat)

    _add_serve(verbs)

    _add_task_verb(verbs, "classify", "give texts their labels", "text", "pair")
    _add_task_verb(verbs, "rate", "give texts their numbers", "text", "pair")
    _add_task_verb(verbs, "tag", "tag the words of sentences, and join them to spans", "text")
    _add_task_verb(verbs, "answer", "find the answers to questions in their contexts", "question", "context")
    return parser


def run_info(options: argparse.Namespace) -> int:
    """What the manifest says, and whether the files are there in the sizes it says."""
    from qlora_runtime.console import print_info
    from qlora_runtime.manifest import check_files

    print_info(check_files(options.bundle, hashes=False), as_json=options.json)
    return PASSED


def run_verify(options: argparse.Namespace) -> int:
    """Exit code 0 where the bundle answers as the trained model did, else 1 with the reasons."""
    from qlora_runtime.console import print_report
    from qlora_runtime.verify import verify_directory

    report = verify_directory(options.bundle, threads=options.threads)
    print_report(report, as_json=options.json)
    return PASSED if report.passed else FAILED


def run_generate(options: argparse.Namespace) -> int:
    """One answer to stdout as it comes, or a file of answers."""
    from qlora_runtime.batch import answer_file
    from qlora_runtime.console import as_messages, open_for_use, sampling_from, say
    from qlora_runtime.errors import ArgumentError

    if (options.file is None) != (options.output is None):
        raise ArgumentError("--file and -o go together: prompts come from the one, answers go to the other.")
    if options.system is not None and options.chat is None:
        raise ArgumentError("--system goes with --chat. In --file, put a system message into the messages.")
    sampling = sampling_from(options)
    bundle = open_for_use(options)
    if options.file is not None:
        if done := answer_file(bundle, options.file, options.output, sampling):
            print(f"qlora-runtime: {done} rows were answered before.", file=sys.stderr)
    else:
        chat = as_messages(options.system, options.chat) if options.chat is not None else None
        say(bundle, chat or options.prompt, sampling)
    return PASSED


def run_chat(options: argparse.Namespace) -> int:
    """Turns of a chat, from stdin to stdout."""
    from qlora_runtime.console import converse, open_for_use, sampling_from

    sampling = sampling_from(options)
    converse(open_for_use(options), options.system, sampling)
    return PASSED


def run_serve(options: argparse.Namespace) -> int:
    """An OpenAI-compatible HTTP endpoint, until SIGTERM or Ctrl-C."""
    from qlora_runtime.server.run import serve

    serve(options)
    return PASSED


def _add_serve(verbs: Any) -> None:
    parser = _verb(verbs, "serve", run_serve, "answer over HTTP, as OpenAI's API does, with a chat page")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument("--name", help="the model's id (default: the bundle's folder)")
    parser.add_argument(
        "--api-key", metavar="KEY", help="what clients must send; QLORA_RUNTIME_API_KEY shows it to nobody"
    )
    parser.add_argument("--without-key", action="store_true", help="let other machines ask without a key")
    limits = {  # option: its default and what it bounds; server/limits.py checks them
        "--max-body-bytes": (1 << 20, "of a request"),
        "--max-tokens": (1024, "of an answer"),
        "--workers": (1, "answers worked on at once"),
        "--queue": (16, "requests that may wait; more get 429"),
        "--timeout-s": (300, "for one request, waiting included"),
        "--body-timeout-s": (20, "for a request's body to come in"),
        "--max-connections": (256, "open at once; more get 503"),
        "--grace-s": (30, "for what is begun when the server is told to end"),
    }
    for option, (default, about) in limits.items():
        parser.add_argument(
            option, type=int, default=default, metavar="N", help=f"{about} (default {default})"
        )
    parser.add_argument("--threads", type=int, help="CPU threads (default: onnxruntime's choice)")
    parser.add_argument("--no-hashes", action="store_true", help="compare file sizes only when opening")


def _add_task_verb(verbs: Any, name: str, about: str, *fields: str) -> None:
    """A verb that asks about one text, given by the options `fields`, or about a file of rows."""

    def run(options: argparse.Namespace) -> int:
        from qlora_runtime.errors import ArgumentError
        from qlora_runtime.task_console import run_task_verb

        given = [field for field in fields if getattr(options, field) is not None]
        if (options.input is None) == (not given):
            raise ArgumentError(f"give either --input, or {' and '.join(f'--{field}' for field in fields)}.")
        run_task_verb(options, name)
        return PASSED

    parser = _verb(verbs, name, run, about)
    for field in fields:
        parser.add_argument(f"--{field}", metavar="TEXT")
    parser.add_argument("--input", type=Path, metavar="FILE", help="rows, .csv, .tsv or .jsonl")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help=".csv, .tsv or .jsonl (default: lines to stdout)"
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="where --input has a field; repeatable",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows at once (default 16)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: onnxruntime's choice)")
    parser.add_argument("--no-hashes", action="store_true", help="compare file sizes only when opening")


def _verb(verbs: Any, name: str, run: Verb, about: str) -> argparse.ArgumentParser:
    """A subcommand that takes a bundle. `verbs` is what add_subparsers gave; its type has no public name."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}."
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.set_defaults(verb=run)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", metavar="NAME", help="of a bundle with several (see info): put it beside the base"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default 256")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all tokens (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1 keeps all tokens (default)")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0 keeps all tokens (default)")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is none (default)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="the same seed draws the same answer")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: onnxruntime's choice)")
    parser.add_argument("--no-hashes", action="store_true", help="compare file sizes only when opening")


if __name__ == "__main__":
    sys.exit(main())
