"""The tensors that a step graph takes besides the model's own inputs, as plain data.

    role      part    holds                                                     shape
    cache             output of a site, before its gate                         [B, N, C]    kept
                      (of a run: what all of it adds to the stream; of the model: its state in
                      front of the output layers, or its output)
    cache     h       the same at the last full step but h, where there is a history
    weights           those of the values of a history, the newest first        [H]          kept
    keys      k       k-th projection of keys or values of an attention         [B, N, W]    kept
    score             base score of the tokens of a site                        [B, N]       kept
    entropy           entropy of a cross-attention                              [B, N]       kept
    picked            the tokens that a site computed on this step              [B, N] bool  kept
    order             all tokens of a site, best first, as rows of [B * N]      [B, N]       given
    known             score of a site but for this step's cross-attention       [B, N]       given
    ranks             0 .. K - 1: how many of them the site computes            [K]          given
    hoisted   name    what the node NAME computes from timestep and conditions  as it is     given
    read              whether a later step reads the scores of this one         [] bool, CPU given

A buffer that is kept stays over a generation and is updated in place, in the dtype of the policy
for cache and keys; one that is given is for one step. The tensors of a history are handed out anew
before each full step: it writes the oldest, which is the newest from then on. The weights of one
timeline are one tensor, which the host fills ahead of each step that reads it; it is kept by the
name of the first site. ``read`` is given on a GPU, to steps that score an attention.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Role = Literal[
    "cache",
    "weights",
    "keys",
    "score",
    "entropy",
    "picked",
    "order",
    "known",
    "ranks",
    "hoisted",
    "read",
]

FEATURES: tuple[Role, ...] = ("cache", "keys")
"""The roles kept in the dtype that the policy says."""


class Buffer(NamedTuple):
    """A tensor by its role, the index of its site, and the ``part`` if there are several.

    It is a tuple, because the buffers of all sites are looked up at every step.
    """

    role: Role
    site: int = -1
    part: int | str = ""

    @property
    def written_first(self) -> bool:
        """Whether a full step writes it before any step reads it; not so the values of a history.

        They may be read with a weight of 0, which takes no NaN away.
        """
        return self.role == "keys" or (self.role == "cache" and self.part == "")

    @property
    def name(self) -> str:
        """The name of its placeholder."""
        belongs = "" if self.site < 0 else f"_{self.site}"
        return f"{self.role}{belongs}" + ("" if self.part == "" else f"_{self.part}")


READ = Buffer("read")


def memory(site: int, history: int) -> tuple[Buffer, ...]:
    """The buffers of the last ``history`` values of a site, the newest first."""
    if history == 1:
        return (Buffer("cache", site),)
    return tuple(Buffer("cache", site, part) for part in range(history))


def hoisted(name: str) -> Buffer:
    """The buffer of a hoisted node."""
    return Buffer("hoisted", part=name)
