"""The options of `qlora-kit adapters`. Imports nothing heavy."""

from __future__ import annotations

import argparse

COMBINATIONS = (
    "cat",
    "svd",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
)
"""Names of the rules in adapters/combine.py."""
METHODS = (
    "cat: the weighted sum, exact, ranks add up; svd: the same cut to a rank; RULE_svd: TIES, DARE or pruning on whole "
    "deltas, cut to a rank; linear, ties, dare_linear, dare_ties, magnitude_prune: the rule on A and B apart, as PEFT "
    "does it, which is not the sum of the deltas"
)


def add_adapter_actions(parser: argparse.ArgumentParser) -> None:
    """Adds the actions, each with its options, to the parser of the verb."""
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    found = _action(actions, "list", "a table of adapters")
    found.add_argument("folders", nargs="*", help="folders of runs, runs or adapter folders (default: runs)")
    _combine(_action(actions, "combine", "make one LoRA adapter of several"))
    convert = _action(actions, "convert", "write an adapter as ordinary LoRA, in another dtype or of a smaller rank")
    convert.add_argument("folder", help="a run or an adapter's folder")
    _add_target(convert)
    convert.add_argument("--dtype", choices=["bf16", "fp32"], help="of the new weights (default: as they are)")
    convert.add_argument("--rank", type=int, help="cut to this rank by singular values")
    beside = _action(actions, "attach", "put an adapter beside a run's base and data: a run that every verb takes")
    beside.add_argument("folder", help="a run or an adapter's folder")
    beside.add_argument("run", help="a finished run of the same base")
    _add_target(beside)
    beside.add_argument("--force", action="store_true", help="although the adapter names another base")
    look = _action(actions, "inspect", "norms, singular values and ranks of an adapter; overlap with another")
    look.add_argument("folder", help="a run or an adapter's folder")
    look.add_argument("other", nargs="?", help="another one, to compare with")
    look.add_argument("--base", action="store_true", help="load the base too, and compare with its weights")
    look.add_argument("-o", dest="output", metavar="PAGE.html", help="write a page with plots")


def _combine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", help="runs or adapter folders, all of one base")
    _add_target(parser)
    parser.add_argument("--method", choices=COMBINATIONS, required=True, help=METHODS)
    parser.add_argument(
        "--weights",
        type=_numbers,
        required=True,
        metavar="W,W",
        help="one for each adapter; a negative one subtracts: --weights=-0.5,1",
    )
    parser.add_argument("--rank", type=int, help="of svd and RULE_svd (default: each layer's largest)")
    parser.add_argument("--density", type=float, help="share of values that TIES, DARE and pruning keep")
    parser.add_argument("--seed", type=int, default=0, help="of what DARE drops (default 0)")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the new weights (default fp32)")
    parser.add_argument("--force", action="store_true", help="although the adapters name different bases")


def _action(actions: argparse._SubParsersAction, name: str, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=about, description=about)
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", dest="output", metavar="FOLDER", required=True, help="the new folder")


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


_numbers.__name__ = "numbers"  # argparse names it where the text is none
