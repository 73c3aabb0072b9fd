"""The generations of one model in one session: which of them a call belongs to."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from toca_fx.lower.locks import new_lock
from toca_fx.runtime.clock import Decision, Told
from toca_fx.runtime.generation import Generation
from toca_fx.runtime.identity import Agreement, agreement
from toca_fx.runtime.models import ModelKey
from toca_fx.runtime.runner import Runner
from toca_fx.runtime.schedules import Timestep

_MANY_STEPS = 8


def caller() -> Any:
    """The asyncio task that runs now, else the thread."""
    if asyncio._get_running_loop() is None:
        return threading.current_thread()
    return asyncio.current_task() or threading.current_thread()


class Generations:
    """The generations of one ``model``, least recently called first; there are ``most`` at most.

    ``told`` is what was said of the run, None outside of any session. ``begun`` says that the model
    has been called here, ``moves`` that a generation went from one thread or task to another,
    ``waits`` that reading a timestep waited for the device, ``crowded`` that a generation had to go
    in its middle, and ``said`` is what the user was told of the image under way.
    """

    def __init__(self, model: ModelKey, told: Told | None, most: int) -> None:
        self._model, self.told = weakref.ref(model), told
        self.begun = self.moves = self.waits = self.crowded = False
        self.lock = new_lock()
        self.said: set[str] = set()
        self._last: Timestep | None = None
        self._way = 0.0
        self.all: list[Generation] = []
        self._most = most

    @property
    def model(self) -> ModelKey:
        """The model, which holds what is known of it outside of any session."""
        model = self._model()
        if model is None:
            raise AssertionError("its call holds it")
        return model

    def find(
        self,
        conditions: Sequence[Tensor],
        path: tuple[str, ...],
        runner: Runner,
        timestep: Timestep | None,
    ) -> tuple[Generation | None, Agreement, bool]:
        """The generation with these conditions and branch, and whether it is somebody else's.

        None: there is none, or nobody can tell which. How far its conditions agree comes too. In a
        session with one call per step inputs that are new at every call identify nothing: there it
        is the one that goes on.
        """
        known = self._of_one_code(path, runner)
        found = {each: agreement(each.marks, conditions) for each in known}
        same = [each for each in known if found[each] in ("equal", "same") and not each.running]
        same = [each for each in same if each.runner is runner] or same
        mine = [each for each in known if each.runner is runner] or known
        if len(same) > 1 and not self.moves:  # else threads tell nothing
            same = [each for each in same if each.owner() is caller()][:1]
        if len(same) == 1:
            return same[0], found[same[0]], _is_foreign(same[0])
        if self.told is None or any(each in ("equal", "same") for each in found.values()):
            return None, "other", False
        alone = self._alone(mine)
        if alone is None or alone.running:
            return None, "other", False
        # Without a timestep two calls of one step look like two steps.
        timed = runner.program.analysis.inputs.timestep is not None
        unread = timed and timestep is None
        if found[alone] == "rebuilt":
            one_call = not conditions or (timed and not (unread and self.model.several))
            return (alone, "rebuilt", False) if one_call else (None, "other", False)
        moves_on = timestep is not None and timestep != alone.progress.timestep
        if moves_on and not alone.repeated and (alone.renewed or self.model.renews):
            self.model.renews = True
            return alone, "other", False
        return None, "other", False

    def overtaken(self, found: Generation) -> bool:
        """Whether its branch of its run was called since, at the same sizes in another dtype.

        Then ``found`` has missed a call, for all that anybody knows.
        """
        own = found.runner.program.analysis
        for later in self.all[self.all.index(found) + 1 :]:
            if later.runner is found.runner or later.path != found.path:
                continue
            other = later.runner.program.analysis
            if later.run is found.run and other.sizes == own.sizes and other.dtype != own.dtype:
                return True
        return False

    def _of_one_code(self, path: tuple[str, ...], runner: Runner) -> list[Generation]:
        """The generations that ran the same code at the same shapes, perhaps captured anew."""
        found = [each for each in reversed(self.all) if each.path == path]
        if all(each.runner is runner for each in found):
            return found
        code = runner.program.analysis.code
        return [each for each in found if each.runner.program.analysis.code == code]

    def _alone(self, mine: Sequence[Generation]) -> Generation | None:
        """The only one of ``mine`` that has come as far as its run; None if there are several."""
        if not mine:
            return None
        newest = mine[0]
        abreast = [
            each
            for each in mine
            if each.run is newest.run and each.progress.position == newest.progress.position
        ]
        return newest if len(abreast) == 1 else None

    def head(self, current: Generation | None) -> Generation | None:
        """The generation called last, of the same run; None: there was no call."""
        for each in reversed(self.all):
            same_run = current is None or each.run is current.run
            if same_run and each.progress.calls:
                return each
        return None

    def join(
        self,
        begun: Generation,
        decision: Decision,
        newest: Generation | None,
        conditions: Sequence[Tensor],
        timestep: Timestep | None,
    ) -> None:
        """Put a generation that begins into the run that it is a branch of, if it is of one.

        Outside of any session nobody tells; but what the caller has just called at this very step
        is most likely another branch, and a gate decides on both together. Otherwise it would
        decide on each.
        """
        if self.told is not None:
            if newest is None:
                return
            begun.progress = replace(begun.progress, direction=newest.progress.direction)
            self._forget_overtaken(begun, conditions)
            if decision.place == "branch":
                begun.join(newest, timestep)
                same = timestep is not None and timestep == newest.progress.timestep
                self.model.several |= same
            return
        last = self.all[-1] if self.all else None
        if last is None or last.owner() is not caller():
            return
        at_once = timestep is not None and timestep == last.progress.timestep
        if decision.position == last.progress.position - 1 and (
            at_once or decision.place == "branch"
        ):
            begun.run.choices = last.run.choices

    def _forget_overtaken(self, begun: Generation, conditions: Sequence[Tensor]) -> None:
        """Let those keep nothing that had the same conditions at another shape or dtype.

        ``begun`` may have taken a step of theirs; where timesteps repeat nobody could tell later.
        """
        for each in self.all:
            other = each.path == begun.path and each.runner is not begun.runner
            alike = other and len(each.marks) == len(conditions)
            if alike and agreement(each.marks, conditions) in ("equal", "same"):
                each.forget()

    def moved(self, timestep: Timestep | None) -> None:
        """Note the timestep of a call; where it turns back another image has begun."""
        last, self._last = self._last, timestep
        if last is None or timestep is None:
            return
        moved = sum(timestep) / len(timestep) - sum(last) / len(last)
        if moved * self._way < 0:
            self.said.clear()
        self._way = self._way or moved

    def add(self, begun: Generation, instead_of: Generation | None) -> None:
        """Put a new generation in, in the place of an old one."""
        if instead_of is not None:
            self.drop(instead_of)
        if self.told is None:  # nothing but its conditions tells it, and they are no more
            for each in [each for each in self.all if each.unknowable and not each.running]:
                self.drop(each)
        self.all.append(begun)
        while len(self.all) > self._most:
            idle = [each for each in self.all if not each.running]
            if not idle:
                break
            going = next((each for each in idle if each.over), idle[0])
            self.crowded = self.crowded or going.storage is not None
            self.drop(going)

    def drop(self, old: Generation) -> None:
        """Forget a generation; its memories go."""
        if old in self.all:
            self.all.remove(old)
        model = self._model()
        if model is not None:
            model.schedules.end(old.progress.trail)
        old.close()
        for part in old.parts.values():
            part.close()

    def called(self, generation: Generation) -> None:
        """Note that a call of ``generation`` has been made.

        Branches that have not come for many steps give their memories back.
        """
        if generation in self.all:  # at once: an interrupt may come in between
            self.all = [*(each for each in self.all if each is not generation), generation]
        self.begun = True
        for each in self.all:
            behind = generation.progress.position - each.progress.position
            if each.run is generation.run and behind > _MANY_STEPS and not each.running:
                each.close()


def _is_foreign(generation: Generation) -> bool:
    """Whether another thread or task runs a generation, and has not ended."""
    owner = generation.owner()
    if owner is None or owner is caller():
        return False
    if isinstance(owner, threading.Thread):
        return owner.is_alive()
    return not owner.done()


def owned_by_caller() -> weakref.ref[Any]:
    """A reference to who calls."""
    return weakref.ref(caller())
