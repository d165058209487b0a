"""The seven diagrams of the course: boxes and arrows with the shapes of a configuration, in black and white.

    cascade(muse.config, here="base")     the whole of Muse, one box in black
    quantizer, layer, memory, decode_loop, guidance, three_models

Each returns a `Diagram`: Jupyter shows it, and stores a text that says the same to those who cannot see it.
White boxes learn, hatched ones are frozen, rounded ones are data; dashed lines belong to training.
B pictures, N tokens, L pieces of text, V codes, D width, d channels of a code, f downsampling.
"""

# ruff: noqa: RUF001 - a times sign between sizes
import io
import math
from itertools import pairwise
from typing import Any

from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from minimuse.config import MuseConfig
from minimuse.masking import reveal_counts

DPI = 100
TEXT, SMALL = 10.5, 9.5  # points
Point = tuple[float, float]
LOOKS: dict[str, dict[str, Any]] = {
    "learns": {"facecolor": "white", "lw": 1.6},
    "frozen": {"facecolor": "0.93", "lw": 1.6, "hatch": "////", "ec": "0.6"},
    "data": {"facecolor": "0.93", "lw": 0.8, "boxstyle": "round,pad=0,rounding_size=0.12"},
    "here": {"facecolor": "black", "lw": 1.6},
    "group": {"facecolor": "none", "lw": 1.2, "ls": ":"},
}


class Diagram(Image):
    """A figure as a PNG with its alternative text, which is also what a terminal shows."""

    def __init__(self, figure: Figure, alt: str):
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        super().__init__(file.getvalue(), format="png", alt=alt)
        self.figure = figure

    def __repr__(self) -> str:
        return f"[diagram: {self.alt}]"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose units are inches, (0, 0) at the lower left."""
    figure = Figure((width, height), dpi=DPI, layout="none")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(0, height))
    ax.axis("off")
    return figure, ax


def box(ax: Axes, at: Point, text: str, size: Point = (1.3, 0.6), look: str = "learns", points: float = TEXT) -> Point:
    """A box around its centre, which it returns."""
    (x, y), (w, h) = at, size
    style = {"boxstyle": "square,pad=0", "ec": "black"} | LOOKS[look]
    ax.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, **style))
    paper = {"facecolor": "0.93", "edgecolor": "none", "pad": 1.5} if look == "frozen" else None
    pen = {"color": "white" if look == "here" else "black", "fontsize": points, "linespacing": 1.25}
    ax.text(x, y, text, ha="center", va="center", bbox=paper, **pen)
    return at


def arrow(ax: Axes, *points: Point, text: str = "", at: Point | None = None, ls: str = "-", head: bool = True) -> None:
    """A line through the points with a head at the last, and a text centred `at`."""
    *bends, last = pairwise(points)
    for (x0, y0), (x1, y1) in bends:
        ax.plot([x0, x1], [y0, y1], "k", lw=1.3, ls=ls, solid_capstyle="round")
    style = "-|>,head_length=5,head_width=2.5" if head else "-"
    ax.add_patch(FancyArrowPatch(*last, arrowstyle=style, lw=1.3, ls=ls, color="black", shrinkA=0, shrinkB=0))
    if text:
        note(ax, at or (sum(p[0] for p in last) / 2, sum(p[1] for p in last) / 2 + 0.14), text)


def note(ax: Axes, at: Point, text: str, points: float = SMALL, ha: str = "center", **pen: Any) -> None:
    """A text on white."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    ax.text(*at, text, ha=ha, va="center", fontsize=points, linespacing=1.25, bbox=paper, **pen)


def tokens(ax: Axes, at: Point, side: float, fills: list[str], marks: list[str] | None = None) -> None:
    """A square grid around its centre: fills "mask" (hatched), "blank" or a gray; marks are written into the cells."""
    n = math.isqrt(len(fills))
    cell = side / n
    for i, fill in enumerate(fills):
        x, y = at[0] - side / 2 + i % n * cell, at[1] + side / 2 - (i // n + 1) * cell
        masked = {"facecolor": "white", "hatch": "xxxxx", "ec": "0.65"} if fill == "mask" else {}
        pen = {"facecolor": "white" if fill == "blank" else fill, "ec": "black"} | masked
        ax.add_patch(Rectangle((x, y), cell, cell, lw=0.6, **pen))
        ax.add_patch(Rectangle((x, y), cell, cell, lw=0.6, facecolor="none", ec="black"))
        if marks:
            ax.text(x + cell / 2, y + cell / 2, marks[i], ha="center", va="center", fontsize=TEXT)


def cascade(config: MuseConfig, here: str = "") -> Diagram:
    """All of Muse (figure 3 of the paper): how a picture is made, and, dashed, how the parts are trained.

    `here`: "text", "tokenizer", "masking", "base", "superres" or "decoder" is shown in black.
    """
    low, high, g, s = config.low_tokenizer, config.high_tokenizer, config.base.grid, config.superres.grid
    figure, ax = canvas(11, 5.3)

    def part(name: str, at: Point, text: str, size: Point = (1.5, 0.66), look: str = "learns") -> Point:
        return box(ax, at, text, size, "here" if name == here else look)

    words, masks = ["mask"] * 16, ["0.75", "0.75", "0.35", "0.75", "0.75", "0.35", "0.35", "0.75"]
    drawn = (masks[:4] + masks[4:] + ["0.55", "0.35", "0.35", "0.55"] + ["0.55"] * 4)[:16]
    y_text, y, y_train = 4.75, 3.05, 0.85
    box(ax, (0.95, y_text), '"a large red cube"', (1.6, 0.5), "data")
    part("text", (3.05, y_text), "language model\nfrozen · notebook 2", (1.75, 0.66), "frozen")
    box(ax, (5.25, y_text), f"text vectors, L × {config.base.text_width}", (1.95, 0.5), "data")
    arrow(ax, (1.75, y_text), (2.17, y_text))
    arrow(ax, (3.93, y_text), (4.27, y_text))
    columns = {"masked low": 0.6, "base": 2.15, "low": 3.85, "superres": 5.65, "high": 7.35, "decoder": 8.85}
    for name, fills in (("masked low", words), ("low", drawn)):
        tokens(ax, (columns[name], y), 0.8, fills)
    tokens(ax, (columns["high"], y), 0.8, [drawn[i // 8 // 2 * 4 + i % 8 // 2] for i in range(64)])
    part("base", (columns["base"], y), "base transformer\nnotebook 5", (1.55, 0.75))
    part("superres", (columns["superres"], y), "super-resolution\nnotebook 8", (1.55, 0.75))
    part("decoder", (columns["decoder"], y), "decoder\nnotebooks 3, 9", (1.3, 0.75))
    box(ax, (10.3, y), f"picture\n{high.image_size} px", (0.9, 0.75), "data")
    note(ax, (columns["masked low"], y - 0.66), f"all [MASK]\n{g} × {g}")
    note(ax, (columns["low"], y - 0.66), f"low tokens\n{g} × {g}")
    note(ax, (columns["high"], y - 0.66), f"high tokens\n{s} × {s}")
    for a, b in ((1.0, 1.38), (2.92, 3.45), (4.25, 4.88), (6.42, 6.95), (7.75, 8.2), (9.5, 9.85)):
        arrow(ax, (a, y), (b, y))
    arrow(ax, (5.25, 4.5), (5.25, 4.05), (2.15, 4.05), (2.15, y + 0.38))
    arrow(ax, (5.25, 4.05), (5.65, 4.05), (5.65, y + 0.38))
    note(ax, (2.25, 3.72), "in steps · notebooks 6, 7", ha="left")
    note(ax, (5.75, 3.72), f"in steps, from {s} × {s} [MASK]", ha="left")

    box(ax, (0.65, y_train), "picture\nof the data", (1.05, 0.66), "data")
    part("tokenizer", (2.3, y_train), f"low encoder\n{low.image_size} px · notebook 3", (1.7, 0.66))
    part("masking", (4.25, y_train), "hide a random part\nnotebook 4", (1.8, 0.66))
    part("tokenizer", (6.6, y_train), f"high encoder\n{high.image_size} px · notebook 3", (1.7, 0.66))
    part("masking", (8.7, y_train), "hide a random part\nnotebook 4", (1.8, 0.66))
    for a, b in ((1.18, 1.45), (3.15, 3.35), (7.45, 7.8)):
        arrow(ax, (a, y_train), (b, y_train), ls="--")
    arrow(ax, (0.65, y_train - 0.33), (0.65, 0.22), (6.6, 0.22), (6.6, y_train - 0.33), ls="--")
    arrow(ax, (4.25, y_train + 0.33), (4.25, 1.6), (2.15, 1.6), (2.15, y - 0.38), ls="--")
    arrow(ax, (8.7, y_train + 0.33), (8.7, 1.6), (5.65, 1.6), (5.65, y - 0.38), ls="--")
    note(ax, (2.25, 1.76), "learns to fill it in", ha="left")
    note(ax, (5.75, 1.76), "learns to fill it in, given the low tokens", ha="left")
    note(ax, (8.7, 0.22), "dashed: training only     hatched: frozen")
    return Diagram(
        figure,
        "The cascade of Muse. A frozen language model turns the prompt into text vectors, which both "
        f"transformers read. The base transformer starts from {g} x {g} masks and fills in the low tokens in "
        f"steps. The super-resolution transformer starts from {s} x {s} masks and reads the text and the low "
        f"tokens. The decoder turns its tokens into a picture of {high.image_size} pixels. In training, "
        "encoders turn pictures into tokens, a random part of them is hidden, and each transformer learns to "
        "fill in that part.",
    )


def quantizer(config: MuseConfig) -> Diagram:
    """A VQGAN in training: values run to the right above, gradients to the left below, past the choice."""
    tok = config.low_tokenizer
    side, g, d, v = tok.image_size, tok.grid, tok.code_dim, tok.codebook_size
    figure, ax = canvas(11, 4.7)
    y, back = 2.75, 1.1
    places = {"x": 0.6, "encoder": 1.95, "z": 3.3, "nearest": 5.0, "q": 6.75, "decoder": 8.2, "again": 9.85}
    box(ax, (places["x"], y), f"x\n3 × {side}²", (0.8, 0.7), "data")
    box(ax, (places["encoder"], y), "encoder", (1.1, 0.7))
    box(ax, (places["z"], y), f"z\n{d} × {g} × {g}", (1.0, 0.7), "data")
    box(ax, (places["nearest"], y), "the nearest code\nargmin |z - e|²", (1.55, 0.7))
    box(ax, (places["q"], y), f"q = e[k]\n{d} × {g} × {g}", (1.0, 0.7), "data")
    box(ax, (places["decoder"], y), "decoder", (1.1, 0.7))
    box(ax, (places["again"], y), f"picture again\n3 × {side}²", (1.3, 0.7), "data")
    for a, b in ((1.0, 1.4), (2.5, 2.8), (3.8, 4.22), (5.78, 6.25), (7.25, 7.65), (8.75, 9.2)):
        arrow(ax, (a, y), (b, y))
    box(ax, (places["nearest"], 4.2), f"codebook e\n{v} codes of {d} numbers", (2.3, 0.66))
    arrow(ax, (places["nearest"], 3.87), (places["nearest"], y + 0.35))
    arrow(ax, (5.5, y + 0.35), (5.5, 3.55), (6.1, 3.55))
    note(ax, (6.15, 3.55), f"tokens k, a grid of {g} × {g} whole numbers: for the transformers", ha="left")
    note(ax, (6.3, 4.2), "a code that is never the nearest never moves", ha="left")
    note(ax, (2.4, 4.25), "codebook loss |sg(z) - e[k]|²\nmoves the chosen code to z", ha="center")
    note(ax, (2.35, 3.55), "commitment loss 0.25 |z - sg(e[k])|²\nkeeps z near its code", ha="center")
    arrow(ax, (3.5, 4.2), (3.83, 4.2), ls=":")
    arrow(ax, (3.3, 3.33), (3.3, y + 0.37), ls=":")

    arrow(ax, (9.85, y - 0.35), (9.85, back), (8.2, back), ls="--")
    arrow(ax, (8.2, back), (6.75, back), (6.75, y - 0.37), ls="--")
    arrow(ax, (6.75, back), (3.3, back), (3.3, y - 0.37), ls="--")
    arrow(ax, (3.3, 1.72), (1.95, 1.72), (1.95, y - 0.37), ls="--")
    note(ax, (9.1, 0.78), "gradient of the loss on pixels")
    note(ax, (5.0, 0.78), "straight through: the gradient at q is copied to z, as if q were z")
    ax.plot([4.85, 5.15], [1.95, 2.2], "k", lw=2.5)
    ax.plot([4.85, 5.15], [2.2, 1.95], "k", lw=2.5)
    note(ax, (4.25, 2.07), "no gradient", ha="center")
    legend = "solid: values", "dashed: gradients", "dotted: two losses that tie z and e together", "sg: stop-gradient"
    note(ax, (5.5, 0.25), "     ".join(legend))
    return Diagram(
        figure,
        f"A VQGAN in training. The encoder turns a picture of {side} pixels into z, a grid of {g} x {g} "
        f"vectors. Each is replaced by the nearest of {v} codes, q, whose number is the token. The decoder "
        "turns q into a picture. Backwards, the gradient of the pixels reaches q, cannot pass the choice of "
        "the nearest code, and is copied straight to z. The codebook loss moves the chosen code to z, the "
        "commitment loss keeps z near its code.",
    )


def layer(config: MuseConfig) -> Diagram:
    """The base transformer: what one layer adds to the vectors, and how often."""
    c = config.base
    figure, ax = canvas(11, 4.4)
    y, top = 1.55, 2.65
    box(ax, (0.68, y), f"tokens\nB × {c.tokens}\nsome [MASK]", (1.1, 0.95), "data")
    box(ax, (2.05, y), "E[token]\n+ row\n+ column", (1.1, 0.95))
    arrow(ax, (1.23, y), (1.5, y))
    ax.add_patch(Rectangle((2.85, 0.75), 6.35, 2.5, facecolor="none", ec="black", ls=":", lw=1.3))
    arrow(ax, (2.6, y), (9.5, y))
    for x, name in ((3.1, "self-\nattention"), (5.15, "cross-\nattention"), (7.2, "MLP")):
        arrow(ax, (x, y), (x, top), (x + 0.2, top))
        box(ax, (x + 0.5, top), "norm", (0.6, 0.45))
        arrow(ax, (x + 0.8, top), (x + 0.97, top))
        box(ax, (x + 1.42, top), name, (0.9, 0.62))
        arrow(ax, (x + 1.42, top - 0.31), (x + 1.42, y + 0.14))
        ax.plot(x + 1.42, y, "o", ms=17, mfc="white", mec="black", mew=1.3)
        ax.text(x + 1.42, y, "+", ha="center", va="center", fontsize=14)
    box(ax, (10.1, y), "norm, head", (1.15, 0.6))
    note(ax, (10.1, 0.85), f"logits\nB × {c.tokens} × {c.codebook_size}")
    note(ax, (6.0, 1.05), f"vectors, B × {c.tokens} × {c.width}: every step adds to them")
    note(ax, (6.0, 0.42), f"one layer; there are {c.layers}")
    box(ax, (6.57, 3.9), f"memory: the text, projected to B × L × {c.width}", (3.9, 0.5), "data")
    arrow(ax, (6.57, 3.65), (6.57, top + 0.31), text="keys, values", at=(7.2, 3.45))
    note(ax, (3.6, 3.5), "the tokens look at each other")
    note(ax, (9.95, 2.95), "each vector\nby itself")
    arrow(ax, (9.42, 2.85), (9.08, 2.72), ls=":")
    arrow(ax, (4.3, 3.38), (4.48, 2.98), ls=":")
    return Diagram(
        figure,
        f"The base transformer. {c.tokens} tokens, some of them masks, become vectors of {c.width} numbers: a "
        f"row of the table E plus the vectors of row and column. Each of {c.layers} layers adds three things "
        "to them, each computed from normalized vectors: self-attention among the tokens, cross-attention to "
        "the memory of the text, and an MLP of each vector by itself. A last norm and the head give "
        f"{c.codebook_size} logits per token.",
    )


def memory(config: MuseConfig) -> Diagram:
    """What the super-resolution transformer attends to: text, then encoded low tokens."""
    c = config.superres
    low = c.low_grid**2
    figure, ax = canvas(11, 4.6)
    y = 2.35
    for i in range(5):
        box(ax, (1.3 + 0.62 * i, y), ["t1", "t2", "t3", "...", "tL"][i], (0.56, 0.5), "data")
    for i in range(8):
        name = ["c1", "c2", "c3", "c4", "c5", "c6", "...", f"c{low}"][i]
        box(ax, (4.75 + 0.62 * i, y), name, (0.56, 0.5))
    ax.add_patch(Rectangle((0.9, y - 0.38), 3.28, 0.76, facecolor="none", ec="black", ls="--", lw=1.3))
    note(ax, (10.1, y), f"memory:\nL + {low} entries\nof {c.width} numbers")
    box(ax, (2.54, 1.2), "projection, norm", (1.8, 0.45))
    box(ax, (2.54, 0.35), f"text vectors, L × {c.text_width}", (2.3, 0.45), "data")
    arrow(ax, (2.54, 0.58), (2.54, 0.97))
    arrow(ax, (2.54, 1.43), (2.54, y - 0.38))
    box(
        ax,
        (6.9, 1.2),
        f"embedding, {c.low_layers} layer{'s' * (c.low_layers > 1)} of self-attention, norm",
        (3.9, 0.45),
    )
    box(ax, (6.9, 0.35), f"low tokens, {c.low_grid} × {c.low_grid}", (2.0, 0.45), "data")
    arrow(ax, (6.9, 0.58), (6.9, 0.97))
    arrow(ax, (6.9, 1.43), (6.9, y - 0.25))
    box(
        ax,
        (5.0, 3.85),
        f"{c.layers} layers over the {c.grid} × {c.grid} high tokens: self-attention, cross-attention, MLP",
        (6.6, 0.55),
    )
    for x in (2.54, 6.9):
        arrow(ax, (x, y + (0.38 if x < 4 else 0.25)), (x, 3.57))
    note(ax, (4.75, 3.25), "keys and values for cross-attention")
    note(ax, (0.3, 3.1), "guidance removes\nonly the dashed entries", ha="left")
    if getattr(c, "draft", False):
        note(ax, (9.75, 3.85), "plus a draft code\nat each position")
    return Diagram(
        figure,
        f"The memory of super-resolution: one row of entries of {c.width} numbers, first L pieces of projected"
        f" text, then {low} low tokens, embedded and passed through {c.low_layers} layer of self-attention. "
        f"All {c.grid} x {c.grid} high tokens attend to the row by cross-attention. For guidance without text "
        "only the text entries are removed.",
    )


def decode_loop(config: MuseConfig) -> Diagram:
    """One step of parallel decoding in five small grids."""
    n, steps = config.base.tokens, config.base_sampling.steps
    counts = reveal_counts(n, steps, config.base_sampling.schedule)
    figure, ax = canvas(11, 3.6)
    known = ["mask"] * 16
    for i in (0, 1, 7):
        known[i] = "0.8"
    drawn = ["0.8" if fill != "mask" else "blank" for fill in known]
    codes = list("AABACDDAEDFEBEEB")
    chance = [9, 9, 7, 6, 4, 2, 3, 9, 5, 3, 1, 4, 8, 6, 5, 8]
    best = [i for i in sorted(range(16), key=lambda i: -chance[i]) if known[i] == "mask"][:4]
    after = [fill if i not in best else "0.8" for i, fill in enumerate(known)]
    shown = {
        "known so far": (known, [c if f != "mask" else "" for c, f in zip(codes, known, strict=True)]),
        "draw a code\nfor each [MASK]": (drawn, codes),
        "rank them": (drawn, [str(k) if f == "mask" else "" for k, f in zip(chance, known, strict=True)]),
        "fix the best 4": (["0.55" if i in best else f for i, f in enumerate(drawn)], codes),
        "hide the rest again": (after, [c if f != "mask" else "" for c, f in zip(codes, after, strict=True)]),
    }
    y = 2.2
    for i, (title, (fills, marks)) in enumerate(shown.items()):
        x = 1.1 + 2.2 * i
        tokens(ax, (x, y), 1.45, fills, marks)
        note(ax, (x, 3.25), title, TEXT)
        if i:
            arrow(ax, (x - 1.42, y), (x - 0.78, y))
    note(ax, (2.2, 1.22), "network: one pass")
    note(ax, (5.5, 1.22), "tenths: how probable is the code?")
    arrow(ax, (9.9, y - 0.75), (9.9, 0.75), (1.1, 0.75), (1.1, y - 0.75))
    note(ax, (5.5, 0.75), f"again, until nothing is masked: {n} tokens in {steps} steps")
    note(ax, (5.5, 0.3), f"tokens fixed in each step: {', '.join(map(str, counts))}")
    return Diagram(
        figure,
        "One step of parallel decoding in five grids: some tokens are known, the others are masked; the "
        "network draws a code for each mask; the codes are ranked by probability; the best ones are fixed; "
        f"the rest is hidden again. This repeats until nothing is masked: {n} tokens in {steps} steps, which "
        f"fix {', '.join(map(str, counts))}.",
    )


def guidance(config: MuseConfig) -> Diagram:
    """The two branches of classifier-free guidance: one batch of 2B rows."""
    c = config.base
    figure, ax = canvas(11, 3.9)
    up, down = 2.75, 1.15
    middle = (up + down) / 2
    box(ax, (0.95, middle), f"tokens\nB × {c.tokens}\nsome [MASK]", (1.3, 0.95), "data")
    arrow(ax, (1.6, middle), (2.0, middle), (2.0, up), (2.5, up))
    arrow(ax, (1.6, middle), (2.0, middle), (2.0, down), (2.5, down))
    box(ax, (3.2, up), "the same tokens", (1.4, 0.5), "data")
    box(ax, (3.2, down), "the same tokens", (1.4, 0.5), "data")
    arrow(ax, (3.9, up), (4.45, up))
    arrow(ax, (3.9, down), (4.45, down))
    box(ax, (5.25, middle), "one network,\none batch\nof 2B rows", (1.6, 2.2))
    box(ax, (5.25 - 0.0, 3.55), "memory of the prompt", (2.0, 0.45), "data")
    box(ax, (5.25, 0.32), "memory without text, or of a negative prompt", (3.7, 0.45), "data")
    arrow(ax, (5.25, 3.32), (5.25, 3.05))
    arrow(ax, (5.25, 0.55), (5.25, 0.85))
    box(ax, (7.05, up), "logits $\\ell_c$", (0.9, 0.5), "data")
    box(ax, (7.05, down), "logits $\\ell_u$", (0.9, 0.5), "data")
    arrow(ax, (6.05, up), (6.6, up))
    arrow(ax, (6.05, down), (6.6, down))
    box(ax, (8.7, middle), "$\\ell_g = \\ell_c + t\\,(\\ell_c - \\ell_u)$", (1.95, 0.6))
    arrow(ax, (7.5, up), (8.7, up), (8.7, middle + 0.3))
    arrow(ax, (7.5, down), (8.7, down), (8.7, middle - 0.3))
    arrow(ax, (9.68, middle), (10.0, middle))
    note(ax, (10.45, middle), f"draw codes\nB × {c.tokens}")
    note(ax, (9.6, 0.75), "t = 0: the lower branch is left out")
    return Diagram(
        figure,
        f"Guidance. The {c.tokens} tokens of B pictures are copied into one batch of 2B rows. The same network"
        " reads the upper half with the memory of the prompt and the lower half with the memory of no text or"
        " of a negative prompt. The logits are combined as l_c + t (l_c - l_u), and codes are drawn from the "
        "result.",
    )


def three_models(config: MuseConfig) -> Diagram:
    """Muse, an autoregressive model and a diffusion transformer side by side."""
    from minimuse.baseline_dit import dit_sizes

    c, dit, d = config.base, dit_sizes(config.base), config.low_tokenizer.code_dim
    figure, ax = canvas(11, 6.2)
    g = c.grid
    columns = {
        "Muse": (
            ["mask", "0.8", "mask", "0.8", "mask", "mask", "0.8", "mask", "mask"],
            "tokens, a random part masked",
            ["norm, self-attention:\nall tokens", "norm, cross-attention: text", "norm, MLP"],
            f"codes of the masked tokens\n{c.tokens} × {c.codebook_size} logits",
            f"many tokens per step,\nany order: {config.base_sampling.steps} passes",
        ),
        "Autoregressive": (
            ["0.8"] * 4 + ["mask"] * 5,
            "tokens so far, row by row",
            ["norm, self-attention:\nonly tokens before", "norm, cross-attention: text", "norm, MLP"],
            f"the next code\n{c.tokens} × {c.codebook_size} logits",
            f"one token per step,\nrow by row: {c.tokens} passes",
        ),
        "Diffusion transformer": (
            ["0.9", "0.5", "0.75", "0.6", "0.95", "0.45", "0.7", "0.55", "0.85"],
            f"latents {d} × {g} × {g} plus noise",
            ["norm scaled and shifted by time,\nself-attention: all, times a gate", "norm, cross-attention: text",
             "norm scaled and shifted by time,\nMLP, times a gate"],
            f"the noise\n{d} × {g} × {g} numbers",
            "all latents in every step,\nless noise each time: any T passes",
        ),
    }  # fmt: skip
    for name, y in {
        "sees": 5.2,
        "one layer:\neach box\nadds to the\nvectors": 3.0,
        "predicts": 1.25,
        "draws": 0.45,
    }.items():
        note(ax, (0.1, y), name, ha="left", fontweight="bold")
    for i, (name, (fills, given, steps, predicts, draws)) in enumerate(columns.items()):
        x = 2.6 + 3.25 * i
        note(ax, (x, 5.98), name, 12, fontweight="bold")
        tokens(ax, (x, 5.2), 0.9, fills)
        note(ax, (x, 4.55), given)
        arrow(ax, (x, 4.4), (x, 4.07))
        for k, step in enumerate(steps):
            box(ax, (x, 3.75 - 0.78 * k), step, (2.75, 0.6), points=SMALL)
            if k:
                arrow(ax, (x, 4.23 - 0.78 * k), (x, 4.05 - 0.78 * k))
        arrow(ax, (x, 1.89), (x, 1.55))
        note(ax, (x, 1.25), predicts)
        note(ax, (x, 0.45), draws)
    ax.plot([0.1, 10.9], [0.87, 0.87], color="0.6", lw=0.8)
    return Diagram(
        figure,
        "Three models side by side. Muse sees tokens of which a random part is masked, attends to all of them"
        " and to the text, predicts the masked codes and draws many tokens per step, "
        f"{config.base_sampling.steps} passes. The autoregressive model sees the tokens before, attends only "
        f"to those and to the text, predicts the next code and draws one token per step, {c.tokens} passes. "
        f"The diffusion transformer sees noisy latents, its layers (width {dit.width}) are scaled, shifted and"
        " gated by the time, it predicts the noise, and changes all latents in every step.",
    )


DIAGRAMS = (cascade, quantizer, layer, memory, decode_loop, guidance, three_models)
