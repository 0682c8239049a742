"""The command line: one function a verb, each importing what it needs, so that `--help` stays fast."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_kit.errors import QloraKitError, RunError
from qlora_kit.options import parse_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns 0, or 2 wrong input, 3 a bundle past its tolerance, 4 training failed, 130 Ctrl-C."""
    options = parse_options(arguments)
    try:
        code = VERBS[options.verb](options) or 0
        sys.stdout.flush()
        return code
    except QloraKitError as error:
        return _say_error(error, options)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        fix = "Check that the file is there, the permissions and the free space"
        return _say_error(QloraKitError(f"{what}{error.strerror or error}", fix=fix), options)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def run_doctor(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qlora_kit.doctor import diagnose, print_diagnosis

    diagnosis = diagnose()
    if options.json:
        print(json.dumps(diagnosis.to_json(), indent=2))
    else:
        print_diagnosis(diagnosis, Console())


def run_plan(options: argparse.Namespace) -> None:
    from qlora_kit.plan.command import plan_command

    plan_command(options)


def run_data(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qlora_kit.recipe_file import load_recipe
    from qlora_kit.train.show_rows import show_rows

    show_rows(load_recipe(options.recipe, options.overrides), options.rows, Console())


def run_train(options: argparse.Namespace) -> None:
    from qlora_kit.recipe_file import load_recipe
    from qlora_kit.train.run_folder import RunFolder

    if options.resume and options.overwrite:
        raise RunError("--resume goes on with a run, --overwrite starts it again", fix="Give one of them")
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
    from qlora_kit.train.planned import planned, refuse_what_cannot_fit
    from qlora_kit.train.progress import make_progress

    progress, plan = make_progress(options.mode), planned(recipe)
    if not options.anyway:
        refuse_what_cannot_fit(recipe, plan)
    train(recipe, run, progress, bool(options.resume), plan.total_bytes if plan else None)
    from accelerate import PartialState

    from qlora_kit.report import write_report

    if PartialState().is_main_process:
        write_report(run.path)


def run_eval(options: argparse.Namespace) -> None:
    from qlora_kit.eval.harness.command import eval_command
    from qlora_kit.report import write_report

    write_report(eval_command(options, options.run or last_run()))


def run_compare(options: argparse.Namespace) -> None:
    from qlora_kit.eval.compare import compare_command

    compare_command(options)


def run_predict(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qlora_kit.eval.predict import predict
    from qlora_kit.train.run_folder import RunFolder

    predict(
        RunFolder.open(options.run or last_run()),
        options.input,
        Path(options.output),
        Console(stderr=True),
        columns=dict(options.column),
        **{name: getattr(options, name) for name in ("form", "batch_size", "bad_rows", "overlong", "overwrite")},
    )


def run_export(options: argparse.Namespace) -> None:
    from rich.console import Console

    from qlora_kit.adapter_tools.sources import named_sources
    from qlora_kit.export.run import EXPORT_TOOLS, export_run
    from qlora_kit.export.swapped_bundle import export_swapped
    from qlora_kit.train.records import tool_versions
    from qlora_kit.train.run_folder import RunFolder

    run, console = RunFolder.open(options.run or last_run()), Console(stderr=True)
    if options.adapters:
        if options.profiles or options.onto:
            raise QloraKitError("--adapters makes a bundle of its own: leave --profiles and --onto out")
        folders = {name: source.folder for name, source in named_sources([run.path, *options.adapters]).items()}
        export_swapped(run, folders, tool_versions(EXPORT_TOOLS), console)
        return
    export_run(run, console, options.profiles, options.onto)


def run_generate(options: argparse.Namespace) -> int:
    if options.system is not None and options.prompt is not None:
        raise QloraKitError("--system goes with --chat, not with --prompt", fix="Put it into the prompt")
    folder = Path(options.model)
    if (folder / "genai_config.json").is_file() or (folder / "onnx").is_dir():
        if options.adapter:
            raise QloraKitError(f"{folder} is a bundle: its adapter is merged", fix="Give a run or a base model")
        if not options.unverified:
            _refuse_unverified(folder)
        return _generate_from_bundle(options)
    from qlora_kit.generate import generate_command

    names = ("prompt", "chat", "system", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "adapter")
    generate_command(options.model, **{name: getattr(options, name) for name in names})
    return 0


def run_report(options: argparse.Namespace) -> None:
    from qlora_kit.report import write_report
    from qlora_kit.train.run_folder import RunFolder

    print(write_report(RunFolder.open(options.run or last_run()).path))


def run_adapter_action(options: argparse.Namespace) -> None:
    from qlora_kit.adapter_tools.commands import run_adapters

    run_adapters(options)


def run_model_action(options: argparse.Namespace) -> None:
    from qlora_kit.model.commands import run_model_action as run

    run(options)


VERBS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "doctor": run_doctor,
    "plan": run_plan,
    "data": run_data,
    "train": run_train,
    "eval": run_eval,
    "compare": run_compare,
    "predict": run_predict,
    "export": run_export,
    "generate": run_generate,
    "report": run_report,
    "adapters": run_adapter_action,
    "quantize": run_model_action,
    "cache": run_model_action,
}


def last_run(out_dir: str = "runs") -> Path:
    """The run folder below `out_dir` whose manifest changed last.

    Raises:
        RunError: there is none.
    """
    manifests = sorted(Path(out_dir).glob("*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if not manifests:
        raise RunError(f"no run in {out_dir}/", fix="Give a run folder, or train first")
    return manifests[-1].parent


def _refuse_unverified(folder: Path) -> None:
    """As export leaves them at PROFILE.rejected, whatever the folder is called now."""
    from qlora_runtime import BundleError, read_manifest

    try:
        verification = read_manifest(folder).verification
    except (BundleError, OSError):
        return  # the runtime tells what is wrong
    if verification is None or not verification.passed:
        raise QloraKitError(
            f"{folder} did not pass verification: it may not be the model that was trained",
            fix="Export another profile, or give --unverified to let it answer all the same",
        )


def _generate_from_bundle(options: argparse.Namespace) -> int:
    from qlora_runtime.cli import main as runtime

    verb = "chat" if not options.chat and options.prompt is None else "generate"
    arguments = [verb, options.model]
    if verb == "generate":
        # --name=value: a text may begin with a dash
        arguments += [f"--chat={options.chat}"] if options.chat else [f"--prompt={options.prompt}"]
    if options.system is not None:
        arguments += [f"--system={options.system}"]
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed"):
        arguments += [f"--{name.replace('_', '-')}={getattr(options, name)}"]
    return runtime(arguments)


def _say_error(error: QloraKitError, options: argparse.Namespace) -> int:
    if getattr(options, "json", False) or getattr(options, "mode", None) == "json":
        print(json.dumps({"kind": "error", "error": type(error).__name__, "message": str(error)}))
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
