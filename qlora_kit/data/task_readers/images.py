"""Folders of images with a subfolder for each label, and the images themselves, through Pillow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.data.examples import RowError
from qlora_kit.data.raw_rows import RawRow

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_LEFT_BEHIND = ("thumbs.db", "desktop.ini")  # by file managers


def is_image_folder(path: Path) -> bool:
    """True where there are image files in a folder or in its subfolders."""
    if not path.is_dir():
        return False
    entries = [entry for entry in path.iterdir() if _counts(entry)]
    files = (file for entry in entries for file in ([entry] if entry.is_file() else entry.glob("*")))
    return any(_is_image(file) and _counts(file) for file in files)


def image_folder_rows(folder: Path) -> Iterator[RawRow]:
    """Rows with `image` (path below the folder) and `label` (name of the subfolder), sorted by path.

    A folder without subfolders gives rows without `label`, for prediction. Hidden files and folders are passed over.
    """
    entries = [entry for entry in sorted(folder.iterdir()) if _counts(entry)]
    flat = not any(entry.is_dir() for entry in entries)
    number = 0
    for entry in entries:
        inside = [file for file in sorted(entry.iterdir()) if _counts(file)] if entry.is_dir() else [entry]
        if not inside:
            number += 1
            problem = f"{entry} is a label's folder without images"
            yield RawRow(number, RowError(problem, reason="label without images", fix="Fill it or delete it"))
        for file in inside:
            number += 1
            name = str(file.relative_to(folder))
            if flat:
                yield RawRow(number, _problem(file) or {"image": name})
            elif file is entry:
                problem = f"{name} stands in no label's folder"
                yield RawRow(number, RowError(problem, reason="image without label", fix="Move it into one"))
            else:
                yield RawRow(number, _problem(file) or {"image": name, "label": entry.name})


def image_files(folder: Path) -> list[Path]:
    """The image files that the rows of a folder name, sorted."""
    values = [row.value for row in image_folder_rows(folder)]
    return [folder / value["image"] for value in values if isinstance(value, dict)]


def check_image(path: Path) -> None:
    """Nothing, where a file is an image.

    Raises:
        RowError: there is no such file, or it is no image; one that is cut may show only to `read_image`.
    """
    _open(path, whole=False)


def read_image(path: Path) -> Image:
    """The image in RGB.

    Raises:
        RowError: there is no such file, or it is no whole image.
    """
    return _open(path, whole=True)


def _open(path: Path, whole: bool) -> Image:
    from PIL import Image

    if not path.is_file():
        raise RowError(f"no file {path}", reason="no image file", fix="Paths start at the folder of the manifest")
    try:
        with Image.open(path) as image:
            if whole:
                return image.convert("RGB")
            image.verify()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, of broken files
        problem = f"{path} is no image that can be read: {error}"
        raise RowError(problem, reason="no image", fix="Replace it, or set data.bad_rows: skip") from None


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in ENDINGS and file.is_file()


def _counts(entry: Path) -> bool:
    return not entry.name.startswith((".", "__")) and entry.name.lower() not in _LEFT_BEHIND


def _problem(file: Path) -> RowError | None:
    if _is_image(file):
        return None
    what = "a folder in a label's folder" if file.is_dir() else "no image, by its ending"
    return RowError(f"{file} is {what}", reason="no image", allowed=", ".join(ENDINGS), fix="Move it elsewhere")
