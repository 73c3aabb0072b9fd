"""What several test files need: policies as mappings, inputs for a generation, and a record of the
chosen tokens.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, fx, nn

import toca_fx
import toca_fx.capture.dynamo
from tests.models import (
    CrossDiT,
    JointDiT,
    OriginalDiT,
    SmallModel,
    randomize,
    tiny_dit,
    tiny_original_dit,
)
from toca_fx import load_policy
from toca_fx.capture.aten import to_aten
from toca_fx.capture.sources import input_sources
from toca_fx.describe.explanation import Explanation
from toca_fx.graph import roles
from toca_fx.lower.analysis import Analysis
from toca_fx.lower.compiler import Inner
from toca_fx.lower.program import Program
from toca_fx.match.matcher import match
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.plan import StepPlan
from toca_fx.plan.planner import Planner
from toca_fx.policy import Policy
from toca_fx.runtime.context import Run
from toca_fx.runtime.generation import Generation
from toca_fx.runtime.selector import Selector
from toca_fx.runtime.storage import Storage

KINDS = ("diffusers", "original")

# The authors' DiT policy, over 20 steps.
AUTHORS = {
    "sampler": {"steps": 20, "order": "descending"},
    "N": {
        "base": 3,
        "drift": 0.4,
        "phase": "modulo",
        "windows": [{"from": 0.2, "to": 0.4, "interval": 2}],
    },
    "R": {"base": 0.93, "step_weight": 2.0, "layer_weight": -0.2, "layer_span": 27},
    "modules": {"mlp": {"weight": 2.5}},
    "scores": {"self_attention": 1.0, "staleness": 0.25, "staleness_over": 3},
    "spatial": {"bonus": 0.6, "grid": 2},
    "rules": [{"layers": 0, "N": {"extra_full_steps": [17, 11]}}],
}


def tiny(kind: str, layers: int = 3, **overrides: Any) -> SmallModel:
    """A tiny model with ``layers`` blocks: of ``KINDS``, which differ in module structure only;
    "cross" and "joint" read a text.
    """
    if kind == "diffusers":
        return tiny_dit(num_layers=layers, **overrides)
    if kind == "original":
        return tiny_original_dit(depth=layers, **overrides)
    return randomize((CrossDiT if kind == "cross" else JointDiT)(depth=layers, **overrides), seed=0)


def make_policy(**sections: Any) -> Policy:
    """A policy over 12 steps with a full step every third and half of the tokens fresh;
    ``sections`` replace whole sections.
    """
    defaults = {
        "version": 1,
        "name": "test",
        "sampler": {"steps": 12},
        "N": {"base": 3},
        "R": {"base": 0.5},
        "scores": {"self_attention": 1.0, "staleness": 0.25},
    }
    return load_policy({**defaults, **sections})


Call = tuple[Tensor, Tensor, Tensor]  # latents, timesteps, and labels or texts


@dataclass(frozen=True)
class Inputs:
    """The model inputs of one generation: latents [steps, B, C, H, W], timesteps [steps] going
    down, labels [B].
    """

    latents: Tensor
    timesteps: Tensor
    labels: Tensor

    def __iter__(self) -> Iterator[Call]:
        for x, t in zip(self.latents, self.timesteps, strict=True):
            yield x, t.expand(x.shape[0]), self.labels


def make_inputs(
    steps: int = 12,
    batch: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    side: int = 16,
) -> Inputs:
    """Random latents, new ones at every step."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(steps, batch, 4, side, side, generator=generator).to(dtype)
    labels = torch.randint(0, 11, (batch,), generator=generator)
    return Inputs(latents, torch.linspace(999, 0, steps).round().long(), labels)


def text_inputs(steps: int = 12, batch: int = 2) -> list[Call]:
    """Inputs in float64 for the models that read a text: latents of 12 x 16 and texts of 10 tokens,
    new at every step.
    """
    texts = torch.randn(
        steps, batch, 10, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return [
        (x[:, :, :12], t, text)
        for (x, t, _), text in zip(
            make_inputs(steps, batch, dtype=torch.float64), texts, strict=True
        )
    ]


def call(model: nn.Module, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Call a tiny model with its own argument names; the output image.

    Texts are tensors of the call alone, as an embedder in the loop makes them.
    """
    if isinstance(getattr(model, "_orig_mod", model), DiTTransformer2DModel):
        return model(x, timestep=t, class_labels=y).sample
    return model(x, t=t, y=y.clone() if y.is_floating_point() else y)


def run_all(model: nn.Module, inputs: Iterable[Call]) -> list[Tensor]:
    """The outputs of all calls, without gradients."""
    with torch.no_grad():
        return [call(model, *step).clone() for step in inputs]


def programs(run: Run) -> list[Program]:
    """The programs that a session has run, in order of appearance."""
    return list(dict.fromkeys(program for program, _ in run.session.calls))


def chosen_rows(given: Mapping[Buffer, Tensor]) -> dict[int, Tensor]:
    """The rows of each site that selects ahead of the step, out of what the step is given."""
    return {
        buffer.site: order[:, given[Buffer("ranks", buffer.site)]]
        for buffer, order in given.items()
        if buffer.role == "order"
    }


Chosen = dict[str, list[list[int]]]


def record_choices(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Chosen]]:
    """A list that grows by (step index s, {site path: per sample the chosen tokens in order}) at
    every selection.
    """
    record: list[tuple[int, Chosen]] = []
    select = Selector.select

    def recording(self: Selector, step: StepPlan) -> dict[Buffer, Tensor]:
        given = select(self, step)
        sites = self._plan.sites
        chosen = chosen_rows(given)
        record.append(
            (
                step.index,
                {sites[i].path: (rows % sites[i].tokens).tolist() for i, rows in chosen.items()},
            )
        )
        for i, rows in chosen.items():
            samples = torch.arange(rows.shape[0])[:, None].expand_as(rows)
            assert torch.equal(rows // sites[i].tokens, samples), "row b must index into sample b"
        return given

    monkeypatch.setattr(Selector, "select", recording)
    return record


def newest(run: Run) -> tuple[Generation, Storage]:
    """The generation that was called last, and what it holds.

    After its last step, that is what it held: a test keeps it by ``keep_memories``.
    """
    generation = run.session.generations[-1]
    storage = generation.storage or _held.get(generation)
    assert storage is not None
    return generation, storage


_held: weakref.WeakKeyDictionary[Generation, Storage] = weakref.WeakKeyDictionary()


@pytest.fixture
def keep_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations that are over do not give their memories back."""
    close = Generation.close

    def keeping(self: Generation) -> None:
        if self.storage is not None:
            _held[self] = self.storage
        close(self)

    monkeypatch.setattr(Generation, "close", keeping)


def picked_tokens(run: Run) -> Chosen:
    """The tokens that partial sites computed in the last call of the only model, per sample,
    ascending.
    """
    generation, storage = newest(run)
    plan, modes = generation.plan, generation.plan.steps[generation.progress.position - 1].modes
    picked = {
        site.path: storage.buffers[Buffer("picked", i)]
        for i, site in enumerate(plan.sites)
        if modes[i] == "partial"
    }
    return {
        path: [row.nonzero().flatten().tolist() for row in rows] for path, rows in picked.items()
    }


def capture(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """Dynamo's graph of ``model`` and the inputs that a backend gets with it."""
    return toca_fx.capture.dynamo.capture(model, args, kwargs)


def capture_calls(
    model: nn.Module, calls: Sequence[dict[str, Any]]
) -> tuple[fx.GraphModule, list[list[Any]]]:
    """Dynamo's graph of ``model`` and the inputs that it gets at each of the ``calls``, which have
    to fit one graph.
    """
    graphs: list[fx.GraphModule] = []
    given: list[list[Any]] = []

    def backend(graph: fx.GraphModule, _: Sequence[Any]) -> Any:
        input_sources(graph)
        graphs.append(graph)

        def run(*inputs: Any) -> Any:
            given.append(list(inputs))
            return graph(*inputs)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for call in calls:
            compiled(**call)
    (graph,) = graphs
    return graph, given


def capture_tiny(
    kind: str, layers: int = 3, batch: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[fx.GraphModule, list[Any]]:
    """One of the tiny models as an ATen graph, and its inputs: a copy of the graph, as captures are
    made once for all tests.
    """
    graph, inputs = _captured_tiny(kind, layers, batch, dtype)
    return copy.deepcopy(graph), list(inputs)


@cache
def _captured_tiny(
    kind: str, layers: int, batch: int, dtype: torch.dtype
) -> tuple[fx.GraphModule, list[Any]]:
    model = tiny(kind, layers=layers).to(dtype)
    x, t, y = next(iter(make_inputs(1, batch, dtype=dtype)))
    names = ("t", "y") if kind == "original" else ("timestep", "class_labels")
    captured, inputs = capture(model, x, **dict(zip(names, (t, y), strict=True)))
    return to_aten(captured, inputs), inputs


def analysis_of(captured: fx.GraphModule, inputs: Sequence[Any], policy: Policy) -> Analysis:
    """What is known of a captured model under a policy."""
    aten = to_aten(captured, inputs)
    return Analysis(aten, Planner(policy, match(aten.graph), roles.aspect(aten.graph)))


def program_of(
    captured: fx.GraphModule, inputs: Sequence[Any], policy: Policy, inner: str = "eager"
) -> Program:
    """Its steps, compiled when they are first needed."""
    return Program(analysis_of(captured, inputs, policy), Inner(inner))


def explain_tiny(
    kind: str = "diffusers", policy: Any = None, layers: int = 3, **options: Any
) -> Explanation:
    """What toca_fx says of a tiny model."""
    model = tiny(kind, layers=layers)
    x, t, y = next(iter(make_inputs(1)))
    names = ("t", "y") if isinstance(model, OriginalDiT) else ("timestep", "class_labels")
    return toca_fx.explain(model, policy, x, **dict(zip(names, (t, y), strict=True)), **options)
