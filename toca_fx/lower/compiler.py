"""The compiler of the rewritten graphs: a backend of torch.compile, and the mode of inductor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from toca_fx.diagnostics import did_you_mean
from toca_fx.torch_private import compiling, list_mode_options, lookup_backend

Compiler = str | Callable[..., Any]


@dataclass(frozen=True)
class Inner:
    """The compiler of step graphs: a backend of torch.compile and its mode.

    ``backend`` is "inductor", "aot_eager", "eager" or another name that torch.compile knows, or a
    callable; ``mode`` is as in torch.compile. Frozen, because Dynamo guards on backends being
    equal.

    Raises:
        TypeError: ``backend`` is neither a name nor a callable.
        ValueError: there is no such backend or mode, or the backend has no modes.
    """

    backend: Compiler = "inductor"
    mode: str | None = None

    def __post_init__(self) -> None:
        self._function()
        if self.mode is None:
            return
        if self.backend != "inductor":
            raise ValueError(
                f"mode={self.mode!r} is for the inner backend inductor; {self.backend} has no modes"
            )
        known = list_mode_options()
        if not isinstance(self.mode, str):
            raise TypeError(
                f"mode={self.mode!r}: expected the name of a mode; known: {', '.join(known)}"
            )
        if self.mode not in known:
            hint = did_you_mean(str(self.mode), known)
            raise ValueError(f"unknown mode `{self.mode}`{hint}; known: {', '.join(known)}")

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Compile ``module`` for ``inputs``, fake tensors."""
        options = {"config_patches": self._options} if self._options else {}
        with compiling():
            run: Callable[..., Any] = self._function()(module, inputs, **options)
        return run

    @property
    def exact(self) -> bool:
        """Whether every operator is the model's own, at its own shapes: to the last bit.

        A product of all timesteps at once is faster, and rounds otherwise.
        """
        return self.backend == "eager"

    @property
    def records(self) -> bool | None:
        """Whether ``mode`` asks for CUDA graphs on a GPU; None if it leaves that open."""
        if self.backend != "inductor":
            return False
        if self.mode is None:
            return None
        return bool(list_mode_options(self.mode).get("triton.cudagraphs"))

    @property
    def _options(self) -> dict[str, Any]:
        # Whole steps are recorded, selection included (see ``cuda_graphs``), and not the graphs
        # that inductor gets.
        found = {} if self.mode is None else list_mode_options(self.mode)
        return {key: value for key, value in found.items() if key != "triton.cudagraphs"}

    def _function(self) -> Callable[..., Any]:
        if self.backend == "toca":
            raise ValueError(
                "inner='toca': the inner backend compiles the graphs that toca_fx has rewritten, "
                "and cannot be toca_fx itself; leave it out for inductor"
            )
        if callable(self.backend):
            return self.backend
        if not isinstance(self.backend, str):
            raise TypeError(
                f"inner={self.backend!r}: expected the name of a torch.compile backend, "
                "or a callable"
            )
        try:
            found: Callable[..., Any] = lookup_backend(self.backend)
        except Exception as error:
            known = torch.compiler.list_backends(exclude_tags=())
            hint = did_you_mean(self.backend, known)
            raise ValueError(
                f"unknown inner backend `{self.backend}`{hint}; known: {', '.join(known)}"
            ) from error
        return found
