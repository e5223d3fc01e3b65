"""A chain of calls that one fused op can stand in for: its first call, and what may follow it.

conv_pool.py and conv_transpose.py say what belongs to theirs; how a chain is recognised, guarded and run is
the same for all and is here.
"""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyops._swap.guard import class_of, has_global_hooks, is_plain_tensor, is_untouched, obstacle

# Arguments of the fused op that one step sets; a step that sets none (nn.Identity) is {}.
Settings = dict[str, Any]
# callee (a method of the tensor, where it is a string), further positional, keyword arguments
Step = tuple[Any, tuple, dict]
Reader = Callable[..., Settings | None]


@dataclass(frozen=True, eq=False)
class Pattern:
    """What a chain is made of, and the op that runs it.

    Attributes:
        first: the kind of the first call, such as "conv".
        module: the class of module that a chain may begin with, exactly.
        module_call: the op's arguments for a call of it with one tensor.
        own_method: a method that the class calls and users are known to replace on an instance.
        refusal_of: in words, why a module of the class cannot begin a chain; None if it can.
        function: the functions that a chain may begin with.
        function_call: the op's arguments for a call of one of them.
        functions: what may follow, by function or name of a tensor's method: its kind, and the settings
            for its further arguments (None: run it as it is).
        modules: the same by class of module, read from the module.
        joins: whether the op can take settings after what a call holds, with equal results.
        worthwhile: whether a call holds enough to run the op.
        op: takes the arguments, and `backend`.
        alone: whether the first call is worth replacing with nothing after it.
        images: whether the op takes three or four dimensions, (C, H, W) or (N, C, H, W), and no others.
        common: first calls without anything of the chain after them are everywhere: not worth a report.
    """

    first: str
    module: type[nn.Module]
    module_call: Callable[[Any, Any], Settings]
    own_method: str
    refusal_of: Callable[[Any], str | None]
    function: frozenset
    function_call: Callable[..., Settings]
    functions: dict[Any, tuple[str, Reader]]
    modules: dict[type, tuple[str, Callable[[Any], Settings | None]]]
    joins: Callable[[Settings, Settings], bool]
    worthwhile: Callable[[Settings], bool]
    op: Callable[..., Any]
    alone: bool = False
    images: bool = True
    common: bool = False

    @property
    def methods(self) -> frozenset[str]:
        return frozenset(name for name in self.functions if isinstance(name, str))

    # The following run at every call of a rewritten forward.

    def run(
        self, backend: str | None, function: Any, args: tuple, kwargs: dict, *steps: Step
    ) -> Any:
        """`function(*args, **kwargs)`, then each step on its result: as one fused op if that is safe.

        Whatever the fused op does not take runs as the calls that were written.
        """
        call = self._first_call(function, args, kwargs)
        done = 0 if call is None else self._absorb(call, steps)
        fused = call is not None and self.worthwhile(call)
        if call is not None and fused:
            try:
                out = self.op(**call, backend=backend)
            except (TypeError, ValueError):  # torch takes it after all, or has an error of its own
                fused = False
        if not fused:
            done = 0
            out = function(*args, **kwargs)
        for callee, further, named in steps[done:]:
            if isinstance(callee, str):
                out = getattr(out, callee)(*further, **named)
                continue
            out = callee(out, *further, **named)
        return out

    def _first_call(self, function: Any, args: tuple, kwargs: dict) -> Settings | None:
        """The op's arguments for the first call of a chain; None where the op must not stand in."""
        if isinstance(function, nn.Module):
            if (
                class_of(function) is not self.module
                or len(args) != 1
                or kwargs
                or self.own_method in function.__dict__
                or self.refusal_of(function) is not None
                or not is_untouched(function)
            ):
                return None
            call = self.module_call(function, args[0])
        elif function in self.function:
            try:
                call = self.function_call(*args, **kwargs)
            except TypeError:
                return None
        else:
            return None
        if has_global_hooks() or torch.jit.is_tracing():
            return None
        input, weight = call["input"], call["weight"]
        if not (is_plain_tensor(input) and is_plain_tensor(weight)):
            return None
        if self.images and input.dim() not in (3, 4):
            return None
        # Mixed dtypes are right only where autocast casts them; torch's own error otherwise.
        if input.dtype is not weight.dtype and not torch.is_autocast_enabled(input.device.type):
            return None
        return call

    def _absorb(self, call: Settings, steps: tuple[Step, ...]) -> int:
        """Add the leading `steps` that the op can take to `call`; return how many those are."""
        for index, step in enumerate(steps):
            settings = self.settings(step)
            if settings is None or not self.joins(call, settings):
                return index
            call.update(settings)
        return len(steps)

    def settings(self, step: Step) -> Settings | None:
        """What a step asks of the op; None where it must run as it is. Not to be changed."""
        function, args, kwargs = step
        if isinstance(function, nn.Module):
            found = self.modules.get(class_of(function))
            if found is None or args or kwargs or not is_untouched(function):
                return None
            return found[1](function)
        try:
            found = self.functions.get(function)
            return None if found is None else found[1](*args, **kwargs)
        except TypeError:  # unhashable, or wrong arguments: the call itself says it best
            return None

    # What follows is used while a model is being optimised, not when it runs.

    def starts(self, value: object) -> bool:
        """Whether a chain may begin with a call of `value`."""
        if isinstance(value, nn.Module):
            return isinstance(value, self.module)
        return isinstance(value, Hashable) and value in self.function

    def continues(self, value: Any, positional: int, keywords: tuple[str, ...]) -> bool:
        """Whether a chain may go on with a call of `value` that has these further arguments."""
        if isinstance(value, nn.Module):
            return not positional and not keywords and self.kind_of(value) is not None
        if self.kind_of(value) is None:
            return False
        try:
            signature = inspect.signature(self.functions[value][1])
            signature.bind(*range(positional), **dict.fromkeys(keywords))
        except TypeError:
            return False
        return True

    def kind_of(self, value: Any) -> str | None:
        """The kind, such as "relu", of what can follow the first call; None for anything else."""
        if isinstance(value, nn.Module):
            found: Any = self.modules.get(type(value))
        else:
            found = self.functions.get(value) if isinstance(value, Hashable) else None
        return None if found is None else found[0]

    def refusal(self, first: object) -> str | None:
        """In words, why a chain cannot begin with `first` as it is now; None if it can."""
        if not isinstance(first, nn.Module):
            return None
        noun = "the convolution" if self.images else "the layer"
        if type(first) is not self.module:
            return f"{noun} is a {type(first).__name__}, not exactly nn.{self.module.__name__}"
        if self.own_method in first.__dict__:
            return f"{noun} has a {self.own_method} of its own"
        reason = obstacle(first)
        return self.refusal_of(first) or (reason and f"{noun} {reason}")

    def plan(self, steps: list[tuple[Any, tuple[tuple, dict] | None]]) -> tuple[int, str | None]:
        """How many of the steps after the first call fuse, and why the next one does not.

        `steps`: each callable with its further arguments, which are None if only a run tells them.
        """
        call: Settings = {"activation": None}
        for index, (value, arguments) in enumerate(steps):
            kind = self.kind_of(value) or ""
            if isinstance(value, nn.Module) and (reason := obstacle(value)):
                return index, f"the {type(value).__name__} {reason}"
            settings: Settings | None
            if arguments is not None:
                settings = self.settings((value, *arguments))
            else:
                settings = {"pool": kind[:3]} if kind.endswith("pool") else {"activation": kind}
            if settings is None:
                return index, f"no fused form of this {kind}"
            if not self.joins(call, settings):
                return index, f"{kind} does not fuse after what comes before it"
            call.update(settings)
        return len(steps), None

    def not_continued(self, value: Any, written: str) -> str:
        """In words, why a call of `value`, written as `written`, does not continue a chain."""
        if isinstance(value, nn.modules.batchnorm._BatchNorm):
            return f"{written} follows; folding it into the convolution would change the parameters"
        if self.kind_of(value) is not None:
            return f"{written} follows, but not where the two calls can be joined safely"
        return f"{written} follows, which does not fuse"
