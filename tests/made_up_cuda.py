"""A CUDA device that is not there: graphs are lowered for it down to the code that inductor
generates, and no kernel is launched.

Tensors are fake. Three things stand in for a GPU: a device guard that does nothing (the CPU build
of torch has none for CUDA), the properties of an H100, and a Triton driver that knows its target
only. Kernels are written out and counted, not compiled: what Triton itself makes of a kernel shows
``compile_for_hopper``.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import torch
import torch._inductor.config
import torch._inductor.scheduler
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch.utils._pytree import tree_map

from toca_fx.examples import Draw, Example

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)

# A guard, and the choice that scaled_dot_product_attention makes on a Hopper GPU: cuDNN's kernel
# (3) in half precision, the memory-efficient one (2) in float32 and with masks.
_DEVICE = """
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
struct MadeUpGuard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
};
C10_REGISTER_GUARD_IMPL(CUDA, MadeUpGuard);
}
namespace at::native {
static int64_t choose(const Tensor& query, const Tensor&, const Tensor&,
                      const std::optional<Tensor>& mask, double, bool, std::optional<double>,
                      bool) {
  bool half = query.scalar_type() == kHalf || query.scalar_type() == kBFloat16;
  return half && !mask.has_value() ? 3 : 2;
}
static int installed = [] { _fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose); return 0; }();
}
"""


@dataclass
class Kernel:
    """A Triton kernel that inductor wrote; ``launches`` counts its calls where the code around it
    is run.
    """

    name: str
    source: str
    launches: int = 0

    def run(self, *_args: Any, **_kwargs: Any) -> None:
        """Count a launch."""
        self.launches += 1


@dataclass
class Lowered:
    """What was lowered while the device was there: the kernels, and the code that calls them, one
    text per graph.
    """

    kernels: list[Kernel] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)

    def calls(self, pattern: str) -> int:
        """How many lines of the code (kernels' own apart) match ``pattern``."""
        bodies = (code[code.rindex("def call(") :] for code in self.codes)
        return sum(bool(re.search(pattern, line)) for body in bodies for line in body.splitlines())


class _Driver:
    """As much of a Triton driver as is asked for before a kernel is launched."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def made_up_cuda() -> Iterator[Lowered]:
    """Everything inside is lowered for an H100; fake tensors on "cuda" are at home there."""
    from triton.runtime.driver import driver

    _load_device()
    lowered = Lowered()

    def write_down(_self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Kernel:
        kernel = Kernel(name, source)
        lowered.kernels.append(kernel)
        return kernel

    patches = [
        mock.patch("torch.cuda.get_device_properties", return_value=H100),
        mock.patch("torch.cuda.get_device_capability", return_value=(H100.major, H100.minor)),
        mock.patch("torch.cuda.get_device_name", return_value=H100.name),
        mock.patch("torch.cuda.current_device", return_value=0),
        mock.patch("torch.cuda.device_count", return_value=1),
        mock.patch("torch.cuda.synchronize", return_value=None),
        mock.patch("torch._C._cuda_getCurrentRawStream", return_value=0, create=True),
        mock.patch.object(CudaInterface, "get_device_properties", return_value=H100),
        mock.patch.object(CudaInterface, "is_bf16_supported", return_value=True),
        mock.patch("torch._inductor.scheduler.has_triton", return_value=True),
        mock.patch.object(AsyncCompile, "triton", write_down),
        mock.patch.object(GraphLowering, "save_output_code", lowered.codes.append),
        torch._inductor.config.patch(
            fx_graph_cache=False, joint_graph_constant_folding=False
        ),  # folding computes
    ]
    before = driver._active
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        driver.set_active(_Driver())
        try:
            yield lowered
        finally:
            driver._active = before


def fake_example(example: Example, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """A model on the device and the arguments of one call, all fake; to be used within the fake
    mode that they share, which is active.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            model: nn.Module = getattr(diffusers, example.model)(**example.config)
    finally:
        torch.set_default_dtype(default)

    def place(value: Any) -> Any:
        return (
            value.to("cuda", dtype if value.is_floating_point() else value.dtype)
            if isinstance(value, Tensor)
            else value
        )

    inputs = tree_map(place, example.inputs(Draw(example.batch, 0)))
    return model.eval().requires_grad_(False), {**inputs, "return_dict": False}


@functools.cache
def _load_device() -> None:
    """What the CPU build of torch lacks, compiled in a second or two."""
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "device.cpp"), Path(folder, "device.so")
        source.write_text(_DEVICE, encoding="utf-8")
        libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        command = [
            "g++",
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{root / 'include'}",
            str(source),
            "-o",
            str(library),
            *libraries,
        ]
        subprocess.run(command, check=True, capture_output=True)
        torch.ops.load_library(str(library))
