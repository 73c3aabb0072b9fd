"""Sana: 256 image tokens of 32 x 32 pixels, 12 of text."""

from __future__ import annotations

from typing import Any

from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler

from toca_fx.examples import examples
from tools.pipelines.case import Case
from tools.pipelines.parts import masks, model, picture, pipeline, prompts, transformer
from tools.pipelines.vaes import dc_vae, wan_vae


def _sana(name: str, scheduler: Any = None, **components: Any) -> Any:
    return pipeline(
        name,
        **{
            "transformer": transformer("SanaTransformer2DModel"),
            "vae": dc_vae(),
            "scheduler": scheduler or _flow(),
            **components,
        },
    )


def _flow() -> Any:
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def _sprint(name: str) -> Any:
    tiny = transformer("SanaTransformer2DModel", guidance_embeds=True)
    return _sana(name, SCMScheduler(prediction_type="trigflow"), transformer=tiny)


def _controlnet() -> Any:
    config = {**examples()["SanaTransformer2DModel"].config, "num_layers": 1}
    return model("SanaControlNetModel", seed=1, **config)


def _inputs(**more: Any) -> dict[str, Any]:
    return {
        **prompts(),
        **masks(),
        "negative_prompt": None,
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "output_type": "pt",
        **more,
    }


def _prompt(**more: Any) -> dict[str, Any]:
    """The inputs of a pipeline whose guidance is an input of the model: one prompt."""
    inputs = _inputs(**more, intermediate_timesteps=None)
    return {name: value for name, value in inputs.items() if not name.startswith("negative")}


_END = "the scheduler lists the end of the run as one more step, which memories wait for"

CASES = (
    Case("SanaPipeline", lambda: _sana("SanaPipeline"), lambda _: _inputs()),
    Case(
        "SanaPAGPipeline",
        lambda: _sana("SanaPAGPipeline", pag_applied_layers=["transformer_blocks.1"]),
        lambda _: _inputs(),
    ),
    Case(
        "SanaControlNetPipeline",
        lambda: _sana("SanaControlNetPipeline", controlnet=_controlnet()),
        lambda _: _inputs(control_image=picture()),
    ),
    Case(
        "SanaSprintPipeline",
        lambda: _sprint("SanaSprintPipeline"),
        lambda _: _prompt(),
        known=_END,
    ),
    Case(
        "SanaSprintImg2ImgPipeline",
        lambda: _sprint("SanaSprintImg2ImgPipeline"),
        lambda _: _prompt(image=picture(), strength=0.6),
        known=_END,
    ),
    Case(
        "SanaVideoPipeline",
        lambda: _sana(
            "SanaVideoPipeline",
            transformer=transformer("SanaVideoTransformer3DModel", in_channels=16, out_channels=16),
            vae=wan_vae(),
        ),
        lambda _: {**_inputs(height=64, width=64), "frames": 9},
    ),
    Case(
        "SanaImageToVideoPipeline",
        lambda: _sana(
            "SanaImageToVideoPipeline",
            transformer=transformer("SanaVideoTransformer3DModel", in_channels=16, out_channels=16),
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        ),
        lambda _: {**_inputs(height=64, width=64), "frames": 9, "image": picture(64, 64)},
    ),
)
