"""Messages of the command line for errors: one line, with the names of options in place of arguments."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator, Mapping
from typing import Any

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)
_AMOUNT = re.compile(r"allocate ([\d.]+ ?(?:bytes|[KMGTPE]i?B))")


def explain(error: Exception, options: Mapping[str, str], batch: int | None = None) -> str | None:
    """Message for an error that a user can mend; None for any other, which is a fault of the program.

    Args:
        options: the command's options, by the names of their Python arguments.
        batch: the value of --batch.
    """
    if is_out_of_memory(error):
        cure = f"; fewer images at a time need less: --batch{'' if batch is None else f', now {batch}'}" if "batch" in options else ""
        return f"out of memory{_amount(error)}{cure}"
    if isinstance(error, OSError) and error.errno == errno.EPIPE:  # `ddpm-fast info | head`: click knows what to do
        return None
    if isinstance(error, OSError) and error.strerror and error.filename is not None and error.filename2 is None:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return in_options(" ".join(str(error).splitlines()), options) if isinstance(error, ValueError | OSError | FloatingPointError) else None


def in_options(text: str, options: Mapping[str, str]) -> str:
    """Message of the library with the names of arguments replaced by options: "learning_rate must be" becomes "--lr must be".

    A name with an underscore is replaced everywhere. A name without one may be a plain word: it is replaced only before "must",
    "needs", "is of", "=" and a quoted value.
    """
    for name, option in options.items():
        if option in text:
            continue
        word = rf"(?<![\w./'\"-]){name}"
        text = re.sub(rf"{word}=(?=\S)", f"{option} ", text)
        text = re.sub(
            rf"{word}(?![\w/]|\.\w)" if "_" in name else rf"(?:network )?{word}(?= must\b| needs\b| is (?:a part )?of\b| ')", option, text
        )
    return text


def options_of(command: Any) -> dict[str, str]:
    """The long option of each argument of a command."""
    found = {parameter.name: [text for text in parameter.opts if text.startswith("--")] for parameter in command.params}
    return {name: texts[0] for name, texts in found.items() if texts}


def is_out_of_memory(error: BaseException) -> bool:
    """True for an error that says that memory is missing, on the host or the GPU.

    The text is searched too, as PyTorch raises a bare RuntimeError where the host's memory is missing.
    """
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error))))


@contextlib.contextmanager
def reading(source: object) -> Iterator[None]:
    """Turns an out-of-memory error within the block into one that names ``source``, whose images are being read.

    Raises:
        ValueError: memory was missing.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        text = f"out of memory{_amount(error)} while reading {source}: its images are held in memory, a byte a value"
        raise ValueError(f"{text}; take fewer or smaller ones (image_size shrinks those of a folder)") from error


def _amount(error: BaseException) -> str:
    amount = _AMOUNT.search(str(error))
    return f", asking for {amount[1]}" if amount else ""
