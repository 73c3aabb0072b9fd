"""What the signals of gates measure: relative changes of tensors, row by row of a batch.

All results are in float32 at least, and stay on the device of the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

_TINY = 1e-30  # what is divided by is not 0: a change of nothing is endless, and none is none


def norms(values: Tensor) -> Tensor:
    """The norm of each row [B] of ``values`` [B, ...]; a tensor without axes is a row."""
    rows = values.reshape(values.shape[0] if values.dim() else 1, -1)
    if not rows.dtype.is_complex and rows.dtype != torch.float64:
        rows = rows.float()
    found: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return found


def relative(change: Tensor, of: Tensor) -> Tensor:
    """||change|| / ||of|| for each row [B]."""
    return norms(change) / norms(of).clamp_min(_TINY)


def log_snrs(timesteps: Tensor, table: Tensor, flow: bool, rows: int) -> Tensor:
    """The log-SNR of each row [rows] at its timestep.

    ``timesteps`` are one for all rows, one for each, or several for each, which are averaged.
    ``table`` [n + 1] holds the values at timesteps 0 to n; between them it is a line. Those of a
    ``flow`` that are at most 1 are shares of n.
    """
    highest = len(table) - 1
    times = timesteps.to(table.dtype)
    times = times.reshape(rows, -1).mean(1) if times.numel() % rows == 0 else times.mean()
    if flow:
        times = torch.where(times > 1, times, times * highest)
    times = times.clamp(0, highest).expand(rows)
    below = times.floor().clamp_max(highest - 1)
    low = below.long()
    return torch.lerp(table[low], table[low + 1], times - below)


def wiener_gain(sizes: Sequence[int], log_snr: Tensor) -> Tensor:
    """The gain of each frequency of a signal with ``sizes``, in noise; [B, *sizes].

    The signal's power at frequency f is taken to be P(f), |f|^-3 with a mean of 1, and that of the
    noise 1 everywhere, exp(``log_snr``) [B] times less than the signal's. Of a latent x = a signal
    + s noise the best linear guess of the signal has the gain a P / (a^2 P + s^2), here up to a
    factor that is the same for all f: P / (1 + (a / s)^2 P). Frequencies are in cycles per pixel or
    token, in the order of torch.fft; the mean counts as one cycle over the longest axis.
    """
    axes = torch.meshgrid(
        *(torch.fft.fftfreq(size, dtype=log_snr.dtype, device=log_snr.device) for size in sizes),
        indexing="ij",
    )
    squared = reduce(torch.add, (axis.square() for axis in axes))
    power = squared.clamp_min(1 / max(sizes) ** 2) ** -1.5
    power = power / power.mean()
    ratio = log_snr.exp().reshape(-1, *[1] * len(sizes))
    return power / (1 + ratio * power)


def spectral_change(latents: Tensor, before: Tensor, log_snr: Tensor | None) -> Tensor:
    """||G (X - X')|| / ||G X'|| for each row [B], with the gain G of ``wiener_gain``.

    X and X' are the spectra of ``latents`` and of what they were ``before``: over the last two axes
    of images and videos [B, C, .., H, W], over the second one of tokens [B, N, C]. Where nothing
    tells the noise (None), G is 1.
    """
    if log_snr is None or latents.dim() < 2:
        return relative(latents - before, before)
    axes = (-2, -1) if latents.dim() >= 4 else (1,)
    sizes = [latents.shape[axis] for axis in axes]
    gain = wiener_gain(sizes, log_snr)
    if len(axes) == 2:
        gain = gain.reshape(-1, *[1] * (latents.dim() - 3), *sizes)
    elif latents.dim() == 3:
        gain = gain[..., None]
    # Half precision has no transform of every size.
    wide = latents.dtype if latents.dtype == torch.float64 else torch.float32
    now, then = latents.to(wide), before.to(wide)
    change, whole = torch.fft.fftn(now - then, dim=axes), torch.fft.fftn(then, dim=axes)
    return relative(gain * change, gain * whole)
