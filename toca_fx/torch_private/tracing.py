"""Tracing: alone in the process, and what it takes of torch that is private."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, fx

# Tracing patches torch for the whole process, and torch.compile traces under this lock: whatever
# traces beside it has to take the same one.
from torch._dynamo.convert_frame import compile_lock
from torch._functorch.predispatch import _vmap_decrement_nesting as vmap_end
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

# ATen before autograd and autocast, of any function; torch.export takes modules only.
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
)
from torch.overrides import TorchFunctionMode

# Which tensors hold others, and say so; what Dynamo and AOTAutograd go by.
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper
from torch.utils._pytree import tree_leaves


@contextmanager
def compiling() -> Iterator[None]:
    """Alone in the process, trace or compile what is inside, as if Dynamo had asked for it.

    Tracing patches ``nn.Module.__call__`` and sets flags for all threads. Dynamo's lock keeps two
    compilations apart, its own among them; its flag says to compiled functions of other threads,
    which run meanwhile, that it is not they who are traced.
    There is no other lock around what traces, and so no order of locks; who holds one of his own
    must not wait for this one.
    """
    with compile_lock:
        before = torch.compiler._is_compiling_flag
        torch.compiler._is_compiling_flag = True
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag = before


def end_compiling() -> None:
    """End what an interrupt has left of ``compiling`` in this thread, which compiles nothing."""
    with suppress(RuntimeError):  # this thread does not hold it
        while True:
            compile_lock.release()
    if compile_lock.acquire(blocking=False):
        torch.compiler._is_compiling_flag = False
        compile_lock.release()


def trace(
    function: Callable[..., Any],
    values: Sequence[Any],
    decompositions: Mapping[OpOverload, Callable[..., Any]] | None = None,
    *,
    pre_dispatch: bool = True,
    wrappers: bool = False,
) -> fx.GraphModule:
    """The graph of ``function`` in ATen for ``values``, fake tensors and numbers.

    It is ATen before dispatch, or what the dispatcher makes of it: batches of torch.vmap are axes.
    ``wrappers`` says that it computes with tensors that wrap others.
    """
    tracing = make_fx(
        function,
        tracing_mode="fake",
        pre_dispatch=pre_dispatch,
        decomposition_table=dict(decompositions or {}),
    )
    # Each call of a trace comes by the mode, which takes as long as tracing it.
    with compiling(), _Wrappers() if wrappers else nullcontext():
        return tracing(*values)


@contextmanager
def batches_ended() -> Iterator[None]:
    """End the regions of torch.vmap that what is inside began, if it failed in one.

    Whatever the thread calls later would be in them.
    """
    before = _depth()
    try:
        yield
    finally:
        while _depth() > before:
            vmap_end()


def _depth() -> int:
    """How many transforms of functorch are active."""
    top = torch._C._functorch.peek_interpreter_stack()
    return 0 if top is None else int(top.level())


class _Wrappers(TorchFunctionMode):
    """Asks ``__torch_dispatch__`` of wrappers for what they leave to it.

    A trace of what comes before autograd takes all calls, and asks nobody: these are traced behind.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = tree_leaves((args, kwargs))
        kinds: list[Any] = [type(value) for value in values if is_wrapper(value)]
        mode = get_proxy_mode()
        if not kinds or mode is None:
            return func(*args, **kwargs)
        if torch._C._is_torch_function_enabled():  # not by a class that is asked already
            for kind in filter(_has_function, kinds):
                with self:
                    return kind.__torch_function__(func, types, args, kwargs)
        with disable_proxy_modes_tracing(), ProxyTorchDispatchMode(mode.tracer, "fake"):
            return func(*args, **kwargs)


def is_opaque(value: Tensor) -> bool:
    """Whether a tensor has a ``__torch_dispatch__`` of its own, and does not say what it holds."""
    own = type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return own and not is_wrapper(value) and not isinstance(value, FakeTensor)


def _has_function(kind: type[Tensor]) -> bool:
    return kind.__torch_function__ is not torch._C._disabled_torch_function_impl
