"""On which steps a site is full, and how many of its tokens it computes on the others."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from toca_fx.match.sites import Site
from toca_fx.policy import Interval, Policy, Ratio, SitePolicy

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
    """The modes of the model's state: every step that computes it writes its memory."""
    modes = tuple("reuse" if s in skipped else "full" for s in indices)
    return modes, tuple(0 if mode == "reuse" else state.tokens for mode in modes)


def full_steps(interval: Interval, indices: Sequence[int], total: int) -> frozenset[int]:
    """The step indices s on which everything is computed.

    ``indices`` are all of them, in the order of the calls, ``total`` is their number T. The
    interval is re-evaluated at full steps: N(s) = round_half_even(base / (1 + w - 2 w s / T)), w =
    ``drift`` (ToCa, section 3.3, and the authors' force scheduler). ``phase: modulo`` is the
    authors' rule: a step is full when s is a multiple of the interval in force and of the one
    re-evaluated at s; either way the latter is in force from then on.
    """
    first = frozenset(indices[: interval.first])
    forced = {
        *first,
        *indices[max(0, len(indices) - interval.last) :],
        *interval.extra_full_steps,
    }
    if interval.full_steps is not None:
        return frozenset({*interval.full_steps, *forced})
    full: set[int] = set()
    current, since = 1, 0
    for s in indices:
        since += 1
        if interval.phase == "modulo":
            due = s % current == 0
            if due or s in first:
                current = _interval_at(interval, s, total)
            due = due and s % current == 0
            if due or s in forced:
                full.add(s)
        elif since >= current or s in forced:
            full.add(s)
            current, since = _interval_at(interval, s, total), 0
    return frozenset(full)


def _interval_at(interval: Interval, s: int, total: int) -> int:
    for window in interval.windows:
        if exact(window.start) * total <= s < exact(window.stop) * total:
            return window.interval
    # Python's round is half to even, as the authors' numpy one is.
    return max(1, round(interval.base / _falling(interval.drift, s, total)))


@lru_cache(maxsize=4096)
def _falling(weight: float, at: int, over: int) -> Fraction:
    """What falls linearly from 1 + ``weight`` at 0 to 1 - ``weight`` at ``over``."""
    return 1 + exact(weight) * (1 - Fraction(2 * at, over))


@lru_cache(maxsize=256)
def exact(number: float) -> Fraction:
    """A number of a policy as it is written: 0.4 is two fifths, and no sum of powers of two.

    A step that a policy puts on a boundary is then on it, and a half is one.
    """
    return Fraction(str(number))


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


def skipped_steps(policy: Policy, indices: Sequence[int], total: int) -> frozenset[int]:
    """The step indices on which no block runs."""
    full = full_steps(policy.N, indices, total)
    return frozenset(s for s in indices if s not in full)
