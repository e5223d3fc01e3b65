"""Without a GPU the Triton kernels run under Triton's interpreter, which must be chosen before its import."""

import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
