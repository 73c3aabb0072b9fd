"""The README's table of diffusers transformers: what toca_fx finds in each.

    python -m tools.coverage_table [CLASS ...]

prints the rows; without a class it writes the table into README.md. The models are tiny, with
random weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from toca_fx.capture.aten import to_aten, verify
from toca_fx.capture.dynamo import capture
from toca_fx.describe.coverage import coverage
from toca_fx.examples import UNSUPPORTED, build, examples
from toca_fx.match.matcher import match

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN = "<!-- coverage: written by python -m tools.coverage_table -->"
END = "<!-- end of coverage -->"
SUPPORTED_SHARE = 0.95
KINDS = ("self_attention", "cross_attention", "joint_attention")

# Classes that Dynamo cannot capture in one graph (fullgraph=True), as of diffusers 0.42 and torch
# 2.13.
_SIZES = "not captured: a tensor's values decide on shapes"
_PARTS = "captured in several graphs, a session caches what is in each"
REFUSED: dict[str, str] = {
    "HiDreamImageTransformer2DModel": _SIZES + " in its mixture of experts",
    "HunyuanImageTransformer2DModel": "captured block by block, behind a loop over texts whose "
    "lengths are values of tensors: its text refiner alone is cached",
    "HunyuanVideo15Transformer3DModel": _PARTS,
    "Lumina2Transformer2DModel": _PARTS,
    "OmniGenTransformer2DModel": _PARTS,
    "QwenImage21Transformer2DModel": _PARTS,
}
# Classes of which less than SUPPORTED_SHARE of the blocks' work is matched. What is matched is
# cached, the rest is computed.
PARTLY: dict[str, str] = {
    "Cosmos3OmniTransformer": "a packed stream [tokens, channels] without batch",
    "ErnieImageTransformer2DModel": "a stream [tokens, batch, channels]",
    "LongCatAudioDiTTransformer": "a numbered text encoder of convolutions",
    "NucleusMoEImageTransformer2DModel": "experts that choose their tokens",
    "SanaTransformer2DModel": "linear attention is no softmax attention",
    "SanaVideoTransformer3DModel": "linear attention is no softmax attention",
    "SanaWMTransformer3DModel": "linear attention; a stream [batch, frames, tokens, channels]",
}


def main(names: Sequence[str]) -> int:
    """Print rows, or write the README's table; returns the exit status."""
    rows = [_row_or_reason(name) for name in names or examples()]
    supported = sum("%" in row for row in rows) - len(PARTLY)
    print(f"{supported} classes of {len(rows)} with at least {SUPPORTED_SHARE:.0%}")
    if not names:
        unsupported = sorted(UNSUPPORTED.items())
        rows += [f"| {name} | | | | | | | not built: {why} |" for name, why in unsupported]
    columns = "| class | self | cross | joint | MLP | block FLOPs in sites | grain of the model | |"
    table = "\n".join([columns, "|---|---|---|---|---|---|---|---|", *rows])
    if names:
        print(table)
        return 0
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8", newline="\n")
    return 0


def _row_or_reason(name: str) -> str:
    try:
        return row(name)
    except Exception as error:  # a model may fail in any way: the table says so
        print(f"{name}: {error}", file=sys.stderr)
        return f"| {name} | | | | | | | {type(error).__name__}: {str(error).splitlines()[0]} |"


def row(name: str) -> str:
    """One line of the table."""
    if name in REFUSED:
        return f"| {name} | | | | | | | {REFUSED[name]} |"
    model, inputs = build(examples()[name])
    with torch.no_grad():
        # Some make tables of positions at their first call, in ways that Dynamo does not follow.
        model(**inputs)
    captured, flat = capture(model, (), inputs)
    module = to_aten(captured, flat)
    verify(captured, module, flat)
    matches = match(module.graph)
    found = coverage(module, matches)
    sites = " | ".join(str(found.found.get(kind, 0)) for kind in KINDS)
    matched, all_ = found.attentions
    attentions = "" if matched == all_ else f"{matched} of {all_} attentions"
    notes = "; ".join(filter(None, (attentions, PARTLY.get(name))))
    mlps = f"{found.mlps[0]} of {found.mlps[1]}"
    model_grain = f"its output only: {found.uncut}" if found.uncut else "yes"
    print(name, f"{found.share:.3f}", flush=True)
    return f"| {name} | {sites} | {mlps} | {found.share:.1%} | {model_grain} | {notes} |"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
