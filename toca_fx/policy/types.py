"""A policy as frozen, hashable data, and what it says about one site once its rules are applied.

Notation as in the paper (Zou et al., ToCa, ICLR 2025, arXiv 2410.05317): step index s of T, layer
l, N the interval of full steps, R the share of stale tokens. Ranges are checked when a policy is
loaded, not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

MODULE_TYPES = ("self_attention", "cross_attention", "joint_attention", "mlp")


@dataclass(frozen=True)
class Window:
    """Inside start * T <= s < stop * T a full step is taken every `interval` steps."""

    start: float
    stop: float
    interval: int


@dataclass(frozen=True)
class Interval:
    """N: when full steps are taken. N(s) = round_half_even(base / (1 + drift - 2 drift s/T)), in
    steps.

    `first` and `last` count forced full steps at either end of a generation; `full_steps`, when
    given, replaces `base`, `drift`, `phase` and `windows`; `extra_full_steps` come on top. Both
    lists hold step indices s.
    """

    base: int = 3
    drift: float = 0.0
    first: int = 1
    last: int = 0
    phase: Literal["count", "modulo"] = "count"
    windows: tuple[Window, ...] = ()
    full_steps: tuple[int, ...] | None = None
    extra_full_steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """R: the share of stale tokens, 0 to 1, before its slopes.

    Computed share rho = clamp((1 - base) * step_factor * layer_factor * module weight, 0, 1) with
    step_factor = 1 + w - 2 w s/T (w = `step_weight`) and layer_factor = 1 + w - 2 w l/layer_span (w
    = `layer_weight`). A `layer_span` of None stands for the number of layers less one. K is rounded
    up to a multiple of `multiple`.
    """

    base: float
    step_weight: float = 0.0
    layer_weight: float = 0.0
    layer_span: int | None = None
    multiple: int = 1


@dataclass(frozen=True)
class Scores:
    """Weights (no unit) of the token scores; `staleness_over` is in steps, None stands for
    `N.base`.

    `queries` is the share of an attention's queries that `self_attention` looks at, 0.001 to 1.
    """

    self_attention: float = 0.0
    cross_attention: float = 0.0
    staleness: float = 0.0
    staleness_over: int | None = None
    value_norm: float = 0.0
    key_norm: float = 0.0
    random: float = 0.0
    queries: float = 1.0

    @property
    def weights(self) -> dict[str, float]:
        """The weights that are not 0, by the name of their score."""
        return {
            name: weight
            for name, weight in vars(self).items()
            if weight and name not in ("staleness_over", "queries")
        }

    @property
    def every(self) -> int:
        """`self_attention` looks at the queries 0, `every`, 2 `every`, ...: 5 for a share of 0.25
        or 0.2, 3 for a half.

        It is odd. The rows of most token grids have an even length, and an even number would look
        at a few of the columns only.
        """
        every = round(1 / self.queries)
        return every if every % 2 else every + 1

    @property
    def needs_attention(self) -> bool:
        """Whether some score is made of an attention's queries, keys or values."""
        return bool(self.self_attention or self.value_norm or self.key_norm)


@dataclass(frozen=True)
class Spatial:
    """In each block of `grid` x `grid` tokens the best score is multiplied by 1 + `bonus`."""

    bonus: float
    grid: int = 2


@dataclass(frozen=True)
class Guidance:
    """How classifier-free guidance reaches the model, and whether its halves share one selection of
    tokens.
    """

    layout: Literal["none", "batched", "separate"] = "none"
    selection: Literal["independent", "shared"] = "independent"


@dataclass(frozen=True)
class Cache:
    """The type in which outputs are kept, "model" or the name of one in torch; and for what there
    is a cache of its own.
    """

    dtype: str = "model"
    grain: Literal["module", "block"] = "module"


@dataclass(frozen=True)
class Hoisting:
    """`memory` in MiB that values may take which are computed ahead of the steps, once per
    generation; 0: nothing is hoisted.
    """

    memory: int = 1024

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return self.memory * 2**20


@dataclass(frozen=True)
class Recording:
    """`memory` in MiB that recorded steps may keep between generations; 0: nothing is recorded."""

    memory: int = 256

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return self.memory * 2**20


@dataclass(frozen=True)
class Sampler:
    """The default step count T and which way the step index s runs."""

    steps: int
    order: Literal["ascending", "descending"] = "ascending"


@dataclass(frozen=True)
class Action:
    """What happens to a module on a partial step; `weight` multiplies the computed share and counts
    for "partial" only.
    """

    mode: Literal["reuse", "compute", "partial"]
    weight: float = 1.0


@dataclass(frozen=True)
class SitePolicy:
    """Everything a policy says about one site, its rules applied."""

    N: Interval
    R: Ratio
    action: Action
    scores: Scores
    spatial: Spatial | None
    cache: Cache = Cache()


@dataclass(frozen=True)
class Rule:
    """Overrides for the sites that its selectors match.

    `layers` is an inclusive range. `overrides` holds dotted leaf keys and values in the form of the
    dataclasses: ("R.base", 0.9), ("module", Action), ("spatial", None) for off. `position` is
    `file:line:col`, or `rules[0]` for a policy that came as a mapping.
    """

    match: str | None
    path: str | None
    layers: tuple[int, int] | None
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
        for key, value in self.overrides:
            site = _override(site, key, value)
        return site


def _override(site: SitePolicy, key: str, value: object) -> SitePolicy:
    section, _, leaf = key.partition(".")
    if section == "module":
        return replace(site, action=cast(Action, value))
    if key == "spatial":
        return replace(site, spatial=cast("Spatial | None", value))
    # Only `spatial` can be absent; a rule that switches it on starts from no bonus.
    current = getattr(site, section) or Spatial(bonus=0.0)
    changed: dict[str, Any] = {section: replace(current, **{leaf: value})}
    return replace(site, **changed)


@dataclass(frozen=True)
class Policy:
    """A whole policy. `source` says where it came from: a file name, or `<mapping>`."""

    name: str
    description: str
    model: tuple[str, ...]
    sampler: Sampler
    guidance: Guidance
    N: Interval
    R: Ratio
    modules: tuple[tuple[str, Action], ...]
    scores: Scores
    spatial: Spatial | None
    cache: Cache
    hoisting: Hoisting
    recording: Recording
    seed: int
    rules: tuple[Rule, ...]
    source: str

    def for_site(self, kind: str, path: str, layer: int | None) -> SitePolicy:
        """What holds for the module of type `kind` at `path` in layer `layer`: matching rules
        applied in order.

        Raises KeyError for a `kind` that is not one of MODULE_TYPES.
        """
        site = SitePolicy(
            self.N, self.R, dict(self.modules)[kind], self.scores, self.spatial, self.cache
        )
        for rule in self.rules:
            if rule.applies(kind, path, layer):
                site = rule.apply(site)
        return site
