"""attention, packed sequences and decoding beside torch, a group of entries for every shape and direction."""

import pytest
import torch

from pyops.bench.attention import SETS, problem
from pyops.bench.problem import DIRECTIONS

NOTATIONS = [n for name, notations in SETS.items() if name != "gpu" for n in notations]
PROVIDERS = ("pyops", "eager", "compile", "flex")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("notation", NOTATIONS)
def test_attention(timed_problem, device, notation, direction, provider):
    timed_problem(problem(notation, torch.float32, device), direction, provider)
