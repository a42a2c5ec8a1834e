"""Files that a kill leaves whole, and folders that belong to one run at a time."""

import fcntl
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def make_folder(folder: Path) -> None:
    """Makes `folder` where it is missing, and a file in it for a moment; OSError where that cannot
    be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"not a folder to write to: {error}") from error
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Makes a file in `folder` for a moment; OSError where that cannot be done.

    Permissions alone do not tell: a file system may be full or read-only, and a superuser is not
    bound by them.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable.") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise OSError(f"not a folder to write to: {error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which takes its place in one step at the end of this context.

    Whenever the process is killed, `path` holds all of its old content or all of the new. Where the
    context raises, the old one stays. No other process has the same new file.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield new
        with open(new, "rb") as file:
            os.fsync(file.fileno())  # or else a power failure may leave the name without content
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Writes a text file in one step, as `replacing` does."""
    with replacing(path) as new:
        new.write_text(text)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError, which names it, where it is cut or was changed."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {found!r:.50}")
        return found
    except ValueError as error:
        raise ValueError(
            f"{path} is cut or damaged, and was left as it is: {error}. Put a copy in its place, "
            "or choose another --output."
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside this context no other process that asks for it has `folder`; ValueError where one
    does.

    The operating system ends a lock with its process, however that ends, so that a kill leaves none
    behind; the empty file .lock means nothing. Some network file systems have no locks, and there
    nothing keeps two runs apart.
    """
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another run is writing to {folder}. Wait until it ends, or choose another "
                "--output."
            ) from error
        except OSError:
            pass  # no locks here
        yield
