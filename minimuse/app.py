"""`minimuse app`: a page to play with, on your own machine, over the public API alone (extra `app`).

Draw: a prompt's decoding as it happens. Edit: repaint what is painted over, extend a side (Muse 3.3.1), change the
whole without a mask (3.3.2). Tokens, mask and decoded picture appear step by step; a slider then goes back through
them. What is saved holds its settings: `minimuse generate --like image.png` draws it again.

Nothing is fetched from elsewhere and nothing is reported: the fonts are the system's, gradio's telemetry is off. One
picture is drawn at a time; who comes meanwhile waits in a queue.
"""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from minimuse.checkpoint import shipped
from minimuse.masking import SCHEDULES
from minimuse.muse import Muse
from minimuse.pictures import KEY, open_picture
from minimuse.plots import film, mask_overlay, token_map
from minimuse.sampler import ORDERS, Step

Draw = Callable[[Callable[[Step], None]], list[Image.Image]]  # takes `watch`, as the methods of Muse do
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


def follow(draw: Draw) -> Iterator[Step | Image.Image]:
    """Each Step as soon as it is made, at last the picture; an error of `draw` is raised here.

    It runs in a thread of its own, and stops at its next step when nobody follows any longer.
    """
    steps, left = SimpleQueue(), Event()

    def watch(step: Step) -> None:
        if left.is_set():
            raise CancelledError
        steps.put(step)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(draw, watch)
        job.add_done_callback(steps.put)
        try:
            while (step := steps.get()) is not job:
                yield step
        finally:
            left.set()
    yield job.result()[0]


def painted(canvas: dict[str, Any] | None, side: int, zoom: int) -> np.ndarray:
    """The editor's layers, `zoom` times as large -> bool (side, side): True where a pixel is painted on, if in part."""
    mask = np.zeros((side, side), dtype=bool)
    for layer in (canvas or {}).get("layers", []):
        alpha = layer.getchannel("A").resize((side * zoom, side * zoom), Image.Resampling.NEAREST)
        mask |= (np.asarray(alpha) > 127).reshape(side, zoom, side, zoom).any((1, 3))
    if not mask.any():
        raise ValueError("The mask is empty: paint over the part that shall be drawn anew")
    return mask


def begun(start: Image.Image | None) -> Image.Image:
    if start is None:
        raise ValueError("There is no picture to edit yet: load one, or draw one and take it")
    return start


def saveable(image: Image.Image, told: dict[str, Any]) -> Image.Image:
    """A copy whose settings gradio keeps in the PNG."""
    image = image.copy()
    image.info = {KEY: json.dumps(told)}
    return image


class Page:
    """A Muse -> what the page's buttons do; `build` makes the page.

    Those that draw take prompt, seed, negative prompt and dials last, and yield what the page shows after each step:
    picture, tokens, a sentence, the film, the slider, and what the slider goes back through.
    """

    def __init__(self, muse: Muse):
        self.gr, self.muse, self.side = _gradio(), muse, muse.cfg.high_tokenizer.image_size
        self.zoom = max(1, 384 // self.side)  # of the picture to edit: a brush needs room

    def draw(self, *asked) -> Iterator[tuple]:
        yield from self._show(asked, self.muse.generate)

    def repaint(self, start, canvas, *asked) -> Iterator[tuple]:
        def job(prompt, **how):
            return self.muse.inpaint(begun(start), painted(canvas, self.side, self.zoom), prompt, **how)

        yield from self._show(asked, job)

    def extend(self, start, where, by, *asked) -> Iterator[tuple]:
        padding = tuple(by * (where == side) for side in SIDES)
        yield from self._show(asked, lambda prompt, **how: self.muse.outpaint(begun(start), padding, prompt, **how))

    def change(self, start, iterations, share, guidance, *asked) -> Iterator[tuple]:
        """A picture and the dials of a mask-free edit -> what the page shows, an iteration at a time."""
        settings = {"iterations": iterations, "share": share, "guidance": guidance}

        def job(prompt, *, seed, negative_prompt, superres, watch, **_):
            how = {"seed": seed, "negative_prompt": negative_prompt, "superres": superres, "watch": watch}
            return self.muse.edit(begun(start), prompt, **settings, **how)

        yield from self._show(asked, job)

    def load(self, path) -> tuple:
        """An upload -> the picture to edit, as it is and enlarged."""
        try:
            return self._start(open_picture(path, self.side))
        except ValueError as error:
            self.gr.Warning(str(error), duration=None)
            return (self.gr.skip(),) * 2

    def take(self, last) -> tuple:
        """The picture that was drawn last -> the same."""
        return self._start(last[1]) if last else (self.gr.skip(),) * 2

    def look_back(self, last, at) -> tuple:
        """The slider -> picture, tokens, sentence of that step; behind the last step stands the picture itself."""
        if not last:  # it is an hour old, and forgotten
            return (self.gr.skip(),) * 3
        steps, made = last
        if at <= len(steps):
            return self._frame(steps[at - 1])
        told = made.info[KEY]
        return saveable(made, told), token_map(steps[-1]), f"**Done**, seed {told['seed']}"

    def _show(self, asked: tuple, job: Callable[..., list[Image.Image]]) -> Iterator[tuple]:
        (prompt, seed, negative, *dials), steps, same = asked, [], self.gr.skip()
        how = {"seed": seed, "negative_prompt": negative or None} | self._settings(*dials)
        yield same, same, "**Reading the prompt**", same, same, same
        try:
            for made in follow(lambda watch: job(prompt, watch=watch, **how)):
                if isinstance(made, Step):
                    steps.append(made)
                    yield *self._frame(made), same, same, same
        except (ValueError, TypeError) as error:
            self.gr.Warning(str(error), duration=None)
            yield same, same, f"**Nothing was drawn.** {error}", same, same, same
            return
        told, end = made.info[KEY], len(steps) + 1
        strip = self.gr.Image(saveable(film(self.muse, steps), told), visible=True)
        slider = self.gr.Slider(maximum=end, value=end, visible=True)
        sentence = f"**Done** in {len(steps)} steps, seed {told['seed']}. {self.muse.unfamiliar(prompt)}"
        yield saveable(made, told), same, sentence, strip, slider, (steps, made)

    def _settings(self, first, final, steps, high_steps, schedule, order) -> dict[str, Any]:
        """The dials -> every setting of both decodes. What is not moved is the checkpoint's, in each decode its own."""
        base, high = asdict(self.muse.cfg.base_sampling), asdict(self.muse.cfg.superres_sampling)
        given = {"guidance": (first, final), "steps": steps, "schedule": schedule, "order": order}
        moved = {k: v for k, v in given.items() if v != base[k]}
        if "order" in moved:  # then the ranking noise is `Muse`'s to choose
            del base["choice_temperature"], high["choice_temperature"]
        return base | moved | {"superres": high | moved | {"steps": high_steps}}

    def _frame(self, step: Step) -> tuple[Image.Image, Image.Image, str]:
        drawn, masked, tokens = int(step.revealed[0].sum()), int(step.masked[0].sum()), step.tokens.shape[1]
        numbers = f"{drawn} of {tokens} tokens drawn, {masked} still masked, guidance {step.guidance:.1f}"
        picture = mask_overlay(self.muse.picture(step)[0], step.masked[0])
        return picture, token_map(step), f"**{STAGES[step.stage]}, step {step.index + 1}**: {numbers}"

    def _start(self, image: Image.Image) -> tuple[Image.Image, Image.Image]:
        square = ImageOps.fit(image, (self.side, self.side))
        return square, square.resize((self.side * self.zoom,) * 2, Image.Resampling.NEAREST)

    # --- how it looks -------------------------------------------------------------------------------------------------

    def build(self):
        """-> gradio's Blocks. Its events have names, so that programs may call them: /draw, /load, /repaint, ..."""
        gr, muse = self.gr, self.muse
        with gr.Blocks(title="minimuse", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            start, last = gr.State(time_to_live=3600), gr.State(time_to_live=3600)
            gr.Markdown(ABOUT.format(muse.cfg.name, self.side, self.side))
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
                        edits = self._edits(start, last, tab)
                    with gr.Accordion("How it decodes", open=False):
                        asked = [prompt, seed, *self._dials()]
                with gr.Column(scale=3, min_width=320):
                    shown = [*self._shown(last), last]
            queued = {"concurrency_id": "muse", "concurrency_limit": 1, "show_progress_on": shown[2]}
            gr.on([go.click, prompt.submit], self.draw, asked, shown, api_name="draw", **queued)
            more = another.click(lambda n: (n or 0) + 1, seed, seed, api_name=False)
            more.then(self.draw, asked, shown, api_name=False, **queued)
            for button, method, inputs in edits:
                button.click(method, [*inputs, *asked], shown, api_name=method.__name__, **queued)
        return blocks

    def _edits(self, start, last, tab) -> list[tuple]:
        """The tab of edits -> its buttons, what each does, and with what."""
        gr = self.gr
        with gr.Row():
            taken = gr.Button("Take the drawn picture", size="sm", min_width=120)
            loaded = gr.UploadButton("Load a picture", file_types=["image"], size="sm", min_width=120)
        canvas = gr.ImageEditor(
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
            share = gr.Slider(0.01, 0.5, 0.08, step=0.01, label="Share of the tokens, each time")
            guidance = gr.Slider(0, 10, 4, step=0.5, label="Guidance")
            change = gr.Button("Change", variant="primary")
        loaded.upload(self.load, loaded, [start, canvas], api_name="load")
        taken.click(self.take, last, [start, canvas], api_name=False)
        tab.select(lambda old, last: self.take(None if old else last), [start, last], [start, canvas], api_name=False)
        return [
            (repaint, self.repaint, [start, canvas]),
            (extend, self.extend, [start, where, by]),
            (change, self.change, [start, iterations, share, guidance]),
        ]

    def _dials(self) -> list:
        gr, base, high = self.gr, self.muse.cfg.base_sampling, self.muse.cfg.superres_sampling
        return [
            gr.Textbox(label="Negative prompt"),
            gr.Slider(0, 10, base.guidance[0], step=0.5, label="Guidance at the first step"),
            gr.Slider(0, 10, base.guidance[1], step=0.5, label="Guidance at the last step"),
            gr.Slider(1, 64, base.steps, step=1, label="Steps of the base model"),
            gr.Slider(1, 64, high.steps, step=1, label="Steps of super-resolution"),
            gr.Dropdown([*SCHEDULES, "log"], value=base.schedule, label="Schedule: how many tokens a step"),
            gr.Dropdown([*ORDERS], value=base.order, label="Order: which tokens first"),
        ]

    def _shown(self, last) -> list:
        gr, look = self.gr, {"format": "png", "buttons": ["download", "fullscreen"], "min_width": 140}
        status = gr.Markdown("Press *Draw*.", elem_id="status")
        with gr.Row():
            picture = gr.Image(label="Picture", elem_id="picture", elem_classes="pixels", **look)
            tokens = gr.Image(label="Tokens", elem_id="tokens", elem_classes="pixels", **look)
        gr.Markdown(LEGEND)
        scrub = gr.Slider(1, 2, 2, step=1, label="Back through the steps", elem_id="scrub", visible=False)
        strip = gr.Image(label="Film", elem_id="film", elem_classes="film", visible=False, **look)
        gr.Markdown(SAVED)
        outputs, light = [picture, tokens, status], {"show_progress": "hidden", "trigger_mode": "always_last"}
        scrub.input(self.look_back, [last, scrub], outputs, api_name=False, **light)
        return [*outputs, strip, scrub]


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
    print(f"minimuse: {muse.cfg.name} is at {url} ; Ctrl-C stops it", flush=True)
    blocks.block_thread()


def _gradio():
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise ImportError('the app needs gradio: pip install "minimuse[app]"') from error
    return gradio
