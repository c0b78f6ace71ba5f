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


@pytest.fixture(scope="module")
def two_steps() -> Diffusion:
    """Two timesteps with beta = 0.5 and 0.75: all that follows can be computed by hand.

    acp = (0.5, 0.125), so the posterior variance at t = 1 is 0.75 * 0.5 / 0.875 = 3/7, which also
    stands for the one of t = 0.
    """
    return Diffusion(DDPMScheduler(2, trained_betas=[0.5, 0.75], prediction_type="epsilon"))


def one_pixel(*values: float) -> list[torch.Tensor]:
    return [torch.full((1, 1, 1, 1), value) for value in values]


def test_noise_prediction_by_hand(two_steps: Diffusion) -> None:
    x0, noise = one_pixel(2.0, 4.0)
    t = torch.tensor([0])
    x_t = two_steps.add_noise(x0, noise, t)
    assert float(x_t) == pytest.approx(math.sqrt(0.5) * 6)
    assert float(two_steps.target(x0, noise, t)) == 4
    assert float(two_steps.predicted_noise(noise, x_t, t)) == 4
    assert float(two_steps.predicted_start(noise, x_t, t)) == pytest.approx(2)


def test_start_prediction_by_hand() -> None:
    steps = Diffusion(DDPMScheduler(2, trained_betas=[0.1, 0.75], prediction_type="sample"))
    x0, noise, guess = one_pixel(2.0, 4.0, 3.0)
    t = torch.tensor([1])
    x_t = steps.add_noise(x0, noise, t)
    assert float(steps.predicted_start(guess, x_t, t)) == 3
    assert float(steps.predicted_noise(x0, x_t, t)) == pytest.approx(4, rel=1e-5)
    # acp = 0.225 at t = 1; at t = 0 the weight of 1 / 0.1 is bounded by 5.
    assert float(steps.simple_loss(guess, x0, noise, t)) == pytest.approx(1 / 0.775, rel=1e-5)
    assert float(steps.simple_loss(guess, x0, noise, torch.tensor([0]))) == pytest.approx(5)


def test_bound_of_a_noise_prediction_by_hand(two_steps: Diffusion) -> None:
    x0, noise, wrong, nu = one_pixel(2.0, 4.0, 3.0, 0.0)
    t = torch.tensor([1])
    x_t = two_steps.add_noise(x0, noise, t)
    bound = variational_bound(two_steps, wrong, nu, x0, x_t, t)
    # x_0 is missed by sqrt(0.875 / 0.125), the mean by sqrt(0.5) 0.75 / 0.875 times that; the
    # variance is the geometric mean of 3/7 and 3/4.
    squared = 0.875 / 0.125 * (math.sqrt(0.5) * 0.75 / 0.875) ** 2
    variance = math.sqrt(3 / 7 * 0.75)
    ratio = (3 / 7) / variance
    expected = 0.5 * (-1 - math.log(ratio) + ratio + squared / variance) / math.log(2)
    assert float(bound) == pytest.approx(expected, rel=1e-5)


def test_noise_loss_by_hand(two_steps: Diffusion) -> None:
    x0, noise, wrong, nu = one_pixel(2.0, 4.0, 3.0, 0.0)
    t = torch.tensor([1])
    x_t = two_steps.add_noise(x0, noise, t)
    out = torch.cat([wrong, nu], dim=1)
    loss, figures = diffusion_loss(two_steps, out, x0, noise, x_t, t, vlb_weight=2.0)
    assert figures["simple"] == pytest.approx(1)
    assert float(loss) == pytest.approx(1 + 2 * figures["vlb"])


def test_distillation_terms_by_hand(two_steps: Diffusion) -> None:
    x_t, t = one_pixel(1.0)[0], torch.tensor([1])
    student, teacher = (torch.tensor(v).view(1, 2, 1, 1) for v in ([1.0, -1.0], [3.0, 1.0]))
    weights = Distillation(noise=0.5, variance=0.05)
    loss, figures = distillation_loss(two_steps, student, teacher, x_t, t, weights)
    # nu = -1 is the posterior variance 3/7 and nu = 1 is beta = 3/4.
    assert figures["kd_noise"] == pytest.approx(4)
    assert figures["kd_variance"] == pytest.approx((3 / 4 - 3 / 7) ** 2, rel=1e-5)
    assert float(loss) == pytest.approx(0.5 * 4 + 0.05 * (3 / 4 - 3 / 7) ** 2, rel=1e-5)
    weights = Distillation(noise=0.0, variance=0.05, variance_of="nu")
    loss, figures = distillation_loss(two_steps, student, teacher, x_t, t, weights)
    assert figures["kd_variance"] == pytest.approx(4)
    assert float(loss) == pytest.approx(0.05 * 4)


def test_variances_of_the_usual_schedule_are_too_close_to_teach(diffusion: Diffusion) -> None:
    """Why ``variance_of = "nu"`` exists: the largest difference that Sigma can have."""
    gap = (diffusion.log_beta.exp() - diffusion.log_posterior.exp()).abs()
    assert float(gap.square().max()) < 1e-7
