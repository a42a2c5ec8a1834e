"""The docstrings of the package, which are plain text for people, as reStructuredText."""

import ast
import re
import textwrap

SECTION = re.compile(
    r"(Args|Returns|Raises|Example|Reference|Others|Fields|Options of apply[^:]*):\s*$"
)


def as_rst(lines):
    """Indented paragraphs are equations or code, and signs are themselves.

    What follows the heading of a section is left to napoleon, except for its signs.
    """
    out, section, literal, doctest = [], False, False, False
    lines = joined(lines)
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if indent == 0 and line.strip():
            section, literal = bool(SECTION.match(line)), False
        doctest = line.lstrip().startswith((">>>", "...")) or doctest and bool(line.strip())
        if section and SECTION.match(line):
            out.append(re.sub(r"^(Options of apply)[^:]*:", r"\1:", line))
            continue
        if not section and indent and not literal and not lines[i - 1].strip():
            out += [f".. code-block:: {language(lines[i:])}", ""]
            literal = True
        out.append(line if literal or doctest else escaped(line))
    return out


def joined(lines):
    """The lines with code that is broken over two of them on one."""
    out = []
    for line in lines:
        if out and out[-1].count("`") % 2:
            out[-1] = f"{out[-1]} {line.strip()}"
        else:
            out.append(line)
    return out


def language(lines):
    """Of the indented lines at the beginning: Python, a session of it, or text."""
    end = next((i for i, line in enumerate(lines) if line.strip() and line[0] != " "), len(lines))
    block = textwrap.dedent("\n".join(lines[:end]))
    if block.startswith(">>>"):
        return "pycon"
    try:
        ast.parse(block)
    except SyntaxError:
        return "text"
    return "python"


def escaped(line):
    """Signs of emphasis, substitutions and references, outside of code."""
    parts = re.split(r"(`[^`]*`)", line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([*|\\])", r"\\\1", parts[i])
        parts[i] = re.sub(r"(\w)_(?!\w)", r"\1\\_", parts[i])
    return "".join(code(part) if part.startswith("`") else part for part in parts)


def code(part):
    """A name links to its entry; other code is shown as it is."""
    return part if re.fullmatch(r"`[\w.]+`", part) else f"`{part}`"
