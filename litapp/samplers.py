"""Noise schedules and samplers in numpy: pure functions with one signature.

Symbols follow DPM-Solver++ (arXiv 2211.01095): ``x_t = alpha_t x_0 + sigma_t eps`` with
``alpha_t^2 + sigma_t^2 = 1`` and ``lambda_t = log(alpha_t / sigma_t)``. A sampler is

    ``sampler(model, x, schedule, timesteps, *, rng, clip_x0, callback) -> x_0``

where ``model(x, t)`` returns what the network returns: (B, C, h, w), or (B, 2C, h, w) when the
last C channels interpolate the variance. Arrays keep the dtype of ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from litapp.errors import LitappError

__all__ = [
    "SAMPLERS",
    "NoiseSchedule",
    "Step",
    "ddim",
    "ddpm",
    "dpmsolver_pp_2m",
    "eps_from_v",
    "eps_from_x0",
    "v_from_eps",
    "x0_from_eps",
    "x0_from_v",
]

Array = NDArray[np.floating[Any]]
Model = Callable[[Array, int], Array]


class Step(NamedTuple):
    """One finished step: ``index`` of ``total`` from 1, the timestep left, and the present x0."""

    index: int
    total: int
    timestep: int
    x0: Array


class Sampler(Protocol):
    """The signature every sampler has; ``rng`` is read only by those that add noise."""

    def __call__(
        self,
        model: Model,
        x: Array,
        schedule: NoiseSchedule,
        timesteps: Sequence[int],
        *,
        rng: np.random.Generator,
        clip_x0: float | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> Array: ...


@dataclass(frozen=True)
class NoiseSchedule:
    """A variance-preserving schedule over discrete timesteps.

    Attributes:
        alphas_cumprod: (T,) float64, ``alpha_t^2`` of each timestep, falling from about 1.
        prediction_type: what the network's first C channels are, ``"v_prediction"``,
            ``"epsilon"`` or ``"sample"`` (x_0).
        spacing: ``"trailing"`` (starts at T-1) or ``"leading"`` (ends at 0); arXiv 2305.08891,
            table 2.
    """

    alphas_cumprod: NDArray[np.float64]
    prediction_type: str = "v_prediction"
    spacing: str = "trailing"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Read a diffusers ``scheduler_config.json``; raises LitappError on what it cannot do."""
        prediction = config.get("prediction_type", "epsilon")
        spacing = config.get("timestep_spacing", "trailing")
        if prediction not in ("v_prediction", "epsilon", "sample"):
            raise LitappError(f"the scheduler's prediction_type {prediction!r} is not supported")
        if spacing not in ("trailing", "leading"):
            raise LitappError(f"the scheduler's timestep_spacing {spacing!r} is not supported")
        # The network was trained on diffusers' float32 table, so its rounding is kept.
        alphas = np.float32(1) - _betas(config).astype(np.float32)
        alphas_cumprod = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
        return cls(alphas_cumprod.astype(np.float64), prediction, spacing)

    def timesteps(self, steps: int, strength: float = 1.0) -> list[int]:
        """The timesteps to visit, falling: of ``steps``, the last ceil(steps * strength).

        With the spacing ``"trailing"`` they begin at ``strength`` of the way, however few there
        are: a picture to start from is noised as far as was asked for.

        Raises:
            LitappError: ``steps`` is not from 1 to T.
        """
        total = len(self.alphas_cumprod)
        if not 1 <= steps <= total:
            raise LitappError(f"the number of steps must be from 1 to {total}, not {steps}")
        drawn = math.ceil(steps * strength)
        if self.spacing == "leading":
            return [int(t) for t in (np.arange(steps) * (total // steps))[::-1]][-drawn:]
        reach = max(total * strength, drawn)
        # Counted, not arange'd to a float end: that yields one step too many for some counts.
        return [int(t) - 1 for t in np.round(reach - np.arange(drawn) * (reach / drawn))]

    def alpha_sigma(self, t: int) -> tuple[float, float]:
        """``(alpha_t, sigma_t)``; t = -1 is the clean image, (1, 0)."""
        alpha_bar = 1.0 if t < 0 else float(self.alphas_cumprod[t])
        return math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)


def _betas(config: Mapping[str, Any]) -> NDArray[np.float64]:
    total = int(config.get("num_train_timesteps", 1000))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") or config.get("rescale_betas_zero_snr"):
        raise LitappError("the scheduler's trained_betas and zero-SNR rescaling are not supported")
    if kind == "linear":
        start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        return np.linspace(start, end, total, dtype=np.float64)
    if kind == "squaredcos_cap_v2":  # iDDPM, arXiv 2102.09672 eq 17
        u = np.arange(total + 1) / total
        alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise LitappError(f"the scheduler's beta_schedule {kind!r} is not supported")


def x0_from_eps(x: Array, eps: Array, alpha: float, sigma: float) -> Array:
    """The clean image that noise ``eps`` in ``x`` implies."""
    return (x - sigma * eps) / alpha


def eps_from_x0(x: Array, x0: Array, alpha: float, sigma: float) -> Array:
    """The noise that clean image ``x0`` in ``x`` implies; sigma must not be 0."""
    return (x - alpha * x0) / sigma


def x0_from_v(x: Array, v: Array, alpha: float, sigma: float) -> Array:
    """The clean image of a velocity ``v = alpha eps - sigma x0`` (arXiv 2202.00512)."""
    return alpha * x - sigma * v


def eps_from_v(x: Array, v: Array, alpha: float, sigma: float) -> Array:
    """The noise of a velocity ``v = alpha eps - sigma x0``."""
    return alpha * v + sigma * x


def v_from_eps(x: Array, eps: Array, alpha: float, sigma: float) -> Array:
    """The velocity of noise ``eps`` in ``x``."""
    return (eps - sigma * x) / alpha


class _Prediction(NamedTuple):
    x0: Array
    eps: Array
    variance: Array


def _predict(
    model: Model, x: Array, t: int, schedule: NoiseSchedule, clip_x0: float | None
) -> _Prediction:
    alpha, sigma = schedule.alpha_sigma(t)
    output = model(x, t)
    prediction, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
    if schedule.prediction_type == "v_prediction":
        x0, eps = x0_from_v(x, prediction, alpha, sigma), eps_from_v(x, prediction, alpha, sigma)
    elif schedule.prediction_type == "sample":
        x0, eps = prediction, eps_from_x0(x, prediction, alpha, sigma)
    else:
        x0, eps = x0_from_eps(x, prediction, alpha, sigma), prediction
    if clip_x0 is not None:
        x0 = np.clip(x0, -clip_x0, clip_x0)
        eps = eps_from_x0(x, x0, alpha, sigma)
    return _Prediction(x0, eps, variance)


def dpmsolver_pp_2m(
    model: Model,
    x: Array,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    *,
    rng: np.random.Generator,
    clip_x0: float | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Array:
    """DPM-Solver++(2M), arXiv 2211.01095 algorithm 2; the first and the last step are of order 1.

    Args:
        x: (B, C, h, w) noise of unit variance.
        timesteps: falling, from ``schedule.timesteps``.
        rng: unused, this sampler is deterministic.
        clip_x0: clamp every predicted x0 to ``[-clip_x0, clip_x0]``.
        callback: called after each step; whatever it raises ends the sampling.

    Returns:
        (B, C, h, w) clean latents.
    """
    x0_before, h_before = x, 0.0
    for i, (t, t_next) in enumerate(_pairs(timesteps)):
        x0 = _predict(model, x, t, schedule, clip_x0).x0
        alpha, sigma = schedule.alpha_sigma(t)
        alpha_next, sigma_next = schedule.alpha_sigma(t_next)
        if t_next < 0:
            x = x0
        else:
            h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
            # D is the order-2 estimate of x0 over the step; r = h_before / h in the paper.
            d = x0 if i == 0 else x0 + (h / (2 * h_before)) * (x0 - x0_before)
            x = (sigma_next / sigma) * x - (alpha_next * math.expm1(-h)) * d
            x0_before, h_before = x0, h
        if callback:
            callback(Step(i + 1, len(timesteps), t, x0))
    return x


def ddim(
    model: Model,
    x: Array,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    *,
    rng: np.random.Generator,
    clip_x0: float | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Array:
    """DDIM with eta = 0, arXiv 2010.02502 eq 12; arguments as in :func:`dpmsolver_pp_2m`.

    Where x0 is clipped, the noise is taken again from the clipped x0, as ADM does.
    """
    for i, (t, t_next) in enumerate(_pairs(timesteps)):
        prediction = _predict(model, x, t, schedule, clip_x0)
        alpha_next, sigma_next = schedule.alpha_sigma(t_next)
        x = alpha_next * prediction.x0 + sigma_next * prediction.eps
        if callback:
            callback(Step(i + 1, len(timesteps), t, prediction.x0))
    return x


def ddpm(
    model: Model,
    x: Array,
    schedule: NoiseSchedule,
    timesteps: Sequence[int],
    *,
    rng: np.random.Generator,
    clip_x0: float | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Array:
    """Ancestral DDPM with learned variance; arguments as in :func:`dpmsolver_pp_2m`.

    The mean is arXiv 2006.11239 eq 7 on the respaced timesteps; the log variance interpolates
    between the two bounds as in iDDPM, arXiv 2102.09672 eq 15. The last step adds no noise.
    ``model`` must return 2C channels.
    """
    for i, (t, t_next) in enumerate(_pairs(timesteps)):
        prediction = _predict(model, x, t, schedule, clip_x0)
        (alpha, sigma), (alpha_next, sigma_next) = map(schedule.alpha_sigma, (t, t_next))
        beta = 1.0 - (alpha / alpha_next) ** 2
        x0_weight = alpha_next * beta / sigma**2
        x_weight = (alpha / alpha_next) * sigma_next**2 / sigma**2
        x = x0_weight * prediction.x0 + x_weight * x
        if t_next >= 0:
            fraction = (prediction.variance + 1) / 2
            log_max, log_min = math.log(beta), math.log(beta * sigma_next**2 / sigma**2)
            log_variance = fraction * log_max + (1 - fraction) * log_min
            noise = rng.standard_normal(x.shape).astype(x.dtype, copy=False)
            x = x + np.exp(0.5 * log_variance) * noise
        if callback:
            callback(Step(i + 1, len(timesteps), t, prediction.x0))
    return x


SAMPLERS: dict[str, Sampler] = {"dpmsolver++": dpmsolver_pp_2m, "ddim": ddim, "ddpm": ddpm}


def _pairs(timesteps: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(timesteps, [*timesteps[1:], -1], strict=True))
