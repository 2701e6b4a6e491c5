"""The page for people: attack a picture, watch the defense, search. Gradio, without internet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pair.images import ImageError
from pair.pages import render
from pair.serve.scene import KINDS, PLACES, Scene

if TYPE_CHECKING:
    from pair.serve.app import Service
    from pair.serve.settings import Keys

STEPS = 60
UPLOAD = 16 * 2**20
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
footer { display: none !important; }
#samples .gallery { display: grid; grid-template-columns: repeat(6, 1fr); gap: .4rem; }
#samples .gallery-item, #samples .gallery-item span, #samples .gallery-item .container {
  display: block; width: 100%; height: auto; margin: 0; padding: 0; aspect-ratio: 1;
  overflow: hidden; }
#samples .gallery-item img { width: 100%; height: 100%; max-width: none; object-fit: cover; }
.gradio-container :is(input, textarea, button, a):focus-visible {
  outline: 2px solid #3b82f6 !important; outline-offset: 2px !important; }
.gradio-container input[type=range]::-webkit-slider-thumb { border: 1px solid #6b7280; }
.gradio-container :is(.min_value, .max_value) { color: var(--body-text-color-subdued) !important; }
.pair-lab .say { margin: .3rem 0; color: var(--body-text-color); }
.pair-lab h3 { margin: 1.2rem 0 .2rem; font-size: 1.05rem; }
.pair-lab figure { margin: 0; }
.pair-lab figcaption { font-size: .8rem; line-height: 1.3; margin-top: .25rem;
  color: var(--body-text-color); overflow-wrap: anywhere; }
.pair-lab img { width: 100%; aspect-ratio: 1; display: block; border-radius: 6px;
  border: 3px solid transparent; margin: 0; }
.pair-lab ul.steps { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr));
  gap: .7rem; list-style: none; margin: .6rem 0; padding: 0; }
.pair-lab ul.steps li { margin: 0; }
.pair-lab .hits { display: grid; grid-template-columns: repeat(8, 1fr); gap: .5rem; }
.pair-lab .own img { border-color: #d9453a; }
.pair-lab .own figcaption { color: #d9453a; font-weight: 600; }
.pair-lab .relevant img { border-color: #2a9d63; }
.pair-lab .relevant figcaption { color: #2a9d63; }
.pair-lab .bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); }
.pair-lab .bar i { display: block; height: 6px; border-radius: 3px; background: #2f7fb8; }
@media (max-width: 720px) { .pair-lab .hits { grid-template-columns: repeat(4, 1fr); } }
"""
SCROLL = """() => document.querySelector("#result").scrollIntoView(
  { behavior: "smooth", block: "start" })"""
# Gradio names every sample "submit". Tab in a list opens it again on the way out, and goes into the
# list, which then disappears.
POLISH = """() => {
  const each = (what, act) => document.querySelectorAll(what).forEach(act);
  const mend = () => {
    each("#samples .gallery-item", (s, i) => s.setAttribute("aria-label", `sample ${i + 1}`));
    each("ul[role=listbox]", u => { u.tabIndex = -1; });
  };
  new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
  mend();
  document.addEventListener("keydown", e => {
    if (e.key === "Tab" && e.target.getAttribute("role") === "combobox") e.stopPropagation();
  }, true);
}"""
ABOUT = """# Attack a picture, watch the defense

Choose a picture and a patch, and say for which search the picture shall appear. The attack then
optimises the patch until an undefended search finds your picture for those words. PAIR rebuilds
every picture twice from half of itself, so that no pixel of the patch survives.

Small models on CPU: what you see is the method, not what the largest models do. An attacker who
*knows* the defense does better; try the box.
"""


def run(
    scene: Scene,
    photo: str | None,
    kind: str,
    text: str,
    own: str | None,
    size: float,
    place: str,
    words: str,
    steps: int,
    knows: bool,
    attack: bool,
) -> Iterator[str]:
    """One turn of the lab as HTML, growing; the page is nothing but inputs around this."""
    if not photo:
        raise ValueError("choose a picture first")
    if not words.strip():
        raise ValueError("write what the search looks for")
    image = scene.picture(photo)
    patch = scene.patch(kind, text, scene.picture(own) if own else None, size, place)
    shown: list[tuple[str, Tensor]] = [("original", image)]
    attacked = patch.apply(image[None])[0]
    yield fragment([*shown, ("with the patch", attacked)], progress="starting", share=0)
    if attack:
        every = max(1, steps // 20)
        for frame in scene.attack(image, patch, words, steps=steps, knows=knows):
            attacked = frame.picture
            if frame.step % every == 0:
                told = f"attack: step {frame.step} of {frame.steps}, loss {frame.loss:.3f}"
                share = 100 * frame.step / max(1, frame.steps)
                yield fragment([*shown, ("attacked", attacked)], progress=told, share=share)
    shown.append(("attacked" if attack else "with the patch", attacked))
    passes = scene.passes(attacked)
    shown += [
        ("what pass 1 sees", passes.seen_first),
        ("pass 1", passes.first),
        ("what pass 2 sees", passes.seen_second),
        ("pass 2: purified", passes.second),
    ]
    yield fragment(shown, progress="searching; the first time, the gallery is purified", share=100)
    shown.append(("what the search depends on", scene.heat(attacked, words)))
    count = len(scene.labels) + 1
    found = [("Search without defense", scene.search(attacked, words, defended=False))]
    yield fragment(shown, found, words, count, progress="searching with PAIR", share=100)
    found.append(("Search with PAIR", scene.search(attacked, words, defended=True)))
    yield fragment(shown, found, words, count)


def fragment(
    steps: list[tuple[str, Tensor]],
    searches: Any = (),
    words: str = "",
    count: int = 0,
    *,
    progress: str = "",
    share: float = 0.0,
) -> str:
    return render(
        "lab",
        steps=steps,
        searches=searches,
        words=words,
        count=count,
        progress=progress,
        share=round(share),
    )


def page(scene: Scene) -> Any:
    """The Gradio blocks. Raises ``ValueError`` where Gradio is missing or too old."""
    gradio = _library()
    labels = sorted(set(scene.labels))

    def turn(attack: bool) -> Any:
        def act(*inputs: Any) -> Iterator[str]:
            try:
                yield from run(*(scene, *inputs, attack))
            except (ImageError, ValueError) as error:
                told = getattr(error, "reason", str(error))
                raise gradio.Error(told, duration=8, print_exception=False) from error

        return act

    with gradio.Blocks(title="pair: the lab", analytics_enabled=False) as blocks:
        gradio.Markdown(ABOUT)
        with gradio.Row():
            with gradio.Column(min_width=280):
                photo = gradio.Image(
                    label="Picture", type="filepath", image_mode=None, height=260,
                    sources=["upload", "clipboard"], buttons=[], elem_id="photo",
                )  # fmt: skip
                if scene.samples:
                    gradio.Examples(
                        [[str(path)] for path in scene.samples], photo,
                        label="Or one of these", elem_id="samples",
                    )  # fmt: skip
            with gradio.Column(min_width=280):
                kind = gradio.Radio(list(KINDS), value=KINDS[0], label="Patch")
                text = gradio.Textbox(label="Text on it", max_length=80, elem_id="text")
                own = gradio.Image(
                    label="Your patch", type="filepath", image_mode=None, height=160,
                    sources=["upload"], buttons=[], visible=False, elem_id="own",
                )  # fmt: skip
                size = gradio.Slider(0.1, 0.5, 0.35, step=0.05, label="Side, as a share")
                place = gradio.Dropdown(
                    list(PLACES), value="top-right", label="Place", filterable=False,
                    elem_id="place",
                )  # fmt: skip
            with gradio.Column(min_width=280):
                words = gradio.Dropdown(
                    labels, value="laptop" if "laptop" in labels else labels[0],
                    label="The search that shall find it", allow_custom_value=True,
                    elem_id="words",
                )  # fmt: skip
                steps = gradio.Slider(10, 200, STEPS, step=10, label="Steps of the attack")
                knows = gradio.Checkbox(label="The attacker knows the defense (slower)")
                start = gradio.Button("Attack and search", variant="primary", elem_id="attack")
                plain = gradio.Button("Search without an attack", elem_id="search")
                halt = gradio.Button("Stop", variant="stop", elem_id="stop")
        result = gradio.HTML(elem_id="result", padding=False)
        kind.change(
            lambda chosen: (
                gradio.update(visible=chosen in ("QR code", "text")),
                gradio.update(visible=chosen == "own picture"),
            ),
            kind,
            [text, own],
            show_progress="hidden",
        )
        inputs = [photo, kind, text, own, size, place, words, steps, knows]
        shared = {"concurrency_limit": 1, "concurrency_id": "models", "show_progress": "hidden"}
        running = [
            button.click(turn(attack), inputs, result, **shared)
            for button, attack in ((start, True), (plain, False))
        ]
        halt.click(None, cancels=running)
        for button in (start, plain):
            button.click(None, js=SCROLL)
        blocks.load(None, js=POLISH)
    return blocks


def options() -> dict[str, Any]:
    """How the page looks, for ``launch`` and ``mount_gradio_app``. Fonts of the system only."""
    gradio = _library()
    plain = ["system-ui", "sans-serif"]
    theme = gradio.themes.Base(
        font=plain, font_mono=["ui-monospace", "monospace"], primary_hue="blue"
    ).set(body_text_color_subdued="*neutral_500")
    return {"theme": theme, "css": CSS, "max_file_size": UPLOAD, "ssr_mode": False}


def launch(scene: Scene, host: str, port: int, *, open_browser: bool = False) -> None:
    """Serve the page alone, until it is interrupted."""
    blocks = page(scene)
    blocks.queue(max_size=16).launch(
        server_name=host,
        server_port=port or None,
        share=False,
        inbrowser=open_browser,
        quiet=True,
        allowed_paths=[str(path) for path in scene.samples],
        **options(),
    )


def mount(service: Service, keys: Keys, scene: Scene | None = None) -> None:
    """Put the page under /lab of a service; with keys, one of them is the password."""
    gradio = _library()
    scene = scene or Scene.load()
    login = {}
    if keys:
        login = {
            "auth": lambda name, key: keys.owner(key) == name,
            "auth_message": "Name and API key.",
        }
    blocks = page(scene).queue(max_size=16)
    allowed = [str(path) for path in scene.samples]
    gradio.mount_gradio_app(
        service.api, blocks, path="/lab", allowed_paths=allowed, **login, **options()
    )


def _library() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gradio
    except ImportError as error:
        raise ValueError("the lab needs Gradio: pip install 'pair-retrieval[lab]'") from error
    if int(gradio.__version__.partition(".")[0]) < 6:
        raise ValueError(
            f"the lab needs Gradio 6, this is {gradio.__version__}: "
            "pip install 'pair-retrieval[lab]'"
        )
    return gradio
