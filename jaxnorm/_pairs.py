"""Which norm follows which layer, read from a traced program.

A layer's output and a norm's input carry marks. A pair is a marked output whose one and only use is
a marked input.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxprs_in_params

LAYER, NORM = "jaxnorm.folding layer ", "jaxnorm.folding norm "


def mark(t: jax.Array, kind: str, name: str) -> jax.Array:
    """t, recognizable in a traced program."""
    return checkpoint_name(t, kind + name)


def pairs(
    function: Callable[..., Any], variables: Any, *inputs: Any, prefix: str = ""
) -> dict[str, str]:
    """Norm -> layer, where the layer's output is the norm's input and nothing else's.

    A layer or norm that is called more than once has no pair, nor has a layer whose variables have
    another use.

    Args:
        function: (variables, *inputs) -> anything, which marks what it computes.
        variables: a tree in which a layer's are beneath its name.
        *inputs: of the function; nothing is computed with them.
        prefix: of the layers' names in the tree.
    """
    program: Any = jax.make_jaxpr(function)(variables, *inputs).jaxpr
    found, marks = {}, Counter()
    for jaxpr in _programs(program):
        made = {}
        for eqn in jaxpr.eqns:
            name = str(eqn.params["name"]) if eqn.primitive.name == "name" else ""
            marks[name] += 1
            if name.startswith(LAYER):
                made[eqn.outvars[0]] = name.removeprefix(LAYER)
            elif name.startswith(NORM):
                (x,) = eqn.invars
                if x in made and _uses(jaxpr, x) == 1:
                    found[name.removeprefix(NORM)] = made[x]
    leaves = zip(jax.tree_util.tree_leaves_with_path(variables), program.invars, strict=False)
    tied = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, _), variable in leaves
        if _uses(program, variable) > 1
    ]
    return {
        norm: layer
        for norm, layer in found.items()
        if marks[NORM + norm] == marks[LAYER + layer] == 1
        and not any(name.startswith(f"{prefix}{layer}/") for name in tied)
    }


def _uses(jaxpr: Any, variable: Any) -> int:
    """How many operations and outputs take a variable, those of nested programs included."""
    count = sum(v is variable for v in jaxpr.outvars)
    for eqn in jaxpr.eqns:
        inner = list(jaxprs_in_params(eqn.params))
        # Which argument becomes which is only sure where there is one inner program with as many:
        # jit, checkpoint, scan.
        sure = len(inner) == 1 and len(inner[0].invars) == len(eqn.invars)
        for i in (i for i, v in enumerate(eqn.invars) if v is variable):
            count += _uses(inner[0], inner[0].invars[i]) if sure else 1 + len(inner)
    return count


def _programs(jaxpr: Any) -> Iterator[Any]:
    """A program and those inside of its operations, once for every time they run."""
    yield jaxpr
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            yield from _programs(inner)
