"""Linear layers of few rows: the same numbers from either library, by the number of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from toca_fx.kernels.few_rows import linear


@pytest.mark.parametrize("rows", [0, 1, 2, 63, 64, 65, 256, 257])
@pytest.mark.parametrize("sizes", [(24, 96), (96, 24), (24, 24)])
@pytest.mark.parametrize("biased", [True, False])
def test_both_libraries_give_the_same(rows: int, sizes: tuple[int, int], biased: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, rows, sizes[0]), torch.randn(sizes[1], sizes[0])
    bias = torch.randn(sizes[1]) if biased else None
    found = linear(x, weight, bias)
    assert found.shape == (1, rows, sizes[1])
    assert torch.allclose(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "sizes", "few"),
    [(256, (24, 96), True), (257, (24, 96), False), (64, (96, 24), True), (65, (96, 24), False)],
)
def test_the_number_of_rows_decides(rows: int, sizes: tuple[int, int], few: bool) -> None:
    with torch.profiler.profile() as profile:
        linear(torch.randn(rows, sizes[0]), torch.randn(sizes[1], sizes[0]), None)
    assert ("mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}) == few
