"""The API's documentation as one page of plain HTML, drawn from its OpenAPI description."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

__all__ = ["reference_page"]

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 52rem; margin: 3rem auto; padding: 0 1rem; }
code { font: 0.9em ui-monospace, monospace; }
h2 { margin: 2.5rem 0 0; font-size: 1.05rem; }
table { border-collapse: collapse; width: 100%; margin: 0.5rem 0; }
td { border-top: 1px solid #8884; padding: 0.3rem 0.8rem 0.3rem 0; vertical-align: top; }
"""


def reference_page(schema: Mapping[str, Any]) -> str:
    """An HTML page that needs nothing but itself."""
    info = schema["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{escape(info['title'])} API</title><style>{STYLE}</style>",
        f"<h1>{escape(info['title'])} API</h1><p>{escape(info.get('summary', ''))}",
        " The whole description: <a href=/openapi.json>/openapi.json</a>.</p>",
    ]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2>")
            parts.append(f"<p>{escape(operation.get('description', ''))}</p>")
            parts.append(_table(_fields(schema, operation)))
    return "".join(parts)


def _fields(schema: Mapping[str, Any], operation: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """(name, type and range, description) of each parameter and each field of the body."""
    for parameter in operation.get("parameters", []):
        kind = f"in the {parameter['in']}, {_kind(parameter['schema'])}"
        yield parameter["name"], kind, parameter.get("description", "")
    content = operation.get("requestBody", {}).get("content", {})
    for kind, body in content.items():
        if "$ref" not in body["schema"]:
            yield "body", kind, ""
            continue
        name = body["schema"]["$ref"].rpartition("/")[2]
        model = schema["components"]["schemas"][name]
        for field, value in model["properties"].items():
            needed = "required, " if field in model.get("required", ()) else ""
            yield field, needed + _kind(value), value.get("description", "")


def _kind(value: Mapping[str, Any]) -> str:
    options = value.get("anyOf", [value])
    words = [str(option.get("type", "")) for option in options if option.get("type") != "null"]
    for option in options:
        low, high = option.get("minimum"), option.get("maximum")
        if low is not None and high is not None:
            words.append(f"{_number(low)} to {_number(high)}")
        elif high is not None:
            words.append(f"above {_number(option['exclusiveMinimum'])}, up to {_number(high)}")
        if "multipleOf" in option:
            words.append(f"a multiple of {_number(option['multipleOf'])}")
        if "maxLength" in option:
            words.append(f"at most {_number(option['maxLength'])} characters")
    if value.get("default") not in (None, ""):
        words.append(f"{value['default']} by default")
    return ", ".join(words)


def _number(value: float) -> str:
    """OpenAPI's numbers are all floats; beyond 2^53 they are no longer exact."""
    return f"{value:,.0f}" if value == int(value) and value < 2**53 else f"{value:.2g}"


def _table(rows: Iterator[tuple[str, ...]]) -> str:
    cells = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{escape(kind)}<td>{escape(words)}"
        for name, kind, words in rows
    )
    return f"<table>{cells}</table>" if cells else ""
