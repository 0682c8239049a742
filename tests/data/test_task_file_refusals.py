"""What is said of CoNLL, SQuAD, parallel text, images and sounds that cannot be used; errors name file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_rows import refuse, source, write_image, write_wav

from qlora_kit.data.examples import RowError
from qlora_kit.data.sources import is_file_source
from qlora_kit.data.task_readers.images import read_image
from qlora_kit.data.task_readers.wav import read_wav
from qlora_kit.errors import DataError

CONLL = [
    (
        b"a\tO\nb\nc\tO\n",
        r"row 1: line 2: a word without tag, where the lines before have 2 columns \(parted by tabs\)",
    ),
    (b"a\tO\nb\t\n", r"row 1: line 2: a word without tag.*got 'b'"),
    (b"a\tO\n\nx\tO\n\tO\n", r"row 3: line 4: no word before its tag \(got '\\tO'\)"),
    (b"a\tO\nb O\n", r"row 1: line 2: a word without tag.*parted by tabs.*got 'b O'"),
    (b"a NN O\nb O\n", r"line 2: 2 columns, where the lines before have 3 columns \(parted by white space\)"),
    (b"a\tO\n#tag\n", r"line 2: a word without tag.*A comment starts with '# '"),
    (b"a\nb\tO\n", r"line 2: 2 columns, where the lines before have 1"),
    (b"a\tO\nK\xf6ln\tO\n", r"row 1: line 2: not UTF-8: byte 0xf6 at byte 2 of the line.*iconv"),
    (b"a\tO\n\nb\tI-X\n", r"row 3: tags\[0\] of 'b' is I-X after O"),
]


@pytest.mark.parametrize(("content", "message"), CONLL)
def test_conll_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.conll").write_bytes(content)
    refuse("tagging", tmp_path / "bad.conll", rf"bad\.conll {message if message[:3] == 'row' else 'row 1: ' + message}")


FILES = [
    ("bad.conll", None, r"no file .*bad\.conll"),
    ("bad.conll", b"", r"bad\.conll is empty \(0 bytes\)"),
    ("bad.conll", b"-DOCSTART-\n\n \n", r"bad\.conll holds no rows"),
    ("bad.conll", "a\tO\n".encode("utf-16"), r"bad\.conll is UTF-16, not UTF-8"),
    ("bad.txt", b"a sentence, no CoNLL\n", r"bad\.txt: unknown file ending"),
]


@pytest.mark.parametrize(("name", "content", "message"), FILES)
def test_files(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    refuse("tagging", tmp_path / name, message, DataError)


def squad(**question: Any) -> Any:
    row = {"id": "7", "question": "q?", "answers": [{"text": "b", "answer_start": 2}]} | question
    return {"data": [{"paragraphs": [{"context": "a b", "qas": [row]}]}]}


ANSWER = {"text": "b", "answer_start": 2}
SQUAD = [
    (squad(answers=[{"text": "b", "answer_start": 0}]), r"id '7': answer 1 'b' should start at 0, where .* 'a'.*at 2"),
    (
        squad(answers=[ANSWER, {"text": "c", "answer_start": 9}]),
        r"id '7': answer 2 'c'.*has ''.*does not have it at all",
    ),
    (squad(answers=[{"text": "b", "answer_start": -1}]), r"id '7': answer 1 has no answer_start \(got -1\)"),
    (squad(answers=[{"text": "b"}]), r"id '7': answer 1 has no answer_start \(got None\)"),
    (squad(answers=[{"text": "", "answer_start": 0}]), r"id '7': answer 1 has no text"),
    (squad(answers=["b"]), r"id '7': answers holds no answers \(got \['b'\]\)"),
    (squad(answers="b"), r"data\[0\]\.paragraphs\[0\]\.qas\[0\]\.answers is no list \(got 'b'\)"),
    (squad(answers=[]), r"id '7': no answer\. Set task\.unanswerable: true"),
    (squad(answers=[], is_impossible=False), r"id '7': is_impossible is False, but there are 0 answers"),
    (squad(is_impossible=True), r"id '7': is_impossible is True, but there are 1 answers"),
    (squad(question=" "), r"question is empty"),
    (squad(question=None), r"question is null"),
    (
        {"data": [{"paragraphs": [{"context": 5, "qas": [{"id": "7"}]}]}]},
        r"paragraphs\[0\]\.context is no text \(got 5",
    ),
    ({"data": [{"paragraphs": 5}]}, r"data\[0\]\.paragraphs is no list \(got 5\)"),
    ({"data": [{"paragraphs": [{"context": "c"}]}]}, r"paragraphs\[0\]\.qas is no list \(got None\)"),
    ({"data": [5, {"paragraphs": []}]}, r"data\[0\] is no object \(got 5\)"),
    ({"data": squad()["data"] * 2}, r"id '7' stands at question 1 already"),
]


@pytest.mark.parametrize(("tree", "message"), SQUAD)
def test_squad_files(tree: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(tree))
    refuse("question_answering", tmp_path / "bad.json", rf"bad\.json row \d: .*{message}")


PARALLEL = [
    (b"a\nb\n", b"x\n", DataError, r"bad\.en has 2 lines, .*bad\.de has 1.*an empty line keeps the place"),
    (b"a\nb\n", b"x\n\n", RowError, r"row 2: empty in bad\.de, but not in bad\.en"),
    (b" \nb\n", b"x\ny\n", RowError, r"row 1: empty in bad\.en, but not in bad\.de"),
    (b"a\nb\n", b"x\nK\xf6ln\n", RowError, r"row 2: bad\.de: not UTF-8: byte 0xf6.*iconv"),
    (b"K\xf6ln\n", b"x\n", RowError, r"row 1: bad\.en: not UTF-8"),
    (b"a\n", None, DataError, r"no file .*bad\.de"),
    (b"", b"x\n", DataError, r"bad\.en is empty \(0 bytes\)"),
    (b"\xff\xfea\x00", b"x\n", DataError, r"bad\.en is UTF-16"),
    (b"\n\n", b"\n\n", DataError, r"bad\.\{en,de\} holds no rows"),
]


@pytest.mark.parametrize(("left", "right", "kind", "message"), PARALLEL)
def test_parallel_text(left: bytes, right: bytes | None, kind: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.en").write_bytes(left)
    if right is not None:
        (tmp_path / "bad.de").write_bytes(right)
    refuse("seq2seq", tmp_path / "bad.{en,de}", message, kind)


def test_a_pair_of_files_has_no_revision() -> None:
    with pytest.raises(DataError, match=r"revision means a hub id's version; a\.\{en,de\} is a file \(got 'v1'\)"):
        is_file_source(source("a.{en,de}", revision="v1"))


FOLDERS = [
    ("readme.txt", b"x", r"row 2: readme\.txt stands in no label's folder"),
    ("0.png", b"x", r"row 1: 0\.png stands in no label's folder.*Move it"),
    ("cat/notes.md", b"x", r"row 2: .*notes\.md is no image, by its ending\. Allowed: \.jpg"),
    ("cat/more/1.png", b"x", r"row 2: .*more is a folder in a label's folder"),
    ("dog/.hidden", b"x", r"row 2: .*dog is a label's folder without images"),
    ("cat/2.png", b"no image", r"row 2: .*2\.png is no image that can be read: cannot identify"),
    ("cat/2.png", b"", r"row 2: .*2\.png is no image that can be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), FOLDERS)
def test_folders_of_images(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    write_image(tmp_path / "bad" / "cat" / "1.png")
    (tmp_path / "bad" / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / "bad" / name).write_bytes(content)
    refuse("image_classification", tmp_path / "bad", message)


def test_a_cut_image_shows_when_it_is_read(tmp_path: Path) -> None:
    write_image(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-100])
    with pytest.raises(RowError, match=r"cut\.jpg is no image that can be read: (?i:.*truncated)"):
        read_image(tmp_path / "cut.jpg")


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("image,label\nx/1.png,dog\n")
    refuse("image_classification", tmp_path / "bad.csv", r"bad\.csv row 2: no file .*1\.png.*folder of the manifest")


def test_an_image_with_an_unknown_label(tmp_path: Path) -> None:
    write_image(tmp_path / "bad" / "dgo" / "1.png")
    message = r"bad row 1: label has 'dgo'.*Did you mean 'dog'"
    refuse("image_classification", tmp_path / "bad", message, labels=["cat", "dog"])


def _cut(path: Path) -> None:
    write_wav(path, np.zeros((900, 1), np.int16))
    path.write_bytes(path.read_bytes()[:-1])


SOUNDS = [
    (lambda path: None, r"no file .*1\.wav.*folder of the manifest"),
    (lambda path: path.write_bytes(b""), r"1\.wav is no \.wav file that can be read: it ends too early"),
    (
        lambda path: path.write_bytes(b"ID3 not a wav at all"),
        r"no \.wav file that can be read: file does not start with",
    ),
    (lambda path: write_wav(path, np.zeros((0, 1), np.int16)), r"1\.wav holds no sound"),
    (_cut, r"1\.wav is cut: 1843 bytes, where its header promises 1800 of sound"),
    (
        lambda path: write_wav(path, np.zeros((8, 3), np.uint8), sample_bytes=3),
        r"1\.wav has 24 bit at 16000 Hz.*ffmpeg",
    ),
]


def test_sounds_with_changed_bytes_are_read_or_refused(tmp_path: Path) -> None:
    write_wav(tmp_path / "1.wav", np.arange(50, dtype=np.int16)[:, None])
    whole, outcomes = (tmp_path / "1.wav").read_bytes(), set()
    for place in range(44):
        for value in (0, 1, 5, 127, 255):
            (tmp_path / "1.wav").write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                outcomes.add(read_wav(tmp_path / "1.wav")[0].dtype.name)
            except RowError as error:
                outcomes.add(error.reason)
    assert outcomes == {"float32", "unreadable audio", "empty audio", "audio cut"}


@pytest.mark.parametrize(("write", "message"), SOUNDS)
def test_sounds(write: Any, message: str, tmp_path: Path) -> None:
    write(tmp_path / "1.wav")
    (tmp_path / "bad.csv").write_text("audio,text\n1.wav,hello\n")
    refuse("speech_recognition", tmp_path / "bad.csv", rf"bad\.csv row 2: .*{message}")


def test_a_sound_without_words(tmp_path: Path) -> None:
    write_wav(tmp_path / "1.wav", np.zeros((8, 1), np.int16))
    (tmp_path / "bad.csv").write_text("audio,text\n1.wav,\n")
    refuse("speech_recognition", tmp_path / "bad.csv", r"bad\.csv row 2: text is empty")
