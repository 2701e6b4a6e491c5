"""How much there is to compute: multiply-adds and bytes of both passes, per image.

Multiply-adds are those of the matrix products, attention included (twice that many floating-point
operations). Bytes are the least that must move if every product reads its inputs and writes its
output once and everything else happens on the way: weights once per batch, activations per image.
Their quotient tells what limits a machine: see the page on speed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pair.generator import GeneratorConfig


@dataclass(frozen=True)
class Work:
    """Sums for one image: multiply-adds, bytes of weights (once per batch) and of activations."""

    multiply_adds: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def intensity(self, batch: int) -> float:
        """Floating-point operations per byte in a batch of this size."""
        return 2 * self.multiply_adds / (self.weight_bytes / batch + self.activation_bytes)


def astuple(work: Work) -> tuple[int, int, int]:
    return work.multiply_adds, work.weight_bytes, work.activation_bytes


def product(rows: int, into: int, out: int, size: int = 4) -> Work:
    """A linear layer on ``rows`` tokens; ``size`` bytes a number."""
    return Work(rows * into * out, (into + 1) * out * size, rows * (into + out) * size)


def attention(asking: int, answering: int, width: int, size: int = 4) -> Work:
    """Scores and weighted sums of all heads, by a kernel that keeps the scores to itself."""
    moved = (2 * asking + 2 * answering) * width * size  # queries and result, keys and values
    return Work(2 * asking * answering * width, 0, moved)


def block(tokens: int, width: int, ratio: float, asking: int | None = None, size: int = 4) -> Work:
    """A transformer block in which ``asking`` of the tokens get a result (default: all)."""
    hidden = round(width * ratio)
    if asking is None or asking == tokens:
        asking = tokens
        work = product(tokens, width, 3 * width, size)
    else:
        work = product(tokens, width, 2 * width, size) + product(asking, width, width, size)
    work += attention(asking, tokens, width, size) + product(asking, width, width, size)
    return work + product(asking, width, hidden, size) + product(asking, hidden, width, size)


def one_pass(
    config: GeneratorConfig,
    visible: int,
    wanted: int | None = None,
    encoder: str = "drop",
    size: int = 4,
) -> Work:
    """One pass that sees ``visible`` tokens and predicts ``wanted`` of them (None: all)."""
    c, n, pixels = config, config.grid**2, 3 * config.patch_size**2
    seen = visible if encoder == "drop" else n
    work = product(seen, pixels, c.width, size)
    for _ in range(c.depth):
        work += block(seen + 1, c.width, c.mlp_ratio, size=size)
    work += product(seen + 1, c.width, c.decoder_width, size)
    for _ in range(c.decoder_depth - 1):
        work += block(n + 1, c.decoder_width, c.mlp_ratio, size=size)
    work += block(n + 1, c.decoder_width, c.mlp_ratio, wanted, size)
    return work + product(n if wanted is None else wanted, c.decoder_width, pixels, size)


def both_passes(
    config: GeneratorConfig,
    visible: int | None = None,
    encoder: str = "drop",
    output: str = "decoder",
    size: int = 4,
) -> tuple[Work, Work]:
    """What :class:`pair.purifier.Purifier` computes when ``visible`` tokens (default: half) are
    seen in the first pass and the others in the second."""
    n = config.grid**2
    seen = n - round(0.5 * n) if visible is None else visible
    if not 0 < seen < n:
        raise ValueError(f"of {n} tokens, 1 to {n - 1} can be visible, got {seen}")
    first = one_pass(config, seen, n - seen, encoder, size)
    second = one_pass(config, n - seen, seen if output == "paste" else None, encoder, size)
    return first, second


def summary(config: GeneratorConfig, encoder: str = "drop", output: str = "decoder") -> dict:
    """The figures that ``pair models show`` prints, per image in single precision."""
    first, second = both_passes(config, encoder=encoder, output=output)
    total = first + second
    return {
        "first pass": asdict(first),
        "second pass": asdict(second),
        "GFLOP per image": round(2 * total.multiply_adds / 1e9, 3),
        "operations per byte": {f"batch {b}": round(total.intensity(b), 1) for b in (1, 8, 32)},
    }
