"""Peers: other caches, as points of the curve, and the work that they do.

A peer is named with its settings, fields of its own configuration by their own names:
``diffusers/first-block:threshold=0.1``. cache-dit is optional.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from toca_fx.lower.flops import FORMULAS
from tools.frontier.caches import PACKAGES, PEERS, At, Settings, of_diffusers

if TYPE_CHECKING:
    from tools.frontier.setups import Setup

INSTALL = {
    "cache-dit": "pip install --no-deps cache-dit==1.5.3",
    "diffusers": "pip install diffusers==0.42.1",
}


@dataclass(frozen=True)
class Peer:
    """A cache by its name in ``PEERS``, and the settings that are not its defaults."""

    name: str
    settings: Settings

    def configure(self, steps: int) -> Any:
        """Its own configuration for a number of steps; it raises what it will."""
        return PEERS[self.name](self.settings, steps)

    @property
    def package(self) -> str:
        """The package that it comes from."""
        return self.name.partition("/")[0]

    @property
    def version(self) -> str:
        """The version of its package."""
        return metadata.version(self.package)

    @property
    def says(self) -> dict[str, Any]:
        """What is measured, as plain data."""
        return {"peer": self.name, "version": self.version, **self.settings}


def peer_of(source: str, steps: int) -> Peer | None:
    """The peer that ``source`` names, ``PEER[:KEY=VALUE,...]``; None if it names none.

    Raises:
        ValueError: its package is not there, or does not take the settings.
    """
    name, _, given = source.partition(":")
    if name not in PEERS:
        return None
    pairs = [pair.partition("=") for pair in given.split(",") if pair]
    if not all(key and value for key, _, value in pairs):
        raise ValueError(f"{source}: expected {name}:KEY=VALUE,... of its own configuration")
    peer = Peer(name, {key: _value(value) for key, _, value in pairs})
    try:
        peer.configure(steps)
    except ImportError as error:
        raise ValueError(f"{source}: {error}; {INSTALL[peer.package]}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error} ({peer.package} {peer.version})") from error
    return peer


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class Step:
    """What a call of the model cost."""

    flops: int
    kind: str


@dataclass
class Work:
    """The work of a generation, by the FLOPs of its calls.

    The first is full: there is nothing yet to reuse. What costs less is partial.
    """

    flops: list[int] = field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        """The calls in turn."""
        return [Step(of, "full" if of >= self.flops[0] else "partial") for of in self.flops]

    @property
    def flops_ratio(self) -> float:
        """The work without a cache over that with it."""
        return self.flops[0] * len(self.flops) / sum(self.flops)


class Cached:
    """A setup's model under a peer's cache; called as the model is, within ``generation``.

    Compiled block by block, or eager and counting FLOPs.
    """

    def __init__(self, setup: Setup, peer: Peer, scheduler: Any, *, compiled: bool = False) -> None:
        config = peer.configure(len(scheduler.timesteps))
        if getattr(config, "calibrate", False):
            config = _calibrated(setup, config, scheduler)
        self._caching = PACKAGES[peer.package](setup.model, config)
        self._run = self._caching.model if compiled else self._counted
        self._ahead: Iterator[At] = iter(())
        self._work = Work()
        if compiled:
            # The hooks of all peers share code, and each is another way through it; cache-dit's
            # documentation raises the limit so.
            torch.compiler.config.recompile_limit = 96
            compile_blocks(self._caching.model)

    @contextmanager
    def generation(self, scheduler: Any) -> Iterator[Work]:
        """One sampling run; its work is known at its end, unless compiled."""
        shares = noise_shares(scheduler)
        self._caching.begin(len(shares))
        self._ahead = iter([At(step, len(shares), share) for step, share in enumerate(shares)])
        self._work = Work()
        yield self._work

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The model's prediction for the next step."""
        with self._caching.call(next(self._ahead)):
            return self._run(*args, **kwargs)

    def _counted(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            predicted: tuple[Tensor, ...] = self._caching.model(*args, **kwargs)
        self._work.flops.append(counter.get_total_flops())
        return predicted


def noise_shares(scheduler: Any) -> list[float]:
    """b / (a + b) of the latents a x + b noise, per timestep: the sigma of a flow as noisy."""
    signal = scheduler.alphas_cumprod[scheduler.timesteps.long()].double()
    a, b = signal.sqrt(), (1 - signal).sqrt()
    shares: list[float] = (b / (a + b)).tolist()
    return shares


def compile_blocks(model: nn.Module) -> None:
    """Compile block by block, as diffusers recommends: hooks break the graph of the whole."""
    for blocks in model.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile()


def _calibrated(setup: Setup, config: Any, scheduler: Any) -> Any:
    """MagCache's with the ratios that an uncached run of it prints, for its users to copy."""
    caching = of_diffusers(setup.model, config)

    def denoiser(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        with caching.call(At(0, 1, 0.0)):
            predicted: tuple[Tensor, ...] = caching.model(*args, **kwargs)
        return predicted

    with redirect_stdout(io.StringIO()) as printed:
        setup.sample(denoiser, scheduler, seed=1000)
    ratios = ast.literal_eval(printed.getvalue().split("...):")[-1].strip())
    return dataclasses.replace(config, calibrate=False, mag_ratios=ratios)
