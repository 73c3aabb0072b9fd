"""FLOPs of a graph, node by node, by the formulas of ``torch.utils.flop_counter``."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from toca_fx.graph.autocast import OFF
from toca_fx.graph.names import qualified_name
from toca_fx.graph.ops import FLEX, overloads_of
from toca_fx.kernels.columns import attention_and_columns
from toca_fx.lower.layouts import Layout, described, key_of, layout_of, made
from toca_fx.torch_private import (
    FakeTensorMode,
    OpOverload,
    compiling,
    detect_fake_mode,
    sdpa_flop_count,
    tree_map,
    tree_map_only,
)

(_SCORED,) = overloads_of(attention_and_columns)


def _attention(
    query: torch.Size, key: torch.Size, value: torch.Size, *_args: Any, **_kwargs: Any
) -> int:
    """FLOPs of the CPU's fused attention, which the registry of torch 2.13 lacks."""
    flops: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
    return flops


def _columns(query: torch.Size, key: torch.Size, every: int) -> int:
    """FLOPs of s1 on a GPU: a product of the keys with every ``every``-th query."""
    batch, heads, rows, width = query
    return 2 * batch * heads * -(rows // -every) * key[2] * width


def _attention_and_columns(
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    _scale: float,
    every: int = 1,
    *_args: Any,
    **_kwargs: Any,
) -> int:
    return _attention(query, key, value) + _columns(query, key, every)


def _packed(rows: torch.Size, weight: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """FLOPs of a linear layer on packed int8 weights [out, in]."""
    return 2 * rows[0] * rows[1] * weight[0]


def _columns_apart(left: torch.Size, right: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """FLOPs of a product of [..., in] and [in, out]."""
    return 2 * left.numel() * right[-1]


def _columns_first(left: torch.Size, right: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    """FLOPs of a product of [..., in] and [out, in]."""
    return 2 * left.numel() * right[0]


def _of_shape(
    left: torch.Size, _packed: torch.Size, shape: Sequence[int], *_args: Any, **_kwargs: Any
) -> int:
    """FLOPs of a product of [..., in] and packed weights that are said to be [out, in]."""
    return 2 * left.numel() * shape[0]


FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._weight_int8pack_mm: _packed,
    torch.ops.aten._int_mm: _columns_apart,
    _SCORED.overloadpacket: _attention_and_columns,
}

# Those of libraries, which may not be installed, or not be imported yet.
_OF_LIBRARIES = {
    "torchao::int_matmul": _columns_apart,
    "torchao::int_scaled_matmul": _columns_apart,
    "quanto::qbytes_mm": _columns_first,
    "bitsandbytes::gemm_4bit": _of_shape,
    "bitsandbytes::gemv_4bit": _of_shape,
    "bitsandbytes::int8_linear_matmul": _columns_first,
    "bitsandbytes::int8_scaled_mm": _columns_first,
}


def _formulas(target: object) -> dict[Any, Any]:
    """The formulas that counting a call of ``target`` takes, beside those of torch."""
    own = _OF_LIBRARIES.get(qualified_name(target))
    return (
        FORMULAS | {target.overloadpacket: own}
        if isinstance(target, OpOverload) and own
        else FORMULAS
    )


class _NoModules(ModuleTracker):
    """Does not track modules: torch's tracker has hooks on all modules of the process.

    One that another thread calls meanwhile would fail on hooks that come and go.
    """

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def count_flops(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """FLOPs of ``module`` run on ``inputs``, by node; 2 FLOPs per multiply-add.

    ``inputs`` may be fake. Nodes without FLOPs are left out.
    """
    return FlopCounter().count(module, inputs)


def columns_flops(node: fx.Node) -> int:
    """FLOPs at ``node`` for scores that are computed only if they are used (see ``columns``)."""
    if node.target is not _SCORED:
        return 0
    query, key, _value, _scale, *more = cast("tuple[Any, ...]", node.args)
    return _columns(query.meta["val"].shape, key.meta["val"].shape, more[0] if more else 1)


class FlopCounter:
    """Counts the FLOPs of graphs; an operator that comes again on equal layouts is not run again.

    Models are block after block of the same operators, and step graphs are variants of one graph.
    """

    def __init__(self) -> None:
        self._known: dict[object, _Run] = {}

    def count(
        self, module: fx.GraphModule, inputs: Sequence[Any], values: dict[str, Any] | None = None
    ) -> dict[str, int]:
        """FLOPs of ``module`` run on ``inputs``, by node; 2 FLOPs per multiply-add.

        ``inputs`` may be fake. Nodes without FLOPs are left out. ``values`` takes what the nodes
        compute, by name: tensors on the device "meta", which share memory as the real ones would.
        """
        mode = detect_fake_mode(inputs) or FakeTensorMode(allow_non_fake_inputs=True)
        counting = _Counting(module, self._known, mode)
        with compiling(), torch.no_grad(), OFF.again():
            counting.run(*map(layout_of, inputs))
        if values is not None:
            values.update(counting.values)
        return counting.flops


@dataclass(frozen=True)
class _Run:
    """What an operator cost, and what it returned, with ``Result`` in the place of tensors."""

    flops: int
    returned: Any


class _Counting(fx.Interpreter):
    """Runs a graph on ``Layout`` in the place of tensors.

    Tensors of other kinds (of subclasses, or sized by symbols) stay as they are, and operators that
    read one are run each time.
    """

    def __init__(
        self, module: fx.GraphModule, known: dict[object, _Run], mode: FakeTensorMode
    ) -> None:
        super().__init__(module)
        self._known, self._mode = known, mode
        self.values: dict[str, Any] = {}
        self.flops: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """What ``n`` returns."""
        if n.op == "call_function" and n.target is not operator.getitem:
            result = self._called(n)
        elif n.op in ("call_method", "call_module"):
            result = self._restored(n)
        else:
            result = tree_map(layout_of, super().run_node(n))
        self.values[n.name] = tree_map_only(Layout, lambda layout: layout.meta, result)
        return result

    def _called(self, node: fx.Node) -> Any:
        """What a function returns, which is run if no equal one was."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        operands: list[Layout] = []
        key = key_of((args, kwargs), operands)
        if key is None or not isinstance(node.target, OpOverload):
            return self._restored(node)
        key = (node.target, key)
        run = self._known.get(key)
        if run is None:
            run = self._known[key] = self._run(node, args, kwargs, operands)
        if run.flops:
            self.flops[node.name] = run.flops
        return made(run.returned, operands)

    def _run(self, node: fx.Node, args: Any, kwargs: Any, operands: Sequence[Layout]) -> _Run:
        """Run a node on fake tensors like ``operands``, those in its arguments."""
        fakes = {id(operand): operand.fake(self._mode) for operand in operands}
        args, kwargs = tree_map_only(Layout, lambda operand: fakes[id(operand)], (args, kwargs))
        flops, returned = self._counted(node, args, kwargs)
        return _Run(flops, described(returned, [fakes[id(operand)] for operand in operands]))

    def _restored(self, node: fx.Node) -> Any:
        """What any other node returns, on fake tensors in the place of layouts."""
        args, kwargs = tree_map_only(
            Layout, lambda operand: operand.fake(self._mode), self.fetch_args_kwargs_from_env(node)
        )
        flops, returned = self._counted(node, args, kwargs)
        if flops:
            self.flops[node.name] = flops
        return tree_map(layout_of, returned)

    def _counted(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[int, Any]:
        """The FLOPs of a node, and what it returns."""
        if node.target is FLEX:  # which the counter does not run; as if no block were masked
            with self._mode:
                returned = getattr(self, node.op)(node.target, args, kwargs)
            return _attention(*(operand.shape for operand in args[:3])), returned
        counter = FlopCounterMode(display=False, custom_mapping=_formulas(node.target))
        counter.mod_tracker = _NoModules()
        # Tables that the graph makes by itself are fake too.
        with self._mode, counter:
            returned = getattr(self, node.op)(node.target, args, kwargs)
        return counter.get_total_flops(), returned
