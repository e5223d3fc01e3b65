"""From a function to its syntax tree, verified to be what the function was compiled from, and back.

The rewritten function keeps everything that is not its code: globals, defaults, closure cells (and
so zero-argument super()), annotations, attributes, the decorators around it.
"""

import ast
import functools
import linecache
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType

_FACTORY = "_pyops_factory"


class SourceUnavailable(Exception):
    """A function cannot be rewritten; the message says why."""


@dataclass
class Source:
    """A function and its syntax tree.

    Attributes:
        function: the undecorated function.
        decorated: what the decorators made of it, outermost first; empty without decorators.
        file: the whole file that holds it; what a name at the top of a file is bound to decides
            how it is compiled.
        node: its definition, a node inside `file`; edit this one, then `rebuild`.
    """

    function: FunctionType
    decorated: list[FunctionType]
    file: ast.Module
    node: ast.FunctionDef


def read(function: object) -> Source:
    """Find and verify the source of a function.

    Raises:
        SourceUnavailable: not a Python function, no source, a source that has changed since, or a
            decorator that cannot be put around another function.
    """
    decorated = []
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        _wrapped_cell(function)
        decorated.append(function)
        function = vars(function)["__wrapped__"]
    if not isinstance(function, FunctionType):
        raise SourceUnavailable("it is not a Python function")
    code = function.__code__
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    try:
        file = ast.parse(text, code.co_filename)
    except SyntaxError as error:
        raise SourceUnavailable("its source has changed since it was loaded") from error
    for node in ast.walk(file):
        if (
            isinstance(node, ast.FunctionDef)
            and node.name == code.co_name
            and _first_line(node) == code.co_firstlineno
        ):
            if _is_from(code, text):
                return Source(function, decorated, file, node)
            raise SourceUnavailable("its source has changed since it was loaded")
    raise SourceUnavailable("its source is not available")


def rebuild(source: Source, cells: Mapping[str, object]) -> FunctionType:
    """A function like `source.function` whose body is that of `source.node` as it is now.

    `cells` are further names that the new body may use, with their values. They become closure
    cells, so that neither the signature nor anybody's globals change.
    """
    _Enclose(source.node, list(cells)).visit(source.file)
    ast.fix_missing_locations(source.file)
    old = source.function
    (code,) = _compile(source.file, old.__code__, inside=_FACTORY)
    if hasattr(code, "co_qualname"):
        code = code.replace(co_qualname=old.__code__.co_qualname)
    known = dict(zip(old.__code__.co_freevars, old.__closure__ or (), strict=True))
    closure = tuple(
        CellType(cells[name]) if name in cells else known[name] for name in code.co_freevars
    )
    new = _copy(old, code, closure)
    for decorator in reversed(source.decorated):
        cells_around = list(decorator.__closure__ or ())
        cells_around[_wrapped_cell(decorator)] = CellType(new)
        outer = _copy(decorator, decorator.__code__, tuple(cells_around))
        vars(outer)["__wrapped__"] = new
        new = outer
    return new


@functools.lru_cache(maxsize=256)
def _is_from(code: CodeType, text: str) -> bool:
    """Whether `text`, a whole file, compiles to `code`."""
    return code in _compile(ast.parse(text, code.co_filename), code)


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _compile(file: ast.Module, like: CodeType, inside: str | None = None) -> list[CodeType]:
    """Code objects with the name and line of `like` that `file` compiles to.

    `inside`: only those directly in a function of this name.
    """
    top = compile(file, like.co_filename, "exec", dont_inherit=True)
    return [
        code
        for outer in (top, *_nested(top))
        if inside is None or outer.co_name == inside
        for code in outer.co_consts
        if isinstance(code, CodeType)
        and code.co_name == like.co_name
        and code.co_firstlineno == like.co_firstlineno
    ]


def _nested(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _nested(constant)


def _wrapped_cell(decorator: FunctionType) -> int:
    """Index of the one closure cell through which a decorator's wrapper calls its function."""
    cells = [
        index
        for index, cell in enumerate(decorator.__closure__ or ())
        if _contents(cell) is vars(decorator)["__wrapped__"]
    ]
    if len(cells) != 1:
        raise SourceUnavailable("its decorator cannot be put around another function")
    return cells[0]


def _contents(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _copy(function: FunctionType, code: CodeType, closure: tuple) -> FunctionType:
    new = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    functools.update_wrapper(new, function)
    del vars(new)["__wrapped__"]
    new.__kwdefaults__ = function.__kwdefaults__
    return new


class _Enclose(ast.NodeTransformer):
    """Puts one function definition into a function whose parameters are `names`."""

    def __init__(self, node: ast.FunctionDef, names: list[str]):
        self.node = node
        self.names = names

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node is not self.node:
            return self.generic_visit(node)
        factory = ast.parse(f"def {_FACTORY}({', '.join(self.names)}): pass").body[0]
        assert isinstance(factory, ast.FunctionDef)
        factory.body = [node]
        return factory
