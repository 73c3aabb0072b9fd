"""Modules that write to a tensor in place, in many ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.helpers import capture
from toca_fx.capture.aten import to_aten

aten = torch.ops.aten

Outputs = Tensor | tuple[Tensor, ...]
Write = Callable[..., Outputs]


class Writing(nn.Module):
    """``write(x * 2, y)``: the doubled x is the model's own memory, y and the attributes are the
    caller's.
    """

    table: Tensor

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.write = write
        self.weight = nn.Parameter(torch.ones(8, dtype=torch.float64), requires_grad=False)
        self.register_buffer("table", torch.ones(6, 8, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor) -> Outputs:
        return self.write(x * 2, y)


class Outer(nn.Module):
    """Writes in a submodule."""

    def __init__(self, write: Write) -> None:
        super().__init__()
        self.inner = Writing(write)

    def forward(self, x: Tensor, y: Tensor) -> Outputs:
        return self.inner(x, y)


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 2, 6, 8, generator=generator, dtype=torch.float64)
    return x, y


def traced(module: nn.Module) -> tuple[fx.GraphModule, list[Any]]:
    captured, given = capture(module, *inputs())
    return to_aten(captured, given), given


def slice_of_tokens(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:4] = y[:, :3]
    return x


def slice_with_steps(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:6:2] = y[:, :3]
    return x


def empty_slice(x: Tensor, y: Tensor) -> Tensor:
    x[:, 3:3] = y[:, 3:3]
    return x


def one_token(x: Tensor, y: Tensor) -> Tensor:
    x[:, 2] = y[:, 0]
    return x


def one_element(x: Tensor, y: Tensor) -> Tensor:
    x[0, 1, -1] = y[0, 0, 0]
    return x


def number(x: Tensor, y: Tensor) -> Tensor:
    x[:, 2] = 0.5
    return x


def one_row_for_all(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:4] = y[:, :1]
    return x


def other_dtype(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:4] = y[:, :3].float()
    return x


def all_of_it(x: Tensor, y: Tensor) -> Tensor:
    x.copy_(y)
    return x


def one_row_for_all_of_it(x: Tensor, y: Tensor) -> Tensor:
    x.copy_(y[:, :1])
    return x


def interpolated(x: Tensor, y: Tensor) -> Tensor:
    x.lerp_(y, weight=0.25)
    return x


def interpolated_slice(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:4].lerp_(y[:, :3], weight=0.25)
    return x


def slice_plus_equals(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:4] += y[:, :3]
    return x


def channels_multiplied(x: Tensor, y: Tensor) -> Tensor:
    x[:, :, ::2].mul_(3)
    return x


def slice_zeroed(x: Tensor, y: Tensor) -> Tensor:
    x[:, 4:].zero_()
    return x


def activation_in_place(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x, inplace=True) + x


def where_a_mask_is_true(x: Tensor, y: Tensor) -> Tensor:
    x[y > 0] = 0
    return x


def at_indices(x: Tensor, y: Tensor) -> Tensor:
    x.index_copy_(1, y[0, :2, 0].argsort(), y[:, :2])
    return x


def slice_of_a_slice(x: Tensor, y: Tensor) -> Tensor:
    x[:, 1:5][:, 1:3] = y[:, :2]
    return x


def slice_of_a_transposition(x: Tensor, y: Tensor) -> Tensor:
    x.transpose(1, 2)[:, :, 1:3].mul_(5)
    return x


def part_of_a_permutation(x: Tensor, y: Tensor) -> Tensor:
    x.permute(-1, 0, 1)[3:5].mul_(5)
    return x


def part_of_swapped_axes(x: Tensor, y: Tensor) -> Tensor:
    x.swapaxes(0, -1)[3:5].mul_(5)
    return x


def part_of_a_matrix_transposed(x: Tensor, y: Tensor) -> Tensor:
    x.mT[:, 3:5].mul_(5)
    return x


def part_of_moved_axes(x: Tensor, y: Tensor) -> Tensor:
    x.movedim(0, -1)[:, 3:5].mul_(5)
    return x


def rows_of_a_view(x: Tensor, y: Tensor) -> Tensor:
    x.view(12, 8)[3:5].mul_(4)
    return x


def rows_of_a_flattened(x: Tensor, y: Tensor) -> Tensor:
    x.flatten(0, 1)[3:5] = 1.0
    return x


def one_head(x: Tensor, y: Tensor) -> Tensor:
    x.unflatten(2, (2, 4))[..., 1, :] = y[..., :4]
    return x


def with_an_axis_more(x: Tensor, y: Tensor) -> Tensor:
    x.unsqueeze(1)[:, :, 2].mul_(3)
    return x


def with_an_axis_less(x: Tensor, y: Tensor) -> Tensor:
    x[:, 2:3].squeeze(1).mul_(3)
    return x


def detached(x: Tensor, y: Tensor) -> Tensor:
    x.detach()[:, 1:3] = y[:, :2]
    return x


def through_data(x: Tensor, y: Tensor) -> Tensor:
    x.data[:, 1:3].copy_(y[:, :2])
    return x


def data_of_a_view(x: Tensor, y: Tensor) -> Tensor:
    memory = x[:, 1:3].data
    memory += y[:, :2]
    return x


def diagonal_filled(x: Tensor, y: Tensor) -> Tensor:
    x[0, :4, :4].fill_diagonal_(0)
    return x


SCATTERED = [aten.clone.default, aten.slice_scatter.default]
WRITES: dict[Write, list[Any]] = {
    slice_of_tokens: SCATTERED,
    slice_with_steps: SCATTERED,
    empty_slice: SCATTERED,
    one_token: [aten.clone.default, aten.select_scatter.default],
    one_element: [aten.clone.default, *[aten.select_scatter.default] * 3],
    number: [aten.fill.Tensor, aten.select_scatter.default],
    one_row_for_all: SCATTERED,
    other_dtype: [aten.to.dtype, aten.to.dtype, *SCATTERED],
    all_of_it: [aten.clone.default],
    one_row_for_all_of_it: [aten.clone.default],
    interpolated: [aten.lerp.Scalar],
    interpolated_slice: [aten.lerp.Scalar, aten.slice_scatter.default],
    slice_plus_equals: [aten.add.Tensor, aten.slice_scatter.default, *SCATTERED],
    channels_multiplied: [aten.mul.Tensor, aten.slice_scatter.default],
    slice_zeroed: [aten.zero.default, aten.slice_scatter.default],
    activation_in_place: [aten.silu.default, aten.add.Tensor],
    where_a_mask_is_true: [aten.gt.Scalar, aten.index_put.default],
    at_indices: [aten.argsort.default, aten.index_copy.default],
    slice_of_a_slice: [*SCATTERED, aten.slice_scatter.default],
    slice_of_a_transposition: [
        aten.mul.Tensor,
        aten.slice_scatter.default,
        aten.contiguous.default,
    ],
    part_of_a_permutation: [aten.mul.Tensor, aten.slice_scatter.default, aten.contiguous.default],
    part_of_swapped_axes: [aten.mul.Tensor, aten.slice_scatter.default, aten.contiguous.default],
    part_of_a_matrix_transposed: [
        aten.mul.Tensor,
        aten.slice_scatter.default,
        aten.contiguous.default,
    ],
    part_of_moved_axes: [aten.mul.Tensor, aten.slice_scatter.default, aten.contiguous.default],
    rows_of_a_view: [aten.mul.Tensor, aten.slice_scatter.default],
    rows_of_a_flattened: [aten.fill.Tensor, aten.slice_scatter.default],
    one_head: [aten.clone.default, aten.select_scatter.default],
    with_an_axis_more: [aten.mul.Tensor, aten.select_scatter.default],
    with_an_axis_less: [aten.mul.Tensor, aten.slice_scatter.default],
    detached: SCATTERED,
    through_data: SCATTERED,
    data_of_a_view: [aten.add.Tensor, aten.slice_scatter.default],
    diagonal_filled: [
        aten.diagonal.default,
        aten.full_like.default,
        aten.diagonal_scatter.default,
        *[aten.slice_scatter.default] * 2,
        aten.select_scatter.default,
    ],
}
# torch 2.15 traces a number that is written as a number, no longer as a tensor.
SINCE_2_15 = {aten.fill.Tensor: aten.fill.Scalar, aten.index_put.default: aten.masked_fill.Scalar}
