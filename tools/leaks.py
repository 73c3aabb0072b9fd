"""Memory over many generations of changing shapes, branches, prompts, models and weights.

    python -m tools.leaks --generations 10000 --picture tools/results/leaks.png

Runs in one process on a CPU, with tiny models and ``inner="eager"``. Of what has to be flat it
prints, and draws: the resident memory of the process, the bytes of all tensors that Python knows,
and how many models and generations toca_fx knows. The steps by kind show that memories were read.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

import toca_fx
from toca_fx.examples import build, examples
from toca_fx.runtime import models
from toca_fx.runtime.context import current_session

STEPS = 4
POLICY = {
    "version": 1,
    "name": "leaks",
    "sampler": {"steps": STEPS},
    "N": {"base": 2},
    "R": {"base": 0.5},
    "scores": {"self_attention": 1.0, "staleness": 0.25},
}


def generation(fast: nn.Module, model: nn.Module, draw: random.Random) -> list[str]:
    """One run: told or not, of one branch or two, stopped early or not.

    Returns the kinds of its steps, if it was told.
    """
    batch, side = draw.choice((1, 2, 3)), draw.choice((8, 16))
    labels = [torch.randint(0, 10, (batch,)) for _ in range(draw.choice((1, 1, 2)))]
    told = draw.random()
    name = draw.choice(("", f"branch {draw.random()}"))
    run = toca_fx.session(STEPS) if told < 0.5 else None
    for step in range(STEPS if draw.random() < 0.9 else draw.randrange(1, STEPS)):
        x, t = torch.randn(batch, 4, side, side), torch.full((batch,), 999 - 250 * step)
        for label in labels:
            call = {"timestep": t, "class_labels": label}
            if run is None:
                fast(x, **call)
            elif name:
                with run, toca_fx.branch(name):
                    fast(x, **call)
            else:
                with run:
                    fast(x, **call)
    if draw.random() < 0.1:
        linear = model.transformer_blocks[0].ff.net[2]  # type: ignore[union-attr,index]
        linear.weight = nn.Parameter(linear.weight.clone(), requires_grad=False)
    return [] if run is None else [record.kind for _, record in run.session.calls]


def measured() -> dict[str, float]:
    """What is held now; sizes in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    storages = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, nn.Parameter):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return {
        "resident": pages * 4096 / 2**20,
        "tensors": sum(storages.values()) / 2**20,
        "models": sum(map(len, models._of_code.values())),
        "generations": len(current_session().generations),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the generations, print what is held on the way, and draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--generations", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw, held, kinds = random.Random(0), [], Counter[str]()
    example = examples()["DiTTransformer2DModel"]
    model = build(example)[0]
    fast = toca_fx.compile(model, POLICY, inner="eager")
    with torch.no_grad():
        for number in track(range(arguments.generations)):
            if number % 50 == 49:  # another model of the same class
                model = build(example, seed=number)[0]
                fast = toca_fx.compile(model, POLICY, inner="eager")
            kinds.update(generation(fast, model, draw))
            if number % arguments.every == arguments.every - 1:
                held.append({"generation": number + 1, **measured()})
                print(json.dumps({**held[-1], **kinds}), flush=True)
    if arguments.picture is not None:
        picture(held, arguments.picture)
    return 0


def picture(held: Sequence[dict[str, float]], file: Path) -> None:
    """Draw what was held over the generations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(8, 5))
    over = [each["generation"] for each in held]
    for name in ("resident", "tensors"):
        above.plot(over, [each[name] for each in held], label=name)
    above.set_ylabel("MiB")
    above.set_ylim(bottom=0)
    for name in ("models", "generations"):
        below.plot(over, [each[name] for each in held], label=f"{name} known")
    below.set_xlabel("generations")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    raise SystemExit(main())
