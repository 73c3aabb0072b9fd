"""On which steps a site is full, and how many of its tokens it computes on the others."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

from toca_fx.match.sites import Site
from toca_fx.plan.places import listed_steps
from toca_fx.policy import WHOLE_GRAINS, Interval, Ratio, SitePolicy, Skip
from toca_fx.policy.interval import exact

Modes = tuple[str, ...]


def site_column(
    site: Site,
    policy: SitePolicy,
    indices: Sequence[int],
    full: frozenset[int],
    fresh: tuple[int, ...],
    skipped: frozenset[int] = frozenset(),
) -> tuple[Modes, tuple[int, ...]]:
    """The modes and the numbers of computed tokens of one site, over all steps.

    On the steps ``skipped`` no block runs; what is full there nevertheless is computed for its
    memory.
    """
    mode = policy.action.mode
    others = [(s, k) for s, k in zip(indices, fresh, strict=True) if s not in full | skipped]
    if mode == "compute" or not others:
        modes = tuple("skip" if s in skipped else "compute" for s in indices)
        return modes, tuple(0 if each == "skip" else site.tokens for each in modes)
    wanted = [count for _, count in others]
    if mode == "reuse" or not any(wanted):
        partial, fresh = "reuse", (0,) * len(indices)
    else:
        partial = "partial"
    # An attention of no queries is none: the kernels fail on it. An MLP of no tokens runs through
    # the graph of any other number.
    none = "reuse" if site.kind != "mlp" else partial
    columns = []
    for s, count in zip(indices, fresh, strict=True):
        if s in full:
            columns.append(("full", site.tokens))
        elif s in skipped:
            columns.append(("skip", 0))
        else:
            columns.append((partial if count else none, count))
    return tuple(mode for mode, _ in columns), tuple(count for _, count in columns)


def state_column(
    state: Site, indices: Sequence[int], skipped: frozenset[int]
) -> tuple[Modes, tuple[int, ...]]:
    """The modes of the model's state: every step that computes it writes it, if any reads it."""
    if not skipped:
        return ("compute",) * len(indices), (state.tokens,) * len(indices)
    modes = tuple("reuse" if s in skipped else "full" for s in indices)
    return modes, tuple(0 if mode == "reuse" else state.tokens for mode in modes)


def full_steps(
    interval: Interval, indices: Sequence[int], total: int, gated: bool = False
) -> frozenset[int]:
    """The step indices s on which everything is computed.

    ``indices`` are all of them, in the order of the calls, ``total`` is their number T. The
    interval is re-evaluated at full steps: N(s) = round_half_even(base / (1 + w - 2 w s / T)), w =
    ``drift`` (ToCa, section 3.3, and the authors' force scheduler). ``phase: modulo`` is the
    authors' rule: a step is full when s is a multiple of the interval in force and of the one
    re-evaluated at s; either way the latter is in force from then on. With ``phase: due`` the
    former is enough, as for their first layer. With ``growth`` the base
    grows with each full step past the first ones: floor(base + growth k) after the k-th (Spectrum).
    Where steps are ``gated`` only those are full in any case that are forced or listed.
    """
    forced = _forced(interval, indices, total)
    if interval.full_steps is not None:
        return listed_steps(interval.full_steps, indices) | forced
    if gated:
        return forced
    return frozenset(s for s, full, _ in _walk(interval, indices, total) if full)


def skipped_steps(
    interval: Interval,
    skip: Skip,
    grain: str,
    indices: Sequence[int],
    total: int,
    gated: bool = False,
) -> frozenset[int]:
    """The step indices s on which no block runs, under the policy's ``interval``.

    With the ``grain`` of the model or of its output that is all between full steps. ``alternate``
    is DuCa's rule: an even number of steps to the next full one, as ``phase: modulo`` counts: s mod
    the interval in force. Elsewhere the end of the generation counts as full.
    """
    full = full_steps(interval, indices, total, gated)
    others = [s for s in indices if s not in full]
    if grain in WHOLE_GRAINS or skip == "all":
        return frozenset(others)
    if skip == "alternate":
        left = _steps_left(interval, indices, total)
        return frozenset(s for s in others if left[s] % 2 == 0)
    return frozenset() if skip == "none" else frozenset(skip) - full


def _steps_left(interval: Interval, indices: Sequence[int], total: int) -> dict[int, int]:
    """By step, how many there are to the next full one."""
    if interval.phase != "count" and interval.full_steps is None:
        return {s: s % current for s, _, current in _walk(interval, indices, total)}
    full, left, until = full_steps(interval, indices, total), dict[int, int](), 1
    for s in reversed(indices):
        left[s] = 0 if s in full else until
        until = left[s] + 1
    return left


def _forced(interval: Interval, indices: Sequence[int], total: int) -> frozenset[int]:
    """The steps that are full whatever the interval says."""
    first, last = interval.ends(total)
    ends = (*indices[:first], *indices[max(0, len(indices) - last) :])
    return frozenset((*ends, *interval.extra_full_steps))


def _walk(
    interval: Interval, indices: Sequence[int], total: int
) -> Iterator[tuple[int, bool, int]]:
    """Each step s, whether it is full, and the interval in force once that is decided."""
    first, forced = frozenset(indices[: interval.ends(total)[0]]), _forced(interval, indices, total)
    current, since, past_first = 1, 0, 0
    for s in indices:
        since += 1
        if interval.phase == "count":
            full = since >= current or s in forced
            if full:
                past_first += s not in first
                current, since = _interval_at(interval, s, total, past_first), 0
        else:
            due = s % current == 0
            if due or s in first:
                current = _interval_at(interval, s, total)
            full = (due and (s % current == 0 or interval.phase == "due")) or s in forced
        yield s, full, current


def _interval_at(interval: Interval, s: int, total: int, grown: int = 0) -> int:
    """The interval re-evaluated at step s, when its base has ``grown`` so many times."""
    for window in interval.windows:
        if exact(window.start) * total <= s < exact(window.stop) * total:
            return window.interval
    base = math.floor(interval.base + exact(interval.growth) * grown)
    # Python's round is half to even, as the authors' numpy one is.
    return max(1, round(base / _falling(interval.drift, s, total)))


@lru_cache(maxsize=4096)
def _falling(weight: float, at: int, over: int) -> Fraction:
    """What falls linearly from 1 + ``weight`` at 0 to 1 - ``weight`` at ``over``."""
    return 1 + exact(weight) * (1 - Fraction(2 * at, over))


def fresh_tokens(policy: SitePolicy, s: int, total: int, layer: int, span: int, tokens: int) -> int:
    """K, the number of fresh tokens, of a site on step s.

    K = trunc(rho * tokens), with rho = clamp((1 - R) * step factor * layer factor * module weight,
    0, 1) in float32. ``span`` is the highest layer index, used unless the policy says
    ``layer_span``. The factors fall linearly from 1 + w to 1 - w over the steps and over the layers
    (ToCa, section 3.3). Then K is rounded up to the policy's ``multiple``.
    """
    ratio: Ratio = policy.R
    layers = ratio.layer_span or max(span, 1)
    share = (
        (1 - exact(ratio.base))
        * _falling(ratio.layer_weight, layer, layers)
        * _falling(ratio.step_weight, s, total)
        * exact(policy.action.weight)
    )
    clamped = float(min(max(share, Fraction(0)), Fraction(1)))
    count = math.trunc(_float32(_float32(clamped) * tokens))
    return min(tokens, -(-count // ratio.multiple) * ratio.multiple)


def _float32(value: float) -> float:
    """``value`` rounded to single precision."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def layer_spans(sites: Sequence[Site]) -> dict[str, int]:
    """The highest layer index of each list of blocks."""
    spans: dict[str, int] = {}
    for site in sites:
        spans[site.block] = max(spans.get(site.block, 0), site.layer)
    return spans
