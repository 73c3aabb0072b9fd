"""Regions of torch.vmap become operators on tensors that have the batch as an axis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.helpers import capture
from toca_fx.capture.aten import to_aten
from toca_fx.capture.batches import batched
from toca_fx.graph.ops import FLEX
from toca_fx.torch_private import FakeTensorMode, batches_ended, vmap_begin


class Mapped(nn.Module):
    """Scores, masked by what ``mask`` says of each pair of positions, and of the lengths."""

    def __init__(self, mask: object) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return x * self.mask(places, lengths)  # type: ignore[operator]


def over_one_axis(places: Tensor, lengths: Tensor) -> Tensor:
    return torch.vmap(lambda length: (places < length)[:, None])(lengths)


def over_two_axes(places: Tensor, lengths: Tensor) -> Tensor:
    inner = torch.vmap(lambda place, length: place < length, (0, None))
    return torch.vmap(inner, (None, 0))(places, lengths)[..., None]


def behind_one_another(places: Tensor, lengths: Tensor) -> Tensor:
    half = torch.vmap(lambda length: length // 2)(lengths)
    return over_one_axis(places, half) | ~over_one_axis(places, lengths)


def written_in_place(places: Tensor, lengths: Tensor) -> Tensor:
    def one(length: Tensor) -> Tensor:
        made = length.new_zeros(6, 1)
        made[(torch.arange(6) < length).long(), 0] = length.new_ones(())
        return made

    return torch.vmap(one)(lengths)


def with_a_table(places: Tensor, lengths: Tensor) -> Tensor:
    return torch.vmap(lambda length: torch.tensor([0, 1, 2, 4, 8, 16])[:, None] * length)(lengths)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 5])


def fakes_of(given: list[Tensor]) -> list[Tensor]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return [mode.from_tensor(value, static_shapes=True) for value in given]


@pytest.mark.parametrize(
    "mask",
    [over_one_axis, over_two_axes, behind_one_another, written_in_place, with_a_table],
    ids=lambda mask: mask.__name__,
)
def test_a_region_is_what_it_computes(mask: object) -> None:
    model = Mapped(mask)
    captured, given = capture(model, *inputs())
    assert captured.graph.find_nodes(op="call_function", target=vmap_begin)
    module = to_aten(captured, given)
    assert all(
        isinstance(node.target, torch._ops.OpOverload)
        for node in module.graph.nodes
        if node.op == "call_function"
    )
    x, lengths = inputs()
    other = lengths.flip(0)
    by_source = {id(value): at for at, value in enumerate(given)}
    assert len(by_source) == len(given)
    changed = [other if torch.equal(value, lengths) else value for value in given]
    for call, values in ((lengths, given), (other, changed)):
        assert torch.equal(module(*values)[0], model(x, call))


def test_a_graph_without_regions_is_left_as_it_is() -> None:
    captured, given = capture(nn.Linear(4, 4), torch.randn(2, 4))
    assert batched(captured, fakes_of(given)) is captured


def test_dynamos_graph_is_not_changed() -> None:
    captured, given = capture(Mapped(over_one_axis), *inputs())
    before = captured.code
    assert batched(captured, fakes_of(given)) is not captured
    assert captured.code == before


def test_no_region_outlives_a_failure() -> None:
    def fails() -> None:
        with batches_ended():
            vmap_begin(2, "error")
            vmap_begin(3, "error")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    torch.rand(2)  # which vmap refuses


class Flex(nn.Module):
    """A mask that is made in the model, of the lengths."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        heads = x[:, None]

        def known(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return kv < lengths[b]

        mask = create_block_mask(known, 2, None, 6, 6, device="cpu", BLOCK_SIZE=2)
        mixed = flex_attention(heads, heads, heads, block_mask=mask)
        assert isinstance(mixed, Tensor)
        return mixed[:, 0]


def test_masks_of_flex_attention_are_made_in_the_graph() -> None:
    captured, given = capture(Flex(), *inputs())
    module = to_aten(captured, given)
    (call,) = module.graph.find_nodes(op="call_function", target=FLEX)
    codes = [node for node in call.all_input_nodes if node.op == "get_attr"]
    assert len(codes) == 2
    assert all(isinstance(getattr(module, str(node.target)), fx.GraphModule) for node in codes)
    assert torch.equal(module(*given)[0], Flex()(*inputs()))
