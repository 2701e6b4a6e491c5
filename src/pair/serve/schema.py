"""What goes in and out as JSON, with the examples that the reference page shows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pair.serve.inputs import FIELD
from pair.serve.problems import STATUSES

Defend = Literal["query", "gallery", "both", "none"]
What = Literal["embedding", "code"]
HIT: dict[str, Any] = {
    "id": "0f3c6d1b7a2e4f58",
    "uri": "2026/beach.jpg",
    "score": 0.31,
    "rank": 1,
    "width": 640,
    "height": 480,
    "metadata": {"label": "beach"},
}
MODEL: dict[str, Any] = {"name": "clip-small", "fingerprint": "5e1f0c9a7b3d2468"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextSearch(_Strict):
    """A search by words."""

    query: Annotated[str, Field(min_length=1, description="What shall be found.")]
    k: Annotated[int, Field(ge=1, description="How many results.")] = 10
    defend: Annotated[
        Literal["gallery", "none"] | None,
        Field(description="Compare with purified pictures or with those as they came."),
    ] = None
    where: Annotated[str | None, Field(description="Filter over the collection's fields.")] = None

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"query": "a laptop on a desk", "k": 5}]},
    )


class Model(BaseModel):
    name: str
    fingerprint: str


class Purified(BaseModel):
    """Answer to a form of pictures; a picture sent as the body comes back as one."""

    media_type: str
    images: Annotated[list[str], Field(description="Base64, in the order of the form.")]
    model: Model
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "media_type": "image/png",
                    "images": ["iVBORw0KGgo…"],
                    "model": {**MODEL, "name": "pair-small"},
                }
            ]
        }
    )


class Rows(BaseModel):
    """``rows``: unit vectors, or codes as hexadecimal text with a digit for four bits."""

    what: What
    purified: bool
    size: Annotated[int, Field(description="Numbers per vector, or bits per code.")]
    rows: list[list[float]] | list[str]
    model: Model
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "what": "embedding",
                    "purified": True,
                    "size": 128,
                    "rows": [[0.0312, -0.0871, 0.1204]],
                    "model": MODEL,
                }
            ]
        }
    )


class Found(BaseModel):
    hits: list[dict[str, Any]]
    model_config = ConfigDict(json_schema_extra={"examples": [{"hits": [HIT]}]})


class Audits(BaseModel):
    """One record per picture. ``drop``: how far the score of ``query`` falls when the worst
    window is hidden; ``heat``: the same token by token; ``alarm``: null without clean pictures."""

    pictures: list[dict[str, Any]]
    note: str
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "pictures": [
                        {
                            "statistics": {
                                "drop": 0.41,
                                "shift": 0.38,
                                "spread": 0.07,
                                "focus": 0.82,
                            },
                            "query": "a laptop",
                            "score": 0.52,
                            "lowest": 0.11,
                            "window": [0.57, 0.0, 1.0, 0.43],
                            "heat": [[0.02, 0.31], [0.0, 0.04]],
                            "p": 0.004,
                            "alarm": True,
                        }
                    ],
                    "note": "Ranking and alarms are heuristics …",
                }
            ]
        }
    )


class Health(BaseModel):
    status: str
    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ok"}]})


class Failure(BaseModel):
    error: dict[str, str]


def picture_body(several: bool = True) -> dict[str, Any]:
    """OpenAPI for a body that is a picture, or a form of them."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    content: dict[str, Any] = {"image/*": binary, "application/octet-stream": binary}
    if several:
        items = {"type": "array", "items": {"type": "string", "format": "binary"}}
        form = {"type": "object", "properties": {FIELD: items}, "required": [FIELD]}
        content["multipart/form-data"] = {"schema": form}
    return {"requestBody": {"required": True, "content": content}}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema()
    example = schema.get("examples", [{}])[0]
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses of a route that are no success."""
    example = {"error": {"code": "picture", "message": "the file is cut off or damaged"}}
    content = {"application/json": {"example": example}}
    return {
        status: {"model": Failure, "description": STATUSES[status], "content": content}
        for status in statuses
    }
