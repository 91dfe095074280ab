"""Folders for results, and files written whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # Python names no file when a write fails


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Makes a folder for results, and those that it lies in.

    Raises:
        ValueError: A file is in its place.
        OSError: It cannot be made; the error names it.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(place for place in (path, *path.parents) if place.exists())
        raise ValueError(f'{file} is a file: name a folder for the results.') from None
    return path


@contextmanager
def write_whole(path: str | os.PathLike[str], mode: str = 'w') -> Iterator[Any]:
    """Opens a temporary file beside `path` and moves it there when the block ends without an error.

    An error removes the temporary file and leaves an older file at `path` as it was. Several processes and threads
    may write the same path: each write is complete, and the last one stays.

    Args:
        path: File to write; its folder must exist.
        mode: `'w'`, text in UTF-8 with line ends as written, or `'wb'`, bytes.

    Returns:
        A context manager that gives the open file; its `name` is the path of the temporary file.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f'There is no folder {path.parent} to write {path.name} to.')
    # The name of `path` may already be as long as the file system allows, so it is no part of this one.
    temporary = path.with_name(f'.{uuid.uuid4().hex}.tmp')
    text: dict[str, Any] = {} if 'b' in mode else {'encoding': 'utf-8', 'newline': ''}
    try:
        with open(temporary, mode, **text) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno in _FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def move_files(source: Path, target: Path) -> None:
    """Moves every file below a folder to the same place below another one, where it replaces an older file.

    Args:
        source: A folder.
        target: A folder on the same file system.
    """
    for file in sorted(source.rglob('*')):
        moved = target / file.relative_to(source)
        if file.is_dir():
            moved.mkdir(exist_ok=True)
        else:
            os.replace(file, moved)


def printable(name: str | Path) -> str:
    """A file name with a question mark for each byte that is not UTF-8."""
    return str(name).encode('utf-8', 'replace').decode()


def counted(count: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f'{count} {noun}' if count == 1 else f'{count} {noun}s'
