"""``litapp train-kd`` end to end on a tiny model and a user's own pictures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from litapp.errors import LitappError
from litapp.models.lit import LiTTransformer2DModel
from litapp.models.text_encoder import encode_texts, load_pipeline_text
from litapp.training import diffusion
from litapp.training.codec import load_codec

NETWORK = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 2,
    "patch_size": 1,
    "caption_channels": 384,
    "cross_attention_dim": 16,
    "pooled_projection_dim": 384,
}


@pytest.fixture
def workshop(
    tmp_path: Path, autoencoder: Path, any_text: tuple, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A recipe, an autoencoder, a softmax teacher and four captioned pictures."""
    monkeypatch.setattr(diffusion, "load_text_encoder", lambda: any_text)
    teacher = LiTTransformer2DModel(**NETWORK, attention="softmax")
    teacher.save_pretrained(tmp_path / "teacher")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = []
    for index in range(4):
        Image.new("RGB", (64, 64), (60 * index, 0, 255)).save(pictures / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": "x" * index}))
    (pictures / "metadata.jsonl").write_text("\n".join(rows))
    options = "\n".join(f"{name} = {value}" for name, value in NETWORK.items())
    (tmp_path / "recipe.toml").write_text(
        f"""
        [autoencoder]
        path = '{autoencoder}'
        [model]
        attention = "lit"
        linear_heads = 2
        {options}
        [distillation]
        noise = 0.5
        variance = 0.05
        [loop]
        steps = 4
        batch_size = 4
        learning_rate = 1e-3
        optimizer = "muon"
        precision = "no"
        warmup_steps = 1
        log_every = 1
        sample_every = 2
        [samples]
        prompts = ["x", "xxx"]
        steps = 2
        thumbnail = 32
        """
    )
    return tmp_path


def run(workshop: Path, output: str, teacher: str | None = "teacher") -> Path:
    diffusion.main(
        workshop / "recipe.toml",
        workshop / output,
        resume=True,
        teacher=workshop / teacher if teacher else None,
        data=workshop / "pictures",
    )
    return workshop / output


def test_student_inherits_distils_samples_and_saves(workshop: Path) -> None:
    output = run(workshop, "out")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["kd_noise"] > 0 and row["kd_variance"] >= 0 for row in rows)
    with Image.open(output / "samples" / "step-000002.png") as sheet:
        assert sheet.width > 64
    saved = LiTTransformer2DModel.from_pretrained(output / "model" / "transformer")
    assert saved.config.attention == "lit"
    scheduler = json.loads((output / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


def test_a_student_takes_the_projections_that_the_recipe_names(
    workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(workshop, "paper")
    papers = capsys.readouterr().err
    recipe = (workshop / "recipe.toml").read_text()
    table = '[inheritance]\nprojections = ["to_q", "to_k", "to_v", "to_out"]\n'
    (workshop / "recipe.toml").write_text(recipe + table)
    run(workshop, "all")
    teacher = LiTTransformer2DModel.from_pretrained(workshop / "teacher")
    more = 6 * teacher.config.num_layers  # weight and bias of Q, K and V
    counts = [
        int(re.search(r"(\d+) tensors inherited", text)[1])
        for text in (papers, capsys.readouterr().err)
    ]
    assert counts[1] == counts[0] + more
    (workshop / "recipe.toml").write_text(recipe + table.replace("to_q", "q"))
    with pytest.raises(LitappError, match=r"\[inheritance\]: no projection 'q'"):
        run(workshop, "none")
    assert not (workshop / "none").exists()


def test_the_same_recipe_gives_the_same_weights(workshop: Path) -> None:
    first, second = (
        load_file(run(workshop, name) / "checkpoint" / "model.safetensors") for name in ("a", "b")
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_a_teacher_it_is_plain_diffusion_training(workshop: Path) -> None:
    row = json.loads(
        (run(workshop, "out", teacher=None) / "metrics.jsonl").read_text().split("\n")[0]
    )
    assert "kd_noise" not in row


def test_a_teacher_that_cannot_be_used_leaves_nothing_behind(workshop: Path) -> None:
    weights = workshop / "teacher" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(LitappError, match="cannot load the teacher from"):
        run(workshop, "out")
    with pytest.raises(LitappError, match="there is no teacher in"):
        run(workshop, "out", teacher="nowhere")
    assert not (workshop / "out").exists()


def test_micro_batches_and_checkpointing_give_the_same_loss_curve(workshop: Path) -> None:
    whole = (run(workshop, "whole") / "metrics.jsonl").read_text().splitlines()
    recipe = (workshop / "recipe.toml").read_text()
    options = "[loop]\ngradient_accumulation = 2\ngradient_checkpointing = true"
    (workshop / "recipe.toml").write_text(recipe.replace("[loop]", options))
    parts = (run(workshop, "parts") / "metrics.jsonl").read_text().splitlines()
    for one, other in zip(map(json.loads, whole), map(json.loads, parts), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["kd_noise"] == pytest.approx(one["kd_noise"], rel=1e-3, abs=2e-6)


def test_noise_can_be_predicted_instead_of_v(workshop: Path) -> None:
    recipe = workshop / "recipe.toml"
    recipe.write_text(recipe.read_text() + "[diffusion]\nprediction_type = 'epsilon'\n")
    output = run(workshop, "out")
    scheduler = json.loads((output / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "epsilon"
    recipe.write_text(recipe.read_text().replace("epsilon", "flow"))
    with pytest.raises(LitappError, match="prediction_type is 'flow'"):
        run(workshop, "other")


def test_a_start_from_before_an_option_existed_gets_it(workshop: Path) -> None:
    config = workshop / "teacher" / "config.json"
    older = {k: v for k, v in json.loads(config.read_text()).items() if k != "long_skip"}
    config.write_text(json.dumps(older))
    recipe = workshop / "recipe.toml"
    model = f"[model]\nstart = '{workshop / 'teacher'}'\nlong_skip = true\n"
    head, _, tail = recipe.read_text().partition("[model]")
    recipe.write_text(head + model + tail[tail.index("[distillation]") :])
    output = run(workshop, "out", teacher=None)
    saved = LiTTransformer2DModel.from_pretrained(output / "model" / "transformer")
    assert saved.config.attention == "softmax"
    assert saved.skip.gate.bias.abs().max() > 0


@pytest.fixture
def pixart(workshop: Path, built_bundle: Path) -> Path:
    """What PixArt-Sigma is made of, small: T5 with its tokenizer, an f8 autoencoder's kind."""
    torch.manual_seed(0)
    folder = workshop / "pipeline"
    shutil.copytree(built_bundle / "tokenizer", folder / "tokenizer")
    text = T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5EncoderModel(text).save_pretrained(folder / "text_encoder")
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    network = {**NETWORK, "caption_channels": 16, "pooled_projection_dim": None}
    LiTTransformer2DModel(**network, attention="softmax").save_pretrained(folder / "transformer")
    recipe = (workshop / "recipe.toml").read_text()
    recipe = recipe.replace("caption_channels = 384", "caption_channels = 16")
    recipe = recipe.replace("pooled_projection_dim = 384", "")
    recipe = recipe.replace(str(workshop / "autoencoder"), str(folder / "vae"))
    recipe += f"[text_encoder]\npath = '{folder}'\n[diffusion]\nprediction_type = 'epsilon'\n"
    (workshop / "recipe.toml").write_text(recipe)
    return folder


def test_pixart_is_distilled_with_its_own_text_encoder_and_autoencoder(
    workshop: Path, pixart: Path
) -> None:
    output = run(workshop, "out", teacher="pipeline/transformer")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["kd_noise"] > 0 for row in rows)
    saved = AutoencoderKL.from_pretrained(output / "model" / "autoencoder")
    assert saved.config.latent_channels == 4
    assert (output / "samples" / "step-000004.png").is_file()


def test_captions_of_t5_are_the_states_of_their_own_tokens(pixart: Path) -> None:
    texts = encode_texts(*load_pipeline_text(pixart, 8), ["a red cat", ""], 8)
    assert texts["mask"].sum(1).tolist() == [5, 2]
    network = T5EncoderModel.from_pretrained(pixart / "text_encoder").eval()
    with torch.no_grad():
        wanted = network(torch.tensor([[2, 3]])).last_hidden_state
    torch.testing.assert_close(texts["states"][1:, :2], wanted)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer.json is missing"),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "cannot load the text encoder"),
    ],
)
def test_a_text_encoder_that_cannot_be_read_is_one_line(
    workshop: Path, pixart: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(pixart)
    with pytest.raises(LitappError, match=message) as caught:
        run(workshop, "out", teacher="pipeline/transformer")
    assert "\n" not in str(caught.value) and not (workshop / "out").exists()


def test_parts_that_do_not_fit_are_named(workshop: Path, pixart: Path) -> None:
    recipe = workshop / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("[text_encoder]", "[unused]"))
    with pytest.raises(
        LitappError, match="text encoder gives 384 channels and the transformer reads 16"
    ):
        run(workshop, "out", teacher="pipeline/transformer")
    assert not (workshop / "out").exists()
    with pytest.raises(LitappError, match="this autoencoder is not RGBA"):
        diffusion.load_latents({"art": {}, "data": []}, load_codec(pixart / "vae"), (), 8, workshop)
