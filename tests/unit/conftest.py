"""Nothing here captures or compiles: what needs Dynamo is a test of tests/graph or tests/system."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch._dynamo.callback import CallbackArgs, callback_handler


@pytest.fixture(autouse=True)
def _no_dynamo(_clean_torch: None) -> Iterator[None]:
    started: list[CallbackArgs] = []
    callback_handler.register_start_callback(started.append)
    yield
    assert not started, "a unit test ran Dynamo"
