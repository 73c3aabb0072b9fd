"""The state of autocast as a value: it is taken, gone back to, and left as it was."""

from __future__ import annotations

import pytest
import torch

from toca_fx.graph.autocast import OFF, Autocast

CPU, CUDA = ("cpu", torch.bfloat16), ("cuda", torch.float16)


def test_it_says_what_is_on() -> None:
    assert Autocast.now() == OFF
    with torch.autocast("cpu", torch.float16):
        assert Autocast.now() == Autocast((("cpu", torch.float16),))
        with torch.autocast("cpu", enabled=False):
            assert Autocast.now() == OFF


@pytest.mark.parametrize(
    "inside", [OFF, Autocast((CPU,)), Autocast((CUDA,)), Autocast((CPU, CUDA))]
)
@pytest.mark.parametrize("around", [OFF, Autocast((("cpu", torch.float16), CUDA))])
def test_it_is_gone_back_to(around: Autocast, inside: Autocast) -> None:
    usual = torch.get_autocast_dtype("cpu")
    with around.again():
        with inside.again():
            assert Autocast.now() == inside
        assert Autocast.now() == around
        with pytest.raises(ZeroDivisionError), inside.again():
            raise ZeroDivisionError
        assert Autocast.now() == around
    assert Autocast.now() == OFF
    assert torch.get_autocast_dtype("cpu") == usual


def test_one_device_is_left_out() -> None:
    assert Autocast((CPU, CUDA)).without("cpu") == Autocast((CUDA,))
