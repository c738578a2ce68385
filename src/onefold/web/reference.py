"""The description of the API as a page, made from its OpenAPI document, with nothing loaded from elsewhere."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

__all__ = ["reference_page"]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="files/page.css">
</head>
<body class="reference">
<header><h1><a href="./">{title}</a> API</h1><p>{description} <a href="openapi.json">openapi.json</a></p></header>
<main>
{operations}
<h2>Schemas</h2>
{schemas}
</main>
</body>
</html>
"""


def reference_page(document: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI document: its operations and schemas."""
    operations = [
        _operation(path, method, operation, document)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    schemas = [_schema(name, each) for name, each in document["components"]["schemas"].items()]
    return PAGE.format(
        title=escape(document["info"]["title"]),
        description=escape(document["info"]["description"]),
        operations="\n".join(operations),
        schemas="\n".join(schemas),
    )


def _operation(path: str, method: str, operation: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    text = escape(operation.get("description") or operation.get("summary", ""))
    rows = [
        (each["name"], each["schema"], each.get("required", False), each.get("description", ""))
        for each in operation.get("parameters", ())
    ]
    parts = [f'<section><h2 id="{escape(operation["operationId"])}"><code>{method.upper()} {escape(path)}</code></h2>']
    parts.append(f"<p>{text}</p>")
    if rows:
        parts.append(_table("parameter", rows))
    if "requestBody" in operation:
        parts.append(f"<p>Body: {escape(operation['requestBody']['description'])}</p>")
    parts.append(f"<pre>{escape(_curl(path, method, rows))}</pre><ul>")
    for code, answer in operation["responses"].items():
        kinds = answer.get("content", {})
        names = [_type(kinds[kind]["schema"]) if kinds[kind].get("schema") else escape(kind) for kind in kinds]
        parts.append(f"<li><b>{code}</b> {escape(answer['description'])} {' or '.join(names)}</li>")
    return "\n".join([*parts, "</ul></section>"])


def _curl(path: str, method: str, rows: list[tuple[str, Any, bool, str]]) -> str:
    names = {name for name, *_ in rows}
    query = "&".join(text for text in ("seed=7", "steps=1", "t=0.5") if text.split("=")[0] in names)
    body = "--data-binary @image.png " if method == "post" else ""
    file = "-o images.png " if path.endswith(".png") else ""
    return f"curl {body}{file}'http://127.0.0.1:8000{path}{'?' + query if query else ''}'"


def _schema(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (key, each, key in required, each.get("description", "")) for key, each in schema.get("properties", {}).items()
    ]
    text = f"<p>{escape(schema.get('description', ''))}</p>"
    return f'<section><h3 id="{escape(name)}">{escape(name)}</h3>{text}{_table("field", rows)}</section>'


def _table(what: str, rows: list[tuple[str, Any, bool, str]]) -> str:
    lines = [f"<tr><th scope=col>{what}<th scope=col>type<th scope=col>meaning"]
    for name, schema, required, text in rows:
        notes = [_type(schema), *_bounds(schema)]
        if not required and schema.get("default") is not None:
            notes.append(f"default {escape(json.dumps(schema['default']))}")
        lines.append(f"<tr><th scope=row><code>{escape(name)}</code><td>{', '.join(notes)}<td>{escape(text)}")
    return f"<div class=scroll><table>{''.join(lines)}</table></div>"


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if "items" in schema else "list"
    return escape(schema.get("type", "any"))


def _bounds(schema: Mapping[str, Any]) -> Iterator[str]:
    """The least and the greatest value."""
    for each in (schema, *schema.get("anyOf", ())):
        if "minimum" in each or "maximum" in each:
            yield f"{each.get('minimum', '…')} to {each.get('maximum', '…')}"
