"""The tool of the curves: that its measures, its samplers and its memory are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn

from toca_fx.demo import digits
from toca_fx.policy import load_policy
from tools import emoji
from tools.frontier import measures, points, show, solvers
from tools.frontier.__main__ import measured
from tools.frontier.measure import Bench
from tools.frontier.points import parse
from tools.frontier.results import Results
from tools.frontier.setups import FEWER, Setup, guided_digits
from tools.frontier.timing import shares

SAMPLERS = {"digits": solvers.of_digits(), "emoji": solvers.of_emoji()}
EVERY = [(model, name) for model, samplers in SAMPLERS.items() for name in samplers]
GRIDS = {"digits": [999.0, 900.0, 500.0, 480.0, 100.0], "emoji": [1000.0, 955.5, 500.0, 40.0]}


class Constant(nn.Module):
    """Knows one image, and says so in the terms of either model; counts its calls."""

    def __init__(self, model: str, image: Tensor) -> None:
        super().__init__()
        self.model, self.image, self.calls = model, image, 0
        self.cumulated = digits.build_scheduler().alphas_cumprod.double()

    def forward(self, images: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        if self.model == "emoji":
            return (images - self.image) / (timestep / 1000)
        signal = self.cumulated[int(timestep)]
        said = (signal.sqrt() * images - self.image) / (1 - signal).sqrt()
        return said.float()


def as_it_is(denoiser: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return denoiser


def setup_of(model: str, converged: tuple[str, int] = ("ddim", 60)) -> Setup:
    image = torch.linspace(-0.9, 0.9, 2 * 64).reshape(2, 1, 8, 8)
    return Setup(
        name="tiny",
        model=Constant(model, image),
        guided=as_it_is,
        shape=(2, 1, 8, 8),
        samplers=SAMPLERS[model],
        own=next(iter(SAMPLERS[model])),
        converged=converged,
    )


def test_psnr_is_over_all_pixels_of_all_images() -> None:
    one = torch.zeros(2, 1, 4, 4)
    other = one.clone()
    other[1, 0, 0, 0] = 0.5  # a mean of squares of 1/128
    assert measures.psnr(one, other) == pytest.approx(10 * np.log10(4 * 128))
    assert measures.psnr(one, one) is None


def test_the_distance_is_that_of_its_formula() -> None:
    draw = np.random.default_rng(0)
    one = draw.standard_normal((60, 7)) @ draw.standard_normal((7, 7)) + 1
    other = draw.standard_normal((50, 7)) @ draw.standard_normal((7, 7))
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = sqrtm(a @ b).real
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    assert measures.frechet(one, other) == pytest.approx(expected)
    assert measures.frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert measures.frechet(one, one + 2) == pytest.approx(7 * 4)


def test_features_are_what_the_last_layer_reads() -> None:
    classifier = digits.load_classifier()
    images = digits.load_images()[0][:3]
    found = torch.from_numpy(measures.features(classifier, images)).float()
    assert found.shape == (3, 1024)
    with torch.no_grad():
        torch.testing.assert_close(classifier[-1](found), classifier(images))


def test_halves_of_the_same_data_are_near() -> None:
    draw = np.random.default_rng(0)
    data = draw.standard_normal((2000, 4))
    assert measures.halves(data) < 0.05 < measures.frechet(data, data + 0.5)


@pytest.mark.parametrize(("model", "name"), EVERY)
def test_every_sampler_arrives_at_what_the_model_knows(model: str, name: str) -> None:
    setup, grid = setup_of(model), GRIDS[model]
    for at in (8, 20) if name == "ddim" else (8, 20, grid):
        scheduler = setup.samplers[name](at)
        assert len(scheduler.timesteps) == (at if isinstance(at, int) else len(at))
        images = setup.sample(setup.model, scheduler, seed=0)
        torch.testing.assert_close(images, setup.model.image, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("model", "name"), EVERY)
def test_even_steps_are_a_grid_too(model: str, name: str) -> None:
    own = SAMPLERS[model][next(iter(SAMPLERS[model]))]
    for steps in FEWER:
        even = SAMPLERS[model][name](steps).timesteps
        assert torch.equal(even, own(steps).timesteps)
    if name in solvers.SOLVERS:
        placed = SAMPLERS[model][name](own(10).timesteps.tolist())
        torch.testing.assert_close(placed.sigmas, SAMPLERS[model][name](10).sigmas)


def test_ddim_is_the_demos() -> None:
    classes = torch.arange(10)
    model = partial(toy_denoiser, weight=0.1)
    setup = digits_like(classes)
    expected = digits.sample(model, classes, steps=5, seed=3).clamp(-1, 1)
    assert torch.equal(setup.sample(model, setup.samplers["ddim"](5), seed=3), expected)


def test_a_line_is_what_two_steps_integrate() -> None:
    """dx/dsigma = sigma: Euler's first step is off, each later one of order 2 is exact."""
    solver = emoji.AdamsBashforth([1000.0, 800.0, 500.0, 450.0], order=2)
    images = torch.zeros(1, dtype=torch.float64)
    places = [1.0, 0.8, 0.5, 0.45, 0.0]
    for at, (before, after) in enumerate(pairwise(places)):
        velocity = torch.tensor([before], dtype=torch.float64)
        stepped = solver.step(velocity, solver.timesteps[at], images).prev_sample
        exact = (after**2 - before**2) / 2
        error = abs((stepped - images).item() - exact)
        assert error > 0.01 if at == 0 else error < 1e-12
        images = stepped


def test_captions_are_words_and_the_empty_word() -> None:
    tokens, mask = emoji.captions(["cat", "blue cat hat"])
    assert tokens.shape == (4, 4, emoji.WORD)
    assert mask.sum(1).tolist() == [1, 1, 2, 4]
    assert torch.equal(tokens[3, 2], emoji.word("cat"))
    assert torch.equal(tokens[2, 1], emoji.word("cat"))
    assert torch.equal(tokens[:, 0], emoji.word("").expand(4, -1))
    torch.testing.assert_close(emoji.word("cat").norm(), torch.tensor(128.0).sqrt())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ddim:20", ("ddim:20", "ddim", 20, None)),
        ("dpm++:placed", ("dpm++:placed", "dpm++", (999.0, 400.0), None)),
        ("digits+dpm++:50", ("digits+dpm++:50", "dpm++", 50, "digits")),
        ("reference/pixart-alpha+ddim:9", ("reference/pixart-alpha+ddim:9", "ddim", 9, None)),
    ],
)
def test_points_are_read(text: str, expected: tuple[str, str, object, str | None]) -> None:
    point = parse(text, SAMPLERS["digits"], {"placed": [999.0, 400.0]})
    assert (point.text, point.sampler, point.timesteps) == expected[:3]
    assert (point.policy is None) == ("+" not in text.replace("++", ""))


@pytest.mark.parametrize("text", ["ddim", "dim:20", "ddim:0", "ddim:-3", "ddim:placed", "+ddim:x"])
def test_other_points_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"^{text.replace('+', '[+]')}"):
        parse(text, SAMPLERS["digits"])


def test_a_policy_from_a_file_is_known_by_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    says = "version: 1\nname: a\nsampler: {steps: 50}\nN: {base: 3}\nR: {base: 0.9}\n"
    file.write_text(says, encoding="utf-8")
    point = parse(f"{file}+ddim:50", SAMPLERS["digits"])
    assert point.text == "mine+ddim:50"
    file.write_text(says.replace("name: a", "name: b"), encoding="utf-8")
    assert parse(f"{file}+ddim:50", SAMPLERS["digits"]) == point
    file.write_text(says.replace("base: 3", "base: 4"), encoding="utf-8")
    other = parse(f"{file}+ddim:50", SAMPLERS["digits"])
    assert other.text == point.text
    assert other.digest != point.digest


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    file, conditions = tmp_path / "frontier.json", {"samples": 2}
    texts = ["ddim:8", "dpm++:8", "dpm++:mine"]

    def measure(last: float) -> tuple[list[object], int]:
        setup = setup_of("digits")
        bench = Bench(setup, 0, tmp_path / "cache")
        results = Results(file, conditions)
        points = [parse(text, setup.samplers, {"mine": [999.0, last]}) for text in texts]
        rows: list[object] = [measured(bench, point, results) for point in points]
        return rows, setup.model.calls

    rows, calls = measure(last=400.0)
    assert calls == 8 + 50 + 60 + 8 + 50 + 2  # each reference once
    assert measure(last=400.0) == (rows, 0)
    assert measure(last=300.0)[1] == 2  # the grid of that name is another
    assert [row["point"] for row in json.loads(file.read_text())["rows"]] == texts
    with pytest.raises(ValueError, match=f"^--out {file}.*samples = 2, not 3"):
        Results(file, {"samples": 3})


def test_two_runs_write_one_file(tmp_path: Path) -> None:
    setup, file = setup_of("digits"), tmp_path / "frontier.json"
    bench = Bench(setup, 0, tmp_path / "cache")
    one, other = Results(file, {}), Results(file, {})
    for results, text in ((one, "ddim:8"), (other, "ddim:10"), (one, "ddim:12")):
        measured(bench, parse(text, setup.samplers), results)
    assert list(Results(file, {}).rows) == ["ddim:8", "ddim:10", "ddim:12"]


TOKENS = sorted((Path(points.__file__).parent / "tokens").glob("*.yaml"))


@pytest.mark.parametrize("file", TOKENS, ids=lambda file: file.stem)
def test_policies_of_the_tool_are_valid(file: Path) -> None:
    assert load_policy(file).name == file.stem
    assert parse(f"{file}+ddim:50", SAMPLERS["digits"]).source == str(file)


def test_the_reference_itself_has_no_distance(tmp_path: Path) -> None:
    setup = setup_of("emoji", converged=("ab2", 60))
    row = Bench(setup, 0, tmp_path).row(parse("euler:50", setup.samplers))
    assert (row.psnr_own, row.psnr_same, row.flops_ratio) == (None, None, 1.0)
    assert row.psnr_converged is not None


def test_times_are_shares_of_the_run_beside() -> None:
    taken = [[1.0, 0.5, 0.25], [2.0, 1.0, 0.5], [4.0, 2.0, 4.0]]  # the machine slows down
    assert shares(taken) == [(2.0, 1.0), (1.0, 0.5), (0.5, 0.25)]


def test_a_table_and_a_picture_are_made_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "frontier-tiny.json"
    conditions = {"model": "tiny", "samples": 2, "own": "ddim:50", "converged": "ddim:60"}
    setup, results = setup_of("digits"), Results(file, conditions)
    bench = Bench(setup, 0, tmp_path / "cache")
    for text in ("ddim:20", "ddim:10", "unipc:10"):
        measured(bench, parse(text, setup.samplers), results)
    table, picture = show.write(Results(file, {}))
    rows = [line for line in table.read_text().splitlines() if line.startswith(("| ddim", "| uni"))]
    assert [row.split(" | ")[0] for row in rows] == ["| ddim:20", "| ddim:10", "| unipc:10"]
    assert "| 2.50x |" in rows[0]
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def toy_denoiser(
    images: Tensor, *, timestep: Tensor, class_labels: Tensor, return_dict: bool, weight: float
) -> tuple[Tensor]:
    said = weight * (images + class_labels[:, None, None, None] + timestep[:, None, None, None])
    return (said.tanh(),)


def digits_like(classes: Tensor) -> Setup:
    return replace(
        setup_of("digits"),
        guided=partial(guided_digits, classes=classes, guidance=2.0),
        shape=(len(classes), 1, digits.SIZE, digits.SIZE),
    )
