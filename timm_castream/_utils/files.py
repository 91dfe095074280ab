"""Write a file whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
    finally:
        temporary.unlink(missing_ok=True)
