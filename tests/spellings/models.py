"""One small model: how its modules are spelled, joined to the stream, and put into blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tests.spellings.attentions import Attention, Mix, sdpa
from tests.spellings.mlps import Mlp
from tests.spellings.sizes import BATCH, BLOCKS, SIDE, STEPS, TOKENS, WIDTH

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
