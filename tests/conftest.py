"""Every test starts with an empty Dynamo and leaves the process as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_torch() -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch._dynamo.reset()
    torch.set_num_threads(
        1
    )  # the tensors are tiny: a second thread, on a busy machine, is mostly waited for
    yield
    torch._dynamo.reset()
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
