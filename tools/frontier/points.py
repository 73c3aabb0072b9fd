"""A point of the curve: a sampler on steps or on a grid, under a policy, a peer or uncached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toca_fx.policy import load_policy, shipped_policies
from tools.frontier.peers import Peer, peer_of


@dataclass(frozen=True)
class Point:
    """One way to sample.

    ``text`` names it in results. ``timesteps`` are those of a grid, or the number of even steps.
    ``source`` is where its policy comes from, ``policy`` what that says; None: uncached. Under a
    ``peer`` there is no source, and ``policy`` is what the peer says.
    """

    text: str
    sampler: str
    timesteps: int | tuple[float, ...]
    source: str | None = None
    policy: Mapping[str, Any] | None = None
    peer: Peer | None = None

    @property
    def steps(self) -> int:
        """How often the model is called."""
        return self.timesteps if isinstance(self.timesteps, int) else len(self.timesteps)

    @property
    def grid(self) -> list[float] | None:
        """The timesteps of a grid; None: even steps."""
        return None if isinstance(self.timesteps, int) else list(self.timesteps)

    @property
    def digest(self) -> str:
        """A name for files: of what is sampled, whatever it is called."""
        says = json.dumps([self.sampler, self.timesteps, self.policy], sort_keys=True, default=str)
        return hashlib.sha256(says.encode()).hexdigest()[:12]


def parse(
    text: str, samplers: Collection[str], grids: Mapping[str, Sequence[float]] | None = None
) -> Point:
    """The point that ``text`` names: ``[POLICY+]SAMPLER:STEPS`` or ``[POLICY+]SAMPLER:GRID``.

    In the place of a policy there may be a peer.

    Raises:
        ValueError: it has another form, or names a sampler or a grid that is not there, or a peer
            that is not installed or not set so.
        PolicyError: its policy is not there, or has problems.
    """
    grids = grids or {}
    how, _, at = text.rpartition(":")
    sampler = next((name for name in samplers if how == name or how.endswith(f"+{name}")), None)
    if sampler is None:
        raise ValueError(
            f"{text}: expected [POLICY+]SAMPLER:STEPS, and one of {', '.join(samplers)} as SAMPLER"
        )
    if at.isdecimal() and int(at) > 0:
        timesteps: int | tuple[float, ...] = int(at)
    elif at in grids:
        timesteps = tuple(grids[at])
    else:
        known = ", ".join(grids) or "none were given: --grids"
        raise ValueError(f"{text}: {at!r} is neither a number of steps nor a grid ({known})")
    source = how[: -len(sampler) - 1] if how != sampler else None
    if source is None:
        return Point(text, sampler, timesteps)
    peer = peer_of(source, timesteps if isinstance(timesteps, int) else len(timesteps))
    if peer is not None:
        return Point(text, sampler, timesteps, policy=peer.says, peer=peer)
    name = source if source in shipped_policies() else Path(source).stem
    return Point(f"{name}+{sampler}:{at}", sampler, timesteps, source, _says(source))


def _says(source: str) -> Mapping[str, Any]:
    """What a policy says, as plain data."""
    load_policy(source)  # raises with every problem that it has
    file = shipped_policies().get(source, Path(source).expanduser())
    says: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    del says["name"]
    says.pop("description", None)
    return says
