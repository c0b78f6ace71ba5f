"""Distillation to a few steps without guidance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from litapp.errors import LitappError
from litapp.training import fewstep, latents
from litapp.training.codec import load_codec
from litapp.training.diffusion import DiffusionConfig
from litapp.training.fewstep import FewStep, FewStepConfig
from litapp.training.losses import Diffusion

SCHEDULER = DiffusionConfig(prediction_type="sample").scheduler()
EMPTY = {"pooled_projections": torch.zeros(1, 3)}


class Oracle(nn.Module):
    """Predicts x_0 from the condition alone: its first number everywhere."""

    def forward(self, x: Tensor, timestep: Tensor, pooled_projections: Tensor, **_) -> tuple:
        start = pooled_projections[:, :1, None, None].expand_as(x)
        return (torch.cat([start, torch.zeros_like(x)], dim=1),)


def few(**options) -> FewStep:
    return FewStep(Diffusion(SCHEDULER), Oracle(), EMPTY, FewStepConfig(**options))


def pictures(count: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    return torch.randn(count, 2, 4, 4), {"pooled_projections": torch.randn(count, 3)}


def test_the_grid_is_the_apps() -> None:
    assert few(steps=4, teacher_steps=1).grid.tolist() == [999, 749, 499, 249, -1]
    assert few(steps=2, teacher_steps=2).grid.tolist() == [999, 749, 499, 249, -1]


@pytest.mark.parametrize("teacher_steps", [1, 2, 5])
def test_a_sure_teacher_is_the_target_however_many_steps_it_takes(teacher_steps: int) -> None:
    objective = few(steps=3, teacher_steps=teacher_steps, guidance=1.0)
    x, condition = pictures(6)
    first = torch.arange(6) % 3 * teacher_steps
    target = objective.target(x, first, condition)
    wanted = condition["pooled_projections"][:, :1, None, None].expand_as(x)
    torch.testing.assert_close(target, wanted, rtol=1e-4, atol=1e-4)


def test_the_teacher_is_guided_away_from_the_empty_caption() -> None:
    objective = few(steps=2, teacher_steps=1, guidance=3.0)
    x, condition = pictures(2)
    target = objective.target(x, torch.tensor([0, 1]), condition)
    wanted = 3 * condition["pooled_projections"][:, :1, None, None].expand_as(x)
    torch.testing.assert_close(target, wanted, rtol=1e-4, atol=1e-4)


def test_the_student_lands_where_the_teachers_steps_end() -> None:
    """Against DDIM written out for a teacher whose x_0 depends on what it sees."""

    class Half(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor, **_) -> tuple:
            return (torch.cat([x / 2, x], dim=1),)

    config = FewStepConfig(steps=2, teacher_steps=2, guidance=1.0)
    objective = FewStep(Diffusion(SCHEDULER), Half(), EMPTY, config)
    x_t, condition = pictures(1)
    acp = SCHEDULER.alphas_cumprod
    x = x_t
    for t, s in ((999, 749), (749, 499)):
        noise = (x - acp[t].sqrt() * x / 2) / (1 - acp[t]).sqrt()
        x = acp[s].sqrt() * x / 2 + (1 - acp[s]).sqrt() * noise
    target = objective.target(x_t, torch.tensor([0]), condition)
    noise = (x_t - acp[999].sqrt() * target) / (1 - acp[999]).sqrt()
    torch.testing.assert_close(acp[499].sqrt() * target + (1 - acp[499]).sqrt() * noise, x)


def test_the_loss_is_shared_between_teacher_and_data() -> None:
    x0, condition = pictures(4)
    batch = {"latents": x0, **condition}
    losses = {}
    for data in (0.0, 0.25, 1.0):
        objective = few(steps=2, guidance=2.0, data=data)
        drawn = objective.draw(batch, torch.Generator().manual_seed(0))
        losses[data], figures = objective(Oracle(), drawn, torch.Generator())
        start = condition["pooled_projections"][:, :1, None, None].expand_as(x0)
        assert figures["error"] == pytest.approx((start - x0).square().mean().item(), rel=1e-4)
        assert figures["distance"] == pytest.approx(start.square().mean().item(), rel=1e-3)
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0])


def test_every_step_is_drawn_as_often() -> None:
    batch = {"latents": torch.zeros(8, 2, 4, 4)}
    drawn = few(steps=4).draw(batch, torch.Generator().manual_seed(1))
    assert drawn["step"].bincount().tolist() == [2, 2, 2, 2]


@pytest.fixture
def workshop(
    tmp_path: Path,
    autoencoder: Path,
    any_text: tuple,
    save_lit: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.setattr(fewstep, "load_text_encoder", lambda: any_text)
    save_lit(tmp_path / "teacher/transformer")
    SCHEDULER.save_pretrained(tmp_path / "teacher/scheduler")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = [json.dumps({"file_name": f"{i}.png", "text": "x" * i}) for i in range(4)]
    for index in range(4):
        Image.new("RGB", (64, 64), (60 * index, 0, 255)).save(pictures / f"{index}.png")
    (pictures / "metadata.jsonl").write_text("\n".join(rows))
    latents.build_folder_cache(pictures, tmp_path / "cache", load_codec(autoencoder), 64)
    monkeypatch.setattr(
        "litapp.training.diffusion._scene_caches", lambda *_: {tmp_path / "cache": 1.0}
    )
    (tmp_path / "recipe.toml").write_text(
        f"""
        [autoencoder]
        path = '{autoencoder}'
        [fewstep]
        steps = 2
        teacher_steps = 2
        guidance = 2.0
        [loop]
        steps = 4
        batch_size = 4
        learning_rate = 1e-3
        precision = "no"
        warmup_steps = 1
        log_every = 1
        sample_every = 2
        [samples]
        prompts = ["x", "xxx"]
        steps = 2
        guidance = 1.0
        solver = "ddim"
        thumbnail = 32
        """
    )
    return tmp_path


def test_a_recipe_distils_samples_and_saves(workshop: Path) -> None:
    output = workshop / "out"
    fewstep.main(workshop / "recipe.toml", output, True, teacher=workshop / "teacher")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["distance"] > 0
    assert (output / "samples/step-000002.png").is_file()
    name = "transformer/diffusion_pytorch_model.safetensors"
    before, after = load_file(workshop / "teacher" / name), load_file(output / "model" / name)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert (output / "model/scheduler/scheduler_config.json").is_file()


def test_one_unguided_step_each_has_nothing_to_learn(workshop: Path) -> None:
    recipe = workshop / "recipe.toml"
    text = recipe.read_text().replace("teacher_steps = 2", "teacher_steps = 1")
    recipe.write_text(text.replace("guidance = 2.0", "guidance = 1.0"))
    fewstep.main(recipe, workshop / "out", True, teacher=workshop / "teacher")
    row = json.loads((workshop / "out/metrics.jsonl").read_text().splitlines()[0])
    assert row["distance"] < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("guidance = 2.0", "guidance = 0.5"), r"\[fewstep\]: guidance must be 1"),
        (("teacher_steps = 2", "teacher_steps = 0"), r"\[fewstep\]: steps and teacher_steps"),
        (("guidance = 2.0", "data = 1.5"), r"\[fewstep\]: data must be"),
        (('solver = "ddim"', 'solver = "euler"'), "solver is 'euler': use one of"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    workshop: Path, change: tuple[str, str], message: str
) -> None:
    recipe = workshop / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(*change))
    with pytest.raises(LitappError, match=message):
        fewstep.main(recipe, workshop / "out", True, teacher=workshop / "teacher")
    assert not (workshop / "out").exists()


def test_a_missing_teacher_is_one_clear_line(workshop: Path) -> None:
    with pytest.raises(LitappError, match="there is no teacher in"):
        fewstep.main(workshop / "recipe.toml", workshop / "out", True, teacher=workshop / "none")
    (workshop / "teacher/scheduler/scheduler_config.json").unlink()
    with pytest.raises(LitappError, match="there is no schedule in"):
        fewstep.main(workshop / "recipe.toml", workshop / "out", True, workshop / "teacher")
    assert not (workshop / "out").exists()
