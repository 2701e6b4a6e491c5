"""Audits of single pictures for the service: what PAIR's audit says without a gallery around.

``hub`` compares with a whole gallery and is left to ``pair audit``; the other statistics need the
picture only. Thresholds are conformal: a picture like the clean ones given at the start raises a
false alarm with a chance of at most ``budget``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pair.guard import conformal
from pair.guard.audit import HEURISTIC, Auditor, Finding
from pair.guard.models import Models
from pair.images import decode, shrink
from pair.secret import secret_generator

ALARMS = ("drop", "shift", "spread")


class SecretModels(Models):
    """Models that draw every mask from the operating system's entropy, whatever seed is asked."""

    def source(self, seed: int | None) -> torch.Generator:
        return secret_generator()


class Examiner:
    """``examine`` gives a record per picture, with an alarm where clean pictures are known."""

    def __init__(
        self,
        models: Models,
        bank: Sequence[str],
        clean: Sequence[Path] = (),
        *,
        budget: float = 0.01,
        **options: Any,
    ):
        self.auditor = Auditor(models, bank, **options)
        self.budget = budget
        self.clean: dict[str, list[float]] = {}
        if clean:
            wanted = conformal.needed(budget, len(ALARMS))
            if len(clean) < wanted:
                raise ValueError(
                    f"a budget of {budget} needs at least {wanted} clean pictures, got {len(clean)}"
                )
            found = [f for path in clean for f in self._findings([self._view(path)])]
            self.clean = {s: sorted(f.statistics[s] for f in found) for s in ALARMS}

    @property
    def image_size(self) -> int:
        return self.auditor.image_size

    def _view(self, path: Path) -> Tensor:
        return shrink(decode(path), self.image_size)

    def _findings(self, views: Sequence[Tensor]) -> list[Finding]:
        return self.auditor.examine(torch.stack(list(views)), [""] * len(views))

    def examine(self, views: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Views (3, S, S) -> what goes into the answer."""
        return [self._record(finding) for finding in self._findings(views)]

    def _record(self, f: Finding) -> dict[str, Any]:
        record: dict[str, Any] = {
            "statistics": {name: round(value, 6) for name, value in f.statistics.items()},
            "query": f.query,
            "score": round(f.score, 6),
            "lowest": round(f.lowest, 6),
            "window": list(f.window),
            "heat": [[round(float(v), 6) for v in row] for row in f.heat],
            "p": None,
            "alarm": None,
        }
        if self.clean:
            values = [conformal.p_value(f.statistics[s], self.clean[s]) for s in ALARMS]
            record["p"] = round(conformal.combined(values), 6)
            record["alarm"] = record["p"] <= self.budget
        return record


__all__ = ["ALARMS", "HEURISTIC", "Examiner", "SecretModels"]
