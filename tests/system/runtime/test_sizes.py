"""Texts, images, videos and batches of many sizes: each is the model's, cached, and few programs
are compiled for all.
"""

from __future__ import annotations

import copy
import gc
import random
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import toca_fx
from tests.helpers import make_policy
from tests.marks import slow_but
from toca_fx.backend.dispatcher import Dispatcher
from toca_fx.examples import Example, build, examples, vary
from toca_fx.examples.example import grid
from toca_fx.runtime.report import Report

STEPS = 4
Size = Mapping[str, int]
Inputs = dict[str, Any]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@dataclass
class Counted:
    """An inner compiler that compiles nothing, and counts what it was given."""

    graphs: list[fx.GraphModule] = field(default_factory=list)

    def __call__(self, module: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        self.graphs.append(module)
        return module.forward

    __hash__ = object.__hash__


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def prompts(size: Size) -> Tensor:
    return normal(size["batch"], size["text"], 24)


def mask(size: Size) -> Tensor:
    found = torch.ones(size["batch"], size["text"], dtype=torch.int64)
    found[0, -2:] = 0
    return found


def flux(size: Size) -> Inputs:
    height, width = size["height"], size["width"]
    positions = torch.nn.functional.pad(grid(height, width).double(), (1, 0))
    return {
        "hidden_states": normal(size["batch"], height * width, 16),
        "encoder_hidden_states": prompts(size),
        "txt_ids": torch.zeros(size["text"], 3, dtype=torch.float64),
        "img_ids": positions,
    }


def image(size: Size) -> Inputs:
    latents = normal(size["batch"], 4, 2 * size["height"], 2 * size["width"])
    return {"hidden_states": latents, "encoder_hidden_states": prompts(size)}


def masked(size: Size) -> Inputs:
    return {**image(size), "encoder_attention_mask": mask(size)}


def video(size: Size) -> Inputs:
    shape = (size["batch"], 4, size["frames"], 2 * size["height"], 2 * size["width"])
    return {"hidden_states": normal(*shape), "encoder_hidden_states": prompts(size)}


def masked_video(size: Size) -> Inputs:
    return {**video(size), "encoder_attention_mask": mask(size)}


def batch(size: Size) -> Inputs:
    labels = torch.arange(size["batch"]) % 7
    return {"hidden_states": normal(size["batch"], 4, 16, 16), "class_labels": labels}


MODELS: dict[str, Callable[[Size], Inputs]] = {
    "FluxTransformer2DModel": flux,
    "PixArtTransformer2DModel": masked,  # its table of positions is divided by the sizes
    "SD3Transformer2DModel": image,  # cuts its table of positions
    "WanTransformer3DModel": video,
    "HunyuanVideoTransformer3DModel": masked_video,
    "DiTTransformer2DModel": batch,
}
OFTEN = ("PixArtTransformer2DModel",)


def drawn(count: int, seed: int = 0) -> Iterator[dict[str, int]]:
    """Sizes by chance, all of them others each time."""
    draw = random.Random(seed)
    # A batch of 3 Dynamo takes for the width of positions, if all is dynamic.
    limits = {"batch": (4, 6), "text": (5, 40), "frames": (2, 5), "height": (3, 9), "width": (3, 9)}
    for _ in range(count):
        yield {name: draw.randint(*limit) for name, limit in limits.items()}


class Sized:
    """An example model in float64, its compiled twin and one that runs eagerly."""

    def __init__(self, name: str, **how: Any) -> None:
        self.example: Example = examples()[name]
        self.inner = Counted()
        self.model: nn.Module = build(self.example, batch=2)[0].double()
        policy = make_policy(sampler={"steps": STEPS}, N={"base": 2})
        self.fast = toca_fx.compile(self.model, policy, **{"inner": self.inner, **how})
        self.eager = toca_fx.compile(copy.deepcopy(self.model), policy, inner="eager")
        self._inputs = MODELS[name]

    def inputs(self, size: Size, dtype: torch.dtype = torch.float64) -> Inputs:
        torch.manual_seed(0)
        _, whole = build(self.example, batch=size["batch"])
        found = {**whole, **self._inputs(size)}
        return {
            name: value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in found.items()
        }

    def run(self, twin: nn.Module, inputs: Inputs) -> tuple[list[Tensor], Report]:
        with toca_fx.session(STEPS) as run:
            calls = (vary(self.example, inputs, step, STEPS) for step in range(STEPS))
            outputs = [twin(**call)[0] for call in calls]
        return outputs, run.report()

    def check(self, size: Size) -> Report:
        """Each step is what it is for this size alone, full steps are the model's."""
        inputs = self.inputs(size)
        outputs, report = self.run(self.fast, inputs)
        expected, _ = self.run(self.eager, inputs)
        for got, wanted in zip(outputs, expected, strict=True):
            assert (got - wanted).abs().max() < 1e-12
        whole = self.model(**vary(self.example, inputs, 0, STEPS))[0]
        assert (outputs[0] - whole).abs().max() < 1e-12
        assert report.kinds == {"full": 2, "partial": 2}
        return report


@pytest.mark.parametrize("name", slow_but(OFTEN, MODELS, "a capture for each"))
def test_few_programs_serve_all_sizes(name: str) -> None:
    sized = Sized(name)
    compiled = [sized.check(size).compiled_graphs for size in drawn(6)]
    assert sum(map(bool, compiled)) <= 3, compiled
    assert not any(compiled[-2:])


def test_one_program_if_all_is_dynamic() -> None:
    sized = Sized("FluxTransformer2DModel", dynamic=True)
    assert [sized.check(size).compiled_graphs for size in drawn(3)] == [2, 0, 0]


@pytest.mark.slow(reason="what torch.compile is told is one word for all values")
def test_every_size_is_compiled_if_nothing_is_dynamic() -> None:
    sized = Sized("FluxTransformer2DModel", dynamic=False)
    assert [sized.check(size).compiled_graphs for size in drawn(2)] == [2, 2]


@pytest.mark.slow(reason="the same by another way")
def test_dynamo_may_be_told() -> None:
    """As a user of torch.compile does it."""
    sized = Sized("FluxTransformer2DModel")
    policy = make_policy(sampler={"steps": STEPS}, N={"base": 2})
    options = {"policy": policy, "inner": sized.inner}
    compiled = torch.compile(sized.model, backend="toca", dynamic=True, options=options)
    for size in drawn(2):
        inputs = sized.inputs(size)
        outputs, report = sized.run(compiled, inputs)
        whole = sized.model(**vary(sized.example, inputs, 0, STEPS))[0]
        assert (outputs[0] - whole).abs().max() < 1e-12
        assert report.kinds == {"full": 2, "partial": 2}
    assert not report.compiled_graphs


def test_a_region_of_autocast_is_that_of_other_sizes_too() -> None:
    """They are analysed where steps are compiled: autocast is off there, and in the graph."""
    sized = Sized("PixArtTransformer2DModel", dynamic=True)
    sized.model.float()
    kinds = []
    for size in drawn(2):
        inputs = {
            name: value.float()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in sized.inputs(size).items()
        }
        with torch.autocast("cpu", torch.bfloat16):
            outputs, report = sized.run(sized.fast, inputs)
            whole = sized.model(**vary(sized.example, inputs, 0, STEPS))[0]
        assert torch.equal(outputs[0], whole)
        kinds.append((report.compiled_graphs, report.kinds))
    assert kinds == [(2, {"full": 2, "partial": 2}), (0, {"full": 2, "partial": 2})]


def test_inputs_are_not_kept_for_sizes_to_come() -> None:
    """A size is analysed later on as well, by what is known of the first call's inputs."""
    sized = Sized("FluxTransformer2DModel", dynamic=True)
    inputs = sized.inputs(next(drawn(1)))
    given = weakref.ref(inputs["encoder_hidden_states"])
    with toca_fx.session(STEPS):
        sized.fast(**vary(sized.example, inputs, 0, STEPS))
    del inputs
    gc.collect()
    assert given() is None


@pytest.mark.slow(reason="200 sizes, a second each")
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_two_hundred_sizes(name: str) -> None:
    """At most three programs, and what is kept of them does not grow."""
    sized, held = Sized(name), []
    for number, size in enumerate(drawn(200)):
        sized.check(size)
        if number % 50 == 49:
            gc.collect()
            graphs = sum(isinstance(each, fx.Graph) for each in gc.get_objects())
            held.append(graphs)
    assert len(sized.inner.graphs) <= 3 * 7  # pieces of graphs
    assert held[-1] <= 1.1 * held[1]
    kept = [each for each in gc.get_objects() if isinstance(each, Dispatcher)]
    assert max(len(each._runners) for each in kept) <= 32
