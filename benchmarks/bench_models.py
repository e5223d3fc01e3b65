"""Inference of whole models with the fast ops and with plain torch, a group for every model."""

import pytest
import torch

import pyops
from pyops.bench.models import MODELS, ModelAgreement, build

BATCH = 4


@pytest.mark.parametrize("ops", ("fast", "reference"))
@pytest.mark.parametrize("name", MODELS)
def test_inference(benchmark, timed, device, name, ops):
    benchmark.group = name
    case = MODELS[name]
    model = build(name).to(device)
    images = case.images(BATCH, case.usual).to(device)
    if ops == "fast":
        verdict = ModelAgreement(model).verdicts([(images, None)])["output"]
        assert verdict.passed, verdict
        pyops.optimize(model)
    with torch.no_grad():
        timed(lambda: model(images))
