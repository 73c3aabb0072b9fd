"""What a pass did to a draft, as data: for logs, and for ``toca_fx.explain``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gather:
    """A gather of the fresh tokens of ``site`` that does not sit at the stream.

    It sits behind the operator ``behind``, which cannot be restricted to fresh tokens. ``whole``
    are the operators that run on all tokens because of that.
    """

    site: int
    behind: str
    whole: tuple[str, ...]

    def __str__(self) -> str:
        if not self.whole:
            return f"the gather sits behind {self.behind}"
        *others, last = self.whole
        names = f"{', '.join(others)} and {last} run" if others else f"{last} runs"
        return f"the gather sits behind {self.behind}, so that {names} on all tokens"


@dataclass(frozen=True)
class PassReport:
    """What one pass did: ``nodes`` is by how many the graph became longer.

    ``sites`` are the indices of those that it changed something for, ``gathers`` those that it
    could not move up to the stream.
    """

    name: str
    sites: tuple[int, ...] = ()
    gathers: tuple[Gather, ...] = ()
    nodes: int = 0

    def __str__(self) -> str:
        changed = f"{abs(self.nodes)} nodes {'added' if self.nodes >= 0 else 'removed'}"
        sites = [f"{len(self.sites)} sites"] if self.sites else []
        gathers = dict.fromkeys(map(str, self.gathers))
        return f"{self.name}: {'; '.join([*sites, changed, *gathers])}"
