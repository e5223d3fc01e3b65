"""conv_relu_pool2d and plain torch, a group of entries for every layer and direction."""

import functools

import pytest
import torch

import pyops
from pyops.bench import shapes
from pyops.bench.agreement import Agreement, chain, make_inputs, worst
from pyops.bench.conv_relu_pool import DIRECTIONS, LAYOUTS, bind

NOTATIONS = [n for name in ("cpu", "alexnet", "vgg16", "resnet18") for n in shapes.SETS[name]]
PROVIDERS = ("pyops", "eager", "compile")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("notation", dict.fromkeys(NOTATIONS))
def test_conv_relu_pool(benchmark, timed, device, notation, direction, provider, layout):
    benchmark.group = f"{notation} {direction}"
    shape = shapes.parse(notation)
    backward = direction == "forward+backward"
    inputs = make_inputs(shape, torch.float32, device)
    fn = chain(shape)
    if provider == "pyops":
        fn = functools.partial(pyops.conv_relu_pool2d, **shape.op_arguments)
        verdicts = Agreement(shape, inputs, backward).verdicts(fn, LAYOUTS[layout])
        assert worst(verdicts.values()).passed, verdicts
    elif provider == "compile":
        torch._dynamo.reset()
        fn = torch.compile(fn, dynamic=False, fullgraph=True)
    timed(bind(fn, inputs, LAYOUTS[layout], backward))
