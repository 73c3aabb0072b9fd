"""Which model is called, and what has been learnt of it."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from toca_fx.lower.locks import new_lock
from toca_fx.lower.once import Recent
from toca_fx.runtime.schedules import Schedules

_MOST = 256  # models of one code; those with other weights are others


class ModelKey:
    """Identity of one model, across its recompilations and through all sessions.

    ``schedules`` are those that it has run, and ``untold`` its ``Generations`` outside of any
    session. ``read`` says whether the timesteps of a whole generation have been, ``several``
    whether it was called more than once at a timestep with other conditions, ``renews`` that its
    conditions are new tensors at every call.
    """

    def __init__(self) -> None:
        self.schedules = Schedules()
        self.untold: Any = None
        self.read = self.several = self.renews = False


class Models:
    """The models that run one code, by what they are made of.

    Dynamo shares code between models of one class, so that only the call shows which it is. A model
    is forgotten with the first of its tensors that goes: another may get that one's identity.
    """

    def __init__(self) -> None:
        self._keys: Recent[tuple[int, ...], tuple[ModelKey, list[Any]]] = Recent(_MOST)
        self._lock = new_lock()

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, state: Sequence[Tensor]) -> ModelKey:
        """The key of the model that has the tensors ``state``, weights and buffers."""
        identity = tuple(map(id, state))
        found = self._keys.get(identity)
        return self._new(identity, state) if found is None else found[0]

    def _new(self, identity: tuple[int, ...], state: Sequence[Tensor]) -> ModelKey:
        models = weakref.ref(self)

        def forget(_: Any) -> None:
            known = models()
            if known is not None:
                known._keys.pop(identity, None)

        with self._lock:
            found = self._keys.get(identity)
            if found is None:
                key, others = self._alike(identity) or (ModelKey(), [])
                tensors = [*state, *(tensor for other in others if (tensor := other()) is not None)]
                watched = [weakref.ref(tensor, forget) for tensor in tensors]
                found = self._keys[identity] = key, watched
            return found[0]

    def _alike(self, identity: tuple[int, ...]) -> tuple[ModelKey, list[Any]] | None:
        """The one model that has all of these tensors, or only such, with references to its own.

        Calls of one model may read more or less of it: without some layers, say.
        """
        wanted = frozenset(identity)
        alike = {
            key: watched
            for known, (key, watched) in list(self._keys.items())
            if wanted and known and (wanted.issuperset(known) or wanted.issubset(known))
        }
        return next(iter(alike.items())) if len(alike) == 1 else None


_of_code: weakref.WeakValueDictionary[Hashable, Models] = weakref.WeakValueDictionary()
_lock = new_lock()


def models_of(code: Hashable) -> Models:
    """The models that run ``code``.

    Recompilations of one code share them. What is known of them goes with the last one that holds
    it, so that ``torch.compiler.reset()`` begins anew.
    """
    with _lock:
        found = _of_code.get(code)
        if found is None:
            found = _of_code[code] = Models()
        return found
