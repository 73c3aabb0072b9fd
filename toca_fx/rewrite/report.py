"""What a pass did to a draft, as data: for logs, and for ``toca_fx.explain``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gather:
    """The fresh tokens of ``site`` are taken out of what the operator ``behind`` returns, because
    it cannot be restricted to them. ``whole`` are the operators that run on all tokens for it.
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
    """``name`` of the pass; the ``sites`` that it changed something for, by index; the gathers that
    it could not move up to the stream; and by how many nodes the graph became longer.
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
