"""What the expressions in a method stand for, as far as the module at hand tells.

An answer is a list of alternatives: one value for `self.conv1`, every element for the variable of
a loop over a ModuleList, none for what only a run can tell. Nothing is called to find out, no
property is read. The answers decide what gets rewritten and what is reported; they need not
stay true, because the rewritten code looks again at every call.
"""

import ast
import builtins
import inspect
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

_MISSING = object()


class Resolver:
    """Resolves expressions inside a method of `module`, of which `node` is the tree."""

    def __init__(self, module: nn.Module, function: FunctionType, node: ast.FunctionDef):
        self._globals = function.__globals__
        code = function.__code__
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        self._cells = dict(cells)
        self._locals = {*code.co_varnames, *code.co_cellvars}
        stored = [
            name.id
            for name in ast.walk(node)
            if isinstance(name, ast.Name) and not isinstance(name.ctx, ast.Load)
        ]
        self._locals.update(stored)
        self._known: dict[str, list] = {}
        arguments = [*node.args.posonlyargs, *node.args.args]
        if arguments and arguments[0].arg not in stored:
            self._known[arguments[0].arg] = [module]
        for statement in ast.walk(node):
            if isinstance(statement, ast.For):
                self._bind_loop(statement.target, statement.iter, stored)
            elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                self._bind(statement.targets[0], self.resolve(statement.value), stored)

    def resolve(self, node: ast.expr) -> list:
        """The values that `node` may have; empty if unknown."""
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.Attribute):
            found = [_attribute(base, node.attr) for base in self.resolve(node.value)]
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            found = [_item(base, node.slice.value) for base in self.resolve(node.value)]
        else:
            return []
        return [] if any(value is _MISSING for value in found) else found

    def _name(self, name: str) -> list:
        if name in self._known:
            return self._known[name]
        if name in self._locals:
            return []
        if name in self._cells:
            try:
                return [self._cells[name].cell_contents]
            except ValueError:  # not yet filled
                return []
        if name in self._globals:
            return [self._globals[name]]
        return [getattr(builtins, name)] if hasattr(builtins, name) else []

    def _bind(self, target: ast.expr, values: list, stored: list[str]) -> None:
        if isinstance(target, ast.Name) and values and stored.count(target.id) == 1:
            self._known[target.id] = values

    def _bind_loop(self, target: ast.expr, iterable: ast.expr, stored: list[str]) -> None:
        if isinstance(iterable, ast.Call) and isinstance(target, ast.Tuple):
            function = self.resolve(iterable.func)
            called = function[0] if len(function) == 1 else None
            if called is zip and len(target.elts) == len(iterable.args):
                for part, source in zip(target.elts, iterable.args, strict=True):
                    self._bind_loop(part, source, stored)
            elif called is enumerate and len(target.elts) == 2 and iterable.args:
                self._bind_loop(target.elts[1], iterable.args[0], stored)
        else:
            self._bind(target, self._elements(iterable), stored)

    def _elements(self, node: ast.expr) -> list:
        if isinstance(node, ast.Tuple | ast.List):
            elements = [self.resolve(element) for element in node.elts]
            return [value for values in elements for value in values] if all(elements) else []
        values = self.resolve(node)
        if len(values) == 1 and isinstance(values[0], nn.ModuleList | nn.Sequential | list | tuple):
            return list(values[0])
        return []


def _attribute(base: object, name: str) -> object:
    if isinstance(base, ModuleType):
        return vars(base).get(name, _MISSING)
    if not isinstance(base, nn.Module):
        return _MISSING
    for table in (base.__dict__, base._modules, base._parameters, base._buffers):
        if name in table:
            return table[name]
    return _MISSING


def _item(base: Any, key: Any) -> object:
    if not isinstance(base, nn.ModuleList | nn.Sequential | nn.ModuleDict | list | tuple | dict):
        return _MISSING
    try:
        return base[key]
    except (IndexError, KeyError, TypeError):
        return _MISSING


def is_method(module: nn.Module, name: str) -> bool:
    """Whether `module.name` is a method of the module's class, in Python and not torch's own."""
    method = inspect.getattr_static(type(module), name, None)
    return isinstance(method, FunctionType) and not is_torchs_own(method)


def is_torchs_own(function: object) -> bool:
    """Whether a function comes from torch itself."""
    return str(getattr(function, "__module__", "")).partition(".")[0] == "torch"
