"""The pattern conv → activation → pool: what belongs to it, and the guarded call that runs it."""

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pyops._swap.guard import class_of, has_global_hooks, is_plain_tensor, is_untouched, obstacle
from pyops.ops.conv_relu_pool import conv_relu_pool2d

# Arguments of the fused op that one step sets; a step that sets none (nn.Identity) is {}.
Settings = dict[str, Any]
# callee (a method of the tensor, where it is a string), further positional, keyword arguments
Step = tuple[Any, tuple, dict]


def _relu(inplace: bool = False) -> Settings | None:
    return {"activation": "relu"}


def _relu_in_torch() -> Settings | None:
    return {"activation": "relu"}


def _leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Settings | None:
    # Autograd refuses a negative slope in place, and the pooled maximum moves under one.
    if negative_slope < 0:
        return None
    return {"activation": "leaky_relu", "negative_slope": negative_slope}


def _leaky_relu_(negative_slope: float = 0.01) -> Settings | None:
    return _leaky_relu(negative_slope)


def _max_pool2d(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Settings | None:
    if return_indices or dilation not in (1, (1, 1), [1, 1]):
        return None
    return _pool("max", kernel_size, stride, padding, ceil_mode)


def _max_pool2d_in_torch(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Settings | None:
    return _max_pool2d(kernel_size, stride, padding, dilation, ceil_mode)


def _avg_pool2d(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Settings | None:
    padded = padding not in (0, (0, 0), [0, 0])
    if divisor_override is not None or (padded and not count_include_pad):
        return None
    return _pool("avg", kernel_size, stride, padding, ceil_mode)


def _pool(pool: str, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool) -> Settings:
    return {
        "pool": pool,
        "pool_size": kernel_size,
        "pool_stride": stride or None,  # torch takes () for "as the window"
        "pool_padding": padding,
        "ceil_mode": ceil_mode,
    }


_FUNCTIONS: dict[Any, Callable[..., Settings | None]] = {
    F.relu: _relu,
    F.relu_: _relu_in_torch,
    torch.relu: _relu_in_torch,
    torch.relu_: _relu_in_torch,
    "relu": _relu_in_torch,
    "relu_": _relu_in_torch,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu_,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d_in_torch,
    F.avg_pool2d: _avg_pool2d,
}
METHODS = frozenset(name for name in _FUNCTIONS if isinstance(name, str))


_RELU: Settings = {"activation": "relu"}
_IDENTITY: Settings = {}


def _max_pool_module(module: Any) -> Settings | None:
    return _max_pool2d(
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.ceil_mode,
        module.return_indices,
    )


def _avg_pool_module(module: Any) -> Settings | None:
    return _avg_pool2d(
        module.kernel_size,
        module.stride,
        module.padding,
        module.ceil_mode,
        module.count_include_pad,
        module.divisor_override,
    )


_MODULES: dict[type, Callable[[Any], Settings | None]] = {
    nn.ReLU: lambda module: _RELU,
    nn.LeakyReLU: lambda module: _leaky_relu(module.negative_slope),
    nn.MaxPool2d: _max_pool_module,
    nn.AvgPool2d: _avg_pool_module,
    nn.Identity: lambda module: _IDENTITY,
}


def _step_settings(step: Step) -> Settings | None:
    """What a step asks of the op; None where the step must run as it is. Not to be changed."""
    function, args, kwargs = step
    if isinstance(function, nn.Module):
        read = _MODULES.get(class_of(function))
        if read is None or args or kwargs or not is_untouched(function):
            return None
        return read(function)
    try:
        bind = _FUNCTIONS.get(function)
        return None if bind is None else bind(*args, **kwargs)
    except TypeError:  # unhashable, or wrong arguments: the call itself says it best
        return None


def _joins(call: Settings, settings: Settings) -> bool:
    """Whether the op can take `settings` after what `call` holds already, with equal results."""
    if "activation" in settings:
        # After the pool only ReLU over a maximum commutes, in ties and gradients too: the place
        # of a positive maximum stays, and any other gets no gradient. LeakyReLU can make two
        # different negative values equal by rounding, which moves the first maximum.
        return call["activation"] is None and (
            call["pool"] is None or (call["pool"] == "max" and settings["activation"] == "relu")
        )
    return call["pool"] is None or "pool" not in settings


def _absorb(call: Settings, steps: tuple[Step, ...]) -> int:
    """Add the leading `steps` that the op can take to `call`; return how many those are."""
    for index, step in enumerate(steps):
        settings = _step_settings(step)
        if settings is None or not _joins(call, settings):
            return index
        call.update(settings)
    return len(steps)


def _function_call(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Settings:
    return {
        "input": input,
        "weight": weight,
        "bias": bias,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "activation": None,
        "pool": None,
    }


def _convolution(function: Any, args: tuple, kwargs: dict) -> Settings | None:
    """The op's arguments for a call of a convolution; None where the op must not stand in."""
    if isinstance(function, nn.Conv2d):
        if (
            class_of(function) is not nn.Conv2d
            or len(args) != 1
            or kwargs
            or function.padding_mode != "zeros"
            or "_conv_forward" in function.__dict__  # a known way to change the padding
            or not is_untouched(function)
        ):
            return None
        call = _function_call(
            args[0],
            function.weight,
            function.bias,
            function.stride,
            function.padding,
            function.dilation,
            function.groups,
        )
    elif function is F.conv2d or function is torch.conv2d:
        try:
            call = _function_call(*args, **kwargs)
        except TypeError:
            return None
    else:
        return None
    if has_global_hooks() or torch.jit.is_tracing():
        return None
    input, weight = call["input"], call["weight"]
    if not (is_plain_tensor(input) and is_plain_tensor(weight)) or input.dim() not in (3, 4):
        return None
    # Mixed dtypes are right only where autocast casts them; torch's own error otherwise.
    if input.dtype is not weight.dtype and not torch.is_autocast_enabled(input.device.type):
        return None
    return call


def run(backend: str | None, function: Any, args: tuple, kwargs: dict, *steps: Step) -> Any:
    """`function(*args, **kwargs)`, then each step on its result: as one fused op if that is safe.

    Whatever the fused op does not take runs as the calls that were written.
    """
    call = _convolution(function, args, kwargs)
    done = 0 if call is None else _absorb(call, steps)
    if call is not None and (call["activation"] or call["pool"]):
        out = conv_relu_pool2d(**call, backend=backend)
    else:
        done = 0
        out = function(*args, **kwargs)
    for callee, further, named in steps[done:]:
        if isinstance(callee, str):
            out = getattr(out, callee)(*further, **named)
            continue
        out = callee(out, *further, **named)
    return out


# What follows is used while a model is being optimised, not when it runs.


def starts(value: object) -> bool:
    """Whether a chain may begin with a call of `value`."""
    return isinstance(value, nn.Conv2d) or value is F.conv2d or value is torch.conv2d


def continues(value: Any, positional: int, keywords: tuple[str, ...]) -> bool:
    """Whether a chain may go on with a call of `value` that has these further arguments."""
    if isinstance(value, nn.Module):
        return not positional and not keywords and kind_of(value) is not None
    if kind_of(value) is None:
        return False
    try:
        inspect.signature(_FUNCTIONS[value]).bind(*range(positional), **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


_MODULE_KINDS = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.MaxPool2d: "max_pool",
    nn.AvgPool2d: "avg_pool",
    nn.Identity: "identity",
}
_FUNCTION_KINDS = {
    _relu: "relu",
    _relu_in_torch: "relu",
    _leaky_relu: "leaky_relu",
    _leaky_relu_: "leaky_relu",
    _max_pool2d: "max_pool",
    _max_pool2d_in_torch: "max_pool",
    _avg_pool2d: "avg_pool",
}


def kind_of(value: Any) -> str | None:
    """The kind, such as "relu", of what can follow a convolution; None for anything else."""
    if isinstance(value, nn.Module):
        return _MODULE_KINDS.get(type(value))
    bind = _FUNCTIONS.get(value) if isinstance(value, Hashable) else None
    return None if bind is None else _FUNCTION_KINDS[bind]


def refusal(conv: object) -> str | None:
    """In words, why a chain cannot begin with `conv` as it is now; None if it can."""
    if not isinstance(conv, nn.Module):
        return None
    if type(conv) is not nn.Conv2d:
        return f"the convolution is a {type(conv).__name__}, not exactly nn.Conv2d"
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode!r}"
    if "_conv_forward" in conv.__dict__:
        return "the convolution has a _conv_forward of its own"
    reason = obstacle(conv)
    return reason and f"the convolution {reason}"


def plan(steps: list[tuple[Any, tuple[tuple, dict] | None]]) -> tuple[int, str | None]:
    """How many of the steps after a convolution fuse, and why the next one does not.

    `steps`: each callable with its further arguments, which are None if only a run tells them.
    """
    call: Settings = {"activation": None, "pool": None}
    for index, (value, arguments) in enumerate(steps):
        kind = kind_of(value) or ""
        if isinstance(value, nn.Module) and (reason := obstacle(value)):
            return index, f"the {type(value).__name__} {reason}"
        settings: Settings | None
        if arguments is not None:
            settings = _step_settings((value, *arguments))
        else:
            settings = {"pool": kind[:3]} if kind.endswith("pool") else {"activation": kind}
        if settings is None:
            return index, f"no fused form of this {kind}"
        if not _joins(call, settings):
            return index, f"{kind} does not fuse after what comes before it"
        call.update(settings)
    return len(steps), None


def not_continued(value: Any, written: str) -> str:
    """In words, why a call of `value`, written as `written`, does not continue a chain."""
    if isinstance(value, nn.modules.batchnorm._BatchNorm):
        return f"{written} follows; folding it into the convolution would change the parameters"
    if kind_of(value) is not None:
        return f"{written} follows, but not where the two calls can be joined safely"
    return f"{written} follows, which does not fuse"
