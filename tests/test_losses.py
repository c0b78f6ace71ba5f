"""The diffusion and distillation losses against closed forms and diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from litapp.training.diffusion import DiffusionConfig
from litapp.training.losses import (
    Diffusion,
    Distillation,
    diffusion_loss,
    distillation_loss,
    variational_bound,
)


@pytest.fixture(scope="module")
def diffusion() -> Diffusion:
    return Diffusion(DiffusionConfig().scheduler())


def draw(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, 4, 4)
    t = torch.tensor([0, 400, 999])
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), t


def test_noise_and_velocity_are_diffusers_own(diffusion: Diffusion) -> None:
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=2e-2, beta_schedule="linear")
    x0, noise, t = draw()
    torch.testing.assert_close(
        diffusion.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        diffusion.velocity(x0, noise, t), scheduler.get_velocity(x0, noise, t), atol=1e-5, rtol=0
    )


def test_noise_and_start_follow_exactly_from_velocity(diffusion: Diffusion) -> None:
    x0, noise, t = draw()
    x_t, v = diffusion.add_noise(x0, noise, t), diffusion.velocity(x0, noise, t)
    torch.testing.assert_close(diffusion.noise_from_velocity(v, x_t, t), noise, atol=1e-5, rtol=0)
    torch.testing.assert_close(diffusion.start_from_velocity(v, x_t, t), x0, atol=1e-5, rtol=0)


def test_bound_is_zero_for_the_true_posterior(diffusion: Diffusion) -> None:
    x0, noise, _ = draw()
    t = torch.tensor([1, 400, 999])
    x_t, v = diffusion.add_noise(x0, noise, t), diffusion.velocity(x0, noise, t)
    bound = variational_bound(diffusion, v, -torch.ones_like(v), x0, x_t, t)
    torch.testing.assert_close(bound, torch.zeros(3), atol=1e-4, rtol=0)


def test_bound_of_the_upper_variance_is_the_gaussian_divergence(diffusion: Diffusion) -> None:
    x0, noise, _ = draw()
    t = torch.tensor([5, 5, 5])
    x_t, v = diffusion.add_noise(x0, noise, t), diffusion.velocity(x0, noise, t)
    bound = variational_bound(diffusion, v, torch.ones_like(v), x0, x_t, t)
    ratio = math.exp(float(diffusion.log_posterior[5] - diffusion.log_beta[5]))
    expected = 0.5 * (ratio - 1 - math.log(ratio)) / math.log(2)
    torch.testing.assert_close(bound, torch.full((3,), expected), atol=1e-4, rtol=1e-3)


def test_bound_teaches_the_variance_and_not_the_mean(diffusion: Diffusion) -> None:
    x0, noise, t = draw()
    x_t = diffusion.add_noise(x0, noise, t)
    v, nu = torch.zeros_like(x0, requires_grad=True), torch.zeros_like(x0, requires_grad=True)
    variational_bound(diffusion, v, nu, x0, x_t, t).sum().backward()
    assert v.grad is None
    assert nu.grad.abs().min() > 0


def test_first_step_is_the_negative_log_likelihood(diffusion: Diffusion) -> None:
    x0, noise, _ = draw()
    t = torch.zeros(3, dtype=torch.int64)
    x_t, v = diffusion.add_noise(x0, noise, t), diffusion.velocity(x0, noise, t)
    bound = variational_bound(diffusion, v, torch.ones_like(v), x0, x_t, t)
    expected = 0.5 * (math.log(2 * math.pi) + float(diffusion.log_beta[0])) / math.log(2)
    torch.testing.assert_close(bound, torch.full((3,), expected), atol=1e-3, rtol=0)


def test_perfect_prediction_leaves_only_the_bound(diffusion: Diffusion) -> None:
    x0, noise, t = draw()
    x_t, v = diffusion.add_noise(x0, noise, t), diffusion.velocity(x0, noise, t)
    out = torch.cat([v, -torch.ones_like(v)], dim=1)
    loss, figures = diffusion_loss(diffusion, out, x0, noise, x_t, t, vlb_weight=0.0)
    assert loss == 0
    assert figures["simple"] == 0


def test_distillation_is_zero_for_equal_outputs_and_weighs_both_terms(diffusion: Diffusion) -> None:
    x0, noise, t = draw()
    x_t = diffusion.add_noise(x0, noise, t)
    teacher = torch.cat([x0, noise], dim=1)
    weights = Distillation(noise=0.5, variance=0.05)
    assert distillation_loss(diffusion, teacher, teacher, x_t, t, weights)[0] == 0
    student = teacher + 0.1
    loss, figures = distillation_loss(diffusion, student, teacher, x_t, t, weights)
    # eps moves by sqrt(acp) times what v moves by.
    expected = float((diffusion.alphas_cumprod[t] * 0.01).mean())
    assert figures["kd_noise"] == pytest.approx(expected, rel=1e-3)
    assert figures["kd_variance"] > 0
    assert float(loss) == pytest.approx(
        0.5 * figures["kd_noise"] + 0.05 * figures["kd_variance"], rel=1e-4
    )
