"""The reference cases (trimmed by tools/trim_golden.py): the authors' code of ToCa, and of methods
after it, on small random models, latents given at every step.

A case knows how to build and call its model, and what the authors' code did: outputs, full or
partial or skipped, K, chosen tokens, weights of forecasts. Its keys, such as
``layer_03.cross-attn``, are translated to the paths of the model's modules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.stdit3 import STDiT3
from tests.system.conformance import authors, calls
from tests.system.conformance.calls import Call, Tensors

HERE = Path(__file__).parent
NOTHING = 255  # pads the lists of chosen tokens

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """What differs from case to case.

    ``letters`` gives, for a module's path, F (full), P (partial) or S (skipped) for each call;
    ``spellings`` the beginnings and ends of the authors' keys and of the module paths; ``absent``
    the weights that the reference file may lack. ``load`` makes the authors' own model of weights
    and settings.
    """

    policy: str
    model: Callable[..., nn.Module]
    call: Callable[[Tensors, int], Call]
    letters: Callable[[Facts, str], str]
    spellings: Mapping[str, str]
    shared: bool = False
    load: Callable[[Tensors, Facts], nn.Module] | None = None
    absent: frozenset[str] = frozenset({"pos_embed.pos_embed"})


@dataclass(frozen=True)
class Case:
    """One case; everything is read when it is first asked for."""

    name: str
    kind: Kind

    @cached_property
    def facts(self) -> Facts:
        return json.loads((HERE / f"{self.name}.json").read_text(encoding="utf-8"))

    @cached_property
    def vectors(self) -> Tensors:
        # Mapped tensors can be unaligned, which changes last bits.
        found = {
            name: tensor.clone()
            for name, tensor in load_file(HERE / f"{self.name}.safetensors").items()
        }
        if "inputs.mixes" in found:
            latents = torch.tensordot(found["inputs.mixes"], found["inputs.images"], dims=1)
            found["inputs.hidden_states"] = latents.float()
        return found

    @property
    def lender(self) -> Case:
        """The case whose weights it has: itself, or another."""
        name = self.facts["model"].get("weights_from")
        return self if name is None else Case(name, self.kind)

    @property
    def steps(self) -> int:
        return len(self.vectors["outputs"])

    @property
    def timesteps(self) -> list[float]:
        return self.vectors["inputs.timestep"].tolist()

    @property
    def keys(self) -> tuple[str, ...]:
        """The modules whose chosen tokens are recorded."""
        return tuple(
            sorted(
                name.removeprefix("fresh.") for name in self.vectors if name.startswith("fresh.")
            )
        )

    def model(self) -> nn.Module:
        """The untouched model with the reference weights."""
        settings, lender = self.facts["model"]["kwargs"], self.lender
        weights = {
            name.removeprefix("weights."): tensor
            for name, tensor in lender.vectors.items()
            if name.startswith("weights.")
        }
        if self.kind.load is not None:
            return self.kind.load(weights, settings)
        weights |= {
            name.removeprefix("weights."): lender.vectors[source]
            for name, source in lender.facts["shared_weights"].items()
        }
        model = self.kind.model(**settings).eval().requires_grad_(False)
        left = model.load_state_dict(weights, strict=False)
        assert set(left.missing_keys) <= self.kind.absent
        assert not left.unexpected_keys
        return model

    def run(self, model: nn.Module, call: int, **extra: Any) -> Tensor:
        """The output of one call, those channels that the reference has."""
        args, kwargs = self.kind.call(self.vectors, call)
        output = model(*args, **kwargs, **extra)
        return self.cut(output if isinstance(output, Tensor) else output[0], call)

    def cut(self, output: Tensor, call: int) -> Tensor:
        """Those channels of an output that the reference has."""
        return output[tuple(slice(size) for size in self.expected(call).shape)]

    def expected(self, call: int) -> Tensor:
        """The output of the authors' code."""
        return self.vectors["outputs"][call]

    def path(self, key: str) -> str:
        """The path of the module that the authors' ``key`` means."""
        block, _, module = key.partition(".")
        stack, _, layer = block.partition("_")
        return (
            f"{self.kind.spellings[stack]}.{int(layer)}{self.kind.spellings[f'{stack}.{module}']}"
        )

    def letters(self, path: str) -> str:
        """F, P or S for each call."""
        return self.kind.letters(self.facts, path)

    def step_kind(self, call: int) -> str:
        """The kind of the step, as the report calls it."""
        paths = [self.path(key) for key in self.facts.get("K", ())] or [""]
        letters = {self.letters(path)[call] for path in paths}
        if "S" in letters:
            return "skip"
        return "mixed" if len(letters) == 2 else {"F": "full", "P": "partial"}[letters.pop()]

    def count(self, key: str) -> list[int | None]:
        """K for each call; ``None`` where the module is full."""
        return self.facts["K"][key]

    @property
    def counts(self) -> dict[str, list[int | None]]:
        """K for each call, by the path of the module."""
        return {self.path(key): self.count(key) for key in self.facts["K"]}

    def fresh(self, key: str, call: int) -> list[list[int]]:
        """Per sample the tokens chosen in this call, in descending score."""
        rows = [
            [token for token in row if token != NOTHING]
            for row in self.vectors[f"fresh.{key}"][call].tolist()
        ]
        return rows * 2 if self.kind.shared else rows


def _by_layer(facts: Facts, path: str) -> str:
    return "".join(call[int(path.split(".")[1])] for call in facts["layers"])


def _by_module(facts: Facts, path: str) -> str:
    stack, _, module = path.split(".")[:3]
    stack = stack.removesuffix("_blocks")
    return facts["modules"][
        f"{stack[:4]}-attn" if module == "attn" else f"{stack}.{module.replace('_', '-')}"
    ]


def _by_call(facts: Facts, path: str) -> str:
    return facts["calls"]


def _forecast(facts: Facts, path: str) -> str:
    return "".join("F" if weights is None else "P" for weights in facts["weights"])


def _skipped(facts: Facts, path: str) -> str:
    return _forecast(facts, path).replace("P", "S")


_OPENSORA = {
    f"{stack}.{module}": f".{module.replace('-', '_')}"
    for stack in ("spatial", "temporal")
    for module in ("cross-attn", "mlp")
}

_DIT = {"layer": "transformer_blocks", "layer.mlp": ".ff"}

CASES = {
    "dit_ddim50": Kind(
        policy="reference/dit-xl-2-ddim50",
        model=calls.dit,
        call=calls.dit_call,
        letters=_by_layer,
        spellings=_DIT,
    ),
    "pixart_dpm20": Kind(
        policy="reference/pixart-alpha",
        model=PixArtTransformer2DModel,
        call=calls.pixart_call,
        letters=_by_layer,
        spellings={"layer": "transformer_blocks", "layer.mlp": ".ff", "layer.cross-attn": ".attn2"},
        shared=True,
    ),
    "opensora_rflow30": Kind(
        policy="reference/opensora",
        model=STDiT3,
        call=calls.opensora_call,
        letters=_by_module,
        spellings={"spatial": "spatial_blocks", "temporal": "temporal_blocks", **_OPENSORA},
        shared=True,
        absent=frozenset(),
    ),
    "flux_t4": Kind(
        policy="reference/flux-dev-n4",
        model=FluxTransformer2DModel,
        call=calls.flux_call,
        letters=_by_call,
        spellings={
            "double": "transformer_blocks",
            "double.img_mlp": ".ff",
            "double.txt_mlp": ".ff_context",
            "single": "single_transformer_blocks",
            "single.mlp": "",
        },
    ),
    **{
        name: Kind(
            policy=f"reference/{policy}",
            model=calls.dit,
            call=calls.dit_call,
            letters=_by_layer,
            spellings=_DIT,
        )
        for name, policy in (("duca_dit50", "duca-dit"), ("duca_dit50_vnorm", "duca-dit-vnorm"))
    },
}
"""Some tokens are computed on some steps, and it is known which."""

FORECASTS = {
    "taylorseer_dit50": Kind(
        policy="reference/taylorseer-dit",
        model=calls.dit,
        call=calls.dit_call,
        letters=_forecast,
        spellings={},
    ),
    "taylorseer_flux50": Kind(
        policy="reference/taylorseer-flux",
        model=FluxTransformer2DModel,
        call=calls.flux_call,
        letters=_forecast,
        spellings={},
    ),
    "spectrum_flux50": Kind(
        policy="reference/spectrum-flux",
        model=FluxTransformer2DModel,
        call=calls.flux_call,
        letters=_skipped,
        spellings={},
    ),
}
"""None is: what is not computed is forecast, and it is known with which weights."""


def _own(name: str, spellings: Mapping[str, str], **changes: Any) -> Kind:
    """A case on the authors' own model, with what differs."""
    return replace(CASES[name], spellings=spellings, **changes)


_BLOCKS = {"layer": "blocks", "layer.mlp": ".mlp"}

AUTHORS = {
    "dit_ddim50": _own("dit_ddim50", _BLOCKS, load=authors.dit, call=authors.dit_call),
    "pixart_dpm20": _own(
        "pixart_dpm20",
        {**_BLOCKS, "layer.cross-attn": ".cross_attn"},
        load=authors.pixart,
        call=authors.pixart_call,
    ),
    "opensora_rflow30": _own(
        "opensora_rflow30", CASES["opensora_rflow30"].spellings, load=authors.opensora
    ),
    "flux_t4": _own(
        "flux_t4",
        {
            "double": "double_blocks",
            "double.img_mlp": ".img_mlp",
            "double.txt_mlp": ".txt_mlp",
            "single": "single_blocks",
            "single.mlp": "",
        },
        load=authors.flux,
        call=authors.flux_call,
    ),
}
"""The same cases on the authors' own models (tests/authors.py)."""


@cache
def load_case(name: str, own: bool = False) -> Case:
    return Case(name, AUTHORS[name] if own else {**CASES, **FORECASTS}[name])
