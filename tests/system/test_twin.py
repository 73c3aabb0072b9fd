"""A twin is a view of its model: all but the call is one thing."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import make_inputs, make_policy, run_all, tiny
from toca_fx.torch_private import COMPILED_CALL


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Model(nn.Module):
    scale = 1.0
    made: ClassVar[list[type]] = []
    negated = False

    def __init_subclass__(cls) -> None:
        Model.made.append(cls)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.adapters: dict[str, float] = {}

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states + timestep[:, None, None]
        for block in self.blocks:
            x = block(x)
        return -x if self.negated else x

    def set_scale(self, scale: float) -> None:
        self.scale = scale


class Calling(Model):
    def __call__(self, *args: Any) -> Any:
        return {"sample": super().__call__(*args)}


X, T = torch.ones(1, 4, 8), torch.ones(1)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def compiled(model: Model) -> Model:
    policy = make_policy(scores={"staleness": 1.0}, sampler={"steps": 4}, N={"base": 1})
    return toca_fx.compile(model, policy, inner="eager")


def runs_compiled(model: nn.Module) -> bool:
    with toca_fx.session(1) as run:
        model(X, T)
    return len(run.report().steps) == 1


def both(model: Model) -> list[tuple[Model, Model]]:
    twin = compiled(model)
    return [(twin, model), (model, twin)]


def test_what_is_set_on_one_is_set_on_the_other(model: Model) -> None:
    for one, other in both(model):
        one.set_scale(3.0)
        one.adapters = {"lora": 1.0}
        one.note = object()
        assert (other.scale, other.adapters, other.note) == (3.0, {"lora": 1.0}, one.note)
        one.train()
        assert other.training
        one.eval()
        del one.note
        assert not hasattr(other, "note")
        one.register_buffer("table", torch.ones(2))
        one.extra = nn.Parameter(torch.ones(3))
        assert other.table is one.table
        assert dict(other.named_parameters())["extra"] is one.extra
        assert list(one.state_dict()) == list(other.state_dict())
        one.to(torch.float64)
        assert other.extra.dtype == other.table.dtype == torch.float64
        one.to(torch.float32)
        del one.table, one.extra


def test_what_is_set_is_computed_with(model: Model) -> None:
    for one, other in both(model):
        for change in (
            lambda one=one: setattr(one, "negated", not one.negated),
            lambda one=one: setattr(one, "blocks", nn.ModuleList([Block()])),
            lambda one=one: one.blocks.append(Block()),
            lambda one=one: setattr(one.blocks[0], "fc1", nn.Linear(8, 16)),
        ):
            before = other(X, T)
            change()
            torch.testing.assert_close(one(X, T), other(X, T))
            assert not torch.equal(other(X, T), before)
    assert runs_compiled(compiled(model))


def test_hooks(model: Model) -> None:
    for one, other in both(model):
        handle = one.register_forward_hook(lambda _module, _given, output: output + 1)
        plain = one.forward(X, T)
        torch.testing.assert_close(one(X, T), plain + 1)
        torch.testing.assert_close(other(X, T), plain + 1)
        handle.remove()
        torch.testing.assert_close(other(X, T), plain)


def test_the_call_is_the_twins_own(model: Model) -> None:
    twin = compiled(model)
    assert runs_compiled(twin)
    assert not runs_compiled(model)
    assert COMPILED_CALL not in vars(twin)
    model.compile(backend="eager")
    assert runs_compiled(twin)
    assert not runs_compiled(model)


def test_a_call_of_the_models_class_is_kept() -> None:
    twin = compiled(Calling().eval())
    assert set(twin(X, T)) == {"sample"}
    assert runs_compiled(twin)


def test_its_class(model: Model) -> None:
    Model.made.clear()
    twin = compiled(model)
    assert isinstance(twin, Model)
    named = type(twin).__module__, type(twin).__qualname__, type(twin).__doc__
    assert named == (Model.__module__, Model.__qualname__, Model.__doc__)
    assert repr(twin) == repr(model)
    assert not Model.made
    assert not hasattr(model, "_toca_model")


def test_a_twin_of_a_twin_is_one_of_the_model(model: Model) -> None:
    twin = compiled(compiled(model))
    assert vars(twin) is vars(model)
    assert runs_compiled(twin)
    assert type(twin).__mro__.count(nn.Module) == 1
    assert len(type(twin).__mro__) == len(Model.__mro__) + 2


def copied(twin: nn.Module) -> list[nn.Module]:
    saved = io.BytesIO()
    torch.save(twin, saved)
    saved.seek(0)
    return [
        copy.copy(twin),
        copy.deepcopy(twin),
        pickle.loads(pickle.dumps(twin)),
        torch.load(saved, weights_only=False),
    ]


def test_copies_and_pickles_are_the_models(model: Model) -> None:
    twin = compiled(model)
    expected = twin(X, T)
    for other in copied(twin):
        assert type(other) is Model
        assert not runs_compiled(other)
        assert torch.equal(other(X, T), expected)
        other.note = 1
        assert not hasattr(model, "note")


def test_a_deep_copy_of_what_holds_both_has_two(model: Model) -> None:
    twin = compiled(model)
    one, other = copy.deepcopy([twin, twin])
    assert one is other
    assert type(one) is Model


def test_models_and_twins_go(model: Model) -> None:
    made = Model().eval()
    twin = compiled(made)
    twin(X, T)
    gone = [weakref.ref(made), weakref.ref(type(twin))]
    del made, twin
    torch._dynamo.reset()
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_model_of_diffusers() -> None:
    model = tiny("diffusers", layers=1)
    twin = toca_fx.compile(model, make_policy(sampler={"steps": 2}), inner="eager")
    inputs = make_inputs(1)
    twin.register_to_config(note=3)
    assert model.config.note == 3
    assert twin.__class__.__name__ == "DiTTransformer2DModel"
    twin.set_attention_backend("native")
    model.enable_gradient_checkpointing()
    assert twin.is_gradient_checkpointing
    model.disable_gradient_checkpointing()
    with toca_fx.session(1) as run:
        run_all(twin, inputs)
    assert len(run.report().steps) == 1
    expected = run_all(model, inputs)[0]
    torch.testing.assert_close(run_all(twin, inputs)[0], expected, rtol=1e-4, atol=1e-4)
