"""A forward for nn.Sequential that runs the chains among its modules as fused calls."""

import functools
from collections.abc import Callable
from typing import Any, TypeGuard

from torch import nn

from pyops._swap.pattern import Pattern
from pyops._swap.report import Run


def runs_in_order(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a module is an nn.Sequential, or a subclass that runs its modules as one does."""
    if not isinstance(module, nn.Sequential):
        return False
    kind = type(module)
    return kind.forward is nn.Sequential.forward and kind.__iter__ is nn.Sequential.__iter__


def rewrite(module: nn.Sequential, run: Run) -> Callable | None:
    """The scanning forward if there is something in `module` to fuse; reports on every chain."""
    names = run.names
    replaced = False
    modules = list(module)
    for index, first in enumerate(modules):
        pattern = _pattern_of(first, run.patterns)
        if pattern is None:
            continue
        end = _chain_end(modules, index, pattern)
        following = modules[index + 1 : end]
        if pattern.common and not following:
            continue
        kinds = [pattern.first, *(pattern.kind_of(m) or "" for m in following)]
        fused, why = 0, pattern.refusal(first)
        if why is None:
            fused, why = pattern.plan([(module, ((), {})) for module in following])
        place = names[id(first)]
        if any(kind != "identity" for kind in kinds[1 : fused + 1]):
            replaced = True
            run.replaced(place, kinds[: fused + 1])
        if why is None and not following:
            why = "no activation or pool follows"
            if end < len(modules):
                kinds.append(type(modules[end]).__name__)
                why = pattern.not_continued(modules[end], names[id(modules[end])])
        if why is not None:
            run.skipped(place, kinds, why)
    return _scanning_forward(run.patterns, run.backend) if replaced else None


def _pattern_of(first: nn.Module, patterns: tuple[Pattern, ...]) -> Pattern | None:
    for pattern in patterns:
        if pattern.starts(first):
            return pattern
    return None


def _chain_end(modules: list[nn.Module], index: int, pattern: Pattern) -> int:
    end = index + 1
    while end < len(modules) and pattern.continues(modules[end], 0, ()):
        end += 1
    return end


@functools.cache
def _scanning_forward(patterns: tuple[Pattern, ...], backend: str | None) -> Callable:
    def forward(self: nn.Sequential, input: Any) -> Any:
        modules = list(self)
        index = 0
        while index < len(modules):
            first = modules[index]
            pattern = _pattern_of(first, patterns)
            if pattern is not None:
                end = _chain_end(modules, index, pattern)
                steps: list[tuple] = [(module, (), {}) for module in modules[index + 1 : end]]
                input = pattern.run(backend, first, (input,), {}, *steps)
                index = end
            else:
                input = first(input)
                index += 1
        return input

    return forward
