"""pytest-benchmark entries: `pytest benchmarks/bench_conv_relu_pool.py`. Rows: `pyops bench`."""

import pytest
import torch


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
