"""What 1 million, 100 million and 1 billion pictures take, from measured rates.

    python benchmarks/sizing.py --index results/index.json --out results/sizing.json

Rows, bytes and rates come from ``benchmarks/index.py`` (small models, 112 pixels, one CPU core).
``--rate`` replaces the pictures a second of one device by one that you measured, for example of a
GPU with ``pair index add --device cuda``; ``--dim`` and ``--bits`` are those of other models.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pair.files import write_atomic

SIZES = {"1 M": 10**6, "100 M": 10**8, "1 B": 10**9}
BYTES_PER_CODE = 0.25  # of an index: one byte for four numbers of a vector
ID = 8  # bytes of a row's number in an index


def sizes(index: dict, rate: float, dim: int, bits: int) -> list[list[str]]:
    """One line per question, one column per size."""
    facts = index["facts"]
    # Raw and purified; what is not vectors (uri, hashes, metadata) as it was measured.
    vectors = 2 * (4 * dim + bits / 8)
    rest = max(0.0, facts["bytes_per_row"] - (4 * facts["dim"] + facts["bits"] / 8) * 1.3)
    table: list[list[str]] = []

    def line(name: str, value) -> None:
        table.append([name, *(value(n) for n in SIZES.values())])

    line("purify and embed, device hours", lambda n: f"{n / rate / 3600:,.1f}")
    line("devices for one day", lambda n: f"{max(1, -(-n // (rate * 86_400))):,.0f}")
    line("storage, GB", lambda n: f"{n * (vectors + rest) / 1e9:,.0f}")
    line("of which embeddings and codes, GB", lambda n: f"{n * vectors / 1e9:,.0f}")
    line("index of the embeddings, in memory when hot, GB",
         lambda n: f"{n * (dim * BYTES_PER_CODE + ID) / 1e9:,.1f}")  # fmt: skip
    line("codes alone, in memory, GB", lambda n: f"{n * bits / 8 / 1e9:,.1f}")
    writing = facts["write_rows_per_s"]
    line("writing rows, hours of one writer", lambda n: f"{n / writing / 3600:,.1f}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--index", type=Path, default=Path("results/index.json"))
    parser.add_argument("--rate", type=float, help="pictures a second of one device")
    parser.add_argument("--device", default="CPU core", help="what the rate is of")
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
        f"{rate:.1f} pictures a second on one {arguments.device} (decode, purify, embed and hash), "
        f"{facts['write_rows_per_s']:,.0f} rows a second, {facts['bytes_per_row']:.0f} bytes a row "
        f"measured; embeddings of {dim} and codes of {bits} bits, raw and purified. Computed, not "
        "measured, beyond 100,000 rows."
    )
    rows = sizes(index, rate, dim, bits)
    result = {"columns": ["pictures", *SIZES], "rows": rows, "note": note}
    write_atomic(arguments.out, (json.dumps(result, indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
