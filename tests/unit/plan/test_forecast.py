"""The weights of forecasts: against the authors' vectors, a slow reference and their identities."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference_forecast import forecast
from toca_fx.plan.forecast import amplification, history, weights
from toca_fx.plan.times import LOG_SNR_LIMIT
from toca_fx.policy.forecast import Basis, Forecast, Time

POLYNOMIAL: tuple[Basis, ...] = ("newton", "taylor", "hermite")
TABLE = Forecast("table", weights=((1.5, -0.5), (2.0, -1.25, 0.25)))

# By the last spacings, newest first, a row for each distance: the weights, newest first, of the
# authors' outputs at full steps (TaylorSeer at 288776df), which are such quotients.
DIT_FULL = (0, 1, *range(5, 50, 4))
DIT = {
    (): [[6144]] * 3,
    (1,): [[12288, -6144], [18432, -12288], [24576, -18432]],
    (4, 1): [[7872, -2496, 768], [9984, -6912, 3072], [12480, -13248, 6912]],
    (4, 4, 1): [[7888, -1968, 288, -64], [10112, -4992, 1536, -512], [12912, -9360, 4320, -1728]],
    (4, 4, 4, 1): [
        [7889, -1972, 246, -23, 4],
        [10128, -5056, 1248, -240, 64],
        [12993, -9684, 3510, -999, 324],
    ],
    (4, 4, 4, 4): [
        [7889, -1972, 246, -20, 1],
        [10128, -5056, 1248, -192, 16],
        [12993, -9684, 3510, -756, 81],
    ],
}
FLUX_FULL = (0, 1, 2, *range(7, 50, 5))
FLUX = {
    (1, 1): [[100, -50, 0], [150, -100, 0], [200, -150, 0], [250, -200, 0]],
    (5, 1): [[61, -16, 5], [74, -44, 20], [89, -84, 45], [106, -136, 80]],
    (5, 5): [[61, -12, 1], [74, -28, 4], [89, -48, 9], [106, -72, 16]],
}

# Weights, oldest first, of Spectrum at f7b7841f, rounded to nine digits.
SPECTRUM_FULL = (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46)
SPECTRUM = {
    5: "-0.133844347 -0.01375454 0.100309041 -0.292077673 1.308705754",
    14: "0.15569842 0.009766142 -0.083372238 -0.129829487 -0.135445326 -0.046146426 -0.356732364 "
    "1.535606566",
    30: "-0.121480476 -0.017096338 0.051434392 0.089664925 0.102840421 0.073466673 -0.000886632 "
    "-0.130569851 -0.214106789 -0.507798919 1.607621727",
    49: "0.136156683 0.046618672 -0.019113521 -0.064085442 -0.091181344 -0.102475631 -0.072844523 "
    "0.011270379 0.127139902 0.178047572 0.075061798 -0.184437939 -0.504625888 1.433261779",
}


def kept(policy: Forecast, ran: list[float], now: float, distance: int = 1) -> list[float]:
    """The weights when as many values as ``history`` says are kept of the full steps ``ran``."""
    times = tuple(ran[-history(policy, len(ran)) :])
    return list(weights(policy, times, now, distance, len(ran)))


@pytest.mark.parametrize(
    ("policy", "full", "rows", "over", "calls"),
    [
        (Forecast("taylor", order=4), DIT_FULL, DIT, 6144, 36),
        (Forecast("taylor", order=2, ignore=1), FLUX_FULL, FLUX, 50, 38),
    ],
    ids=["dit", "flux"],
)
def test_taylor_is_the_authors(
    policy: Forecast,
    full: tuple[int, ...],
    rows: dict[tuple[int, ...], list[list[int]]],
    over: int,
    calls: int,
) -> None:
    forecasts = [call for call in range(50) if call not in full]
    assert len(forecasts) == calls
    for call in forecasts:
        ran = [float(step) for step in full if step < call]
        gaps = tuple(int(b - a) for a, b in pairwise(ran))[::-1][: policy.order]
        distance = call - int(ran[-1])
        wanted = [weight / over for weight in rows[gaps][distance - 1]]
        assert kept(policy, ran, float(call)) == pytest.approx(wanted, abs=1e-12), call


def test_chebyshev_is_the_authors() -> None:
    policy = Forecast("chebyshev", blend=0.5)
    for call in sorted(set(range(5, 50)) - set(SPECTRUM_FULL)):
        ran = [float(step) for step in SPECTRUM_FULL if step < call]
        found = kept(policy, ran, float(call))
        slow = forecast(policy, list(np.eye(len(ran))), ran, float(call))
        assert found[::-1] == pytest.approx(slow, abs=1e-12), call
        if call in SPECTRUM:
            wanted = [float(number) for number in SPECTRUM[call].split()]
            assert found[::-1] == pytest.approx(wanted, abs=5.1e-10), call


@st.composite
def generations(draw: st.DrawFn) -> tuple[list[float], float, int]:
    """Times of full steps, some of them equal, a time after them, and the steps since."""
    gaps = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.7, 4.0, 5.5]), max_size=12))
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    return times, times[-1] + draw(st.floats(0.25, 6.0)), draw(st.integers(1, 4))


@st.composite
def policies(draw: st.DrawFn) -> Forecast:
    share = st.none() | st.floats(0, 1)
    if draw(st.integers(0, 9)) == 0:
        return TABLE
    return Forecast(
        basis=draw(st.sampled_from(["reuse", *POLYNOMIAL, "chebyshev"])),
        order=draw(st.none() | st.integers(0, 4)),
        ignore=draw(st.none() | st.integers(0, 3)),
        sigma=draw(st.none() | st.floats(0.1, 1)),
        ridge=draw(st.none() | st.floats(1e-3, 10)),
        blend=draw(share),
        damping=draw(share),
        time=draw(st.sampled_from([None, "step", "timestep", "sigma", "log_snr"])),
    )


@pytest.mark.parametrize("basis", ["reuse", *POLYNOMIAL, "chebyshev"])
@pytest.mark.parametrize("time", ["step", "timestep", "sigma", "log_snr"])
def test_every_order_on_every_axis_is_that_of_the_reference(basis: Basis, time: Time) -> None:
    times = [0.0, 1.0, 2.5, 3.0, 5.0, 7.5, 8.0, 9.0, 9.5]
    values = np.random.default_rng(0).normal(size=(len(times), 3, 2))
    for order in range(9):
        for number in range(1, len(times) + 1):
            policy = Forecast(basis, order=order, sigma=0.7, ridge=0.02, time=time)
            found = weights(policy, tuple(times[:number]), 11.0)
            made = np.tensordot(np.array(found[::-1]), values[:number], 1)
            slow = forecast(policy, list(values[:number]), times[:number], 11.0)
            np.testing.assert_allclose(made, slow, atol=1e-10 * max(1.0, amplification(found)))


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(policies(), generations())
def test_weighted_values_are_those_of_the_reference(
    policy: Forecast, generation: tuple[list[float], float, int]
) -> None:
    times, now, distance = generation
    values = np.random.default_rng(0).normal(size=(len(times), 3, 2))
    # All are kept: where times are equal, fewer leave a lower order.
    found = weights(policy, tuple(times), now, distance)
    made = np.tensordot(np.array(found[::-1]), values, 1)
    slow = forecast(policy, list(values), times, now, distance)
    np.testing.assert_allclose(made, slow, atol=1e-10 * max(1.0, amplification(found)))


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(policies(), generations())
def test_what_history_keeps_is_what_counts(
    policy: Forecast, generation: tuple[list[float], float, int]
) -> None:
    times, now, distance = generation
    times = [time + 0.01 * i for i, time in enumerate(times)]  # all differ
    everything = weights(policy, tuple(times), now + 1, distance)
    found = kept(policy, times, now + 1, distance)
    assert everything == pytest.approx([*found, *[0.0] * (len(times) - len(found))], abs=1e-12)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(policies(), generations())
def test_weights_sum_to_one(policy: Forecast, generation: tuple[list[float], float, int]) -> None:
    times, now, distance = generation
    found = weights(policy, tuple(times), now, distance)
    if policy.basis != "chebyshev" or policy.order == 0:  # its penalty is on the constant, too
        assert sum(found) == pytest.approx(1, abs=1e-13 * amplification(found))


@pytest.mark.parametrize("order", range(9))
@pytest.mark.parametrize("first", [0.0, 900.0])
def test_newton_is_exact_for_polynomials(order: int, first: float) -> None:
    times = tuple(first + t for t in (0.0, 1.0, 2.5, 3.0, 5.0, 7.5, 8.0, 9.0, 9.5))
    found = weights(Forecast("newton", order=order), times, first + 11.0)
    assert len([w for w in found if w]) == order + 1
    for degree in range(order + 1):
        moved = [
            w * ((t - first - 9.5) / 4) ** degree for w, t in zip(found[::-1], times, strict=True)
        ]
        assert sum(moved) == pytest.approx((1.5 / 4) ** degree, abs=1e-12 * amplification(found))


@pytest.mark.parametrize("basis", [*POLYNOMIAL, "chebyshev"])
@pytest.mark.parametrize("damping", [None, 0.9])
def test_order_0_is_reuse_to_the_bit(basis: Basis, damping: float | None) -> None:
    policy = Forecast(basis, order=0, damping=damping)
    assert weights(policy, (0.0, 1.0, 5.0), 7.0) == (1.0, 0.0, 0.0)
    assert history(policy, 50) == history(Forecast(), 50) == 1


@pytest.mark.parametrize("basis", ["reuse", *POLYNOMIAL])
def test_the_first_value_is_reused(basis: Basis) -> None:
    assert weights(Forecast(basis, order=3, blend=0.3), (4.0,), 7.0) == (1.0,)


def test_the_order_rises_with_the_values() -> None:
    times = (0.0, 1.0, 5.0, 7.0)
    for basis in POLYNOMIAL:
        for number in range(1, 5):
            low = Forecast(basis, order=number - 1)
            high = Forecast(basis, order=8)
            assert weights(high, times[:number], 8.0) == weights(low, times[:number], 8.0)


def test_taylor_of_order_2_over_even_spacings() -> None:
    h, k = 4.0, 3.0
    wanted = [1 + k / h + k**2 / (2 * h**2), -(k / h + k**2 / h**2), k**2 / (2 * h**2)]
    found = weights(Forecast("taylor", order=2), (5.0, 9.0, 13.0), 16.0)
    assert found == pytest.approx(wanted, abs=1e-12)


def test_hermite_of_order_1_is_a_damped_line() -> None:
    slope = 2 * 0.3**2 * 3 / 4
    found = weights(Forecast("hermite", order=1, sigma=0.3), (1.0, 5.0, 9.0), 12.0)
    assert found == pytest.approx([1 + slope, -slope, 0], abs=1e-12)
    assert weights(Forecast("hermite"), (5.0, 9.0), 12.0)[0] == pytest.approx(1 + 0.5 * 3 / 4)


def test_directions_and_units_of_time_do_not_matter() -> None:
    times = (0.0, 1.0, 5.0, 9.0)
    turned = tuple(-t for t in times)
    for policy in (Forecast("newton", order=3), Forecast("taylor", order=3)):
        scaled = tuple(1000 - 20 * t for t in times)
        wanted = pytest.approx(weights(policy, times, 11.0), abs=1e-12)
        assert weights(policy, scaled, 1000 - 20 * 11.0) == wanted
    policy = Forecast("hermite", order=3)
    wanted = pytest.approx(weights(policy, times, 11.0), abs=1e-12)
    assert weights(policy, turned, -11.0) == wanted


def test_chebyshev_without_a_penalty_is_the_polynomial() -> None:
    times = (0.0, 7.0, 20.0, 31.0, 40.0)
    for number in range(1, 6):
        newton = weights(Forecast("newton", order=4), times[:number], 45.0)
        found = weights(Forecast("chebyshev", ridge=0.0), times[:number], 45.0)
        assert found == pytest.approx(newton, abs=1e-10)


@pytest.mark.parametrize("number", [1, 3, 5, 8])
def test_chebyshev_on_other_axes_is_that_of_steps_where_they_fall_evenly(number: int) -> None:
    steps = (0.0, 1.0, 2.0, 4.0, 7.0, 11.0, 16.0, 22.0, 29.0)[: number + 1]
    wanted = pytest.approx(weights(Forecast("chebyshev"), steps[:-1], steps[-1]), abs=1e-12)
    for time, noisiest, clean in (
        ("timestep", 1000.0, 0.0),
        ("timestep", 1.0, 0.0),
        ("sigma", 14.6, 0.0),
        ("log_snr", -LOG_SNR_LIMIT, LOG_SNR_LIMIT),
    ):
        *times, now = (noisiest + step / 50 * (clean - noisiest) for step in steps)
        assert weights(Forecast("chebyshev", time=time), tuple(times), now) == wanted, time


def test_of_equal_times_the_newest_counts() -> None:
    line = Forecast("newton", order=1, time="timestep")
    assert weights(line, (900.0, 800.0, 800.0), 700.0) == (2.0, 0.0, -1.0)
    assert weights(line, (800.0, 800.0), 700.0) == (1.0, 0.0)  # no more is kept: a lower order
    for basis in (*POLYNOMIAL, "chebyshev"):
        policy = Forecast(basis, order=3, time="timestep", blend=0.5)
        newest, *others = weights(policy, (900.0, 800.0, 850.0, 800.0), 700.0)
        assert [newest, others[0], others[2]] == list(weights(policy, (900.0, 850.0, 800.0), 700.0))
        assert others[1] == 0


def test_ignored_values_are_used_but_not_differenced_against() -> None:
    policy = Forecast("newton", order=2, ignore=2)
    assert weights(policy, (0.0,), 9.0) == (1.0,)
    assert weights(policy, (0.0, 1.0), 9.0) == (1.0, 0.0)
    assert weights(policy, (0.0, 1.0, 2.0), 3.0) == (1.0, 0.0, 0.0)
    assert weights(policy, (1.0, 2.0, 3.0), 4.0, ran=4) == (2.0, -1.0, 0.0)
    assert weights(policy, (2.0, 3.0, 4.0), 5.0, ran=5) == (3.0, -3.0, 1.0)
    assert weights(policy, (7.0, 8.0), 9.0, ran=9) == (2.0, -1.0)  # after lost memories


def test_blend_and_damping() -> None:
    times, now = (0.0, 1.0, 5.0, 9.0), 11.0
    basis = weights(Forecast("taylor", order=3), times, now)
    line = weights(Forecast("newton", order=1), times, now)
    found = weights(Forecast("taylor", order=3, blend=0.25, damping=0.5), times, now)
    reuse = (1, 0, 0, 0)
    wanted = [
        r + 0.5 * (0.25 * b + 0.75 * n - r) for b, n, r in zip(basis, line, reuse, strict=True)
    ]
    assert found == pytest.approx(wanted, abs=1e-12)


def test_a_table_goes_by_the_steps_since_the_last_full_one() -> None:
    times, now = (0.0, 2.0, 4.0, 6.0), 7.0
    assert weights(TABLE, times, now, 1) == (1.5, -0.5, 0.0, 0.0)
    assert weights(TABLE, times, now, 2) == weights(TABLE, times, now, 9) == (2.0, -1.25, 0.25, 0.0)
    assert weights(TABLE, times[:2], now, 2) == (1.0, 0.0)


def test_history() -> None:
    assert history(Forecast("newton"), 50) == 2
    assert history(Forecast("taylor", order=4), 3) == 5
    assert history(Forecast("hermite", order=2, history=7), 50) == 7
    assert history(Forecast("chebyshev"), 14) == 14
    assert history(Forecast("chebyshev"), 400) == 100
    assert history(Forecast("reuse", blend=0.5), 50) == 2
    assert history(TABLE, 50) == 3


def test_amplification_and_no_values() -> None:
    assert amplification((2.0, -1.0)) == 3
    assert math.isclose(
        amplification(weights(Forecast("newton", order=2), (0.0, 1.0, 2.0), 3.0)), 7
    )
    with pytest.raises(ValueError, match="times is empty: no full step"):
        weights(Forecast("newton"), (), 3.0)
