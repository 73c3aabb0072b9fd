"""Linear layers and MLPs in all spellings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.spellings.sizes import HIDDEN, SIDE, WIDTH


class LoRA(nn.Module):
    """A linear and a low-rank pair beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class Int8(nn.Module):
    """Weights of 8 bits, one scale per output channel."""

    weight: Tensor
    scale: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer(
            "weight", torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        )
        self.register_buffer("scale", torch.full((outputs, 1), 0.02 / inputs**0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


class PackedInt8(Int8):
    """The same as one operator, which wants a matrix."""

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.ops.aten._weight_int8pack_mm(
            x.reshape(-1, x.shape[-1]), self.weight, self.scale[:, 0].to(x.dtype)
        )
        return flat.reshape(*x.shape[:-1], -1)


class Mlp(nn.Module):
    """linear -> activation -> dropout -> linear."""

    def __init__(
        self,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        linear: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.up, self.activation, self.dropout, self.down = (
            linear(WIDTH, HIDDEN),
            activation,
            nn.Dropout(0.1),
            linear(HIDDEN, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.activation(self.up(x))))


class Geglu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class Swiglu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(WIDTH, HIDDEN),
            nn.Linear(WIDTH, HIDDEN),
            nn.Linear(HIDDEN, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TensorSplit(Geglu):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).tensor_split(2, dim=-1)
        return self.down(value * F.silu(gate))


class Normed(Mlp):
    """A norm in front of the activation or behind it, or spelled out."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.norm = where, nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.where == "front":
            return self.down(F.gelu(self.norm(h)))
        if self.where == "behind":
            return self.down(self.norm(F.gelu(h)))
        h = F.gelu(h)
        return self.down(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


class BatchNormed(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.up(x).transpose(1, 2)).transpose(1, 2)
        return self.down(F.gelu(h))


class Products(nn.Module):
    """Weights [in, out], and how they are multiplied."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.product = product
        self.up = nn.Parameter(torch.randn(WIDTH, HIDDEN) / 4)
        self.down = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(F.gelu(self.product(x, self.up)), self.down)


def by_bmm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x, weight.expand(x.shape[0], -1, -1))


def by_baddbmm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.baddbmm(weight[:1], x, weight.expand(x.shape[0], -1, -1))


def channels_first(x: Tensor, weight: Tensor) -> Tensor:
    return (weight.t() @ x.transpose(1, 2)).transpose(1, 2)


def by_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Two products side by side, of half of the channels each."""
    both = torch.stack([weight[: x.shape[-1] // 2], weight[x.shape[-1] // 2 :]])
    return torch.einsum("bnhc,hcd->bnd", x.unflatten(-1, (2, -1)), both)


class Conv1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(WIDTH, HIDDEN, 1), nn.Conv1d(HIDDEN, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Conv2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(WIDTH, HIDDEN, 1), nn.Conv2d(HIDDEN, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, (SIDE, SIDE))
        return self.down(F.gelu(self.up(image))).flatten(2).transpose(1, 2)


MLPS: dict[str, Callable[[], nn.Module]] = {
    "gelu": Mlp,
    "squared relu": lambda: Mlp(lambda x: F.relu(x) ** 2),
    "quick gelu": lambda: Mlp(lambda x: x * torch.sigmoid(1.702 * x)),
    "hardswish": lambda: Mlp(F.hardswish),
    "log sigmoid": lambda: Mlp(F.logsigmoid),
    "geglu": Geglu,
    "swiglu": Swiglu,
    "swiglu by tensor_split": TensorSplit,
    "prelu": lambda: Mlp(nn.PReLU()),
    "prelu per channel": lambda: Mlp(
        lambda x: F.prelu(x.mT, torch.linspace(0, 1, HIDDEN).to(x)).mT
    ),
    "a norm in front": lambda: Normed("front"),
    "a norm behind": lambda: Normed("behind"),
    "a norm spelled out": lambda: Normed("spelled out"),
    "batch norm": BatchNormed,
    "matmul": lambda: Products(torch.matmul),
    "matmul from the left": lambda: Products(channels_first),
    "einsum": lambda: Products(lambda x, w: torch.einsum("bnc,cd->bnd", x, w)),
    "einsum, the weight first": lambda: Products(lambda x, w: torch.einsum("cd,bnc->bnd", w, x)),
    "einsum of halves": lambda: Products(by_heads),
    "bmm": lambda: Products(by_bmm),
    "baddbmm": lambda: Products(by_baddbmm),
    "tensordot": lambda: Products(lambda x, w: torch.tensordot(x, w, 1)),
    "lora": lambda: Mlp(linear=LoRA),
    "int8": lambda: Mlp(linear=Int8),
    "packed int8": lambda: Mlp(linear=PackedInt8),
    "conv1d": Conv1,
    "conv2d": Conv2,
}
FLOAT32 = {"packed int8"}  # has no float64 kernel
