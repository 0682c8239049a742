"""Rows from the formats that only some tasks have: CoNLL, SQuAD, parallel text, folders of images, manifests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_rows import examples_of, parser, rows_of, source, write_image, write_wav

from qlora_kit.data.examples import RowError
from qlora_kit.data.sources import fingerprint, is_file_source
from qlora_kit.data.task_examples import LabelledImage, Utterance
from qlora_kit.data.task_readers.images import read_image
from qlora_kit.data.task_readers.wav import read_wav
from qlora_kit.errors import DataError

DATA = Path(__file__).parents[2].parent / "shared" / "data"
CONLL = "-DOCSTART- -X- O O\n\n# id = 1\nU.N. NNP B-NP B-ORG\nsays VBZ B-VP O\n\n \t\nBonn NNP B-NP B-LOC\r\n# # O O\n"


def here(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path


@pytest.mark.parametrize("ending", [".conll", ".iob", ".bio", ".annotated", ".txt"])
def test_conll_with_four_columns_and_comments(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(CONLL.encode())
    assert rows_of(path) == [
        (4, {"words": ["U.N.", "says"], "tags": ["B-ORG", "O"]}),
        (8, {"words": ["Bonn", "#"], "tags": ["B-LOC", "O"]}),
    ]


def test_conll_with_tabs_keeps_hashes_and_spaces_in_words(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("\ufeff#\tO\n# a comment\nNew York\tB-location\n#tag\tO\n5\u00a0km\tO", encoding="utf-8")
    assert rows_of(path) == [
        (1, {"words": ["#", "New York", "#tag", "5\u00a0km"], "tags": ["O", "B-location", "O", "O"]})
    ]


def test_conll_with_words_alone_is_for_prediction(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("To\nBonn\n\nNow\n")
    assert rows_of(path) == [(1, {"words": ["To", "Bonn"]}), (4, {"words": ["Now"]})]
    assert [example.words for example in examples_of("tagging", path, labelled=False)] == [("To", "Bonn"), ("Now",)]
    with pytest.raises(DataError, match=r"a\.conll row 1: no column for 'tags' \(got \['words'\]\)"):
        examples_of("tagging", path)


@pytest.mark.parametrize(
    ("name", "sentences", "words"),
    [
        ("wnut17train.conll", 3394, 62730),
        ("emerging.dev.conll", 1009, 15733),
        ("emerging.test.annotated", 1287, 23394),
    ],
)
def test_wnut17(name: str, sentences: int, words: int) -> None:
    path = here(f"wnut17/{name}")
    examples = examples_of("tagging", path)
    assert len(examples) == sentences and sum(len(example.words) for example in examples) == words
    text = path.read_text(encoding="utf-8").split("\n")
    for number, row in rows_of(path)[::97]:
        assert text[number - 1] == f"{row['words'][0]}\t{row['tags'][0]}"


def test_squad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    answers = [{"text": "b", "answer_start": 2}]
    questions = [
        {"id": "1", "question": "p?", "answers": answers},
        {"id": "2", "question": "q?", "answers": [], "is_impossible": True, "plausible_answers": answers},
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": [{"paragraphs": [{"context": "a b", "qas": questions}]}]}))
    first, second = rows_of(path)
    assert first == (1, {"id": "1", "question": "p?", "context": "a b", "answers": answers})
    assert second == (2, {"id": "2", "question": "q?", "context": "a b", "answers": [], "is_impossible": True})
    first, second = examples_of("question_answering", path, unanswerable=True)
    assert (first.id, first.answers[0].start) == ("1", 2) and second.answers == ()


@pytest.mark.parametrize(
    ("name", "questions", "unanswerable"),
    [
        ("train-v1.1.slice.json", 11877, 0),
        ("dev-v1.1.part1.json", 4961, 0),
        ("dev-v1.1.part2.json", 5609, 0),
        ("dev-v2.0.part.json", 6078, 3168),
    ],
)
def test_squad(name: str, questions: int, unanswerable: int) -> None:
    examples = examples_of("question_answering", here(f"squad/{name}"), unanswerable=unanswerable > 0)
    assert len(examples) == questions and sum(not example.answers for example in examples) == unanswerable
    for example in examples:
        assert all(example.context[a.start : a.start + len(a.text)] == a.text for a in example.answers)


def test_parallel_text(tmp_path: Path) -> None:
    (tmp_path / "t.en").write_bytes("\ufeffone\r\n\r\ntwo\u2028half".encode())
    (tmp_path / "t.de").write_bytes(b"eins\n\nzwei\n")
    assert rows_of(tmp_path / "t.{en,de}") == [
        (1, {"source": "one", "target": "eins"}),
        (3, {"source": "two\u2028half", "target": "zwei"}),
    ]
    assert is_file_source(source(tmp_path / "t.{de,en}"))


def test_multi30k() -> None:
    examples = examples_of("seq2seq", here("multi30k/train.en").parent / "train.{en,de}")
    assert len(examples) == 29000 and examples[-1].source and examples[0].target.startswith("Zwei junge weiße Männer")


def test_a_folder_of_images(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/b.JPG", "cat/a.png"):
        write_image(tmp_path / "train" / name)
    for name in (".DS_Store", "cat/Thumbs.db", ".ipynb_checkpoints/x.png"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"x")
    folder = tmp_path / "train"
    assert rows_of(folder) == [
        (1, {"image": "cat/a.png", "label": "cat"}),
        (2, {"image": "cat/b.JPG", "label": "cat"}),
        (3, {"image": "dog/1.png", "label": "dog"}),
    ]
    assert examples_of("image_classification", folder)[2] == LabelledImage(str(folder / "dog" / "1.png"), "dog")
    assert read_image(folder / "dog" / "1.png").getpixel((0, 0)) == (255, 0, 0)


def test_a_flat_folder_of_images_is_for_prediction(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png")
    write_image(tmp_path / "a.png")
    examples = examples_of("image_classification", tmp_path, labelled=False)
    assert examples == [LabelledImage(str(tmp_path / name), None) for name in ("a.png", "b.png")]
    with pytest.raises(DataError, match=r"row 1: no column for 'label' \(got \['image'\]\)"):
        examples_of("image_classification", tmp_path)


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_manifest_of_images(name: str, tmp_path: Path) -> None:
    write_image(tmp_path / "pictures" / "1.png")
    row = '{"image": "pictures/1.png", "label": "dog"}\n' if name == "m.jsonl" else "image,label\npictures/1.png,dog\n"
    (tmp_path / name).write_text(row)
    assert examples_of("image_classification", tmp_path / name) == [
        LabelledImage(str(tmp_path / "pictures" / "1.png"), "dog")
    ]


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_a_manifest_of_sounds(name: str, tmp_path: Path) -> None:
    write_wav(tmp_path / "1.wav", np.zeros((80, 1), np.int16), sampling_rate=8000)
    (tmp_path / name).write_text(
        '{"audio": "1.wav", "text": "hi"}\n' if name == "m.jsonl" else "audio,text\n1.wav,hi\n"
    )
    assert examples_of("speech_recognition", tmp_path / name) == [Utterance(str(tmp_path / "1.wav"), "hi")]
    made = parser("speech_recognition", tmp_path / name)
    for number, row in rows_of(tmp_path / name):
        made.parse(number, row)
    assert made.sampling_rates == {8000: 1} and made.schema == "speech_recognition (audio, text)"


@pytest.mark.parametrize(("sample_bytes", "kind"), [(1, np.uint8), (2, np.int16), (4, np.int32)])
def test_read_wav_means_channels_and_scales(sample_bytes: int, kind: Any, tmp_path: Path) -> None:
    middle, top = (128, 127) if sample_bytes == 1 else (0, np.iinfo(kind).max)
    frames = np.array([[middle, middle], [middle + top // 2, middle + top // 2], [middle + top, middle]], kind)
    write_wav(tmp_path / "a.wav", frames, 22050, sample_bytes)
    samples, sampling_rate = read_wav(tmp_path / "a.wav")
    assert samples.dtype == np.float32 and sampling_rate == 22050
    np.testing.assert_allclose(samples, [0, 0.5, 0.5], atol=0.01)


def test_fingerprints_know_every_file(tmp_path: Path) -> None:
    (tmp_path / "t.en").write_text("a\n")
    (tmp_path / "t.de").write_text("b\n")
    pair = source(tmp_path / "t.{en,de}")
    first = fingerprint(pair)
    assert first != fingerprint(source(tmp_path / "t.{de,en}")), "the order is the direction"
    (tmp_path / "t.de").write_text("c\n")
    assert first.startswith("sha256:") and fingerprint(pair) != first
    write_image(tmp_path / "x" / "cat" / "1.png")
    write_image(tmp_path / "x" / "dog" / "1.png", (0, 0, 255))
    before = fingerprint(source(tmp_path / "x"))
    shutil.move(tmp_path / "x", tmp_path / "y")
    assert fingerprint(source(tmp_path / "y")) == before, "a folder may move"
    (tmp_path / "y" / "cat" / "1.png").rename(tmp_path / "y" / "dog" / "2.png")
    assert fingerprint(source(tmp_path / "y")) != before, "a label has changed"


def test_a_broken_sentence_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("a\tO\n\nb\nc\tO\n\nd\tO\n")
    first, broken, last = rows_of(path)
    assert (first[0], broken[0], last[0]) == (1, 3, 6) and isinstance(broken[1], RowError)
    assert last[1] == {"words": ["d"], "tags": ["O"]}
