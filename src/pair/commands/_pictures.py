"""Pictures that commands draw: named .png or .jpg, and never over a photo that was given."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


def check(option: str, path: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse a name that says nothing of the format, and one among ``inputs`` (files, folders)."""
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"{option}: {path} must end in .png or .jpg")
    apart(path, inputs, f"choose another {option}")


def apart(path: Path, inputs: Iterable[Path], advice: str) -> None:
    """Refuse an output that is one of ``inputs`` or below one of them."""
    real = path.resolve()
    if any(real.is_relative_to(given.resolve()) for given in inputs):
        raise ValueError(f"{path} would land among the inputs: {advice}")


def write(image: Image, path: Path) -> None:
    """In the format that the suffix names."""
    import io

    from pair.files import write_atomic

    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
    data = io.BytesIO()
    image.save(data, kind, **({} if kind == "PNG" else {"quality": 90}))
    write_atomic(path, data.getvalue())
