"""Nothing here captures or compiles: what needs Dynamo is a test of tests/graph or tests/system."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.callback import CallbackArgs, callback_handler


@pytest.fixture(autouse=True)
def _clean_torch() -> Iterator[None]:
    """As for all tests, but Dynamo is not reset: that takes longer than most tests here."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_dynamo(_clean_torch: None) -> Iterator[None]:
    started: list[CallbackArgs] = []
    callback_handler.register_start_callback(started.append)
    yield
    assert not started, "a unit test ran Dynamo"
