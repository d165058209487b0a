"""`minimuse app`: a page to draw and edit on your own machine, built on the public API (extra `app`).

The page uses no network. Other sites can neither read nor use it (`guard`). One picture is drawn at a time.
Not here: how pictures are made (`muse.py`) and saved (`pictures.py`).
"""

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from threading import Event
from time import monotonic
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from minimuse.lab_optimum import trial
from minimuse.masking import SCHEDULES
from minimuse.muse import Muse
from minimuse.pictures import open_picture, settings_of, with_settings
from minimuse.plots import film, mask_overlay, token_map
from minimuse.sampler import ORDERS, Step
from minimuse.utils import explain, require

STAGES = {"base": "Base model", "superres": "Super-resolution"}
SIDES = ("left", "top", "right", "bottom")
REQUEST = 2**26  # bytes that one request may send
HOUR = 2**29  # and all requests of an hour
ABOUT = """# minimuse
A prompt becomes a picture token by token ([Muse](https://arxiv.org/abs/2301.00704)). All tokens start masked (gray).
Each step keeps the most confident predictions. This is `{}`, {} x {} pixels."""
LEGEND = """Left: the picture so far. Right: its tokens, one color per code. Gray is masked, framed is new in this step.
Saved pictures hold their settings. `minimuse generate --like image.png` draws the same picture again, unless it was
edited."""
CSS = """
.pixels .image-frame, .film .image-frame { width: 100%; padding-top: 40px }
.pixels .image-frame img { width: 100%; height: auto; object-fit: contain; image-rendering: pixelated }
.film .image-frame { overflow-x: auto; justify-content: start }
.film .image-frame img { width: auto; max-width: none; height: 165px; object-fit: contain }
"""


def follow(draw: Callable[..., list[Image.Image]]) -> Iterator[Step | Image.Image]:
    """A method of Muse, called with `callback` -> each Step as soon as it is made, then the picture.

    The method runs in its own thread, and stops at its next step when this iterator is closed. Errors are raised here.
    """
    steps, closed = SimpleQueue(), Event()

    def callback(step: Step) -> None:
        if closed.is_set():
            raise CancelledError
        steps.put(step)

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(draw, callback=callback)
        job.add_done_callback(steps.put)
        try:
            yield from iter(steps.get, job)
        finally:
            closed.set()
    yield job.result()[0]


def painted(layers: Sequence[Image.Image], side: int) -> np.ndarray:
    """Transparent layers over an enlarged picture -> (side, side) bool, True where a part of the pixel is painted."""
    mask = np.zeros((side, side), dtype=bool)
    for layer in layers:
        opaque = layer.getchannel("A").point(lambda alpha: 255 * (alpha > 127))
        mask |= np.asarray(opaque.resize((side, side), Image.Resampling.BOX)) > 0
    require(mask.any(), "The mask is empty: paint over the part to draw again")
    return mask


def guard(app: Callable, host: str) -> Callable:
    """An ASGI app -> the same, but it refuses foreign hosts (DNS rebinding), foreign origins and many uploads.

    `host` is where the page was started. 0.0.0.0 means every address of this machine: any IP address is accepted.
    """
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import PlainTextResponse

    names = {f"[{host}]" if ":" in host else host.lower(), "localhost", "127.0.0.1", "[::1]", socket.gethostname()}
    any_address = host in ("0.0.0.0", "::")
    received: list[tuple[float, int]] = []  # when a request came, and its bytes

    def problem(method: str, headers: Mapping[str, str]) -> str:
        name = re.sub(r":\d*$", "", headers.get("host", "")).lower()
        if name not in names and not (any_address and re.fullmatch(r"[\d.]+|\[[\da-f:.]+\]", name)):
            return f"This page is not at {name!r}: open it at the printed address, or start it with --host"
        if headers.get("origin", f"http://{name}").partition("://")[2] not in (name, headers["host"]):
            return "Another site may not use this page"
        if method == "POST":
            size = int(headers.get("content-length", REQUEST + 1))
            received[:] = [(when, n) for when, n in received if monotonic() - when < 3600]
            if size > REQUEST or sum(n for _, n in received) + size > HOUR:
                return f"At most {REQUEST:,} bytes fit in a request, of a stated length, and {HOUR:,} in an hour"
            received.append((monotonic(), size))
        return ""

    async def guarded(scope: dict, receive: Callable, send: Callable) -> None:
        refusal = scope["type"] == "http" and problem(scope["method"], Request(scope).headers)
        with suppress(ClientDisconnect):  # nobody waits for the answer
            await (PlainTextResponse(refusal, 403) if refusal else app)(scope, receive, send)

    return guarded


class Page:
    """A Muse -> a page. `build` lays it out; the other public methods are what its buttons do.

    Those that draw take prompt, seed, negative prompt and sampling controls last. They yield what changes on the page.
    """

    def __init__(self, muse: Muse):
        import gradio

        self.gr = gradio
        self.muse = muse
        self.side = muse.config.high_tokenizer.image_size
        self.zoom = max(1, 384 // self.side)  # the picture to edit is enlarged, so a brush has room

    def draw(self, *request: Any) -> Iterator[dict]:
        yield from self._run(self.muse.generate, request)

    def repaint(self, start: Any, canvas: Any, *request: Any) -> Iterator[dict]:
        """Inpaint what the user painted on the canvas."""
        layers = (canvas or {}).get("layers", [])
        inpaint = self.muse.inpaint
        yield from self._run(lambda *a, **k: inpaint(start, painted(layers, self.side), *a, **k), request, start)

    def extend(self, start: Any, where: str, by: int, *request: Any) -> Iterator[dict]:
        padding = tuple(by * (where == side) for side in SIDES)
        yield from self._run(partial(self.muse.outpaint, start, padding), request, start)

    def change(self, start: Any, iterations: int, fraction: float, guidance: float, *request: Any) -> Iterator[dict]:
        settings = {"iterations": iterations, "fraction": fraction, "guidance": guidance}
        yield from self._run(partial(self.muse.edit, start), request, start, settings)

    def load(self, path: str) -> dict:
        """An uploaded file -> the picture to edit."""
        try:
            return self._to_edit(open_picture(path, self.side))
        except ValueError as error:
            raise self.gr.Error(str(error), duration=None, print_exception=False) from error

    def take(self, last: Any) -> dict:
        """The last drawn picture -> the picture to edit. The page forgets a drawing after an hour."""
        return self._to_edit(last[1]) if last else self.gr.skip()

    def schedule(self, *chosen: Any) -> tuple:
        """World, schedule, order, steps -> what `lab_optimum.trial` says and shows."""
        try:
            return trial(*chosen)
        except ValueError as error:
            return f"**Nothing was drawn.** {error}", None

    def look_back(self, last: Any, at: int) -> dict:
        """The slider's position -> the page at that step."""
        return last[0][at - 1] if last else self.gr.skip()

    def _run(self, method: Callable, request: tuple, start: Any = True, edit: Any = None) -> Iterator[dict]:
        """Draw with a method of Muse. `start` is the picture to edit. `edit` replaces controls in mask-free edits."""
        prompt, seed, negative, first, final, steps, high_steps, schedule, order = request
        controls = {"guidance": (first, final), "steps": steps, "schedule": schedule, "order": order}
        base, high = self.muse.config.base_sampling, self.muse.config.superres_sampling
        settings = edit or {name: value for name, value in controls.items() if value != getattr(base, name)}
        settings |= {"seed": seed, "negative_prompt": negative or None}
        if high_steps != high.steps:
            settings["superres"] = {"steps": high_steps}
        yield {self.status: "**Reading the prompt**"}
        done, shown = [], []
        try:
            require(start is not None, "There is no picture to edit yet: load one, or draw one and take it")
            for result in follow(partial(method, prompt, **settings)):
                if isinstance(result, Step):
                    done.append(result)
                    shown.append(self._show(result))
                    yield shown[-1]
        except (ValueError, TypeError) as error:
            yield {self.status: f"**Nothing was drawn.** {error}"}
            return
        info = settings_of(result)
        picture = with_settings(result, info)
        status = f"**Done** in {len(done)} steps, seed {info['seed']}. {self.muse.unfamiliar(prompt)}"
        shown.append(shown[-1] | {self.picture: picture, self.status: status})
        yield shown[-1] | {
            self.strip: self.gr.Image(with_settings(film(self.muse, done), info), visible=True),
            self.scrub: self.gr.Slider(maximum=len(shown), value=len(shown), visible=True),
            self.last: (shown, picture),
        }

    def _show(self, step: Step) -> dict:
        """A Step -> the picture so far, its tokens and a sentence."""
        new, masked, tokens = int(step.revealed[0].sum()), int(step.masked[0].sum()), step.tokens.shape[1]
        numbers = f"{new} of {tokens} tokens drawn, {masked} still masked, guidance {step.guidance:.1f}"
        picture = mask_overlay(self.muse.picture(step)[0], step.masked[0])
        status = f"**{STAGES[step.stage]}, step {step.index + 1}**: {numbers}"
        return {self.picture: picture, self.tokens: token_map(step), self.status: status}

    def _to_edit(self, image: Image.Image) -> dict:
        square = ImageOps.fit(image, (self.side, self.side))
        return {self.start: square, self.canvas: square.resize((self.side * self.zoom,) * 2, Image.Resampling.NEAREST)}

    def build(self) -> Any:
        """-> gradio's Blocks. Programs call its events by name: /draw, /load, /repaint, /extend, /change, /schedule."""
        gr, muse = self.gr, self.muse
        base, high = muse.config.base_sampling, muse.config.superres_sampling
        with gr.Blocks(title="minimuse", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            self.start, self.last = gr.State(time_to_live=3600), gr.State(time_to_live=3600)
            gr.Markdown(ABOUT.format(muse.config.name, self.side, self.side))
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    with gr.Row():
                        prompt = gr.Textbox((muse.examples or [""])[0], label="Prompt", scale=3, min_width=200)
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, min_width=90)
                    with gr.Tab("Draw"):
                        with gr.Row():
                            draw = gr.Button("Draw", variant="primary", min_width=120)
                            another = gr.Button("Next seed", min_width=120)
                        if muse.examples:
                            gr.Examples(muse.examples[:5], prompt, label="Prompts to try")
                    with gr.Tab("Edit") as tab:
                        edits = self._edits(tab)
                    with gr.Tab("Schedule") as tab:
                        chosen, use = self._schedule(tab)
                    with gr.Accordion("Decoding settings", open=False):
                        request = [
                            prompt, seed, gr.Textbox(label="Negative prompt"),
                            gr.Slider(0, 10, base.guidance[0], step=0.5, label="Guidance at the first step"),
                            gr.Slider(0, 10, base.guidance[1], step=0.5, label="Guidance at the last step"),
                            gr.Slider(1, 64, base.steps, step=1, label="Steps of the base model"),
                            gr.Slider(1, 64, high.steps, step=1, label="Steps of super-resolution"),
                            self._curves(base.schedule, "Schedule: tokens per step"),
                            gr.Dropdown([*ORDERS], value=base.order, label="Order: which tokens first"),
                        ]  # fmt: skip
                with gr.Column(scale=3, min_width=320):
                    outputs = self._outputs()
            queue = {"concurrency_id": "muse", "concurrency_limit": 1, "show_progress_on": self.status}
            more = another.click(lambda n: (n or 0) + 1, seed, seed, api_name=False)
            same = use.click(lambda *chosen: chosen, chosen, [request[i] for i in (7, 8, 5)], api_name=False)
            for trigger in (prompt.submit, more.then, same.then):
                trigger(self.draw, request, outputs, api_name=False, **queue)
            for part in dict.fromkeys([*request, *(part for _, _, inputs in edits for part in inputs)]):
                part.preprocess = partial(self._take, part, part.preprocess)
            for button, method, inputs in [(draw, self.draw, []), *edits]:
                button.click(method, [*inputs, *request], outputs, api_name=method.__name__, **queue)
        return blocks

    def _take(self, part: Any, preprocess: Callable, value: Any) -> Any:
        """What a program sends for a part of the page, preprocessed. An error is a sentence that names the part."""
        try:
            return preprocess(value)
        except Exception as error:
            why = error.message if isinstance(error, self.gr.Error) else "its type is wrong"
            raise self.gr.Error(f"{part.label}: {value!r} cannot be used. {why}", print_exception=False) from error

    def _edits(self, tab: Any) -> list[tuple]:
        """The tab of edits -> its buttons, each with its method and inputs."""
        gr = self.gr
        with gr.Row():
            take = gr.Button("Take the drawn picture", size="sm", min_width=120)
            load = gr.UploadButton("Load a picture", file_types=["image"], size="sm", min_width=120)
        self.canvas = gr.ImageEditor(
            label="To edit", type="pil", format="png", sources=(), transforms=(), layers=False, buttons=[],
            brush=gr.Brush(default_size=24, colors=["#ff2d95"], color_mode="fixed"), elem_id="canvas",
            canvas_size=(self.side * self.zoom,) * 2, fixed_canvas=True,
        )  # fmt: skip
        with gr.Tab("Repaint"):
            gr.Markdown("Paint over a part. The prompt says what to draw there.")
            repaint = gr.Button("Repaint", variant="primary")
        with gr.Tab("Extend"):
            where = gr.Radio(SIDES, value="right", label="Side")
            by = gr.Slider(8, self.side, self.side // 2, step=8, label="Pixels")
            extend = gr.Button("Extend", variant="primary")
        with gr.Tab("Change all"):
            gr.Markdown("No mask: each iteration draws a few tokens again, after the prompt.")
            iterations = gr.Slider(1, 100, 100, step=1, label="Iterations")
            fraction = gr.Slider(0.01, 0.5, 0.08, step=0.01, label="Fraction of the tokens in each iteration")
            guidance = gr.Slider(0, 10, self.muse.config.edit_guidance, step=0.5, label="Guidance")
            change = gr.Button("Change", variant="primary")
        edited = [self.start, self.canvas]
        load.upload(self.load, load, edited, api_name="load")
        take.click(self.take, self.last, edited, api_name=False)
        tab.select(lambda old, last: self.take(None if old else last), [self.start, self.last], edited, api_name=False)
        side, strength = [self.start, where, by], [self.start, iterations, fraction, guidance]
        return [(repaint, self.repaint, edited), (extend, self.extend, side), (change, self.change, strength)]

    def _curves(self, value: str, label: str) -> Any:
        return self.gr.Dropdown([*SCHEDULES, "log"], value=value, label=label, allow_custom_value=True)

    def _schedule(self, tab: Any) -> tuple[list, Any]:
        """The tab of schedules -> its schedule, order and steps, and the button that draws the prompt with them."""
        gr, world = self.gr, self.gr.Dropdown(["mixture", "chain", "potts"], value="chain", label="World")
        chosen = [
            self._curves("cosine", "Curve"), gr.Dropdown([*ORDERS], value="random", label="Order in the world"),
            gr.Slider(1, 64, 8, step=1, label="Steps in the world"),
        ]  # fmt: skip
        power = gr.Slider(0.2, 5, 2, step=0.1, label="Drag the curve: after u of the steps, 1 - u^p is masked")
        power.input(lambda p: f"pow{p:g}", power, chosen[0], api_name=False)
        use = gr.Button("Draw the prompt so")
        shown = [gr.Markdown(elem_id="counts"), gr.Plot(show_label=False, elem_id="staircase")]
        triggers = [tab.select, *(part.change for part in (world, *chosen))]
        gr.on(triggers, self.schedule, [world, *chosen], shown, api_name="schedule", trigger_mode="always_last")
        return chosen, use

    def _outputs(self) -> list:
        gr, image = self.gr, {"format": "png", "buttons": ["download", "fullscreen"], "min_width": 140}
        self.status = gr.Markdown("Press *Draw*.", elem_id="status")
        with gr.Row():
            self.picture = gr.Image(label="Picture", elem_id="picture", elem_classes="pixels", **image)
            self.tokens = gr.Image(label="Tokens", elem_id="tokens", elem_classes="pixels", **image)
        gr.Markdown(LEGEND)
        self.scrub = gr.Slider(1, 2, 2, step=1, label="Back through the steps", elem_id="scrub", visible=False)
        self.strip = gr.Image(label="Film", elem_id="film", elem_classes="film", visible=False, **image)
        shown = [self.picture, self.tokens, self.status]
        options = {"show_progress": "hidden", "trigger_mode": "always_last", "api_name": False}
        self.scrub.input(self.look_back, [self.last, self.scrub], shown, **options)
        return [*shown, self.strip, self.scrub, self.last]


def serve(name: str = "toy", *, host: str = "127.0.0.1", port: int | None = None, device: str | None = None) -> None:
    """Load a checkpoint, serve the page, print its address, until Ctrl-C. ValueError where it cannot listen."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}  # gradio reads them on import
    with explain('the app needs gradio: pip install "minimuse[app]"', ImportError, kind=ImportError):
        import gradio as gr
        from starlette.middleware import Middleware
    hint = "give an address of this machine and a free port from 1 to 65535"
    with explain(f"cannot listen on {host!r}, port {port or 'any'}; {hint}", OSError, OverflowError):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port or 0), family=family).close()
    muse = Muse.from_pretrained(name, device=device)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    blocks = Page(muse).build().queue(max_size=100)
    _, url, _ = blocks.launch(
        server_name=host, server_port=port, theme=theme, css=CSS, quiet=True, prevent_thread_lock=True, share=False,
        ssr_mode=False, run_history=False, footer_links=[], max_file_size=REQUEST, show_error=True,
        app_kwargs={"middleware": [Middleware(guard, host=host)]},
    )  # fmt: skip
    print(f"minimuse: {muse.config.name} is at {url} ; Ctrl-C stops it", flush=True)
    blocks.block_thread()
