"""What the clock says to the user: what it saw, and what to do."""

from __future__ import annotations

from toca_fx.runtime.schedules import Timestep

_SESSION = "`with toca_fx.session(timesteps=...)` around the sampling run"

NO_TIMESTEP = (
    "no argument of the model is recognised as the timestep, so that nothing tells its steps apart "
    "and every one of them is full; put `with toca_fx.session(num_steps=...)` around the run"
)
NO_CONDITIONS = (
    "the model has no condition (caption, label, mask) that stays the same from call to call, so "
    f"that nothing tells its runs apart and every step is full; put {_SESSION}"
)
SAME_TIMESTEP = (
    "two calls in a row had the same timestep and the same conditions, so that the next step is "
    "full. If they are guidance branches, wrap each kind of call in toca_fx.branch(name); if a "
    "second-order sampler makes them, or two runs take turns, put each run into a "
    "toca_fx.session(timesteps=...) that lists the timestep of every call"
)
LISTED_ONCE = (
    "two calls had the same timestep and the same conditions, and session(timesteps=...) lists it "
    "once, so that the next step is full. If they are guidance branches, wrap each kind of call in "
    "toca_fx.branch(name); if a second-order sampler makes them, list the timestep of every call"
)
LISTED_TWICE = (
    "two calls had a timestep that session(timesteps=...) lists twice, and the same latents, or "
    "conditions made anew at every call, so that they may be two of one step and the next one is "
    "full. Wrap each kind of call in toca_fx.branch(name), and make captions once, before the loop"
)
SAME_STEP = (
    "two calls came with the same step_index and the same conditions, so that the next step is "
    "full; give each branch a name of its own in cache_context(name)"
)
UNLISTED = (
    "the model is called at a timestep that is not listed, so that this step is full; "
    "session(timesteps=...) takes the values of the model's timestep argument, call by call, and a "
    "pipeline's are its scheduler's"
)
MISPLACED = (
    "the model is called at another timestep than the one that is listed for this step, so that it "
    "is full"
)
UNITS = (
    "the model is first called at another timestep than any in session(timesteps=...), so that "
    "their number counts only and modulations are computed in the calls; give the values of the "
    "model's timestep argument, call by call"
)
ROWS = (
    "the timestep of some rows of the batch turned back, so that this step is full: rows seem to "
    "have been taken over by other images. Run images that begin together in one batch, each batch "
    "in a session of its own"
)


def unseen(first: Timestep) -> str:
    """A run outside of any session, whose schedule was not seen whole before."""
    return (
        f"nobody told the steps of the run that began at timestep {first[0]:g}, and no such run "
        "was seen whole before, so that it is not cached; the next one with the same timesteps is. "
        f"To cache this one too, put {_SESSION}"
    )


def unmeasured(signal: str) -> str:
    """A gate whose signal is of what nobody knows."""
    return (
        f"gate.signal: {signal} measures latents, outputs or the first block, and what it needs is "
        "not recognised in this model: every step that the gate decides on is full. "
        "`print(toca_fx.explain(model, policy, **inputs))` shows what is"
    )


def never_open(signal: str, threshold: float) -> str:
    """A gate that left no step of a run to be cached."""
    return (
        f"gate: {signal} was at {threshold:g} or more at every step it decided on, so that nothing "
        "was cached; run.report() has its values. Take a higher `threshold`, or place full steps "
        "with toca_fx.calibrate"
    )


def beyond(num_steps: int) -> str:
    """More calls than were planned."""
    return (
        f"the model was called more often than the {num_steps} steps of its run; the calls beyond "
        "are full steps. session(num_steps=...) takes the number of model calls"
    )


_STRETCHED = ": its slopes and windows are stretched over them"


def stretched(policy: str, tuned_for: int, num_steps: int) -> str | None:
    """A ``policy`` runs another number of steps than it was ``tuned_for``; None if it does not."""
    if num_steps == tuned_for:
        return None
    return f"policy `{policy}` was tuned for {tuned_for} steps and runs {num_steps}{_STRETCHED}"


def ended_early(num_steps: int, calls: int) -> str:
    """A session ended before its last step."""
    return (
        f"the session was planned for {num_steps} steps and had {calls}, so that the policy's last "
        "steps were left out. Give session(num_steps=...) the number of model calls, or "
        "session(timesteps=...) those of the scheduler after its set_timesteps"
    )


NO_CALL = (
    "the session saw no call of a compiled model. Threads do not inherit sessions: enter it where "
    "the model is called, `with run:` around the call; and call what toca_fx.compile returned"
)
BROKEN = (
    "the model was captured in several graphs, of which each is cached by itself; compile it with "
    "fullgraph=True (toca_fx.compile does) to see where Dynamo breaks off, and leave that out"
)
BLOCK_ALONE = (
    "what is compiled is one block, as by compile_repeated_blocks: blocks alone cannot be cached, "
    "as none knows which step it is in, and they run as they are. Compile the model instead, by "
    'toca_fx.compile(model) or model.compile(backend="toca"): equal blocks are compiled once'
)
NO_GATE = (
    "the policy has a gate, which measures whole models, and this one was captured in several "
    "graphs: every step is full. Take a policy that says which steps are, by `N: {base: ...}` or "
    "`full_steps`, without `gate`"
)
KERNELS = (
    "the model says by torch.nn.attention.sdpa_kernel which kernels attention may take, and that "
    "is not followed: torch chooses one itself, and outputs differ by rounding. Leave the region "
    "out, or choose another backend of attention"
)
REBUILT = (
    "captions or other conditions are new tensors at every call, so that what depends on them only "
    "is computed at every call; make them once, before the loop"
)
CHANGING = (
    "the weights of the model, or a Python number that it computes with, are others at every step, "
    "so that every step is full; pass a number that changes from step to step (a timestep?) as a "
    "tensor, and set adapters and their scales before a run"
)
LOST = (
    "the model was called at a timestep that session(timesteps=...) does not list, and the "
    "modulations of the nearest one listed were used there. Give the values of the model's "
    "timestep argument, call by call"
)
CLOSED = (
    "toca_fx: the session is closed, and the model was called in it. Leave it "
    "(`with toca_fx.session(...)` ends with its block), or open one for this run"
)
WAITS = (
    "outside of a session the timestep is read at every call, which waits for the device; put "
    "`with toca_fx.session(timesteps=...)` around the sampling run"
)


def misfit(error: str) -> str:
    """The policy does not fit a call in the middle of a run."""
    return (
        "the policy does not fit the shapes or steps that a run has from here on, which goes on "
        f"uncached: {error}"
    )


def nothing_to_cache(misses: int) -> str:
    """No site of a model was matched."""
    return (
        "no attention or MLP of the model was matched (of this part of it, if Dynamo captured it "
        "in several), so that all of it runs at every step "
        f"({misses} near misses); `print(toca_fx.explain(model, policy, **inputs))` says why"
    )


def crowded(most: int) -> str:
    """More runs or branches are under way than are remembered."""
    return (
        f"more than {most} runs or branches of one model are under way, and the one that was "
        "called least recently was forgotten: its next step is full. Put each run into a "
        "toca_fx.session(...) of its own, and name as many branches as come again"
    )


UNNAMED = (
    "the model has no timestep argument, and was called with conditions that the session has not "
    "seen, so that this step is full. If calls are guidance branches, wrap each kind of call in "
    "toca_fx.branch(name); make captions and masks once, before the loop"
)


def is_of_the_loop(warning: str) -> bool:
    """Whether only the writer of the loop can mend what a warning says."""
    return warning == REBUILT or warning.endswith(_STRETCHED)
