"""toca_fx.compile and torch.compile(backend="toca"): what comes back, and what is refused when."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import toca_fx
from tests.helpers import KINDS, call, make_inputs, make_policy, run_all, tiny
from tests.marks import slow_but
from tests.models import BrokenDiT, OriginalDiT
from toca_fx import PolicyError
from toca_fx.backend import toca

INSTALLED = "toca" in torch.compiler.list_backends(exclude_tags=())
BACKEND: Any = "toca" if INSTALLED else toca
SMALLEST = {
    "version": 1,
    "name": "x",
    "sampler": {"steps": 4},
    "N": {"base": 2},
    "R": {"base": 0.5},
    "scores": {"staleness": 1.0},
}


@pytest.fixture
def model() -> nn.Module:
    return tiny("diffusers", layers=2)


@pytest.fixture(autouse=True)
def _no_policy_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOCA_POLICY", raising=False)


def kinds(model: nn.Module, steps: int = 4) -> list[str]:
    with toca_fx.session() as run:
        run_all(model, make_inputs(steps))
    return [step.kind for step in run.report().steps]


# The twin


@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_is_a_model_of_the_same_class_with_the_same_parameters(kind: str) -> None:
    model = tiny(kind, layers=2)
    twin = toca_fx.compile(model, make_policy(), inner="eager")
    assert isinstance(twin, type(model))
    assert type(twin).__name__ == type(model).__name__
    assert twin is not model
    assert list(twin.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    assert [name for name, _ in twin.named_modules()] == [name for name, _ in model.named_modules()]
    assert twin.training == model.training


def test_attributes_of_a_diffusers_model(model: nn.Module) -> None:
    twin = toca_fx.compile(model, make_policy(), inner="eager")
    assert twin.config == model.config
    assert twin.config.num_layers == 2
    assert twin.dtype == torch.float32
    assert twin.device == torch.device("cpu")
    assert twin.to(torch.float64) is twin
    assert twin.dtype == model.dtype == torch.float64
    output = run_all(twin, make_inputs(1, dtype=torch.float64))[0]
    assert output.dtype == torch.float64


def test_loading_a_state_dict_reaches_the_twin(model: nn.Module) -> None:
    inputs = make_inputs(4)
    twin = toca_fx.compile(model, make_policy(), inner="eager")
    with toca_fx.session():
        run_all(twin, inputs)
    other = tiny("diffusers", layers=2, seed=9)
    twin.load_state_dict(other.state_dict())
    with toca_fx.session():
        changed = run_all(twin, inputs)
    with toca_fx.session():
        expected = run_all(toca_fx.compile(other, make_policy(), inner="eager"), inputs)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(changed, expected, strict=True))


def test_the_model_itself_stays_as_it_is(model: nn.Module) -> None:
    before, state = copy.deepcopy(model.__dict__), model.__dict__.keys()
    twin = toca_fx.compile(model, make_policy(), inner="eager")
    assert kinds(twin) == ["full", "partial", "partial", "full"]
    assert model._compiled_call_impl is None
    assert model.__dict__.keys() == state == before.keys()
    assert kinds(model) == []


def test_a_module_that_torch_compile_wrapped(model: nn.Module) -> None:
    twin = toca_fx.compile(torch.compile(model, backend="eager"), make_policy(), inner="eager")
    assert isinstance(twin, type(model))
    assert kinds(twin) == ["full", "partial", "partial", "full"]


class Pipeline:
    """Like a diffusers pipeline, as far as it matters."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.scheduler = transformer, object()

    def __call__(self, steps: int) -> list[Tensor]:
        return run_all(self.transformer, make_inputs(steps))


def test_a_pipeline_gets_a_twin_of_its_transformer(model: nn.Module) -> None:
    pipe = Pipeline(model)
    fast = toca_fx.compile(pipe, make_policy(), inner="eager")
    assert isinstance(fast, Pipeline)
    assert type(fast).__name__ == "Pipeline"
    assert pipe.transformer is model
    assert fast.scheduler is pipe.scheduler
    with toca_fx.session() as run:
        fast(4)
        pipe(4)
    assert [step.kind for step in run.report().steps] == ["full", "partial", "partial", "full"]


def test_a_twin_in_a_pipeline(model: nn.Module) -> None:
    pipe = Pipeline(model)
    pipe.transformer = toca_fx.compile(pipe.transformer, make_policy(), inner="eager")
    with toca_fx.session() as run:
        pipe(2)
    assert len(run.report().steps) == 2


# Refusals, when compile is called


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (
            "dit-xl-3",
            "there is no shipped policy and no file of this name; did you mean `dit-xl-2`?",
        ),
        ("./missing.yaml", "missing.yaml"),
        (Path("missing.yaml"), "missing.yaml"),
        ({**SMALLEST, "R": {"base": 2}}, "R.base"),
        ({**SMALLEST, "skores": {}}, "did you mean `scores`?"),
    ],
)
def test_a_bad_policy_is_refused_at_once(model: nn.Module, policy: Any, text: str) -> None:
    with pytest.raises(PolicyError) as raised:
        toca_fx.compile(model, policy, inner="eager")
    assert text in str(raised.value)


def test_every_problem_of_a_policy_is_told(model: nn.Module) -> None:
    with pytest.raises(PolicyError) as raised:
        toca_fx.compile(model, {**SMALLEST, "R": {"base": 2}, "N": {"base": 0}}, inner="eager")
    assert len(raised.value.problems) == 2


def test_an_unknown_inner_backend_is_refused_at_once(model: nn.Module) -> None:
    with pytest.raises(
        ValueError,
        match=r"unknown inner backend `inducter`; did you mean `inductor`\?; known: .*aot_eager",
    ):
        toca_fx.compile(model, make_policy(), inner="inducter")


@pytest.mark.parametrize("wrong", [None, "model", 3, object()])
def test_what_is_no_model_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(
        TypeError,
        match=r"expected a torch\.nn\.Module or a diffusers pipeline with a transformer, got ",
    ):
        toca_fx.compile(wrong, make_policy(), inner="eager")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"backend toca: unknown option `polcy`; did you mean `policy`\?"
    ):
        toca(None, [], options={"polcy": "dit-xl-2"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "text"),
    [({"inner": "eagre"}, "did you mean `eager`?"), ({"policy": "dit"}, "no shipped policy")],
)
def test_options_are_checked_at_the_first_call_of_torch_compile(
    model: nn.Module, options: Mapping[str, Any], text: str
) -> None:
    compiled = torch.compile(model, backend=BACKEND, options=dict(options))
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as raised:
        run_all(compiled, make_inputs(1))
    assert text in str(raised.value)


@pytest.mark.parametrize("which", ["compile", "torch.compile"])
def test_a_rule_without_a_site_names_the_nearest_miss(model: nn.Module, which: str) -> None:
    policy = make_policy(rules=[{"path": "transformer_blocks.0.fff", "R": {"base": 0.9}}])
    if which == "compile":
        fast = toca_fx.compile(model, policy, inner="eager")
    else:
        fast = torch.compile(model, backend=BACKEND, options={"policy": policy, "inner": "eager"})
    text = "no path matches `transformer_blocks.0.fff`; the nearest is `transformer_blocks.0.ff`"
    with pytest.raises(PolicyError) as raised, toca_fx.session():
        run_all(fast, make_inputs(1))
    assert text in str(raised.value)


# torch.compile(backend="toca")


def test_the_entry_point_leads_here() -> None:
    if not INSTALLED:
        pytest.skip("toca_fx is not installed; the tests below use the function itself")
    assert torch._dynamo.backends.registry.lookup_backend("toca") is toca


@pytest.mark.parametrize("kind", slow_but(["diffusers"], KINDS, "one model is enough"))
@pytest.mark.parametrize("policy", ["data", "file", "name"])
def test_torch_compile_does_the_same(kind: str, policy: str, tmp_path: Path) -> None:
    model, inputs = tiny(kind, layers=2), make_inputs(6)
    file = tmp_path / "policy.yaml"
    file.write_text(
        "version: 1\nname: x\nsampler: {steps: 6}\n"
        "N: {base: 2}\nR: {base: 0.5}\nscores: {staleness: 1}\n",
        encoding="utf-8",
    )
    source: Any = {
        "data": {**SMALLEST, "sampler": {"steps": 6}},
        "file": str(file),
        "name": "reference/toca-image",
    }[policy]
    compiled = torch.compile(model, backend=BACKEND, options={"policy": source, "inner": "eager"})
    with toca_fx.session(6) as run:
        outputs = [run_one(compiled, model, step) for step in inputs]
    with toca_fx.session(6):
        expected = run_all(toca_fx.compile(model, source, inner="eager"), inputs)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    cycle = (
        ["full", "full", "partial", "partial", "full", "full"]
        if policy == "name"
        else ["full", "partial"] * 3
    )
    assert [step.kind for step in run.report().steps] == cycle


def run_one(compiled: nn.Module, model: nn.Module, step: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """torch.compile's wrapper is of another class than the model."""
    x, t, y = step
    with torch.no_grad():
        return (
            compiled(x, t=t, y=y)
            if isinstance(model, OriginalDiT)
            else compiled(x, timestep=t, class_labels=y).sample
        )


def test_a_compiled_function_around_the_model(model: nn.Module) -> None:
    @torch.compile(backend=BACKEND, options={"policy": SMALLEST, "inner": "eager"})
    def denoise(x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        return x - 0.1 * model(x, timestep=timestep, class_labels=labels).sample[:, :4]

    with toca_fx.session() as run, torch.no_grad():
        for x, t, y in make_inputs(4):
            output = denoise(x, t, y)
    assert output.shape == (2, 4, 16, 16)
    assert [step.kind for step in run.report().steps] == ["full", "partial"] * 2


def test_a_graph_break_between_blocks() -> None:
    """Each part of the model has a clock and caches of its own, so that all of them are on the same
    step.
    """

    model, inputs = tiny("original", layers=2), make_inputs(4)
    broken = BrokenDiT().eval().requires_grad_(False)
    broken.load_state_dict(model.state_dict())
    with toca_fx.session():
        expected = run_all(toca_fx.compile(model, SMALLEST, inner="eager"), inputs)
    compiled = torch.compile(
        broken, backend=BACKEND, options={"policy": SMALLEST, "inner": "eager"}
    )
    with toca_fx.session(), torch.no_grad():
        outputs = [compiled(x, t=t, y=y) for x, t, y in inputs]
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(outputs, expected, strict=True))


# Which policy


def chosen(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "toca_fx.plan.choose" and "policy" in record.getMessage()
    ]


@pytest.mark.parametrize("way", ["compile", "torch.compile"])
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("diffusers", "policy `dit-xl-2` (it names DiTTransformer2DModel)"),
        ("original", "policy `default-image` (none names OriginalDiT)"),
    ],
)
def test_the_policy_for_a_model_is_found_by_its_class(
    way: str, kind: str, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="toca_fx")
    model = tiny(kind, layers=1)
    step = next(iter(make_inputs(1)))
    if way == "compile":
        run_one(toca_fx.compile(model, inner="eager"), model, step)
    else:
        run_one(torch.compile(model, backend=BACKEND, options={"inner": "eager"}), model, step)
    assert chosen(caplog) == [line]


def test_the_policy_from_the_environment(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="toca_fx")
    monkeypatch.setenv("TOCA_POLICY", "reference/toca-image")
    assert kinds(toca_fx.compile(model, inner="eager")) == ["full", "full", "partial", "partial"]
    assert chosen(caplog) == ["policy `reference/toca-image` (from TOCA_POLICY)"]
    caplog.clear()
    assert kinds(toca_fx.compile(model, SMALLEST, inner="eager")) == ["full", "partial"] * 2
    assert chosen(caplog) == [], "a policy that is given comes first"


def test_a_policy_for_another_model_is_warned_of(
    model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    toca = toca_fx.compile(model, {**SMALLEST, "model": ["FluxTransformer2DModel"]}, inner="eager")
    with torch.no_grad():
        call(toca, *next(iter(make_inputs(1))))
    assert (
        "toca_fx: policy `x` was written for FluxTransformer2DModel; the model is a "
        "DiTTransformer2DModel" in caplog.messages
    )


def test_a_policy_for_this_model_is_not(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    toca = toca_fx.compile(
        model, {**SMALLEST, "model": ["A", "DiTTransformer2DModel"]}, inner="eager"
    )
    with torch.no_grad():
        call(toca, *next(iter(make_inputs(1))))
    assert not [message for message in caplog.messages if "was written for" in message]


# Numbers that change from call to call


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny("original", layers=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, scale: int) -> Tensor:
        return self.inner(x, t, y) * scale


def test_an_integer_argument_that_changes_is_never_frozen() -> None:
    model = Scaled().eval()
    fast = toca_fx.compile(model, make_policy(N={"base": 1}), inner="eager")
    with torch.no_grad():
        for scale, (x, t, y) in enumerate(make_inputs(5), start=1):
            torch.testing.assert_close(fast(x, t, y, scale), model(x, t, y, scale))


def test_a_model_in_training_mode_samples_without_gradients() -> None:
    fast = toca_fx.compile(tiny("diffusers", layers=2).train(), make_policy(), inner="eager")
    assert kinds(fast) == ["full", "partial", "partial", "full"]


@pytest.mark.parametrize("inner", [5, None, ["eager"]])
def test_an_inner_backend_is_a_name_or_a_callable(model: nn.Module, inner: Any) -> None:
    with pytest.raises(TypeError, match="inner="):
        toca_fx.compile(model, make_policy(), inner=inner)


@pytest.mark.parametrize("policy", [5, [], b"dit-xl-2", object()])
def test_a_policy_is_a_name_a_path_a_mapping_or_a_policy(model: nn.Module, policy: Any) -> None:
    with pytest.raises(TypeError, match="policy="):
        toca_fx.compile(model, policy, inner="eager")


def test_kernels_that_the_model_chooses_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 8, 4)
    with torch.no_grad():
        outputs = toca_fx.compile(Model(), make_policy(), inner="eager")(x)
    assert torch.allclose(outputs, Model()(x), atol=1e-6)
    assert sum("sdpa_kernel" in message for message in caplog.messages) == 1
