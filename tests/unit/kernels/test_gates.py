"""What signals of gates measure, against sums written out number by number."""

from __future__ import annotations

import cmath
import itertools
import math

import pytest
import torch
from torch import Tensor

from toca_fx.kernels.gates import log_snrs, norms, relative, spectral_change, wiener_gain


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def size(values: Tensor) -> float:
    return math.sqrt(sum(abs(value) ** 2 for value in values.flatten().tolist()))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5), (3,), ()])
def test_norms_are_of_rows(shape: tuple[int, ...]) -> None:
    values = drawn(*shape)
    rows = list(values) if shape else [values]
    assert norms(values).tolist() == pytest.approx([size(row) for row in rows], rel=1e-12)


def test_half_precision_is_summed_in_float32() -> None:
    values = torch.full((1, 70_000), 2.0, dtype=torch.float16)
    assert norms(values).dtype == torch.float32
    assert norms(values).item() == pytest.approx(2 * math.sqrt(70_000), rel=1e-5)


def test_a_change_of_nothing_has_no_end_and_no_change_is_none() -> None:
    nothing, something = torch.zeros(1, 3), torch.ones(1, 3)
    assert relative(nothing, nothing).item() == 0
    assert relative(something, nothing).item() > 1e20
    assert relative(something, 2 * something).item() == pytest.approx(0.5)


def by_hand(sizes: tuple[int, ...], log_snr: float) -> dict[tuple[int, ...], float]:
    """The gain of each frequency."""
    power = {}
    for at in itertools.product(*map(range, sizes)):
        cycles = [
            k / n if k < (n + 1) // 2 else (k - n) / n for k, n in zip(at, sizes, strict=True)
        ]
        frequency = math.sqrt(sum(each**2 for each in cycles))
        power[at] = max(frequency, 1 / max(sizes)) ** -3
    mean = sum(power.values()) / len(power)
    ratio = math.exp(log_snr)
    return {at: (each / mean) / (1 + ratio * each / mean) for at, each in power.items()}


@pytest.mark.parametrize("sizes", [(4, 6), (5, 3), (7,)])
@pytest.mark.parametrize("log_snr", [-9.0, 0.3, 8.0])
def test_gain_is_that_of_wiener(sizes: tuple[int, ...], log_snr: float) -> None:
    gain = wiener_gain(sizes, torch.tensor([log_snr, 0.0], dtype=torch.float64))
    assert gain.shape == (2, *sizes)
    for row, own in zip(gain, (log_snr, 0.0), strict=True):
        for at, expected in by_hand(sizes, own).items():
            assert row[at].item() == pytest.approx(expected, rel=1e-9)


def test_without_noise_all_frequencies_count_alike_and_in_noise_the_low_ones() -> None:
    clean, noisy = wiener_gain((8, 8), torch.tensor([30.0, -30.0]))
    assert clean.max() / clean.min() < 1.01
    assert noisy.max() / noisy.min() > 50


def spectrum(plane: list[list[float]]) -> dict[tuple[int, int], complex]:
    """The Fourier transform of a plane, sum by sum."""
    height, width = len(plane), len(plane[0])
    return {
        (u, v): sum(
            plane[y][x] * cmath.exp(-2j * math.pi * (u * y / height + v * x / width))
            for y in range(height)
            for x in range(width)
        )
        for u in range(height)
        for v in range(width)
    }


def changed(now: Tensor, then: Tensor, gain: dict[tuple[int, ...], float]) -> float:
    """The spectral change of one row [planes, H, W]."""
    change = whole = 0.0
    for one, other in zip(now, then, strict=True):
        for at, value in spectrum((one - other).tolist()).items():
            change += abs(gain[at] * value) ** 2
        for at, value in spectrum(other.tolist()).items():
            whole += abs(gain[at] * value) ** 2
    return math.sqrt(change / whole)


@pytest.mark.parametrize("axes", [(), (2,)])
def test_spectral_change_of_images_and_videos(axes: tuple[int, ...]) -> None:
    now, then = drawn(2, 2, *axes, 4, 6), drawn(2, 2, *axes, 4, 6, seed=1)
    log_snr = torch.tensor([-1.5, 2.0], dtype=torch.float64)
    found = spectral_change(now, then, log_snr)
    for row, own in enumerate(log_snr.tolist()):
        planes = now[row].reshape(-1, 4, 6), then[row].reshape(-1, 4, 6)
        assert found[row].item() == pytest.approx(changed(*planes, by_hand((4, 6), own)), rel=1e-9)


def test_spectral_change_of_tokens_runs_along_them() -> None:
    now, then = drawn(1, 6, 3), drawn(1, 6, 3, seed=1)
    found = spectral_change(now, then, torch.tensor([0.5], dtype=torch.float64))
    line = {(0, at[0]): gain for at, gain in by_hand((6,), 0.5).items()}
    channels = [(each[0].T[:, None, :]) for each in (now, then)]  # planes of one row
    assert found.item() == pytest.approx(changed(channels[0], channels[1], line), rel=1e-9)


def test_where_nothing_tells_the_noise_it_is_the_plain_change() -> None:
    now, then = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4, seed=1)
    assert torch.equal(spectral_change(now, then, None), relative(now - then, then))
    clean = spectral_change(now, then, torch.tensor([60.0, 60.0], dtype=torch.float64))
    assert torch.allclose(clean, relative(now - then, then))


def test_half_precision_has_a_spectrum_of_any_size() -> None:
    now, then = drawn(1, 1, 5, 7), drawn(1, 1, 5, 7, seed=1)
    log_snr = torch.tensor([0.0])
    half = spectral_change(now.bfloat16(), then.bfloat16(), log_snr)
    assert half.item() == pytest.approx(spectral_change(now, then, log_snr).item(), rel=0.02)


TABLE = torch.tensor([9.0, 5.0, 4.0, 0.0, -8.0])


@pytest.mark.parametrize(
    ("timesteps", "flow", "expected"),
    [
        (torch.tensor([0, 4]), False, [9.0, -8.0]),
        (torch.tensor(3), False, [0.0, 0.0]),
        (torch.tensor([2.5]), False, [2.0, 2.0]),
        (torch.tensor([[1, 3], [2, 2]]), False, [4.0, 4.0]),  # of a row with several, the mean
        (torch.tensor([7, -1]), False, [-8.0, 9.0]),
        (torch.tensor([0.5, 1.0]), True, [4.0, -8.0]),  # shares
        (torch.tensor([3.0, 0.125]), True, [0.0, 7.0]),
        (torch.tensor([0.5, 1.0], dtype=torch.bfloat16), True, [4.0, -8.0]),
    ],
)
def test_log_snrs_are_looked_up(timesteps: Tensor, flow: bool, expected: list[float]) -> None:
    assert log_snrs(timesteps, TABLE, flow, rows=2).tolist() == pytest.approx(expected)
