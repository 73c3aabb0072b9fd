"""Threads that share a model, and threads that have nothing to do with it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.convert_frame import compile_lock
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

import toca_fx
from tests.helpers import make_inputs, make_policy, programs, run_all, tiny
from tests.marks import slow_but
from toca_fx.lower.flops import FlopCounter
from toca_fx.torch_private import compiling, detect_fake_mode

STEPS = 4
FIRST_CALLS = slow_but({"eager"}, ["eager", "inductor"], "inductor compiles")


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """What each returns, all begun together; raises what one raises, and if they do not end."""
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []
    ready = threading.Barrier(len(functions))

    def run(at: int) -> None:
        ready.wait()
        try:
            with torch.no_grad():
                results[at] = functions[at]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(functions))]
    for thread in threads:
        thread.daemon = True
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"
    if errors:
        raise errors[0]
    return results


@contextmanager
def bystanders() -> Iterator[list[int]]:
    """Threads that run a decoder of their own meanwhile, as it is, and as torch compiled it.

    Their calls are counted, and must not fail.
    """
    decoder = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)])
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager", fullgraph=True)
    x = torch.ones(2, 8)
    expected = decoder(x), compiled(x)
    calls, errors, over = [0, 0], list[BaseException](), threading.Event()

    def stand_by(at: int, function: Callable[[Tensor], Tensor]) -> None:
        while not over.is_set():
            try:
                assert torch.equal(function(x), expected[at])
            except BaseException as error:
                errors.append(error)
                return
            calls[at] += 1
            time.sleep(1e-4)

    threads = [
        threading.Thread(target=stand_by, args=given) for given in enumerate((decoder, compiled))
    ]
    for thread in threads:
        thread.start()
    try:
        yield calls
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def generation(model: nn.Module, seed: int, side: int = 16) -> Callable[[], list[Tensor]]:
    """One generation, with its report, which counts FLOPs."""
    inputs = make_inputs(STEPS, batch=1, seed=seed, dtype=torch.float64, side=side)

    def run() -> list[Tensor]:
        with toca_fx.session() as run:
            outputs = run_all(model, inputs)
        assert [step.kind for step in run.report().steps] == ["full", "partial", "partial", "full"]
        assert run.report().flops_done > 0
        return outputs

    return run


def twin(inner: str, seed: int = 0) -> nn.Module:
    model = tiny("diffusers", layers=2, seed=seed).to(torch.float64)
    return toca_fx.compile(model, make_policy(sampler={"steps": STEPS}), inner=inner)


def as_alone(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).abs().max() < 1e-9


@pytest.mark.parametrize("inner", FIRST_CALLS)
def test_first_calls_of_four_threads(inner: str) -> None:
    """Each thread gets what it gets alone; a stranger's modules, and compiled functions, run on."""
    call = nn.Module.__call__
    expected = [generation(twin(inner), seed)() for seed in range(4)]
    torch._dynamo.reset()
    shared = twin(inner)
    with bystanders() as calls:
        as_alone(in_threads(*(generation(shared, seed) for seed in range(4))), expected)
    assert min(calls) > 0
    assert nn.Module.__call__ is call


def test_first_calls_of_models_of_their_own() -> None:
    expected = [generation(twin("eager", seed), seed)() for seed in range(4)]
    torch._dynamo.reset()
    runs = [generation(twin("eager", seed), seed) for seed in range(4)]
    as_alone(in_threads(*runs), expected)


def test_first_calls_at_many_shapes() -> None:
    """Dynamo may hand a call to code for any shape after code for its own: then it is full."""
    shared = twin("eager")
    for outputs in in_threads(
        *(
            lambda side=side: run_all(shared, make_inputs(2, 1, 0, torch.float64, side))
            for side in (8, 16)
        )
    ):
        assert all(bool(output.isfinite().all()) for output in outputs)


def test_a_model_that_is_ready_waits_for_no_compilation() -> None:
    ready = generation(twin("eager"), 0)
    ready()
    with compiling():
        in_threads(ready)


def test_counting_flops_leaves_the_modules_of_others_alone() -> None:
    """torch's own counter puts hooks on all modules of the process."""
    seen: list[int] = []

    def look(x: Tensor) -> Tensor:
        seen.append(len(_global_forward_pre_hooks) + len(_global_forward_hooks))
        return x

    graph = fx.Graph()
    graph.output(graph.call_function(look, (graph.placeholder("x"),)))
    FlopCounter().count(fx.GraphModule(nn.Module(), graph), [torch.ones(2)])
    assert seen == [0]


def test_memories_lie_where_they_belong_while_another_thread_traces() -> None:
    """Meanwhile fake tensors say that they are on the device "meta"."""
    with toca_fx.session() as run:
        run_all(twin("eager"), make_inputs(1, dtype=torch.float64))
    (program,) = programs(run)
    nodes = program.analysis.aten.graph.nodes
    mode = detect_fake_mode([node.meta.get("val") for node in nodes])
    assert mode is not None
    mode.in_kernel_invocation = True
    made = [*program.new_buffers(program.analysis.plan(STEPS)).values()]
    made += program.new_hoisted(3).tensors.values()
    assert {value.device.type for value in made} == {"cpu"}


def test_the_lock_is_free_after_an_error() -> None:
    def failing(*_: Any) -> Any:
        raise ZeroDivisionError

    model = tiny("diffusers", layers=1)
    with pytest.raises(ZeroDivisionError):
        toca_fx.compile(model, make_policy(), inner=failing)(*next(iter(make_inputs(1))))
    assert not torch.compiler.is_compiling()

    def take() -> bool:
        taken = compile_lock.acquire(blocking=False)
        if taken:
            compile_lock.release()
        return taken

    assert in_threads(take) == [True]
