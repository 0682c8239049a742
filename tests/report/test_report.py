"""The report: self-contained, escaped, and made from whatever a run left behind."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.errors import RunError
from qlora_kit.report import write_report
from qlora_kit.report.page import readable

TRAIN: dict[str, Any] = {
    "kind": "train",
    "loss": 2.0,
    "lr": 1e-4,
    "grad_norm": 0.7,
    "tokens": 64,
    "loss_tokens": 20,
    "tokens_per_s": 300.0,
    "rss_bytes": 2**30,
    "gpu_bytes": None,
}


def train_line(step: int, **changes: Any) -> str:
    return json.dumps(TRAIN | {"step": step, "elapsed_s": 2.0 * step} | changes)


def eval_line(step: int, loss: float) -> str:
    return json.dumps(
        {"kind": "eval", "step": step, "loss": loss, "perplexity": math.exp(loss), "loss_tokens": 9, "best": True}
    )


MANIFEST = {
    "format": "qlora-run/1",
    "name": "reviews",
    "created": "2026-01-01T00:00:00+00:00",
    "status": "finished",
    "step": 60,
    "recipe_sha256": "ab12",
    "base": {"model": "tiny"},
    "data": {"sources": [{"path": "train.jsonl", "rows": 1200, "skipped": {"overlong": 3}}], "eval_rows": 50},
    "tools": {"torch": "2.13.0"},
    "machine": {"cpu": "Some CPU", "memory_bytes": 8 * 2**30},
    "notes": ["optimizer adamw_8bit needs CUDA; torch AdamW takes its place"],
    "resumes": [30],
    "results": {
        "best_step": 50,
        "best_eval_loss": 0.5,
        "trainable_params": 12345,
        "wall_s": 3720.0,
        "tokens_per_s": 321.0,
    },
}
RESULTS = {
    "format": "qlora-eval/1",
    "rows": 80,
    "forms": {
        "base": {"loss": {"value": 1.5, "low": 1.4, "high": 1.6}, "perplexity": None, "accuracy": None, "rows": 80},
        "tuned": {"accuracy": {"value": 0.875, "low": 0.8, "high": 0.95}, "rows": 80, "seconds": 12.5},
    },
    "pairs": [
        {"a": "tuned", "b": "base", "metric": "accuracy", "difference": 0.25, "low": 0.1, "high": 0.4, "disagree": 0.3}
    ],
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "reviews"
    (folder / "eval").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("run:\n  name: reviews\n")
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    (folder / "samples.json").write_text(json.dumps([{"prompt": "Is it good?", "expected": "yes", "answer": "no"}]))
    (folder / "eval" / "results.json").write_text(json.dumps(RESULTS))
    lines = [train_line(step, loss=2 / step) for step in range(1, 61)] + [eval_line(30, 0.8), eval_line(60, 0.5)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is never closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def page_of(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def test_everything_is_on_the_page(run_dir: Path) -> None:
    page = page_of(run_dir)
    text = re.sub(r"\s+", " ", page.text)
    for words in (
        *(
            "reviews",
            "finished",
            "0.5",
            "step 50; perplexity 1.65",
            "321",
            "1 h 2 min",
            "12,345",
            "1.00 GiB",
            "8.00 GiB",
        ),
        *("Loss", "loss (nats per token)", "train, smoothed", "eval", "optimizer step", "learning rate"),
        *("gradient norm, before clipping", "memory (GiB)", "tokens per second", "resumed after step 30"),
        *("1.500 [1.400, 1.600]", "87.5 [80.0, 95.0]", "tuned − base", "25.0 [10.0, 40.0]", "30.0"),
        *("Is it good?", "torch AdamW takes its place", "1,200", "overlong", "Some CPU", "2.13.0"),
        *("run: name: reviews", "ab12"),
    ):
        assert words in text, words
    assert page.tags.count("svg") == 5


def test_so_few_rows_have_no_interval(run_dir: Path) -> None:
    (run_dir / "eval" / "results.json").write_text(json.dumps(RESULTS | {"rows": 2}))
    text = page_of(run_dir).text
    assert all(words in text for words in ("1.500 –", "87.5 –", "25.0 –")) and "[1.400" not in text


def test_nothing_is_loaded_from_anywhere(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "onload"} & {name for name, _ in page.attributes}
    html = (run_dir / "report.html").read_text()
    assert "http://" not in html and "https://" not in html and "@import" not in html and "url(" not in html
    assert "prefers-color-scheme: dark" in html and "default-src 'none'" in html


HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def test_text_of_the_run_is_escaped(run_dir: Path) -> None:
    samples = [{"prompt": HOSTILE, "expected": HOSTILE, "answer": HOSTILE}]
    (run_dir / "samples.json").write_text(json.dumps(samples))
    (run_dir / "recipe.yaml").write_text(f"run: {HOSTILE}")
    hostile = {
        "name": HOSTILE,
        "status": f'"{HOSTILE}',
        "notes": [HOSTILE],
        "data": {HOSTILE: HOSTILE},
        HOSTILE: [HOSTILE],
    }
    (run_dir / "manifest.json").write_text(json.dumps(MANIFEST | hostile))
    results = {"forms": {HOSTILE: {"rows": HOSTILE}}, "pairs": [{"a": HOSTILE, "b": HOSTILE, "metric": HOSTILE}]}
    (run_dir / "eval" / "results.json").write_text(json.dumps(results))
    (run_dir / "metrics.jsonl").write_text(train_line(1))
    page = page_of(run_dir)
    assert "script" not in page.tags and "img" not in page.tags
    assert page.text.count(HOSTILE) >= 12


def test_a_torn_last_line_is_told_and_the_rest_shown(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    page = page_of(run_dir)
    assert "1 unreadable line(s)" in page.text and page.tags.count("svg") == 5


def test_an_interrupted_run_is_summed_up_from_its_metrics(run_dir: Path) -> None:
    cut_off = {key: value for key, value in MANIFEST.items() if key not in ("results", "step")} | {"status": "running"}
    (run_dir / "manifest.json").write_text(json.dumps(cut_off))
    text = re.sub(r"\s+", " ", page_of(run_dir).text)
    for words in (
        "running",
        "steps 60",
        "eval loss, best 0.5 step 60",
        "tokens/s 300",
        "peak memory 1.00 GiB",
        "2 min 0 s",
    ):
        assert words in text, words


def test_of_a_step_logged_twice_the_later_counts(run_dir: Path) -> None:
    lines = [train_line(1, loss=9.0), train_line(2, loss=9.0), train_line(2, loss=1.25)]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    text = re.sub(r"\s+", " ", page_of(run_dir).text)
    assert "train loss, last 1.25" in text


@pytest.mark.parametrize(
    "content", ["", "\n\n", "{", "[]\n3\nnull\n", '{"kind": "train"}\n', '{"kind": "train", "step": "x"}']
)
def test_metrics_without_a_usable_line(content: str, run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text(content)
    page = page_of(run_dir)
    assert "No step has been logged yet" in page.text and "svg" not in page.tags


def test_odd_values_leave_gaps(run_dir: Path) -> None:
    lines = [
        train_line(1),
        train_line(2, loss=math.nan, grad_norm=math.inf),
        train_line(3, loss=None),
        train_line(4, lr="x"),
    ]
    (run_dir / "metrics.jsonl").write_text("\n".join(lines))
    html = (write_report(run_dir)).read_text()
    assert "nan" not in re.findall(r' d="([^"]*)"', html) and not re.search(r'[dcx y]="[^"]*(nan|inf)', html)


def test_gpu_memory_is_drawn_where_there_is_one(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text("\n".join(train_line(step, gpu_bytes=3 * 2**30) for step in (1, 2)))
    text = re.sub(r"\s+", " ", page_of(run_dir).text)
    assert "host (RSS) GPU" in text and "GPU 3.00 GiB" in text


@pytest.mark.parametrize("only", ["recipe.yaml", "manifest.json", "metrics.jsonl"])
def test_missing_files_are_told(only: str, run_dir: Path, tmp_path: Path) -> None:
    poor = tmp_path / "poor"
    poor.mkdir()
    (run_dir / only).rename(poor / only)
    text = page_of(poor).text
    for name in {"recipe.yaml", "manifest.json", "metrics.jsonl"} - {only}:
        assert f"{name}: No such file" in text


@pytest.mark.parametrize(
    ("name", "content"), [("manifest.json", "{"), ("samples.json", "{}"), ("eval/results.json", "[1")]
)
def test_damaged_files_are_told(name: str, content: str, run_dir: Path) -> None:
    (run_dir / name).write_text(content)
    assert re.search(rf"{Path(name).name} (is not JSON|holds a dict instead of a list)", page_of(run_dir).text)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", {"results": 3, "notes": "x", "resumes": {}, "data": [], "tools": None, "status": None}),
        ("samples.json", [1, {"prompt": 3}]),
        ("eval/results.json", {"forms": {"a": 1, "b": {"loss": 2}}, "pairs": [1, {}]}),
        ("eval/results.json", {"forms": [], "pairs": {}}),
    ],
)
def test_other_shapes_than_expected_do_not_stop_the_page(name: str, content: Any, run_dir: Path) -> None:
    (run_dir / name).write_text(json.dumps(content))
    assert "reviews" in page_of(run_dir).text


def test_writing_again_replaces_and_leaves_nothing_beside(run_dir: Path) -> None:
    before = {path.name for path in run_dir.iterdir()}
    assert write_report(run_dir) == write_report(run_dir) == run_dir / "report.html"
    assert {path.name for path in run_dir.iterdir()} == before | {"report.html"}


def test_no_run_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunError, match=r"is no run folder.*Allowed: a folder with recipe\.yaml"):
            write_report(folder)


@pytest.mark.parametrize(
    ("value", "key", "words"),
    [
        (True, "", "yes"),
        (None, "", "–"),
        ("text", "", "text"),
        (math.inf, "", "inf"),
        (2**20, "rss_bytes", "1.0 MiB"),
        (2**31, "peak_rss_bytes", "2.00 GiB"),
        (59.25, "seconds", "59.2 s"),
        (61, "wall_s", "1 min 1 s"),
        (7384, "wall_s", "2 h 3 min"),
        (1234567, "rows", "1,234,567"),
        (0.000123456, "lr", "0.0001235"),
    ],
)
def test_readable(value: Any, key: str, words: str) -> None:
    assert readable(value, key) == words


def test_reporting_imports_no_torch() -> None:
    script = "import sys, qlora_kit.report; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
