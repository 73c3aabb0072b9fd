"""Tiny encoders of pictures and texts, where a pipeline takes no embeddings."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tools.pipelines.parts import seeded

_VISION = {
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


def clip_vision(width: int = 20) -> dict[str, Any]:
    """A CLIP that sees 12 x 12 pixels as 10 tokens of ``width``, and what prepares its pictures."""
    config = CLIPVisionConfig(hidden_size=width, **_VISION)
    return {
        "image_encoder": seeded(lambda: CLIPVisionModel(config)),
        "image_processor": CLIPImageProcessor(size=12, crop_size=12),
    }


def siglip_vision(width: int = 20) -> dict[str, Any]:
    """A SigLIP that sees 12 x 12 pixels as 9 tokens of ``width``, and what prepares them."""
    config = SiglipVisionConfig(hidden_size=width, **_VISION)
    return {
        "image_encoder": seeded(lambda: SiglipVisionModel(config)),
        "feature_extractor": SiglipImageProcessor(size={"height": 12, "width": 12}),
    }


_LETTERS = " abcdefghijklmnopqrstuvwxyz"


def tokenizer(limit: int = 12) -> Any:
    """One token a letter, at most ``limit`` of them; 0 is padding, 1 anything else."""
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<unk>", *_LETTERS))}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=limit,
        chat_template="{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",
    )


def language_model(width: int = 24) -> Any:
    """A decoder with two layers of ``width``."""
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return seeded(lambda: Qwen2Model(config))


def qwen3_vl(layers: int, width: int) -> Any:
    """A decoder with layers of ``width``, and a little one that sees."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": width // 2}
    config = Qwen3VLConfig(
        text_config={
            **heads,
            "vocab_size": 64,
            "hidden_size": width,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
            "deepstack_visual_indexes": [0],
        },
    )
    return seeded(lambda: Qwen3VLModel(config))


def umt5(width: int = 24) -> Any:
    """An encoder with two layers of ``width``."""
    config = UMT5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    return seeded(lambda: UMT5EncoderModel(config))


class Processor:
    """What a pipeline asks of a processor when it is made, where calls are given embeddings."""

    def __init__(self) -> None:
        self.tokenizer = tokenizer()

    def apply_chat_template(self, *_: object, **__: object) -> list[list[int]]:
        """The tokens of a system prompt: none."""
        return [[]]
