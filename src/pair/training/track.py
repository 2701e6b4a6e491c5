"""Curves in TensorBoard or Weights & Biases, where one of them is installed and asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

TRACKERS = ("none", "tensorboard", "wandb")


class Tracker(Protocol):
    def log(self, figures: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Silent:
    """``log.jsonl`` alone."""

    def log(self, figures: dict[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard:
    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"TensorBoard cannot be used ({error}): pip install tensorboard, "
                "or leave --track out"
            ) from error
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    def __init__(self, folder: Path, described: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"Weights & Biases cannot be used ({error}): pip install wandb, "
                "or leave --track out"
            ) from error
        self.run = wandb.init(
            project="pair", name=folder.name, id=folder.name, dir=str(folder), resume="allow",
            config=described,
        )  # fmt: skip

    def log(self, figures: dict[str, float], step: int) -> None:
        self.run.log(figures, step=step)

    def close(self) -> None:
        self.run.finish()


def tracker(name: str, folder: Path, described: dict[str, Any]) -> Tracker:
    """The tracker of that name; an unknown or missing one is refused in one sentence."""
    if name == "tensorboard":
        return TensorBoard(folder)
    if name == "wandb":
        return WeightsAndBiases(folder, described)
    if name != "none":
        raise ValueError(f"unknown tracker {name!r}: use one of {', '.join(TRACKERS)}")
    return Silent()
