"""Each private name of torch does what toca_fx needs of it, and no other file has one."""

from __future__ import annotations

import ast
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.convert_frame import compile_lock
from torch._guards import CompileId, compile_context
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._sympy.functions import FloatPow, IntTrueDiv, ToFloat, TruncToInt

import toca_fx
from toca_fx import torch_private as private
from toca_fx.capture.sources import frame_id, model_class
from toca_fx.kernels.columns import attention_and_columns

aten = torch.ops.aten

PACKAGE = Path(toca_fx.__file__).parent
OPEN_TO = {"capture", "graph", "lower"}

_BY_NAME = ("getattr", "hasattr", "setattr", "delattr", "attrgetter")

# What other files have all the same.
_FOREACH = "torch.foreach has it since 2.15 only"
_PYTREE = "example models, figures, what models return: nothing that is compiled depends on it"
ALLOWED = {
    ("bench/measure.py", "torch.utils._pytree"): _PYTREE,
    ("examples/__init__.py", "torch.utils._pytree"): _PYTREE,
    ("quality/samples.py", "torch.utils._pytree"): _PYTREE,
    ("quality/stand_in.py", "torch.utils._pytree"): _PYTREE,
    ("runtime/conditioning.py", "torch._foreach_copy_"): _FOREACH,
    ("runtime/selector.py", "torch._foreach_copy_"): _FOREACH,
    ("capture/groups.py", "_non_persistent_buffers_set"): "accelerate's hooks leave these buffers",
    ("runtime/identity.py", "_version"): "the notes on autograd name it: writes are counted",
}


def errors_are_told_apart() -> None:
    assert issubclass(private.BackendCompilerFailed, private.TorchDynamoException)
    assert issubclass(private.TorchDynamoException, Exception)
    for name in ("InternalTorchDynamoError", "TorchRuntimeError", "Unsupported", "UserError"):
        error = getattr(private, name)
        assert issubclass(error, private.TorchDynamoException)
        assert not issubclass(private.BackendCompilerFailed, error)


def captures_are_known() -> None:
    """What they say while Dynamo runs is in tests/graph/capture/test_sources.py."""
    assert frame_id() is None
    with compile_context(private.CompileContext(CompileId(frame_id=7, frame_compile_id=1))):
        assert frame_id() == 7
    assert model_class() == ""
    with pytest.raises(AttributeError):
        private.InstructionTranslator.current_tx()


def expressions_are_computed() -> None:
    """As Python does it, for numbers and for symbolic sizes."""
    size, other = sympy.symbols("size other", integer=True, positive=True)
    expression = (size + 3) // 2 * other
    assert private.computed(expression, {size: 4, other: 5}) == 15
    assert private.computed(sympy.Eq(size, other), {size: 4, other: 4}) is True
    quotient = private.computed(IntTrueDiv(size, other), {size: 1, other: 3})
    assert (type(quotient), quotient) == (float, 1 / 3)
    root = TruncToInt(FloatPow(ToFloat(size), sympy.Float(0.5)))
    largest = private.computed(sympy.Max(3, root), {size: 17})
    assert (type(largest), largest) == (int, 4)
    with pytest.raises(KeyError):
        private.computed(expression, {size: 4})
    mode = private.FakeTensorMode(shape_env=private.ShapeEnv())
    context = private.StatelessSymbolicContext(dynamic_sizes=[private.DimDynamic.DYNAMIC])
    fake: Any = mode.from_tensor(
        torch.empty(6), source=private.ConstantSource("x"), symbolic_context=context
    )
    found = private.computed(size * 2, {size: fake.shape[0]})
    assert isinstance(found, torch.SymInt)
    assert found.node.expr == 2 * fake.shape[0].node.expr


def backends_are_found() -> None:
    assert callable(private.lookup_backend("eager"))
    with pytest.raises(Exception, match="no such"):
        private.lookup_backend("no such")


def modes_are_listed() -> None:
    assert "reduce-overhead" in private.list_mode_options()
    assert private.list_mode_options("reduce-overhead")["triton.cudagraphs"] is True


def operators_are_told_apart() -> None:
    assert isinstance(aten.add.Tensor, private.OpOverload)
    assert isinstance(aten.add, private.OpOverloadPacket)
    assert not isinstance(aten.add, private.OpOverload)
    assert aten.add.Tensor.overloadpacket.__name__ == "add"
    assert (aten.relu_.default.name(), aten.add_.Tensor.name()) == (
        "aten::relu_",
        "aten::add_.Tensor",
    )


def schemas_are_read() -> None:
    assert private.is_mutable(aten.add_.Tensor)
    assert not private.is_mutable(aten.add.Tensor)
    assert not private.is_mutable(torch.add)
    names = private.argument_names(aten.scaled_dot_product_attention.default)
    assert names[:3] == ("query", "key", "value")
    assert "scale" in names


def custom_operators_are_found() -> None:
    assert isinstance(attention_and_columns, private.CustomOpDef)
    found = private.custom_overload(attention_and_columns)
    assert found is torch.ops.toca_fx.attention_and_columns.default


def fake_tensors_are_made() -> None:
    mode = private.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        made = torch.empty(2, 3, device="cuda")
    assert made.device.type == "cuda"
    assert type(made) is private.FakeTensor
    assert made.fake_mode is mode
    assert private.detect_fake_mode([made]) is mode
    assert private.detect_fake_mode([torch.ones(2)]) is None
    with pytest.raises(private.DataDependentOutputException) as raised:
        mode.from_tensor(torch.ones(1), static_shapes=True).item()
    assert raised.value.func is aten._local_scalar_dense.default
    with pytest.raises(private.DynamicOutputShapeException) as unsized:
        mode.from_tensor(torch.ones(1), static_shapes=True).nonzero()
    assert unsized.value.func is aten.nonzero.default


def operators_that_are_given_code_have_a_class() -> None:
    assert isinstance(torch.ops.higher_order.cond, private.HigherOrderOperator)
    assert not isinstance(aten.add.Tensor, private.HigherOrderOperator)
    assert str(torch.ops.higher_order.tag_activation_checkpoint) == "tag_activation_checkpoint"


def sizes_have_ranges() -> None:
    shapes = private.ShapeEnv(duck_shape=False)
    mode = private.FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    range_ = private.StrictMinMaxConstraint(warn_only=False, vr=private.ValueRanges(0, 64))
    context: Any = private.StatelessSymbolicContext(
        dynamic_sizes=[private.DimDynamic.DYNAMIC], constraint_sizes=[range_]
    )
    source = private.ConstantSource("ranks")
    example = torch.empty(8, device="meta")
    size: Any = mode.from_tensor(example, source=source, symbolic_context=context).shape[0]
    assert isinstance(size, torch.SymInt)
    assert shapes.bound_sympy(size.node.expr).upper == 64
    with mode, private.enable_python_dispatcher():
        product = torch.empty(2, size, 4) @ torch.empty(4, 5)
    assert product.shape[1].node.expr == size.node.expr
    assert not shapes.guards


def functions_are_traced() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        x = F.linear(x, weight)
        return F.scaled_dot_product_attention(x, x, x)

    graph = private.trace(function, [torch.ones(1, 2, 3, 4), torch.ones(4, 4)]).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [aten.linear.default, aten.scaled_dot_product_attention.default]


class InPairs(Tensor):
    """A tensor in another one, which its ``__torch_dispatch__`` adds to itself."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> InPairs:
        made: InPairs = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(one.inner + one.inner if isinstance(one, cls) else one for one in args))

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, shape: Any, stride: Any) -> InPairs:
        return cls(inner["inner"])


def wrappers_are_told_apart() -> None:
    """A trace asks wrappers what they make of a call, whatever they leave to autograd."""
    plain = torch.ones(2, 2)
    assert private.is_wrapper(InPairs(plain))
    assert not private.is_wrapper(plain)
    assert not private.is_wrapper(nn.Parameter(plain))
    assert not private.is_opaque(InPairs(plain))
    assert not private.is_opaque(plain)
    assert not private.is_opaque(private.FakeTensorMode().from_tensor(plain))

    def product(x: Tensor, inner: Tensor) -> Tensor:
        return torch.mm(x, InPairs(inner))

    traced = private.trace(product, [plain, plain], wrappers=True).graph
    targets = [node.target for node in traced.nodes if node.op == "call_function"]
    assert targets == [aten.add.Tensor, aten.mm.default]


class Named(Tensor):
    pass


def classes_are_left_out() -> None:
    value = torch.ones(2).as_subclass(Named)
    assert type(value + 1) is Named
    with private.DisableTorchFunctionSubclass():
        assert type(value + 1) is Tensor
        with private.EnableTorchFunction():
            assert type(value + 1) is Named


def compilations_are_apart() -> None:
    """What compiled functions of other threads do meanwhile is in tests/system/test_threads.py."""
    seen: list[tuple[bool, bool]] = []

    def look() -> None:
        is_free = compile_lock.acquire(blocking=False)
        seen.append((is_free, torch.compiler.is_compiling()))

    def traced(x: Tensor) -> Tensor:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return x + 1

    private.trace(traced, [torch.ones(2)])
    with pytest.raises(ZeroDivisionError), private.compiling(), private.compiling():
        raise ZeroDivisionError
    assert seen == [(False, True)]
    assert not torch.compiler.is_compiling()
    look()
    compile_lock.release()
    assert seen[1:] == [(True, False)]


def what_an_interrupt_left_is_ended() -> None:
    compile_lock.acquire()
    torch.compiler._is_compiling_flag = True
    private.end_compiling()
    assert not torch.compiler.is_compiling()
    assert compile_lock.acquire(blocking=False)
    compile_lock.release()


def attention_is_counted() -> None:
    flops = private.sdpa_flop_count((1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8))
    assert flops == 2 * (2 * 2 * 3 * 5 * 8)


def memory_is_told_apart() -> None:
    for mode in (torch.inference_mode(False), private.FakeTensorMode()):
        with mode:
            tensor, other = torch.empty(4), torch.empty(4)
        assert private.storage_id(tensor) == private.storage_id(tensor[1:].view(3, 1))
        assert private.storage_id(tensor) != private.storage_id(other)


def artifacts_are_taken() -> None:
    """Where they go is in tests/system/lower/test_show.py."""
    private.trace_structured("artifact", metadata_fn=lambda: {"name": "a"}, payload_fn=lambda: "b")


def lists_are_copied() -> None:
    into = [torch.zeros(2), torch.zeros(3)]
    private.foreach_copy_(into, [torch.ones(2), torch.ones(3)])
    assert all(bool((tensor == 1).all()) for tensor in into)


def outputs_are_mapped() -> None:
    nested = {"a": [1, 2.0], "b": (3,)}
    assert private.tree_map_only(int, str, nested) == {"a": ["1", 2.0], "b": ("3",)}
    assert private.tree_map(str, nested) == {"a": ["1", "2.0"], "b": ("3",)}
    assert private.tree_leaves(nested) == [1, 2.0, 3]


def code_is_generated_late() -> None:
    with private.use_lazy_graph_module(True):
        late = fx.symbolic_trace(nn.ReLU())
    assert type(late) is not fx.GraphModule
    assert isinstance(late, fx.GraphModule)
    assert bool((late(torch.tensor([-1.0, 2.0])) == torch.tensor([0.0, 2.0])).all())


def pools_can_be_closed() -> None:
    assert callable(private.end_allocate_to_pool)
    stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text(encoding="utf-8")
    assert "def _cuda_endAllocateToPool(device: _int, mempool_id: tuple[_int, _int])" in stub


def batches_are_known() -> None:
    """That Dynamo has them in its graphs is in tests/graph/capture/test_batches.py."""
    private.vmap_prepare()
    with private.batches_ended():
        private.vmap_begin(2, "error")
        with pytest.raises(RuntimeError, match="randomness"):
            torch.rand(2)
    with private.batches_ended():
        private.vmap_begin(2, "error")
        private.vmap_end()
    torch.rand(2)


def data_is_read() -> None:
    """That Dynamo has it in its graphs is in tests/graph/capture/test_retrace.py."""
    tensor = torch.ones(2)
    private.get_data(tensor).zero_()
    assert not tensor.any()
    assert not tensor._version


def modules_run_their_own_code() -> None:
    calls: list[int] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        calls.append(1)
        return graph

    module = nn.Linear(2, 2)
    assert private.original_module(module) is module
    assert private.original_module(torch.compile(module, backend=backend)) is module
    module.compile(backend=backend)
    private.forget_compiled_call(module)
    module(torch.ones(2))
    assert not calls


def calls_are_compiled() -> None:
    """What comes of a call is in tests/system/test_backend.py."""
    module, seen = nn.Linear(2, 2), list[object]()
    assert callable(private.compiled_call(module, "eager"))
    assert vars(module).get(private.COMPILED_CALL) is None
    setattr(module, private.COMPILED_CALL, seen.append)
    module(3)
    assert seen == [3]


def kernels_are_called() -> None:
    assert private.has_kernel(aten.linear.default, "AutocastCPU")
    assert private.has_kernel(aten.layer_norm.default, "AutocastCUDA")
    assert private.has_kernel(aten.reshape.default, "CompositeImplicitAutograd")
    assert not private.has_kernel(aten.silu.default, "AutocastCPU")
    assert not private.has_kernel(aten.linear.default, "AutocastNowhere")

    def cast(*operands: Tensor) -> Any:
        return private.call_kernel(aten.linear.default, "AutocastCPU", operands, {})

    mode = private.FakeTensorMode()
    fakes = [mode.from_tensor(torch.ones(*shape)) for shape in ((2, 3), (4, 3))]
    graph = private.trace(cast, fakes).graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert targets == [aten.to.dtype, aten.to.dtype, aten.linear.default]


def kernels_of_attention_are_chosen() -> None:
    """What the public region calls, and Dynamo has in its graphs; that is in test_backend.py."""
    before = torch.backends.cuda.flash_sdp_enabled()
    with sdpa_kernel(SDPBackend.MATH):
        assert not torch.backends.cuda.flash_sdp_enabled()
        private.choose_kernels([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() == before


def regions_are_known() -> None:
    assert {"cpu", "cuda"} <= {*private.autocast_devices()}
    assert not private.is_any_autocast_enabled()
    with torch.autocast("cpu", torch.float16):
        assert private.is_any_autocast_enabled()
        region: Any = private.enter_autocast("cpu", torch.bfloat16, False, None)
        assert not torch.is_autocast_enabled("cpu")
        private.exit_autocast(region)  # type: ignore[no-untyped-call]
        assert torch.is_autocast_enabled("cpu")
    switches = {target for target in private.side_effectful if private.is_switch(target)}
    assert {private.enter_autocast, private.exit_autocast, torch._C._set_grad_enabled} <= switches
    assert torch._assert_async in private.side_effectful - switches


def captures_are_forgotten() -> None:
    """tests/system/test_captures.py has some."""

    def function() -> None:
        pass

    assert private.cache_entries(function.__code__) == []
    assert private.captures(function.__code__) == []
    private.keep_captures(function.__code__, 0, lambda _: True)
    limits = private.dynamo_config
    before = limits.recompile_limit, limits.accumulated_recompile_limit
    with private.captured_any_number_of_times():
        assert min(limits.recompile_limit, limits.accumulated_recompile_limit) > 10**9
    assert (limits.recompile_limit, limits.accumulated_recompile_limit) == before
    assert private.innermost_backend(function) is function
    gone = private.DeletedGuardManagerWrapper("why")
    assert (gone.extra_state, gone.invalidation_reason) == (None, "why")


CHECKS: dict[str, Callable[[], None]] = {
    "DeletedGuardManagerWrapper": captures_are_forgotten,
    "cache_entries": captures_are_forgotten,
    "captured_any_number_of_times": captures_are_forgotten,
    "captures": captures_are_forgotten,
    "dynamo_config": captures_are_forgotten,
    "innermost_backend": captures_are_forgotten,
    "keep_captures": captures_are_forgotten,
    "COMPILED_CALL": calls_are_compiled,
    "BackendCompilerFailed": errors_are_told_apart,
    "CompileContext": captures_are_known,
    "ConstantSource": sizes_have_ranges,
    "CustomOpDef": custom_operators_are_found,
    "DataDependentOutputException": fake_tensors_are_made,
    "DynamicOutputShapeException": fake_tensors_are_made,
    "HigherOrderOperator": operators_that_are_given_code_have_a_class,
    "DimDynamic": sizes_have_ranges,
    "DisableTorchFunctionSubclass": classes_are_left_out,
    "EnableTorchFunction": classes_are_left_out,
    "FakeTensor": fake_tensors_are_made,
    "FakeTensorMode": fake_tensors_are_made,
    "InstructionTranslator": captures_are_known,
    "OpOverload": operators_are_told_apart,
    "OpOverloadPacket": operators_are_told_apart,
    "ShapeEnv": sizes_have_ranges,
    "StatelessSymbolicContext": sizes_have_ranges,
    "StrictMinMaxConstraint": sizes_have_ranges,
    "TorchDynamoException": errors_are_told_apart,
    "Unsupported": errors_are_told_apart,
    "InternalTorchDynamoError": errors_are_told_apart,
    "TorchRuntimeError": errors_are_told_apart,
    "UserError": errors_are_told_apart,
    "ValueRanges": sizes_have_ranges,
    "argument_names": schemas_are_read,
    "autocast_devices": regions_are_known,
    "batches_ended": batches_are_known,
    "call_kernel": kernels_are_called,
    "choose_kernels": kernels_of_attention_are_chosen,
    "compiled_call": calls_are_compiled,
    "compiling": compilations_are_apart,
    "computed": expressions_are_computed,
    "custom_overload": custom_operators_are_found,
    "detect_fake_mode": fake_tensors_are_made,
    "enable_python_dispatcher": sizes_have_ranges,
    "end_allocate_to_pool": pools_can_be_closed,
    "enter_autocast": regions_are_known,
    "exit_autocast": regions_are_known,
    "foreach_copy_": lists_are_copied,
    "forget_compiled_call": modules_run_their_own_code,
    "get_data": data_is_read,
    "has_kernel": kernels_are_called,
    "is_any_autocast_enabled": regions_are_known,
    "is_mutable": schemas_are_read,
    "is_opaque": wrappers_are_told_apart,
    "is_switch": regions_are_known,
    "is_wrapper": wrappers_are_told_apart,
    "list_mode_options": modes_are_listed,
    "lookup_backend": backends_are_found,
    "original_module": modules_run_their_own_code,
    "sdpa_flop_count": attention_is_counted,
    "side_effectful": regions_are_known,
    "storage_id": memory_is_told_apart,
    "trace_structured": artifacts_are_taken,
    "end_compiling": what_an_interrupt_left_is_ended,
    "trace": functions_are_traced,
    "tree_leaves": outputs_are_mapped,
    "tree_map": outputs_are_mapped,
    "tree_map_only": outputs_are_mapped,
    "use_lazy_graph_module": code_is_generated_late,
    "vmap_begin": batches_are_known,
    "vmap_end": batches_are_known,
    "vmap_prepare": batches_are_known,
}


def test_every_name_is_touched() -> None:
    assert set(CHECKS) == set(private.__all__)


@pytest.mark.parametrize("name", private.__all__)
def test_name_does_what_is_needed(name: str) -> None:
    CHECKS[name]()


def test_private_names_are_in_one_module() -> None:
    members = _members()
    found = {
        (str(file.relative_to(PACKAGE)), name)
        for file in PACKAGE.rglob("*.py")
        if file.parent.name != "torch_private"
        for name in _private_names(ast.parse(file.read_text(encoding="utf-8")), members)
    }
    assert found == set(ALLOWED)


def test_few_rooms_use_it() -> None:
    users = {
        file.relative_to(PACKAGE).parts[0]
        for file in PACKAGE.rglob("*.py")
        if "torch_private" in file.read_text(encoding="utf-8")
        and file.parent.name != "torch_private"
    }
    assert users <= OPEN_TO


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._guards import CompileContext", "torch._guards"),
        ("from torch.fx.experimental import proxy_tensor", "torch.fx.experimental"),
        ("from torch import _foreach_copy_", "torch._foreach_copy_"),
        (
            "from torch.utils.flop_counter import sdpa_flop_count",
            "torch.utils.flop_counter.sdpa_flop_count",
        ),
        ("torch._inductor.config.x = 1", "torch._inductor"),
        ("node.target._schema.is_mutable", "_schema"),
        ("tensor.untyped_storage()._cdata", "_cdata"),
        ("getattr(model, '_orig_mod', model)", "_orig_mod"),
    ],
)
def test_private_names_are_seen(code: str, name: str) -> None:
    assert list(_private_names(ast.parse(code), _members())) == [name]


@pytest.mark.parametrize(
    "code",
    [
        "from torch import Tensor, fx, nn",
        "from torch.nn import functional as F",
        "torch.ops.aten._softmax.default",
        "aten._to_copy.default",
        "self._modules",
        "torch.__version__",
    ],
)
def test_public_names_are_not(code: str) -> None:
    assert not list(_private_names(ast.parse(code), _members()))


def _members() -> frozenset[str]:
    """Private attributes of torch's objects."""
    objects = (
        torch.ones(1),
        torch.ones(1).untyped_storage(),
        torch.compile(nn.Identity(), backend="eager"),
        fx.symbolic_trace(nn.Identity()),
        fx.Graph(),
        fx.Graph().placeholder("x"),
        aten.add,
        aten.add.Tensor,
        attention_and_columns,
    )
    return frozenset(name for each in objects for name in dir(each) if _is_private(name))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _private_names(tree: ast.AST, members: frozenset[str]) -> Iterator[str]:
    """The private names of torch in a file: modules and their contents by their path, attributes
    of torch's objects by their name. Operators have none.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from filter(None, (_private_module(alias.name) for alias in node.names))
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from _imported(node.module, [alias.name for alias in node.names])
        elif isinstance(node, ast.Attribute) and _is_private(node.attr):
            path = ast.unparse(node)
            if path.startswith("torch.") and not path.startswith("torch.ops."):
                yield path
            elif not path.startswith(("torch.ops.", "aten.", "self.", "cls.")):
                yield from {node.attr} & members
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(_BY_NAME):
            yield from {
                each.value for each in node.args if isinstance(each, ast.Constant)
            } & members


def _private_module(path: str) -> str | None:
    """The path as far as it is private, None if it is not."""
    if path.partition(".")[0] != "torch":
        return None
    if path.startswith("torch.fx.experimental"):
        return "torch.fx.experimental"
    return path if any(map(_is_private, path.split("."))) else None


def _imported(path: str, names: Sequence[str]) -> Iterator[str]:
    """The private ones of the names that are imported from a module."""
    if path.partition(".")[0] != "torch":
        return
    if private_path := _private_module(path):
        yield private_path
        return
    module = importlib.import_module(path)
    public = getattr(module, "__all__", None)
    for name in names:
        is_module = type(getattr(module, name)) is type(torch)
        if _is_private(name) or not (public is None or is_module or name in public):
            yield f"{path}.{name}"
