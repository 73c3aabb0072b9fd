"""One capture of a model for many policies: most of the time of a short test is Dynamo's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import capture_calls
from toca_fx.capture.aten import to_aten
from toca_fx.graph import roles
from toca_fx.lower.analysis import Analysis
from toca_fx.lower.compiler import Compiler, Inner
from toca_fx.lower.program import Program
from toca_fx.match.matcher import match
from toca_fx.plan.plan import Plan
from toca_fx.plan.planner import Planner
from toca_fx.policy import Policy
from toca_fx.runtime.context import current_place
from toca_fx.runtime.models import ModelKey
from toca_fx.runtime.parts import Attempt
from toca_fx.runtime.runner import Runner

Flat = list[Any]  # what a backend gets with a call


class Captured:
    """A model, captured for ``calls`` (keyword arguments each) that fit one graph.

    ``inputs`` are the flat inputs of each call.
    """

    def __init__(self, model: nn.Module, calls: Sequence[dict[str, Any]]) -> None:
        graph, self.inputs = capture_calls(model, calls)
        self._aten = to_aten(graph, self.inputs[0])
        self._matches = match(self._aten.graph)

    def plan(self, policy: Policy, num_steps: int | None = None) -> Plan:
        """What ``policy`` makes of the model."""
        return self._planner(policy).plan(num_steps)

    def compile(self, policy: Policy, inner: Compiler = "eager") -> Callable[[Flat], Tensor]:
        """What ``toca_fx.compile`` gives, as a function from flat inputs to the first output."""
        program = Program(Analysis(self._aten, self._planner(policy)), Inner(inner))
        runner, key = Runner(program, self.inputs[0]), ModelKey()

        def fast(inputs: Flat) -> Tensor:
            at = current_place()
            with torch.no_grad():
                return at.session.call(key, runner, inputs, Attempt(), at.path, at.told)[0]

        return fast

    def _planner(self, policy: Policy) -> Planner:
        return Planner(policy, self._matches, roles.aspect(self._aten.graph))
