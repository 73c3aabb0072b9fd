"""``toca_fx.explain``: capture, match and plan a model without running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from toca_fx.capture.aten import to_aten
from toca_fx.capture.dynamo import capture, uncompiled
from toca_fx.capture.offload import Weights, as_onloaded
from toca_fx.describe.explanation import Explanation, KindExplanation
from toca_fx.describe.memories import kept_by
from toca_fx.describe.rows import Skipped
from toca_fx.describe.site import Kept, SiteExplanation
from toca_fx.diagnostics import number_of_steps
from toca_fx.graph import roles
from toca_fx.graph.names import namespace, operator_name
from toca_fx.lower import memory
from toca_fx.lower.analysis import Analysis
from toca_fx.lower.traffic import reads
from toca_fx.match.matcher import match
from toca_fx.match.sites import NearMiss
from toca_fx.plan.choose import default_policy, written_for_another
from toca_fx.plan.plan import KINDS, Plan
from toca_fx.plan.planner import Planner
from toca_fx.plan.units import WHOLE
from toca_fx.policy import WHOLE_GRAINS, Policy, PolicySource, load_policy

_PYTORCH = frozenset({"aten", "prims", "prim", "higher_order"})


def explain(
    model: nn.Module,
    policy: PolicySource | None = None,
    *args: Any,
    num_steps: int | None = None,
    **kwargs: Any,
) -> Explanation:
    """What ``policy`` would do with ``model``: sites and near misses, FLOPs, bytes of memory.

    ``args`` and ``kwargs`` are the inputs of one call. Nothing is run and no memory is taken for
    results, so that model and inputs may be on the device "meta". ``policy`` is as in ``compile``;
    ``num_steps`` is the policy's own if None.

    Raises:
        PolicyError: the policy has problems, or does not fit the model.
        UnsupportedModelError: the model cannot be captured as one graph.
        TypeError: ``model`` is no module.
        ValueError: ``num_steps`` is no positive integer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module, got {type(model).__name__}; of a diffusers pipeline, "
            "pass the transformer"
        )
    steps = number_of_steps(num_steps, "explain")
    given = None if policy is None else load_policy(policy)
    module = uncompiled(model)
    name = type(module).__name__
    with as_onloaded(module) as weights:
        captured, inputs = capture(module, args, kwargs)
        aten = to_aten(captured, inputs)
    latents = roles.latents_shape(aten.graph)
    chosen = given or default_policy(name, None if latents is None else len(latents))
    planner = Planner(chosen, match(aten.graph), roles.aspect(aten.graph))
    found = Analysis(aten, planner)
    plan = found.plan(steps)
    mismatch = written_for_another(chosen, name)
    peak = memory.predict(found, plan)
    conditions, timed = found.hoisted_bytes
    known = len(plan.steps) if found.table_fits(len(plan.steps)) else 0
    recordable = found.nbytes(plan) + conditions + timed * (1 + known)
    return Explanation(
        model=name,
        policy=chosen.name,
        steps=tuple((step.index, step.kind) for step in plan.fewest),
        full_range=plan.full_range,
        kinds=tuple(_kinds(found, plan)),
        sites=_sites(plan, chosen, _gathers(found, plan), kept_by(found, plan)),
        skipped=tuple(_skipped(miss, found.aten.graph) for miss in found.matches.misses),
        flops_done=found.flops(plan),
        flops_uncached=found.uncached_flops * len(plan.steps),
        cache_bytes=found.nbytes(plan),
        hoisted_bytes=sum(found.hoisted_bytes),
        step_bytes=peak.step,
        peak_bytes=peak.kept + peak.hoisted + peak.step,
        listed_bytes=peak.listed,
        recordable_bytes=recordable,
        queued_because=found.queued_because(recordable),
        uncut=found.matches.uncut,
        warnings=(*([mismatch] if mismatch else []), *plan.warnings),
        passes=tuple(_passes(found, plan)),
        offloaded_bytes=weights.all_bytes,
        moved_bytes=_moved(found, plan, inputs, weights) if weights.all_bytes else (),
    )


def _moved(found: Analysis, plan: Plan, inputs: Sequence[Any], weights: Weights) -> tuple[int, ...]:
    """The bytes that each call brings in."""
    return tuple(
        weights.bytes_to_move([[inputs[at] for at in read] for read in asked])
        for asked in reads(found, plan)
    )


def _kinds(found: Analysis, plan: Plan) -> Iterator[KindExplanation]:
    """How many steps of each kind there are, and their work."""
    for kind in KINDS:
        work = [found.step_flops(plan, step) for step in plan.fewest if step.kind == kind]
        if work:
            share = sum(work) / len(work) / max(1, found.uncached_flops)
            yield KindExplanation(kind, len(work), share)


def _passes(found: Analysis, plan: Plan) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the passes did to the graph of the first step of each kind, one line each."""
    kinds = {step.kind: step.modes for step in reversed(plan.steps)}
    for kind in sorted(kinds, key=KINDS.index):
        reports = found.costs(plan)[kinds[kind]].graph.reports
        yield kind, tuple(str(report) for report in reports if report.sites or report.nodes)


def _gathers(found: Analysis, plan: Plan) -> dict[int, tuple[str, ...]]:
    """The gathers of each site that could not be moved up to the stream, as text."""
    gathers: dict[int, dict[str, None]] = {}
    for cost in found.costs(plan).values():
        for report in cost.graph.reports:
            for gather in report.gathers:
                gathers.setdefault(gather.site, {})[str(gather)] = None
    return {site: tuple(texts) for site, texts in gathers.items()}


def _sites(
    plan: Plan,
    policy: Policy,
    gathers: Mapping[int, tuple[str, ...]],
    kept: Mapping[int, Kept],
) -> tuple[SiteExplanation, ...]:
    def path(index: int | None) -> str | None:
        return None if index is None else plan.sites[index].path

    return tuple(
        SiteExplanation(
            path=site.path,
            kind=site.kind,
            layer=site.layer,
            tokens=site.tokens,
            action=own.action.mode,
            says=_says(policy, site.kind, site.path, site.layer),
            modes=tuple(step.modes[i] for step in plan.fewest),
            computed=tuple(step.fresh[i] for step in plan.fewest),
            influence=path(site.influence),
            entropy=path(site.entropy),
            scores=tuple(own.scores.weights.items()),
            gathers=gathers.get(i, ()),
            kept=kept.get(i),
        )
        for i, (site, own) in enumerate(zip(plan.sites, plan.policies, strict=True))
    )


def _says(policy: Policy, kind: str, path: str, layer: int) -> str:
    """The entry of the policy that decides on a module: the last matching rule, or ``modules``.

    With a memory of the whole model it is the grain; so it is for the model itself, or ``skip``.
    """
    if policy.cache.grain in WHOLE_GRAINS:
        return "cache.grain"
    if kind in WHOLE:
        return "skip"
    for rule in reversed(policy.rules):
        if rule.applies(kind, path, layer) and any(key == "module" for key, _ in rule.overrides):
            return f"rule {rule.position}"
    return f"modules.{kind}"


def _skipped(miss: NearMiss, graph: fx.Graph) -> Skipped:
    """A near miss, with advice if it has operators that are not PyTorch's.

    One of them may be an attention, which ``register_attention`` would make known.
    """
    foreign: dict[str, None] = {}
    for node in graph.nodes:
        space, path = namespace(node.target), node.meta.get("path", "")
        inside = path == miss.path or path.startswith(f"{miss.path}.")
        if inside and space and space not in _PYTORCH:
            foreign[f"torch.ops.{space}.{operator_name(node.target)}"] = None
    calls = "; ".join(f"toca_fx.register_attention({name})" for name in foreign)
    advice = f"if this is an attention: {calls}" if calls else ""
    return Skipped(miss.kind, miss.path, miss.reason, advice)
