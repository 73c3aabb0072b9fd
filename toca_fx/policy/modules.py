"""What happens to each type of module on a partial step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from toca_fx.policy.keys import Key, key, keys_of

Mode: TypeAlias = Literal["reuse", "compute", "partial"]

ACTION_TITLE = "`reuse`, `compute` or {weight: ...}"


@dataclass(frozen=True)
class Action:
    """What happens to a module on a partial step; `weight` multiplies the computed share and counts
    for "partial" only.

    In the file it is a word, the mode, or {weight: w}, which stands for "partial".
    """

    mode: Mode
    weight: float = field(
        default=1.0,
        metadata=key(
            "Factor on the computed share of these modules: 2.5 computes two and a half times the "
            "share that R leaves. The paper's r_type. No unit.",
            exclusive_minimum=0,
            maximum=100,
            examples=(2.5,),
            required=True,
        ),
    )

    @property
    def in_file(self) -> object:
        """The action in the form of the file."""
        return {"weight": self.weight} if self.mode == "partial" else self.mode


def _module(description: str, *examples: object) -> dict[str, Key]:
    """The metadata of a type of module."""
    return key(description, title=ACTION_TITLE, examples=examples)


@dataclass(frozen=True)
class Modules:
    """The action for each type of module, in the form of the file."""

    self_attention: Action = field(
        default=Action("reuse"),
        metadata=_module(
            "Self-attention. With {weight: w} only the queries of the fresh tokens are computed; "
            "keys and values come from a cache in which the fresh tokens' rows are renewed. The "
            "paper reuses it: partly computed self-attention came out worse.",
            "reuse",
            {"weight": 0.5},
        ),
    )
    cross_attention: Action = field(
        default=Action("reuse"),
        metadata=_module(
            "Cross-attention to a text. With {weight: w} only the queries of the fresh tokens are "
            "computed, over all of the text; on a partial step it renews the fresh tokens' rows of "
            "the map behind `scores.cross_attention` before the block's MLP selects.",
            {"weight": 0.6},
            "reuse",
        ),
    )
    joint_attention: Action = field(
        default=Action("reuse"),
        metadata=_module(
            "Joint attention (image and text tokens in one attention). With {weight: w} as "
            "self-attention: the queries of the fresh tokens, over cached keys and values in which "
            "their rows are renewed.",
            "reuse",
            {"weight": 0.5},
        ),
    )
    mlp: Action = field(
        default=Action("partial"),
        metadata=_module(
            "MLPs. The paper moves to them what it saves on attention, with weights of up to 2.5.",
            {"weight": 2.5},
            "reuse",
        ),
    )


MODULE_TYPES = tuple(kind.name for kind in keys_of(Modules))
