"""pytest-benchmark entries: `pytest benchmarks/bench_conv_relu_pool.py`. Rows: `pyops bench`."""

import functools

import pytest
import torch

from pyops.bench.agreement import worst
from pyops.bench.problem import Agreement


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark, device):
    """Benchmarks a call, waiting for the device inside the timed function."""

    def run(fn):
        def synchronised():
            fn()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(synchronised, warmup_rounds=2, rounds=11, iterations=1)

    return run


@pytest.fixture
def timed_problem(benchmark, timed):
    """Benchmarks a `pyops.bench` problem as "pyops" (checked first), "eager", "compile" or one of its baselines."""

    def run(problem, direction, provider):
        benchmark.group = f"{problem.op} {problem.case} {direction}"
        backward = direction == "forward+backward"
        if backward and not problem.differentiable:
            pytest.skip("no gradients")
        fn = {"eager": problem.plain, **problem.baselines}.get(provider)
        if provider == "pyops":
            fn = functools.partial(problem.ours, backend=None)
            verdicts = Agreement(problem, backward).verdicts(fn)
            assert worst(verdicts.values()).passed, verdicts
        elif provider == "compile":
            if not problem.compiled:
                pytest.skip("takes minutes to compile, or cannot be")
            torch._dynamo.reset()
            fn = torch.compile(problem.plain, dynamic=False, fullgraph=True)
        if fn is None:
            pytest.skip(f"no baseline {provider} here")
        timed(problem.bind(fn, backward))

    return run
