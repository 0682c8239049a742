"""The command line: exit codes, one-line errors, and nothing heavy loaded for --help."""

import io
import json
import subprocess
import sys

import pytest
from qlora_runtime import Sampling, Verification
from qlora_runtime.cli import main
from qlora_runtime.generate import generate

from .test_manifest import edit_json, flip_a_byte
from .tiny import write_tiny_manifest

SHORT = ["--max-new-tokens", "6", "--threads", "1"]


def run(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_loads_no_runtime():
    code = (
        "import sys\n"
        "from qlora_runtime.cli import main\n"
        "try:\n    main(['generate', '--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'onnxruntime', 'numpy', 'tokenizers', 'jinja2', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_no_verb_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2


def test_info_tells_what_the_bundle_is(capsys, pristine_bundle):
    code, out, err = run(capsys, "info", pristine_bundle)
    assert (code, err) == (0, "")
    assert "LlamaForCausalLM, vocabulary 320, context 96" in out
    assert "has not been verified" in out
    code, out, _ = run(capsys, "info", pristine_bundle, "--json")
    assert json.loads(out)["model"]["context_length"] == 96


def test_verify_passing_is_exit_code_0(capsys, pristine_bundle):
    code, out, err = run(capsys, "verify", pristine_bundle, "--threads", 1)
    assert (code, err) == (0, "")
    assert out.endswith("PASSED\n")
    assert "greedy tokens equal       36 of 36" in out


def test_verify_says_where_no_greedy_token_was_compared(capsys, bundle_dir):
    reference = json.loads((bundle_dir / "reference.json").read_text())
    reference["tolerance"]["greedy_margin"] = 1e6
    (bundle_dir / "reference.json").write_text(json.dumps(reference))
    write_tiny_manifest(bundle_dir)
    code, out, _ = run(capsys, "verify", bundle_dir)
    assert code == 0 and "no greedy token was decided clearly enough to compare\nPASSED" in out
    assert "0 of 0" not in out


def test_verify_failing_is_exit_code_1(capsys, bundle_dir):
    edit_json(
        bundle_dir / "reference.json",
        lambda value: value["prompts"][0]["top_k"]["logits"][0].__setitem__(0, 99.0),
    )
    write_tiny_manifest(bundle_dir)
    code, out, _ = run(capsys, "verify", bundle_dir, "--json")
    report = json.loads(out)
    assert code == 1
    assert report["passed"] is False
    assert "allowed is 0.001" in report["reasons"][0]


def test_verify_of_a_damaged_bundle_is_exit_code_1(capsys, bundle_dir):
    flip_a_byte(bundle_dir / "onnx" / "model.onnx_data")
    code, out, _ = run(capsys, "verify", bundle_dir)
    assert code == 1
    assert "model.onnx_data has SHA-256" in out
    assert out.endswith("FAILED\n")


def test_generate_prints_the_answer(capsys, bundle, pristine_bundle):
    code, out, _ = run(capsys, "generate", pristine_bundle, "--prompt", "The bridge", *SHORT)
    assert code == 0
    assert out == generate(bundle, "The bridge", Sampling(max_new_tokens=6)).text + "\n"


def test_generate_chat_with_a_system_message(capsys, bundle, pristine_bundle):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Where?"}]
    code, out, _ = run(capsys, "generate", pristine_bundle, "--chat", "Where?", "--system", "Be kind.", *SHORT)
    assert code == 0
    assert out == generate(bundle, messages, Sampling(max_new_tokens=6)).text + "\n"


def test_generate_answers_a_file(capsys, bundle, pristine_bundle, tmp_path):
    chat = [{"role": "user", "content": "Where?"}]
    lines = [{"prompt": "The bridge\u2028was"}, {"messages": chat}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "in.jsonl").write_text(text + "\n\n", encoding="utf-8")
    code, _, _ = run(
        capsys,
        "generate",
        pristine_bundle,
        "--file",
        tmp_path / "in.jsonl",
        "-o",
        tmp_path / "out.jsonl",
        *SHORT,
    )
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").open(encoding="utf-8")]
    assert code == 0
    for line, answer, prompt in zip(lines, answers, ["The bridge\u2028was", chat], strict=True):
        expected = generate(bundle, prompt, Sampling(max_new_tokens=6))
        assert answer == line | vars(expected)


@pytest.mark.parametrize(
    ("row", "message"),
    [("{", "line 2: not JSON"), ('{"text": "x"}', "line 2: expected"), ('{"prompt": 3}', "line 2: expected")],
)
def test_a_bad_line_is_named_and_nothing_is_written(capsys, pristine_bundle, tmp_path, row, message):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' + row)
    code, _, err = run(
        capsys,
        "generate",
        pristine_bundle,
        "--file",
        tmp_path / "in.jsonl",
        "-o",
        tmp_path / "out.jsonl",
        *SHORT,
    )
    assert code == 2
    assert message in err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0, allowed is"),
        (["--prompt", "a", "--threads", "0"], "threads is 0"),
        (["--prompt", "a", "--system", "b"], "--system goes with --chat"),
        (["--prompt", "a", "-o", "x"], "--file and -o go together"),
        (["--file", "x"], "--file and -o go together"),
        (["--file", "nowhere.jsonl", "-o", "x"], "nowhere.jsonl"),
        (["--prompt", "word " * 200], "context holds 96"),
        (["--prompt", ""], "at least one token"),
    ],
)
def test_errors_are_one_line_on_stderr_and_exit_code_2(capsys, pristine_bundle, arguments, message):
    code, out, err = run(capsys, "generate", pristine_bundle, *arguments)
    assert (code, out) == (2, "")
    error = err.splitlines()[-1]
    assert error.startswith("qlora-runtime: ")
    assert message in error


@pytest.mark.parametrize("verb", [["info"], ["verify"], ["generate", "--prompt", "a"], ["chat"]])
def test_a_folder_that_is_no_bundle_is_exit_code_2(capsys, tmp_path, verb):
    code, out, err = run(capsys, verb[0], tmp_path, *verb[1:])
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "manifest.json is missing" in err


def test_chat_remembers_its_turns(capsys, bundle, pristine_bundle, monkeypatch):
    sampling = Sampling(max_new_tokens=6)
    turns = [{"role": "user", "content": "Where?"}]
    first = generate(bundle, turns, sampling).text
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    second = generate(bundle, turns, sampling).text
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where?\nWhy?\n\nnot read\n"))
    code, out, _ = run(capsys, "chat", pristine_bundle, *SHORT)
    assert code == 0
    assert out == f"{first}\n{second}\n"


@pytest.mark.parametrize(
    ("verification", "warning"),
    [
        (None, "has not been verified"),
        (Verification(False, {}, {}), "did not pass verification"),
        (Verification(True, {}, {}), None),
    ],
)
def test_a_bundle_that_is_not_verified_warns(capsys, bundle_dir, verification, warning):
    write_tiny_manifest(bundle_dir, verification=verification)
    code, _, err = run(capsys, "generate", bundle_dir, "--prompt", "a", *SHORT)
    assert code == 0
    assert warning in err if warning else err == ""
