"""`qlora-kit export` of encoder-decoders: from training to the runtime's answers, which are transformers'."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from qlora_runtime import Bundle, Sampling, Seq2SeqBundle, TaskBundle, read_manifest, verify_directory, write_manifest
from qlora_runtime.cli import main as runtime
from qlora_runtime.errors import (
    ArgumentError,
    ChatTemplateError,
    ForeignFileError,
    FormatError,
    MissingFileError,
    ModelLoadError,
    PromptTooLongError,
    WrongTaskError,
)
from qlora_runtime.generate import generate
from qlora_runtime.manifest import DECODER_GRAPH, ENCODER_GRAPH
from qlora_runtime.reference import read_reference, write_reference
from qlora_runtime.schema import Manifest
from qlora_runtime.seq2seq_graphs import Seq2SeqGraphs
from qlora_runtime.task import Seq2SeqTask, parse_task, task_to_json
from runtime.serving import CHAT, COMPLETION, serving
from tiny_encoders import SEP, save_tiny_encoder, task_recipe, tiny_encoder, trained

from qlora_kit.cli import main
from qlora_kit.errors import EvalError, ExportError, VerificationError
from qlora_kit.eval.seq2seq_bundle_model import Seq2SeqBundleModel
from qlora_kit.export import task_graph
from qlora_kit.export.seq2seq_bundle import Seq2SeqModel, answer, make_seq2seq_bundle
from qlora_kit.export.seq2seq_graph import build_seq2seq_graphs
from qlora_kit.model.load import to_reference
from qlora_kit.train.restore import load_run_tokenizer, load_tuned
from qlora_kit.train.run_folder import RunFolder

PREFIX, POSITIONS = "turn : ", 96
KINDS = ["t5", pytest.param("bart", marks=pytest.mark.slow)]
SHAPES: dict[str, dict[str, Any]] = {
    "t5": {"initializer_factor": 1.0},  # large enough that answers differ
    "bart": {},
}
SOURCES = ("anna sold boats in porto", "who ?", "the ferryman counted seven seven coins by the evening")


@dataclass
class Exported:
    """A finished run, its model in fp32, and its bundle."""

    run: RunFolder
    model: Any
    tokenizer: Any
    folder: Path


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Only to be read."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    task = {"type": "seq2seq", "max_target_len": 16, "source_prefix": PREFIX}
    run = trained(task_recipe(folder, save_tiny_encoder(folder / "model", kind, **SHAPES[kind]), task))
    assert main(["export", str(run.path), "--profiles", "fp32"]) == 0
    model = to_reference(load_tuned(run)).eval()
    return Exported(run, model, load_run_tokenizer(run), run.bundles / "fp32")


@pytest.fixture
def copied(made: Exported, tmp_path: Path) -> Path:
    """The bundle, to be changed."""
    return Path(shutil.copytree(made.folder, tmp_path / "bundle"))


def rewritten(folder: Path, **changes: Any) -> Manifest:
    old = read_manifest(folder)
    about = {name: getattr(old, name) for name in ("profile", "model", "provenance", "tools", "task", "verification")}
    return write_manifest(folder, **(about | changes))


def said_by_transformers(made: Exported, source: str, **options: Any) -> list[int]:
    """Ids of an answer, without the decoder's start token."""
    inputs = made.tokenizer(PREFIX + source, return_tensors="pt")
    ends = made.model.generation_config.eos_token_id
    with torch.no_grad():
        found = made.model.generate(
            **{name: inputs[name] for name in ("input_ids", "attention_mask")},
            **{"max_new_tokens": 12, "do_sample": False, "forced_eos_token_id": None, "eos_token_id": ends, **options},
        )
    return [int(token) for token in found[0, 1:]]


def test_logits_are_the_trained_models_whole_and_token_by_token(made: Exported) -> None:
    bundle = Seq2SeqBundle.open(made.folder, threads=1)
    draw, start = np.random.default_rng(0), bundle.task.decoder_start_token_id
    for lengths, target in (([1], 1), ([13, 2, 7], 5), ([3, 31], 17)):
        sources = [draw.integers(5, 120, length) for length in lengths]
        read = np.concatenate([np.full((len(sources), 1), start), draw.integers(5, 120, (len(sources), target))], 1)
        logits = bundle.target_logits(sources, read)
        for row, source in enumerate(sources):
            with torch.no_grad():
                expected = made.model(
                    input_ids=torch.from_numpy(source[None]), decoder_input_ids=torch.from_numpy(read[row : row + 1])
                ).logits[0]
            np.testing.assert_allclose(logits[row], expected.numpy(), atol=1e-4, rtol=0)
            best = list(bundle.best_tokens(source, read[row, 1:]))
            assert best == expected.argmax(-1).tolist()[:-1]


def test_greedy_answers_are_transformers_own_alone_and_in_batches(made: Exported) -> None:
    bundle = Seq2SeqBundle.open(made.folder, threads=1)
    sampling = Sampling(max_new_tokens=12)
    alone = [generate(bundle, source, sampling) for source in SOURCES]
    assert [found.token_ids for found in alone] == [said_by_transformers(made, source) for source in SOURCES]
    assert len({tuple(found.token_ids) for found in alone}) > 1
    prompts = [bundle.encode_prompt(source) for source in SOURCES]
    assert bundle.answers(prompts, sampling) == [found.token_ids for found in alone]
    strong = 1e4  # whatever the random weights: a token that was said is not said again
    for penalty in (1.7, strong):
        penalized = generate(bundle, SOURCES[0], Sampling(max_new_tokens=12, repetition_penalty=penalty)).token_ids
        assert penalized == said_by_transformers(made, SOURCES[0], repetition_penalty=penalty)
    assert penalized != alone[0].token_ids


def test_answers_end_where_they_are_told_to(made: Exported, copied: Path) -> None:
    bundle = Seq2SeqBundle.open(made.folder, threads=1)
    whole = generate(bundle, SOURCES[0], Sampling(max_new_tokens=12))
    middle = whole.token_ids[len(whole.token_ids) // 2]
    ends_at = whole.token_ids.index(middle)
    rewritten(copied, model=replace(bundle.manifest.model, eos_token_ids=(middle,)))
    ended = generate(Seq2SeqBundle.open(copied), SOURCES[0], Sampling(max_new_tokens=12))
    assert (ended.token_ids, ended.finish_reason) == (whole.token_ids[: ends_at + 1], "eos")
    rewritten(copied, model=replace(bundle.manifest.model, eos_token_ids=(), context_length=64))
    prompt = [7] * 64  # a source does not take room from its answer
    full = list(Seq2SeqBundle.open(copied).stream(prompt, Sampling(max_new_tokens=500)))
    assert len(full) == 63
    assert generate(Seq2SeqBundle.open(copied), "who", Sampling(max_new_tokens=500)).finish_reason == "context"


def test_a_seed_draws_the_same_answer_alone_and_in_batches(made: Exported) -> None:
    bundle = Seq2SeqBundle.open(made.folder, threads=1)
    prompts = [bundle.encode_prompt(source) for source in SOURCES]
    for seed in (1, 2):
        drawn = Sampling(max_new_tokens=8, temperature=1.5, top_k=40, seed=seed)
        assert bundle.answers(prompts, drawn) == [list(bundle.stream(prompt, drawn)) for prompt in prompts]
    streams = {tuple(bundle.stream(prompts[0], Sampling(8, temperature=1.5, seed=seed))) for seed in range(4)}
    assert len(streams) > 1


def test_a_forced_first_token_is_said_and_read(made: Exported, copied: Path) -> None:
    task = read_manifest(made.folder).task
    assert isinstance(task, Seq2SeqTask)
    rewritten(copied, task=replace(task, forced_bos_token_id=9))
    bundle = Seq2SeqBundle.open(copied, threads=1)
    expected = [said_by_transformers(made, source, forced_bos_token_id=9) for source in SOURCES]
    assert expected[0][0] == 9
    assert [generate(bundle, source, Sampling(max_new_tokens=12)).token_ids for source in SOURCES] == expected
    assert bundle.answers([bundle.encode_prompt(source) for source in SOURCES], Sampling(12)) == expected


def test_verify_and_the_manifest_say_what_was_proven(made: Exported, copied: Path) -> None:
    manifest = read_manifest(made.folder)
    assert manifest.task == Seq2SeqTask(PREFIX, 64, made.model.config.decoder_start_token_id, None)
    assert manifest.model.eos_token_ids == (SEP,) and manifest.verification is not None
    distances = manifest.verification.distances
    assert distances["max_logit"] < 1e-4 and distances["top1_agreement"] == 1.0
    assert 0 < distances["greedy_tokens_equal"] == distances["greedy_tokens_compared"]
    assert distances["calibration_rows"] == 0 < distances["training_rows"]
    assert verify_directory(made.folder).passed

    graph = onnx.load(copied / DECODER_GRAPH)
    weight = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = np.frombuffer(weight.raw_data, np.float32).copy()
    values[::3] += 0.5
    weight.raw_data = values.tobytes()
    onnx.save(graph, copied / DECODER_GRAPH)
    rewritten(copied)
    report = verify_directory(copied)
    assert not report.passed and "a logit differs by" in report.reasons[0]


def test_eval_and_predict_read_the_bundle_as_the_tuned_model(made: Exported, tmp_path: Path) -> None:
    run = str(made.run.path)
    assert main(["eval", run, "--forms", "tuned,bundle_fp32"]) == 0
    results = json.loads((made.run.path / "eval" / "results.json").read_text(encoding="utf-8"))["forms"]
    tuned, bundle = results["tuned"], results["bundle_fp32"]
    assert tuned["per_row"]["answer"] == bundle["per_row"]["answer"]
    np.testing.assert_allclose(tuned["per_row"]["loss"], bundle["per_row"]["loss"], rtol=1e-4)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"source": source}) + "\n" for source in SOURCES), encoding="utf-8")
    for form in ("tuned", "bundle_fp32"):
        assert (
            main(["predict", run, "--input", str(rows), "--output", str(tmp_path / f"{form}.csv"), "--form", form]) == 0
        )
    assert (tmp_path / "tuned.csv").read_bytes() == (tmp_path / "bundle_fp32.csv").read_bytes()


def test_the_command_line_answers_a_text_and_a_file(
    made: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runtime(["generate", str(made.folder), "--prompt", SOURCES[0], "--max-new-tokens", "12"]) == 0
    expected = made.tokenizer.decode(said_by_transformers(made, SOURCES[0]), skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == expected.strip()
    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text("".join(json.dumps({"prompt": source}) + "\n" for source in SOURCES), encoding="utf-8")
    options = ["--file", str(rows), "-o", str(answers), "--max-new-tokens", "12"]
    assert runtime(["generate", str(made.folder), *options]) == 0
    found = [json.loads(line)["token_ids"] for line in answers.read_text(encoding="utf-8").splitlines()]
    assert found == [said_by_transformers(made, source) for source in SOURCES]


def test_the_server_answers_sources_whole_and_streamed(made: Exported) -> None:
    asked = {"prompt": SOURCES[0], "max_tokens": 12, "temperature": 0}
    expected = made.tokenizer.decode(said_by_transformers(made, SOURCES[0]), skip_special_tokens=True)
    with serving(made.folder) as server:
        answer = server.ask(COMPLETION, asked)
        assert answer.status == 200, answer.body
        assert answer.json()["choices"][0]["text"].strip() == expected.strip()
        pieces = [event["choices"][0]["text"] for event in server.events(COMPLETION, asked) if event["choices"]]
        assert "".join(pieces) == answer.json()["choices"][0]["text"]
        refused = server.ask(CHAT, {"messages": [{"role": "user", "content": "hello"}]})
        assert refused.status == 400 and "knows no chats" in refused.error["message"]
        server.wait_until_idle()


def test_what_such_a_bundle_cannot_do_is_refused(made: Exported, copied: Path) -> None:
    bundle = Seq2SeqBundle.open(made.folder, threads=1)
    with pytest.raises(WrongTaskError, match=r"bundle for seq2seq, which generates. Open it with Seq2SeqBundle.open"):
        TaskBundle.open(made.folder)
    with pytest.raises(WrongTaskError, match=r"for seq2seq, which has an encoder too. Open it with Seq2SeqBundle"):
        Bundle.open(made.folder)
    with pytest.raises(ChatTemplateError, match=r"knows no chats. Give it a plain text"):
        generate(bundle, [{"role": "user", "content": "hello"}])
    with pytest.raises(PromptTooLongError, match=r"the input has 65 tokens, the model's context holds 64"):
        bundle.stream([7] * 65)
    with pytest.raises(ArgumentError, match=r"holds values from 7 to 120; this model's token ids go from 0 to 119"):
        bundle.answers([[7, 8], [7, 120]])
    with pytest.raises(ArgumentError, match=r"threads is 0, allowed are None and integers of at least 1"):
        Seq2SeqBundle.open(made.folder, threads=0)
    task = bundle.task
    rewritten(copied, task=replace(task, decoder_start_token_id=120))
    with pytest.raises(ForeignFileError, match=r"task has the token ids \[120\], the model's go up to 119"):
        Seq2SeqBundle.open(copied)


def test_damaged_bundles_are_refused(made: Exported, copied: Path) -> None:
    shutil.copyfile(copied / ENCODER_GRAPH, copied / DECODER_GRAPH)
    rewritten(copied)
    with pytest.raises(ModelLoadError, match=r"the encoder's graph and the format disagree .*cross.0.key"):
        Seq2SeqBundle.open(copied)
    with pytest.raises(EvalError, match=r"the format disagree.*Export again"):
        Seq2SeqBundleModel(copied)
    graph = onnx.load(made.folder / DECODER_GRAPH)
    past = next(value for value in graph.graph.input if value.name == "past_key_values.0.key")
    past.type.tensor_type.shape.dim[1].dim_param = "heads"
    onnx.save(graph, copied / DECODER_GRAPH)
    with pytest.raises(ModelLoadError, match=r"past_key_values.0.key has the shape .*heads and head_dim as numbers"):
        Seq2SeqGraphs(copied / ENCODER_GRAPH, copied / DECODER_GRAPH, 1)
    reference = read_reference(made.folder)
    prompts = [replace(reference.prompts[0], decoder_ids=None, top_k_ids=[[1]] * len(reference.prompts[0].input_ids))]
    prompts = [replace(prompts[0], top_k_logits=[[0.0]] * len(prompts[0].input_ids))]
    shutil.copyfile(made.folder / DECODER_GRAPH, copied / DECODER_GRAPH)
    write_reference(copied, replace(reference, prompts=prompts))
    rewritten(copied)
    with pytest.raises(ForeignFileError, match=r"prompt 0 has token ids .*It is a file of another bundle"):
        verify_directory(copied)
    (copied / ENCODER_GRAPH).unlink()
    with pytest.raises(MissingFileError, match=r"onnx/encoder_model.onnx is missing, though manifest.json lists it"):
        Seq2SeqBundle.open(copied)


def test_weights_of_both_graphs_lie_there_once(
    made: Exported, copied: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(task_graph, "INSIDE_BYTES", 0)  # weights lie beside the graphs, as large models' do
    (tmp_path / "built").mkdir()
    build_seq2seq_graphs(made.run.merged, tmp_path / "built", "fp32")
    decoder = onnx.load(tmp_path / "built" / DECODER_GRAPH, load_external_data=False).graph
    shared = [
        one for one in decoder.initializer if any(e.value == "encoder_model.onnx_data" for e in one.external_data)
    ]
    assert [120, 32] in [list(tensor.dims) for tensor in shared]
    shutil.rmtree(copied / "onnx")
    shutil.copytree(tmp_path / "built" / "onnx", copied / "onnx")
    rewritten(copied)
    assert verify_directory(copied).passed


@pytest.mark.slow
def test_weights_changed_after_the_merge_are_caught(made: Exported, tmp_path: Path) -> None:
    kind = made.model.config.model_type
    other = save_tiny_encoder(tmp_path / "other", kind, seed=1, **SHAPES[kind])
    task = read_manifest(made.folder).task
    assert isinstance(task, Seq2SeqTask)
    source, labels = np.array([7, 8, 9]), np.array([11, 12, SEP])
    rows = [answer(made.model, task, source, labels, "held_out")] * 2
    about = Seq2SeqModel(task, (SEP,), 0, POSITIONS, rows)
    with pytest.raises(VerificationError, match=r"not the model that was trained: a logit differs by"):
        make_seq2seq_bundle(other, tmp_path / "fp32", "fp32", about, {"model": "tiny"}, None, {})
    assert not (tmp_path / "fp32").exists() and (tmp_path / "fp32.rejected").is_dir()


@pytest.mark.slow
def test_int8_rounds_all_products_but_the_head(made: Exported) -> None:
    try:
        main(["export", str(made.run.path), "--profiles", "int8"])
    finally:
        [folder] = made.run.bundles.glob("int8*")  # random weights may decide too narrowly; what matters is the graph
    encoder, decoder = (onnx.load(folder / name).graph for name in (ENCODER_GRAPH, DECODER_GRAPH))
    left = {}
    for name, graph in (("encoder", encoder), ("decoder", decoder)):
        weights = {tensor.name for tensor in graph.initializer}
        left[name] = [n.name for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]
        assert any(node.op_type == "MatMulNBits" for node in graph.node)
    assert left["encoder"] == [] and len(left["decoder"]) == 1  # the head


def test_a_task_is_read_as_it_was_written_and_odd_ones_refused() -> None:
    task = Seq2SeqTask("summarize: ", 512, 0, None)
    assert parse_task(task_to_json(task), "task") == task
    for changes, message in (
        ({"forced_bos_token_id": -1}, "forced_bos_token_id is -1, expected a token id or null"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id is None, expected an integer of at least 0"),
        ({"source_prefix": 3}, "source_prefix is 3, expected text"),
        ({"labels": ["a", "b"]}, "unknown fields \\['labels'\\]"),
    ):
        with pytest.raises(FormatError, match=message):
            parse_task(task_to_json(task) | changes, "task")


def test_a_decoder_that_begins_targets_otherwise_is_refused() -> None:
    model = tiny_encoder("bart", "AutoModelForSeq2SeqLM")
    task = Seq2SeqTask("", 64, 7, None)
    with pytest.raises(ExportError, match=r"begins targets with another token than answers \(got 3\). Allowed: its"):
        answer(model, task, np.array([5, 6]), np.array([7, SEP]), "held_out")
