"""Every private name of torch that toca_fx uses, with its reason.

Used from ``capture``, ``graph`` and ``lower`` alone: other rooms get what they need through these.
``torch.fx.experimental`` counts as private, because torch promises nothing of it; operators of
``torch.ops`` do not, whatever their names: they are in graphs. tests/unit/test_torch_private.py
touches each name, so that a release of torch that changes one fails there first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

# torch.foreach has it since 2.15; a loop over copy_ is one launch per tensor.
from torch import _foreach_copy_ as foreach_copy_

# Operators have no public way to the kernel that one dispatch key stands for.
# Tensors of a class of its own act as plain ones in it; torch has the context and no public name.
from torch._C import DisableTorchFunction, DisableTorchFunctionSubclass, DispatchKey

# The types of devices that torch.is_autocast_enabled knows.
from torch._C import _autocast_supported_devices as autocast_devices

# torch.cuda.use_mem_pool calls it, but only for what it began itself: a CUDA graph whose recording
# failed leaves its pool open.
from torch._C import _cuda_endAllocateToPool as end_allocate_to_pool

# One question at every call of a model instead of one per type of device.
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled

# Decompositions in Python know symbolic sizes, those in C++ make numbers of them; torch.export
# enters it, and no function of its own does.
from torch._dispatch.python import enable_python_dispatcher

# torch.compiler.list_backends gives names only.
from torch._dynamo.backends.registry import lookup_backend

# Tracing patches torch for the whole process, and torch.compile traces under this lock: whatever
# traces beside it has to take the same one.
from torch._dynamo.convert_frame import compile_lock

# What torch.compile raises: no module exports it.
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

# A symbolic size has to come from somewhere; torch.export names inputs of its own only.
from torch._dynamo.source import ConstantSource

# A backend is given a graph, and is not told which model it was captured from.
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import (
    CompileContext,  # nor from which piece of the model's code
    detect_fake_mode,  # tensors do not say to which mode they belong
)

# torch.compile takes the name of a mode, and does not say what it stands for.
from torch._inductor import list_mode_options

# What torch.library.custom_op returns: torch.library has the class, but does not list it.
from torch._library.custom_ops import CustomOpDef

# What tlparse reads; torch.compile writes its own graphs with it.
from torch._logging._internal import trace_structured

# The classes of torch.ops.aten.add.Tensor and torch.ops.aten.add: the targets of ATen graphs; and
# that of torch.ops.higher_order.cond: operators that are given code.
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

# Tensors without memory that remember their device: those on the device "meta" do not.
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

# Regions, as Dynamo has them in its graphs.
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast

# Generates code for a graph when it is first run, and not as often as it is made anew.
from torch.fx._lazy_graph_module import _use_lazy_graph_module as use_lazy_graph_module

# ATen before autograd and autocast, of any function; torch.export takes modules only.
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
)

# Symbols for sizes with a range that is said; torch.export.Dim cannot be had outside of an export.
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    StrictMinMaxConstraint,
)

# What torch takes for a call that does more than to return something.
from torch.fx.node import _side_effectful_functions as side_effectful
from torch.overrides import TorchFunctionMode

# Which tensors hold others, and say so; what Dynamo and AOTAutograd go by.
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper

# Nested outputs of a model, of an operator; torch has no public module for them.
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

# The range in a StrictMinMaxConstraint.
from torch.utils._sympy.value_ranges import ValueRanges

# The formula of attention, for a kernel that is missing from the registry; no name of the module's
# ``__all__``.
from torch.utils.flop_counter import sdpa_flop_count

__all__ = [
    "COMPILED_CALL",
    "BackendCompilerFailed",
    "CompileContext",
    "ConstantSource",
    "CustomOpDef",
    "DataDependentOutputException",
    "DimDynamic",
    "DisableTorchFunctionSubclass",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "InstructionTranslator",
    "OpOverload",
    "OpOverloadPacket",
    "ShapeEnv",
    "StatelessSymbolicContext",
    "StrictMinMaxConstraint",
    "TorchDynamoException",
    "ValueRanges",
    "argument_names",
    "autocast_devices",
    "call_kernel",
    "compiled_call",
    "compiling",
    "custom_overload",
    "detect_fake_mode",
    "enable_python_dispatcher",
    "end_allocate_to_pool",
    "enter_autocast",
    "exit_autocast",
    "foreach_copy_",
    "forget_compiled_call",
    "has_kernel",
    "is_any_autocast_enabled",
    "is_mutable",
    "is_opaque",
    "is_switch",
    "is_wrapper",
    "list_mode_options",
    "lookup_backend",
    "original_module",
    "sdpa_flop_count",
    "side_effectful",
    "storage_id",
    "trace",
    "trace_structured",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "use_lazy_graph_module",
]

Module = TypeVar("Module", bound=nn.Module)


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
) -> fx.GraphModule:
    """The graph of ``function`` in pre-dispatch ATen for ``values``, fake tensors and numbers."""
    tracing = make_fx(
        function,
        tracing_mode="fake",
        pre_dispatch=True,
        decomposition_table=dict(decompositions or {}),
    )
    with compiling(), _Wrappers():
        return tracing(*values)


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


def is_mutable(target: object) -> bool:
    """Whether ``target`` is an operator that writes to one of its arguments.

    Only the schema says so, and it has no public name.
    """
    return isinstance(target, OpOverload) and bool(target._schema.is_mutable)


# Dynamo's graphs have them around calls; there are public functions for what they do.
_SWITCHES = frozenset(
    {
        enter_autocast,
        exit_autocast,
        torch._C._set_grad_enabled,
        torch.autograd.grad_mode._enter_inference_mode,
        torch.autograd.grad_mode._exit_inference_mode,
        torch.ops.profiler._record_function_enter,
        torch.ops.profiler._record_function_enter.default,
        torch.ops.profiler._record_function_enter_new,
        torch.ops.profiler._record_function_enter_new.default,
        torch.ops.profiler._record_function_exit,
        torch.ops.profiler._record_function_exit._RecordFunction,
    }
)


def is_switch(target: object) -> bool:
    """Whether ``target`` begins or ends a region of autocast, gradients, inference or a profile."""
    return target in _SWITCHES


def has_kernel(op: OpOverload, key: str) -> bool:
    """Whether ``op`` has a kernel of its own for a dispatch key; False if torch has no such key."""
    found = getattr(DispatchKey, key, None)
    return found is not None and bool(op.has_kernel_for_dispatch_key(found))


def call_kernel(op: OpOverload, key: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call the kernel of ``op`` for a dispatch key; what it calls is dispatched as usual.

    A tracer, which stands in front of all kernels, would call ``op`` itself.
    """
    with DisableTorchFunction():
        return op._op_dk(getattr(DispatchKey, key), *args, **kwargs)


def argument_names(op: OpOverload) -> tuple[str, ...]:
    """The names of the arguments of ``op``, in order; only its schema has them."""
    return tuple(argument.name for argument in op._schema.arguments)


def custom_overload(op: CustomOpDef) -> OpOverload:
    """The operator that graphs have for a call of ``op``.

    It is in ``torch.ops`` too, under a name that ``op`` keeps in private as well.
    """
    return op._opoverload


def storage_id(tensor: Tensor) -> int:
    """A number that tensors share if they share memory.

    Fake tensors have no address, by which ``data_ptr`` would tell.
    """
    return int(tensor.untyped_storage()._cdata)


def original_module(module: Module) -> Module:
    """The module that ``torch.compile(module)`` wraps; ``module`` itself if it is no wrapper.

    torch has no way back from the wrapper.
    """
    original: Module = getattr(module, "_orig_mod", module)
    return original


# The attribute in which ``module.compile()`` leaves what ``module()`` then runs.
COMPILED_CALL = "_compiled_call_impl"


def compiled_call(module: nn.Module, backend: Any) -> Callable[..., Any]:
    """What ``module.compile(backend=backend, fullgraph=True)`` makes, without changing the module.

    It runs what ``module()`` runs, hooks included; no public method does.
    """
    compiled: Callable[..., Any] = torch.compile(module._call_impl, backend=backend, fullgraph=True)
    return compiled


def forget_compiled_call(module: nn.Module) -> None:
    """Make ``module`` run its own code again, after ``module.compile()``, which has no opposite."""
    setattr(module, COMPILED_CALL, None)


NEWEST_TRIED = (2, 15)
"""The release of torch up to which all tests have passed; pyproject.toml says the same."""


def is_newer(version: str) -> bool:
    """Whether a release of torch is newer than those that were tried."""
    return tuple(map(int, version.split(".")[:2])) > NEWEST_TRIED


if is_newer(torch.__version__):
    logging.getLogger(__name__).warning(
        "toca_fx: it was tried with torch up to %d.%d, and this is %s: an error from inside of "
        "toca_fx may come from that. Install torch<%d.%d, or a newer toca_fx",
        *NEWEST_TRIED,
        torch.__version__,
        NEWEST_TRIED[0],
        NEWEST_TRIED[1] + 1,
    )
