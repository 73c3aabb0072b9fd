"""Cut the reference vectors down to what tests/system/conformance needs.

    python tools/trim_golden.py GOLDEN_FOLDER [CASE ...] [--out tests/system/conformance]

The nine cases together have at most 20.2 MB. GOLDEN_FOLDER holds a folder per case, with the
outputs of the authors' code (ToCa's, and of methods after it) on a small random model of the real
depth. What is kept: the weights, equal tensors once (diffusers repeats DiT's timestep and class
embedders in each block); the inputs, as mixes of a few images where the latents are that; the
outputs at every step, without the channels that the same linear makes of the same tokens; the
chosen tokens, for guidance halves that share them once; K and full/partial of all layers, or the
weights of all forecasts. What else a case keeps is in CASES.
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
    full or partial, and takes it from the facts. The latents of all steps are mixes of so many
    ``images`` (None: they are not).
    """

    limit: int
    channels: int
    channel_axis: int
    modes: str
    read_modes: Callable[[Facts], Any]
    trimmed: str
    layers: tuple[str, ...] | None = None
    rows: int | None = None
    images: int | None = None


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


def weights_of_calls(facts: Facts) -> list[dict[str, float] | None]:
    """The weights of each call's forecast by full call; None for the full ones."""
    return [None if step["kind"] == "full" else step["weights"] for step in facts["steps"]]


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
    **{
        f"duca_dit50{score}": Cut(
            limit=limit,
            channels=1,
            channel_axis=2,
            modes="layers",
            read_modes=letters_of_layers,
            trimmed="outputs: the first channel; fresh.*: uint8, padded with 255; "
            "shared_weights: equal weights, once; inputs.hidden_states: mixes @ images",
            images=3,
        )
        for score, limit in (("", 2_500_000), ("_vnorm", 300_000))
    },
    "taylorseer_dit50": Cut(
        limit=1_150_000,
        channels=1,
        channel_axis=2,
        modes="weights",
        read_modes=weights_of_calls,
        trimmed="outputs: the first channel; shared_weights: equal weights, once; "
        "inputs.hidden_states: mixes @ images",
        images=3,
    ),
    **{
        case: Cut(
            limit=1_300_000,
            channels=4,
            channel_axis=3,
            modes="weights",
            read_modes=weights_of_calls,
            trimmed="outputs: the first 4 of 16 channels; inputs.hidden_states: mixes @ images",
            images=3,
        )
        for case in ("taylorseer_flux50", "spectrum_flux50")
    },
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
        if name == "inputs.hidden_states" and cut.images is not None:
            kept["inputs.mixes"], kept["inputs.images"] = unmix(tensor, cut.images)
        elif name.startswith("inputs.") and name != "inputs.step":
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


def unmix(latents: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Weights [S, count] and images [count, ...], in double precision, whose products they are."""
    left, sizes, right = torch.linalg.svd(latents.double().flatten(1), full_matrices=False)
    mixes, images = left[:, :count] * sizes[:count], right[:count]
    if (mixes @ images - latents.flatten(1)).abs().max() > 5e-7:
        raise ValueError(f"the latents are no mixes of {count} images")
    return mixes.contiguous(), images.reshape(count, *latents.shape[1:]).contiguous()


def describe(facts: Facts, cut: Cut) -> Facts:
    """The parts of a case's description that the tests need."""
    wrong = facts["checks"].get("wrong_rules_maxdiff")
    return {
        **{key: facts[key] for key in ("case", "source", "model", "call", "policy", "notes")},
        "trimmed": cut.trimmed,
        cut.modes: cut.read_modes(facts),
        **({"K": facts["K"]} if "K" in facts else {}),
        **({} if wrong is None else {"wrong_rules": wrong}),
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
