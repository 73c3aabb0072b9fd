"""docs/pipelines.md: what was measured of every pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from textwrap import shorten

from tools.pipelines.cases import CASES, LEFT_OUT
from tools.pipelines.measure import ENDS, STEPS, N, Row, expected

_HEAD = """# Pipelines of diffusers

    pipe = toca_fx.compile(pipe)
    image = pipe(prompt, num_inference_steps=28).images[0]
    print(toca_fx.last_report(pipe))

Written by `python -m tools.pipelines`, with diffusers {diffusers} and torch {torch}:
{right} of {measured} cases are right; {rest} more are built and called by `--check`, and were not
measured. Each is a real pipeline of tiny random components on a CPU, called for {steps} steps,
untouched and compiled (`inner="eager"`) under a policy whose full steps are the first {ends}, the
last {ends} and every {n}rd between: `{plan}` (F full, p cached) for {steps} calls, and the like
for as many calls as come. *Right* means: with every step full the image equals the untouched
pipeline's to the last bit; with that policy each run and branch has its plan; a second image equals
the first, and differs from the untouched one; no warning; no bytes of ours while the VAE decodes,
and none afterwards.

| pipeline | calls | plans | at N = 1 | second | less work | bytes at decode, after | right | |
|---|---|---|---|---|---|---|---|---|
"""
_TAIL = """
A plan is that of a guidance branch, where the pipeline names it (`cond`, `uncond`, ...), of an
expert, and of a run where a call has several. Calls of a step that nobody names have one line
together; they are told apart by their conditions.

## What has no case

| pipeline | why |
|---|---|
"""


def page(rows: Sequence[Row]) -> str:
    """The page, in Markdown."""
    head = _HEAD.format(
        diffusers=version("diffusers"),
        torch=version("torch").split("+")[0],
        right=sum(row.right for row in rows),
        measured=len(rows),
        rest=len(CASES) - len(rows),
        steps=STEPS,
        ends=ENDS,
        n=N,
        plan=expected(STEPS),
    )
    left_out = "\n".join(f"| {name} | {why} |" for name, why in LEFT_OUT.items())
    return head + "\n".join(map(_line, rows)) + "\n" + _TAIL + left_out + "\n"


def _line(row: Row) -> str:
    said = [row.problem] if row.problem else [*row.notes, *row.warnings]
    says = "; ".join(shorten(each, 120, placeholder=" ...") for each in dict.fromkeys(said))
    cells = [
        row.name,
        str(row.calls),
        "<br>".join(_plans(row)),
        "yes" if row.exact else "**no**",
        "equal" if row.again else "**no**",
        f"{row.flops:.2f}x",
        f"{'-' if row.decode_bytes is None else row.decode_bytes} / {row.after_bytes}",
        "yes" if row.right else "**no**",
        says.replace("|", "\\|").replace("\n", " "),
    ]
    return f"| {' | '.join(cells)} |"


def _plans(row: Row) -> list[str]:
    """The plans of a case, each once: with its run if there are several, model and branch."""
    runs = {key.split("/")[0] for key in row.plans}
    models = {key.split("/")[1] for key in row.plans}
    said = []
    for key, plan in row.plans.items():
        run, model, branch = key.split("/", 2)
        names = [f"run {int(run) + 1}"] if len(runs) > 1 else []
        names += [model] if len(models) > 1 else []
        names += [branch] if branch else []
        said.append(f"{' '.join(names)} `{plan}`".strip())
    return said
