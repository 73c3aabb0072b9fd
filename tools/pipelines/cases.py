"""All cases by name."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from tools.pipelines import families
from tools.pipelines.case import Case

FAMILIES: tuple[tuple[Case, ...], ...] = tuple(
    import_module(f"{families.__name__}.{found.name}").CASES
    for found in iter_modules(families.__path__)
)

CASES: dict[str, Case] = {case.name: case for family in FAMILIES for case in family}
"""A pipeline may have several: its class is what stands before the comma."""

_TORCHVISION = "needs torchvision, which the group of test packages leaves out"
_BROKEN = "fails in diffusers 0.42.1: "
_PIXELS = "scales every picture to a million pixels: a minute a call on a CPU"
_UNTRIED = "not tried"

LEFT_OUT: dict[str, str] = {
    "AceStepPipeline": _UNTRIED + ": lyrics, timbre and a condition encoder of its own",
    "AmusedImg2ImgPipeline": "no diffusion: predicts masked codes",
    "AmusedInpaintPipeline": "no diffusion: predicts masked codes",
    "AmusedPipeline": "no diffusion: predicts masked codes",
    "BriaFiboEditPipeline": _UNTRIED,
    "ChromaInpaintPipeline": _BROKEN + "reads guidance_embeds, which Chroma's config has not",
    "ConsisIDPipeline": "needs OpenCV",
    "Cosmos2_5_PredictBasePipeline": _TORCHVISION,
    "Cosmos2_5_TransferPipeline": _TORCHVISION,
    "Cosmos3OmniPipeline": _UNTRIED,
    "EasyAnimateControlPipeline": _BROKEN + "encode_prompt has no text_encoder_index",
    "HeliosPyramidPipeline": "takes a list of numbers of steps, one for each resolution",
    "HunyuanImageRefinerPipeline": _UNTRIED,
    "JoyImageEditPipeline": _PIXELS,
    "JoyImageEditPlusPipeline": _PIXELS,
    "Kandinsky6SRPipeline": _UNTRIED,
    "Kandinsky6TI2VAPipeline": _UNTRIED,
    "LTX2DFRPipeline": _UNTRIED,
    "LTX2DFRTemporalRefinePipeline": _UNTRIED,
    "LTX2HDRPipeline": _UNTRIED,
    "LTX2InContextPipeline": _UNTRIED,
    "LTXI2VLongMultiPromptPipeline": _UNTRIED,
    "LongCatImageEditPipeline": _UNTRIED + ": a processor of pictures and text",
    "MotifVideoImage2VideoPipeline": _UNTRIED + ": a processor of pictures and text",
    "OmniGenPipeline": _TORCHVISION,
    "QwenImageLayeredPipeline": _BROKEN + "given embeddings, it still asks for a caption",
    "RFD4ProteinaPipeline": _UNTRIED + ": a protein by two schedulers",
    "SanaWMPipeline": _UNTRIED + ": cameras",
    "VQDiffusionPipeline": "a scheduler of discrete codes",
    "VisualClozeGenerationPipeline": _UNTRIED,
    "VisualClozePipeline": _UNTRIED,
}
"""The pipelines of diffusers 0.42.1 with a ``transformer`` that have no case, and why."""
