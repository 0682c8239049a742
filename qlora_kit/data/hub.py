"""Rows of a dataset on the Hugging Face hub, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_kit.errors import DataError
from qlora_kit.recipe import DataSource


def hub_rows(source: DataSource, streaming: bool) -> Iterator[dict[str, Any]]:
    """Rows of `owner/name`, `owner/name:config` or `owner/name:config@split`; the source's split if none is named.

    Raises:
        DataError: there is no such dataset, config or split, or the hub cannot be reached.
    """
    yield from _load(source, streaming)


def hub_fingerprint(source: DataSource, streaming: bool) -> str:
    """`revision:...` as the recipe gives it, so the same without a network; a branch or tag is taken at its word.

    Without a revision `commit:...` where the hub can be asked, otherwise `fingerprint:...` of the cached dataset.

    Raises:
        DataError: neither can be had.
    """
    from huggingface_hub import dataset_info

    if source.revision is not None:
        return f"revision:{source.revision}"

    try:
        return f"commit:{dataset_info(_parts(source)[0], timeout=10).sha}"
    except _hub_errors():
        # Offline with a filled cache is a supported way to work; a stream has no cache to fingerprint.
        mark = getattr(_load(source, streaming), "_fingerprint", None)
    if mark is None:
        raise DataError(f"{source.path}: the hub does not say which version this is", fix="Check the network")
    return f"fingerprint:{mark}"


def _parts(source: DataSource) -> tuple[str, str | None, str]:
    path, _, split = source.path.partition("@")
    name, _, config = path.partition(":")
    return name, config or None, split or source.split


def _load(source: DataSource, streaming: bool) -> Any:
    import datasets

    name, config, split = _parts(source)
    try:
        return datasets.load_dataset(name, config, split=split, revision=source.revision, streaming=streaming)
    except _hub_errors() as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        version = f", revision {source.revision!r}" if source.revision is not None else ""
        raise DataError(
            f"{source.path} (split {split!r}{version}): neither a file here nor a hub dataset that loads: {first_line}",
            allowed="a file path with its ending, or owner/name[:config][@split]",
            fix="Check the spelling, the split, the revision and the network",
        ) from None


def _hub_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # A lost connection surfaces as an error of the hub client's HTTP library, which is another one in each of
    # its major versions; HfHubHTTPError derives from that library's base error.
    return (OSError, ValueError, RuntimeError, DatasetsError, *HfHubHTTPError.__bases__)
