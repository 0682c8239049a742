"""Where an adapter lies, whether a run, a checkpoint or the adapter's own folder is named."""

from __future__ import annotations

from pathlib import Path

from qlora_kit.adapters.files import CONFIG
from qlora_kit.errors import AdapterError


def named_folder(text: str | Path) -> tuple[str, Path]:
    """(name, folder) of NAME=FOLDER, or of a folder, which is called after itself."""
    name, _, place = ("", "", str(text)) if Path(text).exists() else str(text).rpartition("=")
    return name or Path(place).resolve().name, Path(place)


def adapter_folder(path: Path) -> Path:
    """`path` itself where it holds an adapter, else PATH/adapter.

    Raises:
        AdapterError: neither does.
    """
    for folder in (path, path / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    if not path.is_dir():
        raise AdapterError(f"no folder {path}", fix="Give a run folder, or a folder with an adapter")
    raise AdapterError(
        f"{path} holds no adapter: neither {CONFIG} nor adapter/{CONFIG} is there",
        fix="Give a finished run, or a folder that PEFT or train wrote",
    )
