"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` at the end; an error or interruption leaves `path` as it was."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    # Not tempfile, whose files nobody else may read: permissions are the umask's business.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def check_writable(folder: Path) -> None:
    """Raise OSError if no file can be made in `folder`, or in what exists of the way to it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    probe = folder / f".{secrets.token_hex(4)}"
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    os.unlink(probe)
