"""One writer at a time: a lock on a folder that dies with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_fast.io.files import remove_leftovers
from ddpm_fast.io.signals import uninterrupted

fcntl: Any = None
msvcrt: Any = None
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows
    msvcrt = importlib.import_module("msvcrt")

_FAR = 2**30  # where the byte lies that Windows locks: behind the text, which others are to read
_held = threading.local()


@contextlib.contextmanager
def exclusive(folder: str | os.PathLike[str], activity: str, *files: str) -> Iterator[None]:
    """Makes sure that one process, and one thread of it, runs the block for a folder and activity at a time.

    A second call raises; only the thread that runs the block may call again within it. The lock is the system's, on the file
    ``.<activity>.lock`` in the folder, which is removed at the end. If a process is killed the file stays, but is not locked. A file
    system may have no locks (some network file systems have none): then the block runs without one.

    Args:
        folder: created if missing, and then removed at the end if nothing was written into it.
        activity: a noun, for the messages too. Different activities do not exclude each other.
        files: names of files in the folder that are written under this lock only. Temporary files that killed writers of them have
            left are removed at once.

    Raises:
        BlockingIOError: another process or thread holds the lock; the message names the process.
        OSError: the folder cannot be written.
    """
    path = Path(folder).resolve() / f".{activity}.lock"
    mine = _held.__dict__.setdefault("paths", {})  # to whether the lock is the system's
    if path in mine:
        _clean(path, files, mine[path])
        yield
        return
    made = not path.parent.exists()
    handle = None
    try:
        handle, mine[path] = _locked(path, Path(folder), activity)
        _clean(path, files, mine[path])
        yield
    finally:
        with uninterrupted():
            mine.pop(path, None)
            if handle is not None:
                with contextlib.suppress(OSError):  # Windows keeps open files
                    path.unlink()
                os.close(handle)
            if made:
                with contextlib.suppress(OSError):  # not empty
                    path.parent.rmdir()


def _clean(path: Path, files: tuple[str, ...], locked: bool) -> None:
    for name in files if locked else ():
        remove_leftovers(path.with_name(name))


def _locked(path: Path, folder: Path, activity: str) -> tuple[int, bool]:
    """Opens and locks the file at ``path``: (handle, True), or (handle, False) if the file system has no locks."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another one that wrote nothing has just removed the folder
            continue
        except OSError as error:
            error.filename = str(folder)  # the lock's own name would mean nothing to a reader
            raise
        if (locked := _lock(handle)) is False:
            owner = os.read(handle, 200).decode("utf-8", "replace").strip()
            os.close(handle)
            raise BlockingIOError(
                f"{folder} is in use by another {activity}{owner and f' ({owner})'}; let it end, or choose another folder"
            )
        # The one before may have removed the file between its opening here and its locking: then this is nobody's lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return handle, locked is True
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Locks the file. True if that worked, False if somebody else has it locked, None if the file system has no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(handle, _FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        return None
    return True
