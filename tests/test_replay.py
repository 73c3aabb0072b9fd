"""What a CUDA graph needs, shown without a GPU: caches and parameters stay in place, nothing else is written to, numbers are inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

import toca_fx
from tests.helpers import capture, make_inputs, make_policy, run_all, tiny
from toca_fx import buffers
from toca_fx.inner import Inner
from toca_fx.program import Program
from toca_fx.replay import compile_for_replay

# Chosen without looking at activations, so that every compiler gets the same tokens.
PINNED = {"R": {"base": 0.5, "step_weight": 0.9}, "scores": {"random": 1.0}}


class Static:
    """Inductor, and what it was told of the inputs: which stay in place, and which it writes to."""

    cuda_graphs = True
    backend = "inductor"

    def __init__(self) -> None:
        self.static: list[set[int]] = []
        self.mutated: list[set[int]] = []
        self.inputs: list[list[Any]] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def inner_compile(graph: fx.GraphModule, examples: Any, **kwargs: Any) -> Any:
            found = compile_fx_inner(graph, examples, **kwargs)
            self.inputs.append(list(examples))
            self.static.append(set(kwargs["static_input_idxs"]))
            self.mutated.append(set(found.mutated_input_idxs))
            return found

        # What is found in a cache is not compiled again, and nothing would be told.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            run: Callable[..., Any] = compile_fx(module, inputs, inner_compile=inner_compile, config_patches={"triton.cudagraphs": True})
        return run


@pytest.fixture(scope="module", params=["full", "partial"])
def told(request: pytest.FixtureRequest) -> tuple[Static, Program, Any]:
    x, t, y = next(iter(make_inputs(1)))
    captured, inputs = capture(tiny("diffusers", layers=2), x, timestep=t, class_labels=y)
    inner = Static()
    program = Program(captured, inputs, make_policy(), inner)  # type: ignore[arg-type]
    plan = program.plan(None)
    return inner, program, program.step(plan, next(step.modes for step in plan.steps if step.kind == request.param))


def test_whatever_is_written_to_stays_in_place(told: tuple[Static, Program, Any]) -> None:
    inner, _, _ = told
    (static,), (mutated,) = inner.static, inner.mutated
    assert mutated
    assert mutated <= static, "inductor would not record the graph"


def test_parameters_and_caches_are_static_and_nothing_else(told: tuple[Static, Program, Any]) -> None:
    inner, program, step = told
    (static,), (inputs,) = inner.static, inner.inputs
    kept = set(buffers.kept(program.plan(None)))
    placeholders = program.aten.graph.find_nodes(op="placeholder")
    sizes = len(inputs) - len(step.graph.kept) - len(step.graph.names)
    expected = [placeholders[position].meta["role"] == "state" for position in step.graph.kept]
    expected += [name in kept for name in step.graph.names]
    assert [at in static for at in range(sizes, len(inputs))] == expected
    assert any(name.startswith("cache") for name in step.graph.names)


def test_numbers_of_fresh_tokens_are_inputs(told: tuple[Static, Program, Any]) -> None:
    inner, _, step = told
    (inputs,) = inner.inputs
    sized = [name for name in step.graph.names if name.startswith("ranks")]
    assert [isinstance(value, torch.SymInt) for value in inputs[: len(sized)]] == [True] * len(sized)
    assert not any(isinstance(value, torch.SymInt) for value in inputs[len(sized) :])


def test_the_mode_changes_no_output_and_generations_share_their_memory() -> None:
    model, policy, inputs = tiny("diffusers", layers=2), make_policy(**PINNED), make_inputs()
    expected = []
    with toca_fx.session() as run:
        expected = run_all(toca_fx.compile(model, policy, inner="eager"), inputs)
    fast = toca_fx.compile(model, policy, mode="reduce-overhead")
    addresses = []
    for _ in range(2):
        with toca_fx.session() as run:
            outputs = run_all(fast, inputs)
            (track,) = run._tracks.values()
            addresses.append({name: buffer.data_ptr() for name, buffer in track.generations[""].buffers.items()})
        for a, b in zip(outputs, expected, strict=True):
            assert (a - b).abs().max() < 1e-4 * b.abs().max()
    assert addresses[0] == addresses[1]
    assert run.report().compiled_graphs == 2
    assert len({count for site in run.report().sites for count in site.computed}) > 4


def test_generations_side_by_side_have_memory_of_their_own() -> None:
    x, t, y = next(iter(make_inputs(1)))
    captured, inputs = capture(tiny("diffusers", layers=2), x, timestep=t, class_labels=y)
    program = Program(captured, inputs, make_policy(), Inner("inductor", "reduce-overhead"))
    plan = program.plan(None)
    first, second = program.lend(plan), program.lend(plan)
    assert first["cache:0"].data_ptr() != second["cache:0"].data_ptr()
    first["score:1"].fill_(7)
    program.take_back(first)
    third = program.lend(plan)
    assert third["cache:0"].data_ptr() == first["cache:0"].data_ptr()
    assert not third["score:1"].any(), "as good as new"


def test_without_recording_memory_is_given_free() -> None:
    x, t, y = next(iter(make_inputs(1)))
    captured, inputs = capture(tiny("diffusers", layers=2), x, timestep=t, class_labels=y)
    program = Program(captured, inputs, make_policy(), Inner("eager"))
    program.take_back(program.lend(program.plan(None)))
    assert not program._idle


def test_a_module_without_symbols_has_no_sizes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (x, 2)),))
    given: list[list[Any]] = []

    def inner(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        given.append(inputs)
        return module.forward

    run = compile_for_replay(fx.GraphModule({}, graph), [torch.ones(3)], {0}, inner)
    assert len(given[0]) == 1
    assert run(torch.full((3,), 2.0))[0].tolist() == [4, 4, 4]
