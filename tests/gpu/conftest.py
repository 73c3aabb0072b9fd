"""What needs a GPU. Skipped without one; ``TOCA_GPU_TESTS_ON=cpu`` is a dry run of whatever a CPU
can do of it.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.generations import DEVICE, DRY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip everything here where there is no device."""
    if DEVICE == "cuda" and not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in str(item.path):
                item.add_marker(pytest.mark.skip(reason="no GPU"))
    if DRY:
        for item in items:
            if item.get_closest_marker("card") is not None:
                item.add_marker(pytest.mark.skip(reason="a dry run has no card"))


@pytest.fixture(autouse=True)
def _exact() -> None:
    """float32 means float32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
