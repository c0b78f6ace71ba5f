"""Class-conditional distillation, on one process, on two, and killed half-way."""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch.distributed import TCPStore

from litapp.errors import LitappError
from litapp.models.dit import LiTDiTTransformer2DModel
from litapp.training import families
from litapp.training.class_latents import ClassLatents, build_class_cache
from litapp.training.codec import load_codec
from litapp.training.data.classes import list_pictures
from litapp.training.recipe import load_recipe

SHARDED = "sharding = 'full'\ngradient_accumulation = 2\ngradient_checkpointing = true"
CLASSES = ("apple", "bee", "cat")
NETWORK = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 4,
    "patch_size": 2,
}
RECIPE = """
[autoencoder]
path = '{autoencoder}'
[model]
family = "dit"
linear_heads = 2
{network}
[loop]
steps = {steps}
batch_size = 8
learning_rate = 3e-3
precision = "no"
warmup_steps = 1
log_every = 1
checkpoint_minutes = 0
sample_every = 3
{loop}
[samples]
classes = ["bee", "apple"]
steps = 2
thumbnail = 32
"""
# One process: the command, telling at each checkpoint which part of all numbers it holds.
PROCESS = """
import json, os, sys
import torch
from litapp.cli import main
from litapp.training import loop

os.environ.update(environment)
sys.argv = ["litapp", *arguments]
torch.set_num_threads(1)
save = loop.save_checkpoint

def save_and_tell(folder, step, model, ema, optimizers, *rest):
    save(folder, step, model, ema, optimizers, *rest)
    states = [t for o in optimizers for state in o.state.values() for t in state.values()]
    kinds = {"weights": [*model.parameters()], "average": ema.shadow_params, "states": states}
    local = {k: [getattr(t, "_local_tensor", t) for t in kind] for k, kind in kinds.items()}
    count = lambda tensors: sum(t.numel() for t in tensors)
    held = {k: count(local[k]) / count(kind) for k, kind in kinds.items()}
    (folder.parent / f"held-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(held))

loop.save_checkpoint = save_and_tell
main()
"""


@pytest.fixture
def workshop(tmp_path: Path, autoencoder: Path) -> Path:
    """An autoencoder, a softmax teacher and nine pictures of three classes."""
    teacher = LiTDiTTransformer2DModel(
        **NETWORK, attention="softmax", num_embeds_ada_norm=len(CLASSES), norm_eps=1e-5
    )
    teacher.save_pretrained(tmp_path / "teacher")
    for label, name in enumerate(CLASSES):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(3):
            picture = Image.effect_noise((80, 64), 60 + 40 * index).convert("RGB")
            picture.putpixel((label, 0), (255, 0, 0))
            picture.save(tmp_path / "pictures" / name / f"{index}.png")
    write_recipe(tmp_path)
    return tmp_path


def write_recipe(workshop: Path, steps: int = 4, loop: str = "", extra: str = "") -> Path:
    network = "\n".join(f"{name} = {value}" for name, value in NETWORK.items())
    text = RECIPE.format(
        autoencoder=workshop / "autoencoder", network=network, steps=steps, loop=loop
    )
    (workshop / "recipe.toml").write_text(text + extra)
    return workshop / "recipe.toml"


def run(
    workshop: Path, output: str, teacher: str | None = "teacher", data: str = "pictures"
) -> Path:
    families.main(
        workshop / "recipe.toml",
        workshop / output,
        resume=True,
        teacher=workshop / teacher if teacher else None,
        data=workshop / data,
    )
    return workshop / output


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def started(workshop: Path, output: str, processes: int) -> Iterator[list[BaseProcess]]:
    """The command in that many processes, which are killed when the block ends before them."""
    context = multiprocessing.get_context("forkserver")
    # Imported once for all: that is most of what a process takes here.
    context.set_forkserver_preload(["litapp.cli", "litapp.training.families"])
    arguments = ["train-kd", "--recipe", str(workshop / "recipe.toml")]
    for option, name in {"teacher": "teacher", "data": "pictures", "output": output}.items():
        arguments += [f"--{option}", str(workshop / name)]
    # What torchrun does, and `accelerate launch` through it: the processes meet at a store of their
    # parent's, which holds its port from the start.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = True
    group = []
    for rank in range(processes):
        more = {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": 1, **shared}
        environment = {k: str(v) for k, v in more.items()} if processes > 1 else {}
        given = {"arguments": arguments, "environment": environment}
        group.append(context.Process(target=exec, args=(PROCESS, given)))
    try:
        for process in group:
            process.start()
        yield group
    finally:
        for process in group:
            process.kill()
            process.join()


def finish(group: list[BaseProcess]) -> None:
    for process in group:
        process.join(timeout=300)
        assert process.exitcode == 0


def trained(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next((output / "model" / "transformer").glob("*.safetensors")))


def test_student_inherits_distils_samples_and_saves(workshop: Path) -> None:
    output = run(workshop, "out")
    assert [row["step"] for row in rows(output)] == [1, 2, 3, 4]
    # A fresh student agrees with nothing but the zero-initialised output, a random teacher not.
    assert all(row["kd_noise"] > 0 and row["kd_variance"] > 0 for row in rows(output))
    with Image.open(output / "samples" / "step-000003.png") as sheet:
        assert sheet.size[0] >= 64
    saved = LiTDiTTransformer2DModel.from_pretrained(output / "model" / "transformer")
    assert saved.config.attention == "lit"
    assert saved.config.num_embeds_ada_norm == 3
    assert saved.config.norm_eps == 1e-5
    scheduler = json.loads((output / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "epsilon"
    assert json.loads((output / "model" / "classes.json").read_text())["2"] == "cat"


def test_an_autoencoder_of_other_channels_is_refused_before_pictures_are_encoded(
    workshop: Path,
) -> None:
    recipe = (workshop / "recipe.toml").read_text()
    (workshop / "recipe.toml").write_text(recipe.replace("in_channels = 4", "in_channels = 3"))
    with pytest.raises(LitappError, match="gives 4 channels and the transformer reads 3"):
        run(workshop, "out", teacher=None)
    assert not (workshop / "out").exists()


@pytest.mark.parametrize("recipe", ("class-teacher", "class-student", "lit", "lit-1k-end"))
def test_recipes_that_name_our_autoencoder_read_its_latents(recipe: str) -> None:
    tables = load_recipe(Path(recipe))
    folder = Path(__file__).parents[1] / tables["autoencoder"]["path"]
    config = json.loads((folder / "config.json").read_text())
    assert tables["model"]["in_channels"] == config["latent_channels"]
    assert tables["model"]["out_channels"] == 2 * config["latent_channels"]


def test_a_teacher_that_cannot_be_used_leaves_nothing_behind(workshop: Path) -> None:
    config = json.loads((workshop / "teacher" / "config.json").read_text())
    (workshop / "teacher" / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(LitappError, match=r"cannot load the teacher .*transformer_blocks\.2"):
        run(workshop, "out")
    (workshop / "teacher" / "config.json").write_text(json.dumps(config))
    (workshop / "code.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(LitappError, match="more than tensors"):
        run(workshop, "out", teacher="code.pt")
    with pytest.raises(LitappError, match="there is no teacher in"):
        run(workshop, "out", teacher="nowhere")
    LiTDiTTransformer2DModel(**NETWORK, attention="softmax", num_embeds_ada_norm=5).save_pretrained(
        workshop / "five"
    )
    with pytest.raises(LitappError, match=r"embedding_table\.weight is \(6, 16\) in the teacher"):
        run(workshop, "out", teacher="five")
    with pytest.raises(LitappError, match="has no class folders"):
        run(workshop, "out", data="pictures/bee")
    write_recipe(workshop, extra="\n[distillation]\nvariance_of = 'all'\n")
    with pytest.raises(LitappError, match="use sigma or nu"):
        run(workshop, "out")
    write_recipe(workshop, loop="gradient_accumulation = 3")
    with pytest.raises(LitappError, match="batch_size 8 is not a multiple"):
        run(workshop, "out", data="pictures")
    assert not (workshop / "out" / "checkpoint").exists()
    assert not (workshop / "out" / "model").exists()


def test_training_goes_on_from_a_student_and_from_cached_latents(workshop: Path) -> None:
    first = run(workshop, "first")
    (workshop / "recipe.toml").write_text(
        write_recipe(workshop, steps=1).read_text() + "\n[teacher]\n"
    )
    families.main(
        workshop / "recipe.toml",
        workshop / "second",
        resume=True,
        student=first / "model",
        data=first / "latents",
    )
    assert rows(workshop / "second")[0].keys() >= {"simple", "vlb"}
    assert "kd_noise" not in rows(workshop / "second")[0]


def test_micro_batches_and_checkpointing_give_the_same_loss_curve(workshop: Path) -> None:
    whole = rows(run(workshop, "whole"))
    write_recipe(workshop, loop="gradient_accumulation = 4\ngradient_checkpointing = true")
    parts = rows(run(workshop, "parts"))
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("loop", ["", "optimizer = 'muon'", SHARDED], ids=["adamw", "muon", "fsdp"])
def test_two_gloo_processes_follow_the_curve_of_one(workshop: Path, loop: str) -> None:
    write_recipe(workshop, loop=loop)
    with started(workshop, "two", 2) as group:
        one = rows(run(workshop, "one"))
        finish(group)
    for a, b in zip(one, rows(workshop / "two"), strict=True):
        for name in ("loss", "simple", "vlb", "kd_noise", "kd_variance", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=2e-6), name
    first, second = (
        load_file(workshop / name / "checkpoint" / "model.safetensors") for name in ("one", "two")
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)
    first, second = trained(workshop / "one"), trained(workshop / "two")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)
    share = 0.5 if loop == SHARDED else 1
    for rank in range(2):
        parts = json.loads((workshop / "two" / f"held-{rank}.json").read_text())
        assert parts == pytest.approx(dict.fromkeys(parts, share), abs=0.01)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes of :func:`started`: the number of threads decides the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("processes", "steps"), [(1, 60), (2, 12)], ids=["one", "fsdp"])
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    workshop: Path, one_thread: None, processes: int, steps: int
) -> None:
    write_recipe(workshop, steps=steps, loop="sharding = 'full'" if processes > 1 else "")

    def run_all(output: str) -> Path:
        if processes == 1:
            return run(workshop, output)
        with started(workshop, output, processes) as group:
            finish(group)
        return workshop / output

    whole, killed = run_all("whole"), workshop / "killed"
    with started(workshop, "killed", processes) as group:
        until = time.monotonic() + 300
        while time.monotonic() < until and group[0].is_alive():
            log = killed / "metrics.jsonl"
            if log.is_file() and len(log.read_text().splitlines()) >= 3:
                break
            time.sleep(0.01)
    assert not (killed / "model").exists()
    assert len(rows_so_far := (killed / "metrics.jsonl").read_text().splitlines()) < steps
    assert rows_so_far
    shutil.copytree(killed, workshop / "alone")
    run_all("killed")
    assert [row["step"] for row in rows(killed)] == list(range(1, steps + 1))
    assert all(torch.equal(value, trained(killed)[name]) for name, value in trained(whole).items())
    alone = rows(run(workshop, "alone"))
    assert [row["loss"] for row in alone] == pytest.approx(
        [row["loss"] for row in rows(whole)], rel=1e-3
    )


def test_latents_are_cached_once_and_made_anew_for_other_pictures(workshop: Path) -> None:
    codec, folder = load_codec(workshop / "autoencoder"), workshop / "cache"
    data = list_pictures(workshop / "pictures")
    build_class_cache(data, folder, codec, 256, flip=True)
    shard = folder / "shard-00000.safetensors"
    before = shard.stat().st_mtime_ns
    build_class_cache(data, folder, codec, 256, flip=True)
    assert shard.stat().st_mtime_ns == before
    (workshop / "pictures" / "dog").mkdir()
    Image.new("RGB", (64, 64), "red").save(workshop / "pictures" / "dog" / "0.png")
    build_class_cache(list_pictures(workshop / "pictures"), folder, codec, 256, flip=True)
    cached = ClassLatents(folder)
    assert cached.classes == ["apple", "bee", "cat", "dog"]
    assert cached.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    mirrored = cached.latents[9].flip(-1)
    torch.testing.assert_close(cached.mirrored[9], mirrored, rtol=0, atol=2.0)


def test_labels_are_dropped_at_the_given_rate_and_batches_depend_on_the_step(
    workshop: Path,
) -> None:
    codec = load_codec(workshop / "autoencoder")
    build_class_cache(list_pictures(workshop / "pictures"), workshop / "c", codec, 256, flip=False)
    cached = ClassLatents(workshop / "c")
    source = cached.batches(0, 4000, 0.1, seed=0)
    first, second = next(source), next(source)
    share = (first["class_labels"] == 3).float().mean()
    assert 0.08 < float(share) < 0.12
    again = next(cached.batches(1, 4000, 0.1, seed=0))
    assert all(torch.equal(second[name], again[name]) for name in second)
    kept = first["class_labels"] < 3
    for label, latents in zip(first["class_labels"][kept][:20], first["latents"][kept][:20]):
        matches = (cached.latents.float() == latents).flatten(1).all(1)
        assert cached.labels[matches].tolist() == [int(label)]


def test_diffusers_autoencoder_encodes_opaque_pictures(workshop: Path) -> None:
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(workshop / "kl")  # fmt: skip
    codec = load_codec(workshop / "kl")
    build_class_cache(list_pictures(workshop / "pictures"), workshop / "c", codec, 16, flip=False)
    cached = ClassLatents(workshop / "c")
    assert cached.latents.shape == (9, 4, 8, 8)
    with torch.no_grad():
        pixels = codec.decode(cached.latents[:1].float())
    assert pixels.shape == (1, 4, 16, 16)
    assert (pixels[:, 3] == 1).all()


def test_an_unknown_family_or_autoencoder_is_one_clear_line(workshop: Path) -> None:
    with pytest.raises(LitappError, match="holds neither of"):
        load_codec(workshop / "teacher")
    with pytest.raises(LitappError, match="there is no autoencoder"):
        load_codec(workshop)
    text = (workshop / "recipe.toml").read_text().replace('"dit"', '"unet"')
    (workshop / "recipe.toml").write_text(text)
    with pytest.raises(LitappError, match="use pixart or dit"):
        run(workshop, "out")


def test_webdataset_shards_give_the_latents_of_the_folder(workshop: Path) -> None:
    shards = workshop / "shards"
    shards.mkdir()
    pictures = list_pictures(workshop / "pictures").pictures
    for number in range(2):
        with tarfile.open(shards / f"{number:03d}.tar", "w") as archive:
            for index, picture in list(enumerate(pictures))[number * 5 : number * 5 + 5]:
                add(archive, f"{index:04d}.cls", str(picture.label).encode())
                add(archive, f"{index:04d}.png", picture.read())
            add(archive, "9999.png", b"a picture without a label is left out")
    codec = load_codec(workshop / "autoencoder")
    caches = []
    for source in ("shards", "pictures"):
        data = list_pictures(workshop / source)
        caches.append(
            ClassLatents(build_class_cache(data, workshop / source[0], codec, 256, False))
        )
    assert torch.equal(caches[0].latents, caches[1].latents)
    assert caches[0].labels.tolist() == caches[1].labels.tolist()
    assert caches[0].classes == ["0", "1", "2"]
    whole = (shards / "001.tar").read_bytes()
    (shards / "001.tar").write_bytes(whole[:700])
    with pytest.raises(LitappError, match="cannot read the shard"):
        list_pictures(shards)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
