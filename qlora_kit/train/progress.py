"""What a run shows while it trains: a live line for people, JSON lines for programs, or nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

if TYPE_CHECKING:
    from qlora_kit.train.checkpoint import TrainState
    from qlora_kit.train.session import Session

Mode = Literal["rich", "json", "quiet"]


class Progress(Protocol):
    """How the loop tells what it does."""

    def start(self, session: Session, state: TrainState) -> None: ...
    def say(self, text: str) -> None: ...
    def show(self, record: dict[str, Any]) -> None: ...
    def finish(self, adapter: Path, step: int, eval_loss: float | None) -> None: ...
    def stop(self) -> None: ...


def make_progress(mode: Mode) -> Progress:
    return {"rich": LiveProgress, "json": JsonProgress, "quiet": QuietProgress}[mode]()


class QuietProgress:
    """Says nothing; errors still go to standard error."""

    def start(self, session: Session, state: TrainState) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def show(self, record: dict[str, Any]) -> None:
        pass

    def finish(self, adapter: Path, step: int, eval_loss: float | None) -> None:
        pass

    def stop(self) -> None:
        pass


class JsonProgress(QuietProgress):
    """Each line of metrics.jsonl, and a first and last event, to standard output as it is made.

    `train` lines have eta_s too, the seconds left at this process' pace; it is no result and so in no file.
    """

    def start(self, session: Session, state: TrainState) -> None:
        self.total, self.began = session.total_steps, (state.step, state.elapsed_s)
        self._write({"kind": "start", "step": state.step, "total_steps": session.total_steps, "notes": session.notes})

    def say(self, text: str) -> None:
        self._write({"kind": "note", "text": text})

    def show(self, record: dict[str, Any]) -> None:
        self._write(record | {"eta_s": self._seconds_left(record)} if record["kind"] == "train" else record)

    def finish(self, adapter: Path, step: int, eval_loss: float | None) -> None:
        self._write({"kind": "finish", "adapter": str(adapter), "step": step, "eval_loss": eval_loss})

    def _seconds_left(self, record: dict[str, Any]) -> float:
        first, elapsed = self.began
        a_step = (record["elapsed_s"] - elapsed) / max(1, record["step"] - first)
        return a_step * (self.total - record["step"])

    def _write(self, record: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()


class LiveProgress(QuietProgress):
    """A bar with loss, rate, memory and time left, a line for each evaluation; plain lines off a terminal."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
        )
        self.bar = RichProgress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task: TaskID | None = None
        self.total = 0

    def start(self, session: Session, state: TrainState) -> None:
        self.total = session.total_steps
        trained = sum(p.numel() for p in session.optimizer.parameters.values())
        self._print(
            f"{session.recipe.base.model}: {session.recipe.base.quant} base, {trained:,} trained weights, "
            f"{session.total_steps} steps, into {session.run.path}"
        )
        for note in session.notes:
            self.say(note)
        if state.step:
            self._print(f"resumed at step {state.step}")
        self.bar.start()
        self.task = self.bar.add_task("train", total=self.total, completed=state.step, values="")

    def say(self, text: str) -> None:
        self._print(f"note: {text}")

    def show(self, record: dict[str, Any]) -> None:
        if record["kind"] == "eval":
            best = " (best)" if record["best"] else ""
            perplexity = f", perplexity {record['perplexity']:.3f}" if "perplexity" in record else ""
            self._print(f"step {record['step']}: eval loss {record['loss']:.4f}{perplexity}{best}")
            return
        norm = "overflow" if record["grad_norm"] is None else f"{record['grad_norm']:.2f}"
        gpu = f"  GPU {record['gpu_bytes'] / 2**30:.2f} GiB" if record.get("gpu_bytes") else ""
        values = (
            f"loss {record['loss']:.4f}  grad {norm}  {record['tokens_per_s']:,.0f} tok/s"
            f"  {record['rss_bytes'] / 2**30:.2f} GiB{gpu}"
        )
        if self.task is not None:
            self.bar.update(self.task, completed=record["step"], values=values)
        if not self.console.is_terminal and (record["step"] % 10 == 0 or record["step"] == self.total):
            self._print(f"step {record['step']}/{self.total}  {values}")

    def finish(self, adapter: Path, step: int, eval_loss: float | None) -> None:
        held_out = "" if eval_loss is None else f", eval loss {eval_loss:.4f}"
        self._print(f"done: {adapter} holds the adapter of step {step}{held_out}")

    def stop(self) -> None:
        self.bar.stop()

    def _print(self, text: str) -> None:
        """As it stands: no wrapping where there is no terminal, no brackets read as colours."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
