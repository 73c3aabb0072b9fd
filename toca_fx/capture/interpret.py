"""Dynamo's graph, run call by call: what cannot be traced is named by the user's line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from toca_fx.capture.inline import codes_of, given_code
from toca_fx.capture.sources import user_line
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.graph.autocast import Autocast
from toca_fx.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    enter_autocast,
    get_data,
    is_switch,
    is_wrapper,
    tree_leaves,
)

# Functions that tracers do not see (they would keep what is returned as a constant), and those that
# return the same.
SEEN: Mapping[object, Callable[..., Any]] = {get_data: Tensor.detach}


class Interpreter(fx.Interpreter):
    """Runs each call of Dynamo's graph in its state of autocast, and switches nothing itself.

    What it cannot trace is named by the user's line.
    """

    def __init__(
        self,
        captured: fx.GraphModule,
        states: Mapping[fx.Node, Autocast],
        *,
        keeps_values: bool = False,
    ) -> None:
        super().__init__(captured, garbage_collect_values=not keeps_values)
        self.extra_traceback = False  # says where in our own code
        self._states = states

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function returns."""
        return super().call_function(SEEN.get(target, target), args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; None for a switch.

        Raises:
            UnsupportedModelError: it depends on values of tensors, or is given code.
        """
        if is_switch(n.target):
            return None
        if _switches(n):
            raise UnsupportedModelError(
                f"the model calls torch.ops.higher_order.{n.target} at {user_line(n)} with code "
                "that switches autocast, which cannot be followed; put the region around the call"
            )
        try:
            with self._states[n].again():
                return super().run_node(n)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UnsupportedModelError(
                f"the model makes a number or a size out of the values of a tensor at "
                f"{user_line(n)} ({error.func}), which cannot be followed; use .item() there, or "
                "keep it a tensor of a size that depends on shapes alone"
            ) from error
        except Exception as error:
            if (wrapper := _wrapper_in(n)) is not None:
                raise UnsupportedModelError(
                    f"what a {wrapper.__module__}.{wrapper.__qualname__} does at {user_line(n)} "
                    f"cannot be traced ({type(error).__name__}: {error}); leave the module as it "
                    "was before its tensors were replaced, or let it hold plain ones"
                ) from error
            if not given_code(n):
                raise
            raise UnsupportedModelError(
                f"the model calls torch.ops.higher_order.{n.target} at {user_line(n)}, which "
                f"cannot be followed ({type(error).__name__}: {error}); exclude its module from "
                "compilation"
            ) from error


def _wrapper_in(call: fx.Node) -> type | None:
    """The class of a tensor that wraps others, which a call is given; None if it is given none."""
    for operand in call.all_input_nodes:
        for value in tree_leaves(operand.meta.get("example_value")):
            if is_wrapper(value):
                return type(value)
    return None


def _switches(call: fx.Node) -> bool:
    """Whether autocast is switched in the code that an operator is given: tracers do not do it."""
    nodes = [node for code in codes_of(call) for node in code.graph.nodes]
    return any(node.target is enter_autocast or _switches(node) for node in nodes)
