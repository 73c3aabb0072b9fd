"""The formula of every score (ToCa, section 3.2); ``plan/scores.py`` says when each is known.

    S = w_self s1 + w_value |v| + w_key |k| + w_small sum_h (1 - |v_h|)
        + w_cross s2  +  w_stale n / N0  (+ w_random u)

and then the spatial bonus. w_small is of DuCa, whose score is often negative. A score that is made
of an attention is put into the step graphs, beside the attention or with it; all others are
computed ahead of a step, for all sites at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from toca_fx.kernels import influence

Operand = Literal["query", "key", "value"]
Option = Literal["every", "share"]


@dataclass(frozen=True)
class OfAttention:
    """A score that is made of an attention.

    ``formula`` takes the operands ``reads``, [B, H, tokens, width] each, then the scale if
    ``scaled``, then ``options`` by keyword, and returns [B, tokens]. ``attention``, if there is
    one, stands in for scaled_dot_product_attention and returns its output and the score; ``of_map``
    makes the score of a map [B, H, N, M] that the graph has. ``every`` is the distance of the
    queries that count, ``share`` what a map is scaled by. A ``skippable`` one takes ``read`` too,
    and does without the score where that is false.
    """

    reads: tuple[Operand, ...]
    formula: Callable[..., Tensor]
    scaled: bool = False
    options: tuple[Option, ...] = ()
    attention: Callable[..., tuple[Tensor, Tensor]] | None = None
    of_map: Callable[..., Tensor] | None = None
    skippable: bool = False


OF_ATTENTION: Mapping[str, OfAttention] = {
    "value_norm": OfAttention(("value",), influence.feature_norm),
    "key_norm": OfAttention(("key",), influence.feature_norm),
    "small_values": OfAttention(("value",), influence.smallness),
    "self_attention": OfAttention(
        ("query", "key"),
        influence.influence,
        scaled=True,
        options=("every",),
        attention=influence.attention_and_influence,
        of_map=influence.map_influence,
        skippable=True,
    ),
    "cross_attention": OfAttention(
        ("query", "key"),
        influence.entropy,
        scaled=True,
        options=("share",),
        attention=influence.attention_and_entropy,
        of_map=influence.map_entropy,
    ),
}


@dataclass(frozen=True)
class Ahead:
    """What is known of S sites ahead of a step.

    ``stale`` [S, B, N] says for how many steps each token has not been computed; ``generator``
    makes random numbers, and is None on the device "meta".
    """

    stale: Tensor
    generator: torch.Generator | None


def _staleness(known: Ahead) -> Tensor:
    """The steps since a token was computed: [S, B, N]; the weight is divided by N0."""
    return known.stale


def _random(known: Ahead) -> Tensor:
    """Uniform in [0, 1): [S, 1, N].

    One draw per site and token from the token's own position: a batch's first rows get what they
    get alone.
    """
    sites, _, tokens = known.stale.shape
    stale, generator = known.stale, known.generator
    draw = torch.rand(sites, tokens, generator=generator, device=stale.device, dtype=stale.dtype)
    return draw[:, None]


AHEAD: Mapping[str, Callable[[Ahead], Tensor]] = {"staleness": _staleness, "random": _random}
DRAWS = frozenset({"random"})
"""The scores that draw random numbers, which a recorded step would draw once for all."""
