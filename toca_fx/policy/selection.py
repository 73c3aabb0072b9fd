"""Which tokens are computed on a partial step: R, their scores, and how they are spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

from toca_fx.policy.keys import Key, Score, key, keys_of


@dataclass(frozen=True)
class Ratio:
    """R: the share of stale tokens, 0 to 1, before its slopes.

    Computed share rho = clamp((1 - base) * step_factor * layer_factor * module weight, 0, 1) with
    step_factor = 1 + w - 2 w s/T (w = `step_weight`) and layer_factor = 1 + w - 2 w l/layer_span (w
    = `layer_weight`). A `layer_span` of None stands for the number of layers less one. K is rounded
    up to a multiple of `multiple`.
    """

    base: float = field(
        metadata=key(
            "Share of tokens that stay stale (taken from the cache) on a partial step, before the "
            "slopes: 0.93 computes 7 % of them. 0 computes all, 1 none. The paper's R.",
            minimum=0,
            maximum=1,
            examples=(0.93, 0.7),
            stand_in=0.0,
        )
    )
    step_weight: float = field(
        default=0.0,
        metadata=key(
            "Slope w of the computed share over the steps: it is multiplied by 1 + w - 2 w s/T. "
            "Above 0 more is computed at small step indices s, below 0 at large ones. Negative "
            "products count as 0, so beyond -1 and 1 one end computes nothing. No unit.",
            minimum=-10,
            maximum=10,
            examples=(2.0, -0.9),
        ),
    )
    layer_weight: float = field(
        default=0.0,
        metadata=key(
            "Slope w of the computed share over the layers: it is multiplied by "
            "1 + w - 2 w l/layer_span. Above 0 more is computed in the first layers, below 0 in "
            "the last ones. No unit.",
            minimum=-10,
            maximum=10,
            examples=(-0.2, 0.6),
        ),
    )
    layer_span: int | None = field(
        default=None,
        metadata=key(
            "The layer number at which the slope over the layers has run its course. Default: the "
            "number of layers - 1. The authors use 27 throughout.",
            minimum=1,
            maximum=10000,
            examples=(27,),
        ),
    )
    multiple: int = field(
        default=1,
        metadata=key(
            "The number of fresh tokens is rounded up to a multiple of it, if it is not 0: tensor "
            "cores like multiples of 8 or 16.",
            minimum=1,
            maximum=4096,
            examples=(16,),
        ),
    )


def _weight(description: str, score: Score, examples: tuple[object, ...] = ()) -> dict[str, Key]:
    """The metadata of a score's weight; ``kernels/scores.py`` has its formula."""
    return key(description, minimum=0, maximum=1000, examples=examples, score=score)


@dataclass(frozen=True)
class Scores:
    """Weights (no unit) of the token scores; `staleness_over` is in steps, None stands for
    `N.base`.

    `queries` is the share of an attention's queries that `self_attention` looks at, 0.001 to 1.
    """

    self_attention: float = field(
        default=0.0,
        metadata=_weight(
            "Weight of s1, a token's influence on others: the column sums of the map of the same "
            "block's self- or joint attention, L2-normalised over the tokens. The most influential "
            "tokens are computed first.",
            Score("full", "influence"),
            examples=(1.0,),
        ),
    )
    cross_attention: float = field(
        default=0.0,
        metadata=_weight(
            "Weight of s2, how undecided a token is about the text: the entropy "
            "H = -sum c ln(c + 1e-7) of its row c in the head-mean map of the same block's "
            "cross-attention; 1 + H, L2-normalised over the tokens. High entropy is computed "
            "first. Where that cross-attention is computed on the same step, an MLP sees the "
            "renewed rows.",
            Score("inside", "entropy"),
            examples=(1.0,),
        ),
    )
    staleness: float = field(
        default=0.0,
        metadata=_weight(
            "Weight of s3, the number of partial steps since the token was last computed, divided "
            "by `staleness_over`. Keeps tokens from being forgotten.",
            Score("ahead"),
            examples=(0.25,),
        ),
    )
    staleness_over: int | None = field(
        default=None,
        metadata=key(
            "The number of steps that the staleness is divided by. Default: `N.base` (with "
            "`full_steps` only: the mean interval of the list).",
            minimum=1,
            maximum=1000,
            examples=(3,),
        ),
    )
    value_norm: float = field(
        default=0.0,
        metadata=_weight(
            "Weight of the L2 norm of a token's value vector. Needs no attention map.",
            Score("full", "influence"),
        ),
    )
    key_norm: float = field(
        default=0.0,
        metadata=_weight(
            "Weight of the L2 norm of a token's key vector. Needs no attention map.",
            Score("full", "influence"),
        ),
    )
    small_values: float = field(
        default=0.0,
        metadata=_weight(
            "Weight of DuCa's score, by which tokens with small values come first: the sum over "
            "the heads of 1 - |v|, v a token's value vector, L2-normalised over the tokens. It is "
            "negative where values are longer than 1; `spatial.bonus` then lowers the best token "
            "of each block. Needs no attention map.",
            Score("full", "influence"),
            examples=(1.0,),
        ),
    )
    random: float = field(
        default=0.0,
        metadata=_weight(
            "Weight of a uniform random number between 0 and 1, drawn with `seed`. A baseline to "
            "compare with.",
            Score("ahead"),
        ),
    )
    queries: float = field(
        default=1.0,
        metadata=key(
            "The share of an attention's queries that `self_attention` looks at, evenly spread: "
            "every n-th, where n is round(1 / queries), plus 1 if that is even (an even n would "
            "look at the same few columns of most token grids). s1 is then an estimate, for less "
            "time: on a GPU the whole of it takes up to half as long as the attention. Of several "
            "sites that one attention judges the largest share counts.",
            minimum=0.001,
            maximum=1,
            examples=(0.2,),
            serves="self_attention",
        ),
    )

    @property
    def weights(self) -> dict[str, float]:
        """The weights that are not 0, by the name of their score."""
        weights = {name: float(getattr(self, name)) for name in scores_of(type(self))}
        return {name: weight for name, weight in weights.items() if weight}

    @property
    def every(self) -> int:
        """`self_attention` looks at the queries 0, `every`, 2 `every`, ...: 5 for a share of 0.25
        or 0.2, 3 for a half.

        It is odd. The rows of most token grids have an even length, and an even number would look
        at a few of the columns only.
        """
        every = round(1 / self.queries)
        return every if every % 2 else every + 1


def scores_of(declaring: type = Scores) -> Mapping[str, Score]:
    """The registry of scores by name, in the order of the format."""
    return _scores_of(declaring)


@cache
def _scores_of(declaring: type) -> Mapping[str, Score]:
    found = {declared.field: declared.key.score for declared in keys_of(declaring)}
    return MappingProxyType({name: score for name, score in found.items() if score is not None})


@dataclass(frozen=True)
class Spatial:
    """In each block of `grid` x `grid` tokens the best score is multiplied by 1 + `bonus`."""

    bonus: float = field(
        metadata=key(
            "The best token's score in each block is multiplied by 1 + bonus. The paper's weight "
            "of s4. No unit.",
            minimum=0,
            maximum=100,
            examples=(0.6, 0.4),
            stand_in=0.0,
        )
    )
    grid: int = field(
        default=2,
        metadata=key(
            "Side of a block, in tokens.",
            minimum=2,
            maximum=64,
            examples=(2, 4),
            serves="bonus",
        ),
    )
