"""Hooks that accelerate and diffusers put around modules: found, read, and taken out of the way.

Both replace ``module.forward``, in ``vars(module)``, by a partial of a function of their own, which
calls what was there before. Neither library is imported: their hooks are told by what they have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from toca_fx.diagnostics import UnsupportedModelError

_LIBRARIES = ("accelerate.hooks", "diffusers.hooks.hooks")

# They learn in which order modules run, or keep peft from casting to a dtype of storage: neither
# is needed where weights are brought in by what a graph reads, in the dtype of computing.
_IDLE = frozenset(
    {"LazyPrefetchGroupOffloadingHook", "LayerExecutionTrackerHook", "PeftInputAutocastDisableHook"}
)


@dataclass(frozen=True)
class Hooked:
    """A module with hooks, the outermost first.

    ``owner`` is the module that they were given: a twin, if they were put on one. ``inner`` is the
    forward that they are around, and ``outer`` what ``module.forward`` is with them.
    """

    module: nn.Module
    path: str
    owner: nn.Module
    hooks: tuple[Any, ...]
    inner: Callable[..., Any]
    outer: Callable[..., Any]

    def take_off(self) -> None:
        """Let the module run as if it had no hooks."""
        if getattr(self.inner, "__func__", None) is type(self.module).forward:
            vars(self.module).pop("forward", None)
        else:
            vars(self.module)["forward"] = self.inner

    def put_on(self) -> None:
        """Let it run with them again."""
        vars(self.module)["forward"] = self.outer


def hooked_modules(model: nn.Module) -> list[Hooked]:
    """The modules of ``model`` that have hooks, itself among them, those around others first."""
    found = _with_own_forward(model)
    if not found:
        return []
    paths = {module: path for path, module in model.named_modules()}
    hooked = (_hooked(module, paths[module]) for module in found)
    return [each for each in hooked if each is not None]


def _with_own_forward(model: nn.Module) -> list[nn.Module]:
    """The modules that have a forward of their own, besides that of their class.

    It is asked at every call; ``model.modules()`` would take ten times as long.
    """
    found: list[nn.Module] = []
    left, seen = [model], {model}
    for module in left:
        state = module.__dict__
        if "forward" in state:
            found.append(module)
        for child in state["_modules"].values():
            if child is not None and child not in seen:
                seen.add(child)
                left.append(child)
    return found


def _hooked(module: nn.Module, path: str) -> Hooked | None:
    """The hooks of a module whose forward is its own; None if that is no library's doing."""
    outer = forward = vars(module)["forward"]
    hooks: list[Any] = []
    libraries: list[str] = []
    while (library := _library(forward)) is not None:
        if library in libraries:
            raise UnsupportedModelError(
                f"`{path or type(module).__name__}` has hooks of accelerate between hooks of "
                "diffusers: enable one after the other, not in turn"
            )
        libraries.append(library)
        if library == "accelerate.hooks":
            hooks += _flat(vars(module)["_hf_hook"])
            forward = vars(module)["_old_forward"]
        else:
            registry = vars(module)["_diffusers_hook"]
            hooks += [registry.hooks[name] for name in reversed(registry._hook_order)]
            innermost = registry._fn_refs[0]
            forward = innermost.original_forward or innermost.forward
    if not hooks:
        return None
    kept = tuple(hook for hook in hooks if type(hook).__name__ not in _IDLE)
    return Hooked(module, path, outer.args[0], kept, forward, outer)


def _library(forward: Any) -> str | None:
    """The library that made a forward; None if it is no hook's."""
    if not isinstance(forward, partial):
        return None
    made_by = getattr(forward.func, "__module__", "")
    return made_by if made_by in _LIBRARIES else None


def _flat(hook: Any) -> list[Any]:
    """A hook of accelerate, or those that one stands for: the first of them is the first to act."""
    inside = getattr(hook, "hooks", None)
    return [hook] if inside is None else [each for one in inside for each in _flat(one)]
