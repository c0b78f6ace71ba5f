"""The controls and their events, in Gradio Blocks; `static/live.js` draws what moves."""

from __future__ import annotations

import secrets
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from litapp.errors import LitappError
from litapp.request import MAX_SEED
from litapp.ui.composition import (
    ANY_STYLE,
    LONG_SIDES,
    SHAPES,
    Settings,
    compose,
    pixels,
    settings_from,
)
from litapp.ui.desktop import open_folder
from litapp.worker import Worker

__all__ = ["STATIC", "build_blocks", "theme"]

STATIC = Path(__file__).parent / "static"
MAX_PICTURES, MAX_UI_STEPS, MAX_UI_GUIDANCE = 16, 100, 12
VARIATIONS = 4
# Further than any screen is wide, and JavaScript's numbers are exact up to here.
MAX_UI_SEED = min(MAX_SEED, 2**53 - 1)


def theme() -> gr.themes.Base:
    """Paper and ink with one quiet green; every font is Gradio's own file or the system's."""
    sage = gr.themes.Color(
        c50="#f2f6f4", c100="#e2ece7", c200="#c5d9d0", c300="#a0c0b2", c400="#76a291",
        c500="#568674", c600="#416b5c", c700="#36574b", c800="#2d463d", c900="#263a33",
        c950="#14211d",
    )  # fmt: skip
    stone = gr.themes.Color(
        c50="#faf9f7", c100="#f3f2ee", c200="#e6e4de", c300="#d3d0c8", c400="#a5a198",
        c500="#76726a", c600="#58554f", c700="#403e3a", c800="#272624", c900="#1b1a19",
        c950="#121211",
    )  # fmt: skip
    return gr.themes.Base(
        primary_hue=sage,
        secondary_hue=sage,
        neutral_hue=stone,
        radius_size=gr.themes.sizes.radius_lg,
        font=[
            gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)),
            gr.themes.Font("system-ui"),
            gr.themes.Font("sans-serif"),
        ],
        font_mono=[gr.themes.Font("ui-monospace"), gr.themes.Font("monospace")],
    ).set(
        body_background_fill="*neutral_100",
        body_background_fill_dark="*neutral_950",
        body_text_color="*neutral_900",
        body_text_color_dark="*neutral_100",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        background_fill_primary="white",
        background_fill_primary_dark="*neutral_900",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_padding="0px",
        input_background_fill="white",
        input_background_fill_dark="*neutral_900",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        input_border_color="*neutral_200",
        input_border_color_dark="*neutral_800",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_400",
        button_primary_background_fill_hover_dark="*primary_300",
        button_primary_text_color="white",
        button_primary_text_color_dark="*neutral_950",
    )


def build_blocks(worker: Worker) -> gr.Blocks:
    """The app's page on ``worker``; mount it beside the JSON API, which it uses."""
    manifest = worker.model.bundle.manifest
    styles = manifest.styles
    with gr.Blocks(title="litapp", analytics_enabled=False, fill_width=True) as blocks:
        gr.HTML(_header(manifest.name), elem_id="bar")
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Create", id="create"), gr.Row(elem_id="create"):
                stage = gr.HTML(**_live("stage"))
                with gr.Column(elem_id="controls"):
                    controls, events = _controls(manifest.steps, manifest.guidance, styles)
            with gr.Tab("History", id="history"):
                gallery = gr.HTML(**_live("history"))
        _connect(worker, styles, controls, events, tabs, (stage, gallery))
    return blocks


def _live(name: str) -> dict[str, str]:
    """A component that ``litapp.NAME`` in the script fills, as soon as the script is there."""
    return {
        "html_template": f"<div class='{name}'></div>",
        "head": '<script src="/ui/live.js"></script>',
        "js_on_load": f"const start = () => litapp.{name}(element, trigger);"
        " window.litapp ? start() : addEventListener('litapp-ready', start, { once: true });",
        "elem_id": name,
    }


def _header(model: str) -> str:
    return (
        "<header class='bar'><span class='mark' aria-hidden='true'></span>"
        f"<strong>litapp</strong><span class='model'>{escape(model)}</span>"
        "<button type='button' class='quiet quit'>Quit</button></header>"
    )


def _controls(
    steps: int, guidance: float, styles: dict[str, str]
) -> tuple[list[gr.components.Component], dict[str, gr.Button]]:
    """The inputs in the order of :func:`_values`, and the buttons."""
    prompt = gr.Textbox(
        label="Prompt",
        placeholder="a red apple on a blue background",
        lines=3,
        max_lines=8,
        elem_id="prompt",
        autofocus=True,
    )
    generate = gr.Button("Generate", variant="primary", elem_id="generate")
    gr.HTML(**_live("queue"))
    style = gr.Radio(
        [ANY_STYLE, *styles],
        value=ANY_STYLE,
        label="Style",
        elem_id="style",
        elem_classes="chips",
        visible=bool(styles),
    )
    shape = gr.Radio(
        list(SHAPES), value="Square", label="Shape", elem_id="shape", elem_classes="chips"
    )
    size = gr.Radio(
        list(LONG_SIDES), value="1K", label="Size", elem_id="size", elem_classes="chips"
    )
    transparent = gr.Checkbox(False, label="Transparent background", elem_id="transparent")
    count = gr.Slider(1, MAX_PICTURES, 1, step=1, label="Pictures", elem_id="count")
    with gr.Accordion("More", open=False, elem_id="more"):
        negative = gr.Textbox(label="Leave out", lines=1, elem_id="negative")
        step_count = gr.Slider(1, MAX_UI_STEPS, steps, step=1, label="Steps", elem_id="steps")
        strength = gr.Slider(
            1, MAX_UI_GUIDANCE, guidance, step=0.1, label="Guidance", elem_id="guidance"
        )
        with gr.Row(elem_id="seed-row"):
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="seed")
            dice = gr.Button("Dice", elem_id="dice", min_width=0)
            lock = gr.Checkbox(False, label="Lock", elem_id="lock", min_width=0)
    inputs = [prompt, style, transparent, shape, size, step_count, strength, seed, negative]
    return [*inputs, lock, count], {"generate": generate, "dice": dice}


def _connect(
    worker: Worker,
    styles: dict[str, str],
    controls: list[gr.components.Component],
    events: dict[str, gr.Button],
    tabs: gr.Tabs,
    live: tuple[gr.HTML, gr.HTML],
) -> None:
    seed = controls[7]

    def generate(*values: Any) -> int:
        settings, (lock, count) = Settings(*values[:9]), values[9:]
        drawn = settings.seed or 0 if lock else secrets.randbelow(2**32)
        _submit(worker, _request(settings, styles, int(drawn)), int(count))
        return int(drawn)

    def use(event: gr.EventData) -> list[Any]:
        parameters = _parameters(worker, event)
        if parameters is None:
            return [gr.skip()] * (len(controls) + 1)
        found = settings_from(parameters, styles)
        found = found._replace(
            steps=found.steps and min(found.steps, MAX_UI_STEPS),
            guidance=found.guidance and min(found.guidance, MAX_UI_GUIDANCE),
            seed=min(found.seed, MAX_UI_SEED),
        )
        values = [gr.skip() if value is None else value for value in found]
        # The seed is kept, so that Generate draws this very picture.
        return [*values, True, 1, gr.Tabs(selected="create")]

    def again(event: gr.EventData) -> dict[str, Any]:
        parameters = _parameters(worker, event)
        if parameters is not None:
            names = ("prompt", "negative_prompt", "width", "height", "steps", "guidance")
            wanted = {name: parameters[name] for name in names if name in parameters}
            wanted["seed"] = secrets.randbelow(2**32)
            if getattr(event, "vary", False):
                _submit(worker, {**wanted, "init": str(event.id)}, VARIATIONS)
            else:
                _submit(worker, wanted, 1)
        return gr.Tabs(selected="create")

    def show_folder(event: gr.EventData) -> None:
        entry = worker.history.get(str(getattr(event, "id", "")))
        folder = worker.history.folder if entry is None else entry.path.parent
        try:
            open_folder(folder)
        except LitappError as error:
            _warn(str(error))

    # Gradio shows warnings only for events that go through its queue; this one never waits.
    quick = {
        "concurrency_limit": None,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    events["generate"].click(generate, controls, seed, **quick)
    events["dice"].click(lambda: secrets.randbelow(2**32), None, seed, **quick)
    for place in live:
        place.select(use, None, [*controls, tabs], **quick)
        place.retry(again, None, tabs, **quick)
        place.expand(show_folder, None, None, **quick)


def _request(settings: Settings, styles: dict[str, str], seed: int) -> dict[str, Any]:
    width, height = pixels(settings.shape, settings.size)
    return {
        "prompt": compose(settings.prompt, styles.get(settings.style, ""), settings.transparent)
        if settings.prompt.strip()
        else "",
        # Gradio sends None for what was never on the screen.
        "negative_prompt": settings.negative_prompt or "",
        "width": width,
        "height": height,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "seed": seed,
    }


def _submit(worker: Worker, request: dict[str, Any], count: int) -> None:
    try:
        worker.submit(count=count, **request)
    except LitappError as error:
        _warn(str(error))


def _warn(message: str) -> None:
    gr.Warning(message[:1].upper() + message[1:], duration=6)


def _parameters(worker: Worker, event: gr.EventData) -> dict[str, Any] | None:
    """Those that came with the event, from a dropped file; or those of the picture it names."""
    data = event._data if isinstance(event._data, dict) else {}
    if isinstance(data.get("parameters"), dict):
        return data["parameters"]
    entry = worker.history.get(str(data.get("id", "")))
    if entry is None:
        _warn("that picture is no longer there")
        return None
    return entry.parameters
