"""Every test runs with uninitialised memory filled with NaN: a kernel that forgets to write a value shows it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from embedkern import _native


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-kernel", action="store_true", help="compile every Triton kernel: minutes")
    parser.addoption("--shard", default="0/1", help="I/N: every N-th test, from the I-th on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, shards = map(int, config.getoption("--shard").split("/"))
    items[:] = items[shard::shards]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=list(_native.variants()))
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces each instruction-set variant of the CPU kernels in turn."""
    if not _native.variants()[request.param]:
        pytest.skip(f"this CPU lacks {request.param}")
    _native.force_variant(request.param)
    yield request.param
    _native.force_variant("")
