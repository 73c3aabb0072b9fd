"""The shipped policies: clean, short, and with the authors' numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from toca_fx.policy import (
    Action,
    Forecast,
    Guidance,
    Interval,
    Ratio,
    Sampler,
    Scores,
    Spatial,
    Window,
    load_policy,
    shipped_policies,
    validate_file,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policies_are_clean_and_carry_their_name(name: str) -> None:
    assert validate_file(shipped_policies()[name]) == ()
    assert load_policy(name).name == name


def test_every_shipped_policy_opens_with_a_modeline_that_points_to_the_schema() -> None:
    for file in shipped_policies().values():
        modeline = file.read_text(encoding="utf-8").splitlines()[0]
        assert modeline.startswith("# yaml-language-server: $schema=")
        assert (
            file.parent / modeline.partition("=")[2]
        ).resolve() == ROOT / "toca_fx" / "policy.schema.json"


def test_shipped_policies_are_these() -> None:
    recommended = {
        "default-image",
        "default-video",
        "digits",
        "digits-fast",
        "dit-xl-2",
        "dit-xl-2-fast",
        "flux-dev",
        "flux-dev-fast",
        "opensora",
        "pixart-alpha",
    }
    dit, flux = (
        ("dit-xl-2-ddim50", "dit-xl-2-ddpm250"),
        ("flux-dev-n4", "flux-dev-n5", "flux-dev-n6"),
    )
    after_toca = ("fora-dit", "taylorseer-dit", "taylorseer-flux", "hicache-flux", "spectrum-flux")
    duca = ("duca-dit", "duca-dit-vnorm")
    models = ("digits", "dit-xl-2", "flux-dev", "image", "opensora", "pixart-alpha", "video")
    toca = [f"toca-{model}" for model in models]
    assert shipped_policies().keys() == recommended | {
        f"reference/{name}"
        for name in (*dit, *flux, "opensora", "pixart-alpha", *after_toca, *duca, *toca)
    }


def test_one_recommended_policy_per_model_class_and_none_for_the_defaults() -> None:
    classes = [
        name
        for policy in map(load_policy, shipped_policies())
        if "/" not in policy.name
        for name in policy.model
    ]
    assert sorted(classes) == [
        "DiTTransformer2DModel",
        "Flux",
        "FluxTransformer2DModel",
        "PixArt",
        "PixArtMS",
        "PixArtTransformer2DModel",
        "STDiT3",
    ]


@pytest.mark.parametrize("name", shipped_policies())
def test_shipped_policies_fit_on_one_screen(name: str) -> None:
    lines = shipped_policies()[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 140


@pytest.mark.parametrize(
    ("name", "steps", "base", "step_weight", "layer_weight", "mixed"),
    [("ddim50", 50, 3, 2.0, -0.2, (45, 32)), ("ddpm250", 250, 4, 0.4, 0.8, (245, 155))],
)
def test_reference_policies_of_dit_hold_the_authors_numbers(
    name: str,
    steps: int,
    base: int,
    step_weight: float,
    layer_weight: float,
    mixed: tuple[int, ...],
) -> None:
    policy = load_policy(f"reference/dit-xl-2-{name}")
    assert policy.sampler == Sampler(steps, "descending")
    assert policy.guidance == Guidance("batched", "independent")
    window = Window(0.2, 0.4, 2)
    assert Interval(base, drift=0.4, first=1, last=0, phase="modulo", windows=(window,)) == policy.N
    assert Ratio(0.93, step_weight, layer_weight, layer_span=27) == policy.R
    assert dict(policy.modules)["mlp"] == Action("partial", 2.5)
    assert dict(policy.modules)["self_attention"] == Action("reuse")
    assert policy.scores == Scores(self_attention=1.0, staleness=0.25, staleness_over=base)
    assert policy.spatial == Spatial(0.6, 2)
    first, second = (
        policy.for_site("mlp", f"transformer_blocks.{layer}.ff", layer) for layer in (0, 1)
    )
    assert first.N.extra_full_steps == mixed
    assert second.N == policy.N
    assert (first.R, first.action, first.scores, first.spatial) == (
        second.R,
        second.action,
        second.scores,
        second.spatial,
    )


def test_reference_policy_of_pixart_holds_the_authors_numbers() -> None:
    policy = load_policy("reference/pixart-alpha")
    assert (policy.sampler, policy.guidance) == (Sampler(20), Guidance("batched", "shared"))
    assert Interval(3, drift=-0.2, phase="modulo") == policy.N
    assert Ratio(0.7, 0.9, 0.6, layer_span=27) == policy.R
    actions = {
        "self_attention": Action("reuse"),
        "cross_attention": Action("partial", 0.6),
        "mlp": Action("partial", 1.6),
    }
    assert {**dict(policy.modules), **actions} == dict(policy.modules)
    assert policy.scores == Scores(cross_attention=1.0, staleness=0.25, staleness_over=3)
    assert policy.spatial == Spatial(0.4, 4)
    assert [policy.for_site(kind, "x", 0).N.extra_full_steps for kind in actions] == [(4,)] * 3
    assert policy.for_site("mlp", "x", 1).N == policy.N


def test_reference_policy_of_opensora_holds_the_authors_numbers() -> None:
    policy = load_policy("reference/opensora")
    assert (policy.sampler, policy.guidance) == (Sampler(30), Guidance("batched", "shared"))
    intervals = [
        policy.for_site(kind, "x", 0).N for kind in ("self_attention", "cross_attention", "mlp")
    ]
    assert intervals == [Interval(base, first=3, phase="modulo") for base in (3, 6, 3)]
    actions = [
        policy.for_site(kind, "x", 0).action
        for kind in ("self_attention", "cross_attention", "mlp")
    ]
    assert actions == [Action("reuse"), Action("reuse"), Action("partial", 1.495)]
    assert (policy.R, policy.spatial) == (Ratio(0.9), None)
    assert policy.scores == Scores(cross_attention=1.0, staleness=0.25, staleness_over=3)


@pytest.mark.parametrize(
    ("name", "forecast"),
    [
        ("fora-dit", Forecast()),
        ("taylorseer-dit", Forecast("taylor", 4)),
        ("taylorseer-flux", Forecast("taylor", 2)),
        ("hicache-flux", Forecast("hermite", 2, sigma=0.5)),
        ("spectrum-flux", Forecast("chebyshev", 4, ridge=0.1, blend=0.5)),
    ],
)
def test_reference_policies_of_forecasts_hold_the_authors_numbers(
    name: str, forecast: Forecast
) -> None:
    policy = load_policy(f"reference/{name}")
    order = "descending" if name.endswith("dit") else "ascending"
    assert (policy.sampler.steps, policy.sampler.order) == (50, order)
    assert (policy.forecast, policy.rules) == (forecast, ())
    grain = "model" if name == "spectrum-flux" else "module"
    assert (policy.cache.grain, policy.skip) == (grain, "none")
    if grain == "module":
        reused = [action.mode for kind, action in policy.modules if kind != "cross_attention"]
        assert reused == ["reuse"] * 3


@pytest.mark.parametrize(
    ("name", "score"), [("duca-dit", "self_attention"), ("duca-dit-vnorm", "small_values")]
)
def test_reference_policies_of_duca_differ_from_toca_in_these_numbers(
    name: str, score: str
) -> None:
    ours, toca = load_policy(f"reference/{name}"), load_policy("reference/dit-xl-2-ddim50")
    assert ours.skip == "alternate"
    assert (ours.N, ours.modules, ours.sampler) == (toca.N, toca.modules, toca.sampler)
    assert dataclasses.replace(toca.R, base=0.95) == ours.R
    assert ours.scores == Scores(staleness=0.25, **{score: 1.0})
    assert ours.spatial == Spatial(0.8, 2)
    phases = [ours.for_site("mlp", f"transformer_blocks.{i}.ff", i).N.phase for i in range(3)]
    assert phases == ["due", "modulo", "modulo"]


@pytest.mark.parametrize("base", [4, 5, 6])
def test_reference_policies_of_flux_hold_the_authors_numbers(base: int) -> None:
    policy = load_policy(f"reference/flux-dev-n{base}")
    assert (policy.sampler, policy.guidance) == (Sampler(50), Guidance())
    assert Interval(base, first=3) == policy.N
    assert (policy.R, policy.spatial) == (Ratio(0.9, layer_weight=0.5, layer_span=27), None)
    assert policy.scores == Scores(self_attention=1.0, staleness=0.25, staleness_over=base)
    assert policy.for_site("joint_attention", "transformer_blocks.0.attn", 0).action == Action(
        "reuse"
    )
    assert policy.for_site(
        "self_attention", "single_transformer_blocks.0.attn", 0
    ).action == Action("reuse")
    weights = {
        "transformer_blocks.0.ff": 0.4,
        "transformer_blocks.0.ff_context": 0.4,
        "single_transformer_blocks.0": 1.6,
        # in the authors' own code
        "double_blocks.0.img_mlp": 0.4,
        "single_blocks.0": 1.6,
    }
    assert {path: policy.for_site("mlp", path, 0).action.weight for path in weights} == weights


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("toca-pixart-alpha", "pixart-alpha"),
        ("toca-opensora", "opensora"),
        ("toca-flux-dev", "flux-dev-n4"),
    ],
)
def test_policies_of_toca_have_the_numbers_of_the_authors_and_count(
    name: str, reference: str
) -> None:
    ours, theirs = load_policy(f"reference/{name}"), load_policy(f"reference/{reference}")
    assert (ours.sampler, ours.guidance, ours.modules, ours.spatial) == (
        theirs.sampler,
        theirs.guidance,
        theirs.modules,
        theirs.spatial,
    )
    assert ours.N.phase == "count"
    assert dataclasses.replace(ours.N, phase=theirs.N.phase) == theirs.N
    assert dataclasses.replace(ours.R, layer_span=theirs.R.layer_span) == theirs.R
    assert (
        dataclasses.replace(ours.scores, staleness_over=ours.N.base, queries=1.0) == theirs.scores
    )
    assert not any(key == "N.extra_full_steps" for rule in ours.rules for key, _ in rule.overrides)


def test_the_policy_of_toca_for_dit_mirrors_that_of_the_authors() -> None:
    ours, theirs = load_policy("reference/toca-dit-xl-2"), load_policy("reference/dit-xl-2-ddim50")
    assert (ours.sampler.order, ours.N.phase, ours.rules) == ("ascending", "count", ())
    assert (ours.N.base, ours.N.drift) == (theirs.N.base, -theirs.N.drift)
    assert (ours.R.base, ours.R.step_weight) == (theirs.R.base, -theirs.R.step_weight)
    [window], [their_window] = ours.N.windows, theirs.N.windows
    assert (window.start, window.stop) == pytest.approx(
        (1 - their_window.stop, 1 - their_window.start)
    )
