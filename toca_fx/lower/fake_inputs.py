"""Fake inputs of a step graph, for counting its work and for compiling it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from toca_fx.lower.skeleton import Sized, Values
from toca_fx.plan.buffers import Buffer
from toca_fx.plan.plan import Plan
from toca_fx.rewrite.step_graph import StepGraph
from toca_fx.rewrite.tensors import Tensors
from toca_fx.torch_private import (
    ConstantSource,
    DimDynamic,
    FakeTensorMode,
    ShapeEnv,
    StatelessSymbolicContext,
    StrictMinMaxConstraint,
    ValueRanges,
    compiling,
)

_INT32_MAX = torch.iinfo(torch.int32).max


class FakeInputs:
    """The inputs of ``graph`` as fake tensors of ``mode``, in the order of the call.

    ``symbols`` are the symbols made so far for numbers of fresh tokens, with the buffers whose size
    they are; ``ranges`` are how many tokens there are, and up to how many the symbols go.
    """

    def __init__(self, graph: StepGraph, source: fx.GraphModule, plan: Plan) -> None:
        # Every K has a symbol of its own.
        self.shapes = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.shapes, allow_non_fake_inputs=True)
        self.symbols: dict[sympy.Expr, Buffer] = {}
        self.ranges: dict[Buffer, tuple[int, int]] = {}
        self._graph, self._source, self._plan = graph, source, plan

    def whole(self) -> list[Any]:
        """The inputs of a step that computes all tokens of all sites."""
        return self._made(self._tokens)

    def of_counts(self, counts: Mapping[Buffer, int]) -> list[Any]:
        """The inputs of a step with so many fresh tokens, by the buffers of role ``ranks``."""
        return self._made(counts.__getitem__)

    def symbolic(self, sizes: Values) -> Sized:
        """The graph of steps with any number of fresh tokens; it is one for ``sizes``."""
        inputs, module = self._made(self._symbol), self._graph.module
        return Sized(module, inputs, sizes, self.mode, self.symbols, self.ranges)

    def _made(self, count: Callable[[Buffer], Any]) -> list[Any]:
        placeholders = self._source.graph.find_nodes(op="placeholder")
        made = Tensors(self._source, self._plan)
        with compiling():  # threads cannot be in one mode together
            inputs = [like(self.mode, placeholders[at].meta["val"]) for at in self._graph.kept]
            for buffer in self._graph.buffers:
                number = count(buffer) if buffer.role == "ranks" else None
                with self.mode:
                    inputs.append(made.example(buffer, number))
        return inputs

    def _tokens(self, buffer: Buffer) -> int:
        return self._plan.sites[buffer.site].tokens

    def most(self, buffer: Buffer) -> int:
        """The most tokens of a site for which 32 bits are enough for an index."""
        fresh, tokens = self._graph.fresh_nodes[buffer.site], self._tokens(buffer)
        nodes = self._graph.module.graph.nodes
        values = [node.meta.get("val") for node in nodes if node.name in fresh]
        sizes = [value.numel() for value in values if isinstance(value, Tensor)]
        return _INT32_MAX * tokens // max([tokens, *sizes])

    def _symbol(self, buffer: Buffer) -> Any:
        """A symbol for the number of fresh tokens of a site: anything up to all of them, and to
        those of larger images, as code is shared by sizes.

        The range lets a compiler prove what it would guard otherwise: that 32 bits are enough for
        an index. Where it can prove nothing it goes by the example, and for all tokens it takes 64
        bits if any number of tokens needs them.
        """
        tokens, most = self._tokens(buffer), self.most(buffer)
        # It must not be 0 or 1, which would be taken for constants.
        example = torch.empty(max(2, tokens // 8 if tokens <= most else tokens), device="meta")
        range_ = StrictMinMaxConstraint(warn_only=False, vr=ValueRanges(0, max(2, tokens, most)))
        context: Any = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[range_]
        )
        source = ConstantSource(buffer.name)
        fake: Any = self.mode.from_tensor(example, source=source, symbolic_context=context)
        size: Any = fake.shape[0]
        self.symbols[size.node.expr] = buffer
        self.ranges[buffer] = tokens, max(2, tokens, most)
        return size


def like(mode: FakeTensorMode, value: Any) -> Any:
    """A fake tensor of ``mode`` like ``value``; a value that is no tensor is returned."""
    if not isinstance(value, Tensor):
        return value
    with mode:
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
