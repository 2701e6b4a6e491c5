"""Attacks on image retrieval. An attack sees only a function from images to features."""

from pair.attacks.advhash import AdvHashConfig, advhash, advhash_patch
from pair.attacks.objectives import HashGoal, TextGoal, anchor_code
from pair.attacks.optimise import AttackResult
from pair.attacks.patch import Patch, Placement
from pair.attacks.tth import TTHConfig, tth
from pair.attacks.wrappers import BPDA, EOT, pipeline

__all__ = [
    "BPDA",
    "EOT",
    "AdvHashConfig",
    "AttackResult",
    "HashGoal",
    "Patch",
    "Placement",
    "TTHConfig",
    "TextGoal",
    "advhash",
    "advhash_patch",
    "anchor_code",
    "pipeline",
    "tth",
]
