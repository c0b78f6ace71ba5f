"""The training loop: it learns, checkpoints whole and resumes to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from litapp.errors import LitappError
from litapp.folders import recover_folder, replace_folder
from litapp.training.loop import LoopConfig, train
from litapp.training.muon import Muon, orthogonalise
from litapp.training.recipe import from_table, load_recipe

CONFIG = LoopConfig(
    steps=30,
    batch_size=8,
    learning_rate=1e-2,
    warmup_steps=2,
    precision="no",
    ema_decay=0.9,
    log_every=5,
)


class Net(torch.nn.Module):
    """Two matrices under ``blocks`` (Muon's) and a vector (AdamW's)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
        )
        self.gain = torch.nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x) * self.gain


def batches(start: int) -> Iterator[torch.Tensor]:
    step = start
    while True:
        yield torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        step += 1


def regress(model: torch.nn.Module, x: torch.Tensor, generator: torch.Generator):
    noise = torch.randn(x.shape, generator=generator) * 0.01
    loss = (model(x) - x.flip(-1) + noise).square().mean()
    return loss, {"extra": 1.0}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_loss_falls_and_metrics_are_logged(tmp_path: Path, optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer, steps=60, schedule="constant_with_warmup")
    assert train(Net(), regress, batches, config, tmp_path, resume=False)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(5, 61, 5))
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    assert rows[0]["extra"] == 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer)
    whole, halves = Net(), Net()
    train(whole, regress, batches, config, tmp_path / "whole", resume=False)
    interrupt_at = 13

    def stopping(start: int) -> Iterator[torch.Tensor]:
        for step, batch in enumerate(batches(start), start):
            if step == interrupt_at - 1 and start == 0:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    assert not train(halves, regress, stopping, config, tmp_path / "halves", resume=True)
    again = Net()
    assert train(again, regress, stopping, config, tmp_path / "halves", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_truncated_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    train(Net(), regress, batches, CONFIG, tmp_path, resume=False)
    weights = tmp_path / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(LitappError, match="cannot resume from"):
        train(Net(), regress, batches, CONFIG, tmp_path, resume=True)


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    def broken(model, x, generator):
        return model(x).mean() * float("nan"), {}

    with pytest.raises(LitappError, match="step 0: the gradient is not finite"):
        train(Net(), broken, batches, CONFIG, tmp_path, resume=False)


def test_orthogonalise_brings_all_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.5


def test_muon_step_has_adamws_size() -> None:
    weight = torch.nn.Parameter(torch.zeros(32, 64))
    weight.grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=1.0, weight_decay=0.0).step()
    # RMS 0.2 sqrt(max) / sqrt(max), within the spread of the iteration's singular values.
    assert 0.1 < float(weight.detach().square().mean().sqrt()) < 0.3


def test_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with replace_folder(folder) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(RuntimeError), replace_folder(folder) as partial:
        (partial / "b").write_text("2")
        raise RuntimeError
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("model.")]
    assert [path.name for path in folder.iterdir()] == ["a"]


@pytest.mark.parametrize("new_is_there", [True, False])
def test_a_replacement_killed_between_its_renames_is_finished(
    tmp_path: Path, new_is_there: bool
) -> None:
    folder = tmp_path / "checkpoint"
    (tmp_path / "checkpoint.old").mkdir()
    if new_is_there:
        (tmp_path / "checkpoint.partial").mkdir()
        (tmp_path / "checkpoint.partial" / "new").touch()
    recover_folder(folder)
    assert [path.name for path in folder.iterdir()] == (["new"] if new_is_there else [])


def test_a_partial_folder_alone_is_not_taken_for_whole(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.partial").mkdir()
    recover_folder(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_what_was_logged_after_the_checkpoint_is_logged_once(tmp_path: Path) -> None:
    train(Net(), regress, batches, replace(CONFIG, steps=10), tmp_path, resume=False)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 15, "loss": 9.0}\n{"step": 2')  # a kill, mid-line
    train(Net(), regress, batches, CONFIG, tmp_path, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(5, 31, 5))
    assert all(row["loss"] < 9 for row in rows)


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    def quiet(model: torch.nn.Module, x: torch.Tensor, _: torch.Generator):
        return (model(x) - x.flip(-1)).square().mean(), {}

    whole, parts = Net(), Net()
    train(whole, quiet, batches, CONFIG, tmp_path / "whole", resume=False)
    config = replace(CONFIG, gradient_accumulation=4)
    train(parts, quiet, batches, config, tmp_path / "parts", resume=False)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-3, atol=1e-5)


def test_what_the_loop_cannot_do_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(LitappError, match="batch_size 8 is not a multiple of 1 processes x 3"):
        train(
            Net(), regress, batches, replace(CONFIG, gradient_accumulation=3), tmp_path / "a", False
        )
    with pytest.raises(LitappError, match="no gradient checkpointing"):
        train(
            Net(),
            regress,
            batches,
            replace(CONFIG, gradient_checkpointing=True),
            tmp_path / "a",
            False,
        )
    with pytest.raises(LitappError, match="only transformers can be sharded"):
        train(Net(), regress, batches, replace(CONFIG, sharding="full"), tmp_path / "a", False)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("backend", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_accelerates_own_sharding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{backend}", "true")
    with pytest.raises(LitappError, match=f'accelerate\'s {backend}.* sharding = "full"'):
        train(Net(), regress, batches, CONFIG, tmp_path / "a", False)
    assert not (tmp_path / "a").exists()


def test_a_loop_that_cannot_be_sharded_is_one_clear_line() -> None:
    loop = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3}
    with pytest.raises(LitappError, match=r"\[loop\]: sharding is 'half': use none or full"):
        from_table(LoopConfig, loop | {"sharding": "half"}, "loop")
    with pytest.raises(LitappError, match=r"\[loop\]: muon needs whole matrices.*use adamw"):
        from_table(LoopConfig, loop | {"sharding": "full", "optimizer": "muon"}, "loop")


def test_recipes_that_cannot_be_read_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(LitappError, match=r"cannot read the recipe .*No such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(LitappError, match="cannot read the recipe"):
        load_recipe(tmp_path / "bad.toml")
    (tmp_path / "short.toml").write_text("[loop]\n")
    with pytest.raises(LitappError, match=r"has no \[model\]"):
        load_recipe(tmp_path / "short.toml", "loop", "model")
    with pytest.raises(LitappError, match=r"\[loop\].*stepz"):
        from_table(LoopConfig, {"stepz": 1}, "loop")


def test_a_recipe_takes_of_another_what_it_has_not_itself(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.toml", tmp_path / "child.toml"
    parent.write_text("[fold]\nwidth = 2\n[loop]\nsteps = 9\nseed = 3\n[[data]]\nseed = 1\n")
    child.write_text(f"extends = '{parent}'\n[loop]\nsteps = 1\n[[data]]\nfolder = 'x'\n")
    expected = {"fold": {"width": 2}, "loop": {"steps": 1, "seed": 3}, "data": [{"folder": "x"}]}
    assert load_recipe(child, "fold", "loop") == expected


def test_a_recipe_that_extends_several_takes_most_from_the_last(tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    def tables(*names: str) -> str:
        return "".join(f"[{name}]\nsteps = {i}\n" for i, name in enumerate(names))

    world = write("world.toml", tables("art", "data", "loop"))
    stage = write("stage.toml", f"extends = '{world}'\n[loop]\nsteps = 7\n")
    larger = write("larger.toml", "[data]\nsteps = 9\n")
    last = write("last.toml", f"extends = ['{stage}', '{larger}']\n[model]\n")
    steps = {name: table.get("steps") for name, table in load_recipe(last).items()}
    assert steps == {"art": 0, "data": 9, "loop": 7, "model": None}
    write("larger.toml", f"extends = '{last}'\n")
    with pytest.raises(LitappError, match="extends itself"):
        load_recipe(last)
