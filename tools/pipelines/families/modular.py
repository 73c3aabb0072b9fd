"""Modular pipelines, with a guider where they have one: its calls of a step are branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    LayerSkipConfig,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    UniPCMultistepScheduler,
)

from tools.pipelines.case import Case
from tools.pipelines.parts import masks, normal, prompts, transformer
from tools.pipelines.vaes import image_vae, qwen_vae, wan_vae

_IMAGE = {"height": 32, "width": 32, "output_type": "pt", "output": "images"}
_VIDEO = {
    "height": 64,
    "width": 64,
    "num_frames": 9,
    "output_type": "pt",
    "output": "videos",
}


def _modular(blocks: str, **components: Any) -> Any:
    """The pipeline of some blocks, which takes embeddings: its text encoder is taken out."""
    made = getattr(diffusers, blocks)()
    del made.sub_blocks["text_encoder"]
    _silence(made)
    pipe = made.init_pipeline()
    pipe.update_components(**components)
    return pipe


def _silence(block: Any) -> None:
    """Switch off the progress bars of a block, which has them, and of those in it."""
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for inner in block.sub_blocks.values():
        _silence(inner)


def _skipped() -> Any:
    """Of steps in the middle, a third call without block 1."""
    config = LayerSkipConfig(indices=[1], fqn="auto")
    return SkipLayerGuidance(skip_layer_config=config, skip_layer_guidance_stop=0.7)


def _perturbed() -> Any:
    """A third call whose block 1 has no attention between tokens."""
    config = LayerSkipConfig(
        indices=[1],
        fqn="auto",
        skip_attention=False,
        skip_attention_scores=True,
        skip_ff=False,
    )
    return PerturbedAttentionGuidance(perturbed_guidance_config=config, perturbed_guidance_stop=0.7)


def _euler() -> Any:
    return FlowMatchEulerDiscreteScheduler()


def _wan(blocks: str = "WanBlocks", **components: Any) -> Any:
    channels = {"in_channels": 16, "out_channels": 16}
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    experts = {"transformer": transformer("WanTransformer3DModel", **channels)}
    if "guider_2" in components:
        experts["transformer_2"] = transformer("WanTransformer3DModel", seed=1, **channels)
    return _modular(blocks, vae=wan_vae(), scheduler=scheduler, **experts, **components)


def _sd3(guider: Any) -> Any:
    return _modular(
        "StableDiffusion3AutoBlocks",
        transformer=transformer("SD3Transformer2DModel"),
        vae=image_vae(shift_factor=0.06, scaling_factor=1.5),
        scheduler=_euler(),
        guider=guider,
    )


def _sd3_inputs() -> dict[str, Any]:
    return {
        **prompts(),
        "pooled_prompt_embeds": normal(1, 32, seed=2),
        "negative_pooled_prompt_embeds": normal(1, 32, seed=3),
        **_IMAGE,
    }


def _qwen(name: str, guider: Callable[[], Any], known: str = "") -> Case:
    return Case(
        f"QwenImageModularPipeline, {name}",
        lambda: _modular(
            "QwenImageAutoBlocks",
            transformer=transformer("QwenImageTransformer2DModel"),
            vae=qwen_vae(),
            scheduler=_euler(),
            guider=guider(),
        ),
        lambda _: {**prompts(), **masks(name="prompt_embeds_mask"), **_IMAGE},
        known=known,
    )


CASES = (
    Case(
        "FluxModularPipeline",
        lambda: _modular(
            "FluxAutoBlocks",
            transformer=transformer("FluxTransformer2DModel"),
            vae=image_vae(shift_factor=0.06, scaling_factor=1.5),
            scheduler=_euler(),
        ),
        lambda _: {
            "prompt_embeds": normal(1, 12, 24),
            "pooled_prompt_embeds": normal(1, 24, seed=1),
            **_IMAGE,
        },
    ),
    Case(
        "StableDiffusion3ModularPipeline, CFG",
        lambda: _sd3(ClassifierFreeGuidance(guidance_scale=5.0)),
        lambda _: _sd3_inputs(),
    ),
    Case(
        "WanModularPipeline, CFG",
        lambda: _wan(guider=ClassifierFreeGuidance(guidance_scale=5.0)),
        lambda _: {**prompts(), **_VIDEO},
    ),
    Case(
        "WanModularPipeline, SLG",
        lambda: _wan(guider=_skipped()),
        lambda _: {**prompts(), **_VIDEO},
    ),
    Case(
        "Wan22ModularPipeline, CFG",
        lambda: _wan(
            "Wan22Blocks",
            guider=ClassifierFreeGuidance(guidance_scale=5.0),
            guider_2=ClassifierFreeGuidance(guidance_scale=3.0),
        ),
        lambda _: {**prompts(), **_VIDEO},
    ),
    _qwen("CFG", lambda: ClassifierFreeGuidance(guidance_scale=5.0)),
    _qwen(
        "PAG",
        _perturbed,
        known="the guider's hooks break the graph at each block, and pieces know no timestep",
    ),
    Case(
        "ZImageModularPipeline, CFG",
        lambda: _modular(
            "ZImageAutoBlocks",
            transformer=transformer("ZImageTransformer2DModel"),
            vae=image_vae(shift_factor=0.06),
            scheduler=_euler(),
            guider=ClassifierFreeGuidance(guidance_scale=5.0),
        ),
        lambda _: {
            "prompt_embeds": [normal(12, 24)],
            "negative_prompt_embeds": [normal(9, 24, seed=1)],
            **_IMAGE,
        },
    ),
)
