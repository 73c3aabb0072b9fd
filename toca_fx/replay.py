"""A step graph as CUDA graphs want it: recorded once per number of fresh tokens, and replayed on the same memory.

Inductor records what it has compiled if no input is written to, but for those that it knows to stay where they are; every other input is
copied into the recording before each replay. Parameters and caches stay. It keeps one recording for each combination of the whole
numbers among the inputs, so the numbers of fresh tokens become inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, fx

Compile = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def compile_for_replay(
    module: fx.GraphModule,
    examples: Sequence[Any],
    static: Collection[int],
    compile: Compile,  # noqa: A002
) -> Callable[..., Any]:
    """Compile ``module`` whole, for ``examples``; its inputs at ``static`` are at the same addresses in every call. It is changed."""
    _mark_static(module, static)
    sized = _sized(examples)
    first = next(iter(module.graph.nodes))
    with module.graph.inserting_before(first):
        for at in range(len(sized)):
            module.graph.placeholder(f"size_{at}")
    module.recompile()
    _look_captured(module)
    run = compile(module, [*(examples[at].shape[axis] for at, axis in sized), *examples])

    def with_sizes(*inputs: Any) -> Any:
        return run(*(inputs[at].shape[axis] for at, axis in sized), *inputs)

    return with_sizes


def _sized(examples: Sequence[Any]) -> list[tuple[int, int]]:
    """For each symbol, the first input and axis that have its size."""
    found: dict[object, tuple[int, int]] = {}
    for at, value in enumerate(examples):
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if not isinstance(size, int):
                found.setdefault(size.node.expr, (at, axis))
    return list(found.values())


def _mark_static(module: fx.GraphModule, static: Collection[int]) -> None:
    for at, node in enumerate(module.graph.find_nodes(op="placeholder")):
        if at in static:
            node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def _look_captured(module: fx.GraphModule) -> None:
    """AOTAutograd reads the marks off graphs of Dynamo's only, which it knows by these (see _try_get_metadata_from_dynamo there)."""
    module.meta["dynamo_compile_id"] = None
    module._param_name_to_source = {}  # type: ignore[assignment]
    for node in module.graph.find_nodes(op="placeholder"):
        node._dynamo_source = None
