"""A bundle is held to its manifest: every kind of damage is refused, each with its own reason."""

import json
import os
import shutil
from pathlib import Path

import pytest
from qlora_runtime import Bundle, Provenance, Verification, check_files, read_manifest, sha256_file
from qlora_runtime.errors import (
    ForeignFileError,
    FormatError,
    HashMismatchError,
    MissingFileError,
    ModelLoadError,
    UnexpectedFileError,
    UnknownFormatError,
    UnsafePathError,
)
from qlora_runtime.schema import safe_path

from .tiny import write_tiny_manifest


def edit_json(path: Path, change) -> None:
    """Apply `change` to the object in a JSON file."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_a_whole_bundle_passes_and_the_manifest_reads_back(bundle_dir):
    manifest = check_files(bundle_dir)
    assert manifest == read_manifest(bundle_dir)
    assert manifest.model.eos_token_ids == (1,)
    assert set(manifest.files) == {
        path.relative_to(bundle_dir).as_posix()
        for path in bundle_dir.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json", "reference.json"])
def test_a_flipped_byte_is_found(bundle_dir, name):
    flip_a_byte(bundle_dir / name)
    with pytest.raises(HashMismatchError, match=f"{name} has SHA-256 .* manifest.json says"):
        Bundle.open(bundle_dir)
    check_files(bundle_dir, hashes=False)  # sizes alone cannot tell


def test_a_file_cut_short_is_found_without_hashing(bundle_dir):
    data = bundle_dir / "onnx" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(HashMismatchError, match=r"model.onnx_data has \d+ bytes, manifest.json says \d+"):
        check_files(bundle_dir, hashes=False)


@pytest.mark.parametrize("name", ["onnx/model.onnx_data", "tokenizer.json", "genai_config.json"])
def test_a_missing_file_is_named(bundle_dir, name):
    (bundle_dir / name).unlink()
    with pytest.raises(MissingFileError, match=f"{name} is missing, though manifest.json lists it"):
        check_files(bundle_dir)


def test_a_folder_without_manifest_is_no_bundle(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MissingFileError, match=r"manifest.json is missing"):
            Bundle.open(folder)


@pytest.mark.parametrize("name", ["onnx/other.onnx", "model.onnx", ".hidden.onnx", "onnx/data.bin", "extra.json"])
def test_a_file_the_manifest_does_not_know_is_refused(bundle_dir, name):
    (bundle_dir / name).write_bytes(b"x")
    with pytest.raises(UnexpectedFileError, match=f"{name} lies in the bundle"):
        check_files(bundle_dir)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", ".gitattributes"])
def test_documentation_beside_the_bundle_is_allowed(bundle_dir, name):
    (bundle_dir / name).write_text("words")
    check_files(bundle_dir)


def test_an_added_chat_template_is_refused(bundle_dir):
    """Unlisted, it would change every prompt; listed, it still is not the one the model was trained with."""
    (bundle_dir / "chat_template.jinja").unlink()
    provenance = {"base": {}, "adapter": None, "tokenizer_sha256": sha256_file(bundle_dir / "tokenizer.json")}
    untemplated = Provenance(**provenance, chat_template_sha256=None)
    write_tiny_manifest(bundle_dir, provenance=untemplated)
    (bundle_dir / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UnexpectedFileError, match=r"chat_template.jinja lies in the bundle"):
        check_files(bundle_dir)
    with pytest.raises(ForeignFileError, match=r"chat_template.jinja is not the one .* provenance says none"):
        write_tiny_manifest(bundle_dir, provenance=untemplated)


def test_the_tokenizer_of_another_bundle_is_refused(bundle_dir):
    """Its hash in the file list was mended, but the model was trained with another one."""
    path = bundle_dir / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    record = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    edit_json(bundle_dir / "manifest.json", lambda value: value["files"].update({"tokenizer.json": record}))
    with pytest.raises(ForeignFileError, match=r"tokenizer.json is not the one the model was trained with"):
        check_files(bundle_dir)


@pytest.mark.parametrize(("name", "other"), [("vocab_size", 500), ("context_length", 12), ("eos_token_id", [1, 2])])
def test_the_genai_config_of_another_bundle_is_refused(bundle_dir, name, other):
    edit_json(bundle_dir / "genai_config.json", lambda value: value["model"].update({name: other}))
    write_tiny_manifest(bundle_dir)
    with pytest.raises(ForeignFileError, match=f"genai_config.json says {name} is"):
        Bundle.open(bundle_dir)


def test_the_graph_of_another_bundle_is_refused(bundle_dir):
    """All hashes are in order, but the graph has two layers and genai_config.json speaks of three."""
    edit_json(bundle_dir / "genai_config.json", lambda value: value["model"]["decoder"].update(num_hidden_layers=3))
    write_tiny_manifest(bundle_dir)
    with pytest.raises(ModelLoadError, match=r"disagree .*past_key_values.2.key"):
        Bundle.open(bundle_dir)


def test_a_graph_that_onnxruntime_refuses_is_one_clear_error(bundle_dir):
    (bundle_dir / "onnx" / "model.onnx").write_bytes(b"not a graph")
    write_tiny_manifest(bundle_dir)
    with pytest.raises(ModelLoadError, match=r"onnxruntime .* cannot load"):
        Bundle.open(bundle_dir)


def test_weights_outside_the_bundle_are_refused(bundle_dir, tmp_path):
    """A graph may name any file as its weights; one outside of its folder is not read."""
    import onnx

    graph = onnx.load(bundle_dir / "onnx" / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../outside_data"
    onnx.save(graph, bundle_dir / "onnx" / "model.onnx")
    shutil.copy(bundle_dir / "onnx" / "model.onnx_data", tmp_path / "outside_data")
    write_tiny_manifest(bundle_dir)
    with pytest.raises(ModelLoadError, match="cannot load"):
        Bundle.open(bundle_dir)


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "/etc/passwd",
        "onnx/../../secret",
        "a/./b",
        "a//b",
        "a\\b",
        "C:/x",
        "..",
        ".",
        "",
        "manifest.json",
    ],
)
def test_paths_that_lead_out_are_refused(bundle_dir, path):
    record = {"sha256": "0" * 64, "bytes": 1}
    edit_json(bundle_dir / "manifest.json", lambda value: value["files"].update({path: record}))
    with pytest.raises(UnsafePathError, match="plain relative paths"):
        Bundle.open(bundle_dir)


def test_plain_paths_are_allowed():
    assert [safe_path(path) for path in ("a", "a/b.c", "..a", "a b")] == ["a", "a/b.c", "..a", "a b"]


def test_a_link_that_leads_out_is_refused(bundle_dir, tmp_path):
    shutil.move(bundle_dir / "config.json", tmp_path / "config.json")
    os.symlink(tmp_path / "config.json", bundle_dir / "config.json")
    with pytest.raises(UnsafePathError, match=r"config.json is a link that leads out"):
        check_files(bundle_dir)


@pytest.mark.parametrize("found", ["qlora-bundle/2", None, 1])
def test_an_unknown_format_is_refused(bundle_dir, found):
    edit_json(bundle_dir / "manifest.json", lambda value: value.update(format=found))
    with pytest.raises(UnknownFormatError, match="this version reads 'qlora-bundle/1'"):
        read_manifest(bundle_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(surprise=1), r"unknown fields \['surprise'\]"),
        (lambda m: m.pop("profile"), "lacks the field 'profile'"),
        (lambda m: m.update(profile=""), "profile is '', expected a non-empty string"),
        (lambda m: m.update(created="yesterday"), "expected a time in ISO 8601"),
        (lambda m: m["model"].update(vocab_size="320"), "vocab_size is '320', expected an integer"),
        (lambda m: m["model"].update(vocab_size=True), "vocab_size is True, expected an integer"),
        (lambda m: m["model"].update(eos_token_ids=1), "eos_token_ids is 1, expected a list of token ids"),
        (lambda m: m["model"].update(eos_token_ids=[999]), r"\[999\] are outside the vocab_size 320"),
        (lambda m: m["files"]["config.json"].update(sha256="ABC"), "sha256 is 'ABC', expected 64"),
        (lambda m: m["files"]["config.json"].pop("bytes"), "lacks the field 'bytes'"),
        (lambda m: m["files"].update({"config.json": 3}), "is 3, an object with"),
        (
            lambda m: m.update(verification={"passed": "yes", "tolerance": {}, "distances": {}}),
            "true or false",
        ),
        (lambda m: m["provenance"].update(tokenizer_sha256=None), "tokenizer_sha256 is None"),
        (lambda m: m.update(tools={"onnx": 1}), "expected an object of strings"),
    ],
)
def test_a_manifest_of_another_shape_is_refused(bundle_dir, change, message):
    edit_json(bundle_dir / "manifest.json", change)
    with pytest.raises(FormatError, match=message):
        read_manifest(bundle_dir)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list, a JSON object is expected"),
        ('{"format": 1, "format": 2}', "key 'format' appears twice"),
        ('{"format": NaN}', "NaN is not a JSON number"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_text_that_is_no_json_object_is_refused(bundle_dir, text, message):
    (bundle_dir / "manifest.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        read_manifest(bundle_dir)


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_else(bundle_dir):
    names = sorted(path.name for path in bundle_dir.iterdir())
    write_tiny_manifest(bundle_dir)
    first = (bundle_dir / "manifest.json").read_bytes()
    write_tiny_manifest(bundle_dir)
    assert (bundle_dir / "manifest.json").read_bytes() == first
    assert sorted(path.name for path in bundle_dir.iterdir()) == names


def test_the_verification_is_kept(bundle_dir):
    verification = Verification(passed=True, tolerance={"max_logit": 0.1}, distances={"max_logit": 0.01})
    write_tiny_manifest(bundle_dir, verification=verification)
    assert read_manifest(bundle_dir).verification == verification


@pytest.mark.parametrize(
    "changes",
    [
        {"profile": ""},
        {"created": "now"},
        {"verification": Verification(True, {}, {"max_logit": float("nan")})},
        {"tools": {"onnx": 1}},
    ],
)
def test_a_manifest_that_could_not_be_read_back_is_not_written(bundle_dir, changes):
    before = (bundle_dir / "manifest.json").read_bytes()
    with pytest.raises(FormatError):
        write_tiny_manifest(bundle_dir, **changes)
    assert (bundle_dir / "manifest.json").read_bytes() == before


def test_a_folder_that_lacks_a_file_gets_no_manifest(bundle_dir):
    (bundle_dir / "reference.json").unlink()
    with pytest.raises(MissingFileError, match=r"reference.json is not among the bundle's files"):
        write_tiny_manifest(bundle_dir)
