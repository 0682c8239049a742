"""Bundles that generate: a decoder alone, or an encoder and a decoder."""

from pathlib import Path

from qlora_runtime.bundle import Bundle
from qlora_runtime.schema import read_manifest
from qlora_runtime.seq2seq import Seq2SeqBundle
from qlora_runtime.task import Seq2SeqTask

GeneratingBundle = Bundle | Seq2SeqBundle


def open_generating(
    path: Path | str, check_hashes: bool = True, threads: int | None = None
) -> GeneratingBundle:
    """The bundle in the folder `path`, of either kind; arguments and errors as for `Bundle.open`."""
    kind = Seq2SeqBundle if isinstance(read_manifest(path).task, Seq2SeqTask) else Bundle
    return kind.open(path, check_hashes, threads)
