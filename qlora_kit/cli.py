"""The command line: one function a verb, each importing what it needs, so that `--help` stays fast."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_kit import __version__
from qlora_kit.errors import QloraKitError, RunError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns 0, or 2 wrong input, 3 a bundle past its tolerance, 4 training failed, 130 Ctrl-C."""
    options = build_parser().parse_args(arguments)
    try:
        verb: Callable[[argparse.Namespace], int | None] = options.verb
        return verb(options) or 0
    except QloraKitError as error:
        _say_error(error, getattr(options, "json", False))
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora-kit", description="Fine-tune a quantized language model on hardware you own; ship it to a CPU."
    )
    parser.add_argument("--version", action="version", version=f"qlora-kit {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    doctor = _verb(verbs, "doctor", run_doctor, "what this machine has, and what that allows")
    doctor.add_argument("--json", action="store_true", help="for programs")

    plan = _verb(verbs, "plan", run_plan, "how much memory a recipe takes; loads no weights")
    _add_recipe(plan)
    plan.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="where it would train (default cuda)")
    plan.add_argument("--json", action="store_true", help="for programs")

    data = _verb(verbs, "data", run_data_show, "look at the rows a recipe trains on")
    data.add_argument("action", choices=["show"])
    _add_recipe(data)
    data.add_argument("-n", "--rows", type=int, default=3, help="rows to print (default 3)")

    train = _verb(verbs, "train", run_train, "fine-tune; makes a run folder")
    train.add_argument("recipe", nargs="?", help="a .yaml file or the name of a shipped recipe")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")
    train.add_argument("--resume", metavar="RUN", help="go on with this run folder from its newest whole checkpoint")
    train.add_argument("--overwrite", action="store_true", help="start again where the run folder exists")
    _add_mode(train)

    evaluate = _verb(verbs, "eval", run_eval, "score base, tuned, merged and bundles on the same held-out rows")
    _add_run(evaluate)
    evaluate.add_argument("--forms", metavar="A,B", help="only these forms, e.g. base,tuned,bundle_int8")
    evaluate.add_argument("--rows", type=int, help="only the first rows")

    export = _verb(verbs, "export", run_export, "merge, write ONNX bundles, and prove them")
    _add_run(export)
    export.add_argument("--profiles", metavar="A,B", help="instead of the recipe's, e.g. fp32,int8")

    generate = _verb(verbs, "generate", run_generate, "let a run, a bundle or a base model answer")
    generate.add_argument("model", help="a run folder, a bundle folder or a base model")
    what = generate.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="text to continue as it stands")
    what.add_argument("--chat", nargs="?", const="", help="one user turn; without text a conversation")
    generate.add_argument("--system", help="system turn of a chat")
    generate.add_argument("--max-new-tokens", type=int, default=256)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default) always takes the likeliest token")
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)

    report = _verb(verbs, "report", run_report, "write a run's report.html again")
    _add_run(report)
    return parser


def run_doctor(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qlora_kit.doctor import diagnose, print_diagnosis

    diagnosis = diagnose()
    if options.json:
        print(json.dumps(diagnosis.to_json(), indent=2))
    else:
        print_diagnosis(diagnosis, Console())


def run_plan(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qlora_kit.plan import find_config, plan, print_plan
    from qlora_kit.recipe_file import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    result = plan(recipe, find_config(recipe.base), device=options.device)
    if options.json:
        print(json.dumps(result.to_json(), indent=2))
    else:
        print_plan(result, Console())


def run_data_show(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qlora_kit.data.show import show
    from qlora_kit.model.load import load_tokenizer
    from qlora_kit.model.source import find_base
    from qlora_kit.recipe_file import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    source = find_base(recipe.base.model, recipe.base.revision, recipe.base.trust_remote_code)
    show(recipe.data, load_tokenizer(source.folder), options.rows, Console())


def run_train(options: argparse.Namespace) -> None:
    from qlora_kit.recipe_file import load_recipe
    from qlora_kit.train.run_folder import RunFolder

    if options.resume:
        run = RunFolder.open(options.resume)
        overrides = [text for text in (options.recipe, *options.overrides) if text]
        recipe = load_recipe(str(run.recipe_file), overrides)
        run.check_same_recipe(recipe)
    elif options.recipe:
        recipe = load_recipe(options.recipe, options.overrides)
        run = RunFolder.create(recipe, options.overwrite)
    else:
        raise RunError("train needs a recipe, or --resume RUN", fix="See qlora-kit train --help")
    from qlora_kit.train.loop import train
    from qlora_kit.train.progress import make_progress

    train(recipe, run, make_progress(options.mode), resume=bool(options.resume), overwrite=options.overwrite)
    from qlora_kit.report import write_report

    write_report(run.path)


def run_eval(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qlora_kit.eval.run import evaluate_run
    from qlora_kit.report import write_report
    from qlora_kit.train.run_folder import RunFolder

    run = RunFolder.open(options.run or last_run())
    evaluate_run(run, Console(), _names(options.forms), options.rows)
    write_report(run.path)


def run_export(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qlora_kit.export.run import export_run
    from qlora_kit.train.run_folder import RunFolder

    export_run(RunFolder.open(options.run or last_run()), Console(stderr=True), _names(options.profiles))


def run_generate(options: argparse.Namespace) -> int:
    if (Path(options.model) / "genai_config.json").is_file():
        return _generate_from_bundle(options)
    from qlora_kit.generate import generate_command

    generate_command(
        options.model,
        prompt=options.prompt,
        chat=options.chat,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    return 0


def run_report(options: argparse.Namespace) -> None:
    from qlora_kit.report import write_report
    from qlora_kit.train.run_folder import RunFolder

    print(write_report(RunFolder.open(options.run or last_run()).path))


def last_run(out_dir: str = "runs") -> Path:
    """The run folder below `out_dir` whose manifest changed last.

    Raises:
        RunError: there is none.
    """
    manifests = sorted(Path(out_dir).glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        raise RunError(f"no run in {out_dir}/", fix="Give a run folder, or train first")
    return manifests[-1].parent


def _generate_from_bundle(options: argparse.Namespace) -> int:
    from qlora_runtime.cli import main as runtime

    verb = "chat" if options.chat == "" or (options.chat is None and options.prompt is None) else "generate"
    arguments = [verb, options.model]
    if verb == "generate":
        arguments += ["--chat", options.chat] if options.chat else ["--prompt", options.prompt]
    if options.system is not None:
        arguments += ["--system", options.system]
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return runtime(arguments)


def _verb(verbs: argparse._SubParsersAction, name: str, run: Callable, about: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=about, description=about)
    parser.set_defaults(verb=run)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a .yaml file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the recipe")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="run folder (default: the last run in runs/)")


def _add_mode(parser: argparse.ArgumentParser) -> None:
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quiet", dest="mode", action="store_const", const="quiet", help="say nothing but errors")
    mode.add_argument("--json", dest="mode", action="store_const", const="json", help="JSON lines on standard output")
    parser.set_defaults(mode="rich")


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


def _say_error(error: QloraKitError, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"kind": "error", "error": type(error).__name__, "message": str(error)}))
    print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
