"""How far does TTH get against the text search that ships, undefended?

    python benchmarks/tth.py --out results/tth.json

Universal patches (0.35 of the side, top right) on ten advertisements, for keywords taken at equal
distances from the list of classes, not picked. Each is scored on held-out queries after rounding to
8 bits, among 736 photos: is any advertisement in the top 10 (the paper's irrelevant R@10), and how
many of the ten are (share)? The published settings are run by this package and, for the first
keyword, by the algorithm written out step by step (``literal.py``); then Adam without distortion,
as in the presets std to max, on the same target and on the lists themselves (``RankHinge``: each
search's tenth place is to be beaten; the attacker knows the gallery, and other searches than those
of the evaluation); then the same Adam in the centre, and with a patch of its own for every single
advertisement, which is what somebody who has one picture to push would make. With ``--pair`` those
last patches are also optimised through PAIR, one fresh mask per step, and scored on fresh masks.
The same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import literal
import torch
import torch.nn.functional as F
from adaptive import ADAM, ADS, SIZE, Search

from pair import __version__, hub
from pair.attacks import TextGoal, TTHConfig, tth
from pair.attacks.objectives import RankHinge, rank_thresholds
from pair.attacks.patch import Patch
from pair.data import embedded
from pair.data.prompts import HELD_OUT_TEMPLATES, TRAIN_TEMPLATES, sentences
from pair.files import write_atomic
from pair.images import load_batch, quantise
from pair.purifier import Purifier
from pair.retrieval.clip import SmallClip
from pair.retrieval.statistics import summarise

PUBLISHED, STEPS = "TTH, published settings", (50, 100, 200, 300)
LITERAL = "TTH, published step by step"
STRONG, STRONG_STEPS = "Adam, no distortion", (25, 50, 100, 200)
RANKS = "Adam, aiming at the tenth place"
CENTRE = "Adam, in the centre"
PAIR = "against PAIR: "
EACH, EACH_CENTRE = "Adam, a patch for each photo", "Adam, a patch for each photo, in the centre"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keywords", type=int, default=6)
    parser.add_argument("--pair", action="store_true", help="see above; takes minutes a keyword")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/tth.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clip = SmallClip.from_pretrained("clip-small").requires_grad_(False)
    photos = load_batch([path for path, _ in embedded.gallery()], SIZE)
    ads = load_batch([path for path, _ in embedded.ads()[:ADS]], SIZE)
    search = Search(clip, photos, ads, None)
    pair = Purifier.from_pretrained("pair-small").requires_grad_(False) if options.pair else None
    behind = Search(clip, photos, ads, pair) if pair else search
    classes = embedded.labels()
    keywords = classes[:: len(classes) // options.keywords][: options.keywords]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": hub.read_config(hub.resolve("clip-small"), "clip")["sha256"][:12],
        "version": __version__, "torch": torch.__version__, "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    measured: list[dict] = []
    if options.out.is_file():
        found = json.loads(options.out.read_text())
        if found["facts"] != facts:
            raise SystemExit(f"{options.out} is of other models or versions: delete it")
        measured = found["measured"]

    def known(keyword, attack):
        return any((m["keyword"], m["attack"]) == (keyword, attack) for m in measured)

    def note(keyword, attack, steps, images, goal, queries):
        with torch.no_grad():
            loss = float(goal(clip.encode_image(images)).mean())
        found = {k: v[0] for k, v in search.found(quantise(images), queries).items()}
        measured.append({"keyword": keyword, "attack": attack, "steps": steps, "loss": loss,
                         **found})  # fmt: skip
        print(json.dumps(measured[-1]), flush=True)

    for number, keyword in enumerate(keywords):
        with torch.no_grad():
            target = clip.encode_text(sentences([keyword], TRAIN_TEMPLATES)).mean(0)
            queries = F.normalize(clip.encode_text(sentences([keyword], HELD_OUT_TEMPLATES)), dim=1)
            texts = clip.encode_text(sentences([keyword], TRAIN_TEMPLATES))
        goal = TextGoal(target)
        if not known(keyword, "no patch"):
            note(keyword, "no patch", 0, ads, goal, queries)
        strong = TTHConfig(**{**vars(ADAM), "steps": STRONG_STEPS[-1], "lr": 0.03,
                           "schedule": "cosine", "snapshots": STRONG_STEPS})  # fmt: skip
        runs = {
            PUBLISHED: (goal, TTHConfig(steps=STEPS[-1], snapshots=STEPS)),
            STRONG: (goal, strong),
            RANKS: (RankHinge(texts, rank_thresholds(texts, search.gallery, 10)), strong),
            CENTRE: (goal, replace(strong, placement="centre")),
            EACH: (goal, replace(strong, scope="per-image")),
            EACH_CENTRE: (goal, replace(strong, scope="per-image", placement="centre")),
        }
        for name, (aim, config) in runs.items():
            if known(keyword, name):
                continue
            result = tth(clip, ads, aim, config=config,
                         generator=torch.Generator().manual_seed(1))  # fmt: skip
            if config.scope == "per-image":
                note(keyword, name, config.steps, result.apply(ads), goal, queries)
                continue
            for steps, patch in result.snapshots.items():
                note(keyword, name, steps, patch.apply(ads), goal, queries)
        if number == 0 and not known(keyword, LITERAL):
            start = Patch.make("qr", 0.35, SIZE)
            content, _ = literal.tth(clip.encode_image, ads, target, start.content, STEPS[-1])
            shown = start.with_content(content).apply(ads)
            note(keyword, LITERAL, STEPS[-1], shown, goal, queries)
        if options.pair:
            through_pair(behind, keyword, goal, strong, queries, known, measured)
        table = report(measured, keywords[: number + 1], facts)
        write_atomic(options.out, (json.dumps(table, indent=1) + "\n").encode())


def through_pair(search, keyword, goal, config, queries, known, measured) -> None:
    """Patches for single photos against PAIR, and what it lets through without any."""
    for name, placement in ((None, ""), (EACH, "top-right"), (EACH_CENTRE, "centre")):
        attack = PAIR + (name or "no patch")
        if known(keyword, attack):
            continue
        images, steps, loss = search.ads, 0, None
        if name:
            own = replace(config, scope="per-image", placement=placement)
            result = tth(search.features, images, goal, config=own,
                         generator=torch.Generator().manual_seed(1))  # fmt: skip
            images, steps, loss = result.apply(images), own.steps, result.losses[-1]
        found = {k: sum(v) / len(v) for k, v in search.found(quantise(images), queries).items()}
        measured.append({"keyword": keyword, "attack": attack, "steps": steps, "loss": loss,
                         **found})  # fmt: skip
        print(json.dumps(measured[-1]), flush=True)


def report(measured: list[dict], keywords: list[str], facts: dict) -> dict:
    rows = []
    for attack, steps in (
        ("no patch", 0), *((PUBLISHED, s) for s in STEPS), *((STRONG, s) for s in STRONG_STEPS),
        *((name, s) for name in (RANKS, CENTRE, EACH, EACH_CENTRE) for s in STRONG_STEPS),
        (f"{PAIR}no patch", 0), *((PAIR + name, STRONG_STEPS[-1]) for name in (EACH, EACH_CENTRE)),
    ):  # fmt: skip
        found = [m for m in measured if (m["attack"], m["steps"]) == (attack, steps)
                 and m["keyword"] in keywords]  # fmt: skip
        if not found:
            continue
        cells = []
        for figure in ("any", "share"):
            values = torch.tensor([m[figure] for m in found])
            s = summarise(values, [m["keyword"] for m in found], seed=0).macro
            cells.append(f"{100 * s.mean:.1f} [{100 * s.low:.1f}, {100 * s.high:.1f}]")
        reach = f"{sum(m['any'] >= 0.9 for m in found)} of {len(found)}"
        losses = [m["loss"] for m in found if m["loss"] is not None]
        loss = f"{sum(losses) / len(losses):.3f}" if losses else "–"
        rows.append([attack, str(steps), f"{steps * ADS:,}", loss, *cells, reach])
    same = {m["attack"]: m for m in measured if m["keyword"] == keywords[0]
            and m["steps"] == STEPS[-1] and m["attack"] in (PUBLISHED, LITERAL)}  # fmt: skip
    return {
        "columns": ["attack", "steps", "gradients", "loss", "any ad in top 10, %",
                    "share of ads in top 10, %", "keywords with 90 % or more"],
        "rows": rows,
        "note": (
            f"Keywords {', '.join(keywords)}; {ADS} advertisements, 5 held-out queries each, 736 "
            "photos; in brackets: 95 % bootstrap interval over keywords. Ten advertisements share "
            "ten places, so that a share of 100 % would leave no other photo."
        ),
        "tables": {"literal": {
            "columns": ["attack", "loss", "any ad, %", "share, %"],
            "rows": [[name, f"{m['loss']:.5f}", 100 * m["any"], 100 * m["share"]]
                     for name, m in same.items()],
            "note": f"Keyword {keywords[0]}, {STEPS[-1]} steps, same start.",
        }},
        "facts": facts,
        "measured": measured,
    }  # fmt: skip


if __name__ == "__main__":
    main()
