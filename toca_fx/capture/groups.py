"""Groups of weights that one hook brings in and takes away, or casts and casts back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

_KINDS = ("_parameters", "_buffers")


@dataclass(frozen=True)
class Slot:
    """Where a module has a weight: a parameter or a buffer."""

    module: nn.Module
    kind: str
    name: str

    @property
    def tensor(self) -> Tensor:
        """What is there now."""
        found: Tensor = vars(self.module)[self.kind][self.name]
        return found

    def put(self, tensor: Tensor) -> None:
        """Put another tensor there."""
        vars(self.module)[self.kind][self.name] = tensor


def slots_of(modules: Iterable[nn.Module]) -> Iterator[Slot]:
    """The slots of these modules themselves, without those inside of them."""
    for module in modules:
        for kind in _KINDS:
            for name, tensor in vars(module)[kind].items():
                if tensor is not None:
                    yield Slot(module, kind, name)


class Group:
    """Weights that come and go together, by what ``hook`` does ahead of ``owner`` and behind it.

    While they are in, their ``device`` and ``dtype`` are these (None: those that they have away).
    ``moves`` says that they come from elsewhere, ``divisible`` that some of them can be brought in
    without the others, ``path`` which module the hook is on.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None
    moves = True
    divisible = False

    def __init__(self, hook: Any, owner: nn.Module, path: str) -> None:
        self.hook, self.owner, self.path = hook, owner, path

    def slots(self) -> Iterator[Slot]:
        """Where its weights belong."""
        return slots_of([self.owner])

    def onload(self, slots: Collection[Slot]) -> None:
        """Bring in the weights of these of its ``slots``: all of them, if it is not divisible."""
        self.hook.pre_forward(self.owner)

    def offload(self) -> None:
        """Take away what is in."""
        self.hook.post_forward(self.owner, None)

    def kept(self, slot: Slot) -> tuple[Tensor | None, bool]:
        """The tensor by which the weight of a slot is known while it is away, and whether its
        numbers are there too.

        None: there is no tensor that stays the same.
        """
        tensor = slot.tensor
        return (tensor if slot.kind == "_parameters" else None), True


class DiskOrMemory(Group):
    """A group of diffusers' group offloading: its modules have one hook each.

    What nobody reads stays away. A tensor of a class of its own is moved by the library alone.
    """

    divisible = True

    def __init__(self, hook: Any, owner: nn.Module, path: str) -> None:
        super().__init__(hook, owner, path)
        self._group = hook.group
        self.device = torch.device(self._group.onload_device)

    def slots(self) -> Iterator[Slot]:
        """Those of its modules, and those of tensors that it has without their modules."""
        inside = dict.fromkeys(each for module in self._group.modules for each in module.modules())
        yield from slots_of(inside)
        alone = {id(tensor) for tensor in (*self._group.parameters, *self._group.buffers)}
        if alone:
            for slot in slots_of(self.owner.modules()):
                if id(slot.tensor) in alone:
                    yield slot

    def onload(self, slots: Collection[Slot]) -> None:
        """Bring these in, whichever module would lead; nothing waits for another group."""
        if len(slots) == sum(1 for _ in self.slots()):
            self._group.onload_()
            if self._group.stream is not None:
                self._group.stream.synchronize()
            return
        with self._sources() as source_of:
            for slot in slots:
                tensor = slot.tensor
                tensor.data = source_of(tensor).to(self.device)

    @contextmanager
    def _sources(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Inside, what a tensor holds can be had by the tensor, wherever it lies."""
        group = self._group
        if group.offload_to_disk_path is None:
            # With a stream the library keeps pinned copies.
            yield lambda tensor: cast("Tensor", group.cpu_param_dict.get(tensor, tensor.data))
            return
        from safetensors import safe_open

        with safe_open(group.safetensors_file_path, framework="pt") as file:
            yield lambda tensor: cast("Tensor", file.get_tensor(group.tensor_to_key[tensor]))

    def offload(self) -> None:
        """Take it away."""
        self._group.offload_()

    def kept(self, slot: Slot) -> tuple[Tensor | None, bool]:
        """On a disk the tensor is the same, and holds nothing."""
        tensor, readable = super().kept(slot)
        return tensor, readable and self._group.offload_to_disk_path is None


class Aligned(Group):
    """What accelerate's AlignDevicesHook offloads: other tensors at each call, "meta" between."""

    def __init__(self, hook: Any, owner: nn.Module, path: str) -> None:
        super().__init__(hook, owner, path)
        self.device = device_of(hook.execution_device)

    def slots(self) -> Iterator[Slot]:
        """Its parameters; its buffers too, if the hook says so."""
        whole = self.hook.place_submodules
        for slot in slots_of(self.owner.modules() if whole else [self.owner]):
            persistent = slot.name not in slot.module._non_persistent_buffers_set
            if slot.kind == "_parameters" or (self.hook.offload_buffers and persistent):
                yield slot

    def kept(self, slot: Slot) -> tuple[Tensor | None, bool]:
        """The tensor of a state dict; one that is loaded from a disk is another each time."""
        source = self.hook.weights_map
        if self.hook.place_submodules:
            return None, False
        found = source
        while hasattr(found, "dataset"):  # names with a prefix
            found = found.dataset
        return (source[slot.name], True) if isinstance(found, dict) else (None, False)


class Cast(Group):
    """What is stored in one dtype and computed in another."""

    moves = False
    divisible = True

    def __init__(self, hook: Any, owner: nn.Module, path: str) -> None:
        super().__init__(hook, owner, path)
        self.dtype = hook.compute_dtype

    def slots(self) -> Iterator[Slot]:
        """Whatever ``module.to(dtype)`` casts."""
        return (
            slot
            for slot in slots_of(self.owner.modules())
            if slot.tensor.is_floating_point() or slot.tensor.is_complex()
        )

    def onload(self, slots: Collection[Slot]) -> None:
        """Cast these."""
        for slot in slots:
            slot.tensor.data = slot.tensor.data.to(self.dtype)


def group_of(hook: Any, owner: nn.Module, path: str) -> Group | None:
    """The group that a hook brings in and takes away; None if it does nothing like it."""
    if hasattr(getattr(hook, "group", None), "onload_"):
        return DiskOrMemory(hook, owner, path)
    if getattr(hook, "offload", False) is True and hasattr(hook, "weights_map"):
        return Aligned(hook, owner, path)
    if hasattr(hook, "storage_dtype") and hasattr(hook, "compute_dtype"):
        return Cast(hook, owner, path)
    return None


def device_of(device: Any) -> torch.device | None:
    """A device however it is written: its number, its name; None: none is given."""
    return None if device is None else torch.empty(0, device=device).device


def groups_by_slot(groups: Iterable[Group]) -> Mapping[Slot, tuple[Group, ...]]:
    """The groups that each weight is in, in the order in which they bring it in."""
    found: dict[Slot, tuple[Group, ...]] = {}
    for group in groups:
        for slot in group.slots():
            found[slot] = (*found.get(slot, ()), group)
    return found
