"""lstm beside torch, a group of entries for every shape and direction."""

import pytest
import torch

from pyops.bench.lstm import SETS, problem
from pyops.bench.problem import DIRECTIONS

NOTATIONS = [n for name in ("cpu", "odd", "bidirectional") for n in SETS[name]]
PROVIDERS = ("pyops", "eager", "nn.LSTM")  # torch.compile takes minutes a shape: `pyops bench lstm`


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("notation", NOTATIONS)
def test_lstm(timed_problem, device, notation, direction, provider):
    timed_problem(problem(notation, torch.float32, device), direction, provider)
