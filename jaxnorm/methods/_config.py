"""Methods by name, as configurations and command lines have them, and back."""

import ast
import dataclasses
import difflib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from jaxnorm._core.groups import EACH, Groups, Size
from jaxnorm.methods._method import Method
from jaxnorm.methods._row import Row, RowFields, as_method

CONSTANTS = {"EACH": EACH, "inf": math.inf, "-inf": -math.inf}
"""Numbers that have a name: JSON has no infinity, and EACH is no number of groups."""

Constructors = Mapping[str, Callable[..., Any]]


def from_config(
    config: str | Mapping[str, Any] | Method | Groups,
    *,
    also: Sequence[Callable[..., Method]] = (),
) -> Method:
    """The method that a configuration names.

    A configuration is the name of a constructor of `jaxnorm.methods` and its arguments, as text or
    as a dict with `name` among its keys. These are the same method:

        "group_norm:32"
        "group_norm:num_groups=32"
        "group_norm(32)"
        {"name": "group_norm", "num_groups": 32}

    The repr of every method is such a text. Arguments are literals: numbers, strings in quotes,
    True, False, None, tuples, EACH and float('inf'). Methods, Row, Groups and Size may stand inside
    of one another, as in "proxy_norm:group_norm(4)". Nothing is evaluated. In a dict, a list is a
    tuple, "EACH" and "inf" are these numbers, and a dict inside is an object with a `name` again.

    Args:
        config: text, a dict, or what needs no configuration: a method or Groups.
        also: further constructors, by their names: those of methods of your own.

    Returns:
        The method. Groups are their row of the table.

    Raises:
        TypeError: config is neither text nor a dict.
        ValueError: a name or argument that does not exist, for which the nearest are listed, text
            that does not read as above, or values that the constructor refuses.

    Example:
        >>> from_config("batch_renorm:rmax=2.0,momentum=0.9")
        batch_renorm(rmax=2.0, momentum=0.9)
        >>> from_config({"name": "Row", "groups": {"name": "Groups", "batch": 1, "spatial": 1}})
        Row(Groups(batch=1, spatial=1, channel=EACH))
    """
    if isinstance(config, Method | Groups):
        return as_method(config)
    if not isinstance(config, str | Mapping):
        raise TypeError(
            f"a configuration is text or a dict. Got {type(config).__name__}, {config!r}; expected "
            "for example 'group_norm:32' or {'name': 'group_norm', 'num_groups': 32}."
        )
    reader = _Reader(config, _constructors() | {f.__name__: f for f in also})
    made = reader.from_text(config) if isinstance(config, str) else reader.from_dict(config)
    if not isinstance(made, Method | Groups):
        reader.refuse(f"{made!r} is no method", "the name of one, such as group_norm:32")
    return as_method(made)


def to_config(method: Method | Groups) -> dict[str, Any]:
    """A method as a dict that survives JSON, which `from_config` reads.

    Fields with their default are left out, as in the repr. A row of the table is a Row, by whatever
    constructor it was made.

    Args:
        method: a value of `jaxnorm.methods`, or one of your own.

    Returns:
        A dict of numbers, strings, None, lists and dicts, with the name of the class as `name`.

    Raises:
        TypeError: method is none, or holds what has no such form.

    Example:
        >>> to_config(from_config("batch_renorm:rmax=2.0"))
        {'name': 'batch_renorm', 'rmax': 2.0}
    """
    return _plain(as_method(method))


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float) and math.isinf(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Groups):
        splits = {kind: _split(split) for kind, split in vars(value).items()}
        return {"name": "Groups", **splits}
    if isinstance(value, Size | Method):
        fields = {field: getattr(value, field.name) for field in dataclasses.fields(value)}  # type: ignore[arg-type]
        own = {f.name: _plain(v) for f, v in fields.items() if v != f.default}
        return {"name": type(value).__name__, **own}
    raise TypeError(
        f"{value!r} has no form in JSON. Expected a method of numbers, strings, None, tuples, "
        "Groups, Size and methods."
    )


def _split(split: Any) -> Any:
    """A number of groups, with EACH by its name."""
    if isinstance(split, tuple):
        return [_split(part) for part in split]
    return "EACH" if split == EACH else _plain(split)


def _constructors() -> dict[str, Callable[..., Any]]:
    """All of the package by name; read at the call, because the package imports this file."""
    found: dict[str, Callable[..., Any]] = {"Groups": Groups, "Size": Size}
    for name, value in vars(sys.modules[__package__ or ""]).items():
        is_class = isinstance(value, type) and issubclass(value, Method) and value is not Method
        if is_class or (inspect.isfunction(value) and _returns_a_row(value)):
            found[name] = value
    return found


def _returns_a_row(function: Callable[..., Any]) -> bool:
    return inspect.signature(function).return_annotation is Row


def _arguments(constructor: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a constructor by name, and what it says about their types."""
    found = {}
    for name, p in inspect.signature(constructor).parameters.items():
        if p.kind is p.VAR_KEYWORD:  # other fields of a row
            found |= RowFields.__annotations__
        else:
            found[name] = p.annotation
    return found


def _form(constructor: Callable[..., Any]) -> str:
    """The arguments of a constructor, as they are typed."""
    signature = inspect.signature(constructor)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))


class _Reader:
    """Reads one configuration, which its errors quote."""

    def __init__(self, config: Any, constructors: Constructors):
        self.config, self.constructors = config, constructors

    @property
    def unreadable(self) -> str:
        """How an error begins."""
        config = repr(self.config)
        config = config if len(config) <= 200 else f"{config[:200]}..."
        return f"the configuration {config} cannot be read"

    def refuse(self, got: str, expected: str, error: Exception | None = None) -> NoReturn:
        raise ValueError(f"{self.unreadable}: {got}. Expected {expected}.") from error

    def from_text(self, text: str) -> Any:
        head, colon, rest = text.partition(":")
        # a colon elsewhere is inside of a string, or a mistake
        code = f"{head.strip()}({rest})" if colon and head.strip().isidentifier() else text.strip()
        try:
            return self.value(ast.parse(code, mode="eval").body)
        except (SyntaxError, RecursionError, MemoryError) as error:
            form = "name:argument,name=argument, such as group_norm:32"
            self.refuse("it is no name with arguments", form, error)

    def value(self, node: ast.AST) -> Any:
        """What a node of the syntax tree stands for."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                return tuple(self.value(part) for part in parts)
            case ast.Name(id=name) if name in CONSTANTS:
                return CONSTANTS[name]
            case ast.Name(id=name):
                return self.made(name, (), {})
            case ast.Call(
                func=ast.Name(id="float"), args=[ast.Constant(value="inf" | "-inf" as name)]
            ):
                return CONSTANTS[name]
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                named = {k.arg: k.value for k in keywords if k.arg is not None}
                if len(named) < len(keywords):
                    self.refuse(f"an argument of {name} is there twice or has no name", "each once")
                return self.made(
                    name,
                    [self.value(t) for t in args],
                    {k: self.value(t) for k, t in named.items()},
                )
        self.refuse(
            f"{ast.unparse(node)!r} is no literal",
            "numbers, strings in quotes, True, False, None, tuples, EACH, float('inf') and methods",
        )

    def from_dict(self, config: Mapping[str, Any]) -> Any:
        name, *_ = names = [config.get("name"), *(k for k in config if k != "name")]
        if not all(isinstance(t, str) for t in names):
            self.refuse(
                f"its keys are {', '.join(map(repr, config)) or 'none'}",
                "the key 'name' with the name of a method, and its arguments by their names",
            )
        return self.made(name, (), {k: v for k, v in config.items() if k != "name"}, of_json=True)

    def of_json(self, value: Any, annotation: Any) -> Any:
        """A value of a dict; where a method is expected, text is a configuration."""
        if isinstance(value, Mapping):
            return self.from_dict(value)
        if isinstance(value, list | tuple):
            return tuple(self.of_json(part, None) for part in value)
        if isinstance(value, str):
            if isinstance(annotation, type) and issubclass(annotation, Method):
                return self.from_text(value)
            return CONSTANTS.get(value, value)
        return value

    def made(
        self, name: str, args: Iterable[Any], options: dict[str, Any], of_json: bool = False
    ) -> Any:
        """What a constructor makes of arguments that it has."""
        if name not in self.constructors:
            self.refuse(f"{name!r} is no method{_near(name, self.constructors)}", _listed(self))
        constructor = self.constructors[name]
        known = _arguments(constructor)
        for option in options:
            if option not in known:
                names = ", ".join(known) or "no arguments"
                self.refuse(f"{name} has no {option!r}{_near(option, known)}", names)
        if of_json:
            options = {k: self.of_json(v, known[k]) for k, v in options.items()}
        try:
            inspect.signature(constructor).bind(*args, **options)
        except TypeError as error:
            self.refuse(f"{error} for {name}", name + _form(constructor), error)
        try:
            return constructor(*args, **options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.unreadable}: {error}") from error


def _near(name: str, known: Iterable[str]) -> str:
    """The nearest of the names that are known, whatever the case and the underscores."""
    plain = {t.lower().replace("_", ""): t for t in known}
    found = difflib.get_close_matches(name.lower().replace("_", ""), plain, cutoff=0.5)
    return f"; the nearest are {', '.join(plain[t] for t in found)}" if found else ""


def _listed(reader: _Reader) -> str:
    return f"one of {', '.join(sorted(reader.constructors, key=str.lower))}"
