"""Checkpoints with checksums, so that a damaged one is noticed before anything is read from it."""

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from benchmarks import files

CHECKSUMS = "checksums.json"
"""Name of the file, in the folder of a checkpoint, with the SHA-256 of each of its other files."""


class Checkpoints:
    """Writes the checkpoints of a run and reads them, as a context in all its processes.

    Args:
        folder: holds a folder for each, named after its step.
        keep: how many there are at most. The oldest is removed once a newer one is complete.
    """

    def __init__(self, folder: Path, keep: int):
        # A checkpoint is complete when its checksums are written, which has to come before an older
        # one is removed: both are done here, and not by the manager.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=False)
        self.folder, self.keep = folder.absolute(), keep
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.manager.close()

    def save(self, step: int, state: Any, batches: Any) -> None:
        """Writes the state after `step`, and where its batches are."""
        saved = {"state": ocp.args.StandardSave(state)}
        batches = grain.checkpoint.CheckpointSave(batches)
        self.manager.save(step, args=ocp.args.Composite(**saved, batches=batches), force=True)
        if jax.process_index() == 0:
            seal(self.folder / str(step))
        for old in sorted(self.manager.all_steps())[: -self.keep]:
            self.manager.delete(old)

    def restore(self, step: int, like: Any, batches: Any) -> Any:
        """The state after `step`, of the shapes and shardings `like`; sets `batches` to what
        follows."""
        restored = {"state": ocp.args.StandardRestore(like)}
        batches = grain.checkpoint.CheckpointRestore(batches)
        return self.manager.restore(step, args=ocp.args.Composite(**restored, batches=batches))[
            "state"
        ]


def seal(checkpoint: Path) -> None:
    """Writes the checksums of a checkpoint whose files are all there."""
    found = {
        path.relative_to(checkpoint).as_posix(): _checksum(path) for path in _files(checkpoint)
    }
    files.write(checkpoint / CHECKSUMS, json.dumps({"sha256": found}, indent=1))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None where all its files are those that were saved."""
    try:
        checksums = json.loads((checkpoint / CHECKSUMS).read_text())["sha256"]
        for name, checksum in checksums.items():
            if _checksum(checkpoint / name) != checksum:
                return f"{name} is not what was saved"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS} or what it names cannot be read: {error}"
    return None


def newest(folder: Path, aside: Path) -> tuple[int | None, list[str]]:
    """The step of the newest intact checkpoint, and what the user has to know about later ones.

    Those are moved into the folder `aside`, so that training resumes from the intact one and writes
    them anew: a run that is restarted automatically after each interruption must not end as long as
    an older checkpoint is good.

    Args:
        folder: of the checkpoints. It may be missing.
        aside: for those that are damaged.

    Raises:
        ValueError: all of them are damaged.
    """
    steps = sorted((int(path.name) for path in _numbered(folder)), reverse=True)
    problems: dict[int, str] = {}
    for step in steps:
        found = damage(folder / str(step))
        if found is None:
            return step, _set_aside(folder, aside, problems, f"resumes from checkpoint {step}")
        problems[step] = found
    # The first one of all may have been cut off by a kill before its checksums were written.
    if len(steps) > 1 or (steps and (folder / str(steps[0]) / CHECKSUMS).exists()):
        listed = "; ".join(f"{step}: {problem}" for step, problem in problems.items())
        raise ValueError(
            f"no checkpoint in {folder} is intact ({listed}). Put copies in their place, or start "
            "again with another --output."
        )
    return None, _set_aside(folder, aside, problems, "starts from the beginning")


def _set_aside(folder: Path, aside: Path, problems: dict[int, str], then: str) -> list[str]:
    told = []
    for step, problem in problems.items():
        aside.mkdir(exist_ok=True)
        names = (aside / f"{step}{suffix}" for suffix in ("", *(f"-{n}" for n in range(1, 1000))))
        place = next(name for name in names if not name.exists())
        os.replace(folder / str(step), place)
        told.append(
            f"Checkpoint {step} is damaged or unfinished: {problem}. It was moved to {place}; the "
            f"run {then}."
        )
    return told


def _numbered(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]


def _files(checkpoint: Path) -> list[Path]:
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return [path for path in found if path != checkpoint / CHECKSUMS]


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
