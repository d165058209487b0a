"""`minimuse app`: a page to play with, on your own machine, over the public API alone (extra `app`).

Draw: a prompt's decoding as it happens. Edit: repaint what is painted over, extend a side (Muse 3.3.1), change the
whole without a mask (3.3.2). A slider goes back through the steps. What is saved holds its settings.

Nothing is fetched from elsewhere and nothing is reported: the fonts are the system's, gradio's telemetry is off. One
picture is drawn at a time; who comes meanwhile waits in a queue.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from minimuse.checkpoint import shipped
from minimuse.masking import SCHEDULES
from minimuse.muse import Muse
from minimuse.pictures import open_picture, settings_of, with_settings
from minimuse.plots import film, mask_overlay, token_map
from minimuse.sampler import ORDERS, Step

STAGES = {"base": "Base model", "superres": "Super-resolution"}
SIDES = ("left", "top", "right", "bottom")
ABOUT = """# minimuse
A prompt becomes a picture token by token ([Muse](https://arxiv.org/abs/2301.00704)): everything starts as gray [MASK],
and the surest tokens are fixed first. This is `{}`, {} x {} pixels."""
LEGEND = "Left the picture so far, right its tokens, a colour a code. Gray is masked, framed is just drawn."
SAVED = "Saved pictures hold their settings: `minimuse generate --like image.png` draws one again, edits aside."
CSS = """
.pixels .image-frame, .film .image-frame { width: 100%; padding-top: 40px }
.pixels .image-frame img { width: 100%; height: auto; object-fit: contain; image-rendering: pixelated }
.film .image-frame { overflow-x: auto; justify-content: start }
.film .image-frame img { width: auto; max-width: none; height: 165px; object-fit: contain }
"""


def follow(draw: Callable[..., list[Image.Image]]) -> Iterator[Step | Image.Image]:
    """A method of Muse, called with `callback` -> each Step as soon as it is made, then the picture.

    The method runs in a thread of its own. It stops at its next step if nobody follows it any longer. Its error is
    raised here.
    """
    steps, left = SimpleQueue(), Event()

    def callback(step: Step) -> None:
        if left.is_set():
            raise CancelledError
        steps.put(step)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(draw, callback=callback)
        job.add_done_callback(steps.put)
        try:
            while (step := steps.get()) is not job:
                yield step
        finally:
            left.set()
    yield job.result()[0]


def painted(layers: Sequence[Image.Image], side: int, zoom: int) -> np.ndarray:
    """Transparent layers over a picture, enlarged by `zoom` -> (side, side) bool.

    True where the user painted over any part of the pixel. ValueError if nothing is painted.
    """
    mask = np.zeros((side, side), dtype=bool)
    for layer in layers:
        alpha = layer.getchannel("A").resize((side * zoom, side * zoom), Image.Resampling.NEAREST)
        mask |= (np.asarray(alpha) > 127).reshape(side, zoom, side, zoom).any((1, 3))
    if not mask.any():
        raise ValueError("The mask is empty: paint over the part to draw again")
    return mask


class Page:
    """A Muse -> a page: `build` lays it out, and the other methods are what its buttons do.

    Those that draw take prompt, seed, negative prompt and dials last, and yield after each step what changes on it.
    """

    def __init__(self, muse: Muse):
        self.gr, self.muse, self.side = _gradio(), muse, muse.config.high_tokenizer.image_size
        self.zoom = max(1, 384 // self.side)  # of the picture to edit: a brush needs room

    def draw(self, *asked) -> Iterator[dict]:
        yield from self._show(asked, lambda: self.muse.generate)

    def repaint(self, start, canvas, *asked) -> Iterator[dict]:
        layers, size = (canvas or {}).get("layers", []), (self.side, self.zoom)
        yield from self._show(asked, lambda: partial(self.muse.inpaint, _begun(start), painted(layers, *size)))

    def extend(self, start, where, by, *asked) -> Iterator[dict]:
        padding = tuple(by * (where == side) for side in SIDES)
        yield from self._show(asked, lambda: partial(self.muse.outpaint, _begun(start), padding))

    def change(self, start, iterations, fraction, guidance, *asked) -> Iterator[dict]:
        own = {"iterations": iterations, "fraction": fraction, "guidance": guidance}
        yield from self._show(asked, lambda: partial(self.muse.edit, _begun(start)), **own)

    def load(self, path) -> dict:
        """An upload -> the picture to edit, as it is and enlarged."""
        try:
            return self._start(open_picture(path, self.side))
        except ValueError as error:
            self.gr.Warning(str(error), duration=None)
            return self.gr.skip()

    def take(self, last) -> dict:
        """The picture that was drawn last -> the same."""
        return self._start(last[1]) if last else self.gr.skip()

    def look_back(self, last, at) -> dict:
        """The slider -> the page at that step; behind the last step stands the picture itself."""
        if not last:  # it is an hour old, and forgotten
            return self.gr.skip()
        steps, made = last
        if at <= len(steps):
            return self._step(steps[at - 1])
        sentence = f"**Done**, seed {settings_of(made)['seed']}"
        return {self.picture: made, self.tokens: token_map(steps[-1]), self.status: sentence}

    def _show(self, asked: tuple, begin: Callable[[], Callable], **own) -> Iterator[dict]:
        """`begin` gives the method of Muse that draws; `own`: what a mask-free edit has in place of the dials."""
        (prompt, seed, negative, *dials), steps = asked, []
        settings, how = self._settings(*dials), {"seed": seed, "negative_prompt": negative or None}
        how |= own | {"superres": settings["superres"]} if own else settings
        yield {self.status: "**Reading the prompt**"}
        try:
            for made in follow(partial(begin(), prompt, **how)):
                if isinstance(made, Step):
                    steps.append(made)
                    yield self._step(made)
        except (ValueError, TypeError) as error:
            self.gr.Warning(str(error), duration=None)
            yield {self.status: f"**Nothing was drawn.** {error}"}
            return
        told, end = settings_of(made), len(steps) + 1
        made, strip = with_settings(made, told), with_settings(film(self.muse, steps), told)
        yield {
            self.picture: made,
            self.status: f"**Done** in {len(steps)} steps, seed {told['seed']}. {self.muse.unfamiliar(prompt)}",
            self.strip: self.gr.Image(strip, visible=True),
            self.scrub: self.gr.Slider(maximum=end, value=end, visible=True),
            self.last: (steps, made),
        }

    def _settings(self, first, final, steps, high_steps, schedule, order) -> dict[str, Any]:
        """The dials -> every setting of both decodes. What is not moved is the checkpoint's, in each decode its own."""
        base, high = asdict(self.muse.config.base_sampling), asdict(self.muse.config.superres_sampling)
        given = {"guidance": (first, final), "steps": steps, "schedule": schedule, "order": order}
        moved = {k: v for k, v in given.items() if v != base[k]}
        if "order" in moved:  # then the ranking noise is `Muse`'s to choose
            del base["choice_temperature"], high["choice_temperature"]
        return base | moved | {"superres": high | moved | {"steps": high_steps}}

    def _step(self, step: Step) -> dict:
        drawn, masked, tokens = int(step.revealed[0].sum()), int(step.masked[0].sum()), step.tokens.shape[1]
        numbers = f"{drawn} of {tokens} tokens drawn, {masked} still masked, guidance {step.guidance:.1f}"
        sentence = f"**{STAGES[step.stage]}, step {step.index + 1}**: {numbers}"
        picture = mask_overlay(self.muse.picture(step)[0], step.masked[0])
        return {self.picture: picture, self.tokens: token_map(step), self.status: sentence}

    def _start(self, image: Image.Image) -> dict:
        square, large = ImageOps.fit(image, (self.side,) * 2), (self.side * self.zoom,) * 2
        return {self.start: square, self.canvas: square.resize(large, Image.Resampling.NEAREST)}

    # --- how it looks -------------------------------------------------------------------------------------------------

    def build(self):
        """-> gradio's Blocks. Its events have names, so that programs may call them: /draw, /load, /repaint, ..."""
        gr, muse = self.gr, self.muse
        with gr.Blocks(title="minimuse", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            self.start, self.last = gr.State(time_to_live=3600), gr.State(time_to_live=3600)
            gr.Markdown(ABOUT.format(muse.config.name, self.side, self.side))
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    with gr.Row():
                        prompt = gr.Textbox((muse.examples or [""])[0], label="Prompt", scale=3, min_width=200)
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53, min_width=90)
                    with gr.Tab("Draw"):
                        with gr.Row():
                            go = gr.Button("Draw", variant="primary", min_width=120)
                            another = gr.Button("Another", min_width=120)
                        if muse.examples:
                            gr.Examples(muse.examples[:5], prompt, label="Prompts to try")
                    with gr.Tab("Edit") as tab:
                        edits = self._edits(tab)
                    with gr.Accordion("How it decodes", open=False):
                        asked = [prompt, seed, *self._dials()]
                with gr.Column(scale=3, min_width=320):
                    shown = self._shown()
            queued = {"concurrency_id": "muse", "concurrency_limit": 1, "show_progress_on": self.status}
            more = another.click(lambda n: (n or 0) + 1, seed, seed, api_name=False)
            for trigger in (prompt.submit, more.then):
                trigger(self.draw, asked, shown, api_name=False, **queued)
            for button, method, inputs in [(go, self.draw, []), *edits]:
                button.click(method, [*inputs, *asked], shown, api_name=method.__name__, **queued)
        return blocks

    def _edits(self, tab) -> list[tuple]:
        """The tab of edits -> its buttons, what each does, and with what."""
        gr = self.gr
        with gr.Row():
            taken = gr.Button("Take the drawn picture", size="sm", min_width=120)
            loaded = gr.UploadButton("Load a picture", file_types=["image"], size="sm", min_width=120)
        self.canvas = gr.ImageEditor(
            label="To edit", type="pil", format="png", sources=(), transforms=(), layers=False, buttons=[],
            brush=gr.Brush(default_size=24, colors=["#ff2d95"], color_mode="fixed"), elem_id="canvas",
            canvas_size=(self.side * self.zoom,) * 2, fixed_canvas=True,
        )  # fmt: skip
        with gr.Tab("Repaint"):
            gr.Markdown("Paint over a part; the prompt says what shall stand there.")
            repaint = gr.Button("Repaint", variant="primary")
        with gr.Tab("Extend"):
            where = gr.Radio(SIDES, value="right", label="Side")
            by = gr.Slider(8, self.side, self.side // 2, step=8, label="Pixels")
            extend = gr.Button("Extend", variant="primary")
        with gr.Tab("Change all"):
            gr.Markdown("No mask: a few tokens at a time are drawn again under the prompt.")
            iterations = gr.Slider(1, 100, 100, step=1, label="Iterations")
            fraction = gr.Slider(0.01, 0.5, 0.08, step=0.01, label="Share of the tokens, each time")
            strength = self.muse.config.edit_guidance
            how = [self.start, iterations, fraction, gr.Slider(0, 10, strength, step=0.5, label="Guidance")]
            change = gr.Button("Change", variant="primary")
        edited = [self.start, self.canvas]
        loaded.upload(self.load, loaded, edited, api_name="load")
        taken.click(self.take, self.last, edited, api_name=False)
        tab.select(lambda old, last: self.take(None if old else last), [self.start, self.last], edited, api_name=False)
        side = [self.start, where, by]
        return [(repaint, self.repaint, edited), (extend, self.extend, side), (change, self.change, how)]

    def _dials(self) -> list:
        gr, base, high = self.gr, self.muse.config.base_sampling, self.muse.config.superres_sampling
        return [
            gr.Textbox(label="Negative prompt"),
            gr.Slider(0, 10, base.guidance[0], step=0.5, label="Guidance at the first step"),
            gr.Slider(0, 10, base.guidance[1], step=0.5, label="Guidance at the last step"),
            gr.Slider(1, 64, base.steps, step=1, label="Steps of the base model"),
            gr.Slider(1, 64, high.steps, step=1, label="Steps of super-resolution"),
            gr.Dropdown([*SCHEDULES, "log"], value=base.schedule, label="Schedule: how many tokens a step"),
            gr.Dropdown([*ORDERS], value=base.order, label="Order: which tokens first"),
        ]

    def _shown(self) -> list:
        gr, look = self.gr, {"format": "png", "buttons": ["download", "fullscreen"], "min_width": 140}
        self.status = gr.Markdown("Press *Draw*.", elem_id="status")
        with gr.Row():
            self.picture = gr.Image(label="Picture", elem_id="picture", elem_classes="pixels", **look)
            self.tokens = gr.Image(label="Tokens", elem_id="tokens", elem_classes="pixels", **look)
        gr.Markdown(LEGEND)
        self.scrub = gr.Slider(1, 2, 2, step=1, label="Back through the steps", elem_id="scrub", visible=False)
        self.strip = gr.Image(label="Film", elem_id="film", elem_classes="film", visible=False, **look)
        gr.Markdown(SAVED)
        now, back = [self.picture, self.tokens, self.status], [self.last, self.scrub]
        light = {"show_progress": "hidden", "trigger_mode": "always_last"}
        self.scrub.input(self.look_back, back, now, api_name=False, **light)
        return [*now, self.strip, self.scrub, self.last]


def _begun(start: Image.Image | None) -> Image.Image:
    if start is None:
        raise ValueError("There is no picture to edit yet: load one, or draw one and take it")
    return start


def serve(
    name: str | None = None, *, host: str = "127.0.0.1", port: int | None = None, device: str | None = None
) -> None:
    """Load a checkpoint (default: the last shipped one), serve the page, say where, until Ctrl-C."""
    gr, muse = _gradio(), Muse.from_pretrained(name or shipped()[-1], device=device)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks = Page(muse).build().queue(max_size=100)
    _, url, _ = blocks.launch(
        server_name=host, server_port=port, theme=theme, css=CSS, quiet=True, prevent_thread_lock=True, share=False,
        ssr_mode=False, run_history=False, footer_links=[], max_file_size="64mb",
    )  # fmt: skip
    print(f"minimuse: {muse.config.name} is at {url} ; Ctrl-C stops it", flush=True)
    blocks.block_thread()


def _gradio():
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise ImportError('the app needs gradio: pip install "minimuse[app]"') from error
    return gradio
