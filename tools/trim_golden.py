"""Cut the reference vectors of DiT with DDIM-50 down to what tests/conformance needs (below 3 MB).

python tools/trim_golden.py GOLDEN_FOLDER [--out tests/conformance]

The full vectors hold the outputs of the authors' ToCa code on a small random model of the real depth. Kept are: the
weights, equal tensors once (diffusers repeats the timestep and class embedders in each block); the latents; of the
outputs the noise prediction of both rows at every step (the learned variances, the other half of the channels, come
from the same tokens through the same linear); the chosen tokens of four layers; K and full/partial of all layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

CASE = "dit_ddim50"
LAYERS = (0, 1, 13, 27)
LIMIT = 3_000_000  # bytes
NOTHING = 255  # pads the lists of chosen tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Write the trimmed case; returns the exit status."""
    parser = argparse.ArgumentParser(description="Trim the DiT reference vectors for tests/conformance.")
    parser.add_argument("golden", type=Path, help="folder that holds dit_ddim50.json and dit_ddim50.safetensors")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "tests" / "conformance")
    arguments = parser.parse_args(argv)
    facts = json.loads((arguments.golden / f"{CASE}.json").read_text(encoding="utf-8"))
    tensors, shared = trim(load_file(arguments.golden / f"{CASE}.safetensors"), facts["model"]["kwargs"]["in_channels"])
    arguments.out.mkdir(parents=True, exist_ok=True)
    files = arguments.out / f"{CASE}.safetensors", arguments.out / f"{CASE}.json"
    save_file(tensors, files[0])
    files[1].write_text(render({**describe(facts), "shared_weights": shared}), encoding="utf-8", newline="\n")
    size = sum(file.stat().st_size for file in files)
    print(f"{size} bytes in {arguments.out}")
    return 0 if size < LIMIT else 1


def trim(full: dict[str, Tensor], noise_channels: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to keep, and per weight that equals a kept one the name of that one."""
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first_with: dict[bytes, str] = {}
    for name in sorted(name for name in full if name.startswith("weights.")):
        content = repr(tuple(full[name].shape)).encode() + full[name].numpy().tobytes()
        if content in first_with:
            shared[name] = first_with[content]
        else:
            first_with[content] = name
            kept[name] = full[name].clone()
    for name in ("inputs.hidden_states", "inputs.timestep", "inputs.class_labels"):
        kept[name] = full[name].clone()
    kept["outputs"] = full["outputs"][:, :, :noise_channels].contiguous()
    for layer in LAYERS:
        name = f"fresh.layer_{layer:02d}.mlp"
        kept[name] = torch.where(full[name] < 0, NOTHING, full[name]).to(torch.uint8)
    return kept, shared


def describe(facts: dict[str, Any]) -> dict[str, Any]:
    """What the test needs of the case's description."""
    return {
        **{key: facts[key] for key in ("case", "source", "model", "call", "policy", "notes")},
        "trimmed": "outputs: the first in_channels channels; fresh.*: uint8, padded with 255; shared_weights: equal weights, once",
        "layers": [step["layers"] for step in facts["steps"]],
        "K": facts["K"],
    }


def render(data: dict[str, Any]) -> str:
    """JSON with one line per entry of the outer mapping and of the mappings in it, so that changes can be read."""
    lines = []
    for key, value in data.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            text = "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    raise SystemExit(main())
