"""Which norm follows which layer, read from a traced program.

A layer's output and a norm's input carry marks. A pair is a marked output whose one and only use is
a marked input.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

LAYER, NORM = "jaxnorm.folding layer ", "jaxnorm.folding norm "


def mark(t: jax.Array, kind: str, name: str) -> jax.Array:
    """t, recognizable in a traced program."""
    return checkpoint_name(t, kind + name)


def pairs(program: Any) -> dict[str, str]:
    """Norm -> layer, where the layer's output is the norm's input and nothing else's.

    A layer or norm that is called more than once has no pair.
    """
    found, marks = [], Counter()
    for jaxpr in _programs(program.jaxpr):
        uses = Counter(v for eqn in jaxpr.eqns for v in eqn.invars if not hasattr(v, "val"))
        uses.update(v for v in jaxpr.outvars if not hasattr(v, "val"))
        made = {}
        for eqn in jaxpr.eqns:
            name = _marked(eqn)
            marks[name] += 1
            if name.startswith(LAYER):
                made[eqn.outvars[0]] = name
            elif name.startswith(NORM) and eqn.invars[0] in made and uses[eqn.invars[0]] == 1:
                found.append((name, made[eqn.invars[0]]))
    return {n[len(NORM) :]: k[len(LAYER) :] for n, k in found if marks[n] == marks[k] == 1}


def uses(program: Any) -> list[int]:
    """How many operations and outputs take each input of a program, nested ones included."""
    return [_uses(program.jaxpr, v) for v in program.jaxpr.invars]


def _uses(jaxpr: Any, variable: Any) -> int:
    count = sum(v is variable for v in jaxpr.outvars)
    for eqn in jaxpr.eqns:
        inner = [p for p in _inner(eqn) if len(p.invars) == len(eqn.invars)]
        for i in (i for i, v in enumerate(eqn.invars) if v is variable):
            # Which argument becomes which is only sure where there is one inner program with as
            # many: jit, checkpoint, scan.
            count += (
                _uses(inner[0], inner[0].invars[i])
                if len(inner) == 1 == len(_inner(eqn))
                else 1 + len(_inner(eqn))
            )
    return count


def _marked(eqn: Any) -> str:
    return str(eqn.params["name"]) if eqn.primitive.name == "name" else ""


def _programs(jaxpr: Any) -> Iterator[Any]:
    """A program and those inside of its operations, once for every time they run."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for inner in _inner(eqn):
            yield from _programs(inner)


def _inner(eqn: Any) -> list[Any]:
    """The programs inside of an operation."""
    values = [
        t
        for value in eqn.params.values()
        for t in (value if isinstance(value, tuple | list) else (value,))
    ]
    return [t for t in (getattr(value, "jaxpr", value) for value in values) if hasattr(t, "eqns")]
