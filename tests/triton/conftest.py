"""Without a GPU the kernels run under Triton's interpreter, chosen before Triton's import."""

import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
