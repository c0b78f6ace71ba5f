"""The tables of ``benchmarks/method.py`` on a tiny model and a handful of latents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from litapp.models.dit import LiTDiTTransformer2DModel

TABLES = ("heads", "attention", "inheritance", "distillation", "steps")


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import method

    return method


@pytest.fixture
def workshop(tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "index.json").write_text(json.dumps({"classes": ["a", "b"], "source": ""}))
    tensors = {"latents": torch.randn(20, 4, 4, 4).half(), "labels": torch.arange(20) % 2}
    save_file(tensors, cache / "shard-00000.safetensors")
    teacher = LiTDiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=4,
        num_embeds_ada_norm=2, attention="softmax", linear_heads=2,
    )  # fmt: skip
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    teacher.save_pretrained(tmp_path / "teacher")
    where = ["--latents", cache, "--teacher", tmp_path / "teacher", "--output", tmp_path / "out"]
    budget = ["--steps", 4, "--batch-size", 4, "--evaluations", 2, "--precision", "no"]
    return [str(argument) for argument in where + budget]


@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_measured(method, workshop, table, capsys) -> None:
    method.main([table, *workshop, "--seeds", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["table"] == table
    assert len(result["rows"]) >= 3
    assert all(row["error"] > 0 for row in result["rows"])
    if table in ("heads", "attention"):
        assert all(row["ms, 16x16"] > 0 for row in result["rows"])


def test_finished_runs_are_not_done_again_and_other_budgets_are_refused(
    method, workshop, capsys
) -> None:
    command = ["distillation", *workshop, "--seeds", "2"]
    method.main(command)
    first = capsys.readouterr().out
    output = Path(workshop[workshop.index("--output") + 1])
    times = {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    assert len(times) == 8
    method.main(command)
    assert capsys.readouterr().out == first
    assert times == {path: path.stat().st_mtime_ns for path in output.glob("*.json")}
    with pytest.raises(SystemExit, match="other settings"):
        method.main([*command, "--learning-rate", "0.5"])
    with pytest.raises(SystemExit, match="other settings"):
        method.main([*command, "--variance-of", "sigma"])


def test_a_cell_that_two_tables_hold_is_trained_once(method, workshop, capsys) -> None:
    method.main(["heads", *workshop, "--seeds", "1", "--json"])
    heads = json.loads(capsys.readouterr().out)["rows"]
    output = Path(workshop[workshop.index("--output") + 1])
    shared = (output / "scratch-seed0.json").stat().st_mtime_ns
    method.main(["attention", *workshop, "--seeds", "1", "--json"])
    rows = {row["cell"]: row["error"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert (output / "scratch-seed0.json").stat().st_mtime_ns == shared
    assert rows["lit"] == next(row["error"] for row in heads if row["cell"] == "2")


def test_a_small_teacher_is_compared_with_a_large_one_that_is_not_inherited_either(
    method, workshop, tmp_path, capsys
) -> None:
    torch.manual_seed(1)
    small = LiTDiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4,
        num_embeds_ada_norm=2, attention="softmax",
    )  # fmt: skip
    small.save_pretrained(tmp_path / "small")
    command = ["distillation", *workshop, "--small", str(tmp_path / "small"), "--seeds", "1"]
    method.main([*command, "--json"])
    rows = {row["cell"]: row["error"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["both, small"] != rows["both, not inherited"] != rows["both"]


def test_steps_are_read_from_the_curve(method) -> None:
    curve = [(10, 0.5), (20, 0.3), (30, 0.31)]
    assert method.first_below(curve, 0.3) == 20
    assert method.first_below(curve, 0.1) is None


def test_held_out_latents_are_not_trained_on(method, workshop) -> None:
    from method_runs import Budget, Workshop

    cache, teacher = Path(workshop[1]), Path(workshop[3])
    shop = Workshop([cache], teacher, cache / "none", Budget(1, 2, 1e-3, "adamw", 1))
    held = torch.cat([batch["latents"] for batch in shop.held_out])
    assert (len(held), len(shop.data)) == (2, 18)
    for latents in held:
        assert not (shop.data.latents.float() == latents).flatten(1).all(1).any()
