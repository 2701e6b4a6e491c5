"""The reference page: what OpenAPI says, as one HTML page that needs nothing from outside."""

from __future__ import annotations

import json
from typing import Any

from pair.pages import render
from pair.serve.problems import STATUSES


def page(openapi: dict[str, Any]) -> str:
    """HTML of a schema as FastAPI makes it."""
    schemas = openapi.get("components", {}).get("schemas", {})
    routes = [
        _route(path, method, operation, schemas)
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    ]
    return render(
        "api", routes=routes, statuses=STATUSES, description=openapi["info"]["description"]
    )


def _route(path: str, method: str, operation: dict[str, Any], schemas: dict) -> dict[str, Any]:
    body = operation.get("requestBody", {}).get("content", {})
    given = body.get("application/json", {})
    parameters = [
        {
            "name": p["name"],
            "values": _values(p["schema"]),
            "default": p["schema"].get("default"),
            "text": p.get("description") or p["schema"].get("description", ""),
        }
        for p in operation.get("parameters", [])
    ]
    schema = given.get("schema", {})
    parameters += [
        {
            "name": name,
            "values": _values(settings),
            "default": settings.get("default"),
            "text": settings.get("description", ""),
        }
        for name, settings in schema.get("properties", {}).items()
    ]
    answer = operation["responses"].get("200", {})
    return {
        "path": path,
        "method": method.upper(),
        "summary": operation.get("summary", ""),
        "text": operation.get("description", ""),
        "body": list(body),
        "parameters": parameters,
        "call": _call(path, method, given.get("example"), body),
        "answer": _example(answer, schemas),
        "statuses": sorted(s for s in operation["responses"] if s != "200"),
    }


def _values(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return " or ".join(v for v in map(_values, schema["anyOf"]) if v != "null")
    bounds = [schema.get(n) for n in ("minimum", "maximum")]
    kind = {"integer": "number", "boolean": "true, false", "string": "text"}
    text = kind.get(schema.get("type", ""), schema.get("type", ""))
    if bounds[0] is not None and bounds[1] is not None:
        return f"{text} {bounds[0]} to {bounds[1]}"
    return text


def _call(path: str, method: str, example: Any, body: dict[str, Any]) -> str:
    key = "-H 'Authorization: Bearer KEY' "
    base = f"http://127.0.0.1:8000{path}"
    if method == "get":
        return f"curl {key if path == '/metrics' else ''}{base}"
    if example is not None:
        text = json.dumps(example, ensure_ascii=False)
        return f"curl {key}-H 'Content-Type: application/json' \\\n  -d '{text}' {base}"
    call = f"curl {key}-H 'Content-Type: image/jpeg' \\\n  --data-binary @photo.jpg {base}"
    if "multipart/form-data" in body:
        call += f"\ncurl {key}-F image=@one.jpg -F image=@two.png {base}"
    return call + (" > purified.png" if path == "/purify" and "multipart" not in call else "")


def _example(answer: dict[str, Any], schemas: dict[str, Any]) -> str:
    reference = answer.get("content", {}).get("application/json", {}).get("schema", {})
    model = schemas.get(reference.get("$ref", "").rpartition("/")[2], {})
    if not model.get("examples"):
        return ""
    return json.dumps(model["examples"][0], indent=2, ensure_ascii=False)
