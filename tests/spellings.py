"""One small model whose attention and MLP are spelled in many ways."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def einsum_by_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads behind tokens, as the heads of a projection lie."""
    q, k, v = (operand.transpose(1, 2) for operand in (q, k, v))
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * SCALE).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).transpose(1, 2)


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = 5 * torch.tanh(q @ k.mT * SCALE / 5)
    return scores.softmax(-1) @ v


def masked_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    far = (places[:, None] - places).abs() > 5
    return (q @ k.mT * SCALE).masked_fill(far, -torch.inf).softmax(-1) @ v


def product_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A bias by relative position that is a product of the queries too (SAM, MViT)."""
    rows = torch.einsum("bhnd,md->bhnm", q, torch.ones(SIDE, q.shape[3], dtype=q.dtype))
    scores = (q @ k.mT * SCALE).unflatten(-1, (SIDE, SIDE)) + rows[..., None] / 4
    return scores.flatten(-2).softmax(-1) @ v


def sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A logit that belongs to no key, beside those of the keys (gpt-oss)."""
    scores = q @ k.mT * SCALE
    sink = torch.full((1, q.shape[1], 1, 1), 0.5, dtype=q.dtype)
    both = torch.cat([scores, sink.expand(q.shape[0], -1, q.shape[2], -1)], dim=-1)
    return both.softmax(-1)[..., :-1] @ v


def sinks_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    both = torch.cat([torch.zeros_like(scores[..., :2]), scores], dim=-1)
    return both.softmax(-1)[..., 2:] @ v


def normalized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Cosine attention."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, scale=3.0)


def rotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rotary embeddings by halves, flipped pairs and chosen channels: they turn a head alike."""
    half = q.shape[-1] // 2
    angle = torch.arange(q.shape[2], dtype=q.dtype)[:, None] / 7
    order = torch.arange(2 * half - 1, -1, -1)
    q = q * angle.cos() + q.roll(half, -1) * angle.sin()
    k = k * angle.cos() + k[..., order] * angle.sin()
    return F.scaled_dot_product_attention(q, k.flip(-1), v)


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
    einsum_by_token,
    soft_cap,
    masked_product,
    product_bias,
    sinks,
    sinks_first,
    normalized,
    rotated,
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


class Multihead(nn.Module):
    """torch's own, which flattens tokens and samples token by token."""

    def __init__(self, need_weights: bool, batch_first: bool) -> None:
        super().__init__()
        self.need_weights, self.batch_first = need_weights, batch_first
        self.heads = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        out = self.heads(x, x, x, need_weights=self.need_weights)[0]
        return out if self.batch_first else out.transpose(0, 1)


class Flattened(Attention):
    """Projections of flattened tokens, and a norm over groups of channels in each of them."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        q, k, v = (
            linear(flat).reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q = F.group_norm(q.transpose(1, 2).reshape(-1, WIDTH), HEADS)
        q = q.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)
        out = self.mix(q, k, v).transpose(1, 2).reshape(-1, WIDTH)
        return self.out(out).view_as(x)


ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "multihead": lambda: Multihead(need_weights=False, batch_first=True),
    "multihead with its map": lambda: Multihead(need_weights=True, batch_first=True),
    "multihead, tokens first": lambda: Multihead(need_weights=False, batch_first=False),
    "multihead with its map, tokens first": lambda: Multihead(True, False),
    "flattened": lambda: Flattened(sdpa, nn.Linear),
}


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


# a stream and what a module adds to it

Join = Callable[[Tensor, Tensor], Tensor]

JOINS: dict[str, Join] = {
    "add": lambda x, f: x + f,
    "subtract": lambda x, f: x - f,
    "in place": lambda x, f: x.clone().add_(f),
    "alpha": lambda x, f: torch.add(x, f, alpha=0.5),
    "addcmul": lambda x, f: torch.addcmul(x, f, f.new_full((WIDTH,), 0.5)),
    "sum of a list": lambda x, f: sum([x, f]),  # type: ignore[return-value]
    "lerp": lambda x, f: torch.lerp(x, f, 0.25),
    "lerp from the other side": lambda x, f: f.lerp(x, f.new_full((), 0.75)),
    "scaled sum": lambda x, f: 0.8 * x + 0.6 * f,
    "scaled sum, parameters": lambda x, f: x * x.new_ones(WIDTH) + f / 2,
    "scaled afterwards": lambda x, f: (x + f) / 2**0.5,
}


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module, join: Join) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), attention
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), mlp
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(x, self.attention(self.norm1(x)))
        return self.join(x, self.mlp(self.norm2(x)))


class Model(nn.Module):
    """Blocks of a list."""

    made_of: type[Block] = Block

    def __init__(
        self,
        mix: Mix = sdpa,
        mlp: Callable[[], nn.Module] = Mlp,
        linear: Callable[[int, int], nn.Module] = nn.Linear,
        join: Join = torch.add,
        attention: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        made = attention or (lambda: Attention(mix, linear))
        self.put([self.made_of(made(), mlp(), join) for _ in range(BLOCKS)])

    def put(self, blocks: list[Block]) -> None:
        self.blocks = nn.ModuleList(blocks)

    def order(self) -> Iterable[nn.Module]:
        return self.blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.order():
            x = block(x)
        return x


class Attributes(Model):
    """block1, block2."""

    def put(self, blocks: list[Block]) -> None:
        self.block1, self.block2 = blocks

    def order(self) -> Iterable[nn.Module]:
        return (self.block1, self.block2)


class Names(Model):
    """Attributes with names of their own."""

    def put(self, blocks: list[Block]) -> None:
        self.upper, self.lower = blocks

    def order(self) -> Iterable[nn.Module]:
        return (self.upper, self.lower)


class Keys(Model):
    """A ModuleDict, the last first."""

    def put(self, blocks: list[Block]) -> None:
        self.stages = nn.ModuleDict(dict(zip("ab", blocks, strict=True)))

    def order(self) -> Iterable[nn.Module]:
        return reversed(self.stages.values())


class Shared(Model):
    """One block, called again and again."""

    def put(self, blocks: list[Block]) -> None:
        self.block = blocks[0]

    def order(self) -> Iterable[nn.Module]:
        return (self.block,) * BLOCKS


class SharedOfList(Model):
    """The only block of a list, called again and again."""

    def put(self, blocks: list[Block]) -> None:
        self.blocks = nn.ModuleList(blocks[:1])

    def order(self) -> Iterable[nn.Module]:
        return [self.blocks[0] for _ in range(BLOCKS)]


class Nested(Model):
    """Attributes of a module that does nothing else."""

    def put(self, blocks: list[Block]) -> None:
        self.trunk = Attributes.__new__(Attributes)
        nn.Module.__init__(self.trunk)
        self.trunk.put(blocks)

    def order(self) -> Iterable[nn.Module]:
        return (self.trunk,)


class ChannelsFirstBlock(Block):
    """The stream is an image [B, C, H, W]; what is added to it is made of tokens in a row."""

    def part(self, x: Tensor, norm: nn.Module, module: nn.Module) -> Tensor:
        return module(norm(x.flatten(2).mT)).mT.unflatten(2, (SIDE, SIDE))

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(x, self.part(x, self.norm1, self.attention))
        return self.join(x, self.part(x, self.norm2, self.mlp))


class ChannelsFirst(Model):
    made_of = ChannelsFirstBlock

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT.unflatten(2, (SIDE, SIDE))).flatten(2).mT


class ChannelsLastBlock(ChannelsFirstBlock):
    """The same of an image [B, H, W, C]."""

    def part(self, x: Tensor, norm: nn.Module, module: nn.Module) -> Tensor:
        return module(norm(x).flatten(1, 2)).reshape(x.shape)


class ChannelsLast(Model):
    made_of = ChannelsLastBlock

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(1, (SIDE, SIDE))).flatten(1, 2)


# With the paths of their blocks, in order.
MODELS: dict[type[Model], tuple[str, str]] = {
    Model: ("blocks.0", "blocks.1"),
    Attributes: ("block1", "block2"),
    Names: ("upper", "lower"),
    Keys: ("stages.b", "stages.a"),
    Shared: ("block@0", "block@1"),
    SharedOfList: ("blocks.0@0", "blocks.0@1"),
    ChannelsFirst: ("blocks.0", "blocks.1"),
    ChannelsLast: ("blocks.0", "blocks.1"),
    Nested: ("trunk.block1", "trunk.block2"),
}


def make(
    dtype: torch.dtype = torch.float64, kind: type[Model] = Model, **spellings: Any
) -> tuple[nn.Module, list[Tensor]]:
    """The model and the input of each step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(**spellings).to(dtype).eval().requires_grad_(False)
        return model, list(torch.randn(STEPS, BATCH, TOKENS, WIDTH, dtype=dtype))
