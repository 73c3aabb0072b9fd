"""A model whose weights are away between calls, or stored in another dtype, called compiled.

    hooks around the model  ->  hooks inside are off, weights are stubs  ->  compiled call
                                                                             |  a piece of a graph
                                                                             |  asks for its weights

Hooks are not traced: Dynamo captures the model as if every weight were in. What a graph reads is
brought in when it is run, and taken away when something else is.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from toca_fx.capture.calls import bring_in
from toca_fx.capture.groups import Group, Slot, device_of, group_of, groups_by_slot
from toca_fx.capture.hooks import Hooked, hooked_modules
from toca_fx.capture.stubs import Fingerprint, Stubs, like_stub
from toca_fx.diagnostics import UnsupportedModelError
from toca_fx.torch_private import tree_map_only

Compiled = Callable[..., Any]
Coming = Mapping[Group, Sequence[Slot]]
"""Weights that come in, by the group that they come with."""

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


class Hooks:
    """What the hooks of a model do: ``around`` it, for their ``groups`` of weights, ``ahead``.

    ``taken_off`` are the modules that run without them. All weights come to one ``device`` (None:
    they stay on theirs).
    """

    def __init__(self, model: nn.Module, hooked: Iterable[Hooked]) -> None:
        self.model = model
        self.around: list[tuple[Any, nn.Module]] = []
        self.ahead: list[tuple[Any, nn.Module]] = []
        self.taken_off: list[Hooked] = []
        self._unmoved: set[str] = set()
        groups: dict[int, Group] = {}
        devices: dict[torch.device, str] = {}
        for each in hooked:
            if self._is_foreign(each):
                continue
            self.taken_off.append(each)
            for hook in each.hooks:
                group = group_of(hook, each.owner, each.path)
                if group is not None:
                    groups.setdefault(id(getattr(hook, "group", hook)), group)
                    self._note_unmoved(hook)
                elif each.module is model:
                    self.around.append((hook, each.owner))
                elif hasattr(hook, "prev_module_hook"):  # moves the module once, and leaves it
                    self.ahead.append((hook, each.owner))
                device = group.device if group else device_of(_execution_device(hook))
                if device is not None:
                    devices.setdefault(device, each.path or type(model).__name__)
        self.groups = tuple(groups.values())
        self.device = next(iter(devices), None) if self.groups else None
        if len(devices) > 1:
            said = ", ".join(f"`{path}` on {device}" for device, path in devices.items())
            raise UnsupportedModelError(
                f"hooks run the modules of {type(model).__name__} on several devices ({said}), and "
                "a compiled step runs on one: load it on one device, with one kind of offload"
            )

    def _is_foreign(self, hooked: Hooked) -> bool:
        """Whether all hooks of a module are left for Dynamo to trace: they change what it returns.

        Raises:
            UnsupportedModelError: some are, and others are not.
        """
        at_model = hooked.module is self.model
        foreign = [hook for hook in hooked.hooks if not _is_known(hook, at_model)]
        if foreign and len(foreign) < len(hooked.hooks):
            names = ", ".join(type(hook).__name__ for hook in foreign)
            raise UnsupportedModelError(
                f"`{hooked.path or type(self.model).__name__}` has hooks that move or cast its "
                f"weights, and others that toca_fx does not know ({names}): remove one of them"
            )
        return bool(foreign)

    def _note_unmoved(self, hook: Any) -> None:
        """Note the arguments that a hook would not move."""
        config = getattr(hook, "config", hook)
        for name in ("exclude_kwargs", "skip_keys"):
            said = getattr(config, name, None) or ()
            self._unmoved.update([said] if isinstance(said, str) else said)

    def moved(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The arguments of a call, where the weights come to."""
        device = self.device
        if device is None:
            return args, kwargs

        def put(value: Any) -> Any:
            return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)

        unmoved = self._unmoved
        return put(args), {
            name: value if name in unmoved else put(value) for name, value in kwargs.items()
        }

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, modules run as if they had no hooks."""
        try:
            for hooked in self.taken_off:
                hooked.take_off()
            yield
        finally:
            for hooked in self.taken_off:
                hooked.put_on()


def _is_known(hook: Any, at_model: bool) -> bool:
    """Whether a hook need not be traced.

    Around the model it may do what it likes, unless it calls the model by itself.
    """
    if hasattr(hook, "new_forward"):
        return False
    known = hasattr(hook, "execution_device") or group_of(hook, nn.Module(), "") is not None
    return known or at_model


def _execution_device(hook: Any) -> Any:
    return getattr(hook, "execution_device", None)


class Weights:
    """The weights of one call: stubs at first, and then where they are needed.

    Groups of the model itself stay until the call ends, as its own hook would have it.
    """

    def __init__(self, hooks: Hooks, stubs: Stubs) -> None:
        self.moved_bytes = 0
        self._slots: dict[Group, list[Slot]] = {group: [] for group in hooks.groups}
        self._of: dict[int, tuple[Slot, Tensor, tuple[Group, ...]]] = {}
        self._hidden: list[tuple[Slot, Tensor]] = []
        self._stubs: list[tuple[Slot, Tensor]] = []
        self._always: dict[Group, None] = {}
        self._bytes: dict[tuple[Group, Slot], int] = {}  # to move a weight in, by the first group
        self._in: dict[Group, set[Slot]] = {}
        self._stub_of: dict[int, Tensor] = {}  # by the weight, once all are in
        known: dict[int, Tensor | None] = {}  # a weight that several modules share has one stub
        for slot, groups in groups_by_slot(hooks.groups).items():
            away = slot.tensor
            for group in groups:
                self._slots[group].append(slot)
            if id(away) not in known:
                known[id(away)] = stubs.of(slot, groups)
                self._bytes[groups[0], slot] = away.nbytes if groups[0].moves else 0
            stub = known[id(away)]
            if stub is None:
                self._always.update(dict.fromkeys(groups))
                continue
            self._of.setdefault(id(stub), (slot, stub, groups))
            self._hidden.append((slot, away))
            self._stubs.append((slot, stub))

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, up to the first weight that is asked for, the model has stubs.

        At the end all weights are away.
        """
        try:
            self._bring(self._whole(self._always))
            for slot, stub in self._stubs:
                slot.put(stub)
            yield
        finally:
            self._show()
            with ExitStack() as stack:  # one that fails keeps no other from going
                for group in self._in:
                    stack.callback(group.offload)

    def onload(self, values: Sequence[Any]) -> list[Any]:
        """``values`` with weights in the place of stubs; others may be taken away."""
        self._show()
        wanted = self._wanted(values)
        for group in self._unwanted(wanted, self._in):
            del self._in[group]
            group.offload()
        self._bring(wanted)
        found = (self._of.get(id(value)) for value in values)
        return [
            value if each is None else like_stub(each[0].tensor, each[1])
            for value, each in zip(values, found, strict=True)
        ]

    def onload_all(self) -> None:
        """Bring all weights in, until the call ends."""
        self._show()
        self._always.update(dict.fromkeys(self._slots))
        self._bring(self._slots)
        self._stub_of = {id(slot.tensor): stub for slot, stub in self._stubs}

    def as_stubs(self, values: Sequence[Any]) -> Sequence[Any]:
        """``values`` with stubs in the place of weights: those may be other tensors at each call.

        What Dynamo captures in several graphs is given weights.
        """
        of = self._stub_of
        return [of.get(id(value), value) for value in values] if of else values

    def bytes_to_move(self, asked: Iterable[Sequence[Any]]) -> int:
        """Bytes that a call brings in which asks for these values, one after the other."""
        inside: dict[Group, set[Slot]] = {}
        coming = [*_missing(self._whole(self._always), inside)]
        for values in asked:
            wanted = self._wanted(values)
            for group in self._unwanted(wanted, inside):
                del inside[group]
            coming += _missing(wanted, inside)
        return sum(self._bytes_of(group, slots) for group, slots in coming)

    @property
    def all_bytes(self) -> int:
        """Bytes that the hooks bring in at every call of the model as it is."""
        return sum(self._bytes.values())

    def _wanted(self, values: Sequence[Any]) -> Coming:
        """What has to be in for these values, in the order in which groups come in."""
        read: dict[Group, dict[Slot, None]] = {}
        for value in values:
            if (known := self._of.get(id(value))) is not None:
                slot, _, groups = known
                for group in groups:
                    read.setdefault(group, {})[slot] = None
        if not read:
            return {}
        return {
            group: [*read[group]] if group.divisible else slots
            for group, slots in self._slots.items()
            if group in read
        }

    def _whole(self, groups: Iterable[Group]) -> Coming:
        return {group: self._slots[group] for group in groups}

    def _unwanted(self, wanted: Coming, inside: Iterable[Group]) -> list[Group]:
        """The groups that go first, in that order; none, if nothing comes."""
        stay = {*wanted, *self._always}
        return [each for each in reversed([*inside]) if wanted and each not in stay and each.path]

    def _bring(self, wanted: Coming) -> None:
        for group, slots in _missing(wanted, self._in):
            group.onload(slots)
            self.moved_bytes += self._bytes_of(group, slots)

    def _bytes_of(self, group: Group, slots: Iterable[Slot]) -> int:
        return sum(self._bytes.get((group, slot), 0) for slot in slots)

    def _show(self) -> None:
        """Put the weights back in their places: Dynamo has seen what it guards."""
        hidden, self._hidden = self._hidden, []
        for slot, away in hidden:
            slot.put(away)


def _missing(wanted: Coming, inside: dict[Group, set[Slot]]) -> Iterator[tuple[Group, list[Slot]]]:
    """What is wanted and not ``inside``, and is from now on."""
    for group, slots in wanted.items():
        already = inside.setdefault(group, set())
        coming = [slot for slot in slots if slot not in already]
        if coming:
            already.update(coming)
            yield group, coming


class Offloaded:
    """What calling a twin runs: ``compiled``, with the hooks of ``model`` outside of it.

    ``onloading`` makes weights known to what is called inside; ``records`` says that steps are to
    be recorded as CUDA graphs whatever they are.
    """

    def __init__(
        self,
        model: nn.Module,
        compiled: Compiled,
        *,
        onloading: Callable[[Weights], AbstractContextManager[None]],
        fingerprint: Fingerprint,
        records: bool,
    ) -> None:
        self._model, self._compiled = model, compiled
        self._onloading, self._records = onloading, records
        self._stubs = Stubs(fingerprint)
        self._lock = _locks.setdefault(model, threading.RLock())  # that of all its twins

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            UnsupportedModelError: its hooks do what a compiled step cannot.
        """
        if torch.compiler.is_dynamo_compiling():  # in a graph of somebody else
            return self._compiled(*args, **kwargs)
        # Another thread's call would find no hooks, and take away what this one has brought in.
        with self._lock, ExitStack() as stack:
            hooked = hooked_modules(self._model)
            if hooked:
                return self._call(Hooks(self._model, hooked), stack, args, kwargs)
        return self._compiled(*args, **kwargs)

    def _call(self, hooks: Hooks, stack: ExitStack, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._records and hooks.groups:
            first = hooks.groups[0]
            raise UnsupportedModelError(
                f"mode='reduce-overhead' records steps as CUDA graphs, which read weights where "
                f"they were, and {type(first.hook).__name__} on "
                f"`{first.path or type(self._model).__name__}` moves or casts them at every call: "
                "leave the mode out, or do not offload"
            )
        for hook, owner in hooks.ahead:
            hook.pre_forward(owner)
        for hook, owner in hooks.around:
            args, kwargs = hook.pre_forward(owner, *args, **kwargs)
            if getattr(hook, "no_grad", False):
                stack.enter_context(torch.no_grad())
        args, kwargs = hooks.moved(args, kwargs)
        weights = Weights(hooks, self._stubs) if hooks.groups else None
        with hooks.off(), ExitStack() as inside:
            if weights is not None:
                inside.enter_context(weights.hidden())
                inside.enter_context(self._onloading(weights))
                inside.callback(bring_in.reset, bring_in.set(weights.onload_all))
            output = self._compiled(*args, **kwargs)
        for hook, owner in reversed(hooks.around):
            output = hook.post_forward(owner, output)
        return output


@contextmanager
def as_onloaded(model: nn.Module) -> Iterator[Weights]:
    """Inside, ``model`` can be captured as if it had no hooks, and all weights were in.

    Nothing is brought in, but tensors of classes of their own. Yields the weights that are away.
    """
    hooks = Hooks(model, hooked_modules(model))
    weights = Weights(hooks, Stubs(lambda _: None))
    with hooks.off(), weights.hidden():
        yield weights
