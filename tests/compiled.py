"""A pytest plugin: the Triton backend serves the CPU. What it launches is compiled for the GPU architecture that the
environment variable EK_ARCHITECTURE names, and its PTX runs in tests/ptx.py.

It has to come before embedkern: EK_ARCHITECTURE=90 PYTHONPATH=tests pytest -p compiled tests/triton
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from ptx import execute

ARCHITECTURE = int(os.environ["EK_ARCHITECTURE"])


def _run(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    with resources.recorded() as launches:
        launcher.run(kernel, programs, *arguments, **options)
    execute(resources.compile_launch(launches[0], ARCHITECTURE), programs, arguments)


# The launcher is where the backend learns its device, and the one way to a GPU.
_NAME = "embedkern.backends.triton.launcher"
_FILE = Path(importlib.util.find_spec("embedkern").origin).parent / "backends" / "triton" / "launcher.py"  # type: ignore[union-attr, arg-type]
_spec: Any = importlib.util.spec_from_file_location(_NAME, _FILE)
launcher: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(launcher)
launcher.DEVICE, launcher.run = "cpu", _run
sys.modules[_NAME] = launcher

from embedkern.backends.triton import attention  # noqa: E402
from embedkern.bench import resources  # noqa: E402

attention.is_large = lambda device: ARCHITECTURE >= 90
