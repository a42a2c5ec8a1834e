"""What the processes of a run tell each other, so that all stop where one has to."""

import sys
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils

LONGEST = 8192
"""Bytes of a message; of a longer one the rest is left out."""


class Stop(Exception):
    """Ends the run in all processes alike, with this message."""


def gather(text: str) -> list[str]:
    """The texts of all processes, each of which calls this at the same place."""
    if jax.process_count() == 1:
        return [text]
    line = np.zeros(LONGEST, np.uint8)
    encoded = np.frombuffer(text.encode()[:LONGEST], np.uint8)
    line[: len(encoded)] = encoded
    lines = np.asarray(multihost_utils.process_allgather(line))
    return [bytes(line).rstrip(b"\0").decode(errors="replace") for line in lines]


def stop_together(problem: str | None) -> None:
    """Raises Stop in all processes where one of them, which all call this, has a problem."""
    problems = gather(problem or "")
    found = {text: index for index, text in reversed([*enumerate(problems)]) if text}
    if found:
        where = len(problems) > 1
        lines = [f"process {i}: {text}" if where else text for text, i in found.items()]
        raise Stop("\n".join(reversed(lines)))


def describe(error: Exception) -> str:
    """An error in a line. One that no file and no option explains is printed whole, too."""
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}"
