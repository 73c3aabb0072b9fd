"""Write tools/results/flops.md: FLOPs of the reference policies at the sizes of the paper.

    python tools/flops_table.py            # write it
    python tools/flops_table.py dit flux   # print the rows of some models only

Published ratios are in the table too. Nothing is run: models and inputs are on the device "meta".
Two blocks of each stack are captured, planned at full depth, and counted; the second block stands
for all that follow it, which is checked to be in the same modes on every step (``--whole`` captures
all).
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # runs from a clone that is not installed

from tests.helpers import capture
from tests.stdit3 import STDiT3, open_sora_1_2_inputs
from toca_fx import load_policy
from toca_fx.capture import aten as trace
from toca_fx.examples import PRESETS, build
from toca_fx.graph.network import needed
from toca_fx.graph.roles import aspect
from toca_fx.lower.flops import count_flops
from toca_fx.match.matcher import match
from toca_fx.match.sites import Site
from toca_fx.plan.plan import Plan, StepPlan
from toca_fx.plan.planner import make_plan
from toca_fx.plan.schedule import Modes
from toca_fx.policy import Hoisting
from toca_fx.rewrite.hoist import find_hoistable
from toca_fx.rewrite.step import rewrite
from toca_fx.rewrite.step_graph import extract
from toca_fx.rewrite.tensors import Tensors

RESULTS = ROOT / "tools" / "results" / "flops.md"
SHALLOW = 2
OPEN_SORA_TEXT = 27  # caption tokens; upstream packs captions without padding

Built = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """A model at real size.

    ``stacks`` gives the number of blocks by the path of their list; ``build`` takes such numbers.
    """

    title: str
    stacks: Mapping[str, int]
    build: Callable[[Mapping[str, int]], Built]
    published: Mapping[str, float | None]  # by reference policy; None: not known to us


def _preset(
    name: str, settings: Mapping[str, str], batch: int, dtype: torch.dtype
) -> Callable[[Mapping[str, int]], Built]:
    def make(depths: Mapping[str, int]) -> Built:
        example = PRESETS[name]
        config = {**example.config, **{settings[stack]: depth for stack, depth in depths.items()}}
        example = dataclasses.replace(example, config=config)
        return build(example, batch=batch, device="meta", dtype=dtype)

    return make


def _open_sora(depths: Mapping[str, int]) -> Built:
    with torch.device("meta"):
        model = STDiT3(depth=depths["spatial_blocks"]).eval().requires_grad_(False)
    # The model of tests.stdit3.open_sora_1_2, in the dtype that it is run in.
    return model.to(torch.bfloat16), open_sora_1_2_inputs(OPEN_SORA_TEXT)


_BLOCKS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}

MODELS = {
    "dit": Model(
        "DiT-XL/2 256, guidance",
        {"transformer_blocks": 28},
        _preset("dit-xl-2-256", _BLOCKS, 2, torch.float32),
        {
            "dit-xl-2-ddim50": 2.32,
            "dit-xl-2-ddpm250": 2.73,
            "fora-dit": None,
            "taylorseer-dit": 3.57,
            "duca-dit": None,
        },
    ),
    "pixart": Model(
        "PixArt-alpha 256, guidance, 27 text tokens",
        {"transformer_blocks": 28},
        _preset("pixart-alpha-256", _BLOCKS, 2, torch.float32),
        {"pixart-alpha": 1.93},
    ),
    "flux": Model(
        "FLUX.1-dev 1024, 512 text tokens",
        {"transformer_blocks": 19, "single_transformer_blocks": 38},
        _preset("flux-dev-1024", _BLOCKS, 1, torch.bfloat16),
        {
            "flux-dev-n4": 2.94,
            "flux-dev-n5": 3.30,
            "flux-dev-n6": 3.76,
            "taylorseer-flux": None,
            "spectrum-flux": None,
        },
    ),
    "opensora": Model(
        f"Open-Sora 1.2 480p 2 s, guidance, {OPEN_SORA_TEXT} text tokens",
        {"spatial_blocks": 28, "temporal_blocks": 28},
        _open_sora,
        {"opensora": 2.36},
    ),
}


@dataclass(frozen=True)
class Row:
    """What one policy does to one model; FLOPs are those of one run.

    ``scoring`` is part of ``done``; ``projections`` (of FLUX) and ``captions``, which we compute
    once, are not.
    """

    policy: str
    steps: int
    uncached: int
    done: int
    scoring: int
    projections: int
    captions: int
    full_share: float
    partial_share: float | None
    skip_share: float | None
    modules: Mapping[str, float]  # by kind, share of the uncached run
    cache_bytes: int
    published: float | None

    @property
    def ratio(self) -> float:
        """The FLOPs ratio with everything that the graphs compute."""
        return self.uncached / self.done

    @property
    def ratio_as_published(self) -> float:
        """The FLOPs ratio with the work that the authors' code does and counts."""
        return self.uncached / (self.done - self.scoring + self.projections + self.captions)

    @property
    def difference(self) -> float | None:
        """The relative difference of ``ratio_as_published`` from the published figure."""
        return None if self.published is None else self.ratio_as_published / self.published - 1


class Count:
    """FLOPs of one model under any policy, from a capture of its first blocks."""

    def __init__(self, model: Model, *, whole: bool = False) -> None:
        self.model = model
        self._depths = dict(model.stacks) if whole else dict.fromkeys(model.stacks, SHALLOW)
        module, kwargs = model.build(self._depths)
        captured, inputs = capture(module, **kwargs)
        self._aten = trace.to_aten(captured, inputs)
        self._matches = match(self._aten.graph)
        memory = Hoisting().memory_bytes
        hoisted = find_hoistable(self._aten.graph, self._matches.sites, memory)
        self._conditions = hoisted.conditions
        self._aspect = aspect(self._aten.graph)
        self._paths = {node.name: node.meta["path"] for node in self._aten.graph.nodes}

    @cached_property
    def _deep(self) -> tuple[tuple[Site, ...], tuple[int, ...]]:
        """The sites at full depth, and for each the site of the capture that it is like."""
        sites, like = [], []
        for stacks in self._interleaved():
            for layer in range(max(self.model.stacks[stack] for stack in stacks)):
                for stack in stacks:
                    source = min(layer, self._depths[stack] - 1)
                    own = [
                        i
                        for i, site in enumerate(self._matches.sites)
                        if self._block(site.path) == (stack, source)
                    ]
                    start = len(sites)
                    for i in own:
                        site = self._matches.sites[i]
                        moved = {
                            name: start + own.index(at)
                            for name in ("influence", "entropy")
                            if (at := getattr(site, name)) is not None
                        }
                        path = f"{stack}.{layer}" + site.path.removeprefix(f"{stack}.{source}")
                        sites.append(dataclasses.replace(site, path=path, layer=layer, **moved))
                        like.append(i)
        return tuple(sites), tuple(like)

    def _interleaved(self) -> Iterator[tuple[str, ...]]:
        """The stacks in groups: those that run alternately are in one group."""
        stacks = tuple(self.model.stacks)
        order = [stack for site in self._matches.sites if (stack := self._block(site.path)[0])]
        alternating = len(set(order[: len(order) // 2])) == len(stacks)
        yield from [stacks] if alternating else [(stack,) for stack in stacks]

    def _block(self, path: str) -> tuple[str, int]:
        """The stack and the layer of a module; "" and 0 outside of stacks."""
        stack, _, rest = path.partition(".")
        return (stack, int(rest.split(".")[0])) if stack in self.model.stacks and rest else ("", 0)

    def _repeats(self, block: tuple[str, int]) -> int:
        """How many blocks of the whole model a block of the capture stands for."""
        stack, layer = block
        return self.model.stacks[stack] - layer if stack and layer == self._depths[stack] - 1 else 1

    @cached_property
    def _flops(self) -> dict[str, int]:
        """FLOPs of one uncached call by node."""
        return count_flops(self._aten, _inputs_of(self._aten))

    @cached_property
    def uncached(self) -> Counter[tuple[str, int]]:
        """FLOPs of one uncached call by block."""
        counted: Counter[tuple[str, int]] = Counter()
        for name, count in self._flops.items():
            counted[self._block(self._paths[name])] += count
        return counted

    def total(self, by_block: Mapping[tuple[str, int], int]) -> int:
        """The sum at full depth."""
        return sum(self._repeats(block) * count for block, count in by_block.items())

    def row(self, policy_name: str) -> Row:
        """Count all steps of a reference policy."""
        policy = load_policy(f"reference/{policy_name}")
        shallow = make_plan(self._matches, policy, aspect=self._aspect)
        modules, like = self._deep
        deep = dataclasses.replace(self._matches, sites=modules, misses=())
        plan = make_plan(deep, policy, aspect=self._aspect)
        sites, own = plan.sites, len(self._matches.sites)
        like = (*like, *range(own, own + plan.whole))
        steps: dict[Modes, _Step] = {}
        uncached, once = self.total(self.uncached), self.total(self._once)
        totals: list[int] = []
        scoring, projections, captions = 0, 0, -once
        for step in plan.steps:
            modes = self._shallow_modes(step, like)
            if modes not in steps:
                graph = rewrite(self._aten, shallow.step(modes, self._conditions))
                steps[modes] = self._step(graph, shallow)
            fixed, per_site, extra, spared = steps[modes]
            fresh = sum(
                per_site.get(like[i], 0) * count // sites[i].tokens
                for i, count in enumerate(step.fresh)
            )
            totals.append(self.total(fixed) + fresh)
            scoring += extra
            captions += spared
            if plan.scored:
                projections += sum(
                    2 * math.prod(site.shape) * site.shape[2]
                    for site, mode in zip(sites, step.modes, strict=True)
                    if mode == "reuse" and site.kind == "joint_attention"
                )

        def share(kind: str) -> float | None:
            found = [
                total for step, total in zip(plan.steps, totals, strict=True) if step.kind == kind
            ]
            return sum(found) / len(found) / uncached if found else None

        made = Tensors(self._aten, shallow)
        kept = [made.new(buffer._replace(site=like[buffer.site])) for buffer in plan.kept]
        return Row(
            policy_name,
            len(totals),
            uncached * len(totals),
            sum(totals) + once,
            scoring,
            projections,
            captions,
            totals[0] / uncached,
            share("partial"),
            share("skip"),
            Counter(site.kind for site in modules),
            sum(tensor.nbytes for tensor in kept),
            self.model.published[policy_name],
        )

    @cached_property
    def _once(self) -> Counter[tuple[str, int]]:
        """FLOPs of the nodes that depend on captions only, by block."""
        part = extract(self._aten, self._conditions)
        flops = count_flops(part.module, _inputs_of(part.module))
        counted: Counter[tuple[str, int]] = Counter()
        for name, count in flops.items():
            counted[self._block(self._paths[name])] += count
        return counted

    def _shallow_modes(self, step: StepPlan, like: Sequence[int]) -> Modes:
        """The modes of the captured blocks; those that they stand for have the same."""
        modes: dict[int, set[str]] = defaultdict(set)
        for i, mode in zip(like, step.modes, strict=True):
            modes[i].add(mode)
        if any(len(found) > 1 for found in modes.values()):
            raise ValueError(f"on step {step.index} blocks differ in mode; use --whole")
        return tuple(next(iter(modes[i])) for i in sorted(modes))

    def _step(self, graph: Any, plan: Plan) -> _Step:
        """FLOPs of a step graph, in four parts.

        They are those that do not depend on K, by block; those of all tokens, by site; of the
        former those of scoring; and those of captions that the step need not compute.
        """
        placeholders = self._aten.graph.find_nodes(op="placeholder")
        made = Tensors(self._aten, plan)
        examples = [_meta(placeholders[position].meta["val"]) for position in graph.kept]
        for buffer in graph.buffers:
            examples.append(made.example(buffer, plan.sites[buffer.site].tokens))
        flops = count_flops(graph.module, examples)
        fresh = {name: i for i, names in graph.fresh_nodes.items() for name in names}
        fixed: Counter[tuple[str, int]] = Counter()
        per_site: Counter[int] = Counter()
        added: Counter[tuple[str, int]] = Counter()
        replaced: Counter[tuple[str, int]] = Counter()
        block = ("", 0)
        present = {node.name for node in graph.module.graph.nodes}
        for node in graph.module.graph.nodes:
            known = self._paths.get(node.name)
            if known is not None and self._block(known)[0]:
                block = self._block(known)
            if node.name in fresh:
                per_site[fresh[node.name]] += flops.get(node.name, 0)
            elif node.name in flops:
                # Nodes that scoring added belong to no module; they count for the block whose
                # nodes surround them.
                fixed[self._block(known) if known is not None else block] += flops[node.name]
                added[block] += flops[node.name] if known is None else 0
        # An attention that was replaced by one with scores is missing here: its own work is not
        # scoring.
        live = {block for block, count in added.items() if count}
        for name, count in self._attention_flops.items():
            if name not in present and self._block(self._paths[name]) in live:
                replaced[self._block(self._paths[name])] += count
        hoisted = [str(buffer.part) for buffer in graph.buffers if buffer.role == "hoisted"]
        read = self._needed_for(hoisted)
        return fixed, per_site, self.total(added) - self.total(replaced), self.total(read)

    def _needed_for(self, names: Sequence[str]) -> Counter[tuple[str, int]]:
        """FLOPs of the nodes ``names`` and of what they need, by block."""
        counted: Counter[tuple[str, int]] = Counter()
        for name in needed(self._aten.graph, names):
            counted[self._block(self._paths[name])] += self._flops.get(name, 0)
        return counted

    @cached_property
    def _attention_flops(self) -> dict[str, int]:
        target = torch.ops.aten.scaled_dot_product_attention.default
        names = {node.name for node in self._aten.graph.nodes if node.target is target}
        return {name: count for name, count in self._flops.items() if name in names}


_Step = tuple[Counter[tuple[str, int]], Counter[int], int, int]


def _inputs_of(module: fx.GraphModule) -> list[Any]:
    """The inputs of a graph, on the device "meta"."""
    return [_meta(node.meta["val"]) for node in module.graph.find_nodes(op="placeholder")]


def _meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def rows(name: str, *, whole: bool = False) -> list[Row]:
    """The rows of one model under all of its policies."""
    count = Count(MODELS[name], whole=whole)
    return [count.row(policy) for policy in MODELS[name].published]


_HEAD = (
    "| model | policy | sites | uncached TFLOPs: step, run | full step | partial step | skip "
    "| done: TFLOPs, ratio | of it scoring | as published | published | difference | cache MiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def _line(title: str, row: Row) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in row.modules.items())
    cells = [
        title,
        row.policy,
        kinds,
        f"{row.uncached / row.steps / 1e12:.4g}, {row.uncached / 1e12:.5g}",
        f"{row.full_share:.1%}",
        _or_nothing(row.partial_share, ".1%"),
        _or_nothing(row.skip_share, ".2%"),
        f"{row.done / 1e12:.5g}, **{row.ratio:.3f}**",
        f"{row.scoring / row.done:.1%}",
        f"**{row.ratio_as_published:.3f}**",
        _or_nothing(row.published, ".2f"),
        _or_nothing(row.difference, "+.1%"),
        f"{row.cache_bytes / 2**20:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _or_nothing(figure: float | None, form: str) -> str:
    return "" if figure is None else format(figure, form)


_INTRODUCTION = """\
<!-- Generated by tools/flops_table.py; do not edit. -->

# FLOPs of the reference policies at real size

Counted on the device "meta" by the formulas of `torch.utils.flop_counter` (2 per multiply-add;
matrix products, convolutions and attention). Shares of steps are of an uncached step; *cache* is
all that a generation keeps.
"""

_NOTES = """
*done*: everything in our step graphs, scoring included. On a GPU, s1 takes a second product of
queries and keys on full steps; on a CPU, maps of moderate size need none. *as published*: the work
of the authors' code, counted as they do:

- no scoring: their attention materialises the map, and the scores are read from it
- captions: keys and values, and their projections, are computed on every step that reads them; we
  compute them once
- FLUX, ToCa: on partial steps the attention's output projections of the double blocks run again on
  all tokens

Text: PixArt-alpha with 27 unpadded tokens; Open-Sora packs captions without padding, and has as
many here. DiT and PixArt-alpha are in float32, FLUX and Open-Sora in bfloat16, which matters for
the cache only.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the table, or print part of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"only these, printed: {', '.join(MODELS)}"
    )
    parser.add_argument("--whole", action="store_true", help="capture every block")
    options = parser.parse_args(arguments)
    lines = [_HEAD]
    print(_HEAD, flush=True)
    for name in options.models or MODELS:
        start = time.perf_counter()
        for row in rows(name, whole=options.whole):
            lines.append(_line(MODELS[name].title, row))
            print(lines[-1], flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if not options.models:
        RESULTS.write_text(
            _INTRODUCTION + "\n" + "\n".join(lines) + "\n" + _NOTES, encoding="utf-8"
        )


if __name__ == "__main__":
    main()
