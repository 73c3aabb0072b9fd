"""One small model whose attention and MLP are spelled in many ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import toca_fx

WIDTH, HEADS, HIDDEN, BLOCKS, STEPS = 16, 2, 32, 2, 6
BATCH, SIDE = 2, 4
TOKENS = SIDE * SIDE
SCALE = (WIDTH // HEADS) ** -0.5


@torch.library.custom_op("toca_fx_tests::attention_bhnd", mutates_args=())
def attention_bhnd(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value).contiguous()


@attention_bhnd.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("toca_fx_tests::attention_bnhd", mutates_args=())
def attention_bnhd(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = (operand.transpose(1, 2) for operand in (query, key, value))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).contiguous()


@attention_bnhd.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape)


toca_fx.register_attention(attention_bhnd)
toca_fx.register_attention(torch.ops.toca_fx_tests.attention_bnhd, layout="bnhd")

# attention of q, k and v [B, H, N, D]

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def sdpa_with_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2], dtype=q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=-(places[:, None] - places).abs() / 4)


def sdpa_with_boolean_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(places[:, None] - places).abs() < 5)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * SCALE) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def scaled_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ (k * SCALE).mT, dim=-1) @ v


def scaled_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.matmul(q, k.transpose(2, 3)) / SCALE**-1, -1) @ v


def merged_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (operand.flatten(0, 1) for operand in (q, k, v))
    nothing = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(nothing, q, k.transpose(1, 2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, HEADS))


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (torch.einsum("bhnd,bhmd->bhnm", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhnm,bhmd->bhnd", weights, v)


def registered_bhnd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_bhnd(q, k, v)


def registered_bnhd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (operand.transpose(1, 2) for operand in (q, k, v))
    return torch.ops.toca_fx_tests.attention_bnhd(*heads).transpose(1, 2)


MIXES: tuple[Mix, ...] = (
    sdpa,
    sdpa_with_bias,
    sdpa_with_boolean_mask,
    grouped,
    scaled_query,
    scaled_key,
    scaled_product,
    merged_baddbmm,
    einsum,
    registered_bhnd,
    registered_bnhd,
)


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


class Attention(nn.Module):
    def __init__(self, mix: Mix, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.mix = mix
        self.q, self.k, self.v, self.out = (linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        return self.out(self.mix(*heads).transpose(1, 2).flatten(2))


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
    "lora": lambda: Mlp(linear=LoRA),
    "int8": lambda: Mlp(linear=Int8),
    "packed int8": lambda: Mlp(linear=PackedInt8),
    "conv1d": Conv1,
    "conv2d": Conv2,
}
FLOAT32 = {"packed int8"}  # has no float64 kernel


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), attention
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(
        self,
        mix: Mix = sdpa,
        mlp: Callable[[], nn.Module] = Mlp,
        linear: Callable[[int, int], nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(Attention(mix, linear), mlp()) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def make(dtype: torch.dtype = torch.float64, **spellings: Any) -> tuple[nn.Module, list[Tensor]]:
    """The model and the input of each step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(**spellings).to(dtype).eval().requires_grad_(False)
        return model, list(torch.randn(STEPS, BATCH, TOKENS, WIDTH, dtype=dtype))
