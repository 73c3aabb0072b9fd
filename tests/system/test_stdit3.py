"""The STDiT3 of tests/stdit3.py: masked frames, padded captions, odd sizes, capture in one
graph.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers import capture
from tests.stdit3 import (
    STDiT3,
    STDiT3Block,
    open_sora_1_2,
    open_sora_1_2_inputs,
    tiny_inputs,
    tiny_stdit3,
)

GIVEN_FIRST = torch.tensor(
    [[False, True, True, True], [False, True, False, True]]
)  # x_mask: false in the given frames


def double(model: STDiT3, **overrides: Any) -> tuple[STDiT3, dict[str, Any]]:
    """The model and its inputs in float64; the output is float64 then."""
    model = model.double()
    return model, {
        name: value.double() if value.is_floating_point() else value
        for name, value in tiny_inputs(model, **overrides).items()
    }


def run(model: STDiT3, inputs: dict[str, Any], **changes: Any) -> Tensor:
    with torch.no_grad():
        return model(**{**inputs, **changes})


# the model once more: one sample, one frame, one head at a time


def plain_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def plain_rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_turn(x: Tensor, freqs: Tensor) -> Tensor:
    """Rotary embedding of [T, head_dim] as a product of complex numbers."""
    angles = torch.arange(x.shape[0])[:, None] * freqs
    pairs = torch.view_as_complex(x.reshape(x.shape[0], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)


def plain_heads(query: Tensor, key: Tensor, value: Tensor, width: int) -> Tensor:
    """Softmax attention of [N, C] over [L, C], ``width`` channels per head."""
    heads = zip(query.split(width, 1), key.split(width, 1), value.split(width, 1), strict=True)
    return torch.cat([(q @ k.T / width**0.5).softmax(-1) @ v for q, k, v in heads], dim=1)


def plain_attention(block: STDiT3Block, x: Tensor, freqs: Tensor | None) -> Tensor:
    attn = block.attn
    width = x.shape[1] // attn.num_heads
    query, key, value = attn.qkv(x).chunk(3, dim=1)
    query = [plain_rms(head, attn.q_norm.weight) for head in query.split(width, 1)]
    key = [plain_rms(head, attn.k_norm.weight) for head in key.split(width, 1)]
    if freqs is not None:
        query, key = (
            [plain_turn(head, freqs) for head in query],
            [plain_turn(head, freqs) for head in key],
        )
    return attn.proj(plain_heads(torch.cat(query, 1), torch.cat(key, 1), value, width))


def plain_block(
    block: STDiT3Block, x: Tensor, text: Tensor, frame_t: list[Tensor], freqs: Tensor | None
) -> Tensor:
    """One sample [T, S, C]; ``frame_t`` has each frame's own modulation [6 * C]; ``freqs`` in
    temporal blocks.
    """
    frames, places, _ = x.shape
    tables = [block.scale_shift_table + t.reshape(6, -1) for t in frame_t]
    inputs = torch.stack(
        [plain_norm(x[f]) * (1 + tables[f][1]) + tables[f][0] for f in range(frames)]
    )
    if freqs is None:
        mixed = torch.stack([plain_attention(block, inputs[f], None) for f in range(frames)])
    else:
        mixed = torch.stack(
            [plain_attention(block, inputs[:, s], freqs) for s in range(places)], dim=1
        )
    x = torch.stack([x[f] + tables[f][2] * mixed[f] for f in range(frames)])

    cross = block.cross_attn
    key, value = cross.kv_linear(text).chunk(2, dim=1)
    x = torch.stack(
        [
            x[f]
            + cross.proj(
                plain_heads(cross.q_linear(x[f]), key, value, x.shape[2] // cross.num_heads)
            )
            for f in range(frames)
        ]
    )

    updates = []
    for f in range(frames):
        hidden = block.mlp.fc1(plain_norm(x[f]) * (1 + tables[f][4]) + tables[f][3])
        updates.append(tables[f][5] * block.mlp.fc2(F.gelu(hidden, approximate="tanh")))
    return x + torch.stack(updates)


def plain_places(model: STDiT3, rows: int, columns: int, height: float, width: float) -> Tensor:
    """Position embedding [rows * columns, C], entry by entry."""
    scale, base, quarter = (
        (height * width) ** 0.5 / model.input_sq_size,
        round((rows * columns) ** 0.5),
        len(model.pos_embed.inv_freq),
    )
    rates = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    table = []
    for row in range(rows):
        for column in range(columns):
            across, down = (
                column * base / columns / scale * rates,
                row * base / rows / scale * rates,
            )
            table.append(torch.cat([across.sin(), across.cos(), down.sin(), down.cos()]))
    return torch.stack(table)


def plain_stdit3(model: STDiT3, inputs: dict[str, Any], x_mask: Tensor) -> Tensor:
    """The whole model in loops, for sizes that the patch (1, 2, 2) divides and text without
    padding.
    """
    samples = []
    for b, latents in enumerate(inputs["x"]):
        channels, frames, rows, columns = (
            latents.shape[0],
            latents.shape[1],
            latents.shape[2] // 2,
            latents.shape[3] // 2,
        )
        fps = model.fps_embedder(inputs["fps"])[0]
        at = {
            True: model.t_embedder(inputs["timestep"][b : b + 1])[0] + fps,
            False: model.t_embedder(torch.zeros(1))[0] + fps,
        }
        frame_t = [at[bool(shown)] for shown in x_mask[b]]
        frame_modulation = [model.t_block(t) for t in frame_t]
        text = model.y_embedder.y_proj(inputs["y"][b, 0])

        kernel, bias = model.x_embedder.proj.weight.flatten(1), model.x_embedder.proj.bias
        patches = (
            latents.reshape(channels, frames, rows, 2, columns, 2)
            .permute(1, 2, 4, 0, 3, 5)
            .reshape(frames, rows * columns, -1)
        )
        x = (
            patches @ kernel.T
            + bias
            + plain_places(model, rows, columns, inputs["height"].item(), inputs["width"].item())
        )
        for spatial, temporal in zip(model.spatial_blocks, model.temporal_blocks, strict=True):
            x = plain_block(spatial, x, text, frame_modulation, None)
            x = plain_block(temporal, x, text, frame_modulation, model.rope.freqs)

        image = torch.empty(model.out_channels, *latents.shape[1:], dtype=x.dtype)
        for f in range(frames):
            # Frames that are given are modulated at the timestep of the others, and then at zero.
            last = plain_norm(x[f])
            for t in dict.fromkeys((True, bool(x_mask[b, f]))):
                shift, scale = model.final_layer.scale_shift_table + at[t]
                last = last * (1 + scale) + shift
            pixels = model.final_layer.linear(last).reshape(rows, columns, 2, 2, -1)
            for i in range(2):
                for j in range(2):
                    image[:, f, i::2, j::2] = pixels[:, :, i, j].permute(2, 0, 1)
        samples.append(image)
    return torch.stack(samples)


def test_the_output_is_float32_also_of_a_bfloat16_model() -> None:
    model = tiny_stdit3()
    assert run(model, tiny_inputs(model)).dtype == torch.float32
    output = run(model.bfloat16(), tiny_inputs(model))
    assert output.dtype == torch.float32
    assert output.isfinite().all()


def test_no_masked_frame_is_as_no_mask() -> None:
    model = tiny_stdit3()
    inputs = tiny_inputs(model)
    torch.testing.assert_close(
        run(model, inputs, x_mask=torch.ones(2, 4, dtype=torch.bool)),
        run(model, inputs),
        rtol=0,
        atol=1e-6,
    )


def test_only_masked_frames_is_timestep_zero_in_all_blocks() -> None:
    """The last layer modulates masked frames by both timesteps."""
    model = tiny_stdit3()
    inputs = tiny_inputs(model)
    seen: list[Tensor] = []
    model.final_layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    masked = run(model, inputs, x_mask=torch.zeros(2, 4, dtype=torch.bool))
    at_zero = run(model, inputs, timestep=torch.zeros(2))
    torch.testing.assert_close(*seen, rtol=0, atol=1e-6)
    assert (masked - at_zero).abs().max() > 0.01


@pytest.mark.parametrize(
    "x_mask", [torch.ones(2, 4, dtype=torch.bool), GIVEN_FIRST], ids=["none masked", "some masked"]
)
def test_every_frame_has_the_modulation_of_its_own_timestep(x_mask: Tensor) -> None:
    model, inputs = double(tiny_stdit3())
    inputs["timestep"] = torch.tensor([700.0, 250.0], dtype=torch.float64)
    with torch.no_grad():
        # the position table is float32 in the model, whatever its dtype: checked here, then
        # replaced
        places = plain_places(model, 4, 6, inputs["height"].item(), inputs["width"].item())
        scale = (inputs["height"][0] * inputs["width"][0]).sqrt() / model.input_sq_size
        torch.testing.assert_close(model.pos_embed(4, 6, scale), places, rtol=0, atol=1e-6)
        model.pos_embed.forward = lambda *_: places
        expected = plain_stdit3(model, inputs, x_mask)
    torch.testing.assert_close(run(model, inputs, x_mask=x_mask), expected, rtol=0, atol=1e-10)


def test_masked_frames_change_the_output_everywhere() -> None:
    """The given frames by their modulation, the others by attention along time: a test that sees
    neither would prove nothing.
    """
    model = tiny_stdit3()
    inputs = tiny_inputs(model)
    change = (run(model, inputs, x_mask=GIVEN_FIRST) - run(model, inputs)).abs().amax(dim=(1, 3, 4))
    assert (change > 0.01).all()


def test_padding_of_a_caption_is_not_read() -> None:
    """Two prompts of 7 and 4 tokens in both guidance halves, with one mask for a half."""
    model, inputs = double(tiny_stdit3(), batch=4)
    lengths = [7, 4]
    mask = torch.tensor([[1] * length + [0] * (10 - length) for length in lengths])
    together = run(model, inputs, mask=mask)
    for b in range(4):
        alone = {name: inputs[name][b : b + 1] for name in ("x", "timestep", "y")}
        cut = run(model, {**inputs, **alone}, y=alone["y"][:, :, : lengths[b % 2]])
        torch.testing.assert_close(together[b : b + 1], cut, rtol=0, atol=1e-10)
    assert (together - run(model, inputs)).abs().amax() > 0.01


@pytest.mark.parametrize(
    ("size", "patch"), [((4, 7, 12), (1, 2, 2)), ((4, 8, 11), (1, 2, 2)), ((3, 7, 11), (2, 2, 2))]
)
def test_sizes_that_the_patch_does_not_divide_are_padded_with_zeros(
    size: tuple[int, int, int], patch: tuple[int, int, int]
) -> None:
    model, inputs = double(tiny_stdit3(patch_size=patch), size=size)
    padded = torch.zeros(2, 4, 4, 8, 12, dtype=torch.float64)
    padded[:, :, : size[0], : size[1], : size[2]] = inputs["x"]
    output = run(model, inputs)
    assert output.shape == (2, 8, *size)
    expected = run(model, inputs, x=padded)[:, :, : size[0], : size[1], : size[2]]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("x_mask", [None, GIVEN_FIRST], ids=["no x_mask", "x_mask"])
def test_one_graph_for_all_timesteps_and_frame_masks(x_mask: Tensor | None) -> None:
    model = tiny_stdit3(depth=1)
    inputs = tiny_inputs(model, mask=torch.tensor([[1] * 6 + [0] * 4]), x_mask=x_mask)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    run(compiled, inputs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for timestep in (700.0, 123.4):
            changes = {"timestep": torch.full((2,), timestep)}
            torch.testing.assert_close(
                run(compiled, inputs, **changes), run(model, inputs, **changes), rtol=0, atol=0
            )
        if x_mask is not None:
            torch.testing.assert_close(
                run(compiled, inputs, x_mask=~x_mask),
                run(model, inputs, x_mask=~x_mask),
                rtol=0,
                atol=0,
            )
        others = {
            "fps": torch.tensor([8.0]),
            "height": torch.tensor([720.0]),
            "mask": torch.tensor([[1] * 3 + [0] * 7]),
        }
        torch.testing.assert_close(
            run(compiled, inputs, **others), run(model, inputs, **others), rtol=0, atol=0
        )


def test_attention_is_captured_as_samples_heads_tokens_channels() -> None:
    model = tiny_stdit3(depth=1)
    graph, _ = capture(
        model, **tiny_inputs(model, mask=torch.ones(1, 10, dtype=torch.int64), x_mask=GIVEN_FIRST)
    )
    shapes = [
        [tuple(operand.meta["example_value"].shape) for operand in node.args]
        for node in graph.graph.nodes
        if node.target is F.scaled_dot_product_attention
    ]
    within, along, text = (8, 2, 24, 16), (48, 2, 4, 16), (2, 2, 10, 16)
    assert shapes == [
        [within] * 3,
        [(2, 2, 96, 16), text, text],
        [along] * 3,
        [(2, 2, 96, 16), text, text],
    ]


def test_state_dict_has_the_names_of_open_sora() -> None:
    names = {
        name: tuple(tensor.shape) for name, tensor in tiny_stdit3(depth=1).state_dict().items()
    }
    block = {
        "scale_shift_table": (6, 32),
        "attn.qkv.weight": (96, 32),
        "attn.qkv.bias": (96,),
        "attn.q_norm.weight": (16,),
        "attn.k_norm.weight": (16,),
        "attn.proj.weight": (32, 32),
        "attn.proj.bias": (32,),
        "cross_attn.q_linear.weight": (32, 32),
        "cross_attn.q_linear.bias": (32,),
        "cross_attn.kv_linear.weight": (64, 32),
        "cross_attn.kv_linear.bias": (64,),
        "cross_attn.proj.weight": (32, 32),
        "cross_attn.proj.bias": (32,),
        "mlp.fc1.weight": (128, 32),
        "mlp.fc1.bias": (128,),
        "mlp.fc2.weight": (32, 128),
        "mlp.fc2.bias": (32,),
    }
    embedder = {
        "mlp.0.weight": (32, 256),
        "mlp.0.bias": (32,),
        "mlp.2.weight": (32, 32),
        "mlp.2.bias": (32,),
    }
    caption = {"fc1.weight": (32, 24), "fc1.bias": (32,), "fc2.weight": (32, 32), "fc2.bias": (32,)}
    assert names == {
        "rope.freqs": (8,),
        "x_embedder.proj.weight": (32, 4, 1, 2, 2),
        "x_embedder.proj.bias": (32,),
        "t_block.1.weight": (192, 32),
        "t_block.1.bias": (192,),
        "y_embedder.y_embedding": (10, 24),
        "final_layer.scale_shift_table": (2, 32),
        "final_layer.linear.weight": (32, 32),
        "final_layer.linear.bias": (32,),
        **{
            f"{name}.{key}": shape
            for name in ("t_embedder", "fps_embedder")
            for key, shape in embedder.items()
        },
        **{f"y_embedder.y_proj.{key}": shape for key, shape in caption.items()},
        **{
            f"{name}.0.{key}": shape
            for name in ("spatial_blocks", "temporal_blocks")
            for key, shape in block.items()
        },
    }


def test_a_setting_that_does_not_exist_is_refused() -> None:
    tiny_stdit3(drop_path=0.0, enable_flash_attn=False)
    with pytest.raises(TypeError, match="STDiT3 has no setting hiden_size"):
        tiny_stdit3(hiden_size=64)


def test_open_sora_1_2_at_its_real_size_needs_no_memory() -> None:
    model, inputs = open_sora_1_2(), open_sora_1_2_inputs(text_tokens=20)
    assert all(
        tensor.is_meta for tensor in (*model.parameters(), *model.buffers(), *inputs.values())
    )
    assert inputs["y"].shape == (2, 1, 20, 4096)
    output = run(model, inputs)
    assert output.is_meta
    assert output.shape == (2, 8, 15, 60, 106)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_207_643_972
