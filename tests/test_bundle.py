"""A bundle that is damaged, incomplete, too new or reaches outside is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from litapp import bundle
from litapp.engines.external_data import external_data_locations
from litapp.errors import EXIT_USAGE, LitappError


def edit_manifest(root: Path, change: Callable[[dict], object]) -> None:
    path = root / "litapp.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def install(source: Path, home: Path, name: str) -> Path:
    return Path(shutil.copytree(source, home / "models" / name))


def test_a_written_bundle_loads_with_all_its_files_listed(tiny: Path) -> None:
    loaded = bundle.load(tiny)
    assert loaded.manifest.name == "tiny"
    assert sorted(loaded.manifest.files) == [
        "scheduler/scheduler_config.json",
        "text_encoder/model.onnx",
        "tokenizer/tokenizer.json",
        "transformer/model.onnx",
        "vae_decoder/model.onnx",
    ]
    assert loaded.component("transformer") == tiny / "transformer/model.onnx"
    assert bundle.verify(loaded) == []


def test_a_changed_byte_passes_the_size_check_and_fails_verification(tiny: Path) -> None:
    path = tiny / "transformer/model.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert bundle.verify(bundle.load(tiny)) == ["transformer/model.onnx"]


def test_the_digest_follows_the_content(tiny: Path, rewrite: Callable[..., Path]) -> None:
    before = bundle.load(tiny).digest
    (tiny / "README.md").write_text("# a model card")
    after = bundle.load(rewrite())
    assert after.digest != before
    assert "README.md" in after.manifest.files


def test_hidden_files_are_no_part_of_a_bundle(tiny: Path, rewrite: Callable[..., Path]) -> None:
    (tiny / ".DS_Store").write_bytes(b"x")
    assert ".DS_Store" not in bundle.load(rewrite()).manifest.files
    assert sorted(p.name for p in tiny.glob(".*")) == [".DS_Store"]


def test_a_size_that_differs_is_refused_before_use(tiny: Path) -> None:
    with (tiny / "vae_decoder/model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(LitappError, match=r"vae_decoder/model\.onnx is \d+ bytes instead of \d+"):
        bundle.load(tiny)


def test_a_missing_file_is_refused(tiny: Path) -> None:
    (tiny / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(LitappError, match=r"tokenizer/tokenizer\.json is missing"):
        bundle.load(tiny)


@pytest.mark.parametrize("content", ["", '{"name": "ti', "[1, 2]", "\x00", "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_refused(tiny: Path, content: str) -> None:
    (tiny / "litapp.json").write_text(content)
    with pytest.raises(LitappError, match=r"litapp\.json is damaged"):
        bundle.load(tiny)


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("latent"),
        lambda raw: raw["latent"].update(channels="many"),
        lambda raw: raw["latent"].update(multiple=48),
        lambda raw: raw["sampler"].update(steps=0),
        lambda raw: raw.update(components=[]),
        lambda raw: raw["components"].pop("transformer"),
        lambda raw: raw["files"].pop("scheduler/scheduler_config.json"),
        lambda raw: raw["files"].update({"README.md": {"size": 3}}),
    ],
)
def test_a_manifest_with_something_missing_or_wrong_is_refused(
    tiny: Path, change: Callable[[dict], object]
) -> None:
    edit_manifest(tiny, change)
    with pytest.raises(LitappError, match=r"litapp\.json is damaged"):
        bundle.load(tiny)


def test_a_newer_schema_asks_for_an_upgrade(tiny: Path) -> None:
    edit_manifest(tiny, lambda raw: raw.update(schema_version=2, latent="of another kind"))
    with pytest.raises(LitappError, match="newer litapp"):
        bundle.load(tiny)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "a/../../secret.txt", "C:x"])
def test_a_file_name_that_leaves_the_folder_is_refused(tiny: Path, name: str) -> None:
    (tiny.parent / "secret.txt").write_text("secret")
    edit_manifest(tiny, lambda raw: raw["files"].update({name: {"sha256": "", "size": 6}}))
    with pytest.raises(LitappError, match="outside the model's folder"):
        bundle.load(tiny)


def test_a_symlink_that_leaves_the_folder_is_refused(tiny: Path) -> None:
    path = tiny / "vae_decoder/model.onnx"
    path.rename(tiny.parent / "elsewhere.onnx")
    path.symlink_to(tiny.parent / "elsewhere.onnx")
    with pytest.raises(LitappError, match="links to outside"):
        bundle.load(tiny)


def save_with_external_data(path: Path, location: str) -> None:
    onnx = pytest.importorskip("onnx")
    value = np.arange(8, dtype=np.float32)
    tensor = onnx.numpy_helper.from_array(value, "value")
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    info = onnx.helper.make_tensor_value_info("value", onnx.TensorProto.FLOAT, [8])
    inner = onnx.helper.make_graph([], "inner", [], [info], [tensor])
    condition = onnx.helper.make_tensor_value_info("condition", onnx.TensorProto.BOOL, [])
    choice = onnx.helper.make_node(
        "If", ["condition"], ["out"], then_branch=inner, else_branch=inner
    )
    out = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [8])
    model = onnx.helper.make_model(onnx.helper.make_graph([choice], "main", [condition], [out]))
    path.write_bytes(model.SerializeToString())


def test_external_data_is_found_inside_subgraphs(tmp_path: Path) -> None:
    save_with_external_data(tmp_path / "model.onnx", "weights.bin")
    assert external_data_locations(tmp_path / "model.onnx") == {"weights.bin"}


def test_a_network_without_external_data_names_none(tiny: Path) -> None:
    assert external_data_locations(tiny / "vae_decoder/model.onnx") == set()


@pytest.mark.parametrize("location", ["../../secret.bin", "/etc/hostname"])
def test_external_data_outside_the_folder_is_refused(
    tiny: Path, rewrite: Callable[..., Path], location: str
) -> None:
    save_with_external_data(tiny / "transformer/model.onnx", location)
    with pytest.raises(LitappError, match="outside the model's folder"):
        rewrite()


def test_external_data_that_the_manifest_does_not_list_is_refused(
    tiny: Path, rewrite: Callable[..., Path]
) -> None:
    save_with_external_data(tiny / "transformer/model.onnx", "weights.bin")
    with pytest.raises(LitappError, match="not listed"):
        rewrite()
    (tiny / "transformer/weights.bin").write_bytes(bytes(32))
    assert "transformer/weights.bin" in bundle.load(rewrite()).manifest.files


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"no network at all", b"\x3a\x7f\x00"])
def test_a_damaged_network_file_is_refused(
    tiny: Path, rewrite: Callable[..., Path], content: bytes
) -> None:
    (tiny / "transformer/model.onnx").write_bytes(content)
    with pytest.raises(LitappError, match="not an ONNX file or is damaged"):
        rewrite()


def test_a_refused_manifest_leaves_the_old_one_in_place(
    tiny: Path, rewrite: Callable[..., Path]
) -> None:
    before = (tiny / "litapp.json").read_bytes()
    with pytest.raises(LitappError):
        rewrite(latent={})
    assert (tiny / "litapp.json").read_bytes() == before
    assert not list(tiny.glob(".*"))


def test_find_takes_a_path_then_the_home_then_the_package_then_here(
    tiny: Path, isolated_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "PACKAGED", tmp_path / "packaged")
    here = Path(shutil.copytree(tiny, Path.cwd() / "toy"))
    assert bundle.find("toy").resolve() == here
    packaged = Path(shutil.copytree(tiny, tmp_path / "packaged" / "toy"))
    assert bundle.find("toy") == packaged
    at_home = install(tiny, isolated_home, "toy")
    assert bundle.find("toy") == at_home
    assert bundle.find("./toy").resolve() == here
    assert bundle.list_bundles() == {"toy": at_home}


@pytest.mark.parametrize("name", ["nothing", "", "..", "./nothing", "x" * 5000, "a\0b"])
def test_an_unknown_model_is_bad_usage_and_lists_the_known(
    tiny: Path, isolated_home: Path, name: str
) -> None:
    install(tiny, isolated_home, "known")
    with pytest.raises(LitappError, match=r"installed models: .*known") as caught:
        bundle.load(name)
    assert caught.value.exit_code == EXIT_USAGE
