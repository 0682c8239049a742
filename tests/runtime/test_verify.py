"""Verification passes for the trained model's own numbers, and fails for anything else, with the reason."""

import dataclasses
import json

import pytest
from qlora_runtime import (
    Bundle,
    Reference,
    Tolerance,
    read_reference,
    verify_directory,
    write_reference,
)
from qlora_runtime.errors import ArgumentError, ForeignFileError, FormatError, MissingFileError, PromptTooLongError
from qlora_runtime.verify import compare, verify

from .test_manifest import flip_a_byte
from .tiny import VOCAB_SIZE


@pytest.fixture
def reference(pristine_bundle) -> Reference:
    return read_reference(pristine_bundle)


def changed(reference: Reference, index: int = 0, **fields) -> Reference:
    """The reference with some fields of one prompt replaced."""
    prompts = list(reference.prompts)
    prompts[index] = dataclasses.replace(prompts[index], **fields)
    return dataclasses.replace(reference, prompts=prompts)


def with_tolerance(reference: Reference, **fields) -> Reference:
    return dataclasses.replace(reference, tolerance=dataclasses.replace(reference.tolerance, **fields))


def test_the_bundle_answers_as_the_trained_model(bundle, reference):
    report = verify(bundle)
    assert report.passed, report.reasons
    assert report.prompts == 3
    assert report.positions == sum(len(prompt.input_ids) for prompt in reference.prompts)
    assert report.max_logit_difference < 1e-4
    assert report.top1_agreement == 1.0
    assert report.greedy_tokens_equal == report.greedy_tokens_compared == 36
    assert report.to_json() == {"passed": True, "reasons": [], **report.distances()}


def test_a_logit_too_far_away_fails(bundle, reference):
    logits = [list(row) for row in reference.prompts[0].top_k_logits]
    logits[1][2] -= 0.5
    report = compare(bundle, changed(reference, top_k_logits=logits))
    assert not report.passed
    assert report.max_logit_difference == pytest.approx(0.5, abs=1e-3)
    assert report.reasons == [f"a logit differs by {report.max_logit_difference}, allowed is 0.001."]
    assert compare(bundle, with_tolerance(changed(reference, top_k_logits=logits), max_logit=0.6)).passed


def test_another_most_probable_token_fails(bundle, reference):
    prompt = reference.prompts[0]
    ids = [list(row) for row in prompt.top_k_ids]
    ids[0][0], ids[0][1] = ids[0][1], ids[0][0]
    loose = with_tolerance(changed(reference, top_k_ids=ids), max_logit=100.0)
    report = compare(bundle, loose)
    share = 1 - 1 / report.positions
    assert report.top1_agreement == pytest.approx(share)
    assert report.reasons == [
        f"the most probable token is the same at {report.top1_agreement} of the positions, required is 1.0."
    ]
    assert compare(bundle, with_tolerance(loose, min_top1=0.5)).passed


def test_another_greedy_token_fails_unless_it_was_won_narrowly(bundle, reference):
    prompt = reference.prompts[1]
    greedy = list(prompt.greedy_ids)
    greedy[4] = (greedy[4] + 1) % VOCAB_SIZE
    other = changed(reference, 1, greedy_ids=greedy)  # its prompt 1 goes on after a token of its own
    report = compare(bundle, with_tolerance(changed(other, 1, margins=[*prompt.margins[:5], *[0.0] * 7])))
    assert len(report.reasons) == 1
    assert report.reasons[0].startswith(f"prompt 1: greedy token 4 is {prompt.greedy_ids[4]}, the trained model's is")
    assert report.reasons[0].endswith("4 of 5 are the same.")
    assert report.greedy_tokens_equal == report.greedy_tokens_compared - 1 == 12 + 4 + 12

    margins = [*prompt.margins[:4], 1e-6, *prompt.margins[5:]]
    narrow = compare(bundle, changed(reference, 1, greedy_ids=greedy, margins=margins))
    assert narrow.passed
    assert narrow.greedy_tokens_compared == 12 + 4 + 12


def test_every_decided_greedy_token_is_compared_not_only_those_before_a_narrow_one(bundle, reference):
    margins = [1e-6, *reference.prompts[0].margins[1:]]
    older = changed(reference, 0, margins=margins)
    assert compare(bundle, older).greedy_tokens_compared == 0 + 12 + 12, "as bundles without the field say"
    newer = with_tolerance(older, every_greedy_token=True)
    report = compare(bundle, newer)
    assert report.passed and report.greedy_tokens_equal == report.greedy_tokens_compared == 11 + 12 + 12
    two = list(reference.prompts[1].margins)
    two[3] = two[7] = 0.0
    assert compare(bundle, changed(newer, 1, margins=two)).greedy_tokens_equal == 11 + 10 + 12


def test_a_reference_says_how_greedy_tokens_are_compared(reference, tmp_path):
    for every in (True, False):
        chosen = with_tolerance(reference, every_greedy_token=every)
        write_reference(tmp_path, chosen)
        assert read_reference(tmp_path) == chosen
        assert ("every_greedy_token" in (tmp_path / "reference.json").read_text()) == every


def test_the_best_tokens_along_the_own_answer_are_the_answer(bundle, reference):
    prompt = reference.prompts[0]
    assert [*bundle.best_tokens(prompt.input_ids, prompt.greedy_ids)] == prompt.greedy_ids
    with pytest.raises(PromptTooLongError, match=r"prompt and answer have .* context holds 96. Shorten"):
        bundle.best_tokens(prompt.input_ids, [5] * 96)
    with pytest.raises(ArgumentError):
        bundle.best_tokens(prompt.input_ids, [])


def test_logits_that_are_nan_fail(bundle, reference, monkeypatch):
    real = bundle.logits
    monkeypatch.setattr(bundle, "logits", lambda ids: real(ids) * float("nan"))
    report = compare(bundle, with_tolerance(reference, max_logit=1e9, min_top1=0.0))
    assert report.reasons == ["a logit differs by nan, allowed is 1000000000.0."]
    assert report.distances()["max_logit_difference"] is None


def test_damaged_files_fail_before_the_model_is_run(bundle_dir):
    opened = Bundle.open(bundle_dir)
    flip_a_byte(bundle_dir / "onnx" / "model.onnx_data")
    (bundle_dir / "surprise.onnx").write_bytes(b"x")
    for report in (verify(opened), verify_directory(bundle_dir)):
        assert not report.passed
        assert report.max_logit_difference is None
        assert any("model.onnx_data has SHA-256" in reason for reason in report.reasons)
        assert any("surprise.onnx lies in the bundle" in reason for reason in report.reasons)


def test_verifying_a_folder(pristine_bundle, tmp_path):
    assert verify_directory(pristine_bundle, threads=1).passed
    with pytest.raises(MissingFileError, match=r"manifest.json is missing"):
        verify_directory(tmp_path)


def test_the_reference_of_another_model_is_refused(bundle, reference):
    with pytest.raises(ForeignFileError, match=r"token ids up to 5000 .* model has 320 ids"):
        compare(bundle, changed(reference, input_ids=[5000] * len(reference.prompts[0].input_ids)))


def test_a_reference_reads_back_as_it_was_written(reference, tmp_path):
    write_reference(tmp_path, reference)
    assert read_reference(tmp_path) == reference


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(prompts=[]), "a list of at least one prompt"),
        (lambda r: r["prompts"][0].update(input_ids=[]), "input_ids is "),
        (lambda r: r["prompts"][0]["margins"].pop(), "lengths disagree"),
        (lambda r: r["prompts"][0]["top_k"]["ids"].pop(), "lengths disagree"),
        (lambda r: r["prompts"][0]["top_k"]["logits"][0].pop(), "lengths disagree"),
        (lambda r: r["tolerance"].update(max_logit=-1), "max_logit is -1, expected a number of at least 0"),
        (lambda r: r["tolerance"].update(every_greedy_token=1), "every_greedy_token is 1, expected true or false"),
        (lambda r: r["tolerance"].pop("min_top1"), "lacks the field 'min_top1'"),
        (lambda r: r["prompts"][0].update(note="x"), "unknown fields"),
    ],
)
def test_a_reference_of_another_shape_is_refused(pristine_bundle, tmp_path, change, message):
    value = json.loads((pristine_bundle / "reference.json").read_text())
    change(value)
    (tmp_path / "reference.json").write_text(json.dumps(value))
    with pytest.raises(FormatError, match=message):
        read_reference(tmp_path)


def test_a_reference_that_could_not_be_read_back_is_not_written(tmp_path):
    with pytest.raises(FormatError, match="at least one prompt"):
        write_reference(tmp_path, Reference([], Tolerance(0.1, 1.0, 0.1)))
    assert not list(tmp_path.iterdir())
