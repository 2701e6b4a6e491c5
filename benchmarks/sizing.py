"""What 1 million, 100 million and 1 billion pictures take, from measured rates.

    python benchmarks/sizing.py --index results/index.json --out results/sizing.json

Rows, bytes and rates come from ``benchmarks/index.py`` (small models, 112 pixels, one CPU core, in
processor time, as the machine is shared). ``--rate`` replaces the pictures a second of a device by
one that you measured, for example of a GPU with ``pair index add --device cuda``; ``--dim`` and
``--bits`` are those of other models. GPU hours are computed: operations of the models by
``pair.work``, divided by a share of the GPU's peak that is an assumption and is stated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from pair.files import write_atomic
from pair.generator import BASE
from pair.work import both_passes

SIZES = {"1 M": 10**6, "100 M": 10**8, "1 B": 10**9}
FACTORS = 16  # bytes: a row's number and the factors of its quantised vector
NUMBER = 8  # bytes of a row's number
PEAK, SHARE = 312e12, 0.4  # operations a second of an A100 (dense, 16 bit), and what is reached
VIT_B32 = 2 * 4.4e9  # operations of CLIP's image encoder ViT-B/32 on one picture


def index_bytes(dim: int, bits: int) -> dict[str, float]:
    """Per row: RaBitQ keeps a bit per number, the index of codes the codes themselves."""
    return {"embeddings": dim / 8 + FACTORS, "codes": bits / 8 + NUMBER}


def sizes(index: dict, rate: float, dim: int, bits: int) -> list[list[str]]:
    """One line per question, one column per size."""
    facts = index["facts"]

    def vectors(dim: int, bits: int) -> float:  # raw and purified
        return 2 * (4 * dim + bits / 8)

    def indexes(dim: int, bits: int) -> float:
        return 2 * sum(index_bytes(dim, bits).values())

    # What is not vectors (uri, hashes, metadata, the index of ids) as it was measured.
    known = vectors(facts["dim"], facts["bits"]) + indexes(facts["dim"], facts["bits"])
    rest = facts["bytes_per_row"] - known
    if rest < 0:
        raise SystemExit("the index benchmark's rows are smaller than their vectors: run it again")
    row = vectors(dim, bits) + indexes(dim, bits) + rest
    hot, writing = index_bytes(dim, bits), facts["write_rows_per_cpu_s"]
    paper = 2 * sum(work.multiply_adds for work in both_passes(BASE)) + 2 * VIT_B32
    lines: dict[str, Callable[[int], str]] = {
        "purify and embed with the shipped models, hours of a CPU core": (
            lambda n: f"{n / rate / 3600:,.0f}"
        ),
        "the same, cores for one day": lambda n: f"{max(1, -(-n // (rate * 86_400))):,.0f}",
        "with the paper's models (MAE Base, CLIP ViT-B/32), GPU hours, computed": (
            lambda n: f"{n * paper / (PEAK * SHARE) / 3600:,.1f}"
        ),
        "writing rows, hours of a CPU core": lambda n: f"{n / writing / 3600:,.1f}",
        "storage, GB": lambda n: f"{n * row / 1e9:,.0f}",
        "of which embeddings and codes, GB": lambda n: f"{n * vectors(dim, bits) / 1e9:,.0f}",
        "index of the purified embeddings, in memory, GB": (
            lambda n: f"{n * hot['embeddings'] / 1e9:,.2f}"
        ),
        "index of the purified codes, in memory, GB": lambda n: f"{n * hot['codes'] / 1e9:,.2f}",
    }
    return [[name, *(value(n) for n in SIZES.values())] for name, value in lines.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--index", type=Path, default=Path("results/index.json"))
    parser.add_argument("--rate", type=float, help="pictures a second of one device")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--bits", type=int)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    index = json.loads(arguments.index.read_text())
    facts = index["facts"]
    rate = arguments.rate or facts.get("photos", {}).get("per_cpu_s")
    if not rate:
        print("the index benchmark has no photos: give --rate", file=sys.stderr)
        return 2
    dim, bits = arguments.dim or facts["dim"], arguments.bits or facts["bits"]
    note = (
        f"Measured on {facts['rows']:,} rows: {rate:.1f} pictures and "
        f"{facts['write_rows_per_cpu_s']:,.0f} rows a processor second, "
        f"{facts['bytes_per_row']:.0f} bytes a row. Embeddings of {dim} and codes of {bits} bits, "
        "raw and purified. Everything beyond is multiplied out, not measured; so are the GPU "
        f"hours: operations / ({SHARE:.0%} of an A100's {PEAK / 1e12:.0f} TFLOP/s), decoding apart."
    )
    rows = sizes(index, rate, dim, bits)
    result = {"columns": ["pictures", *SIZES], "rows": rows, "note": note}
    write_atomic(arguments.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
