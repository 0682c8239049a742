"""Sounds in .wav files (PCM), through the standard library."""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_kit.data.examples import RowError


@dataclass(frozen=True)
class WavHeader:
    """What a .wav file says of itself."""

    channels: int
    sample_bytes: int
    sampling_rate: int
    """In Hz."""
    frames: int


def wav_header(path: Path) -> WavHeader:
    """The header of a file that holds all the frames it promises.

    Raises:
        RowError: there is no such file, it is no PCM .wav file, or it is silent or cut.
    """
    with _opened(path) as file:
        header = WavHeader(file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes())
    if header.frames == 0:
        raise RowError(
            f"{path} holds no sound", reason="empty audio", fix="Record it again, or set data.bad_rows: skip"
        )
    if header.sample_bytes not in _KINDS or header.sampling_rate == 0:
        raise RowError(f"{path} has {header.sample_bytes * 8} bit at {header.sampling_rate} Hz", **_CONVERT)
    promised = header.frames * header.channels * header.sample_bytes
    if path.stat().st_size < promised + _HEADER_BYTES:
        raise _cut(path, promised)
    return header


def read_wav(path: Path) -> tuple[np.ndarray, int]:
    """(samples float32 [samples] from -1 to 1, the mean of all channels; sampling rate in Hz).

    Raises:
        RowError: see `wav_header`.
    """
    header = wav_header(path)
    with _opened(path) as file:
        data = file.readframes(header.frames)
    promised = header.frames * header.channels * header.sample_bytes
    if len(data) < promised:
        raise _cut(path, promised)
    samples = np.frombuffer(data, dtype=_KINDS[header.sample_bytes]).astype(np.float32)
    middle = 128 if header.sample_bytes == 1 else 0  # of the three only 8 bit counts from 0
    scale = 2.0 ** (8 * header.sample_bytes - 1)
    return ((samples - middle) / scale).reshape(-1, header.channels).mean(1), header.sampling_rate


_KINDS = {1: "u1", 2: "<i2", 4: "<i4"}  # bytes of a sample: what numpy calls it
_HEADER_BYTES = 44  # at least: RIFF, fmt and data, each with its length
_CONVERT = {
    "reason": "unreadable audio",
    "allowed": ".wav with 8, 16 or 32 bit PCM",
    "fix": "Convert it, for example: ffmpeg -i FILE -ac 1 -ar 16000 -c:a pcm_s16le FILE.wav",
}


def _opened(path: Path) -> wave.Wave_read:
    if not path.is_file():
        raise RowError(f"no file {path}", reason="no audio file", fix="Paths start at the folder of the manifest")
    try:
        return wave.open(str(path), "rb")
    except (wave.Error, EOFError, RuntimeError) as error:  # the last: a chunk that ends beyond the file
        raise RowError(
            f"{path} is no .wav file that can be read: {str(error) or 'it ends too early'}", **_CONVERT
        ) from None


def _cut(path: Path, promised: int) -> RowError:
    problem = f"{path} is cut: {path.stat().st_size} bytes, where its header promises {promised} of sound"
    return RowError(problem, reason="audio cut", fix="Copy it again")
