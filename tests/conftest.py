"""Every test runs with fixed seeds, two threads and poisoned memory."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

import pytest

# Threads that spin while they wait multiply the time of every test where other processes run, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read as torch is imported

import torch  # noqa: E402

_M_PERTURB = -6  # glibc's mallopt: every allocated byte becomes the complement of the argument


def pytest_configure() -> None:
    torch.set_num_threads(2)
    if sys.platform == "linux":
        # Memory of the native libraries, their scratch included: 3.4e38 in float32 and
        # bfloat16, NaN in float16, a place outside every window in a code.
        getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(_M_PERTURB, 0x80)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proof", help="write what the GPU tests prove of each op and backend here")


_outcomes: dict[tuple[str, str], dict[str, int]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.when == "call" or report.outcome != "passed":
        for marker in item.iter_markers("proves"):
            counts = _outcomes.setdefault(marker.args, {})
            counts[report.outcome] = counts.get(report.outcome, 0) + 1
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--proof")
    if path is None or not torch.cuda.is_available():
        return
    from pyops.bench.harness import environment
    from pyops.bench.proven import summary

    device = torch.device("cuda", torch.cuda.current_device())
    facts = {"capability": torch.cuda.get_device_capability(device)} | {"env": environment(device)}
    Path(path).write_text(json.dumps(summary(_outcomes, **facts), indent=1) + "\n")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _reproducible():
    """Seeds, and torch.empty* filled with NaN (torch does that in its deterministic mode)."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def without_interpreter(monkeypatch):
    """As without Triton: its interpreter, which tests/triton asks for, takes minutes for a table."""
    from pyops import backends

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(backends, "_triton_missing", lambda: "Triton is left out of this test")


@pytest.fixture
def float32_precision():
    """Sets torch's precision of float32 on GPUs ("ieee", "tf32") for one test.

    monkeypatch would delete the attributes afterwards, which are none of the objects' own.
    """
    backends = torch.backends
    switches = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]

    def choose(value):
        for switch in switches:
            switch.fp32_precision = value

    yield choose
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value
