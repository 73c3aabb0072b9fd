"""Ways to quantise, or distribute, the linear layers of a model: by the libraries' own means.

Nothing of them is imported before it is used: some print warnings when they are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Quantise = Callable[[nn.Module], None]


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put what is made of it in the place of each linear layer."""
    for path, linear in list(model.named_modules()):
        if type(linear) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, make(linear))


def torchao(config: str, **options: Any) -> Quantise:
    def quantise(model: nn.Module) -> None:
        library: Any = importlib.import_module("torchao.quantization")
        library.quantize_(model, getattr(library, config)(**options))

    return quantise


def torchao_per_tensor(model: nn.Module) -> None:
    """One scale for all tokens that a linear layer reads."""
    granularity: Any = importlib.import_module("torchao.quantization.granularity")
    config = "Int8DynamicActivationInt8WeightConfig"
    torchao(config, granularity=granularity.PerTensor())(model)


def quanto(weights: str) -> Quantise:
    def quantise(model: nn.Module) -> None:
        library: Any = importlib.import_module("optimum.quanto")
        library.quantize(model, weights=getattr(library, weights))
        library.freeze(model)

    return quantise


def gguf(kind: str) -> Quantise:
    """As diffusers makes of a GGUF file."""

    def quantise(model: nn.Module) -> None:
        library: Any = importlib.import_module("gguf")
        own: Any = importlib.import_module("diffusers.quantizers.gguf.utils")
        type_ = getattr(library.GGMLQuantizationType, kind)

        def make(linear: nn.Linear) -> nn.Module:
            made = own.GGUFLinear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                compute_dtype=linear.weight.dtype,
            )
            packed = library.quants.quantize(linear.weight.detach().float().numpy(), type_)
            made.weight = own.GGUFParameter(torch.from_numpy(packed), quant_type=type_)
            made.bias = linear.bias
            return made

        replaced(model, make)

    return quantise


def bitsandbytes(layer: str, parameter: str, **options: Any) -> Quantise:
    def quantise(model: nn.Module) -> None:
        library: Any = importlib.import_module("bitsandbytes")

        def make(linear: nn.Linear) -> nn.Module:
            made = getattr(library.nn, layer)(
                linear.in_features, linear.out_features, linear.bias is not None, **options
            )
            packed = getattr(library.nn, parameter)
            own = {key: value for key, value in options.items() if key != "compute_dtype"}
            made.weight = packed(linear.weight.detach(), requires_grad=False, **own)
            made.bias = linear.bias
            return made.to("cpu")

        replaced(model, make)

    return quantise


def tensor_parallel(model: nn.Module) -> None:
    """Every linear layer on a mesh of one rank: its parameters are DTensors."""
    distributed: Any = importlib.import_module("torch.distributed")
    parallel: Any = importlib.import_module("torch.distributed.tensor.parallel")
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    linears = [path for path, module in model.named_modules() if type(module) is nn.Linear]
    for path in linears:
        parallel.parallelize_module(model, mesh, {path: parallel.RowwiseParallel()})


def add_lora(model: nn.Module) -> None:
    """A LoRA beside quantised layers, which diffusers' own loader does not take all of."""
    peft: Any = importlib.import_module("peft")
    targets = ["to_q", "to_out.0", "ff.net.2"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights="gaussian")
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.requires_grad_(False)


SCHEMES: dict[str, Quantise] = {
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "quanto int8": quanto("qint8"),
    "quanto float8": quanto("qfloat8"),
    "quanto int4": quanto("qint4"),
    "GGUF Q8": gguf("Q8_0"),
    "GGUF Q4": gguf("Q4_0"),
    "bitsandbytes NF4": bitsandbytes("Linear4bit", "Params4bit", quant_type="nf4"),
    "bitsandbytes int8": bitsandbytes("Linear8bitLt", "Int8Params", has_fp16_weights=False),
    "DTensor": tensor_parallel,
}
