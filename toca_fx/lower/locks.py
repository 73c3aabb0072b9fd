"""Locks that no interrupt leaves locked."""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress

from toca_fx.torch_private import end_compiling

_all: weakref.WeakValueDictionary[int, threading.RLock] = weakref.WeakValueDictionary()


def new_lock() -> threading.RLock:
    """A lock that ``let_go`` knows."""
    made = threading.RLock()
    _all[id(made)] = made
    return made


def let_go() -> None:
    """Release what this thread holds, once its call has failed; no other call is under way in it.

    An exception may come anywhere (Ctrl-C, a thread that is told to end), also between the body of
    a ``with`` and its end. The thread itself would not notice; all others would wait for ever.
    """
    for reference in _all.valuerefs():
        lock = reference()
        if lock is not None:
            with suppress(RuntimeError):  # this thread does not hold it
                while True:
                    lock.release()
    end_compiling()
