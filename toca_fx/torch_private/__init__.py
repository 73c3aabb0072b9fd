"""Every private name of torch that toca_fx uses, with its reason.

Used from ``capture``, ``graph`` and ``lower`` alone: other rooms get what they need through these.
``torch.fx.experimental`` counts as private, because torch promises nothing of it; operators of
``torch.ops`` do not, whatever their names: they are in graphs. tests/unit/test_torch_private.py
touches each name, so that a release of torch that changes one fails there first.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import CodeType
from typing import Any, TypeVar

import sympy
import torch
from torch import Tensor, nn

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

# And a region in such a region where they act as themselves again.
from torch._C import _EnableTorchFunction as EnableTorchFunction

# One question at every call of a model instead of one per type of device.
from torch._C import _is_any_autocast_enabled as is_any_autocast_enabled

# What Dynamo's graphs have for ``tensor.data``, an attribute.
from torch._C._autograd import _get_data_attr as get_data  # type: ignore[attr-defined]

# The entries of Dynamo's cache for one code: torch.compiler.reset drops those of all codes, and
# nothing public drops one.
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list as cache_entries

# Decompositions in Python know symbolic sizes, those in C++ make numbers of them; torch.export
# enters it, and no function of its own does.
from torch._dispatch.python import enable_python_dispatcher

# How often one code may be captured; what torch.compile takes since 2.13 is one of both limits.
from torch._dynamo import config as dynamo_config

# torch.compiler.list_backends gives names only.
from torch._dynamo.backends.registry import lookup_backend

# Backends come wrapped.
from torch._dynamo.eval_frame import innermost_backend

# What torch.compile raises: no module exports it.
from torch._dynamo.exc import (
    BackendCompilerFailed,
    InternalTorchDynamoError,
    TorchDynamoException,
    TorchRuntimeError,
    Unsupported,
    UserError,
)
from torch._dynamo.guards import DeletedGuardManagerWrapper  # what stands where an entry was

# A symbolic size has to come from somewhere; torch.export names inputs of its own only.
from torch._dynamo.source import ConstantSource

# A backend is given a graph, and is not told which model it was captured from.
from torch._dynamo.symbolic_convert import InstructionTranslator

# What Dynamo's graphs have for torch.vmap, around the calls in it.
from torch._functorch.predispatch import _vmap_decrement_nesting as vmap_end
from torch._functorch.predispatch import _vmap_increment_nesting as vmap_begin
from torch._functorch.predispatch import lazy_load_decompositions as vmap_prepare
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
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast

# Generates code for a graph when it is first run, and not as often as it is made anew.
from torch.fx._lazy_graph_module import _use_lazy_graph_module as use_lazy_graph_module

# Symbols for sizes with a range that is said; torch.export.Dim cannot be had outside of an export.
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    StrictMinMaxConstraint,
)

# What torch takes for a call that does more than to return something.
from torch.fx.node import _side_effectful_functions as side_effectful

# Regions, as Dynamo has them in its graphs.
from torch.nn.attention import _sdpa_kernel as choose_kernels

# Which tensors hold others, and say so; what Dynamo and AOTAutograd go by.
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper

# Nested outputs of a model, of an operator; torch has no public module for them.
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

# What Python makes of an expression of symbols; sympy itself would round otherwise.
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

# The range in a StrictMinMaxConstraint.
from torch.utils._sympy.value_ranges import ValueRanges

# The formula of attention, for a kernel that is missing from the registry; no name of the module's
# ``__all__``.
from torch.utils.flop_counter import sdpa_flop_count

from toca_fx.torch_private.tracing import (
    batches_ended,
    compiling,
    end_compiling,
    is_opaque,
    trace,
)

__all__ = [
    "COMPILED_CALL",
    "BackendCompilerFailed",
    "CompileContext",
    "ConstantSource",
    "CustomOpDef",
    "DataDependentOutputException",
    "DeletedGuardManagerWrapper",
    "DimDynamic",
    "DisableTorchFunctionSubclass",
    "DynamicOutputShapeException",
    "EnableTorchFunction",
    "FakeTensor",
    "FakeTensorMode",
    "HigherOrderOperator",
    "InstructionTranslator",
    "InternalTorchDynamoError",
    "OpOverload",
    "OpOverloadPacket",
    "ShapeEnv",
    "StatelessSymbolicContext",
    "StrictMinMaxConstraint",
    "TorchDynamoException",
    "TorchRuntimeError",
    "Unsupported",
    "UserError",
    "ValueRanges",
    "argument_names",
    "autocast_devices",
    "batches_ended",
    "cache_entries",
    "call_kernel",
    "captured_any_number_of_times",
    "captures",
    "choose_kernels",
    "compiled_call",
    "compiling",
    "computed",
    "custom_overload",
    "detect_fake_mode",
    "dynamo_config",
    "enable_python_dispatcher",
    "end_allocate_to_pool",
    "end_compiling",
    "enter_autocast",
    "exit_autocast",
    "foreach_copy_",
    "forget_compiled_call",
    "get_data",
    "has_kernel",
    "innermost_backend",
    "is_any_autocast_enabled",
    "is_mutable",
    "is_opaque",
    "is_switch",
    "is_wrapper",
    "keep_captures",
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
    "vmap_begin",
    "vmap_end",
    "vmap_prepare",
]

Module = TypeVar("Module", bound=nn.Module)


def captured_any_number_of_times() -> AbstractContextManager[None]:
    """Inside, in this thread, Dynamo captures a code again and again, whatever its limits say.

    Whoever uses it bounds what is kept, by ``keep_captures``.
    """
    limits = {"recompile_limit": sys.maxsize, "accumulated_recompile_limit": sys.maxsize}
    made: AbstractContextManager[None] = dynamo_config.patch(limits)
    return made


def captures(code: CodeType) -> list[Any]:
    """The captures of ``code`` that Dynamo keeps, most recently used first."""
    return [entry for entry in cache_entries(code) if entry.guard_manager.extra_state is not None]


def keep_captures(code: CodeType, most: int, own: Callable[[Any], bool]) -> None:
    """Let Dynamo forget all but the ``most`` captures of ``code`` that were used most recently.

    Those stay that went to a backend that is not one's ``own``. What Dynamo keeps of the others is
    an empty entry. Nobody may be capturing ``code`` in this thread.
    """
    with compiling():
        for entry in captures(code)[most:]:
            found, backend = entry.guard_manager, innermost_backend(entry.backend)
            if own(getattr(backend, "compiler_fn", backend)):
                found.extra_state.invalidate(
                    entry, DeletedGuardManagerWrapper("used least recently")
                )
                # What was guarded on may live on; it holds the guards for a finalizer.
                found.root = found.cache_entry = found.extra_state = None


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


def computed(expression: sympy.Expr, values: Mapping[sympy.Symbol, Any]) -> Any:
    """What Python computes for an expression of symbols, with numbers or symbolic sizes for these.

    It is a number if ``values`` are numbers.
    """
    return sympy_interp(_Python, dict(values), expression)


class _Python(PythonReferenceAnalysis):
    """With what torch leaves to sympy: the quotient of whole numbers, and the part before a dot."""

    @staticmethod
    def int_truediv(a: Any, b: Any) -> Any:
        return a / b

    @staticmethod
    def trunc_to_int(x: Any, _: Any) -> Any:
        return math.trunc(x)


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


def compiled_call(
    module: nn.Module, backend: Any, *, whole: bool = True, dynamic: bool | None = None
) -> Callable[..., Any]:
    """What ``module.compile(backend=backend, fullgraph=whole, dynamic=dynamic)`` makes.

    The module is not changed. It runs what ``module()`` runs, hooks included; no public method
    does.
    """
    compiled: Callable[..., Any] = torch.compile(
        module._call_impl, backend=backend, fullgraph=whole, dynamic=dynamic
    )
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
