"""A tiny model, and an implicit session that nothing was run in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import nn

from tests.helpers import tiny
from toca_fx.runtime.context import current_session


@pytest.fixture(autouse=True)
def _fresh_implicit_session() -> Iterator[None]:
    current_session().close()
    yield
    current_session().close()


@pytest.fixture
def model() -> nn.Module:
    return tiny("original", layers=1)
