"""What matching found in a graph, as plain data: sites and near misses.

Nothing here imports torch, so that plans can be made and drawn without it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One matched module. Nodes are named, not referenced, so that a site is plain data.

    ``output`` is the node whose value is cached, [batch, tokens, channels]. ``anchor`` is the
    attention's result, or the first linear of an MLP. ``segment`` is the row of an attention's map
    from which on the rows are the tokens of the output; None if they are others (windows, say).
    ``influence`` and ``entropy`` are indices, among the sites, of the self- or joint attention that
    gives s1 of this site's tokens, and of the cross-attention in which they are the queries.
    ``projections`` are the keys and values of an attention as nodes [batch, tokens, width].
    ``residual`` is the add that joins the output, gated, to the ``stream``. ``follows`` is the site
    of the block that changed the stream last, if nothing but this site reads the state between
    them, or that ends in the same add; and if neither add joins anything to the stream that is no
    site. ``whole`` says that something in it may mix tokens: all are computed, or none.
    """

    kind: str
    path: str
    layer: int
    block: str
    output: str
    anchor: str
    shape: tuple[int, int, int]
    influence: int | None = None
    entropy: int | None = None
    segment: int | None = None
    packed: bool = False
    projections: tuple[str, ...] = ()
    residual: str = ""
    stream: str = ""
    follows: int | None = None
    whole: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens of the cached output."""
        return self.shape[1]


@dataclass(frozen=True)
class NearMiss:
    """Something that looks like a site and is none, and why."""

    kind: str
    path: str
    reason: str


OUTSIDE = (
    "it lies outside the numbered blocks (no index in its module path, and no module like it "
    "beside it)"
)


@dataclass(frozen=True)
class Matches:
    """All sites of a graph in execution order, and what came close.

    ``outputs`` are what the model returns, and ``states`` what it is in front of the output layers,
    as sites of these kinds; if there are no states, ``uncut`` says why. ``first_block`` are the
    residual stream in front of the first block and behind it, nodes of one shape; () if there is no
    block.
    """

    sites: tuple[Site, ...]
    misses: tuple[NearMiss, ...]
    outputs: tuple[Site, ...] = ()
    states: tuple[Site, ...] = ()
    uncut: str = ""
    first_block: tuple[str, ...] = ()

    @property
    def is_block(self) -> bool:
        """Whether the graph is that of a block, not of a model: it has modules and no blocks."""
        return not self.sites and any(miss.reason == OUTSIDE for miss in self.misses)
