"""A policy as frozen, hashable data, and what it says about one site once its rules are applied.

Notation as in the paper (Zou et al., ToCa, ICLR 2025, arXiv 2410.05317): step index s of T, layer
l, N the interval of full steps, R the share of stale tokens. Ranges are checked when a policy is
loaded, not here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, cast

from toca_fx.policy.forecast import Forecast
from toca_fx.policy.gate import Gate
from toca_fx.policy.interval import STEP_INDEX, Interval
from toca_fx.policy.keys import Key, Override, key, stand_ins
from toca_fx.policy.modules import ACTION_TITLE, MODULE_TYPES, Action, Modules
from toca_fx.policy.selection import Ratio, Scores, Spatial
from toca_fx.policy.settings import Cache, Guidance, Hoisting, Recording, Sampler

Skip: TypeAlias = Literal["none", "all", "alternate"] | tuple[int, ...]

VERSION = 1
"""Version of the policy format."""


@dataclass(frozen=True)
class SitePolicy:
    """Everything a policy says about one site, its rules applied."""

    N: Interval
    R: Ratio
    action: Action
    scores: Scores
    spatial: Spatial | None
    cache: Cache = field(default=Cache())
    forecast: Forecast = field(default=Forecast())


@dataclass(frozen=True)
class Rule:
    """Overrides for the sites that its selectors match.

    `layers` is an inclusive range. `overrides` holds dotted leaf keys and values in the form of the
    dataclasses: ("R.base", 0.9), ("module", Action), ("spatial", None) for off. `position` is
    `file:line:col`, or `rules[0]` for a policy that came as a mapping.
    """

    match: str | None = field(
        metadata=key("Selects by type of module.", choices=MODULE_TYPES, examples=("mlp",))
    )
    path: str | None = field(
        metadata=key(
            "Selects by module path with a shell-style pattern, case-sensitive; `*` crosses dots. "
            "Paths are the names in the model's own code, which differ from one code of a model to "
            "another: `*single_*blocks.*` finds the single blocks of FLUX in diffusers "
            "(`single_transformer_blocks.0`) and in its authors' repository (`single_blocks.0`).",
            min_length=1,
            max_length=200,
            examples=("*.single_*",),
        )
    )
    layers: tuple[int, int] | None = field(
        metadata=key(
            "Selects by layer: a number, or an inclusive range such as 0-3. Layers count from 0.",
            title="a layer number or a range such as 0-3",
            alternatives=(
                {"type": "integer", "minimum": 0, "maximum": 9999, "description": "One layer."},
                {
                    "type": "string",
                    "pattern": "^[0-9]{1,4}(-[0-9]{1,4})?$",
                    "description": "One layer or an inclusive range.",
                },
            ),
            examples=("0-3", 5),
        )
    )
    overrides: tuple[tuple[str, object], ...]
    position: str

    def applies(self, kind: str, path: str, layer: int | None) -> bool:
        """Whether every selector given matches; a site without a layer number matches no
        `layers`.
        """
        if self.match not in (None, kind):
            return False
        if self.path is not None and not self.path_matches(self.path, path):
            return False
        return self.layers is None or (
            layer is not None and self.layers[0] <= layer <= self.layers[1]
        )

    @staticmethod
    def path_matches(pattern: str, path: str) -> bool:
        """Shell-style matching, case-sensitive; `*` crosses dots."""
        return fnmatchcase(path, pattern)

    def apply(self, site: SitePolicy) -> SitePolicy:
        """The site's policy with this rule's overrides merged in, key by key."""
        for leaf, value in self.overrides:
            site = _override(site, leaf, value)
        return site


def _override(site: SitePolicy, key: str, value: object) -> SitePolicy:
    section, _, leaf = key.partition(".")
    if section == "module":
        return replace(site, action=cast(Action, value))
    if key == "spatial":
        return replace(site, spatial=cast("Spatial | None", value))
    # Only `spatial` can be absent; a rule that switches it on starts from no bonus.
    current = getattr(site, section) or Spatial(**stand_ins(Spatial))
    changed: dict[str, Any] = {section: replace(current, **{leaf: value})}
    return replace(site, **changed)


_ONLY_CACHED = ("reuse", "partial")
_ONLY_PARTIAL = ("partial",)


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A whole policy. `source` says where it came from: a file name, or `<mapping>`."""

    name: str = field(
        metadata=key(
            "Name of the policy, shown in reports.",
            min_length=1,
            max_length=100,
            examples=("dit-xl-2",),
            stand_in="",
        )
    )
    description: str = field(
        default="",
        metadata=key("What the policy is for, in a sentence or two.", max_length=2000),
    )
    model: tuple[str, ...] = field(
        default=(),
        metadata=key(
            "Class names of the models that the policy was written for. With any other model a "
            'warning is given; torch.compile(backend="toca") without options takes the shipped '
            "policy that names the model.",
            title="a list of class names such as [MyTransformer]",
            items=Key("A class name, without its module.", min_length=1, max_length=200),
            examples=(["MyTransformer"],),
        ),
    )
    sampler: Sampler = field(
        metadata=key(
            "What is assumed of the sampling loop.",
            title="a mapping such as {steps: 50, order: ascending}",
        )
    )
    guidance: Guidance = field(
        default=Guidance(),
        metadata=key(
            "How classifier-free guidance reaches the model.",
            title="a mapping such as {layout: batched, selection: independent}",
        ),
    )
    N: Interval = field(
        metadata=key(
            "When full steps are taken. Needs `base` or `full_steps`, unless `gate.at_most` is "
            "there.",
            title="a mapping such as {base: 3}",
            without_demands="gate.at_most",
            override=Override("Overrides single keys of `N`.", modes=_ONLY_CACHED),
        )
    )
    R: Ratio = field(
        default=Ratio(base=1.0),
        metadata=key(
            "How many tokens stay stale on a partial step. Default: all.",
            title="a mapping such as {base: 0.9}",
            override=Override("Overrides single keys of `R`.", modes=_ONLY_PARTIAL),
        ),
    )
    modules: tuple[tuple[str, Action], ...] = field(
        default=tuple(vars(Modules()).items()),
        metadata=key(
            "What happens to each type of module on a partial step. `reuse`: the cached output is "
            "taken whole. `compute`: everything is computed on every step, and nothing is cached. "
            "{weight: w}: the selected tokens are computed, w times the share that R leaves (the "
            "paper's r_type); the others come from the cache.",
            title="a mapping such as {mlp: {weight: 1.0}}",
            form=Modules,
            override=Override(
                "Overrides what happens on a partial step to the modules that the rule matches: "
                "`reuse`, `compute` or {weight: w}, as under `modules`.",
                name="module",
                title=ACTION_TITLE,
                examples=("reuse", {"weight": 1.6}),
            ),
        ),
    )
    scores: Scores = field(
        default=Scores(),
        metadata=key(
            "Weights of the scores by which tokens are selected; the highest sums are computed. "
            "All are 0 unless given.",
            title="a mapping such as {staleness: 0.25}",
            override=Override("Overrides single keys of `scores`.", modes=_ONLY_PARTIAL),
        ),
    )
    spatial: Spatial | None = field(
        default=None,
        metadata=key(
            "Spreads the selection over the image: in each block of grid x grid tokens the best "
            "token's score is raised (the paper's s4). Absent: off.",
            title="a mapping such as {bonus: 0.6, grid: 2}",
            override=Override(
                'Overrides single keys of `spatial`, or switches it off with "off" (in quotes).',
                title='a mapping such as {bonus: 0.6, grid: 2}, or "off" in quotes',
                off="No spatial bonus.",
                examples=({"bonus": 0.4}, "off"),
                modes=_ONLY_PARTIAL,
            ),
        ),
    )
    cache: Cache = field(
        default=Cache(),
        metadata=key(
            "How cached outputs are kept.",
            title="a mapping such as {dtype: bfloat16}",
            override=Override("Overrides single keys of `cache`.", modes=_ONLY_CACHED),
        ),
    )
    skip: Skip = field(
        default="none",
        metadata=key(
            "Which steps between the full ones run no block: the state in front of the output "
            "layers is made of what it was on earlier steps. `none`; `all`; `alternate`: those "
            "with an even number of steps to the next full one, so that the step before it is "
            "partial (DuCa); with `N.phase: modulo` an even s mod N counts. Or a list of step "
            "indices s, tied to the policy's own step count. With `cache.grain: model` all of them "
            "run no block.",
            title="`none`, `all`, `alternate` or a list of step indices",
            min_items=1,
            items=STEP_INDEX,
            examples=("alternate", [2, 4, 7]),
        ),
    )
    forecast: Forecast = field(
        default=Forecast(),
        metadata=key(
            "How what is not computed is made of the values at the last full steps. `null` stands "
            "for the default of a key, in rules too.",
            title="a mapping such as {basis: newton, order: 2}",
            override=Override("Overrides single keys of `forecast`.", modes=_ONLY_CACHED),
        ),
    )
    gate: Gate | None = field(
        default=None,
        metadata=key(
            "Decides as the steps come which are full, within what `N` allows: `N.first`, "
            "`N.last`, `N.full_steps` and `N.extra_full_steps` are full in any case, and of "
            "`N.base` - 1 other steps in a row, or `at_most`, the next one. All guidance branches "
            "of a step are decided on together. On an accelerator whatever is measured is read one "
            "step later, so that no step waits for the one before it. Absent: `N` decides, ahead "
            "of the run.",
            title="a mapping such as {signal: easycache, threshold: 0.05}",
            examples=({"signal": "easycache", "threshold": 0.05, "at_most": 6},),
        ),
    )
    hoisting: Hoisting = field(
        default=Hoisting(),
        metadata=key(
            "What does not depend on the latents is computed ahead of the steps, once per "
            "generation: keys and values of captions, and (given `session(timesteps=...)`) the "
            "modulations of all timesteps. It changes no result; but on an accelerator, a timestep "
            "that the model's dtype rounds counts as the one that the session was given.",
            title="a mapping such as {memory: 1024}",
        ),
    )
    recording: Recording = field(
        default=Recording(),
        metadata=key(
            "On a CUDA device a step that comes for the second time is recorded as a CUDA graph: "
            "one launch, however many kernels it has. Recorded steps keep their caches between "
            "generations; a model whose caches are larger than this is queued, kernel by kernel, "
            'which costs a large model nothing. `mode="reduce-overhead"` records without a bound.',
            title="a mapping such as {memory: 256}",
        ),
    )
    seed: int = field(
        default=0,
        metadata=key("Seed of the random scores.", minimum=0, maximum=2**63 - 1),
    )
    rules: tuple[Rule, ...] = field(
        default=(),
        metadata=key(
            "Exceptions, applied in order: later rules win. Each needs a selector and something "
            "that it overrides; what it does not name stays as it is.",
            title="a list of rules",
            items=Key(title="a rule such as {match: mlp, layers: 0-3, R: {base: 0.9}}"),
            examples=(
                [{"match": "mlp", "path": "*.single_*", "layers": "0-3", "R": {"base": 0.9}}],
            ),
        ),
    )
    source: str

    def to_yaml(self) -> str:
        """The text of a file with this policy, without keys that have their defaults."""
        from toca_fx.policy.dump import to_yaml

        return to_yaml(self)

    def without_memories(self) -> Policy:
        """A policy with the same steps that keeps nothing of the whole model, for a part of one
        that has no module to be cached.
        """
        cache = replace(self.cache, grain="module")
        return replace(self, skip="none", cache=cache, gate=None, rules=())

    def always_full(self) -> Policy:
        """A policy by which every step is full, for a model that its gate cannot measure."""
        return replace(self, N=Interval(base=1), gate=None, rules=())

    def for_site(self, kind: str, path: str, layer: int | None) -> SitePolicy:
        """What holds for the module of type `kind` at `path` in layer `layer`: matching rules
        applied in order.

        Raises KeyError for a `kind` that is not one of MODULE_TYPES.
        """
        site = SitePolicy(
            self.N,
            self.R,
            dict(self.modules)[kind],
            self.scores,
            self.spatial,
            self.cache,
            self.forecast,
        )
        for rule in self.rules:
            if rule.applies(kind, path, layer):
                site = rule.apply(site)
        return site
