"""Hoisted values over a generation: computed once, again when something changed, and never to
another result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import toca_fx
from tests.helpers import make_policy
from tests.marks import slow_but
from toca_fx.examples import build, examples, prediction, vary
from toca_fx.lower.compiler import Compiler
from toca_fx.lower.hoisted_values import distance
from toca_fx.runtime.conditioning import Conditioning
from toca_fx.runtime.report import Report

STEPS = 6
CLASSES = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "LTXVideoTransformer3DModel",
)
ON, OFF = {"memory": 64}, {"memory": 0}


def generation(name: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A tiny model in float64 and the keywords of its calls: latents and timestep are new at each,
    all else are the same tensors.
    """
    example = examples()[name]
    model, first = build(example, dtype=torch.float64)
    return model, [vary(example, first, step, STEPS) for step in range(STEPS)]


def timesteps(calls: list[dict[str, Any]], name: str = "timestep") -> list[float]:
    return [float(call[name].flatten()[0]) for call in calls]


def run(
    model: nn.Module,
    calls: list[dict[str, Any]],
    hoisting: dict[str, int],
    known: list[float] | None = None,
    between: Callable[[int], None] = lambda step: None,
    inner: Compiler = "eager",
    remade: str = "",
    **sections: Any,
) -> tuple[list[Tensor], Report]:
    """``remade`` is the input that is a tensor of its own at every call, and gone after it;
    ``sections`` are those of the policy.
    """
    policy = make_policy(sampler={"steps": STEPS}, hoisting=hoisting, **sections)
    torch._dynamo.reset()
    fast = toca_fx.compile(model, policy, inner=inner)
    outputs = []
    with torch.no_grad(), toca_fx.session(None if known else STEPS, timesteps=known) as session:
        for step, call in enumerate(calls):
            between(step)
            own = {remade: call[remade].clone()} if remade else {}
            outputs.append(prediction(fast(**{**call, **own}))[0].clone())
    return outputs, session.report()


def spent(report: Report) -> list[int]:
    return [step.beside_flops for step in report.steps]


def close(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """To the rounding of double precision; the sinusoids of timesteps are in single precision on
    either side.
    """
    return all(
        torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["PixArtTransformer2DModel"],
        CLASSES,
        "of the classes, one is enough",
    ),
)
def test_hoisting_changes_no_result(name: str) -> None:
    model, calls = generation(name)
    off, without = run(model, calls, OFF)
    on, step_by_step = run(model, calls, ON)
    ahead, at_once = run(model, calls, ON, timesteps(calls))
    assert close(on, off)
    assert close(ahead, off)
    assert without.hoisted_bytes == 0
    assert spent(without) == [0] * STEPS
    assert 0 < step_by_step.hoisted_bytes < at_once.hoisted_bytes
    assert not at_once.warnings
    timed = spent(step_by_step)[1]
    assert spent(step_by_step) == [spent(step_by_step)[0], *[timed] * (STEPS - 1)]
    assert spent(at_once) == [spent(step_by_step)[0] + (STEPS - 1) * timed, *[0] * (STEPS - 1)]
    assert at_once.flops_done == step_by_step.flops_done <= without.flops_done


@pytest.mark.parametrize(
    "name",
    slow_but(
        ["AceStepTransformer1DModel"],
        [
            "AceStepTransformer1DModel",
            "AnyFlowTransformer3DModel",
            "Kandinsky6Transformer3DModel",
            "RFD4ProteinaTransformer",
            "WanAnimateTransformer3DModel",
            "ZImageTransformer2DModel",
        ],
        "one class with two timesteps is enough",
    ),
)
def test_all_that_changes_at_every_step_is_no_condition(name: str) -> None:
    """Several timesteps, several latents: the model is cached, and each step has its own."""
    model, calls = generation(name)
    with torch.no_grad():
        model(**calls[0])  # Z-Image makes its tables of positions, which Dynamo does not follow
    off, _ = run(model, calls, OFF)
    listed = timesteps(calls, examples()[name].timestep)
    for known in (None, listed):
        on, report = run(model, calls, ON, known)
        assert close(on, off)
        assert not report.warnings
        assert {step.kind for step in report.steps} == {"full", "partial"}
        assert len({step.beside_flops for step in report.steps[1:]}) == 1


def test_timed_values_are_compiled_for_timesteps_that_are_not_listed_only() -> None:
    model, calls = generation("PixArtTransformer2DModel")
    listed = timesteps(calls)
    compiled: list[int] = []
    for known in (listed, [*listed[:-1], listed[-1] - 1], None):
        graphs: list[fx.GraphModule] = []

        def inner(module: fx.GraphModule, _: list[Any], graphs: Any = graphs) -> fx.GraphModule:
            graphs.append(module)
            return module

        run(model, calls, ON, known, inner=inner)
        compiled.append(len(graphs))
    assert compiled == [compiled[0], compiled[0] + 1, compiled[0] + 1]


READING: dict[str, Any] = {"modules": {"cross_attention": "compute"}}


def test_a_caption_is_projected_once_and_again_if_it_changes() -> None:
    model, calls = generation("PixArtTransformer2DModel")
    caption = calls[0]["encoder_hidden_states"]
    once = spent(run(model, calls, ON, **READING)[1])
    assert once[0] > once[1] == once[2]

    other = [
        {**call, "encoder_hidden_states": caption if step < 2 else caption.clone()}
        for step, call in enumerate(calls)
    ]
    copied, report = run(model, calls, ON, remade="encoder_hidden_states", **READING)
    assert spent(report) == [once[0]] * STEPS, "other tensors, equal or not"
    assert close(copied, run(model, calls, OFF, **READING)[0])
    assert spent(run(model, other, ON, **READING)[1])[1:4] == [once[1], once[0], once[0]]

    def write(step: int) -> None:
        if step == 3:
            caption.mul_(-1.0)

    before = caption.clone()
    ours, report = run(model, calls, ON, between=write)
    caption.copy_(before)
    theirs, _ = run(model, calls, OFF, between=write)
    assert close(ours, theirs)
    assert spent(report) == [once[0], once[1], once[1], once[0], once[1], once[1]]


def test_a_caption_that_a_step_does_not_read_is_left_to_the_next_that_does() -> None:
    """Where cross-attention is reused, keys and values of a caption are not projected."""
    model, calls = generation("PixArtTransformer2DModel")
    once = spent(run(model, calls, ON)[1])
    copied, report = run(model, calls, ON, remade="encoder_hidden_states")
    assert spent(report) == [once[0], once[1], once[1]] * 2
    assert close(copied, run(model, calls, OFF)[0])


def test_a_changed_weight_is_noticed() -> None:
    model, calls = generation("PixArtTransformer2DModel")
    weight = model.transformer_blocks[1].attn2.to_k.weight  # type: ignore[union-attr,index]

    def write(step: int) -> None:
        if step == 3:
            with torch.no_grad():
                weight.neg_()

    ours, _ = run(model, calls, ON, timesteps(calls), between=write)
    with torch.no_grad():
        weight.neg_()
    theirs, _ = run(model, calls, OFF, between=write)
    assert close(ours, theirs)


def test_inference_mode_computes_captions_once() -> None:
    """Nobody counts writes to its tensors: who writes says so."""
    model, calls = generation("PixArtTransformer2DModel")
    once = spent(run(model, calls, ON)[1])
    with torch.inference_mode():
        calls = [
            {**call, "encoder_hidden_states": calls[0]["encoder_hidden_states"].clone()}
            for call in calls[:1]
        ] * STEPS
    _, report = run(model, calls, ON)
    assert spent(report)[0] == once[0]
    assert not any(spent(report)[1:])
    policy = make_policy(sampler={"steps": STEPS}, hoisting=ON)
    expected, outputs = [], []
    for hoisting in (ON, OFF):
        torch._dynamo.reset()
        policy = make_policy(sampler={"steps": STEPS}, hoisting=hoisting)
        fast = toca_fx.compile(model, policy, inner="eager")
        with torch.inference_mode(), toca_fx.session() as session:
            for step in range(STEPS):
                call = {**calls[0], "timestep": calls[0]["timestep"] - step}
                if step == 3:
                    call["encoder_hidden_states"].neg_()
                    session.invalidate()
                found = prediction(fast(**call))[0].clone()
                (outputs if hoisting is ON else expected).append(found)
            calls[0]["encoder_hidden_states"].neg_()
    assert close(outputs, expected)


def test_other_timesteps_than_announced_are_computed_in_the_call() -> None:
    model, calls = generation("DiTTransformer2DModel")
    wrong = timesteps(calls)
    wrong[2:4] = 1.0, 2.0
    ours, report = run(model, calls, ON, wrong)
    assert close(ours, run(model, calls, OFF, wrong)[0])
    assert [flops > 0 for flops in spent(report)] == [True, False, True, True, False, False]
    assert [step.kind for step in report.steps] == [
        "full",
        "partial",
        *["full"] * 2,
        *["partial"] * 2,
    ]
    (warning,) = report.warnings
    assert warning.startswith("the model is called at a timestep that is not listed")


def test_labels_that_change_where_nothing_is_listed_reach_the_listed_steps_behind() -> None:
    model, calls = generation("DiTTransformer2DModel")
    listed = timesteps(calls)
    listed[1] = 1.0
    found = []
    for hoisting in (ON, OFF):
        labels = [torch.tensor([1, 2])]

        def renew(step: int, labels: list[Tensor] = labels) -> None:
            if step == 1:
                labels[:] = [torch.tensor([5, 3])]  # the last one is gone
            calls[step]["class_labels"] = labels[0]
            calls[step - 1].pop("class_labels", None)

        found.append(run(model, calls, hoisting, listed, between=renew))
    (ours, report), (theirs, _) = found
    assert close(ours, theirs)
    assert [step.kind for step in report.steps].count("partial") > 1


def test_an_interrupt_between_labels_and_their_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = generation("DiTTransformer2DModel")
    listed, seen = timesteps(calls), Conditioning._see
    found = []
    for interrupted in (True, False):
        fuse = [2 if interrupted else 0]  # new labels have been seen for the second time

        def see(self: Conditioning, what: str, *rest: Any, fuse: list[int] = fuse) -> None:
            seen(self, what, *rest)
            fuse[0] -= what == "conditions"
            if what == "conditions" and fuse[0] == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(Conditioning, "_see", see)
        torch._dynamo.reset()
        policy = make_policy(sampler={"steps": STEPS}, hoisting=ON, N={"base": 1})
        fast = toca_fx.compile(model, policy, inner="eager")
        labels, outputs = torch.tensor([1, 2]), []
        with torch.no_grad(), toca_fx.session(timesteps=listed):
            for step, call in enumerate(calls):
                if step == 1:
                    labels = torch.tensor([5, 3])
                given = {**call, "class_labels": labels}
                call.pop("class_labels", None)
                if step == 1 and interrupted:
                    with pytest.raises(KeyboardInterrupt):
                        fast(**given)
                outputs.append(prediction(fast(**given))[0].clone())
        found.append(outputs)
        assert fuse[0] <= 0
    assert close(*found)


def test_too_many_timesteps_for_the_memory_are_computed_one_by_one() -> None:
    model, calls = generation("DiTTransformer2DModel")
    model.double()
    known = timesteps(calls)
    policy = make_policy(sampler={"steps": STEPS}, hoisting={"memory": 1})
    torch._dynamo.reset()
    fast = toca_fx.compile(model, policy, inner="eager")
    many = known + [0.0] * 1000
    with torch.no_grad(), toca_fx.session(timesteps=many) as session:
        for call in calls:
            fast(**call)
    assert all(flops > 0 for flops in spent(session.report()))


@torch.library.custom_op("toca_fx_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


double.register_fake(torch.empty_like)


class Modulated(nn.Module):
    """A block that is modulated through an operator without a batching rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.blocks[0].modulate = nn.Linear(1, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> tuple[Tensor]:
        scale = double(self.blocks[0].modulate(timestep[:, None]))
        return (x + self.blocks[0].mlp(x * scale[:, None]),)


def test_an_operator_of_somebody_else_is_computed_for_all_timesteps() -> None:
    torch.manual_seed(0)
    model = Modulated().double().eval().requires_grad_(False)
    calls = [
        {
            "x": torch.randn(2, 12, 8, dtype=torch.float64),
            "timestep": torch.full((2,), 6.0 - step, dtype=torch.float64),
        }
        for step in range(STEPS)
    ]
    ours, report = run(model, calls, ON, timesteps(calls))
    assert close(ours, run(model, calls, OFF)[0])
    assert [flops > 0 for flops in spent(report)] == [True] + [False] * (STEPS - 1)


def test_the_number_of_steps_is_that_of_the_timesteps() -> None:
    with toca_fx.session(timesteps=[3.0, 2.0, 1.0]) as session:
        assert session.num_steps == 3
    with toca_fx.session(3, timesteps=torch.tensor([3, 2, 1])) as session:
        assert session.num_steps == 3
    with (
        pytest.raises(ValueError, match="2 timesteps were given"),
        toca_fx.session(3, timesteps=[2.0, 1.0]),
    ):
        pass


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose tensors are not read in every call."""
    monkeypatch.setattr("toca_fx.runtime.watch.reading_waits", lambda tensor: True)


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    "name",
    slow_but(
        ["DiTTransformer2DModel"],
        ["DiTTransformer2DModel", "FluxTransformer2DModel"],
        "of the classes, one is enough",
    ),
)
def test_on_an_accelerator_timesteps_are_looked_up_there(name: str) -> None:
    model, calls = generation(name)
    plain, _ = run(model, calls, OFF)
    outputs, report = run(model, calls, ON, timesteps(calls))
    assert close(outputs, plain)
    assert spent(report)[1:] == [0] * (STEPS - 1)
    assert not any("timestep" in warning for warning in report.warnings)


@pytest.mark.usefixtures("accelerator")
def test_on_an_accelerator_a_lost_timestep_is_never_nan_and_told() -> None:
    model, calls = generation("DiTTransformer2DModel")
    known = timesteps(calls)
    run(model, calls, ON, known)
    policy = make_policy(sampler={"steps": STEPS}, hoisting=ON)
    fast, outputs, warnings = toca_fx.compile(model, policy, inner="eager"), [], []
    for lost in (False, True):  # those of the first generation are read
        other = {**calls[3], "timestep": calls[3]["timestep"] + 1}
        with torch.no_grad(), toca_fx.session(timesteps=known) as session:
            for step, call in enumerate(calls):
                given = other if lost and step == 3 else call
                outputs.append(prediction(fast(**given))[0].clone())
        warnings.append(session.report().warnings)
    assert all(output.isfinite().all() for output in outputs)
    assert warnings[0] == ()
    assert any("the nearest one listed were used" in warning for warning in warnings[1])


@pytest.mark.usefixtures("accelerator")
def test_on_an_accelerator_timesteps_in_another_unit_are_noticed_at_once() -> None:
    model, calls = generation("DiTTransformer2DModel")
    plain, _ = run(model, calls, OFF)
    outputs, report = run(model, calls, ON, [timestep / 1000 for timestep in timesteps(calls)])
    assert close(outputs, plain)
    assert any("at another timestep" in warning for warning in report.warnings)


@pytest.mark.parametrize("steps", [20, 28, 50])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_timestep_is_found_whatever_way_it_was_rounded(steps: int, dtype: torch.dtype) -> None:
    """diffusers' FLUX pipeline rounds t to the model's type and divides then; who lists timesteps
    divides first.
    """
    listed = torch.linspace(1000, 1000 / steps, steps, dtype=torch.float64) * 0.9987
    called = listed.to(dtype) / 1000
    assert dtype != torch.bfloat16 or (called != (listed / 1000).to(dtype)).any()
    apart = distance(called[:, None], listed[None] / 1000)
    assert torch.equal(apart.argmin(dim=1), torch.arange(steps))
    assert (apart.amin(dim=1) <= 0).all()
    assert (distance(called[:1], listed[1:2] / 1000) > 0).all()


def test_whole_timesteps_are_not_rounded() -> None:
    assert distance(torch.tensor([500, 501]), torch.tensor([500.0, 500.0])).tolist() == [0, 1]
