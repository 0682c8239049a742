"""The command line's verbs and their options. Imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from qlora_kit import __version__
from qlora_kit.options_adapters import add_adapter_actions


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The verb and its options; overrides of a recipe may stand after options too, which argparse alone refuses."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (any(text.startswith("-") for text in rest) or not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser; `verb` of what it returns is the verb's name."""
    parser = argparse.ArgumentParser(
        prog="qlora-kit", description="Fine-tune a quantized language model on hardware you own; ship it to a CPU."
    )
    parser.add_argument("--version", action="version", version=f"qlora-kit {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    doctor = _verb(verbs, "doctor", "what this machine has, and what that allows")
    doctor.add_argument("--json", action="store_true", help="for programs")
    _plan(_verb(verbs, "plan", "how much memory a recipe takes; loads no weights"))
    _data(_verb(verbs, "data", "look at the rows a recipe trains on"))
    _train(_verb(verbs, "train", "fine-tune; makes a run folder"))
    _eval(_verb(verbs, "eval", "score base, tuned, merged and bundles on the same held-out rows"))
    _predict(_verb(verbs, "predict", "answer every row of a file"))
    _compare(_verb(verbs, "compare", "set evaluated runs side by side"))
    _export(_verb(verbs, "export", "merge, write ONNX bundles, and prove them"))
    _generate(_verb(verbs, "generate", "let a run, a bundle or a base model answer"))
    _add_run(_verb(verbs, "report", "write a run's report.html again"))
    _quantize(_verb(verbs, "quantize", "store a quantized base model, so that loading it takes seconds"))
    _cache(_verb(verbs, "cache", "list or clear the converted and quantized models that are kept"))
    add_adapter_actions(_verb(verbs, "adapters", "list, combine, convert or inspect adapters"))
    return parser


def _plan(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="where it would train (default: what is here)")
    parser.add_argument("--budget", type=_size, metavar="SIZE", help="find the fastest variant that fits, e.g. 8GiB")
    parser.add_argument("--output", metavar="FILE", help="write the recipe that was planned")
    parser.add_argument("--measure", action="store_true", help="time a matrix product here, for an estimate of speed")
    parser.add_argument("--json", action="store_true", help="for programs")


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["show"])
    _add_recipe(parser)
    parser.add_argument("-n", "--rows", type=_number(int, 0), default=3, help="rows to print (default 3)")


def _train(parser: argparse.ArgumentParser) -> None:
    _add_recipe(parser, nargs="?")
    parser.add_argument("--resume", metavar="RUN", help="go on with this run folder from its newest whole checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="start again where the run folder exists")
    parser.add_argument("--anyway", action="store_true", help="also where the plan says that memory does not suffice")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quiet", dest="mode", action="store_const", const="quiet", help="say nothing but errors")
    mode.add_argument("--json", dest="mode", action="store_const", const="json", help="JSON lines on standard output")
    parser.set_defaults(mode="rich")


def _eval(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--forms", metavar="A,B", type=_names, help="only these forms, e.g. base,tuned,bundle_int8")
    parser.add_argument("--rows", type=_number(int, 1), help="at most this many held-out rows")
    parser.add_argument("--tasks", metavar="A,B", type=_names, help="lm-eval's benchmarks instead, e.g. mmlu,gsm8k")
    parser.add_argument("--task-data", metavar="FOLDER", help="their rows from files in this folder, not from the hub")
    parser.add_argument("--limit", type=_number(int, 1), help="the first so many rows of each task")
    parser.add_argument("--few-shot", type=_number(int, 0), help="examples in the prompt (default: the task's number)")
    code = parser.add_argument_group("pass@k of --tasks humaneval")
    code.add_argument("--samples", type=_number(int, 1), help="programs drawn for each problem: n (default 1)")
    code.add_argument("--pass-at", metavar="K,K", type=_numbers, help="k of pass@k, each at most n (default 1)")
    code.add_argument("--temperature", type=_number(float, 0), help="of the draws (default 0: the likeliest, n = 1)")
    code.add_argument("--seed", type=_number(int, 0), help="of the draws (default 0): same seed, same programs")
    code.add_argument("--time-limit", metavar="S", type=_number(float, 0.1), help="seconds of a program (default 10)")
    code.add_argument("--memory-limit", metavar="MIB", type=_number(int, 64), help="MiB of a program (default 512)")


def _predict(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--input", required=True, metavar="FILE", help="rows to answer; they need no label")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help=".csv or .jsonl; goes on with an unfinished one"
    )
    parser.add_argument("--form", default="tuned", help="base, tuned (default), merged, bundle_int8, ...")
    parser.add_argument("--batch-size", type=_number(int, 1), help="rows of one forward pass (default: the recipe's)")
    parser.add_argument("--bad-rows", choices=["error", "skip"], default="error", help="stop at one, or count it")
    words = "of rows longer than the recipe's data.max_seq_len: stop, leave out, or cut"
    parser.add_argument("--overlong", choices=["error", "skip", "truncate"], help=words)
    words = "where the input calls a column otherwise than the recipe, e.g. text=review (again and again)"
    parser.add_argument("--column", metavar="EXPECTED=ACTUAL", action="append", type=_renaming, default=[], help=words)
    parser.add_argument("--overwrite", action="store_true", help="begin again where the output exists")


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; the others are compared with the first")
    parser.add_argument("--json", action="store_true", help="for programs")


def _export(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument("--profiles", metavar="A,B", type=_names, help="instead of the recipe's, e.g. fp32,int8")
    parser.add_argument("--onto", choices=("dequantized", "original", "requantized"), help="instead of the recipe's")
    words = "one bundle of the run's base with its adapter and these beside it, swapped at run time"
    parser.add_argument("--adapters", metavar="[NAME=]RUN,...", type=_names, help=words)


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a run folder, a bundle folder or a base model")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="text to continue as it stands")
    what.add_argument("--chat", nargs="?", const="", help="one user turn; without text a conversation")
    parser.add_argument("--system", help="system turn of a chat")
    words = "use this adapter on the run's base, or on the base model; given more than once, all answer in turn"
    parser.add_argument("--adapter", metavar="[NAME=]FOLDER", action="append", default=[], help=words)
    parser.add_argument("--unverified", action="store_true", help="also a bundle that did not pass verification")
    parser.add_argument("--max-new-tokens", type=_number(int, 1), default=256, help="default 256")
    parser.add_argument(
        "--temperature", type=_number(float, 0), default=0.0, help="0 (default) always takes the likeliest token"
    )
    parser.add_argument("--top-k", type=_number(int, 0), default=0, help="0 (default) keeps all tokens")
    parser.add_argument("--top-p", type=_number(float, 0.001, 1), default=1.0, help="1 (default) keeps all tokens")
    parser.add_argument("--seed", type=_number(int, 0, 2**31), default=0, help="the same seed draws the same answer")


def _quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a hub id, a folder or a .gguf file")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="new folder, for base.model of a recipe")
    parser.add_argument("--quant", choices=["nf4", "fp4", "int8"], default="nf4", help="default nf4")
    parser.add_argument("--head-quant", choices=["none", "int8", "nf4"], default="none", help="base.head_quant")
    parser.add_argument("--no-double-quant", action="store_true", help="leave the 4-bit statistics in fp32")
    parser.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="base.compute_dtype")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def _cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["list", "clear"])
    parser.add_argument("names", nargs="*", metavar="NAME", help="folders to clear, as listed (default: all)")


def _verb(verbs: Any, name: str, about: str) -> argparse.ArgumentParser:
    """`verbs` is what add_subparsers gave; its type has no public name."""
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=about, description=about)
    parser.set_defaults(verb=name)
    return parser


def _add_recipe(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("recipe", nargs=nargs, help="a .yaml file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="run folder (default: the last run in runs/)")


def _number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    """Reads a finite number from `low` to `high`."""

    def read(text: str) -> float:
        value: float = kind(text)
        if not low <= value <= high or value == float("inf"):
            limit = f"at least {low}" if high == float("inf") else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; allowed: {limit}")
        return value

    read.__name__ = kind.__name__  # argparse names it where `kind` refuses the text
    return read


def _size(text: str) -> str:
    from qlora_kit.section import is_size

    if not is_size(text):
        raise argparse.ArgumentTypeError(f"{text} is no size; write for example 8GiB or 600MiB")
    return text


def _numbers(text: str) -> list[int]:
    """Whole numbers from 1 on, each once, ascending."""
    read = _number(int, 1)
    try:
        return sorted({int(read(name)) for name in _names(text)})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no whole numbers; give for example 1,10") from None


def _renaming(text: str) -> tuple[str, str]:
    expected, sign, actual = text.partition("=")
    if not (expected and sign and actual):
        raise argparse.ArgumentTypeError(f"expected EXPECTED=ACTUAL, such as text=review, got {text!r}")
    return expected, actual


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("names none; give at least one, separated by commas")
    return list(dict.fromkeys(names))
