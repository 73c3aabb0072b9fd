"""Layers, and functions of tokens made of them, whose outputs are restricted to some rows."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.helpers import capture
from toca_fx.capture.aten import to_aten
from toca_fx.graph.tokenwise import Tokens
from toca_fx.rewrite.restrict import Restriction

# All of these sizes differ: a shape tells what an operator works on.
BATCH, TOKENS, CHANNELS, WIDE, TEXT = 2, 7, 8, 20, 5
Function = Callable[["Layers", Tensor, Tensor], Tensor]


class Layers(nn.Module):
    """``function(self, x, c)`` of tokens x [B, N, C] and a condition c [B, C], with layers to make
    it of.
    """

    table: Tensor
    long_table: Tensor

    def __init__(self, function: Function, tokens: int = TOKENS, channels: int = CHANNELS) -> None:
        super().__init__()
        self.function = function
        self.norm = nn.LayerNorm(channels)
        self.modulation, self.text = (
            nn.Linear(channels, 2 * channels),
            nn.Linear(channels, TEXT * channels),
        )
        self.up, self.down = nn.Linear(channels, WIDE), nn.Linear(WIDE, channels)
        self.query, self.key, self.mix = (
            nn.Linear(channels, channels),
            nn.Linear(channels, channels),
            nn.Linear(tokens, tokens),
        )
        self.register_buffer("table", torch.randn(tokens, channels))
        self.register_buffer("long_table", torch.randn(1, tokens + TEXT, channels))

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def joint(self, x: Tensor, c: Tensor) -> Tensor:
        """TEXT tokens made of c, then those of x."""
        return torch.cat([self.text(c).unflatten(1, (TEXT, -1)), x], dim=1)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, 2, x.shape[2] // 2).transpose(1, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.function(self, x, c)


Shapes = dict[Any, list[tuple[int, ...]]]


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the shape of what each operator returned."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: Shapes = defaultdict(list)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            self.shapes[n.target].append(tuple(value.shape))
        return value


class Restricted:
    """A captured model whose output is restricted to the fresh tokens, which lie ``where`` in it
    (default: [B, N, ...]).

    The outputs of operator ``needed`` count as needed whole.
    """

    def __init__(
        self, model: nn.Module, *args: Tensor, where: Tokens | None = None, needed: Any = None
    ) -> None:
        self.model, self.args = model, args
        captured, self.inputs = capture(model, *args)
        source = to_aten(captured, self.inputs)
        self.module = fx.GraphModule(source, copy.deepcopy(source.graph))
        graph = self.module.graph
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            rows = graph.placeholder("rows")
        end = graph.output_node()
        ((whole,),) = end.args
        self.where = where or Tokens(*whole.meta["val"].shape[:2])
        self.restrict = Restriction(
            graph,
            rows,
            {node for node in graph.nodes if node.target is needed},
            torch.device("cpu"),
        )
        self.restrict.before = end
        end.args = ((self.restrict(whole, self.where),),)
        # As rewrite does: FX keeps attention for its optional dropout.
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        graph.lint()
        self.module.recompile()

    @property
    def gathered(self) -> list[Any]:
        """What rows are taken from: operators, and "input" for the model's inputs and buffers."""
        return [
            node.target if node.op == "call_function" else "input"
            for node in self.restrict.gathered
        ]

    def run(self, tokens: Tensor) -> tuple[Tensor, Shapes]:
        """The restricted output for ``tokens`` [B, K], and the shapes in between."""
        recorder = Recorder(self.module)
        rows = tokens + self.where.count * torch.arange(self.where.batch)[:, None]
        (output,) = recorder.run(*self.inputs, rows)
        return output, recorder.shapes

    def error(self, tokens: Tensor) -> float:
        """The largest difference to the rows of the whole output; they keep the whole output's
        layout.
        """
        output, _ = self.run(tokens)
        batch_axis, axis = self.where.batch_axis or 0, self.where.axis
        whole = self.model(*self.args).movedim((batch_axis, axis), (0, 1))
        expected = torch.stack(
            [
                sample[chosen + self.where.offset]
                for sample, chosen in zip(whole, tokens, strict=True)
            ]
        )
        expected = expected.movedim((0, 1), (batch_axis, axis))
        assert output.shape == expected.shape
        return float((output - expected).abs().max()) if output.numel() else 0.0


def build(
    function: Function, batch: int = BATCH, tokens: int = TOKENS, channels: int = CHANNELS
) -> tuple[Layers, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Layers(function, tokens, channels).double().eval().requires_grad_(False)
    return (
        model,
        torch.randn(batch, tokens, channels, dtype=torch.float64),
        torch.randn(batch, channels, dtype=torch.float64),
    )


def some(batch: int, tokens: int, count: int) -> Tensor:
    """``count`` tokens of each sample, in no order."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(tokens, generator=generator)[:count] for _ in range(batch)])


def modulated(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    shift, scale = model.modulation(F.silu(c)).chunk(2, dim=1)
    return model.mlp(model.norm(x) * (1 + scale[:, None]) + shift[:, None])


def with_positions(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(model.norm(x + model.table))


def with_positions_of_one_row(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(model.norm(x + model.long_table[:, :-TEXT]))


def samples_and_tokens_flattened(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(model.norm(x.reshape(x.shape[0] * x.shape[1], x.shape[2]))).view(x.shape)


def samples_and_tokens_flattened_late(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.down(F.gelu(model.up(model.norm(x)).flatten(0, 1))).reshape(x.shape)


def tokens_before_samples_flattened(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    """As torch.nn.MultiheadAttention projects."""
    flat = x.transpose(0, 1).cumsum(2).reshape(-1, x.shape[2])
    return model.mlp(model.norm(flat)).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


def blocked_behind_flattening(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    flat = x.transpose(0, 1).reshape(-1, x.shape[2]).cumsum(1)
    return model.mlp(flat).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


def heads_beside_samples(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    """As torch.nn.MultiheadAttention multiplies; the mask is one for all."""
    query, key = (
        linear(x).transpose(0, 1).reshape(x.shape[1], x.shape[0] * 2, -1).transpose(0, 1)
        for linear in (model.query, model.key)
    )
    mask = model.table.sum(1, keepdim=True)
    out = torch.bmm((torch.bmm(query, key.transpose(1, 2)) + mask).softmax(-1), key)
    return (
        out.transpose(0, 1)
        .reshape(x.shape[1] * x.shape[0], -1)
        .view(x.shape[1], x.shape[0], -1)
        .transpose(0, 1)
    )


def blocked_with_heads_beside_samples(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    heads = model.heads(x).flatten(0, 1).cumsum(2)
    return model.mlp(F.gelu(heads).view(x.shape[0], 2, x.shape[1], -1).transpose(1, 2).flatten(2))


def heads_of_flattened_tokens(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    samples, tokens, channels = x.shape
    heads = x.unflatten(2, (2, -1)).permute(2, 0, 1, 3).flatten(1, 2).cumsum(2)
    return (
        heads.view(2, samples, tokens, channels // 2)
        .permute(1, 2, 0, 3)
        .reshape(samples, tokens, channels)
    )


def one_of_two_streams(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(model.norm(model.joint(x, c)))[:, TEXT:]


def the_other_stream(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(model.norm(model.joint(x, c)))[:, :TEXT]


def streams_split(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    _, image = model.mlp(model.norm(model.joint(x, c))).split([TEXT, x.shape[1]], dim=1)
    return image


def a_slice_of_mixed_streams(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(model.norm(model.joint(x, c).cumsum(1)))[:, TEXT:]


def the_end_of_mixed_streams_but_one(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(model.norm(model.joint(x, c).cumsum(1)))[:, TEXT - 1 : -1]


def two_slices_of_mixed_streams(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    mixed = model.joint(x, c).cumsum(1)
    return model.mlp(mixed[:, TEXT:] * mixed[:, :-TEXT])


def a_slice_with_positions_of_all(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(model.joint(x, c) + model.long_table)[:, TEXT:]


def both_streams(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(model.norm(model.joint(x, c)))


def a_stream_written_into_a_sequence(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    joint = model.joint(x, c).cumsum(1)
    joint[:, TEXT:] = x
    return model.mlp(joint)[:, TEXT:]


def queries_of_an_attention(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    x = model.norm(x)
    query, key = model.heads(model.query(x)), model.heads(model.key(x))
    return model.mlp(F.scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2))


def a_sum_over_tokens(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(model.norm(x).cumsum(1))


def a_linear_over_tokens(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(model.mix(model.norm(x).transpose(1, 2)).transpose(1, 2))


def a_softmax_over_tokens(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(x.softmax(1))


def a_norm_of_tokens_and_channels(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(F.layer_norm(x, x.shape[1:]))


def samples_mixed(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(x.flip(0))


def a_mean_over_samples(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(x - x.mean(0, keepdim=True))


def tokens_before_samples(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(x.transpose(0, 1).cumsum(2)).transpose(0, 1)


def several_tensors_without_a_rule(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return F.gelu(x.topk(x.shape[2] // 2, dim=2)[0])


def halves_of_channels(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    left, right = model.up(x).chunk(2, dim=2)
    return torch.stack([left, right], dim=3).flatten(2) * torch.cat([right, left], dim=2)


def a_condition_expanded(model: Layers, x: Tensor, c: Tensor) -> Tensor:
    return model.mlp(x + c[:, None].expand(x.shape))
