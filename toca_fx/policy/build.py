"""Plain data that passed the schema to the dataclasses of a policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from toca_fx.policy.types import (
    MODULE_TYPES,
    Action,
    Cache,
    Guidance,
    Hoisting,
    Interval,
    Policy,
    Ratio,
    Recording,
    Rule,
    Sampler,
    Scores,
    Spatial,
    Window,
)

Data = Mapping[str, Any]

_SECTIONS = ("N", "R", "scores", "spatial", "cache")  # what a rule merges key by key
_FALLBACK_STEPS = 50  # stands in while the problems of a policy without a step count are collected


def build(data: Data, source: str, place_of_rule: Callable[[int], str]) -> Policy:
    """Build a policy; a required part that is missing (and reported elsewhere) gets a harmless
    stand-in.
    """
    sampler = Sampler(**{"steps": _FALLBACK_STEPS, **_section("sampler", data)})
    return Policy(
        name=data.get("name", ""),
        description=data.get("description", ""),
        model=tuple(data.get("model", ())),
        sampler=sampler,
        guidance=Guidance(**data.get("guidance", {})),
        N=Interval(**{**_base_from_list(data, sampler.steps), **_section("N", data)}),
        R=Ratio(**{"base": 0.0, **_section("R", data)}),
        modules=_modules(data.get("modules", {})),
        scores=Scores(**_section("scores", data)),
        spatial=Spatial(**{"bonus": 0.0, **_section("spatial", data)})
        if "spatial" in data
        else None,
        cache=Cache(**data.get("cache", {})),
        hoisting=Hoisting(**{key: int(value) for key, value in data.get("hoisting", {}).items()}),
        recording=Recording(
            **{key: int(value) for key, value in data.get("recording", {}).items()}
        ),
        seed=int(data.get("seed", 0)),
        rules=tuple(
            _rule(rule, place_of_rule(index)) for index, rule in enumerate(data.get("rules", ()))
        ),
        source=source,
    )


def _base_from_list(data: Data, steps: int) -> dict[str, int]:
    """With `full_steps` and no `base`, the mean interval is the base that the staleness score
    divides by.
    """
    listed = data.get("N", {}).get("full_steps")
    return {"base": max(1, round(steps / len(listed)))} if listed else {}


def _section(name: str, data: Data) -> dict[str, Any]:
    return {key: _leaf(f"{name}.{key}", value) for key, value in data.get(name, {}).items()}


def _leaf(key: str, value: Any) -> Any:
    convert = _CONVERT.get(key)
    return convert(value) if convert else value


def _windows(values: list[Data]) -> tuple[Window, ...]:
    complete = (value for value in values if {"from", "to", "interval"} <= value.keys())
    return tuple(
        Window(float(value["from"]), float(value["to"]), int(value["interval"]))
        for value in complete
    )


def _steps(values: list[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


# JSON Schema counts 3.0 as an integer and 1 as a number, so types are settled here.
_CONVERT: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("sampler.steps", "N.base", "N.first", "N.last", "R.layer_span", "R.multiple"), int
    ),
    **dict.fromkeys(("scores.staleness_over", "spatial.grid"), int),
    **dict.fromkeys(
        ("N.drift", "R.base", "R.step_weight", "R.layer_weight", "spatial.bonus"), float
    ),
    **{
        f"scores.{name}": float
        for name in (
            "self_attention",
            "cross_attention",
            "staleness",
            "value_norm",
            "key_norm",
            "random",
            "queries",
        )
    },
    "N.windows": _windows,
    "N.full_steps": _steps,
    "N.extra_full_steps": _steps,
}


def _modules(given: Data) -> tuple[tuple[str, Action], ...]:
    usual = {kind: Action("partial") if kind == "mlp" else Action("reuse") for kind in MODULE_TYPES}
    return tuple({**usual, **{kind: _action(value) for kind, value in given.items()}}.items())


def _action(value: Any) -> Action:
    if isinstance(value, Mapping):
        return Action("partial", float(value.get("weight", 1.0)))
    return Action("compute" if value == "compute" else "reuse")


def parse_layers(value: str | int) -> tuple[int, int]:
    """`5`, "5" or "0-3" as an inclusive range."""
    first, _, last = str(int(value) if isinstance(value, (int, float)) else value).partition("-")
    return int(first), int(last or first)


def _rule(data: Data, position: str) -> Rule:
    layers = parse_layers(data["layers"]) if "layers" in data else None
    return Rule(data.get("match"), data.get("path"), layers, tuple(_overrides(data)), position)


def _overrides(data: Data) -> Iterator[tuple[str, object]]:
    if "module" in data:
        yield "module", _action(data["module"])
    if data.get("spatial") == "off":
        yield "spatial", None
    for section in _SECTIONS:
        if isinstance(data.get(section), Mapping):
            yield from (
                (f"{section}.{key}", value) for key, value in _section(section, data).items()
            )
