"""Class-conditional LiT against diffusers' DiT, and LiT inside diffusers' own pipelines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtSigmaPipeline,
)
from transformers import BertTokenizer, T5Config, T5EncoderModel

from litapp.models.attention import ATTENTIONS
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.models.inherit import inherit
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.sizes import SIZES, dit_config, pixart_sigma_config

SMALL = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random: zero-initialised gates would hide whole branches."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


def inputs(height: int = 8, width: int = 8) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, height, width, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([2, 10]),
    }


@pytest.mark.parametrize("side", [8, 12])
def test_softmax_form_equals_diffusers_dit(side: int) -> None:
    reference = randomised(DiTTransformer2DModel(**SMALL, norm_eps=1e-6))
    model = LiTDiTTransformer2DModel(
        **SMALL, attention="softmax", shared_embedding=False, frequency_shift=1.0
    ).eval()
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        expected = reference(**inputs(side, side)).sample
        torch.testing.assert_close(
            model(**inputs(side, side)).sample, expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_saves_loads_and_changes_resolution(tmp_path: Path, attention: str) -> None:
    model = randomised(LiTDiTTransformer2DModel(**SMALL, attention=attention, linear_heads=2))
    model.save_pretrained(tmp_path)
    again = LiTDiTTransformer2DModel.from_pretrained(tmp_path, use_safetensors=True).eval()
    assert again.config.attention == attention
    with torch.no_grad():
        for size in ((8, 8), (4, 12)):
            out = model(**inputs(*size)).sample
            assert out.shape == (2, 8, *size)
            assert out.isfinite().all()
            assert torch.equal(out, again(**inputs(*size)).sample)


def test_labels_beyond_the_classes_are_the_empty_label() -> None:
    model = randomised(LiTDiTTransformer2DModel(**SMALL, linear_heads=2))
    arguments = inputs()
    with torch.no_grad():
        empty = model(**{**arguments, "class_labels": torch.tensor([10, 10])}).sample
        thousand = model(**{**arguments, "class_labels": torch.tensor([1000, 1000])}).sample
        other = model(**{**arguments, "class_labels": torch.tensor([3, 3])}).sample
    assert torch.equal(empty, thousand)
    assert not torch.allclose(empty, other, atol=1e-3)


def test_labels_are_not_dropped_inside_the_model() -> None:
    model = randomised(LiTDiTTransformer2DModel(**SMALL, linear_heads=2)).train()
    arguments = {
        "hidden_states": torch.ones(64, 4, 4, 4),
        "timestep": torch.full((64,), 5),
        "class_labels": torch.full((64,), 3),
    }
    with torch.no_grad():
        out = model(**arguments).sample
    torch.testing.assert_close(out, out[:1].expand_as(out))


def test_fresh_model_predicts_zero_so_that_training_starts_calm() -> None:
    model = LiTDiTTransformer2DModel(**SMALL, linear_heads=2)
    model.initialise()
    with torch.no_grad():
        assert model(**inputs()).sample.abs().max() == 0


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = randomised(LiTDiTTransformer2DModel(**SMALL, linear_heads=2)).train()
    gradients = []
    for enabled in (False, True):
        model.zero_grad()
        (model.enable_gradient_checkpointing if enabled else model.disable_gradient_checkpointing)()
        model(**inputs()).sample.square().mean().backward()
        gradients.append(model.pos_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("size", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_are_those_of_the_paper(size: str, millions: int) -> None:
    with torch.device("meta"):
        model = LiTDiTTransformer2DModel(**dit_config(size), attention="softmax")
    count = sum(p.numel() for p in model.parameters()) / 1e6
    # DiT, table 4; the paper counts no class embedding of its own.
    assert count == pytest.approx(millions, rel=0.02)
    assert dit_config(size, 512)["sample_size"] == 64
    assert dit_config(size)["linear_heads"] == SIZES[size].linear_heads


def test_pixart_sigma_has_its_0_6_billion_parameters() -> None:
    with torch.device("meta"):
        model = LiTTransformer2DModel(**pixart_sigma_config(), attention="softmax")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.61e9, rel=0.01)


def test_class_conditional_student_takes_nothing_of_the_self_attention() -> None:
    teacher = randomised(LiTDiTTransformer2DModel(**SMALL, attention="softmax"))
    student = randomised(LiTDiTTransformer2DModel(**SMALL, linear_heads=2), seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    report = inherit(student, teacher)
    after = student.state_dict()
    for name, value in after.items():
        source = before if ".attn1." in name else teacher.state_dict()
        assert torch.equal(value, source[name]), name
    assert set(report.inherited) | set(report.fresh) == set(after)
    assert all(".attn1." in name for name in (*report.fresh, *report.dropped))
    assert len(report.dropped) == 2 * 8
    assert len(report.fresh) == 2 * 10


def test_projections_can_be_inherited_for_the_comparison() -> None:
    teacher = randomised(LiTDiTTransformer2DModel(**SMALL, attention="softmax"))
    student = randomised(LiTDiTTransformer2DModel(**SMALL, linear_heads=2), seed=1)
    report = inherit(student, teacher, projections=("to_q", "to_out"))
    ours, theirs = (m.transformer_blocks[1].attn1 for m in (student, teacher))
    assert torch.equal(ours.to_q.weight, theirs.to_q.weight)
    assert torch.equal(ours.to_out[0].bias, theirs.to_out[0].bias)
    assert not torch.equal(ours.to_k.weight, theirs.to_k.weight)
    assert {name.split(".")[3] for name in report.dropped} == {"to_k", "to_v"}


def test_a_teacher_that_does_not_fit_is_refused_and_nothing_is_copied() -> None:
    student = randomised(LiTDiTTransformer2DModel(**SMALL, linear_heads=2))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    shallow = LiTDiTTransformer2DModel(**{**SMALL, "num_layers": 1}, attention="softmax")
    with pytest.raises(ValueError, match=r"the teacher has no tensor transformer_blocks\.1\."):
        inherit(student, shallow)
    with pytest.raises(ValueError, match="the other is text-to-image"):
        inherit(student, tiny_pixart())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def tiny_pixart() -> LiTTransformer2DModel:
    options = {name: value for name, value in SMALL.items() if name != "num_embeds_ada_norm"}
    return randomised(
        LiTTransformer2DModel(
            **options, linear_heads=2, caption_channels=16, cross_attention_dim=32
        )
    )


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **{
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "sample_size": 16,
        },
    ).eval()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_runs_inside_the_dit_pipeline(scheduler: type) -> None:
    model = randomised(LiTDiTTransformer2DModel(**SMALL, linear_heads=2))
    pipeline = DiTPipeline(model, tiny_vae(), scheduler(), id2label={3: "apple"})
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for label in (3, 3, 4):
        torch.manual_seed(0)  # DDPMScheduler draws from the global generator
        result = pipeline([label], guidance_scale=2.0, num_inference_steps=2, output_type="np")
        images.append(result.images)
    assert images[0].shape == (1, 16, 16, 3)
    assert (images[0] == images[1]).all()
    assert (images[0] != images[2]).any()


def test_runs_inside_the_pixart_sigma_pipeline(tmp_path: Path) -> None:
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple"]))
    text = T5EncoderModel(
        T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).eval()
    pipeline = PixArtSigmaPipeline(
        BertTokenizer(str(words)), text, tiny_vae(), tiny_pixart(), DDIMScheduler()
    )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a red apple",
        num_inference_steps=2,
        height=16,
        width=32,
        output_type="np",
        max_sequence_length=6,
        use_resolution_binning=False,
        clean_caption=False,
        generator=torch.Generator().manual_seed(0),
    ).images
    assert images.shape == (1, 16, 32, 3)
