"""LiT against diffusers' PixArt, and what it adds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel

from litapp.models.inherit import inherit
from litapp.models.lit import LiTTransformer2DModel

SMALL = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "caption_channels": 12,
    "cross_attention_dim": 32,
}


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random: zero-initialised gates would hide whole branches."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def inputs(height: int = 8, width: int = 8) -> dict:
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, height, width),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.tensor([3, 700]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    }


@pytest.mark.parametrize("size", [(8, 8), (4, 8), (16, 12)])
def test_softmax_form_equals_diffusers_pixart(size: tuple[int, int]) -> None:
    reference = randomised(PixArtTransformer2DModel(**SMALL))
    model = LiTTransformer2DModel(**SMALL, attention="softmax").eval()
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        expected = reference(**inputs(*size)).sample
        actual = model(**inputs(*size)).sample
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_padding_tokens_change_nothing() -> None:
    model = randomised(LiTTransformer2DModel(**SMALL, linear_heads=2))
    arguments = inputs()
    with torch.no_grad():
        before = model(**arguments).sample[0]
        arguments["encoder_hidden_states"][0, 3:] += 5.0
        after = model(**arguments).sample[0]
    torch.testing.assert_close(after, before)


def test_pooled_text_changes_the_prediction() -> None:
    model = randomised(LiTTransformer2DModel(**SMALL, linear_heads=2, pooled_projection_dim=6))
    with torch.no_grad():
        one = model(**inputs(), pooled_projections=torch.zeros(2, 6)).sample
        two = model(**inputs(), pooled_projections=torch.ones(2, 6)).sample
    assert not torch.allclose(one, two, atol=1e-3)


def test_a_wide_grid_holds_the_positions_of_a_square_in_its_middle() -> None:
    model = LiTTransformer2DModel(**SMALL, positions="short_side")
    like = torch.zeros(1)
    square, wide = model._positions(4, 4, like), model._positions(4, 8, like)
    middle = wide.reshape(4, 8, -1)[:, 2:6].reshape(1, 16, -1)
    assert torch.allclose(middle, square, atol=1e-6)
    assert not torch.allclose(wide.reshape(4, 8, -1)[:, 0], square.reshape(4, 4, -1)[:, 0])


def test_saves_and_loads_to_the_same_prediction(tmp_path: Path) -> None:
    model = randomised(LiTTransformer2DModel(**SMALL, linear_heads=2))
    model.save_pretrained(tmp_path)
    again = LiTTransformer2DModel.from_pretrained(tmp_path, use_safetensors=True)
    assert again.config.attention == "lit"
    with torch.no_grad():
        assert torch.equal(model(**inputs()).sample, again.eval()(**inputs()).sample)


def test_fresh_model_predicts_zero_so_that_training_starts_calm() -> None:
    model = LiTTransformer2DModel(**SMALL, linear_heads=2)
    model.initialise()
    with torch.no_grad():
        assert model(**inputs()).sample.abs().max() == 0


@pytest.mark.parametrize("gate", [0.0, 0.75])
def test_a_fresh_long_skip_adds_the_latents_as_far_as_its_gate_is_open(gate: float) -> None:
    model = LiTTransformer2DModel(**SMALL, linear_heads=2, long_skip=True).eval()
    model.initialise()
    arguments = inputs(4, 12)
    with torch.no_grad():
        model.skip.gate.bias.fill_(gate)
        output = model(**arguments).sample
    torch.testing.assert_close(output[:, :4], gate * arguments["hidden_states"])
    assert output[:, 4:].abs().max() == 0


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = randomised(LiTTransformer2DModel(**SMALL, linear_heads=2))
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        (model.enable_gradient_checkpointing if enabled else model.disable_gradient_checkpointing)()
        model.train()
        model(**inputs()).sample.square().mean().backward()
        gradients.append(model.pos_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="use lit, linear, focused, gelu or softmax"):
        LiTTransformer2DModel(**SMALL, attention="fancy")


def test_unknown_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="stretched or short_side"):
        LiTTransformer2DModel(**SMALL, positions="round")


def test_student_inherits_all_but_the_linear_attention() -> None:
    teacher = randomised(LiTTransformer2DModel(**SMALL, attention="softmax"))
    student = randomised(LiTTransformer2DModel(**SMALL, linear_heads=2), seed=1)
    fresh = student.transformer_blocks[0].attn1.to_q.weight.clone()
    report = inherit(student, teacher)
    first, second = teacher.transformer_blocks[0], student.transformer_blocks[0]
    assert torch.equal(first.attn2.to_k.weight, second.attn2.to_k.weight)
    assert torch.equal(first.attn1.to_out[0].weight, second.attn1.to_out[0].weight)
    assert torch.equal(second.attn1.to_q.weight, fresh)
    assert {name.split(".")[3] for name in report.fresh} == {"to_q", "to_k", "to_v", "dwc"}
    assert {name.split(".")[3] for name in report.dropped} == {"to_q", "to_k", "to_v"}


def test_a_teacher_of_another_shape_is_refused_by_name() -> None:
    teacher = LiTTransformer2DModel(**{**SMALL, "caption_channels": 16}, attention="softmax")
    student = LiTTransformer2DModel(**SMALL, linear_heads=2)
    before = student.proj_out.weight.clone()
    with pytest.raises(ValueError, match=r"caption_projection\.linear_1\.weight is \(32, 16\)"):
        inherit(student, teacher)
    assert torch.equal(student.proj_out.weight, before)
