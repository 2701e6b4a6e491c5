"""The report of the demonstration in a real browser: sizes, colours, pictures, keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from browser import PROGRAM, Browser

from pair import demo
from pair.pages import render

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
BACKGROUND = "getComputedStyle(document.body).backgroundColor"


def lightness(colour: str) -> float:
    """Of 'rgb(r, g, b)', in [0, 255]."""
    return sum(int(c) for c in colour[4:-1].split(",")) / 3


def report(path: Path) -> Path:
    """As ``pair demo`` writes it, with pictures of noise."""
    noise = torch.Generator().manual_seed(0)

    def picture() -> torch.Tensor:
        return torch.rand(3, 64, 64, generator=noise)

    kinds = ("advertisement", "relevant", "target", "other")
    parts = []
    for part, systems in (("Text", 3), ("Images", 2)):
        results = {
            name: [demo.Hit(picture(), f"a long label {i}", kinds[i % 4]) for i in range(10)]
            for name in ("undefended", "PAIR", "certified")[:systems]
        }
        panel = demo.Panel("“there is a laptop in this image”", None, results)
        case = demo.Case("laptop", picture(), picture(), picture(), picture(), panel)
        rows = [demo.Row("advertisement in top 10 (irrelevant R@10)", 1.0, 95.0, 0.0, 5.0)] * 5
        parts.append(demo.Part(f"{part} search, patch 0.35 of the side", rows, [case]))
    facts = {"seed": "7", "seconds": "60", "threads": "2", "draws": "1"}
    path.write_text(render("demo", parts=parts, facts=facts), "utf-8")
    return path


def test_report_on_a_phone_in_the_dark_and_by_keyboard(tmp_path):
    pytest.importorskip("websockets")
    page = report(tmp_path / "report.html").as_uri()
    with Browser() as browser:
        shades = {}
        for width, dark in ((1100, False), (1100, True), (390, True), (390, False)):
            browser.look(width, 900, dark)
            browser.open(page)
            assert not browser.overflows(), width
            shades[dark] = lightness(browser.run(BACKGROUND))
            ink = lightness(browser.run("getComputedStyle(document.body).color"))
            assert abs(shades[dark] - ink) > 150, "text can be read"
            browser.run("document.querySelectorAll('img').forEach(i => { i.loading = 'eager' })")
            browser.wait("[...document.images].every(i => i.complete && i.naturalWidth && i.alt)")
            browser.screenshot(tmp_path / f"{width}-{dark}.png")
            assert (tmp_path / f"{width}-{dark}.png").stat().st_size > 50_000
        assert shades[True] < 60 and shades[False] > 200
        # On the phone a table is wider than the page: Tab reaches it, arrows move it.
        assert browser.run("document.querySelectorAll('.scroll').length") == 2
        browser.press("Tab", 9)
        focused = "document.activeElement"
        assert browser.run(f"{focused}.className") == "scroll"
        assert browser.run(f"{focused}.getAttribute('aria-label')")
        assert browser.run(f"{focused}.scrollWidth > {focused}.clientWidth")
        browser.press("ArrowRight", 39)
        browser.wait(f"{focused}.scrollLeft > 0")
        assert browser.outside == [] and browser.errors == []
