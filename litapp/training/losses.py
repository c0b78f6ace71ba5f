"""The diffusion losses: v, noise or x_0, learned variance and hybrid distillation.

Symbols as in iDDPM (arXiv 2102.09672) and LiT (arXiv 2501.12976). A network's output has 2C
channels: the prediction (of v, the noise or x_0, as the schedule says) and the interpolation ``nu``
between the two posterior variances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

PREDICTIONS = ("v_prediction", "epsilon", "sample")
SAMPLE_WEIGHT = 5.0


class Diffusion:
    """The forward process of a DDPM schedule, in float32.

    Args:
        scheduler: gives ``alphas_cumprod`` (length T) and ``prediction_type``, one of
            :data:`PREDICTIONS` in diffusers' words.
    """

    def __init__(self, scheduler: DDPMScheduler) -> None:
        acp = scheduler.alphas_cumprod.double()
        previous = torch.cat([torch.ones(1, dtype=torch.float64), acp[:-1]])
        beta = 1 - acp / previous
        variance = beta * (1 - previous) / (1 - acp)
        self.steps = len(acp)
        self.prediction_type = scheduler.config.prediction_type
        self.alphas_cumprod = acp.float()
        self.log_beta = beta.log().float()
        # At t = 0 the posterior variance is 0: clipped to that of t = 1, as iDDPM does.
        self.log_posterior = torch.cat([variance[1:2], variance[1:]]).log().float()
        self.mean_x0 = (beta * previous.sqrt() / (1 - acp)).float()
        self.mean_xt = ((1 - previous) * (1 - beta).sqrt() / (1 - acp)).float()

    @staticmethod
    def _at(table: Tensor, t: Tensor) -> Tensor:
        return table.to(t.device)[t].view(-1, 1, 1, 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``x_t = sqrt(acp) x_0 + sqrt(1 - acp) eps`` (DDPM, equation 4)."""
        acp = self._at(self.alphas_cumprod, t)
        return acp.sqrt() * x0 + (1 - acp).sqrt() * noise

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """``v = sqrt(acp) eps - sqrt(1 - acp) x_0`` (arXiv 2202.00512, section 4)."""
        acp = self._at(self.alphas_cumprod, t)
        return acp.sqrt() * noise - (1 - acp).sqrt() * x0

    def noise_from_velocity(self, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``eps = sqrt(acp) v + sqrt(1 - acp) x_t``."""
        acp = self._at(self.alphas_cumprod, t)
        return acp.sqrt() * v + (1 - acp).sqrt() * x_t

    def start_from_velocity(self, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``x_0 = sqrt(acp) x_t - sqrt(1 - acp) v``."""
        acp = self._at(self.alphas_cumprod, t)
        return acp.sqrt() * x_t - (1 - acp).sqrt() * v

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network predicts: the noise, v or x_0."""
        if self.prediction_type == "sample":
            return x0
        return noise if self.prediction_type == "epsilon" else self.velocity(x0, noise, t)

    def simple_loss(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """L_simple: the squared error of what the network predicts."""
        return self.squared_error(prediction, self.target(x0, noise, t), t)

    def squared_error(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Mean squared difference of two predictions.

        For x_0 each sample is weighed by ``min(1 / (1 - acp), 5)``: its error is that of v, but
        bounded, since a network need not carry the noise that is left near t = 0 (min-SNR,
        arXiv 2303.09556, section 3.4).
        """
        squares = (prediction - target).square()
        if self.prediction_type == "sample":
            weight = 1 / (1 - self._at(self.alphas_cumprod, t))
            squares = squares * weight.clamp(max=SAMPLE_WEIGHT)
        return squares.mean()

    def predicted_noise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``eps`` from the network's prediction."""
        if self.prediction_type == "epsilon":
            return prediction
        if self.prediction_type == "sample":
            acp = self._at(self.alphas_cumprod, t)
            return (x_t - acp.sqrt() * prediction) / (1 - acp).sqrt()
        return self.noise_from_velocity(prediction, x_t, t)

    def predicted_start(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """``x_0`` from the network's prediction (for noise: DDPM, equation 15)."""
        if self.prediction_type == "sample":
            return prediction
        if self.prediction_type == "epsilon":
            acp = self._at(self.alphas_cumprod, t)
            return (x_t - (1 - acp).sqrt() * prediction) / acp.sqrt()
        return self.start_from_velocity(prediction, x_t, t)

    def log_variance(self, nu: Tensor, t: Tensor) -> Tensor:
        """``log Sigma`` for ``nu`` in [-1, 1] (iDDPM, equation 15)."""
        low, high = self._at(self.log_posterior, t), self._at(self.log_beta, t)
        fraction = (nu + 1) / 2
        return fraction * high + (1 - fraction) * low

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0) (DDPM, equation 7)."""
        return self._at(self.mean_x0, t) * x0 + self._at(self.mean_xt, t) * x_t


def variational_bound(
    diffusion: Diffusion, prediction: Tensor, nu: Tensor, x0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """L_vlb per sample in bits per dimension, with the mean detached (iDDPM, section 3.1).

    KL(q || p) for t > 0. At t = 0 latents have no natural bins, so the term is the Gaussian
    negative log likelihood of x_0.
    """
    predicted = diffusion.predicted_start(prediction.detach(), x_t, t)
    mean = diffusion.posterior_mean(predicted, x_t, t)
    log_variance = diffusion.log_variance(nu, t)
    true_mean = diffusion.posterior_mean(x0, x_t, t)
    true_log_variance = diffusion._at(diffusion.log_posterior, t)
    squares = (true_mean - mean).square() * (-log_variance).exp()
    ratio = true_log_variance - log_variance
    divergence = 0.5 * (-1 - ratio + ratio.exp() + squares)
    likelihood = 0.5 * (math.log(2 * math.pi) + log_variance)
    likelihood = likelihood + 0.5 * (x0 - mean).square() * (-log_variance).exp()
    per_sample = torch.where(t.view(-1, 1, 1, 1) == 0, likelihood, divergence)
    return per_sample.mean(dim=(1, 2, 3)) / math.log(2.0)


@dataclass(frozen=True)
class Distillation:
    """LiT's hybrid distillation (arXiv 2501.12976, section 3.3); the ``[distillation]`` table.

    ``noise`` and ``variance`` weigh the two terms. ``variance_of`` says what the second compares:
    ``sigma``, the variances as the paper's equation has them, or ``nu``, the network's own outputs
    that interpolate between their bounds. Variances are at most 0.02 and their bounds a hair apart
    at most timesteps, so that ``sigma`` teaches next to nothing (``docs/method.md``).
    """

    noise: float = 0.5
    variance: float = 0.05
    variance_of: str = "sigma"

    def __post_init__(self) -> None:
        if self.variance_of not in ("sigma", "nu"):
            raise ValueError(f"variance_of is {self.variance_of!r}: use sigma or nu")


def diffusion_loss(
    diffusion: Diffusion,
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    x_t: Tensor,
    t: Tensor,
    vlb_weight: float,
) -> tuple[Tensor, dict[str, float]]:
    """``L_simple`` plus ``vlb_weight`` times L_vlb for the learned variance.

    Args:
        output: (B, 2C, h, w) prediction and nu.
    """
    prediction, nu = output.float().chunk(2, dim=1)
    simple = diffusion.simple_loss(prediction, x0, noise, t)
    bound = variational_bound(diffusion, prediction, nu, x0, x_t, t).mean()
    figures = {"simple": simple.item(), "vlb": bound.item()}
    return simple + vlb_weight * bound, figures


def distillation_loss(
    diffusion: Diffusion,
    student: Tensor,
    teacher: Tensor,
    x_t: Tensor,
    t: Tensor,
    weights: Distillation,
) -> tuple[Tensor, dict[str, float]]:
    """``l1 ||eps_T - eps_S||^2 + l2 ||Sigma_T - Sigma_S||^2`` (LiT, equation 6).

    Networks that predict x_0 are compared as :meth:`Diffusion.squared_error` does: the noise that
    two such networks imply differs by up to 1e4 times their own difference near t = 0.

    Args:
        student, teacher: (B, 2C, h, w) outputs for the same x_t, t and condition.
    """
    predictions, variances = zip(*(out.float().chunk(2, dim=1) for out in (student, teacher)))
    if diffusion.prediction_type != "sample":
        predictions = [diffusion.predicted_noise(p, x_t, t) for p in predictions]
    if weights.variance_of == "sigma":
        variances = [diffusion.log_variance(nu, t).exp() for nu in variances]
    noise = diffusion.squared_error(*predictions, t)
    variance = F.mse_loss(*variances)
    figures = {"kd_noise": noise.item(), "kd_variance": variance.item()}
    return weights.noise * noise + weights.variance * variance, figures
