"""Weights that are away between calls, or stored in another dtype: accelerate's hooks, diffusers'
hooks, set before or after compiling.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import toca_fx
from tests.helpers import make_policy
from tests.marks import slow_but
from toca_fx.capture.groups import DiskOrMemory, Slot
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.examples import build, examples, vary
from toca_fx.runtime.context import Run
from tools.pipelines.ways.offload import (
    MODES,
    Mode,
    blocks,
    leaves,
    leaves_on_disk,
    on_disk,
    sequential,
    sequential_with_buffers,
    stored_in_8_bits,
    stored_in_8_bits_on_disk,
    two_blocks_on_disk,
)

pytest.importorskip("accelerate")
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module

STEPS = 7
FLUX, WAN = "FluxTransformer2DModel", "WanTransformer3DModel"


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass
class Traffic:
    """What a twin did with diffusers' groups: which are in, how many were, how much was brought."""

    now: set[int] = field(default_factory=set)
    most: int = 0
    nbytes: int = 0


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    found = Traffic()
    onload, offload = DiskOrMemory.onload, DiskOrMemory.offload

    def counted_onload(self: DiskOrMemory, slots: Collection[Slot]) -> None:
        onload(self, slots)
        found.nbytes += sum(slot.tensor.nbytes for slot in slots)
        found.now.add(id(self.hook.group))
        found.most = max(found.most, len(found.now))

    def counted_offload(self: DiskOrMemory) -> None:
        offload(self)
        found.now.discard(id(self.hook.group))

    monkeypatch.setattr(DiskOrMemory, "onload", counted_onload)
    monkeypatch.setattr(DiskOrMemory, "offload", counted_offload)
    return found


ROWS = [(name, mode, when) for name in (FLUX, WAN) for mode in MODES for when in (0, 1)]
# A pipeline whose leaves are on the disk is a row of docs/pipelines.md that is tested every day.
OFTEN = [(FLUX, sequential, 0), (WAN, stored_in_8_bits, 1)]


def made(name: str) -> tuple[Any, list[dict[str, Any]]]:
    """A model, and the inputs of the calls of a run; none depends on what a call returns."""
    example = examples()[name]
    model, inputs = build(example)
    return model, [vary(example, inputs, step, STEPS) for step in range(STEPS)]


def outputs(model: nn.Module, calls: list[dict[str, Any]]) -> list[Tensor]:
    return [model(**given)[0].clone() for given in calls]


def policy(**sections: Any) -> Any:
    """Full steps do what the model does: no attention tells scores."""
    given = {"sampler": {"steps": STEPS}, "scores": {"staleness": 1.0}}
    return make_policy(**{**given, **sections})


def compiled(model: Any, **sections: Any) -> Any:
    return toca_fx.compile(model, policy(**sections), inner="eager")


def run(model: Any, calls: list[dict[str, Any]]) -> tuple[list[Tensor], Run]:
    with toca_fx.session(STEPS) as session:
        found = outputs(model, calls)
    return found, session


def weights_away(model: nn.Module, mode: Mode) -> bool:
    weights = list(model.parameters())
    if mode in (sequential, sequential_with_buffers, on_disk):
        return all(weight.device.type == "meta" for weight in weights)
    if mode in (stored_in_8_bits, stored_in_8_bits_on_disk):
        return any(weight.dtype == torch.float8_e4m3fn for weight in weights)
    return True


@pytest.mark.parametrize(
    ("name", "mode", "later"),
    slow_but(OFTEN, ROWS, "three have one of each kind of hook"),
)
def test_full_steps_are_the_models_and_others_are_cached(
    name: str, mode: Mode, later: int, tmp_path: Path, traffic: Traffic
) -> None:
    untouched, calls = made(name)
    mode(untouched, tmp_path / "untouched")
    expected = outputs(untouched, calls)

    model, _ = made(name)
    if not later:
        mode(model, tmp_path / "model")
    twin = compiled(model, cache={"grain": "model"})
    counters.clear()
    if later:
        cached, _ = run(twin, calls)
        mode(twin, tmp_path / "model")
    found, session = run(twin, calls)
    again, second = run(twin, calls)

    kinds = [step.kind for step in session.report().steps]
    assert kinds == ["full", "skip", "skip"] * 2 + ["full"]
    assert second.report().kinds == session.report().kinds
    for kind, ours, same, theirs in zip(kinds, found, again, expected, strict=True):
        assert torch.equal(ours, theirs) == (kind == "full"), kind
        assert torch.allclose(ours, same, atol=1e-6)  # weights from a disk are aligned otherwise
    if later and mode not in (stored_in_8_bits, stored_in_8_bits_on_disk):
        assert all(map(torch.allclose, found, cached))
    assert counters["stats"]["unique_graphs"] == 1
    assert weights_away(model, mode)
    assert not traffic.now
    assert torch.equal(outputs(model, calls[:1])[0], expected[0])  # the model itself has its hooks


def test_a_piece_of_a_graph_has_its_own_weights_in(traffic: Traffic, tmp_path: Path) -> None:
    """The groups of other blocks are away: a card holds a block, not the model."""
    model, calls = made(FLUX)
    blocks(model, tmp_path)
    _, session = run(compiled(model), calls)
    assert session.report().kinds == {"full": 3, "partial": 4}
    assert traffic.most == 2  # that of a block, and what is in no block
    assert traffic.nbytes == session.report().moved_bytes


def test_explain_needs_no_weights(tmp_path: Path) -> None:
    model, calls = made(FLUX)
    expected = toca_fx.explain(model, policy(), **calls[0])
    sequential(model, tmp_path)
    found = toca_fx.explain(model, policy(), **calls[0])
    assert found.offloaded_bytes == sum(weight.nbytes for weight in model.parameters())
    assert replace(found, offloaded_bytes=0, moved_bytes=()) == expected
    assert weights_away(model, sequential)
    assert "forward" in vars(model)


TRAVELS = [
    (name, mode, grain)
    for name in (FLUX, WAN)
    for mode in (blocks, two_blocks_on_disk, leaves_on_disk, sequential)
    for grain in ("model", "module")
]


@pytest.mark.parametrize(
    ("name", "mode", "grain"),
    slow_but([(FLUX, blocks, "model"), (WAN, two_blocks_on_disk, "module")], TRAVELS, "alike"),
)
def test_what_is_computed_travels_and_the_rest_stays_away(
    name: str, mode: Mode, grain: str, tmp_path: Path, traffic: Traffic
) -> None:
    """At least 40 % fewer bytes where half of the steps only reuse."""
    model, calls = made(name)
    mode(model, tmp_path)
    reused = {"self_attention": "reuse", "joint_attention": "reuse", "cross_attention": "reuse"}
    half = policy(N={"base": 2}, cache={"grain": grain}, modules={**reused, "mlp": "reuse"})
    told = toca_fx.explain(model, half, **calls[0])
    twin = toca_fx.compile(model, half, inner="eager")
    outputs(twin, calls[:1])  # compiled, and checked with all weights if the model writes in place
    traffic.nbytes = 0
    with toca_fx.session(timesteps=[given["timestep"][0].item() for given in calls]) as session:
        outputs(twin, calls)
    steps, report = session.report().steps, session.report()
    assert [step.kind for step in steps] == [kind for _, kind in told.steps]
    assert tuple(step.moved_bytes for step in steps) == told.moved_bytes
    full, reusing = steps[2], steps[1]
    assert full.moved_bytes <= told.offloaded_bytes
    assert reusing.moved_bytes < full.moved_bytes * (0.25 if grain == "model" else 0.75)
    assert report.moved_bytes == sum(told.moved_bytes) <= 0.6 * told.offloaded_bytes * STEPS
    assert traffic.nbytes == (0 if mode is sequential else report.moved_bytes)
    assert f"of {told.offloaded_bytes * STEPS / 2**20:.1f} uncached" in str(told)


@pytest.mark.parametrize(
    "mode", slow_but([leaves], [leaves, sequential, stored_in_8_bits], "alike")
)
@pytest.mark.parametrize("counted", slow_but([False], [False, True], "easier to see"))
def test_a_weight_that_is_written_to_is_seen(mode: Mode, counted: bool, tmp_path: Path) -> None:
    """Modulations are hoisted: computed ahead, and again once a weight of theirs has changed."""
    untouched, calls = made(FLUX)
    model, _ = made(FLUX)
    twin = compiled(model, N={"base": 1})

    def outputs_around_a_write(called: Any) -> list[Tensor]:
        mode(called, tmp_path)
        before = outputs(called, calls[:3])
        layer = called.transformer_blocks[0].norm1.linear
        hook = vars(layer).get("_hf_hook")
        weight = layer.weight if hook is None else hook.weights_map["weight"]
        (weight if counted else weight.data).mul_(1.5)
        return [*before, *outputs(called, calls[3:])]

    expected = outputs_around_a_write(untouched)
    with toca_fx.session(STEPS):
        found = outputs_around_a_write(twin)
    assert all(map(torch.equal, found, expected))


def test_threads_take_turns(tmp_path: Path) -> None:
    model, calls = made(FLUX)
    expected = outputs(model, calls)
    sequential(model, tmp_path)
    twin, found = compiled(model, N={"base": 1}), list[tuple[list[Tensor], Run]]()

    def work() -> None:
        with torch.no_grad():
            found.append(run(twin, calls))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    for ours, _ in found:
        assert all(map(torch.equal, ours, expected))
    assert weights_away(model, sequential)


def test_a_call_that_fails_leaves_weights_away(tmp_path: Path, traffic: Traffic) -> None:
    model, calls = made(FLUX)
    expected = outputs(model, calls[:1])[0]
    leaves_on_disk(model, tmp_path)
    twin = compiled(model, N={"base": 1})
    lost = next(iter(tmp_path.iterdir()))
    kept = lost.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        outputs(twin, calls[:1])
    assert not traffic.now
    kept.rename(lost)
    assert torch.equal(outputs(twin, calls[:1])[0], expected)


class Doubling(ModelHook):  # type: ignore[misc]
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return (output[0] * 2,) if isinstance(output, tuple) else output * 2


@pytest.mark.parametrize(
    "path", slow_but(["", "proj_out"], ["", "proj_out", "x_embedder"], "alike")
)
def test_other_hooks_do_what_they_do(path: str) -> None:
    untouched, calls = made(FLUX)
    model, _ = made(FLUX)
    for each in (untouched, model):
        add_hook_to_module(each.get_submodule(path), Doubling())
    found = outputs(compiled(model, N={"base": 1}), calls[:2])
    assert all(map(torch.equal, found, outputs(untouched, calls[:2])))


def refused(model: Any, calls: list[dict[str, Any]], **options: Any) -> str:
    twin = toca_fx.compile(model, policy(), **options)
    with pytest.raises(UnsupportedModelError) as error:
        twin(**calls[0])
    return str(error.value)


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    model, calls = made(FLUX)
    blocks(model, tmp_path)
    said = refused(model, calls, mode="reduce-overhead")
    assert all(word in said for word in ("CUDA graphs", "GroupOffloadingHook", FLUX, "leave the"))

    model, _ = made(FLUX)
    add_hook_to_module(model.proj_out, Doubling())
    sequential(model, tmp_path)
    said = refused(model, calls)
    assert all(word in said for word in ("`proj_out`", "Doubling", "remove"))

    model, _ = made(FLUX)
    for path, device in (("proj_out", "cpu"), ("x_embedder", "meta")):
        hook = AlignDevicesHook("cpu")
        add_hook_to_module(model.get_submodule(path), hook)
        hook.execution_device = device
    said = refused(model, calls)
    assert all(word in said for word in ("`proj_out` on cpu", "`x_embedder` on meta", "one device"))
