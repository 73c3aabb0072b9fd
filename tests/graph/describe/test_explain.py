"""toca_fx.explain: what it says is what a session then does; nothing runs; problems are short
errors.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import toca_fx
from tests.helpers import explain_tiny, make_policy


@pytest.fixture(autouse=True)
def _no_policy_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOCA_POLICY", raising=False)


@torch.library.custom_op("toca_test::attention", mutates_args=())
def custom_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise AssertionError("the model was run")


@custom_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


class Block(nn.Module):
    """A residual attention by an operator that toca_fx does not know, and an MLP."""

    def __init__(self, linear_attention: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.linear_attention = linear_attention

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        attended = (
            q.relu() @ (k.relu().mT @ v) if self.linear_attention else custom_attention(q, k, v)
        )
        x = x + self.out(attended)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, linear_attention: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(linear_attention) for _ in range(2))
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if self.broken:
            torch._dynamo.graph_break()
        return x


# Nothing runs, nothing stays


def test_nothing_runs() -> None:
    told = toca_fx.explain(Model(), make_policy(), torch.randn(2, 9, 16))
    assert [site.path for site in told.sites] == ["blocks.0.mlp", "blocks.1.mlp"]


def test_nothing_runs_with_dynamo_off() -> None:
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(toca_fx.UnsupportedModelError, match="switched off"),
    ):
        toca_fx.explain(Model(), make_policy(), torch.randn(2, 9, 16))


# Which policy


def test_the_policy_that_names_the_model() -> None:
    assert explain_tiny("diffusers", layers=1).policy == "dit-xl-2"
    assert explain_tiny("original", layers=1).policy == "default-image"


def test_latents_of_five_axes_are_a_video() -> None:
    class Video(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(2).mT)

    assert toca_fx.explain(Video(), None, torch.randn(2, 16, 2, 3, 4)).policy == "default-video"
    assert toca_fx.explain(Video(), None, torch.randn(2, 16, 3, 4)).policy == "default-image"


def test_a_policy_for_another_model() -> None:
    told = explain_tiny(policy=make_policy(model=["Another"]), layers=1)
    assert told.warnings == (
        "policy `test` was written for Another; the model is a DiTTransformer2DModel",
    )
    assert "warning: policy `test` was written for Another" in str(told)


# The page


def test_rows_of_a_block_list_are_joined() -> None:
    page = str(explain_tiny(policy=make_policy(R={"base": 0.5, "layer_weight": 0.5}))).splitlines()
    rows = [line for line in page if line.startswith("transformer_blocks.")]
    assert rows == [
        "transformer_blocks.0-2.attn1  self_attention   64 tokens  "
        "full on 4, reused on 8 of 12 steps",
        "transformer_blocks.0-2.ff     mlp              64 tokens  "
        "full on 4, 16 to 48 of 64 tokens on 8 of 12 steps",
    ]
    assert (
        page[page.index(rows[1]) + 1].strip()
        == "chosen by self_attention: 1 (of transformer_blocks.*.attn1), staleness: 0.25"
    )


def test_who_says_that_a_site_is_computed() -> None:
    rules = [{"match": "mlp", "layers": 1, "module": "compute"}]
    told = explain_tiny(policy=make_policy(modules={"self_attention": "compute"}, rules=rules))
    page = str(told)
    assert "computed on every step: modules.self_attention says compute" in page
    assert "transformer_blocks.1.ff" in page
    assert "computed on every step: rule rules[0] says compute" in page
    assert "transformer_blocks.0,2.ff" in page
    assert told.suggestions == (
        '- {match: self_attention, path: "transformer_blocks.*.attn1", module: reuse}',
        '- {match: mlp, path: "transformer_blocks.*.ff", layers: 1, module: {weight: 1.0}}',
    )


def test_full_steps_only_and_shares_below_one_token() -> None:
    assert "computed on every step: every step is full" in str(
        explain_tiny(policy=make_policy(N={"base": 1}), layers=1)
    )
    page = str(explain_tiny(policy=make_policy(R={"base": 0.999}), layers=1))
    assert "reused on 8 of 12 steps: its share is less than one token" in page


def test_json_holds_every_site() -> None:
    told = explain_tiny()
    data = json.loads(json.dumps(told.to_dict()))
    assert data == told.to_dict()
    assert [site["path"] for site in data["sites"]] == [site.path for site in told.sites]
    assert len(data["sites"]) == 6 + 1, "three blocks, and the model, whose output is kept"
    mlp = data["sites"][3]
    assert (mlp["path"], mlp["influence"], mlp["entropy"]) == (
        "transformer_blocks.1.ff",
        "transformer_blocks.1.attn1",
        None,
    )
    assert data["flops"]["ratio"] == pytest.approx(
        data["flops"]["uncached"] / data["flops"]["done"]
    )


# What was not matched


def test_an_unknown_attention_operator() -> None:
    told = toca_fx.explain(Model(), make_policy(), torch.randn(2, 9, 16))
    assert {miss.advice for miss in told.skipped} == {
        "if this is an attention: toca_fx.register_attention(torch.ops.toca_test.attention)"
    }
    assert "\n  blocks.0-1  module: no softmax attention" in str(told)


def test_linear_attention() -> None:
    told = toca_fx.explain(Model(linear_attention=True), make_policy(), torch.randn(2, 9, 16))
    assert [(miss.path, miss.advice) for miss in told.skipped] == [
        ("blocks.0", ""),
        ("blocks.1", ""),
    ]
    assert "aten.matmul.default" in told.skipped[0].reason
    assert str(told).count("module: ") == 1


def test_no_sites_at_all() -> None:
    told = toca_fx.explain(nn.Linear(4, 4), make_policy(), torch.randn(2, 4))
    assert (told.sites, told.cache_bytes, told.listed_bytes, told.flops_ratio) == ((), 0, 0, 1.0)
    assert told.peak_bytes == told.step_bytes == 512  # the output, as the allocator rounds it
    assert "no sites: the model would run uncached" in str(told)


# Errors


def test_a_graph_break_is_a_short_error() -> None:
    with pytest.raises(
        toca_fx.UnsupportedModelError, match=r"cannot be captured as one graph: .*graph_break"
    ) as error:
        toca_fx.explain(Model(broken=True), make_policy(), torch.randn(2, 9, 16))
    assert "\n" not in str(error.value)


def test_inputs_that_do_not_fit() -> None:
    said = r"cannot be captured as one graph: at .* it fails \(RuntimeError\(.*reduction dim"
    with pytest.raises(toca_fx.UnsupportedModelError, match=said) as error:
        toca_fx.explain(Model(), make_policy(), torch.randn(2, 9, 15))
    assert "Dynamo" not in str(error.value)


def test_policy_errors_pass_through() -> None:
    with pytest.raises(toca_fx.PolicyError, match="matches none of the 2 sites"):
        explain_tiny(
            policy=make_policy(rules=[{"path": "nowhere.*", "module": "compute"}]), layers=1
        )
    with pytest.raises(toca_fx.PolicyError, match="no shipped policy"):
        explain_tiny(policy="nonsense", layers=1)


def test_something_that_is_no_module() -> None:
    with pytest.raises(TypeError, match="pass the transformer"):
        toca_fx.explain(object(), make_policy())  # type: ignore[arg-type]
