"""Swap the fused ops into any model, in place, and take them out again."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import MethodType

import torch
from torch import nn

from pyops import backends
from pyops._swap import chains, lstm, multihead, sequential
from pyops._swap.attention import ATTENTION
from pyops._swap.conv_pool import CONV_POOL
from pyops._swap.conv_transpose import CONV_TRANSPOSE
from pyops._swap.linear import LINEAR
from pyops._swap.report import Entry, Report, Run
from pyops._swap.resolve import is_torchs_own
from pyops._swap.source import SourceUnavailable

__all__ = ["Entry", "Report", "optimize", "optimized", "restore"]

PATTERNS = (CONV_POOL, CONV_TRANSPOSE, ATTENTION, LINEAR)
SINGLE = (nn.LSTM, nn.MultiheadAttention)  # modules that an op stands in for by themselves
# What exported programs call instead of torch's functions, by the names of `torch.ops.aten`.
ATEN = ("conv2d", "conv_transpose2d", "lstm", "scaled_dot_product_attention")
# On a function that stands in for a method: says that it is ours.
_MARK = "_pyops_stand_in"


def optimize(model: nn.Module, *, backend: str | None = None) -> Report:
    """Run convolution → ReLU → pool, and every nn.LSTM, as one fused op in `model`, in place.

    Found are modules and functions (nn.Conv2d, nn.ReLU, F.max_pool2d, x.relu() ...) in the forward
    of every submodule, in the methods it calls, and in nn.Sequential. The parameters, the
    state_dict, the type of every module and what a forward computes stay the same. Every call looks
    whether the op may still stand in (no hooks, no parametrization, a floating-point image of three
    or four dimensions) and runs the calls as they were written otherwise. torch.compile breaks its graph at
    any nn.LSTM unless torch._dynamo.config.allow_rnn is set; with it, the op is in the graph.

    In training, the output of a fused activation must not be changed in place (`y = block(x); y += skip`):
    autograd refuses it, also after a LeakyReLU, where plain torch would keep the input instead.

    A copy.deepcopy and the replicas of nn.DataParallel are optimised as well. A pickled model comes
    back plain, with its own methods on the instances: restore it before copying it any further. A
    copy.copy runs the forward of the model that it was copied from: restore first.

    Args:
        model: any module. It may have been optimised before; the result is then as if it had not.
        backend: the backend for every fused op, as for `pyops.conv_relu_pool2d`; None picks.

    Returns:
        Which places were replaced, and which were skipped and why. Print it.

    Raises:
        TypeError: `model` is not an nn.Module, or `backend` neither None nor a string.
        ValueError: unknown backend.
    """
    _check_module(model)
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected None or a string, got {type(backend).__name__}")
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"backend: expected None or one of {backends.NAMES}, got {backend!r}")
    names = {id(module): name for name, module in model.named_modules()}
    run = Run(names, PATTERNS, backend, Report())
    scripted: set[nn.Module] = set()
    for module in model.modules():
        if module in scripted:
            continue
        if isinstance(module, torch.jit.ScriptModule):
            scripted.update(module.modules())
            place = run.place(module, "forward")
            run.skipped(place, ["forward"], "compiled by torch.jit, it has no Python source")
            continue
        _restore_module(module)
        if "forward" in module.__dict__:
            if isinstance(module, SINGLE) or any(map(_may_be_swapped, module.children())):
                run.skipped(run.place(module, "forward"), ["forward"], "set on this instance")
            continue
        found = _stand_ins(module, run)
        if found and "_replicate_for_data_parallel" not in module.__dict__:
            found["_replicate_for_data_parallel"] = _replicate_for_data_parallel
        for method, function in found.items():
            setattr(function, _MARK, True)
            # Pickle stores a bound method as its name and finds the class's own by it on loading.
            function.__name__ = method
            module.__dict__[method] = MethodType(function, module)
    return run.report


def restore(model: nn.Module) -> None:
    """Undo `optimize`: every module is again as it was.

    Raises:
        TypeError: `model` is not an nn.Module.
    """
    _check_module(model)
    for module in model.modules():
        _restore_module(module)


@contextlib.contextmanager
def optimized(model: nn.Module, *, backend: str | None = None) -> Iterator[Report]:
    """`optimize` for the duration of a with block; yields the report.

    Afterwards the model is as it was before, optimised if it was.
    """
    _check_module(model)
    before = [(module, _own_stand_ins(module)) for module in model.modules()]
    try:
        yield optimize(model, backend=backend)
    finally:
        restore(model)
        for module, stand_ins in before:
            module.__dict__.update(stand_ins)


def _stand_ins(module: nn.Module, run: Run) -> dict[str, Callable]:
    """New functions for methods of `module`, by name."""
    for swap in (lstm, multihead):
        forward = swap.rewrite(module, run)
        if forward is not None:
            return {"forward": forward}
    if sequential.runs_in_order(module):
        forward = sequential.rewrite(module, run)
        return {} if forward is None else {"forward": forward}
    if is_torchs_own(inspect.getattr_static(type(module), "forward")):
        return {}
    if isinstance(module, torch.fx.GraphModule):
        for name in ATEN:
            if any(str(node.target).startswith(f"aten.{name}.") for node in module.graph.nodes):
                why = "an exported program calls torch.ops.aten; optimize before exporting"
                run.skipped(run.place(module, "forward"), [name], why)
    found: dict[str, Callable] = {}
    waiting, seen = ["forward"], set()
    while waiting:
        method = waiting.pop()
        if method in seen or method in module.__dict__:
            continue
        seen.add(method)
        try:
            function, called = chains.rewrite(module, method, run)
        except SourceUnavailable as error:
            if any(map(_may_be_swapped, module.modules())):
                run.skipped(run.place(module, method), [method], str(error))
            continue
        if function is not None:
            found[method] = function
        waiting += sorted(called)
    return found


def _replicate_for_data_parallel(self: nn.Module) -> nn.Module:
    """As the class's, which copies attributes: our methods in them must run on the replica's weights."""
    replica: nn.Module = type(self)._replicate_for_data_parallel(self)
    for name, method in _own_stand_ins(self).items():
        replica.__dict__[name] = MethodType(method.__func__, replica)
    return replica


def _may_be_swapped(module: nn.Module) -> bool:
    return isinstance(module, SINGLE) or any(p.starts(module) and not p.common for p in PATTERNS)


def _own_stand_ins(module: nn.Module) -> dict[str, MethodType]:
    return {
        name: value
        for name, value in module.__dict__.items()
        if isinstance(value, MethodType) and hasattr(value.__func__, _MARK)
    }


def _restore_module(module: nn.Module) -> None:
    """Drop our methods, and the class's own that unpickling leaves in their place."""
    left_over = [
        name
        for name, value in module.__dict__.items()
        if isinstance(value, MethodType)
        and value.__self__ is module
        and value.__func__ is inspect.getattr_static(type(module), name, None)
    ]
    for name in (*_own_stand_ins(module), *left_over):
        del module.__dict__[name]


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
