"""The reference policies against the authors' loops, simulated: what is full, and how many tokens
are computed, everywhere.

Method, section 4: the numbers of the four models and their oddities (PixArt and DiT: the first
layer re-evaluates the interval before the others ask; Open-Sora: an interval per type of module;
FLUX: one slope of 27 layers for both lists of blocks). Written from the numbers, in a form of its
own, and held against the token counts of the authors' vectors as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from toca_fx.match.sites import Matches, Site
from toca_fx.plan.plan import Plan
from toca_fx.plan.planner import make_plan
from toca_fx.policy import load_policy

VECTORS = Path(__file__).resolve().parents[2] / "system" / "conformance"
LAYERS = 28
IMAGE = (64, 64)  # in patches of 2, 4 or 8: 1024, 256 or 64 tokens
DOUBLE, SINGLE = 19, 38

# For each path, the number of tokens computed in every call; None where the module is full, 0 where
# it is reused.
Schedule: TypeAlias = dict[str, list[int | None]]


def _matches(sites: Iterable[tuple[str, str, int, int]], batch: int = 2) -> Matches:
    """Hand-made sites from (kind, path, layer, tokens); the block is what stands before the layer
    number.
    """
    made = [
        Site(
            kind,
            path,
            layer,
            block=path.partition(".")[0],
            output=f"out_{at}",
            anchor=f"in_{at}",
            shape=(batch, tokens, 8),
        )
        for at, (kind, path, layer, tokens) in enumerate(sites)
    ]
    return Matches(tuple(made), ())


def _planned(plan: Plan) -> Schedule:
    return {
        site.path: [None if step.modes[at] == "full" else step.fresh[at] for step in plan.steps]
        for at, site in enumerate(plan.sites)
    }


def _count(tokens: int, *factors: float) -> int:
    """The authors' K: the clamped share in single precision times the tokens, cut off."""
    share = np.clip(np.float32(np.prod(factors)), np.float32(0), np.float32(1))
    return int(share * np.float32(tokens))


def _full(plan: Plan, kind: str = "") -> list[int]:
    """The step indices on which all sites, or those of one kind, are full."""
    chosen = [at for at, site in enumerate(plan.sites) if kind in ("", site.kind)]
    return [step.index for step in plan.steps if all(step.modes[at] == "full" for at in chosen)]


def _mixed(plan: Plan) -> list[int]:
    return [step.index for step in plan.steps if step.kind == "mixed"]


# DiT and PixArt: layer 0 re-evaluates the interval on the steps that it finds full


def _refreshed_by_layer_0(
    steps: Iterable[int], interval: Callable[[int], int]
) -> Iterator[tuple[int, int, bool]]:
    """(step, layer, full) in the order of the authors' loop."""
    threshold = 1
    for call, s in enumerate(steps):
        for layer in range(LAYERS):
            full = call == 0 or s % threshold == 0
            if layer == 0 and full:
                threshold = interval(s)
            yield s, layer, full


def _blocks(tokens: int, *modules: tuple[str, str]) -> Matches:
    names = (
        (kind, f"transformer_blocks.{layer}.{name}", layer, tokens)
        for layer in range(LAYERS)
        for kind, name in modules
    )
    return _matches(names)


def _dit_sites(tokens: int) -> Matches:
    return _blocks(tokens, ("self_attention", "attn1"), ("mlp", "ff"))


def _dit_run(total: int, base: int, ddim: bool, tokens: int) -> Schedule:
    """Their counter runs down."""

    def interval(s: int) -> int:
        return (
            2 if 0.2 * total <= s < 0.4 * total else int(np.round(base / (1.4 - 0.8 * s / total)))
        )

    run: Schedule = {site.path: [] for site in _dit_sites(tokens).sites}
    for s, layer, full in _refreshed_by_layer_0(range(total - 1, -1, -1), interval):
        step_factor = 3.0 - 4.0 * s / total if ddim else 1.4 - 0.8 * s / total
        layer_factor = 0.8 + 0.4 * layer / 27 if ddim else 1.8 - 1.6 * layer / 27
        run[f"transformer_blocks.{layer}.attn1"].append(None if full else 0)
        run[f"transformer_blocks.{layer}.ff"].append(
            None if full else _count(tokens, 0.07, 2.5, step_factor, layer_factor)
        )
    return run


@pytest.mark.parametrize(
    ("policy", "total", "base", "full"),
    [("reference/dit-xl-2-ddim50", 50, 3, 18), ("reference/dit-xl-2-ddpm250", 250, 4, 72)],
)
@pytest.mark.parametrize("tokens", [256, 64])
def test_dit_is_the_authors_loop(
    policy: str, total: int, base: int, full: int, tokens: int
) -> None:
    plan = make_plan(_dit_sites(tokens), load_policy(policy), aspect=IMAGE)
    assert _planned(plan) == _dit_run(total, base, "ddim" in policy, tokens)
    assert len(_full(plan)) == full
    assert _mixed(plan) == {50: [45, 32], 250: [245, 155]}[total]


def test_full_steps_of_ddim50_and_early_steps_that_compute_nothing() -> None:
    plan = make_plan(_dit_sites(256), load_policy("reference/dit-xl-2-ddim50"), aspect=IMAGE)
    assert _full(plan) == [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
    early = [step for step in plan.steps if step.index >= 38 and step.kind == "partial"]
    assert early
    assert not any(sum(step.fresh) for step in early)


def _pixart_sites(tokens: int) -> Matches:
    return _blocks(tokens, ("self_attention", "attn1"), ("cross_attention", "attn2"), ("mlp", "ff"))


def _pixart_run(tokens: int) -> Schedule:
    run: Schedule = {site.path: [] for site in _pixart_sites(tokens).sites}
    for s, layer, full in _refreshed_by_layer_0(
        range(20), lambda s: int(np.round(3 / (0.8 + 0.4 * s / 20)))
    ):
        for name, factor in (("attn1", 0.0), ("attn2", 0.6), ("ff", 1.6)):
            count = _count(tokens, 0.3, factor, 1.9 - 1.8 * s / 20, 1.6 - 1.2 * layer / 27)
            run[f"transformer_blocks.{layer}.{name}"].append(None if full else count)
    return run


@pytest.mark.parametrize("tokens", [256, 64, 1024])
def test_pixart_is_the_authors_loop(tokens: int) -> None:
    plan = make_plan(_pixart_sites(tokens), load_policy("reference/pixart-alpha"), aspect=IMAGE)
    assert _planned(plan) == _pixart_run(tokens)
    assert _full(plan) == [0, 6, 9, 12, 15, 18]
    assert _mixed(plan) == [4]


# Open-Sora: every type of module has its own cycle


def _opensora_sites(frames: int, patches: int) -> Matches:
    """Spatial attention sees the patches of a frame, temporal attention the frames of a patch, the
    rest all tokens.
    """
    names: list[tuple[str, str, int, int]] = []
    for layer in range(LAYERS):
        for branch, seen in (("spatial_blocks", patches), ("temporal_blocks", frames)):
            path = f"{branch}.{layer}"
            names.append(("self_attention", f"{path}.attn", layer, seen))
            names.append(("cross_attention", f"{path}.cross_attn", layer, frames * patches))
            names.append(("mlp", f"{path}.mlp", layer, frames * patches))
    return _matches(names)


def _opensora_run(frames: int, patches: int) -> Schedule:
    cycles = {"self_attention": 3, "cross_attention": 6, "mlp": 3}
    shares = {"self_attention": 0.0, "cross_attention": 0.0, "mlp": 0.1 * 1.495}
    return {
        site.path: [
            None if s < 3 or s % cycles[site.kind] == 0 else _count(site.tokens, shares[site.kind])
            for s in range(30)
        ]
        for site in _opensora_sites(frames, patches).sites
    }


@pytest.mark.parametrize(("frames", "patches"), [(15, 1590), (4, 24)])
def test_opensora_is_the_authors_loop(frames: int, patches: int) -> None:
    plan = make_plan(_opensora_sites(frames, patches), load_policy("reference/opensora"))
    assert _planned(plan) == _opensora_run(frames, patches)
    assert (
        _full(plan, "mlp")
        == _full(plan, "self_attention")
        == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    )
    assert _full(plan, "cross_attention") == [0, 1, 2, 6, 12, 18, 24]


# FLUX: a constant interval; the slope over the layers restarts in the single blocks


def _flux_sites(image: int, text: int) -> Matches:
    names: list[tuple[str, str, int, int]] = []
    for layer in range(DOUBLE):
        path = f"transformer_blocks.{layer}"
        names += [
            ("joint_attention", f"{path}.attn.to_add_out", layer, text),
            ("joint_attention", f"{path}.attn.to_out.0", layer, image),
        ]
        names += [("mlp", f"{path}.ff", layer, image), ("mlp", f"{path}.ff_context", layer, text)]
    for layer in range(SINGLE):
        path = f"single_transformer_blocks.{layer}"
        names += [
            ("self_attention", f"{path}.attn", layer, image + text),
            ("mlp", path, layer, image + text),
        ]
    return _matches(names, batch=1)


def _flux_run(base: int, image: int, text: int) -> Schedule:
    run: Schedule = {site.path: [] for site in _flux_sites(image, text).sites}
    passed = 0  # partial steps since the last full one
    for s in range(50):
        full = s < 3 or passed == base - 1
        passed = 0 if full else passed + 1
        for site in _flux_sites(image, text).sites:
            factor = 1.6 if site.path.startswith("single") else 0.4
            count = (
                _count(site.tokens, 0.1, factor, 1.5 - site.layer / 27) if site.kind == "mlp" else 0
            )
            run[site.path].append(None if full else count)
    return run


@pytest.mark.parametrize(("base", "full"), [(4, 14), (5, 12), (6, 10)])
@pytest.mark.parametrize(("image", "text"), [(4096, 512), (64, 24)])
def test_flux_is_the_authors_loop(base: int, full: int, image: int, text: int) -> None:
    plan = make_plan(_flux_sites(image, text), load_policy(f"reference/flux-dev-n{base}"))
    assert _planned(plan) == _flux_run(base, image, text)
    assert len(_full(plan)) == full
    assert not _mixed(plan)


# The counts in the authors' vectors, which come from small models of the real depth


def _in_layers(site: Site) -> str:
    return f"layer_{site.layer:02d}.{'mlp' if site.kind == 'mlp' else 'cross-attn'}"


def _in_branches(site: Site) -> str:
    branch, module = site.path.partition("_")[0], "mlp" if site.kind == "mlp" else "cross-attn"
    return f"{branch}_{site.layer:02d}.{module}"


def _in_streams(site: Site) -> str:
    if site.block == "single_transformer_blocks":
        return f"single_{site.layer:02d}.mlp"
    return f"double_{site.layer:02d}.{'txt_mlp' if site.path.endswith('context') else 'img_mlp'}"


@pytest.mark.parametrize(
    ("case", "policy", "sites", "kinds", "name"),
    [
        ("dit_ddim50", "dit-xl-2-ddim50", _dit_sites(64), ("mlp",), _in_layers),
        ("pixart_dpm20", "pixart-alpha", _pixart_sites(64), ("cross_attention", "mlp"), _in_layers),
        (
            "opensora_rflow30",
            "opensora",
            _opensora_sites(4, 24),
            ("cross_attention", "mlp"),
            _in_branches,
        ),
        ("flux_t4", "flux-dev-n4", _flux_sites(64, 24), ("mlp",), _in_streams),
    ],
)
def test_counts_are_those_of_the_vectors(
    case: str, policy: str, sites: Matches, kinds: tuple[str, ...], name: Callable[[Site], str]
) -> None:
    facts = json.loads((VECTORS / f"{case}.json").read_text(encoding="utf-8"))
    planned = _planned(make_plan(sites, load_policy(f"reference/{policy}"), aspect=IMAGE))
    assert {name(site): planned[site.path] for site in sites.sites if site.kind in kinds} == facts[
        "K"
    ]


# ToCa as it was recommended: the same numbers, one decision per step and type of module


@pytest.mark.parametrize(
    ("policy", "sites", "full", "mixed"),
    [
        (
            "reference/toca-dit-xl-2",
            _dit_sites(256),
            [0, 5, 9, 13, 17, 20, 23, 26, 29, 32, 34, 36, 38, 40, 42, 44, 46, 48],
            [],
        ),
        ("reference/toca-pixart-alpha", _pixart_sites(256), [0, 4, 7, 10, 13, 16, 19], []),
        (
            "reference/toca-opensora",
            _opensora_sites(15, 1590),
            [0, 1, 2, 8, 14, 20, 26],
            [5, 11, 17, 23, 29],
        ),
        (
            "reference/toca-flux-dev",
            _flux_sites(4096, 512),
            [0, 1, 2, 6, 10, 14, 18, 22, 26, 30, 34, 38, 42, 46],
            [],
        ),
    ],
)
def test_full_steps_of_the_policies_of_toca(
    policy: str, sites: Matches, full: list[int], mixed: list[int]
) -> None:
    plan = make_plan(sites, load_policy(policy), aspect=IMAGE)
    assert _full(plan) == full
    assert _mixed(plan) == mixed


def test_the_policy_of_toca_for_flux_computes_what_that_of_the_authors_does() -> None:
    sites = _flux_sites(4096, 512)
    assert (
        make_plan(sites, load_policy("reference/toca-flux-dev")).steps
        == make_plan(sites, load_policy("reference/flux-dev-n4")).steps
    )
