"""What may happen: sampling runs as users write them, in any order, and weights that change."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from hypothesis import strategies as st

# The timesteps of one branch's calls. Integers go to the model as int64, others as float32.
SCHEDULES: dict[str, tuple[float, ...]] = {
    "ddim": (999, 799, 599, 400, 200, 0),
    "trailing": (999, 832, 666, 499, 333, 166),
    "five": (999, 749, 500, 250, 0),
    "eight": (999, 856, 714, 571, 428, 285, 143, 0),
    "img2img": (599, 400, 200, 0),
    "one": (999,),
    "flow": tuple(1 - s / 6 for s in range(6)),
    "rising": tuple(s / 6 for s in range(6)),
    "heun": (999, 666, 666, 333, 333, 0, 0),
    "restart": (999, 799, 599, 799, 599, 400, 200, 0),
}
REPEATING = ("heun", "restart")

# Who holds a run's session, and where its steps are run.
PLACES = [
    ("none", "main"),
    ("none", "thread"),
    ("none", "threads"),  # a new one for each step
    ("none", "task"),
    ("none", "tasks"),
    ("block", "main"),  # a with statement around the loop; other runs nest in it
    ("block", "thread"),
    ("block", "task"),
    ("block", "to_thread"),
    ("handle", "main"),  # entered around each step
    ("handle", "thread"),
    ("handle", "threads"),
    ("handle", "task"),
    ("handle", "tasks"),
    ("generator", "main"),  # a generator function with a with statement
    ("generator", "threads"),
]

# The branches of a step in their order, and the steps at which each is called (None: all).
GUIDANCE: dict[str, dict[str, Any]] = {
    "off": {"cond": None},
    "on": {"cond": None, "uncond": None},
    "late": {"cond": None, "uncond": range(2, 99)},
    "early": {"cond": None, "uncond": range(3)},
    "pausing": {"cond": None, "uncond": (0, 1, 4, 5, 6, 7)},
    "third": {"cond": None, "uncond": None, "third": None},
    "perturbed": {"cond": None, "uncond": None, "third": range(1, 4)},  # third has cond's prompt
}


@dataclass(frozen=True)
class Failure:
    """The call of ``branch`` at step ``step`` fails: in the inner backend (``line`` 0), or at the
    line of that number that it runs in toca_fx. Then it is made again, or the run is given up.
    """

    step: int
    branch: int
    line: int
    gives_up: bool


@dataclass(frozen=True)
class Sampling:
    """One run.

    ``told`` is what its session is told. ``first`` says which branch a step begins with,
    ``named`` whether branches are told, ``tiles`` that every step is made for two of them.
    ``prompt`` and ``negative`` are tensors of the run's own, of a pool that outlives it, or made
    anew at every call. It stops before step ``stop``; from step ``halves`` on its batch is 1.
    """

    place: tuple[str, str] = ("none", "main")
    told: str = "timesteps"
    schedule: str = "ddim"
    guidance: str = "off"
    first: str = "cond"
    named: bool = False
    tiles: bool = False
    prompt: str = "own"
    negative: str = "own"
    batch: int = 2
    length: int = 6
    stop: int | None = None
    halves: int | None = None
    failures: tuple[Failure, ...] = ()

    def __repr__(self) -> str:
        return _short(self)

    @property
    def times(self) -> tuple[float, ...]:
        return SCHEDULES[self.schedule]


@dataclass(frozen=True)
class Sequence:
    """Runs, the order in which they make steps, and what happens to weights before some turn.

    ``outer`` is the session that is open all the while; runs without one of their own are in it.
    """

    samplings: tuple[Sampling, ...]
    turns: tuple[int, ...]
    weights: tuple[tuple[int, str], ...] = ()
    outer: str = "none"
    seed: int = field(default=0, compare=False)

    def __repr__(self) -> str:
        lines = [f"outer session: {self.outer}", *map(repr, self.samplings)]
        lines += [f"turns {self.turns}", f"weights {self.weights}"]
        return "\n  ".join(["Sequence", *lines])


def _short(of: Any) -> str:
    """Its fields but for those that are as usual."""
    said = (
        f"{each.name}={getattr(of, each.name)!r}"
        for each in fields(of)
        if getattr(of, each.name) != each.default
    )
    return f"{type(of).__name__}({', '.join(said)})"


WEIGHTS = ("write", "replace", "move", "data", "unseen write", "other dtype")


@st.composite
def failures(draw: st.DrawFn) -> tuple[Failure, ...]:
    count = draw(st.sampled_from([0] * 6 + [1, 1, 2]))
    return tuple(
        Failure(
            draw(st.integers(0, 5)),
            draw(st.integers(0, 1)),
            draw(st.one_of(st.just(0), st.integers(1, 600))),
            draw(st.sampled_from([False, False, True])),
        )
        for _ in range(count)
    )


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    guidance = draw(st.sampled_from([*GUIDANCE, "off", "on", "on", "on"]))
    named = draw(st.booleans())
    batch = draw(st.sampled_from([1, 2, 2]))
    return Sampling(
        place=draw(st.sampled_from([*PLACES, *[("none", "main")] * 4, *[("block", "main")] * 2])),
        told=draw(st.sampled_from(["timesteps"] * 4 + ["number"] * 4 + ["wrong", "misprint"])),
        schedule=draw(st.sampled_from([*SCHEDULES, *["ddim"] * 8])),
        guidance=guidance,
        first=draw(st.sampled_from(["cond", "uncond"])),
        named=named,
        tiles=named and draw(st.sampled_from([False] * 4 + [True])),
        prompt=draw(st.sampled_from(["own", "own", "pool 0", "pool 0", "pool 1", "rebuilt"])),
        negative=draw(st.sampled_from(["own", "own", "pool 2", "rebuilt"])),
        batch=batch,
        length=draw(st.sampled_from([6, 6, 6, 10])),
        stop=draw(st.sampled_from([None] * 6 + [1, 2, 4])),
        halves=draw(st.sampled_from([None] * 8 + [1, 3])) if batch == 2 else None,
        failures=draw(failures()),
    )


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    runs = draw(st.lists(samplings(), min_size=1, max_size=4))
    if draw(st.booleans()):  # the same again: what was learnt of the first
        runs += [runs[0]] * draw(st.integers(1, 2))
    count = len(runs)
    in_turn = [at for at in range(count) for _ in range(8)]
    turns = draw(st.one_of(st.just(in_turn), st.permutations(in_turn), st.permutations(in_turn)))
    changes = st.tuples(st.integers(0, 16), st.sampled_from(WEIGHTS))
    none = st.just(())
    return Sequence(
        tuple(runs),
        tuple(turns),
        tuple(draw(st.one_of(none, none, none, st.lists(changes, max_size=2).map(tuple)))),
        draw(st.sampled_from(["none"] * 5 + ["one number", "one list", "all"])),
        draw(st.integers(0, 2**16)),
    )
