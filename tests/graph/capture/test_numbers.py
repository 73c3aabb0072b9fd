"""Numbers that a model reads out of tensors: the graph is right for them, and there is one for each
of their values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import capture, make_policy
from toca_fx.capture.aten import to_aten
from toca_fx.capture.numbers import Numbers
from toca_fx.diagnostics import UnsupportedModelError

Reads = Callable[[Tensor, Tensor], Any]


class Model(nn.Module):
    """What ``reads`` makes of latents [2, 3, 4] and a condition [2, 3], or of a buffer."""

    scale: Tensor

    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Any:
        return self.reads(x + t, mask)


def by_lines(x: Tensor, mask: Tensor) -> Tensor:
    x = x.clone()
    x[mask == 0] = x[mask == 0] * 2
    return x


READS: dict[str, Reads] = {
    "item": lambda x, mask: x / (mask[0, 0].item() / 512),
    "item of a whole number": lambda x, mask: x[:, : mask.sum(1).max().item()],
    "int": lambda x, mask: x[:, : int(mask.sum(1).max())],
    "float": lambda x, mask: x * float(mask.max()),
    "a tensor as a bound": lambda x, mask: x[:, : mask.sum(1).max()],
    "tolist": lambda x, mask: [x[at, :n] for at, n in enumerate(mask.sum(1).tolist())],
    "a size": lambda x, mask: x.sum() + torch.ones(3, int(mask.sum())),
    "block-diagonal": lambda x, mask: torch.block_diag(
        *(torch.ones(3, n) for n in mask.sum(1).tolist())
    ),
    "split": lambda x, mask: x.flatten(0, 1)[mask.flatten() != 0].split(mask.sum(1).tolist()),
    "masked_select": lambda x, mask: x.masked_select(mask.unsqueeze(-1) != 0).view(1, -1, 4),
    "masked_select of a function": lambda x, mask: torch.masked_select(x, mask[:, :, None] > 0),
    "masked_select, one mask for all": lambda x, mask: x.masked_select((mask[0] != 0)[:, None]),
    "masked_select of each number": lambda x, mask: mask.masked_select(mask != 0) * x.sum(),
    "boolean index": lambda x, mask: x[mask != 0].view(1, -1, 4),
    "boolean index behind others": lambda x, mask: x[:, mask[0] != 0, 1:],
    "boolean index on both sides": by_lines,
    "nonzero": lambda x, mask: x.flatten(0, 1)[mask.flatten().nonzero().squeeze(1)],
    "nonzero of a function": lambda x, mask: torch.nonzero(mask) * x.sum(),
    "nonzero as a tuple": lambda x, mask: x[mask.nonzero(as_tuple=True)],
    "where": lambda x, mask: x[torch.where(mask > 0)],
    "argwhere": lambda x, mask: torch.argwhere(mask > 0) * x.sum(),
    "repeat_interleave": lambda x, mask: x.repeat_interleave(mask.sum(1), dim=0),
    "repeat_interleave of a function": lambda x, mask: torch.repeat_interleave(
        x, mask.sum(1), dim=0
    ),
    "one behind the other": lambda x, mask: x[:, : mask[:, : int(mask[0].sum())].sum().item() - 1],
}

# Rows of one and two, and of two and one: the counts are equal, the places are not.
MASKS = [[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 0, 1]], [[1, 1, 1], [1, 1, 0]]]


@pytest.mark.parametrize("name", READS)
def test_the_graph_is_right_for_the_numbers_of_a_call(name: str) -> None:
    model, x, t = Model(READS[name]), torch.randn(2, 3, 4), torch.tensor([0.5])
    captured, inputs = capture(model, x, t, torch.tensor(MASKS[0]))
    numbers = Numbers(captured)
    assert numbers
    at = next(at for at, value in enumerate(inputs) if value.dtype == torch.int64)
    for mask in map(torch.tensor, MASKS):
        inputs[at] = mask
        graph = to_aten(captured, inputs)
        assert same(graph(*inputs), model(x, t, mask))


def same(one: Any, other: Any) -> bool:
    """Whether tensors, in a list perhaps, are equal in shape and value."""
    ones, others = (
        list(value) if isinstance(value, (tuple, list)) else [value] for value in (one, other)
    )
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def test_numbers_are_compared_at_every_call() -> None:
    model = Model(READS["masked_select"]).eval()
    fast = toca_fx.compile(model, make_policy(), inner="eager")
    with torch.no_grad(), toca_fx.session(num_steps=12):
        for call, mask in enumerate(map(torch.tensor, MASKS * 2)):
            given = torch.randn(2, 3, 4), torch.tensor([1.0 - 0.1 * call]), mask
            assert torch.equal(fast(*given), model(*given))


def rounded(x: Tensor, mask: Tensor) -> Tensor:
    """What bfloat16 makes of the mask, in regions of which some have no number."""
    with torch.autocast("cpu", torch.float16), torch.autocast("cpu", enabled=False):
        x = x * 2
    with torch.autocast("cpu", torch.bfloat16):
        first = (mask.mT @ mask).sum().item()
        return x * first + (mask @ mask.mT).sum().float().item()


@pytest.mark.parametrize("around", [False, True])
def test_a_number_is_read_in_its_region_of_autocast(around: bool) -> None:
    x, mask = torch.randn(2, 3, 4), torch.tensor([[1000.3, 1.1, 3.7], [77.7, 2.2, 0.3]])
    model = Model(rounded)
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=around):
        expected = model(x, x, mask)
        captured, inputs = capture(model, x, x, mask)
        numbers = Numbers(captured)
        found, module = numbers.read(inputs), to_aten(captured, inputs)
        assert torch.is_autocast_enabled("cpu") == around
        with pytest.raises(UnsupportedModelError, match="none on the device"):
            numbers.read([value.to("meta") for value in inputs])
        assert torch.is_autocast_enabled("cpu") == around
    with torch.autocast("cpu", torch.bfloat16):
        assert found == ((mask.mT @ mask).sum().item(), (mask @ mask.mT).sum().float().item())
    (actual,) = module(*inputs)
    assert torch.equal(actual, expected)


def test_a_buffer_is_read_anew() -> None:
    model = Model(lambda x, mask: x * model.scale.item())
    captured, inputs = capture(model, torch.randn(2, 3, 4), torch.rand(1), torch.ones(2, 3))
    assert Numbers(captured).read(inputs) == (2.0,)
    model.scale.fill_(3.0)
    assert Numbers(captured).read(inputs) == (3.0,)


def test_a_number_that_is_none_is_equal_to_itself() -> None:
    model = Model(lambda x, mask: x * mask[0, 0].item())
    nan = torch.full((2, 3), torch.nan)
    captured, inputs = capture(model, torch.randn(2, 3, 4), torch.rand(1), nan)
    numbers = Numbers(captured)
    assert numbers.read(inputs) == numbers.read(inputs)
    (output,) = to_aten(captured, inputs)(*inputs)
    assert output.isnan().all()


@pytest.mark.parametrize(
    ("forward", "role"),
    [
        (lambda x, t, mask: x * t[0].item(), "timestep"),
        (lambda x, t, r_timestep: x * t * r_timestep[0, 0].item(), "other timestep"),
        (lambda x, t, mask: x * x.abs().max().item(), "latents"),
    ],
    ids=["timestep", "other timestep", "latents"],
)
def test_a_number_that_changes_at_every_step_names_the_users_line(
    forward: Callable[..., Any], role: str
) -> None:
    model = Model(READS["item"])
    model.forward = forward  # type: ignore[method-assign]
    values = (torch.randn(2, 3, 4), torch.rand(1), torch.ones(2, 3))
    given = dict(zip(inspect.signature(forward).parameters, values, strict=True))
    captured, inputs = capture(model, **given)
    with pytest.raises(
        UnsupportedModelError,
        match=rf"reads a number out of the {role} at .*test_numbers\.py:[0-9]+ \(.*item\(\)",
    ):
        to_aten(captured, inputs)


def test_a_number_that_decides_is_refused_by_the_users_line() -> None:
    """Dynamo captures no such branch."""
    model = Model(lambda x, mask: x * 2 if mask.sum().item() > 2 else x)
    with pytest.raises(UnsupportedModelError, match=r"at .*test_numbers\.py:[0-9]+ \(.*> 2 else"):
        capture(model, torch.randn(2, 3, 4), torch.rand(1), torch.ones(2, 3))


def test_a_size_that_cannot_be_followed_names_the_users_line() -> None:
    model = Model(lambda x, mask: torch.unique(mask) * x.sum())
    captured, inputs = capture(model, torch.randn(2, 3, 4), torch.rand(1), torch.ones(2, 3))
    with pytest.raises(UnsupportedModelError, match=r"test_numbers\.py:[0-9]+ \(.*torch\.unique"):
        to_aten(captured, inputs)


def test_inputs_without_values_are_refused() -> None:
    model = Model(READS["tolist"])
    captured, inputs = capture(model, torch.randn(2, 3, 4), torch.rand(1), torch.tensor(MASKS[0]))
    with pytest.raises(UnsupportedModelError, match=r"give inputs that have values"):
        to_aten(captured, [value.to("meta") for value in inputs])


def test_a_float_that_changes_between_generations() -> None:
    """Dynamo hands it over as a tensor from its second value on."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor, t: Tensor, scale: float) -> Tensor:
            return (x + t) * scale

    fast = toca_fx.compile(Scaled(), make_policy(), inner="eager")
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        for scale in (0.5, 0.75, 1.25):
            assert torch.equal(fast(x, torch.tensor([0.5]), scale), (x + 0.5) * scale)
