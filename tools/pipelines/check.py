"""Whether a case is one: two builds, one call each, equal and finite outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tools.pipelines.case import Case

STEPS = 12


@dataclass(frozen=True)
class Checked:
    """What a call did: calls of each transformer, steps of the scheduler, and what came out."""

    calls: dict[str, int]
    steps: int
    outputs: list[Tensor]

    @property
    def per_step(self) -> float:
        """How often a transformer is called in one step of the scheduler."""
        return sum(self.calls.values()) / self.steps


def check(case: Case) -> Checked:
    """Build and call the case twice, and once more with other transformers.

    Raises ValueError if the outputs of the two differ, are constant or not finite, if two calls of
    a transformer give the same (steps and branches must differ for a cache to be seen), and if
    another transformer does not change the output.
    """
    first, second = (_called(case, case.build()) for _ in range(2))
    disturbed = _called(case, _disturbed(case.build()))
    if not first.outputs:
        raise ValueError(f"{case.name}: no tensor in the output")
    for one, other, far in zip(first.outputs, second.outputs, disturbed.outputs, strict=True):
        if not one.isfinite().all():
            raise ValueError(f"{case.name}: the output is not finite")
        if one.float().std() < 1e-3:
            raise ValueError(f"{case.name}: the output is constant")
        if not torch.equal(one, other):
            raise ValueError(f"{case.name}: two builds differ by {(one - other).abs().max()}")
        if torch.equal(one, far):
            raise ValueError(f"{case.name}: the output does not depend on the transformer")
    return first


def tensors(output: Any) -> list[Tensor]:
    """The tensors and arrays in what a pipeline or a model returns."""
    leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [torch.as_tensor(leaf) for leaf in leaves if isinstance(leaf, Tensor | np.ndarray)]


def _transformers(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a pipeline by the names of the components."""
    return {
        name: model
        for name, model in pipe.components.items()
        if "transformer" in name and isinstance(model, nn.Module)
    }


def _disturbed(pipe: Any) -> Any:
    for model in _transformers(pipe).values():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    return pipe


def _called(case: Case, pipe: Any) -> Checked:
    with _recorded(pipe) as recorded, _steps(pipe.scheduler) as steps:
        output = case.call(pipe, STEPS)
    for name, predictions in recorded.items():
        if len(set(predictions)) < len(predictions):
            raise ValueError(f"{case.name}: two calls of the model are equal ({name})")
    return Checked(
        {name: len(predictions) for name, predictions in recorded.items()},
        steps.call_count,
        tensors(output),
    )


def _steps(scheduler: Any) -> AbstractContextManager[Mock]:
    """Count the steps of a scheduler and its copies (diffusion forcing has one for each frame)."""
    cls = type(scheduler)
    counted: AbstractContextManager[Mock] = patch.object(
        cls, "step", autospec=True, side_effect=cls.step
    )
    return counted


@contextmanager
def _recorded(pipe: Any) -> Iterator[dict[str, list[bytes]]]:
    """What each transformer of the pipeline predicts, call by call, by its name."""
    models = _transformers(pipe)
    recorded: dict[str, list[bytes]] = {name: [] for name in models}

    def recorder(name: str) -> Callable[..., None]:
        def record(model: nn.Module, inputs: object, output: Any) -> None:
            values = [value.double().numpy().tobytes() for value in tensors(output)]
            recorded[name].append(b"".join(values))

        return record

    hooks = [model.register_forward_hook(recorder(name)) for name, model in models.items()]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()
