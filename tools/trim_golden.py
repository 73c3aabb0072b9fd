"""Cut the reference vectors down to what tests/system/conformance needs.

    python tools/trim_golden.py GOLDEN_FOLDER [CASE ...] [--out tests/system/conformance]

The four cases together have at most 14 MB. GOLDEN_FOLDER holds a folder per case, with the outputs
of the authors' ToCa code on a small random model of the real depth. What is kept: the weights,
equal tensors once (diffusers repeats DiT's timestep and class embedders in each block); the inputs;
the outputs at every step, without the channels that the same linear makes of the same tokens; the
chosen tokens, for guidance halves that share them once; K and full/partial of all layers. What else
a case keeps is in CASES.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NOTHING = 255  # pads the lists of chosen tokens

Facts = dict[str, Any]


@dataclass(frozen=True)
class Cut:
    """What is kept of one case, and the most bytes that its files may have.

    Of the outputs the first ``channels`` along ``channel_axis``; of the chosen tokens those of
    ``layers`` (None: all), for the first ``rows`` of the batch (None: all). ``modes`` names what is
    full or partial, and takes it from the facts.
    """

    limit: int
    channels: int
    channel_axis: int
    modes: str
    read_modes: Callable[[Facts], Any]
    trimmed: str
    layers: tuple[str, ...] | None = None
    rows: int | None = None


def letters_of_layers(facts: Facts) -> list[str]:
    """The letters of each call, one for each layer."""
    return [step["layers"] for step in facts["steps"]]


def letters_of_modules(facts: Facts) -> dict[str, str]:
    """The letters of each type of module, one for each call."""
    return {
        module: "".join(step["modules"][module] for step in facts["steps"])
        for module in facts["steps"][0]["modules"]
    }


def letters_of_calls(facts: Facts) -> str:
    """The letters of all calls."""
    return "".join(step["type"] for step in facts["steps"])


CASES = {
    "dit_ddim50": Cut(
        limit=3_000_000,
        channels=4,
        channel_axis=2,
        modes="layers",
        read_modes=letters_of_layers,
        trimmed="outputs: the first in_channels channels; fresh.*: uint8, padded with 255; "
        "shared_weights: equal weights, once",
        layers=("layer_00", "layer_01", "layer_13", "layer_27"),
    ),
    "pixart_dpm20": Cut(
        limit=2_400_000,
        channels=4,
        channel_axis=2,
        modes="layers",
        read_modes=letters_of_layers,
        trimmed="outputs: the first in_channels channels; fresh.*: uint8, padded with 255, "
        "row 0 (row 1 is equal)",
        rows=1,
    ),
    "opensora_rflow30": Cut(
        limit=4_700_000,
        channels=4,
        channel_axis=2,
        modes="modules",
        read_modes=letters_of_modules,
        trimmed="outputs: the first in_channels channels; fresh.*: uint8, padded with 255, "
        "row 0 (row 1 is equal)",
        rows=1,
    ),
    "flux_t4": Cut(
        limit=3_900_000,
        channels=8,
        channel_axis=3,
        modes="calls",
        read_modes=letters_of_calls,
        trimmed="outputs: the first 8 of 16 channels; fresh.*: uint8, padded with 255",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the trimmed cases; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Trim the reference vectors for tests/system/conformance."
    )
    parser.add_argument(
        "golden",
        type=Path,
        help="folder with a folder per case that holds CASE.json and CASE.safetensors",
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "tests" / "system" / "conformance",
    )
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    too_large = False
    for case in arguments.cases or CASES:
        size = write(case, arguments.golden / case, arguments.out)
        print(f"{case}: {size} bytes of at most {CASES[case].limit}")
        too_large |= size > CASES[case].limit
    return int(too_large)


def write(case: str, golden: Path, out: Path) -> int:
    """Trim one case; returns the bytes of its two files."""
    cut = CASES[case]
    facts = json.loads((golden / f"{case}.json").read_text(encoding="utf-8"))
    tensors, shared = trim(load_file(golden / f"{case}.safetensors"), cut)
    files = out / f"{case}.safetensors", out / f"{case}.json"
    save_file(tensors, files[0])
    files[1].write_text(
        render({**describe(facts, cut), "shared_weights": shared}), encoding="utf-8", newline="\n"
    )
    return sum(file.stat().st_size for file in files)


def trim(full: dict[str, Tensor], cut: Cut) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to keep, and for each weight that equals one of them the name of that one."""
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
    for name, tensor in full.items():
        if name.startswith("inputs.") and name != "inputs.step":
            kept[name] = tensor.clone()
    kept["outputs"] = full["outputs"].narrow(cut.channel_axis, 0, cut.channels).contiguous()
    for name, tensor in full.items():
        if name.startswith("fresh.") and (cut.layers is None or name.split(".")[1] in cut.layers):
            padded = torch.where(tensor < 0, NOTHING, tensor).to(torch.uint8)
            kept[name] = padded[:, : cut.rows].contiguous()
            alike = all(torch.equal(tensor[:, :1], row) for row in tensor.split(1, dim=1))
            if cut.rows is not None and not alike:
                raise ValueError(f"{name}: the rows differ")
    return kept, shared


def describe(facts: Facts, cut: Cut) -> Facts:
    """The parts of a case's description that the tests need."""
    return {
        **{key: facts[key] for key in ("case", "source", "model", "call", "policy", "notes")},
        "trimmed": cut.trimmed,
        cut.modes: cut.read_modes(facts),
        "K": facts["K"],
    }


def render(data: Facts) -> str:
    """JSON whose changes can be read.

    It has a line for each entry of the outer mapping, and of the mappings in it.
    """
    lines = []
    for key, value in data.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            entries = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
            text = "{\n" + ",\n".join(entries) + "\n }"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    raise SystemExit(main())
