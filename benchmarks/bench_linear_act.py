"""linear_act beside torch, a group of entries for every layer and direction."""

import pytest
import torch

from pyops.bench.linear_act import SETS, problem
from pyops.bench.problem import DIRECTIONS

PROVIDERS = ("pyops", "eager", "compile")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("notation", SETS["gan"])
def test_linear_act(timed_problem, device, notation, direction, provider):
    timed_problem(problem(notation, torch.float32, device), direction, provider)
