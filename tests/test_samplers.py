"""Each sampler against the scheduler of diffusers that implements the same paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from litapp.errors import LitappError
from litapp.samplers import (
    SAMPLERS,
    NoiseSchedule,
    Step,
    ddim,
    ddpm,
    dpmsolver_pp_2m,
    eps_from_v,
    eps_from_x0,
    v_from_eps,
    x0_from_eps,
    x0_from_v,
)

torch = pytest.importorskip("torch", reason="the reference schedulers are torch code")
schedulers = pytest.importorskip("diffusers.schedulers")

# diffusers hands torch tensors to numpy in a way numpy 2 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-5
SHAPE = (2, 4, 6, 5)
COSINE_V = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
LINEAR_V = {"beta_schedule": "linear", "prediction_type": "v_prediction"}
LINEAR_EPS = {"beta_schedule": "linear", "prediction_type": "epsilon"}
LINEAR_X0 = {"beta_schedule": "linear", "prediction_type": "sample"}


def config_of(kind: dict[str, str], spacing: str = "trailing") -> dict[str, Any]:
    return {"num_train_timesteps": 1000, "timestep_spacing": spacing, **kind}


def network(x: np.ndarray, t: int) -> np.ndarray:
    """A smooth stand-in for the transformer: (B, C, h, w) -> (B, 2C, h, w)."""
    wave = np.sin(np.arange(x.shape[-1]) + t / 300)
    return np.concatenate([np.tanh(0.8 * x + 0.3 * wave), np.tanh(x[::-1] - wave)], axis=1)


def start() -> np.ndarray:
    return np.random.default_rng(7).standard_normal(SHAPE)


def run_diffusers(scheduler: Any, steps: int, *, channels: int, **step_options: Any) -> np.ndarray:
    x = torch.from_numpy(start())
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = torch.from_numpy(network(x.double().numpy(), int(t)))[:, :channels]
        x = scheduler.step(output, t, x, **step_options).prev_sample
    return x.numpy()


def run_ours(sampler: Any, kind: dict[str, Any], steps: int, **options: Any) -> np.ndarray:
    schedule = NoiseSchedule.from_config(kind)
    rng = np.random.default_rng(0)
    return sampler(network, start(), schedule, schedule.timesteps(steps), rng=rng, **options)


@pytest.mark.parametrize("kind", [COSINE_V, LINEAR_V, LINEAR_EPS, LINEAR_X0])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50])
def test_dpmsolver_agrees_with_diffusers(kind: dict[str, str], steps: int) -> None:
    config = config_of(kind)
    reference = run_diffusers(
        schedulers.DPMSolverMultistepScheduler(**config), steps, channels=SHAPE[1]
    )
    np.testing.assert_allclose(
        run_ours(dpmsolver_pp_2m, config, steps), reference, atol=TOLERANCE, rtol=TOLERANCE
    )


def test_dpmsolver_clips_x0_as_diffusers_thresholds_at_one() -> None:
    config = config_of(COSINE_V)
    scheduler = schedulers.DPMSolverMultistepScheduler(
        **config, thresholding=True, sample_max_value=1.0
    )
    reference = run_diffusers(scheduler, 12, channels=SHAPE[1])
    clipped = run_ours(dpmsolver_pp_2m, config, 12, clip_x0=1.0)
    np.testing.assert_allclose(clipped, reference, atol=TOLERANCE)
    assert np.abs(clipped - run_ours(dpmsolver_pp_2m, config, 12)).max() > 0.01


@pytest.mark.parametrize("kind", [COSINE_V, LINEAR_V, LINEAR_EPS, LINEAR_X0])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("clip_x0", [None, 0.7])
def test_ddim_agrees_with_diffusers(
    kind: dict[str, str], spacing: str, clip_x0: float | None
) -> None:
    config = config_of(kind, spacing)
    scheduler = schedulers.DDIMScheduler(
        **config, clip_sample=clip_x0 is not None, clip_sample_range=clip_x0 or 1.0
    )
    reference = run_diffusers(
        scheduler, 20, channels=SHAPE[1], use_clipped_model_output=clip_x0 is not None
    )
    ours = run_ours(ddim, config, 20, clip_x0=clip_x0)
    np.testing.assert_allclose(ours, reference, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", [COSINE_V, LINEAR_V, LINEAR_EPS, LINEAR_X0])
@pytest.mark.parametrize("clip_x0", [None, 0.7])
def test_ddpm_with_learned_variance_agrees_with_diffusers(
    kind: dict[str, str], clip_x0: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # "leading" ends at t = 0, the only last step on which diffusers, too, adds no noise.
    config = config_of(kind, "leading")
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda shape, **_: torch.from_numpy(rng.standard_normal(tuple(shape))),
    )
    scheduler = schedulers.DDPMScheduler(
        **config,
        variance_type="learned_range",
        clip_sample=clip_x0 is not None,
        clip_sample_range=clip_x0 or 1.0,
    )
    reference = run_diffusers(scheduler, 25, channels=2 * SHAPE[1])
    ours = run_ours(ddpm, config, 25, clip_x0=clip_x0)
    np.testing.assert_allclose(ours, reference, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 33, 49, 250, 999, 1000])
def test_trailing_timesteps_start_at_the_noisiest_and_are_those_of_diffusers(steps: int) -> None:
    config = config_of(COSINE_V)
    scheduler = schedulers.DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    ours = NoiseSchedule.from_config(config).timesteps(steps)
    assert ours == scheduler.timesteps[:steps].tolist()
    assert ours[0] == 999


@pytest.mark.parametrize(
    ("steps", "strength", "timesteps"),
    [
        (4, 1.0, [999, 749, 499, 249]),
        (4, 0.35, [349, 174]),
        (20, 0.2, [199, 149, 99, 49]),
        (1, 0.01, [9]),
        (1000, 0.002, [1, 0]),
        (1000, 0.0015, [1, 0]),
    ],
)
def test_timesteps_begin_at_the_strength_however_few_they_are(
    steps: int, strength: float, timesteps: list[int]
) -> None:
    schedule = NoiseSchedule.from_config(config_of(COSINE_V))
    assert schedule.timesteps(steps, strength) == timesteps


def test_leading_timesteps_are_cut_at_the_strength() -> None:
    config = {**config_of(COSINE_V), "timestep_spacing": "leading"}
    assert NoiseSchedule.from_config(config).timesteps(4, 0.5) == [250, 0]


@pytest.mark.parametrize("kind", [COSINE_V, LINEAR_V])
def test_schedule_is_that_of_diffusers(kind: dict[str, str]) -> None:
    reference = schedulers.DDPMScheduler(**config_of(kind)).alphas_cumprod.numpy()
    ours = NoiseSchedule.from_config(config_of(kind)).alphas_cumprod
    np.testing.assert_allclose(ours, reference, rtol=1e-5)


def test_v_eps_and_x0_are_three_views_of_one_thing() -> None:
    rng = np.random.default_rng(3)
    x0, eps = rng.standard_normal((2, *SHAPE))
    alpha, sigma = 0.6, 0.8
    x = alpha * x0 + sigma * eps
    v = v_from_eps(x, eps, alpha, sigma)
    np.testing.assert_allclose(v, alpha * eps - sigma * x0)
    np.testing.assert_allclose(x0_from_v(x, v, alpha, sigma), x0)
    np.testing.assert_allclose(eps_from_v(x, v, alpha, sigma), eps)
    np.testing.assert_allclose(x0_from_eps(x, eps, alpha, sigma), x0)
    np.testing.assert_allclose(eps_from_x0(x, x0, alpha, sigma), eps)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_recovers_the_image_of_a_perfect_network(name: str) -> None:
    schedule = NoiseSchedule.from_config(config_of(COSINE_V))
    target = np.random.default_rng(1).uniform(-1, 1, SHAPE)

    def oracle(x: np.ndarray, t: int) -> np.ndarray:
        alpha, sigma = schedule.alpha_sigma(t)
        return np.concatenate([(alpha * x - target) / sigma, np.zeros(SHAPE)], axis=1)

    x = SAMPLERS[name](
        oracle, start(), schedule, schedule.timesteps(10), rng=np.random.default_rng(0)
    )
    np.testing.assert_allclose(x, target, atol=1e-8)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler_reports_each_step_and_keeps_float32(name: str) -> None:
    schedule = NoiseSchedule.from_config(config_of(COSINE_V))
    seen: list[Step] = []
    x = SAMPLERS[name](
        lambda x, t: network(x, t).astype(np.float32),
        start().astype(np.float32),
        schedule,
        schedule.timesteps(4),
        rng=np.random.default_rng(0),
        callback=seen.append,
    )
    assert x.dtype == np.float32
    assert [(s.index, s.total, s.timestep) for s in seen] == [
        (1, 4, 999),
        (2, 4, 749),
        (3, 4, 499),
        (4, 4, 249),
    ]
    assert all(s.x0.shape == SHAPE for s in seen)


def test_a_callback_that_raises_stops_the_sampling_at_once() -> None:
    calls = 0

    def counted(x: np.ndarray, t: int) -> np.ndarray:
        nonlocal calls
        calls += 1
        return network(x, t)

    def stop(step: Step) -> None:
        if step.index == 2:
            raise KeyboardInterrupt

    schedule = NoiseSchedule.from_config(config_of(COSINE_V))
    with pytest.raises(KeyboardInterrupt):
        ddim(
            counted,
            start(),
            schedule,
            schedule.timesteps(9),
            rng=np.random.default_rng(0),
            callback=stop,
        )
    assert calls == 2


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(LitappError, match="from 1 to 1000"):
        NoiseSchedule.from_config(config_of(COSINE_V)).timesteps(steps)


@pytest.mark.parametrize(
    "config",
    [
        {"prediction_type": "flow"},
        {"beta_schedule": "scaled_linear"},
        {"timestep_spacing": "linspace"},
        {"rescale_betas_zero_snr": True},
    ],
)
def test_schedules_it_cannot_run_are_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(LitappError, match="not supported"):
        NoiseSchedule.from_config(config)
