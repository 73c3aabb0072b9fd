"""Every test starts with an empty Dynamo and leaves the process as it found it; what is slow is
left to ``make test-all``.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run what is marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skipped, and not deselected: so that a run names what it leaves out, and says why."""
    if config.getoption("slow"):
        return
    for item in items:
        slow = item.get_closest_marker("slow")
        if slow is not None:
            item.add_marker(pytest.mark.skip(reason=f"slow: {slow.kwargs['reason']}"))


def pytest_collection_finish() -> None:
    """What is imported by now stays: hundreds of thousands of objects that collections, which
    compiling sets off by the hundred, would look through in vain (a tenth of the time of tests).
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _clean_torch() -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch._dynamo.reset()
    # The tensors are tiny: a second thread, on a busy machine, is mostly waited for.
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
