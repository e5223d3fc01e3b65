"""Finds chains of calls in a method, such as pool(relu(conv(x))), and rewrites each into one call.

A chain is written as nested calls, as methods of the tensor, as assignments that follow one another
and whose variables nobody else reads, or as any mixture. What may begin and continue a chain, and
the call that replaces it, come from patterns (pattern.py).
"""

import ast
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType

from torch import nn

from pyops._swap import source
from pyops._swap.pattern import Pattern
from pyops._swap.report import Run
from pyops._swap.resolve import Resolver, is_method
from pyops._swap.tree import (
    assigned,
    binds,
    count_loads,
    evaluated_first,
    is_inert,
    read_name,
    reads,
)

_SEES_VARIABLES = {"locals", "vars", "dir", "eval", "exec"}
_SCOPES = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


@dataclass
class _Link:
    """One call of a chain after the first."""

    callee: ast.expr  # a string, in the tree too, for a method of the tensor
    method: str | None  # that method
    values: list  # alternatives for the callee
    args: list[ast.expr]
    keywords: list[ast.keyword]
    inner: ast.expr  # what the call is applied to


@dataclass
class _Chain:
    pattern: Pattern
    first: ast.Call
    values: list
    links: list[_Link]


def rewrite(module: nn.Module, method: str, run: Run) -> tuple[FunctionType | None, set[str]]:
    """Rewrite a method of the class of `module`, and report on every chain in it.

    Returns:
        The new function, None if there is nothing to replace; and the other methods it calls.

    Raises:
        SourceUnavailable: the method cannot be rewritten.
    """
    found = source.read(inspect.getattr_static(type(module), method))
    resolver = Resolver(module, found.function, found.node)
    called = set(_called_methods(found.node, resolver, module))
    finder = _Finder(found.node, resolver, run.patterns)
    rewriter = _Rewriter(finder, run, run.place(module, method))
    found.node.body = [rewriter.visit(statement) for statement in found.node.body]
    if not rewriter.replaced:
        return None, called
    runs = {_run_name(pattern): pattern.run for pattern in run.patterns}
    return source.rebuild(found, runs), called


def _called_methods(node: ast.AST, resolver: Resolver, module: nn.Module) -> Iterator[str]:
    """Names of the methods of `module` that are called on it."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            base = resolver.resolve(call.func.value)
            if len(base) == 1 and base[0] is module and is_method(module, call.func.attr):
                yield call.func.attr


class _Finder:
    """Recognises chains, and joins those that are spread over several assignments."""

    def __init__(self, node: ast.FunctionDef, resolver: Resolver, patterns: tuple[Pattern, ...]):
        self.patterns = patterns
        self.resolver = resolver
        self.node = node
        self.blocked: dict[ast.Call, tuple[_Link, str]] = {}
        self._loads = Counter(filter(None, map(read_name, ast.walk(self.node))))
        self._shared = {
            name.id
            for scope in ast.walk(self.node)
            if isinstance(scope, _SCOPES) and scope is not self.node
            for name in ast.walk(scope)
            if isinstance(name, ast.Name)
        }
        for statement in ast.walk(self.node):
            if isinstance(statement, ast.Global | ast.Nonlocal | ast.Delete):
                self._shared.update(
                    statement.names
                    if not isinstance(statement, ast.Delete)
                    else (target.id for target in statement.targets if isinstance(target, ast.Name))
                )
        if not self._loads.keys() & _SEES_VARIABLES:
            self._join_block(self.node.body)

    def chain(self, node: ast.expr) -> _Chain | None:
        """The chain whose last call is `node`."""
        for pattern in self.patterns:
            found = self._chain_of(pattern, node)
            if found is not None:
                return found
        return None

    def _chain_of(self, pattern: Pattern, node: ast.expr) -> _Chain | None:
        links: list[_Link] = []
        while isinstance(node, ast.Call):
            values = self.resolver.resolve(node.func)
            if values and all(pattern.starts(value) for value in values):
                return _Chain(pattern, node, values, links[::-1])
            link = self._link(pattern, node)
            if link is None:
                return None
            links.append(link)
            node = link.inner
        return None

    def _link(self, pattern: Pattern, node: ast.Call) -> _Link | None:
        """`node` as a call that continues a chain; None if it is something else."""
        values = self.resolver.resolve(node.func)
        callee, method, args = node.func, None, node.args
        if values:
            if not args:
                return None
            inner, args = args[0], args[1:]
        elif isinstance(node.func, ast.Attribute) and node.func.attr in pattern.methods:
            inner, method = node.func.value, node.func.attr
            callee, values = ast.Constant(method), [method]
        else:
            return None
        # The rewritten call evaluates these before the first call of the chain runs.
        early = [callee, *args, *(keyword.value for keyword in node.keywords)]
        if not all(map(is_inert, early)):
            return None
        keywords = tuple(keyword.arg or "" for keyword in node.keywords)
        if not all(pattern.continues(value, len(args), keywords) for value in values):
            return None
        return _Link(callee, method, values, args, node.keywords, inner)

    def _join_block(self, body: list[ast.stmt], *, outermost: bool = True) -> None:
        """Move each chain in `body` into the call of the next statement that continues it."""
        for statement in body:
            if isinstance(statement, ast.If | ast.For | ast.While | ast.With):
                self._join_block(statement.body, outermost=False)
                self._join_block(getattr(statement, "orelse", []), outermost=False)
        index = 0
        while index + 1 < len(body):
            first, second = body[index], body[index + 1]
            if not self._join(first, second, body[index + 2 :], outermost):
                index += 1
            else:
                del body[index]

    def _join(
        self, first: ast.stmt, second: ast.stmt, rest: list[ast.stmt], outermost: bool
    ) -> bool:
        assignment = assigned(first)
        if assignment is None:
            return False
        name, value = assignment
        chain = self.chain(value)
        spot = None if chain is None else self._use(chain.pattern, second, name)
        if chain is None or spot is None:
            return False
        call, link = spot
        obstacle = self._other_use(name, second, rest, outermost)
        if obstacle is not None:
            self.blocked[chain.first] = (link, obstacle)
            return False
        if link.method is not None:
            call.func = ast.Attribute(value, link.method, ast.Load())
        else:
            call.args[0] = value
        self._loads[name] -= 1
        return True

    def _use(
        self, pattern: Pattern, statement: ast.stmt, name: str
    ) -> tuple[ast.Call, _Link] | None:
        """The call in `statement` that continues the value of `name`, if that runs first."""
        if not isinstance(statement, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr):
            return None
        node = statement.value
        while node is not None:
            if isinstance(node, ast.Call):
                link = self._link(pattern, node)
                if link is not None and reads(link.inner, name):
                    return node, link
            node = evaluated_first(node)
        return None

    def _other_use(
        self, name: str, second: ast.stmt, rest: list[ast.stmt], outermost: bool
    ) -> str | None:
        """Who reads the value of `name` apart from its one use in `second`; None if nobody does."""
        if name in self._shared:
            return f"`{name}` is shared with another scope"
        if count_loads(second, name) > 1:
            return f"`{name}` is used again on line {second.lineno}"
        if isinstance(second, ast.Return) or binds(second, name):
            return None
        for statement in rest:
            if count_loads(statement, name):
                return f"`{name}` is used again on line {statement.lineno}"
            if outermost and binds(statement, name):
                return None
        # A loop may come round again, and a break may lead past what follows.
        if not outermost and self._loads[name] > 1:
            return f"`{name}` may be used again"
        return None


class _Rewriter(ast.NodeTransformer):
    """Replaces chains by calls of their pattern's `run` and reports on them."""

    def __init__(self, finder: _Finder, run: Run, place: str):
        self.replaced = False
        self._finder = finder
        self._run = run
        self._place = place
        self._parents = {
            child: parent
            for parent in ast.walk(finder.node)
            for child in ast.iter_child_nodes(parent)
        }

    def visit_Call(self, node: ast.Call) -> ast.AST:
        chain = self._finder.chain(node)
        if chain is None:
            return self.generic_visit(node)
        fused = self._consider(chain, node)
        self.generic_visit(chain.first)
        if not fused:
            return node
        self.replaced = True
        return ast.copy_location(_run_call(chain, self._run.backend), node)

    def _consider(self, chain: _Chain, last: ast.Call) -> bool:
        """Report on a chain; whether to rewrite it."""
        pattern = chain.pattern
        if pattern.common and not chain.links and chain.first not in self._finder.blocked:
            return False
        fused_any = False
        for index, value in enumerate(chain.values):
            values = [link.values[index % len(link.values)] for link in chain.links]
            steps = [
                (value, _literal_arguments(link))
                for value, link in zip(values, chain.links, strict=True)
            ]
            kinds = [pattern.first, *(pattern.kind_of(value) or "" for value in values)]
            place = self._place_of(value, chain.first.lineno)
            fused, why = 0, pattern.refusal(value)
            if why is None:
                fused, why = pattern.plan(steps)
            if pattern.alone or any(kind != "identity" for kind in kinds[1 : fused + 1]):
                fused_any = True
                self._run.replaced(place, kinds[: fused + 1])
            if why is None and not pattern.alone:
                kinds, why = self._blocked(chain, kinds, last)
            if why is not None:
                self._run.skipped(place, kinds, why)
        return fused_any

    def _blocked(
        self, chain: _Chain, kinds: list[str], last: ast.Call
    ) -> tuple[list[str], str | None]:
        """What follows a chain that could go on, and why it is not part of it."""
        if chain.first in self._finder.blocked:
            link, why = self._finder.blocked[chain.first]
            return [*kinds, chain.pattern.kind_of(link.values[0]) or ""], why
        if len(kinds) > 1:
            return kinds, None
        callee, values = self._consumer(last)
        if callee is None:
            return kinds, "no activation or pool follows"
        value = values[0] if values else None
        label = type(value).__name__ if isinstance(value, nn.Module) else ast.unparse(callee)
        return [*kinds, label], chain.pattern.not_continued(value, ast.unparse(callee))

    def _consumer(self, node: ast.expr) -> tuple[ast.expr | None, list]:
        """The callee, and its values, that takes the result of `node` next."""
        parent = self._parents.get(node)
        assignment = assigned(parent)
        if parent is not None and assignment is not None:
            reads = self._next_read(parent, assignment[0])
            parent = None if reads is None else self._parents.get(reads)
        if isinstance(parent, ast.Attribute):
            parent = self._parents.get(parent)
        if isinstance(parent, ast.Call):
            return parent.func, self._finder.resolver.resolve(parent.func)
        return None, []

    def _next_read(self, statement: ast.AST, name: str) -> ast.AST | None:
        """Where a statement after `statement` in the same block first reads the variable `name`."""
        for _, block in ast.iter_fields(self._parents[statement]):
            if isinstance(block, list) and statement in block:
                for later in block[block.index(statement) + 1 :]:
                    for node in ast.walk(later):
                        if reads(node, name):
                            return node
        return None

    def _place_of(self, value: object, line: int) -> str:
        return self._run.names.get(id(value), f"{self._place}:{line}")


def _literal_arguments(link: _Link) -> tuple[tuple, dict] | None:
    """The further arguments of a call, if they are written out as constants."""
    try:
        args = tuple(map(ast.literal_eval, link.args))
        return args, {word.arg: ast.literal_eval(word.value) for word in link.keywords}
    except ValueError:
        return None


def _run_call(chain: _Chain, backend: str | None) -> ast.Call:
    """run(backend, callee, args, kwargs, (callee, args, kwargs), ...) in the order of the calls."""
    steps = [_tuple(link.callee, _tuple(*link.args), _dict(link.keywords)) for link in chain.links]
    first = [chain.first.func, _tuple(*chain.first.args), _dict(chain.first.keywords)]
    function = ast.Name(_run_name(chain.pattern), ast.Load())
    return ast.Call(function, [ast.Constant(backend), *first, *steps], [])


def _run_name(pattern: Pattern) -> str:
    return f"_pyops_run_{pattern.first}"


def _tuple(*elements: ast.expr) -> ast.Tuple:
    return ast.Tuple(list(elements), ast.Load())


def _dict(keywords: list[ast.keyword]) -> ast.Dict:
    keys: list[ast.expr | None] = [
        None if keyword.arg is None else ast.Constant(keyword.arg) for keyword in keywords
    ]
    return ast.Dict(keys, [keyword.value for keyword in keywords])
