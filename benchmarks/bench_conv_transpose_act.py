"""conv_transpose2d_act beside torch, a group of entries for every layer and direction."""

import pytest
import torch

from pyops.bench.conv_transpose_act import SETS, problem
from pyops.bench.problem import DIRECTIONS

NOTATIONS = [n for name in ("dcgan28", "dcgan64", "other") for n in SETS[name]]
PROVIDERS = ("pyops", "eager", "channels_last", "compile")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("notation", NOTATIONS)
def test_conv_transpose_act(timed_problem, device, notation, direction, provider):
    timed_problem(problem(notation, torch.float32, device), direction, provider)
