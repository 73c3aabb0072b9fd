"""Adapters of peft and diffusers, in any order and number: the compiled model is the model as it is
then, its steps are cached, and nothing is compiled twice.
"""

from __future__ import annotations

import copy
import gc
import inspect
import random
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor

import toca_fx
from tests.helpers import make_inputs, make_policy, run_all, tiny
from toca_fx.backend import Dispatcher
from toca_fx.torch_private import captures
from tools.pipelines.ways.adapters import lora

pytest.importorskip("peft")

STEPS = 6
CACHED = ["full", "partial", "partial"] * 2
NAMES = re.compile(r"(?<=lora_[AB]\.)\w+|(?<=lora_dropout\.)\w+")
Operation = Callable[[Any], Any]


def flux(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    return model.to(dtype).eval().requires_grad_(False)


def sd3() -> Any:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return model.eval().requires_grad_(False)


def calls(model: Any, steps: int = STEPS) -> Iterator[dict[str, Any]]:
    """The calls of a run, with one text."""
    dtype, draw = model.dtype, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=draw).to(dtype)

    given: dict[str, Any] = {
        "encoder_hidden_states": normal(4, 8),
        "pooled_projections": normal(8),
        "return_dict": False,
    }
    packed = isinstance(model, FluxTransformer2DModel)
    if packed:
        places = torch.zeros(16, 3)
        places[:, 1], places[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
        given |= {"img_ids": places, "txt_ids": torch.zeros(4, 3)}
    for step in range(steps):
        latents = normal(16, 4) if packed else normal(4, 8, 8)
        timestep = torch.tensor([1 - step / steps]).to(dtype)
        yield {"hidden_states": latents, "timestep": timestep, **given}


def load(name: str = "one", rank: int = 2, seed: int = 1, **options: Any) -> Operation:
    return lambda model: model.load_lora_adapter(
        lora(model, rank, seed), adapter_name=name, **options
    )


def scaled(*scales: float, names: Sequence[str] = ("one", "two")) -> Operation:
    return lambda model: model.set_adapters(list(names[: len(scales)]), list(scales))


def add(name: str) -> Operation:
    from peft import LoraConfig

    def operation(model: Any) -> None:
        torch.manual_seed(7)
        options: dict[str, Any] = {"r": 3, "target_modules": ["to_k"], "init_lora_weights": False}
        model.add_adapter(LoraConfig(**options), adapter_name=name)

    return operation


class Watched:
    """A ``model`` under two policies (every step full; a full one every third), and its likeness,
    to which all is done alike.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.likeness = model, copy.deepcopy(model)
        steps = {"sampler": {"steps": STEPS}}
        always = make_policy(name="full", N={"base": 1}, **steps)
        self.full = toca_fx.compile(model, always, inner="eager")
        self.fast = toca_fx.compile(model, make_policy(**steps), inner="eager")

    def do(self, operation: Operation) -> None:
        operation(self.fast)
        operation(self.likeness)

    def check(self, **more: Any) -> list[str]:
        """N = 1 is the likeness; returns the kinds of steps at N = 3."""
        with toca_fx.session(STEPS), torch.no_grad():
            for number, given in enumerate(calls(self.model)):
                expected = self.likeness(**given, **more)[0]
                assert torch.equal(self.full(**given, **more)[0], expected), number
        with toca_fx.session(STEPS) as run, torch.no_grad():
            for given in calls(self.model):
                self.fast(**given, **more)
                self.likeness(**given, **more)  # whose scales are divided again, too
        return [step.kind for step in run.report().steps]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was compiled: the policy and what the graph computes, of every program."""
    found: list[Any] = []
    prepare = Dispatcher._prepare

    def prepared(self: Dispatcher, inputs: Sequence[Any]) -> Any:
        runner, updates = prepare(self, inputs)
        analysis = runner.program.analysis
        # The modules, without the names of adapters: what is fused lies one module deeper.
        modules = [node.meta.get("path", "") for node in analysis.aten.graph.nodes]
        plain = NAMES.sub("", "\n".join(map(str, modules)))
        found.append((analysis.settings.policy, analysis.code, plain))
        return runner, updates

    monkeypatch.setattr(Dispatcher, "_prepare", prepared)
    return found


def disable(model: Any) -> None:
    model.disable_lora()


def enable(model: Any) -> None:
    model.enable_lora()


def fuse(model: Any) -> None:
    model.fuse_lora(0.7)


def unfuse(model: Any) -> None:
    model.unfuse_lora()


def unload(model: Any) -> None:
    model.unload_lora()


def delete(name: str) -> Operation:
    return lambda model: model.delete_adapters(name)


def test_whatever_is_done_to_adapters_it_is_the_model(compiled: list[Any]) -> None:
    """Four graphs: a LoRA with its first scale, with any, beside its layers, and no LoRA."""
    watched = Watched(flux())
    first = [load(), scaled(0.5), scaled(0.7), load(seed=2, hotswap=True), disable, enable]
    # What is disabled while it is fused, peft takes out of the weights when a layer is next called.
    then = [fuse, disable, enable, unload, load("other", seed=3), unload]
    for number, operation in enumerate([*first, *then]):
        watched.do(operation)
        assert watched.check() == CACHED, number
    assert len(compiled) == len(set(compiled)) == 2 * 4


BY_NAME: dict[str, Sequence[Operation]] = {
    "scaled": [load(), scaled(0.5), scaled(0.7), scaled(0.0), scaled(-1.25)],
    "two": [load(), load("two", rank=3, seed=2), scaled(0.3, 0.8), scaled(0.4, 0.1), scaled(0.6)],
    "added": [add("one"), scaled(0.5)],
    "fused": [load(), fuse, unfuse, scaled(0.5), fuse, unfuse],
    "fused and disabled": [load(), fuse, disable, enable, fuse, disable, unload],
    "deleted": [load(), load("two", seed=2), delete("one"), load("three", seed=3), delete("two")],
}


@pytest.mark.slow(reason="a capture by Dynamo for each")
@pytest.mark.parametrize("make", [flux, sd3])
@pytest.mark.parametrize("name", BY_NAME)
def test_after_each_operation_it_is_the_model(
    name: str, make: Callable[[], Any], compiled: list[Any]
) -> None:
    watched = Watched(make())
    for operation in BY_NAME[name]:
        watched.do(operation)
        assert watched.check() == CACHED
    assert len(compiled) == len(set(compiled))


@pytest.mark.slow(reason="a capture by Dynamo for each")
def test_a_scale_may_come_with_the_call(compiled: list[Any]) -> None:
    watched = Watched(flux())
    watched.do(load())
    known = 0
    for scale in (0.5, 0.7, 0.9, 0.3, 0.0, 1.0, 0.6):
        assert watched.check(joint_attention_kwargs={"scale": scale}) == CACHED, scale
        assert scale not in (0.9, 0.3, 0.6) or len(compiled) == known, scale
        known = len(compiled)
    assert len(compiled) == len(set(compiled))
    for scale in (2, 3, 5):  # whole numbers are another type
        assert watched.check(joint_attention_kwargs={"scale": scale}) == CACHED, scale


def test_the_step_after_a_change_is_full() -> None:
    """Within a run; it goes on where it was."""
    model = flux()
    load()(model)
    twin = toca_fx.compile(model, make_policy(sampler={"steps": STEPS}), inner="eager")
    for changes in (scaled(0.5), scaled(0.7), load(seed=2, hotswap=True), disable):
        with toca_fx.session(STEPS) as run, torch.no_grad():
            for number, given in enumerate(calls(model)):
                if number == 2:
                    changes(twin)
                twin(**given)
        kinds = [step.kind for step in run.report().steps]
        assert kinds == ["full", "partial", "full", "full", "partial", "partial"]
        assert not run.report().warnings


def test_a_scale_that_changes_at_every_step_is_said() -> None:
    model = flux()
    load()(model)
    twin = toca_fx.compile(model, make_policy(sampler={"steps": STEPS}), inner="eager")
    for _ in range(2):
        with toca_fx.session(STEPS) as run, torch.no_grad():
            for number, given in enumerate(calls(model)):
                scaled(0.1 * number)(model)
                twin(**given)
    assert run.report().kinds == {"full": STEPS}
    assert any("at every step" in warning for warning in run.report().warnings)


@pytest.mark.slow(reason="a capture for each; what goes is in test_captures.py")
def test_nine_policies_and_more_on_one_model() -> None:
    model = tiny("original", layers=1)
    steps = list(make_inputs(3))
    for number in range(10):
        policy = make_policy(name=f"policy {number}", R={"base": 0.1 + 0.08 * number})
        twin = toca_fx.compile(model, policy, inner="eager")
        with toca_fx.session(3) as run:
            run_all(twin, steps)
        assert run.report().kinds == {"full": 1, "partial": 2}


def in_and_out(times: int) -> list[int]:
    """LoRAs that come and go, each under a name of its own; megabytes of the process after each."""
    watched, gone, sizes = Watched(flux()), [], list[int]()
    for number in range(times):
        watched.do(load(f"lora {number}".replace(" ", "_"), seed=number))
        assert watched.check() == CACHED
        weights = [each for each in watched.model.parameters() if each.requires_grad]
        gone += map(weakref.ref, weights)
        del weights
        watched.do(unload)
        assert watched.check() == CACHED
        gc.collect()
        assert not [each for each in gone if each() is not None]
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        sizes.append(pages * 4096 // 2**20)
    return sizes


@pytest.mark.slow(reason="a capture by Dynamo for each of 50 LoRAs, twice")
def test_fifty_in_and_out(compiled: list[Any]) -> None:
    sizes = in_and_out(50)
    assert len(compiled) == len(set(compiled)) == 2 * 2
    code = inspect.unwrap(FluxTransformer2DModel.forward).__code__
    wrapper = FluxTransformer2DModel.forward.__code__
    assert max(len(captures(each)) for each in (code, wrapper)) <= 32
    assert sizes[-1] - sizes[20] < 60


class Drawn:
    """Operations by chance, each possible after those before."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.loaded: dict[str, int] = {}
        self.fused = self.disabled = False

    def next(self) -> tuple[str, Operation]:
        """The name of an operation, and what it does."""
        draw, names = self.draw, list(self.loaded)
        ranks = {"one": 2, "two": 3, "three": 2}
        free = [name for name in ranks if name not in names]
        possible = ["load"] * 2 * (bool(free) and not self.fused and not self.disabled)
        if names and self.fused:
            possible = ["unfuse", "disable"]
        elif names and self.disabled:
            possible = ["enable", "unload"]
        elif names:
            possible += ["set"] * 4 + ["swap", "fuse", "disable", "delete", "unload"]
        chosen = draw.choice(possible)
        if chosen == "load":
            name = draw.choice(free)
            self.loaded[name] = ranks[name]
            return f"load {name}", load(name, ranks[name], draw.randrange(99))
        if chosen == "set":
            some = draw.sample(names, draw.randint(1, len(names)))
            scales = [round(draw.uniform(-1, 2), 2) for _ in some]
            return f"set {some} {scales}", scaled(*scales, names=some)
        if chosen == "swap":
            name = draw.choice(names)
            return f"swap {name}", load(name, self.loaded[name], draw.randrange(99), hotswap=True)
        if chosen == "delete":
            name = draw.choice(names)
            del self.loaded[name]
            if not self.loaded:
                return "unload", unload
            left = list(self.loaded)

            def operation(model: Any) -> None:
                model.delete_adapters(name)
                model.set_adapters(left, [1.0] * len(left))

            return f"delete {name}", operation
        self.fused = {"fuse": True, "unfuse": False, "disable": False}.get(chosen, self.fused)
        self.disabled = {"disable": True}.get(chosen, False)
        if chosen == "unload":
            self.loaded.clear()
        by_name: dict[str, Operation] = {
            "fuse": fuse,
            "unfuse": unfuse,
            "disable": disable,
            "enable": enable,
            "unload": unload,
        }
        return chosen, by_name[chosen]


@pytest.mark.slow(reason="about three seconds for each of 200 operations")
@pytest.mark.parametrize("operations", [200])
def test_operations_by_chance(operations: int, compiled: list[Any]) -> None:
    watched, drawn, done = Watched(flux()), Drawn(seed=3), list[str]()
    wrong = 0
    for _ in range(operations):
        name, operation = drawn.next()
        done.append(name)
        watched.do(operation)
        wrong += watched.check() != CACHED
    assert wrong <= operations // 20, done
    assert len(compiled) == len(set(compiled)), done
