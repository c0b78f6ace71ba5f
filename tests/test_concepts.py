"""concepts.json and `litapp models show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from litapp.cli import app
from litapp.concepts import CONCEPTS, ConceptScore, read_concepts, write_concepts
from litapp.errors import LitappError

WORLD = [
    ConceptScore("cat", ("kitten",), 0.25, 0.75, 4),
    ConceptScore("jack-o'-lantern", ("Halloween pumpkin", "pumpkin"), 1.0, 1.0, 4),
]


def show(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["models", "show", *arguments])


def test_concepts_come_back_as_written(tmp_path: Path) -> None:
    write_concepts(WORLD, tmp_path / CONCEPTS)
    assert read_concepts(tmp_path / CONCEPTS) == WORLD
    assert [path.name for path in tmp_path.glob("*concepts*")] == [CONCEPTS]
    with pytest.raises(LitappError, match="cannot write"):
        write_concepts(WORLD, tmp_path / "nowhere" / CONCEPTS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is damaged"),
        ('{"name": "cat"}', "is not a list"),
        ("[7]", "is not a dict"),
        ('[{"name": "cat"}]', "has no 'synonyms'"),
        (json.dumps([{**vars(WORLD[0]), "synonyms": "kitten"}]), "is not a list"),
        (json.dumps([{**vars(WORLD[0]), "precision_at_1": 0.9}]), "precisions of 'cat'"),
        (json.dumps([{**vars(WORLD[0]), "precision_at_1": None}]), "is damaged"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / CONCEPTS).write_text(text)
    with pytest.raises(LitappError, match=message):
        read_concepts(tmp_path / CONCEPTS)


def test_show_lists_the_surest_concepts_first(tiny: Path) -> None:
    write_concepts(WORLD, tiny / CONCEPTS)
    rewrite_manifest(tiny)
    lines = show(str(tiny), "--concepts").stdout.splitlines()
    assert lines[1].split() == "jack-o'-lantern 1.00 1.00 Halloween pumpkin, pumpkin".split()
    assert lines[2].split() == "cat 0.25 0.75 kitten".split()
    rows = json.loads(show(str(tiny), "--concepts", "--json").stdout)
    assert [row["name"] for row in rows] == ["cat", "jack-o'-lantern"]


def rewrite_manifest(root: Path) -> None:
    from litapp.bundle import write_manifest

    raw = json.loads((root / "litapp.json").read_text())
    write_manifest(
        root, {name: raw[name] for name in raw if name not in ("schema_version", "files")}
    )


def test_show_refuses_concepts_that_the_manifest_does_not_vouch_for(tiny: Path) -> None:
    write_concepts(WORLD, tiny / CONCEPTS)
    result = show(str(tiny), "--concepts")
    assert result.exit_code == 1 and result.stdout == ""
    assert "nobody measured" in result.stderr and result.stderr.count("\n") == 1


def test_show_tells_what_a_model_is(tiny: Path) -> None:
    facts = json.loads(show(str(tiny), "--json").stdout)
    manifest = json.loads((tiny / "litapp.json").read_text())
    assert facts["bytes"] == sum(entry["size"] for entry in manifest["files"].values())
    assert facts["trained at"] == 128 and set(facts["components"]) == set(manifest["components"])
    text = show(str(tiny)).stdout
    assert facts["digest"] in text and "dpmsolver++" in text
    assert show("nothing").exit_code == 2
