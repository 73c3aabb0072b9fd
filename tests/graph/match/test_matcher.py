"""What is found in a graph, what is not, and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import KINDS, capture, capture_tiny
from toca_fx.capture.aten import to_aten
from toca_fx.match.matcher import match
from toca_fx.match.sites import Matches

WIDTH, HEADS = 16, 2


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """q, k and v of ``x``, or k and v of ``context``."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        heads = (
            split_heads(linear(value))
            for linear, value in ((self.q, x), (self.k, source), (self.v, source))
        )
        return self.out(merge_heads(F.scaled_dot_product_attention(*heads)))


class GatedMlp(nn.Module):
    """SwiGLU, one linear for both branches or two."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.up = nn.Linear(WIDTH, 64 if fused else 32)
        self.gate = nn.Linear(WIDTH, 32)
        self.down = nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.up(x).chunk(2, dim=-1) if self.fused else (self.up(x), self.gate(x))
        return self.down(F.silu(gate) * up)


class Residual(nn.Module):
    """x + scale * part(norm(x)); without ``added`` only part(norm(x))."""

    def __init__(self, part: nn.Module, added: bool = True) -> None:
        super().__init__()
        self.norm, self.part, self.added = nn.LayerNorm(WIDTH), part, added
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale * self.part(self.norm(x))
        return x + out if self.added else out


class Cross(nn.Module):
    """x + attention(x, context) for a context that is an input of the block's own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = SelfAttention()
        self.context = nn.Parameter(torch.randn(1, 5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x, self.context.expand(x.shape[0], -1, -1))


class Joint(nn.Module):
    """One attention over image and text tokens that have projections of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        text, image = x.narrow(1, 0, 3), x.narrow(1, 3, x.shape[1] - 3)
        parts = zip(self.text(text).chunk(3, -1), self.image(image).chunk(3, -1), strict=True)
        query, key, value = (split_heads(torch.cat(pair, dim=1)) for pair in parts)
        return x + self.out(merge_heads(F.scaled_dot_product_attention(query, key, value)))


class Parallel(nn.Module):
    """One projection in, with norms of queries and keys beside an MLP, and one out (FLUX.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.RMSNorm(WIDTH // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        *heads, hidden = self.first(x).chunk(4, dim=-1)
        query, key, value = map(split_heads, heads)
        attended = F.scaled_dot_product_attention(self.norm(query), self.norm(key), value)
        return self.out(torch.cat([merge_heads(attended), F.gelu(hidden)], dim=-1))


class Plain(nn.Sequential):
    """linear - GELU - linear."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))


class Blocks(nn.Module):
    """``parts`` one after the other in a numbered list, then, outside of it, ``head``."""

    def __init__(self, *parts: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(parts)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if self.head is None else self.head(x)


def matches_of(model: nn.Module, tokens: int = 8) -> Matches:
    captured, inputs = capture(model.eval().requires_grad_(False), torch.randn(2, tokens, WIDTH))
    return match(to_aten(captured, inputs).graph)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sites_of_a_dit(kind: str) -> None:
    aten, _ = capture_tiny(kind, layers=3)
    sites = match(aten.graph).sites
    blocks, attention, mlp = (
        ("transformer_blocks", "attn1", "ff") if kind == "diffusers" else ("blocks", "attn", "mlp")
    )
    expected = [
        found
        for layer in range(3)
        for found in (
            ("self_attention", f"{blocks}.{layer}.{attention}", layer, 2 * layer),
            ("mlp", f"{blocks}.{layer}.{mlp}", layer, 2 * layer),
        )
    ]
    assert [(site.kind, site.path, site.layer, site.influence) for site in sites] == expected
    assert {site.block for site in sites} == {blocks}
    assert {(site.shape, site.tokens) for site in sites} == {((2, 64, 32), 64)}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cached_is_the_output_before_the_gate(kind: str) -> None:
    aten, _ = capture_tiny(kind, layers=2)
    nodes = {node.name: node for node in aten.graph.nodes}
    for site in match(aten.graph).sites:
        (gated,) = nodes[site.output].users
        assert gated.target is torch.ops.aten.mul.Tensor
        (residual,) = gated.users
        assert residual.target is torch.ops.aten.add.Tensor


@pytest.mark.parametrize("kind", KINDS)
def test_a_timestep_embedder_is_neither_a_site_nor_a_near_miss(kind: str) -> None:
    found = match(capture_tiny(kind, layers=2)[0].graph)  # diffusers has one in each block
    assert found.misses == ()
    assert not [site for site in found.sites if "emb" in site.path]


def test_an_mlp_that_is_not_added_to_the_stream() -> None:
    found = matches_of(Blocks(Residual(Plain()), Residual(Plain(), added=False)))
    assert [site.path for site in found.sites] == ["layers.0.part"]
    assert [(miss.kind, miss.path, miss.reason) for miss in found.misses] == [
        ("mlp", "layers.1.part", "its output is not added to the stream that it reads")
    ]


def test_modules_outside_the_numbered_blocks() -> None:
    found = matches_of(Blocks(Residual(Plain()), head=Residual(SelfAttention())))
    assert [site.path for site in found.sites] == ["layers.0.part"]
    assert [(miss.kind, miss.path) for miss in found.misses] == [("self_attention", "head.part")]
    assert "outside the numbered blocks" in found.misses[0].reason
    found = matches_of(Blocks(Residual(Plain()), head=Residual(Plain())))
    assert [site.path for site in found.sites] == ["layers.0.part"]
    assert [(miss.kind, miss.path) for miss in found.misses] == [("mlp", "head.part")]
    assert "outside the numbered blocks" in found.misses[0].reason
    # Output layers can be linear - activation - linear too: added to nothing, they are not worth a
    # line.
    found = matches_of(Blocks(Residual(Plain()), head=Residual(Plain(), added=False)))
    assert [site.path for site in found.sites] == ["layers.0.part"]
    assert found.misses == ()


def test_attention_without_projections() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            heads = split_heads(x)
            return merge_heads(F.scaled_dot_product_attention(heads, heads, heads))

    found = matches_of(Blocks(Residual(Bare())))
    assert found.sites == ()
    reason = "query or key does not come from a linear projection"
    assert [(miss.kind, miss.path, miss.reason) for miss in found.misses] == [
        ("attention", "layers.0.part", reason)
    ]


def test_an_mlp_beside_an_attention_with_norms() -> None:
    found = matches_of(Blocks(Residual(Parallel()), Residual(Parallel())))
    assert [(site.kind, site.layer) for site in found.sites] == [
        (kind, layer) for layer in range(2) for kind in ("self_attention", "mlp")
    ]
    assert not found.misses


def test_kinds_of_attention() -> None:
    found = matches_of(Blocks(Residual(SelfAttention()), Cross(), Joint()))
    assert [(site.kind, site.layer) for site in found.sites] == [
        ("self_attention", 0),
        ("cross_attention", 1),
        ("joint_attention", 2),
    ]
    assert [site.influence for site in found.sites] == [0, None, 2]


@pytest.mark.parametrize("fused", [True, False])
def test_gated_mlps(fused: bool) -> None:
    (site,) = matches_of(Blocks(Residual(GatedMlp(fused)))).sites
    assert (site.kind, site.path) == ("mlp", "layers.0.part")


def test_gates_that_read_different_inputs() -> None:
    class Odd(GatedMlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x.flip(1))) * self.up(x))

    found = matches_of(Blocks(Residual(Odd(fused=False))))
    assert found.sites == ()
    assert [miss.reason for miss in found.misses] == ["the gated branches read different inputs"]


def test_two_linears_without_an_activation_are_no_mlp() -> None:
    found = matches_of(Blocks(Residual(nn.Sequential(nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)))))
    reason = (
        "no softmax attention and no linear-activation-linear in it, "
        "but aten.layer_norm.default, aten.linear.default"
    )
    assert found.sites == ()
    assert [(miss.kind, miss.path, miss.reason) for miss in found.misses] == [
        ("module", "layers.0", reason)
    ]


def test_an_mlp_without_a_token_axis() -> None:
    model = Blocks(Residual(Plain())).eval().requires_grad_(False)
    captured, inputs = capture(model, torch.randn(2, WIDTH))
    found = match(to_aten(captured, inputs).graph)
    assert found.sites == ()
    assert "[batch, tokens, channels]" in found.misses[0].reason


def test_influence_is_the_nearest_attention_before_it_in_the_block() -> None:
    block = nn.Sequential(
        Residual(SelfAttention()), Residual(Plain()), Residual(SelfAttention()), Residual(Plain())
    )
    found = matches_of(Blocks(block, Residual(Plain())))
    kinds = [(site.layer, site.kind, site.influence) for site in found.sites]
    assert kinds == [
        (0, "self_attention", 0),
        (0, "mlp", 0),
        (0, "self_attention", 2),
        (0, "mlp", 2),
        (1, "mlp", None),
    ]


def test_matching_changes_nothing() -> None:
    aten, _ = capture_tiny("original", layers=1)
    before = [(node.format_node(), dict(node.meta)) for node in aten.graph.nodes]
    first = match(aten.graph)
    assert [(node.format_node(), dict(node.meta)) for node in aten.graph.nodes] == before
    assert match(aten.graph) == first


# Attentions that cannot judge tokens


class Windows(nn.Module):
    """Attention within windows of four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x.reshape(-1, 4, x.shape[-1])).reshape(x.shape)


class Flat(nn.Module):
    """Attention with one head and no axis for it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


@pytest.mark.parametrize(
    ("attention", "judges"), [(SelfAttention, True), (Windows, False), (Flat, False)]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_only_a_map_over_the_site_s_own_tokens_judges_them(
    attention: type[nn.Module], judges: bool, batch: int
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = attention(), GatedMlp(fused=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attn(x)
            return x + self.mlp(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block()])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    captured, inputs = capture(Net(), torch.randn(batch, 16, WIDTH))
    sites = {site.kind: site for site in match(to_aten(captured, inputs).graph).sites}
    assert (sites["self_attention"].segment == 0) is judges
    assert (sites["mlp"].influence is not None) is judges


class LowRank(nn.Module):
    """A linear with a low-rank path beside it, as LoRA adapters add it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 2, bias=False),
            nn.Linear(2, WIDTH, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


def test_low_rank_projections_leave_self_attention_what_it_is() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([SelfAttention()])
            self.blocks[0].q = LowRank()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.blocks[0](x)

    captured, inputs = capture(Net(), torch.randn(2, 16, WIDTH))
    (site,) = match(to_aten(captured, inputs).graph).sites
    assert site.kind == "self_attention"
