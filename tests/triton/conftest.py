"""These tests run Triton's kernels: on a GPU, with TRITON_INTERPRET=1 in Triton's interpreter, or with the plugin
tests/compiled.py compiled and interpreted. Each holds for a whole process.

tests/test_triton.py starts these processes where there is no GPU.
"""

from __future__ import annotations

import os

import torch

WAYS = {"TRITON_INTERPRET", "EK_ARCHITECTURE"}
collect_ignore_glob = [] if WAYS & set(os.environ) or torch.cuda.is_available() else ["*"]
