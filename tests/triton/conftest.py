"""These tests run Triton's kernels: on a GPU, or with TRITON_INTERPRET=1 on the CPU, which holds for a whole process.

tests/test_triton.py starts that process where there is no GPU.
"""

from __future__ import annotations

import os

import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["*"]
