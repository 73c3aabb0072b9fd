"""What a policy says of the sampling loop, of guidance, and of the memory it may take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from toca_fx.policy.keys import key

_MAX_MEBIBYTES = 2**20

WHOLE_GRAINS = ("model", "output")
"""The grains with which no module has a memory, so that a step is full or runs no block."""


@dataclass(frozen=True)
class Sampler:
    """The default step count T, which way the step index s runs, and what timesteps mean."""

    steps: int = field(
        metadata=key(
            "Default number of steps T of one generation.",
            minimum=1,
            maximum=100000,
            examples=(50,),
            stand_in=50,
        )
    )
    order: Literal["ascending", "descending"] = field(
        default="ascending",
        metadata=key(
            "Which way the step index s runs from the first, noisiest step to the last: "
            "`ascending` 0 to T - 1, `descending` T - 1 to 0. All formulas, windows and step lists "
            "use s.",
        ),
    )
    noise: Literal["flow", "linear", "scaled_linear", "cosine"] | None = field(
        default=None,
        metadata=key(
            "How the noise level sigma, and with it the signal-to-noise ratio, follow from the "
            "model's timestep t, for `forecast.time`. `flow`: rectified flow, sigma is t / 1000 "
            "(t itself if it is at most 1). The others are the schedules of beta over 1000 "
            "timesteps as diffusers names them: `linear` from 0.0001 to 0.02, `scaled_linear` from "
            "0.00085 to 0.012 (the square root of beta is linear), `cosine` (`squaredcos_cap_v2`).",
            examples=("flow",),
        ),
    )


@dataclass(frozen=True)
class Guidance:
    """How classifier-free guidance reaches the model, and whether its halves share one selection of
    tokens.
    """

    layout: Literal["none", "batched", "separate"] = field(
        default="none",
        metadata=key(
            "`none`: no guidance. `batched`: the conditional and unconditional rows are two halves "
            "of one batch. `separate`: the branches are called one after the other. They are told "
            "apart by their conditions, or by `toca_fx.branch(name)`; the key matters where "
            "timesteps are not read, on a GPU in a session: there a call with new conditions is "
            "another branch, and not the next step.",
        ),
    )
    selection: Literal["independent", "shared"] = field(
        default="independent",
        metadata=key(
            "`independent`: each row selects its own tokens. `shared`: both halves of a batch "
            "share one selection, by their mean score (`scores.cross_attention`: by the entropy "
            "over both halves' maps side by side); needs layout `batched`. A batch of an odd "
            "number of rows has no halves: the model is called without guidance, and each row "
            "selects its own tokens, with a warning. Of an even batch nothing tells whether its "
            "halves are one set of images twice: call a model without guidance under a policy with "
            "`independent`.",
        ),
    )


@dataclass(frozen=True)
class Cache:
    """The type in which outputs are kept, "model" or the name of one in torch; and for what there
    is a cache of its own.
    """

    dtype: str = field(
        default="model",
        metadata=key(
            "The type in which cached outputs (and keys and values, where attention is computed "
            "for fresh tokens) are kept. `model`: that of the model. A smaller one takes less "
            "memory and rounds what partial steps reuse; full steps stay exact. Values are not "
            "scaled: beyond the range of a type (448 for float8_e4m3fn, 57344 for float8_e5m2, "
            "65504 for float16) they are clipped or become infinite.",
            choices=("model", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"),
            examples=("bfloat16",),
        ),
    )
    grain: Literal["module", "block", "model", "output"] = field(
        default="module",
        metadata=key(
            "What has a cache of its own. `module`: every module; its gate is applied anew on "
            "every step. `block`: modules that follow each other in a block, and are always reused "
            "together, share one cache, of all that they add to the stream, as it was gated on the "
            "last full step. Where whole blocks are reused, it takes a half or a third of the "
            "memory; where MLPs select tokens, which no cache can be shared with, nothing changes. "
            "`model`: the state in front of the output layers alone; between full steps no block "
            "runs. `output`: what the model returns, which is smaller yet; between full steps "
            "nothing runs.",
            examples=("block",),
        ),
    )


@dataclass(frozen=True)
class Hoisting:
    """`memory` in MiB that values may take which are computed ahead of the steps, once per
    generation; 0: nothing is hoisted.
    """

    memory: int = field(
        default=1024,
        metadata=key(
            "How much memory such values may take, in MiB. 0: nothing is hoisted.",
            minimum=0,
            maximum=_MAX_MEBIBYTES,
        ),
    )

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return self.memory * 2**20


@dataclass(frozen=True)
class Recording:
    """`memory` in MiB that recorded steps may keep between generations; 0: nothing is recorded."""

    memory: int = field(
        default=256,
        metadata=key(
            "How much memory recorded steps may keep, in MiB. 0: nothing is recorded.",
            minimum=0,
            maximum=_MAX_MEBIBYTES,
        ),
    )

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return self.memory * 2**20
