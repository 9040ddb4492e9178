"""What the autotuner remembers between processes: one JSON file of choices, which may be lost at any time without harm.

It is shared by all processes of a user. A writer reads it again, adds what it measured and replaces the file as a whole; of two
that do so at the same moment one may lose its entries, which are then written again with that process's next ones or measured
anew. Nothing that is wrong with the file stops a program: a warning, once, and the choices are kept in memory.
"""
from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ddpm_fast.io.files import atomic_write

SCHEMA = 1  # a file of another one is not read
MAX_ENTRIES = 1000  # some 300 bytes each; the newest stay


@dataclass(frozen=True)
class Choice:
    """One decision. The first five fields are what it holds for."""

    device: str
    torch: str
    ddpm_fast: str
    op: str
    key: str
    chosen: str
    seconds: dict[str, float]  # median time of a call, of each candidate that was timed
    ruled_out: dict[str, str]  # candidate to the reason
    time: float = field(default_factory=time.time)  # when it was made, seconds since 1970

    @property
    def identity(self) -> tuple[str, ...]:
        return self.device, self.torch, self.ddpm_fast, self.op, self.key

    def is_among(self, candidates: Iterable[str]) -> bool:
        """Whether it was made among just these."""
        return self.seconds.keys() | self.ruled_out.keys() == set(candidates)


def cache_path() -> Path | None:
    """``ddpm_fast/autotune.json`` in the user's cache folder; None where there is no home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not folder.is_absolute():  # the XDG specification: a relative one is to be ignored
        try:
            folder = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
        except RuntimeError:
            return None
    return folder / "ddpm_fast" / "autotune.json"


class ChoiceFile:
    """The file; it is looked for anew each time.

    Args:
        path: where it is; by default `cache_path()`, and nothing is kept where that is None.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._warned = False

    @property
    def path(self) -> Path | None:
        return self._path or cache_path()

    def read(self) -> dict[tuple[str, ...], Choice]:
        """Identity to choice; empty where there is no file or it cannot be read."""
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                return {}
            entries = list(content["choices"])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            self._warn("read", error)
            return {}
        choices = [choice for choice in map(_choice, entries) if choice is not None]
        return {choice.identity: choice for choice in choices}

    def add(self, choices: Iterable[Choice]) -> None:
        """Writes these over what the file has by now for the same, the oldest of all left out beyond `MAX_ENTRIES`."""
        if self.path is None:
            return
        merged = self.read() | {choice.identity: choice for choice in choices}
        newest = sorted(merged.values(), key=lambda choice: choice.time)[-MAX_ENTRIES:]
        text = json.dumps({"schema": SCHEMA, "choices": [asdict(choice) for choice in newest]}, indent=1)
        try:
            with atomic_write(self.path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        except OSError as error:
            self._warn("write", error)

    def remove(self) -> None:
        if self.path is None:
            return
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            self._warn("remove", error)

    def _warn(self, verb: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            reason = f"cannot {verb} {self.path} ({type(error).__name__}: {error}); its choices are kept for this process only"
            warnings.warn(f"ddpm_fast.autotune {reason}", RuntimeWarning, stacklevel=2)


def _choice(entry: object) -> Choice | None:
    """An entry of the file; None for one that this version would not have written."""
    if not isinstance(entry, dict) or entry.keys() != {f.name for f in fields(Choice)}:
        return None
    texts = [entry[name] for name in ("device", "torch", "ddpm_fast", "op", "key", "chosen")]
    seconds, ruled_out = entry["seconds"], entry["ruled_out"]
    if not (isinstance(seconds, dict) and isinstance(ruled_out, dict)) or entry["chosen"] not in seconds:
        return None
    numbers = [entry["time"], *seconds.values()]
    if not all(isinstance(text, str) for text in (*texts, *ruled_out.values())):
        return None
    if not all(isinstance(number, (int, float)) and math.isfinite(number) and number > 0 for number in numbers):
        return None
    return Choice(**entry)
