"""Automatic choice of GPU kernels rests on committed results of `make gpu-test`, and on nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyops import backends
from pyops.bench import proven

ROOT = Path(__file__).parent.parent


def test_the_committed_list_is_what_the_results_prove():
    assert json.loads(proven.PROVEN.read_text()) == proven.collect(ROOT)


@pytest.fixture
def results(tmp_path):
    outcomes = {
        ("conv_relu_pool2d", "cuda"): {"passed": 40, "skipped": 1},
        ("conv_relu_pool2d", "triton"): {"passed": 40, "failed": 1},
        ("lstm", "triton"): {"skipped": 3},
    }
    folder = tmp_path / "benchmarks/results/some-gpu"
    folder.mkdir(parents=True)
    run = proven.summary(outcomes, capability=[9, 0])
    (folder / "gpu-test.json").write_text(json.dumps(run))
    return tmp_path


def test_only_what_passed_without_a_failure_is_proven(results):
    assert proven.collect(results) == [
        {
            "op": "conv_relu_pool2d",
            "backend": "cuda",
            "capability": [9, 0],
            "results": "benchmarks/results/some-gpu/gpu-test.json",
        }
    ]


def test_automatic_choice_takes_what_is_proven_on_that_architecture(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    monkeypatch.setattr(backends, "capability", lambda device: (9, 0))
    device = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "PROVEN", {("conv_relu_pool2d", "cuda", (8, 0)): "a.json"})
    assert backends.automatic("conv_relu_pool2d", device)[0] == ("reference",)
    monkeypatch.setattr(backends, "PROVEN", {("conv_relu_pool2d", "cuda", (9, 0)): "a.json"})
    order, why = backends.automatic("conv_relu_pool2d", device)
    assert order == ("cuda", "reference") and "a.json" in why
