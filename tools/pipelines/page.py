"""docs/pipelines.md: what was measured of every pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from textwrap import shorten

from tools.pipelines.cases import CASES, LEFT_OUT
from tools.pipelines.matrices import ALL, FLUX, MATRICES, WAN
from tools.pipelines.measure import ENDS, STEPS, N, Row, expected

_HEAD = """# Pipelines of diffusers

    pipe = toca_fx.compile(pipe)
    image = pipe(prompt, num_inference_steps=28).images[0]
    print(toca_fx.last_report(pipe))

Written by `python -m tools.pipelines`, with diffusers {diffusers} and torch {torch}:
{right} of {measured} cases are right{rest}.
Each is a real pipeline of tiny random components on a CPU, called for {steps} steps,
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

## What people do to FLUX and Wan 2.2

The same pipelines, `{flux}` and `{wan}`, each compiled as above and compared with one that is
treated alike: in one way before it is compiled, or in several after it, one after the other and an
image after each. *Moved* are the bytes of weights that were away and that the calls of an image
brought in, and what `toca_fx.explain` says of them; they have to be equal for a row to be right.
Attention backends that need a GPU have stand-ins by the names of their operators.
{matrices}
## What has no case

| pipeline | why |
|---|---|
"""


def page(rows: Mapping[str, Row]) -> str:
    """The page, in Markdown, of the rows that were measured."""
    cases = [rows[name] for name in CASES if name in rows]
    rest = len(CASES) - len(cases)
    head = _HEAD.format(
        diffusers=version("diffusers"),
        torch=version("torch").split("+")[0],
        right=sum(row.right for row in cases),
        measured=len(cases),
        rest=f"; {rest} more are only built and called, by `--check`" if rest else "",
        steps=STEPS,
        ends=ENDS,
        n=N,
        plan=expected(STEPS),
    )
    left_out = "\n".join(f"| {name} | {why} |" for name, why in LEFT_OUT.items())
    matrices = "".join(_matrix(name, rows) for name in MATRICES)
    tail = _TAIL.format(flux=FLUX.name, wan=WAN.name, matrices=matrices)
    return head + "\n".join(map(_line, cases)) + "\n" + tail + left_out + "\n"


def _line(row: Row) -> str:
    held = f"{'-' if row.decode_bytes is None else row.decode_bytes} / {row.after_bytes}"
    return _cells(row.name, str(row.calls), *_found(row), held, *_verdict(row))


def _matrix(name: str, rows: Mapping[str, Row]) -> str:
    """The table of one kind of ways."""
    lines = [
        f"\n### {name.capitalize()}\n",
        "| way | pipeline | plans | at N = 1 | second | less work | moved / told | right | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for title, base in (("FLUX", FLUX), ("Wan 2.2", WAN)):
        for row in [rows[each] for each in MATRICES[name] if each in rows]:
            way = row.name.removeprefix(f"{base.name}, ")
            if way != row.name:
                moved = f"{row.moved_bytes} / {row.told_bytes}" if row.moved_bytes else "-"
                lines.append(_cells(way, title, *_found(row), moved, *_verdict(row)))
    return "\n".join(lines) + "\n"


def _found(row: Row) -> list[str]:
    exact = "equal" if row.difference == 0 else f"{row.difference:.0e}" if row.exact else "**no**"
    again = "equal" if row.again else "**no**"
    return ["<br>".join(_plans(row)), exact, again, f"{row.flops:.2f}x"]


def _verdict(row: Row) -> list[str]:
    known = ALL[row.name].known
    said = [known] if known else [row.problem] if row.problem else [*row.notes, *row.warnings]
    says = "; ".join(shorten(each, 120, placeholder=" ...") for each in dict.fromkeys(said))
    return ["yes" if row.right else "**no**", says.replace("|", "\\|")]


def _cells(*cells: str) -> str:
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
