"""A tiny bundle of real ONNX networks that keeps the contract of the exported ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

# Before anything imports torch. Its threads wait for each other in a loop, which on a busy computer
# takes far longer than the tiny networks here.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CHANNELS, REDUCTION, WIDTH = 4, 32, 8

TEXT_ENCODER = """
<ir_version: 10, opset_import: ["" : 20]>
text_encoder (int64[B,L] input_ids, int64[B,L] attention_mask)
    => (float[B,L,8] last_hidden_state, float[B,8] pooled)
<float[16,8] table, int64[1] last = {2}, int64[1] words = {1}>
{
    last_hidden_state = Gather(table, input_ids)
    floats = Cast<to = 1>(attention_mask)
    mask = Unsqueeze(floats, last)
    masked = Mul(last_hidden_state, mask)
    total = ReduceSum<keepdims = 0>(masked, words)
    count = ReduceSum<keepdims = 0>(mask, words)
    pooled = Div(total, count)
}
"""

TRANSFORMER = """
<ir_version: 10, opset_import: ["" : 20]>
transformer (float[B,4,H,W] hidden_states, float[B] timestep, float[B,L,8] encoder_hidden_states,
             int64[B,L] encoder_attention_mask, float[B,8] pooled_projections)
    => (float[B,8,H,W] sample)
<float[8,4] project, int64[2] last = {2, 3}, int64[3] rest = {1, 2, 3}, float scale = {0.001}>
{
    wanted = MatMul(pooled_projections, project)
    colour = Unsqueeze(wanted, last)
    time = Mul(timestep, scale)
    weight = Unsqueeze(time, rest)
    kept = Mul(hidden_states, weight)
    velocity = Sub(kept, colour)
    variance = Tanh(hidden_states)
    sample = Concat<axis = 1>(velocity, variance)
}
"""

VAE_DECODER = """
<ir_version: 10, opset_import: ["" : 20]>
vae_decoder (float[B,4,h,w] latent_sample) => (float[B,4,H,W] sample)
<float[4096,4,1,1] kernel>
{
    spread = Conv(latent_sample, kernel)
    pixels = DepthToSpace<blocksize = 32>(spread)
    sample = Sigmoid(pixels)
}
"""

# The mean of a patch, as far as the first latent channels go: enough to tell pictures apart.
VAE_ENCODER = """
<ir_version: 10, opset_import: ["" : 20]>
vae_encoder (float[B,4,H,W] sample) => (float[B,4,h,w] latent_sample)
{
    latent_sample = AveragePool<kernel_shape = [32, 32], strides = [32, 32]>(sample)
}
"""

MANIFEST = {
    "name": "tiny",
    "description": "networks made for the tests",
    "source_revision": "none",
    "components": {
        name: {"path": f"{name}/model.onnx", "precision": "fp32", "license": "Apache-2.0"}
        for name in ("text_encoder", "transformer", "vae_decoder")
    },
    "latent": {"channels": CHANNELS, "reduction": REDUCTION, "multiple": 64},
    "canvas": {"native": 128},
    "sampler": {"name": "dpmsolver++", "steps": 3, "guidance": 3.0, "clip_x0": None},
    "text": {"max_length": 12},
}

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def save_network(path: Path, text: str, **weights: np.ndarray) -> None:
    onnx = pytest.importorskip("onnx", reason="the tiny bundle is built with onnx")
    model = onnx.parser.parse_model(text)
    kept = [i for i in model.graph.initializer if i.name not in weights]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for name, value in weights.items():
        tensor = onnx.numpy_helper.from_array(value.astype(np.float32), name)
        model.graph.initializer.append(tensor)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def save_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"a red blue green apple cat on two".split()]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    # As in the tokenizer.json of MiniLM, whose own fixed length must not win.
    tokenizer.enable_padding(length=128)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def build_bundle(root: Path) -> Path:
    from litapp.bundle import write_manifest

    rng = np.random.default_rng(0)
    save_network(
        root / "text_encoder/model.onnx", TEXT_ENCODER, table=rng.standard_normal((16, WIDTH))
    )
    save_network(
        root / "transformer/model.onnx", TRANSFORMER, project=rng.standard_normal((WIDTH, CHANNELS))
    )
    kernel = rng.standard_normal((4 * REDUCTION**2, CHANNELS, 1, 1))
    save_network(root / "vae_decoder/model.onnx", VAE_DECODER, kernel=kernel)
    save_tokenizer(root / "tokenizer/tokenizer.json")
    scheduler = root / "scheduler/scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text(json.dumps(SCHEDULER))
    write_manifest(root, MANIFEST)
    return root


@pytest.fixture(autouse=True)
def same_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` is ONNX Runtime on every processor: OpenVINO would draw some pixels otherwise."""
    monkeypatch.setattr("litapp.engines.multiplies_bf16", lambda: False)


@pytest.fixture(scope="session")
def built_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def tiny(built_bundle: Path, tmp_path: Path) -> Path:
    """The folder of a bundle that a test may damage."""
    return Path(shutil.copytree(built_bundle, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def built_reading(built_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with an encoder, so that it can start from a picture."""
    from litapp.bundle import write_manifest

    root = Path(shutil.copytree(built_bundle, tmp_path_factory.mktemp("reading") / "tiny"))
    save_network(root / "vae_encoder/model.onnx", VAE_ENCODER)
    encoder = {"vae_encoder": {"path": "vae_encoder/model.onnx"}}
    write_manifest(root, {**MANIFEST, "components": {**MANIFEST["components"], **encoder}})
    return root


@pytest.fixture
def reading(built_reading: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(built_reading, tmp_path / "reading"))


@pytest.fixture
def rewrite(tiny: Path) -> Callable[..., Path]:
    """Replace parts of the tiny bundle's manifest; the digests follow."""

    def change(**sections: object) -> Path:
        from litapp.bundle import write_manifest

        write_manifest(tiny, {**MANIFEST, **sections})
        return tiny

    return change


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """The folder ``tmp_path/autoencoder``: one of 4 channels with random weights.

    Torch's generator is seeded, so what a test makes after it has the same weights every time.
    """
    import torch

    from litapp.models.autoencoder import SceneAutoencoder

    torch.manual_seed(0)
    network = SceneAutoencoder(
        latent_channels=4,
        encoder_widths=(8, 16, 32),
        decoder_widths=(32, 16, 8),
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    network.save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


@pytest.fixture
def folded(autoencoder: Path) -> Path:
    """The folder ``tmp_path/folded``: that autoencoder, its 4 channels folded to 6, by 4."""
    import torch

    from litapp.models.autoencoder import SceneAutoencoder
    from litapp.training.fold import add_folding

    torch.manual_seed(1)
    options = {"latent_channels": 6, "decoder_widths": (8, 8), "decoder_blocks": (1, 1)}
    network = add_folding(SceneAutoencoder.from_pretrained(autoencoder), **options)
    network.register_to_config(latents_mean=[0.0] * 6, latents_std=[1.0] * 6)
    folder = autoencoder.with_name("folded")
    network.save_pretrained(folder)
    return folder


class Lengths:
    """A tokenizer and a text encoder in one, which know no more than how long a text is."""

    def encode_batch(self, texts: list[str]) -> list:
        return [type("Encoding", (), {"ids": [1, len(text), 2]}) for text in texts]

    def __call__(self, ids, mask) -> tuple:
        states = ids[..., None].float().expand(*ids.shape, 384) / 20
        return states, states.mean(1)

    def state_dict(self) -> dict:
        return {}


@pytest.fixture
def any_text() -> tuple[Lengths, Lengths]:
    """In place of ``load_text_encoder()``: the weights of MiniLM are not part of a clone."""
    return Lengths(), Lengths()


@pytest.fixture(autouse=True)
def isolated_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a home of its own and starts in an empty folder."""
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("LITAPP_HOME", str(home))
    monkeypatch.chdir(here)
    return home


@pytest.fixture
def save_lit() -> Callable[..., None]:
    """Saves a text-to-image LiT of one block, random, which reads :func:`any_text`."""
    import torch

    from litapp.models.lit import LiTTransformer2DModel

    def save(folder: Path, zero: bool = False, **changes: object) -> None:
        torch.manual_seed(0)
        config = {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "sample_size": 2,
            "patch_size": 1,
            "caption_channels": 384,
            "cross_attention_dim": 16,
            "pooled_projection_dim": 384,
        }
        model = LiTTransformer2DModel(**(config | changes))
        if zero:
            model.initialise()
        model.save_pretrained(folder)

    return save
