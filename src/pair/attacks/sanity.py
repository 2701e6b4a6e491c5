"""Checks that an evaluation is not fooled by its own attack (S1-S12).

Each function returns a :class:`Check`; an evaluation stores all twelve, measured or not, in its
record. ``passed`` is None where a check was not measured, which counts as a warning, not a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pair.attacks.objectives import Goal
from pair.attacks.optimise import AttackResult, late_gain
from pair.attacks.patch import Patch
from pair.attacks.wrappers import EOT, as_features
from pair.images import from_pil, quantise, to_pil


@dataclass(frozen=True)
class Check:
    """One assertion: ``value`` against ``threshold``. Shares are in [0, 1]."""

    name: str
    value: float | None
    threshold: float | None
    passed: bool | None
    note: str = ""


TITLES = {
    "S1": "a patch over the whole image succeeds",
    "S2": "known masks are broken",
    "S3": "success does not fall with area, steps or samples",
    "S4": "gradients equal finite differences",
    "S5": "gradients of independent draws agree",
    "S6": "white box beats transfer, black box and the zero-gradient floor",
    "S7": "full back-propagation beats its substitutes",
    "S8": "the loss has levelled off",
    "S9": "no gradient is exactly zero",
    "S10": "attack and evaluation use the same forward pass",
    "S11": "seeds of optimisation, selection and evaluation are disjoint",
    "S12": "evaluation queries are not those of the target embedding",
}


def s1_unbounded(attacked: float, genuine: float, undefended: float) -> Check:
    """A patch over the whole image does at least what genuine photos do, and 95 % undefended."""
    good = attacked >= genuine and undefended >= 0.95
    note = f"undefended {undefended:.3f} (needs 0.95); genuine photos {genuine:.3f}"
    return Check("S1", attacked, genuine, good, note)


def s2_known_mask(known: Sequence[float], undefended: float, slack: float = 0.10) -> Check:
    """Median success over at least 8 known masks is within 10 points of undefended."""
    if len(known) < 8:
        return Check("S2", None, undefended - slack, None, f"{len(known)} masks, needs 8")
    value = median(known)
    return Check("S2", value, undefended - slack, value >= undefended - slack)


def s3_monotone(
    levels: Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0, alpha: float = 0.05
) -> Check:
    """No significant fall from one level (area, steps, samples; ascending) to the next.

    ``levels[i][c]`` is the success of cluster (keyword) c at level i. Clusters are resampled
    together; the value is the smallest one-sided p of a fall, Bonferroni-corrected.
    """
    table = torch.tensor(levels, dtype=torch.float64)  # (L, C)
    if len(table) < 2:
        return Check("S3", None, alpha, None, "needs at least two levels")
    clusters = table.shape[1]
    pick = torch.randint(
        0, clusters, (resamples, clusters), generator=torch.Generator().manual_seed(seed)
    )
    rise = (table[1:] - table[:-1])[:, pick].mean(-1)  # (L-1, R)
    p = (((rise >= 0).double().sum(1) + 1) / (resamples + 1)).clamp(max=1)
    value = float((p * (len(table) - 1)).clamp(max=1).min())
    return Check("S3", value, alpha, value > alpha, f"{clusters} clusters")


def s4_finite_differences(
    loss: Callable[[Tensor], Tensor],
    point: Tensor,
    *,
    directions: int = 64,
    epsilon: float | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> Check:
    """``loss`` (deterministic: masks fixed) against central differences along random directions.

    The value is |difference| / |gradient| in the root mean square over the directions. Defaults
    follow the dtype: tolerance 1e-2 in float32, 1e-5 in float64.
    """
    double = point.dtype == torch.float64
    epsilon = (1e-5 if double else 1e-2) if epsilon is None else epsilon
    tolerance = (1e-5 if double else 1e-2) if tolerance is None else tolerance
    x = point.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    generator = torch.Generator().manual_seed(seed)
    wrong = right = 0.0
    with torch.no_grad():
        for _ in range(directions):
            d = torch.randn(point.shape, generator=generator, dtype=torch.float64).to(point)
            d = d / d.norm()
            slope = float((loss(point + epsilon * d) - loss(point - epsilon * d)) / (2 * epsilon))
            exact = float((gradient * d).sum())
            wrong, right = wrong + (slope - exact) ** 2, right + exact**2
    if right == 0:
        return Check("S4", None, tolerance, False, "the gradient is zero in every direction")
    value = (wrong / right) ** 0.5
    return Check("S4", value, tolerance, value < tolerance, f"{directions} directions")


def s5_agreement(
    gradient: Callable[[torch.Generator], Tensor], at: str = "step 0", threshold: float = 0.3
) -> Check:
    """Cosine between the gradients of two independent sets of draws of the size in use."""
    a, b = (gradient(torch.Generator().manual_seed(s)).flatten() for s in (11, 12))
    value = float(F.cosine_similarity(a.double(), b.double(), dim=0))
    return Check("S5", value, threshold, value >= threshold, at)


def s6_strongest(white: float, others: Mapping[str, float], slack: float = 0.0) -> Check:
    """White-box success is at least that of every other attack, within ``slack`` (its CI)."""
    if not others:
        return Check("S6", white, None, None, "nothing to compare with")
    name = max(others, key=lambda n: others[n])
    limit = others[name] - slack
    return Check("S6", white, limit, white >= limit, f"strongest other: {name}")


def s7_full_gradient(full: float, substitutes: Mapping[str, float], slack: float = 0.0) -> Check:
    """Success with the full gradient is at least that with any substitute."""
    check = s6_strongest(full, substitutes, slack)
    return Check("S7", check.value, check.threshold, check.passed, check.note)


def s8_converged(losses: Sequence[float], limit: float = 0.01) -> Check:
    """The last 20 % of the steps brought less than 1 % of the gain; else "budget-limited"."""
    value = late_gain(list(losses))
    if value == float("inf"):
        return Check("S8", None, limit, False, "the loss never fell")
    note = "" if value < limit else "budget-limited"
    return Check("S8", value, limit, value < limit, note)


def s9_zero_gradient(
    features: Any,
    images: Tensor,
    patch: Patch,
    goal: Goal,
    draws: int = 64,
    seed: int = 0,
    limit: float = 0.01,
) -> Check:
    """Share of the patch's values whose gradient is exactly zero in all of ``draws`` draws."""
    function = as_features(features)
    generator = torch.Generator().manual_seed(seed)
    alive = torch.zeros_like(patch.content, dtype=torch.bool)
    for _ in range(draws):
        content = patch.content.clone().requires_grad_(True)
        outputs = function(patch.apply(images, generator, content=content), generator=generator)
        (gradient,) = torch.autograd.grad(goal(outputs).mean(), content)
        alive |= gradient != 0
    covered = (patch.mask > 0).expand_as(alive)
    value = float((~alive & covered).sum() / covered.sum())
    return Check("S9", value, limit, value < limit, f"{draws} draws")


@torch.no_grad()
def s10_same_forward(
    attack: Any, evaluation: Any, images: Tensor, seed: int = 0, tolerance: float = 1e-4
) -> Check:
    """Cosine distance between what the attack and the evaluation see of the same images.

    Both get the 8-bit images (the evaluation after a round trip through the pixel values of a
    file) and the same random draws. The value is the largest distance over the images.
    """
    stored = quantise(images)
    reread = torch.stack([from_pil(to_pil(i)) for i in images]).to(images)
    a = as_features(attack)(stored, generator=torch.Generator().manual_seed(seed))
    b = as_features(evaluation)(reread, generator=torch.Generator().manual_seed(seed))
    # The norm of the difference of unit vectors: exactly 0 for equal features.
    gap = F.normalize(a.double(), dim=-1) - F.normalize(b.double(), dim=-1)
    value = float(gap.norm(dim=-1).square().max() / 2)
    return Check("S10", value, tolerance, value <= tolerance, "8 bits, same seed")


def s11_seeds(seeds: Mapping[str, Iterable[int]]) -> Check:
    """No seed serves two of the purposes "optimise", "select", "evaluate"."""
    seen: dict[int, str] = {}
    for purpose, values in seeds.items():
        for seed in set(values):
            if seed in seen:
                note = f"seed {seed} serves {seen[seed]} and {purpose}"
                return Check("S11", 1.0, 0.0, False, note)
            seen[seed] = purpose
    return Check("S11", 0.0, 0.0, True, ", ".join(seeds))


def s12_text_leak(target: Iterable[str], queries: Iterable[str]) -> Check:
    """No evaluation query was averaged into the target embedding."""
    shared = {t.strip().lower() for t in target} & {q.strip().lower() for q in queries}
    note = f"for example {min(shared)!r}" if shared else ""
    return Check("S12", float(len(shared)), 0.0, not shared, note)


def of_attack(
    result: AttackResult,
    features: Any,
    images: Tensor,
    goal: Goal,
    *,
    evaluation: Any,
    seeds: Mapping[str, Iterable[int]],
    captions: Iterable[str] = (),
    queries: Iterable[str] = (),
    start: Patch | None = None,
    middle: Patch | None = None,
    exact: Any = None,
    directions: int = 64,
    draws: int = 64,
) -> list[Check]:
    """The checks that one finished attack can answer: S4, S5, S8, S9, S10, S11 and S12.

    ``features`` is what the attack differentiated (one draw per call), ``evaluation`` what the
    table scores, ``seeds`` those of all three purposes. S4 holds the draw fixed by its seed; it
    rightly fails for gradients that are not those of the values: BPDA, or a clamp that lets them
    through. ``exact`` is the same function without such a clamp, in float64, where float32 has no
    digits left for differences; S4 then asks for a relative error of 1e-5. S5 uses as many draws as
    the attack did, at ``start`` (if given) and at ``middle``, the patch after half of the steps;
    without one at the final patch, where a good attack has little gradient left. S12 needs texts.
    """
    function, patch = as_features(features), result.patch
    samples = int(result.config.get("eot", 1))
    averaged = EOT(function, samples, result.config.get("form", "mean_embedding"))

    checked = function if exact is None else as_features(exact)
    given = images if exact is None else images.double()

    def fixed(content: Tensor) -> Tensor:
        seed = torch.Generator().manual_seed(0)
        return goal(checked(patch.apply(given, seed, content=content), generator=seed)).mean()

    def gradient(content: Tensor) -> Callable[[torch.Generator], Tensor]:
        def of(generator: torch.Generator) -> Tensor:
            x = content.clone().requires_grad_(True)
            outputs = averaged(patch.apply(images, generator, content=x), generator=generator)
            return torch.autograd.grad(goal(outputs).mean(), x)[0]

        return of

    inner = (0.05 + 0.9 * patch.content).to(given.dtype)  # room for differences within [0, 1]
    slopes = s4_finite_differences(fixed, inner, directions=directions)
    if exact is not None:
        slopes = replace(slopes, note=f"{slopes.note}, exact function in float64")
    checks = [slopes]
    if start is not None:
        checks.append(s5_agreement(gradient(start.content), "step 0"))
    checks += [
        s5_agreement(gradient(patch.content), "final patch")
        if middle is None
        else s5_agreement(gradient(middle.content), "half of the run"),
        s8_converged(result.losses),
        s9_zero_gradient(features, images, patch, goal, draws),
        s10_same_forward(features, evaluation, patch.apply(images, torch.Generator())),
        s11_seeds(seeds),
    ]
    if captions and queries:
        checks.append(s12_text_leak(captions, queries))
    return checks


def complete(checks: Iterable[Check]) -> list[Check]:
    """S1 to S12 in order; what is missing appears as not measured."""
    found: dict[str, list[Check]] = {}
    for check in checks:
        if check.name not in TITLES:
            raise ValueError(f"unknown check {check.name!r}: names are S1 to S12")
        found.setdefault(check.name, []).append(check)
    out: list[Check] = []
    for name in TITLES:
        out += found.get(name) or [Check(name, None, None, None, "not measured")]
    return out


def records(checks: Iterable[Check]) -> list[dict[str, Any]]:
    """:func:`complete` as plain data with titles, for an evaluation record."""
    return [{"title": TITLES[c.name], **asdict(c)} for c in complete(checks)]


def trustworthy(checks: Iterable[Check]) -> bool:
    """All twelve measured and passed; a table shows other results in grey."""
    return all(c.passed is True for c in complete(checks))
