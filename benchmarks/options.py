"""Options of the programs: numbers within their ranges, and folders to write to."""

import argparse
import math
from collections.abc import Callable, Collection
from pathlib import Path

from benchmarks.files import make_folder
from jaxnorm.methods import from_config


def positive(text: str) -> int:
    """An option that is a positive whole number."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def count(text: str) -> int:
    """An option that is a whole number from 0 to 2^32 - 1, as seeds are."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    if int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2^32, got {text!r}")
    return int(text)


def number(
    *, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """An option that is a finite number in this range.

    >>> number(at_least=0, below=1)("0.1")
    0.1
    >>> number(at_least=0, below=1)("nan")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: expected a finite number, at least 0, below 1, got 'nan'
    """
    bounds = {"at least": at_least, "above": above, "below": below}
    expected = ["a finite number"]
    expected += [f"{name} {bound:g}" for name, bound in bounds.items() if math.isfinite(bound)]

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= at_least and above < value < below):
            raise argparse.ArgumentTypeError(f"expected {', '.join(expected)}, got {text!r}")
        return value

    return parse


def method_among(names: Collection[str]) -> Callable[[str], str]:
    """An option that is one of these names, or the configuration of a method.

    >>> method_among(["batch", "group"])("group_norm:4")
    'group_norm:4'
    >>> method_among(["batch", "group"])("grup")
    Traceback (most recent call last):
    argparse.ArgumentTypeError: expected batch, group or the configuration of a method; ...
    """

    def parse(text: str) -> str:
        if text not in names:
            try:
                from_config(text)
            except (TypeError, ValueError) as error:
                *first, last = *names, "the configuration of a method"
                raise argparse.ArgumentTypeError(
                    f"expected {', '.join(first)} or {last}; {error}"
                ) from error
        return text

    return parse


def folder(text: str) -> Path:
    """An option that is a folder to write to, made and tried before anything is measured."""
    try:
        make_folder(Path(text))
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return Path(text)
