"""Ways to keep the weights of a model elsewhere, or in another dtype, between its calls.

Each is given a folder for what it puts on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Mode = Callable[[Any, Path], None]


def sequential(model: Any, _: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device="cpu")


def sequential_with_buffers(model: Any, _: Path) -> None:
    from accelerate import cpu_offload

    cpu_offload(model, execution_device="cpu", offload_buffers=True)


def on_disk(model: Any, path: Path) -> None:
    from accelerate import disk_offload

    disk_offload(model, str(path), execution_device="cpu")


def whole_model(model: Any, _: Path) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, "cpu")


def blocks(model: Any, _: Path) -> None:
    model.enable_group_offload("cpu", offload_type="block_level", num_blocks_per_group=1)


def leaves(model: Any, _: Path) -> None:
    model.enable_group_offload("cpu", offload_type="leaf_level")


def two_blocks_on_disk(model: Any, path: Path) -> None:
    model.enable_group_offload(
        "cpu", offload_type="block_level", num_blocks_per_group=2, offload_to_disk_path=str(path)
    )


def leaves_on_disk(model: Any, path: Path) -> None:
    model.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=str(path))


def stored_in_8_bits(model: Any, _: Path) -> None:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def stored_in_8_bits_on_disk(model: Any, path: Path) -> None:
    stored_in_8_bits(model, path)
    leaves_on_disk(model, path)


MODES: tuple[Mode, ...] = (
    sequential,
    sequential_with_buffers,
    on_disk,
    whole_model,
    blocks,
    leaves,
    two_blocks_on_disk,
    leaves_on_disk,
    stored_in_8_bits,
    stored_in_8_bits_on_disk,
)
