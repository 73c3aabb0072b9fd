"""Against the authors' code: reference vectors (trimmed by tools/trim_golden.py), and their schedules simulated.

Method, section 4: the numbers of the two DiT runs, with the oddity that the first layer re-evaluates the interval.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor

import toca_fx
from tests.helpers import programs, record_choices
from toca_fx.match import Matches, Site
from toca_fx.plan import Plan, make_plan

HERE = Path(__file__).parent
CASE = "dit_ddim50"
STEPS, LAYERS = 50, 28
TOLERANCE = 2e-5  # max abs; one wrong rule gives 0.4 or more, one flipped token 4e-2
CHECKED_TOKENS = (0, 1, 13, 27)  # layers
NOTHING = 255  # pads the lists of chosen tokens


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return json.loads((HERE / f"{CASE}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    # Mapped tensors can be unaligned, which changes last bits.
    return {name: tensor.clone() for name, tensor in load_file(HERE / f"{CASE}.safetensors").items()}


@pytest.fixture(scope="module")
def model(facts: dict[str, Any], vectors: dict[str, Tensor]) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(**facts["model"]["kwargs"]).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # diffusers says 1, the authors of DiT say 0
    weights = {name: tensor for name, tensor in vectors.items() if name.startswith("weights.")}
    weights |= {name: vectors[source] for name, source in facts["shared_weights"].items()}
    missing = model.load_state_dict({name.removeprefix("weights."): tensor for name, tensor in weights.items()}, strict=False)
    assert set(missing.missing_keys) <= {"pos_embed.pos_embed"}
    assert not missing.unexpected_keys
    return model


def test_the_vectors_stay_small() -> None:
    assert sum(file.stat().st_size for file in HERE.iterdir() if file.is_file()) < 3_000_000


def test_every_step_equals_the_authors_code(
    model: DiTTransformer2DModel, facts: dict[str, Any], vectors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = record_choices(monkeypatch)
    fast = toca_fx.compile(model, "reference/dit-xl-2-ddim50", inner="eager")
    latents, timesteps = vectors["inputs.hidden_states"], vectors["inputs.timestep"]
    noise_channels = vectors["outputs"].shape[2]
    with torch.no_grad(), toca_fx.session(num_steps=STEPS) as run:
        for call in range(STEPS):
            both = torch.cat([latents[call], latents[call]])
            output = fast(both, timestep=timesteps[call].expand(2), class_labels=vectors["inputs.class_labels"]).sample
            error = (output[:, :noise_channels] - vectors["outputs"][call]).abs().max().item()
            assert error <= TOLERANCE, f"call {call}"
    _assert_tokens(dict(record), vectors)
    (program,) = programs(run)
    _assert_plan(program.plan(STEPS), [*facts["layers"]], facts["K"])
    kinds = [step.kind for step in run.report().steps]
    assert [call for call, kind in enumerate(kinds) if kind == "mixed"] == [49 - 45, 49 - 32]
    assert kinds.count("full") == 18


def _assert_tokens(chosen: dict[int, dict[str, list[list[int]]]], vectors: dict[str, Tensor]) -> None:
    """The chosen tokens of four layers are the authors', in descending score."""
    compared = 0
    for layer in CHECKED_TOKENS:
        for call, rows in enumerate(vectors[f"fresh.layer_{layer:02d}.mlp"]):
            theirs = [[token for token in row if token != NOTHING] for row in rows.tolist()]
            ours = chosen.get(STEPS - 1 - call, {}).get(f"transformer_blocks.{layer}.ff", [[], []])
            assert ours == theirs, f"call {call}, layer {layer}"
            compared += len(theirs[0])
    assert compared > 1000


def _assert_plan(plan: Plan, layers: list[str], fresh: dict[str, list[int | None]]) -> None:
    """Full and partial per layer, and K, at every call; ``None`` stands for full."""
    for index, site in enumerate(plan.sites):
        modes = [step.modes[index] for step in plan.steps]
        letters = "".join("F" if mode == "full" else "P" for mode in modes)
        assert letters == "".join(call[site.layer] for call in layers), site.path
        if site.kind == "mlp":
            ours = [None if mode == "full" else step.fresh[index] for mode, step in zip(modes, plan.steps, strict=True)]
            assert ours == fresh[f"layer_{site.layer:02d}.mlp"], site.path


def _sites(tokens: int) -> Matches:
    """The sites of DiT-XL/2: 28 blocks of self-attention and MLP."""
    sites = []
    for layer in range(LAYERS):
        attention = 2 * layer
        for kind, name in (("self_attention", "attn1"), ("mlp", "ff")):
            path = f"transformer_blocks.{layer}.{name}"
            shape = (2, tokens, 1152)
            sites.append(Site(kind, path, layer, "transformer_blocks", f"out_{len(sites)}", f"in_{len(sites)}", shape, attention))
    return Matches(tuple(sites), ())


def _authors_run(total: int, base: int, ddim: bool, tokens: int) -> tuple[list[str], dict[str, list[int | None]]]:
    """The authors' loop: their counter runs down, and layer 0 re-evaluates the interval before the other layers ask."""
    threshold = None
    layers: list[str] = []
    fresh: dict[str, list[int | None]] = {f"layer_{layer:02d}.mlp": [] for layer in range(LAYERS)}
    for s in range(total - 1, -1, -1):
        first = s == total - 1
        letters = ""
        for layer in range(LAYERS):
            full = first or s % threshold == 0
            if layer == 0 and full:
                sensitive = 0.2 * total <= s < 0.4 * total
                threshold = 2 if sensitive else int(np.round(base / (1.4 - 0.8 * s / total)))
            letters += "F" if full else "P"
            fresh[f"layer_{layer:02d}.mlp"].append(None if full else _authors_count(s / total, layer / 27, ddim, tokens))
        layers.append(letters)
    return layers, fresh


def _authors_count(step: float, layer: float, ddim: bool, tokens: int) -> int:
    step_factor = 3.0 - 4.0 * step if ddim else 1.4 - 0.8 * step
    layer_factor = 0.8 + 0.4 * layer if ddim else 1.8 - 1.6 * layer
    rho = np.float32(0.07 * layer_factor * step_factor * 2.5)
    return int(np.float32(tokens) * np.clip(rho, np.float32(0), np.float32(1)))


@pytest.mark.parametrize(
    ("policy", "total", "base", "full"), [("reference/dit-xl-2-ddim50", 50, 3, 18), ("reference/dit-xl-2-ddpm250", 250, 4, 72)]
)
@pytest.mark.parametrize("tokens", [256, 64])
def test_the_schedule_is_the_authors_loop(policy: str, total: int, base: int, full: int, tokens: int) -> None:
    plan = make_plan(_sites(tokens), toca_fx.load_policy(policy))
    layers, fresh = _authors_run(total, base, ddim="ddim" in policy, tokens=tokens)
    _assert_plan(plan, layers, fresh)
    assert sum(step.kind == "full" for step in plan.steps) == full
    assert [step.index for step in plan.steps if step.kind == "mixed"] == {50: [45, 32], 250: [245, 155]}[total]


def test_the_authors_full_steps_of_ddim50() -> None:
    plan = make_plan(_sites(256), toca_fx.load_policy("reference/dit-xl-2-ddim50"))
    listed = [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0]
    assert [step.index for step in plan.steps if step.kind == "full"] == listed
    early = [step for step in plan.steps if step.index >= 38 and step.kind == "partial"]
    assert early
    assert not any(sum(step.fresh) for step in early)
