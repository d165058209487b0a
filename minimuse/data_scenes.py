"""The embedded data set: pictures of things on a floor, ray-cast in PyTorch at any size.

A small CLEVR (arXiv 1612.06890) with a closer camera: 1 to 3 things of COLORS, SHAPES, SIZES and MATERIALS on one gray
floor, one light, one camera. Brown cubes, purple spheres and cyan cylinders are only in split "novel".

x runs left to right, y up, depth away from the camera; a large sphere has radius 1. `B` scenes, `K` things a scene,
`n` things of a whole batch, `R` rays, `M` rays that meet a thing.

Not here: captions (data_captions.py), uint8 and PIL images (utils.py), contact sheets (plots.py).
"""

import math
from dataclasses import dataclass
from functools import reduce
from random import Random
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from minimuse.utils import Checked, Rule, check, require

COLORS = {
    "gray": (0.36, 0.37, 0.40), "red": (0.80, 0.11, 0.13), "blue": (0.14, 0.27, 0.86), "green": (0.10, 0.55, 0.16),
    "brown": (0.42, 0.24, 0.10), "purple": (0.53, 0.18, 0.76), "cyan": (0.14, 0.78, 0.80), "yellow": (0.97, 0.80, 0.12),
}  # fmt: skip
SHAPES = ("cube", "sphere", "cylinder")
SIZES = ("small", "large")
MATERIALS = ("rubber", "metal")
SPLITS = ("train", "test", "novel")
HELD_OUT = frozenset((list(COLORS)[4 + s], shape) for s, shape in enumerate(SHAPES))  # brown cube, purple sphere, ...
MAX_THINGS = 3
SUPERSAMPLE = 2  # rays per pixel, along each side
Side = Annotated[int, Rule(lambda x: 8 <= x <= 4096, "a whole number of pixels from 8 to 4096")]
FRACTIONS = (45, 35, 20)  # of scenes with 1, 2 and 3 things

_RADIUS = {"small": 0.62, "large": 1.0}
_WIDTH, _HEIGHT = (0.75, 1.0, 0.78), (0.75, 1.0, 0.84)  # half-width and half-height of each of SHAPES, in radii
_SIN, _COS = math.sin(math.radians(24)), math.cos(math.radians(24))  # the camera looks down by 24 degrees
_TAN = 0.2625  # of half its field of view: at distance 8 the picture is 4.2 high
_EYE = (0.0, 0.72 + 8 * _SIN, 0.1 - 8 * _COS)
_LIGHT = (-0.46, 0.76, -0.46)  # towards the light, unit: left, above, in front
_CLEAR_X, _CLEAR_DEPTH = 0.9, 1.2  # separations from which we call a thing left of, or in front of, another


@dataclass(frozen=True)
class Thing(Checked):
    color: Literal[tuple(COLORS)]
    shape: Literal[SHAPES]
    size: Literal[SIZES] = "large"
    material: Literal[MATERIALS] = "rubber"
    x: float = 0.0  # left -> right
    depth: float = 0.0  # towards -> away
    turn: float = 30.0  # degrees about the vertical; shows on cubes alone


@dataclass(frozen=True)
class Scene(Checked):
    things: tuple[Thing, ...]

    def __post_init__(self):
        super().__post_init__()
        require(1 <= len(self.things) <= MAX_THINGS, f"Scene.things holds {len(self.things)}; give 1 to {MAX_THINGS}")


def sample_scene(
    seed: int, *, split: str = "train", n_things: int | None = None, fractions: tuple[float, ...] = FRACTIONS
) -> Scene:
    """Seed and split -> a Scene of 1 to 3 things, each in frame, mostly visible and in clear relations to the others.

    Without `n_things`, `fractions` are the fractions of scenes with 1, 2 and 3 things. The split's name is part of the
    seed, so "test" has the combinations of "train" in other scenes.
    """
    check("split", split, Literal[SPLITS])
    require(n_things in (None, *range(1, MAX_THINGS + 1)), f"n_things is {n_things!r}; give 1 to {MAX_THINGS}, or None")
    rng = Random(f"{split}/{seed}")
    n = n_things or rng.choices((1, 2, 3), fractions)[0]
    alike = min(n, rng.choices((1, 2, 3), (60, 26, 14))[0])  # this many look the same, so that captions count
    every = [(color, shape) for color in COLORS for shape in SHAPES]
    while True:
        looks = []
        for i in range(n):
            novel = split == "novel" and i == 0
            pair = rng.choice([pair for pair in every if (pair in HELD_OUT) == novel])
            looks.append((*pair, rng.choice(SIZES), rng.choice(MATERIALS)))
        looks[:alike] = looks[:1] * alike
        if things := place_things(rng, rng.sample(looks, n)):
            return Scene(things)


def place_things(rng: Random, looks: list[tuple], tries: int = 30) -> tuple[Thing, ...] | None:
    """Looks -> things on the floor, or None if no attempt fits (three large ones rarely do)."""
    near, far = (-0.5, 0.5) if len(looks) == 1 else (-1.2, 2.4)
    for _ in range(tries):
        things: list[Thing] = []
        for look in looks:
            spot = (rng.uniform(-1.7, 1.7), rng.uniform(near, far), rng.uniform(15, 75))
            thing = Thing(*look, *(round(number, 3) for number in spot))
            left, top, right, bottom = box(thing)
            if min(left, top, 1 - right, 1 - bottom) < 0.02 or not all(stand_apart(thing, other) for other in things):
                break
            things.append(thing)
        else:
            return tuple(things)
    return None


def stand_apart(a: Thing, b: Thing) -> bool:
    """True if they do not touch, are in a clear relation, and at least 4/5 of the farther one is visible."""
    gap = math.hypot(a.x - b.x, a.depth - b.depth) - 1.07 * (_RADIUS[a.size] + _RADIUS[b.size])
    near, far = (box(thing) for thing in sorted((a, b), key=lambda thing: thing.depth))
    shared = [max(0, min(near[i + 2], far[i + 2]) - max(near[i], far[i])) / (far[i + 2] - far[i]) for i in (0, 1)]
    return gap > 0 and shared[0] * shared[1] < 0.2 and bool(relations(a, b))


def relations(a: Thing, b: Thing) -> set[str]:
    """The clear relations of a to b: some of "left", "right", "front", "behind"; or "beside"."""
    true = {"left": b.x - a.x >= _CLEAR_X, "right": a.x - b.x >= _CLEAR_X,
            "front": b.depth - a.depth >= _CLEAR_DEPTH, "behind": a.depth - b.depth >= _CLEAR_DEPTH}  # fmt: skip
    names = {name for name in true if true[name]}
    return names | {"beside"} if names in ({"left"}, {"right"}) else names


def box(thing: Thing) -> tuple[float, float, float, float]:
    """Its bounding box in the picture: left, top, right, bottom in [0, 1]."""
    kind, turn = SHAPES.index(thing.shape), math.radians(thing.turn)
    wide, tall = (_RADIUS[thing.size] * half[kind] for half in (_WIDTH, _HEIGHT))
    u, v, scale = project(thing.x, tall, thing.depth)
    if thing.shape == "sphere":
        return u - wide * scale, v - wide * scale, u + wide * scale, v + wide * scale
    wide *= abs(math.cos(turn)) + abs(math.sin(turn)) if thing.shape == "cube" else 1
    scales = [project(thing.x, y, thing.depth)[2] for y in (0, 2 * tall)]  # its top is nearer, so larger
    left, right = (0.5 + pick((thing.x + side) * s for s in scales) for pick, side in ((min, -wide), (max, wide)))
    return left, project(0, 2 * tall, thing.depth + wide)[1], right, project(0, 0, thing.depth - wide)[1]


def project(x: float, y: float, depth: float) -> tuple[float, float, float]:
    """A point -> its place (u, v) in the picture, in [0, 1], and the length of one unit there."""
    up, away = y - _EYE[1], depth - _EYE[2]
    scale = 0.5 / ((away * _COS - up * _SIN) * _TAN)
    return 0.5 + x * scale, 0.5 - (up * _COS + away * _SIN) * scale, scale


Vec = tuple[Tensor, Tensor, Tensor]  # x, y, depth: three tensors that broadcast, which is faster than one tensor


def _rays(size: int) -> Vec:
    """Unit directions (R,) from the eye through the centres of size x size pixels."""
    at = ((torch.arange(size) + 0.5) / size * 2 - 1) * _TAN
    v, u = torch.meshgrid(-at, at, indexing="ij")
    d = torch.stack([u, v * _COS - _SIN, v * _SIN + _COS]).flatten(1)
    return tuple(d / d.norm(dim=0))


def _points(t: Tensor, d: Vec) -> Vec:
    return tuple(eye + t * axis for eye, axis in zip(_EYE, d, strict=True))


def _dot(a: Vec, b: Vec) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _ball(o: Vec, d: Vec, half: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays o + t d enter and leave a ball. Both are equal for a miss."""
    a, b = 1 / _dot(d, d), _dot(o, d)
    root = (b * b - (_dot(o, o) - half**2) / a).clamp(min=0).sqrt()
    return (-b - root) * a, (root - b) * a


def _slab(o: Tensor, d: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a slab, |o + t d| < half."""
    step = 1 / (d + 1e-9)  # a ray along the slab must not be 0 / 0
    return -o * step - half * step.abs(), -o * step + half * step.abs()


class _Things:
    """The things of B scenes as columns of n numbers: scene, shape, position, size, colour."""

    def __init__(self, scenes: list[Scene]):
        rows = [(b, k, thing) for b, scene in enumerate(scenes) for k, thing in enumerate(scene.things)]
        self.scene, self.slot = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
        self.index = torch.full((len(scenes), MAX_THINGS), -1)  # (B, K) -> 0..n-1, or -1 for none
        self.index[self.scene, self.slot] = torch.arange(len(rows))
        things = [row[2] for row in rows]
        self.kind = torch.tensor([SHAPES.index(thing.shape) for thing in things])
        self.rgb = torch.tensor([COLORS[thing.color] for thing in things])
        self.metal = torch.tensor([thing.material == "metal" for thing in things])
        turn = torch.tensor([math.radians(thing.turn) * (thing.shape == "cube") for thing in things])
        self.cos, self.sin = turn.cos(), turn.sin()
        self.x, self.depth = torch.tensor([[float(thing.x), float(thing.depth)] for thing in things]).T
        self.radius = torch.tensor([_RADIUS[thing.size] for thing in things])
        self.wide, self.tall = (self.radius * torch.tensor(half)[self.kind] for half in (_WIDTH, _HEIGHT))

    def turn(self, v: Vec, i: Tensor, back: bool = False) -> Vec:
        cos, sin = self.cos[i], -self.sin[i] if back else self.sin[i]
        return cos * v[0] + sin * v[2], v[1], cos * v[2] - sin * v[0]

    def local(self, p: Vec, i: Tensor) -> Vec:
        """Points -> the frame of things i, where each stands centred and unturned."""
        return self.turn((p[0] - self.x[i], p[1] - self.tall[i], p[2] - self.depth[i]), i)

    def meet(self, o: Vec, d: Vec, i: Tensor) -> Tensor:
        """Rays against things i, row by row -> distance, inf for a miss. Each row is tried only on its own shape."""
        t = torch.empty(torch.broadcast_shapes(i.shape, o[0].shape, d[0].shape))
        for kind, shape in enumerate(SHAPES):
            rows = (self.kind[i].flatten() == kind).nonzero()[:, 0]
            j, (o_, d_) = i[rows], (tuple(c if len(c) == 1 else c[rows] for c in v) for v in (o, d))
            d_ = self.turn(d_, j) if shape == "cube" else d_
            o_, wide = self.local(o_, j), self.wide[j]
            if shape == "cube":
                spans = [_slab(*axis, wide) for axis in zip(o_, d_, strict=True)]
            elif shape == "sphere":
                spans = [_ball(o_, d_, wide)]
            else:
                spans = [_ball((o_[0], 0, o_[2]), (d_[0], 0, d_[2]), wide), _slab(o_[1], d_[1], self.tall[j])]
            near, far = reduce(torch.maximum, [s[0] for s in spans]), reduce(torch.minimum, [s[1] for s in spans])
            t[rows] = torch.where((near < far) & (far > 0), near, torch.inf)
        return t

    def trace(self, o: Vec, d: Vec) -> Tensor:
        """One bundle of rays (R,) for all scenes -> distances (B, K, R)."""
        o, d = (tuple(torch.as_tensor(c).view(1, -1) for c in v) for v in (o, d))
        depth = torch.full((*self.index.shape, max(o[0].shape[1], d[0].shape[1])), torch.inf)
        depth[self.scene, self.slot] = self.meet(o, d, torch.arange(len(self.kind))[:, None])
        return depth


def _surface(things: _Things, p: Vec, i: Tensor) -> tuple[Vec, Tensor]:
    """Points on things i (M,) -> unit normals, and True on a rim. Bevelled rims of metal reflect light."""
    kind, wide, tall, (x, y, z) = things.kind[i], things.wide[i], things.tall[i], things.local(p, i)
    sides = torch.stack([x, y, z]) / wide
    _, middle, high = sides.abs().sort(0).values
    top = y > tall - 1e-3
    cube = (sides.abs() == high) * sides.sign()
    cylinder = torch.stack([sides[0] * ~top, top.float(), sides[2] * ~top])
    n = torch.where(kind == 1, sides, torch.where(kind == 0, cube, cylinder))
    rim = torch.where(kind == 0, middle, torch.minimum(sides[0].hypot(sides[2]), y / tall)) > 0.91
    return things.turn(tuple(n), i, back=True), rim & (kind != 1)


def _shadowed(things: _Things, p: Vec, i: Tensor, b: Tensor) -> Tensor:
    """Points on things i of scenes b -> (M,) bool: True if another thing stands in their light."""
    dark, light = torch.zeros_like(b, dtype=torch.bool), tuple(torch.tensor([c]) for c in _LIGHT)
    for step in range(1, MAX_THINGS):
        other = things.index[b, (things.slot[i] + step) % MAX_THINGS]
        m = (other >= 0).nonzero()[:, 0]
        dark[m] |= things.meet(tuple(c[m] for c in p), light, other[m]).isfinite()
    return dark


def _mirrored(p: Vec, d: Vec) -> Tensor:
    """The reflection in metal at points p in directions d: a floor, a bright horizon, sky, a window."""
    floor = 0.72 - 0.52 * torch.exp(-0.9 * p[1] / (-d[1]).clamp(min=1e-3))
    sky = 1.1 - 0.75 * d[1].clamp(0, 1).sqrt()
    aligned = (d[0] * _LIGHT[0] + d[2] * _LIGHT[2]) / (0.65 * d[0].hypot(d[2]) + 1e-6)
    return floor + (sky - floor) * ((d[1] + 0.05) / 0.1).clamp(0, 1) + 0.55 * ((aligned - 0.90) / 0.06).clamp(0, 1)


def _shade(things: _Things, i: Tensor, b: Tensor, t: Tensor, d: Vec) -> Tensor:
    """Rays d that meet things i of scenes b at distance t -> colours (M, 3) in [0, 1]."""
    p = _points(t, d)
    n, rim = _surface(things, p, i)
    sun = _dot(n, _LIGHT).clamp(min=0) * ~_shadowed(things, p, i, b)
    ambient, cos = 0.34 + 0.14 * n[1] - 0.06 * n[0], _dot(n, d)
    mirror = tuple(d[axis] - 2 * cos * n[axis] for axis in range(3))
    shine, rgb = _dot(mirror, _LIGHT).clamp(min=0), things.rgb[i]
    rubber = rgb * (ambient + 0.78 * sun)[:, None] + (0.08 * shine**10)[:, None]
    tint = rgb + (1 - rgb) * (0.15 + 0.3 * (1 + cos) ** 3 + 0.25 * rim)[:, None]
    glow = (_mirrored(p, mirror) + 0.35 * rim)[:, None] * tint
    metal = rgb * (0.4 * ambient + 0.36 * sun)[:, None] + 0.7 * glow + (1.1 * shine**40)[:, None]
    return torch.where(things.metal[i, None], metal, rubber).clamp(0, 1)


def _floor(size: int) -> Tensor:
    """-> the bare floor (3, H, W) in [0, 1]: a pool of light that fades to a cool distance."""
    d = _rays(size)
    x, _, z = _points(-_EYE[1] / d[1], d)
    near_rgb, far_rgb = torch.tensor([[0.94], [0.92], [0.90]]), torch.tensor([[0.66], [0.75], [0.88]])
    rgb = far_rgb + (near_rgb - far_rgb) * torch.exp(-(((z + 2).clamp(min=0) / 8) ** 2))
    return (rgb * (0.72 + 0.28 * torch.exp(-0.05 * x**2 - 0.03 * (z - 0.5) ** 2))).view(3, size, size)


def _light_on_floor(things: _Things, size: int, grid: int = 64) -> Tensor:
    """-> the light (B, 1, H, W) that reaches the floor. It is soft, so one fixed grid is enough for any size."""
    d = _rays(grid)
    p = _points(-_EYE[1] / d[1], d)
    dark = torch.zeros(len(things.index), grid * grid)
    for dx, dz in ((-0.08, -0.05), (0.08, -0.05), (-0.05, 0.08), (0.05, 0.08)):  # a lamp with some width
        dark += things.trace(p, (_LIGHT[0] + dx, _LIGHT[1], _LIGHT[2] + dz)).isfinite().any(1) / 4
    away = ((p[0] - things.x[:, None]) ** 2 + (p[2] - things.depth[:, None]) ** 2) / things.radius[:, None] ** 2
    near = torch.zeros_like(dark).index_add_(0, things.scene, (-(away**2) / 0.8).exp())  # things hide the sky near them
    light = ((1 - 0.52 * dark) * (1 - 0.35 * near.clamp(max=1))).view(-1, 1, grid, grid)
    light = F.avg_pool2d(F.pad(light, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return F.interpolate(light, size=(size, size), mode="bilinear", antialias=size < grid)


def _render(things: _Things, d: Vec, floor: Tensor) -> Tensor:
    """Rays (R,) and the bare floor (3, H, W) -> images (B, 3, H, W): the things on the floor."""
    t, slot = things.trace(_EYE, d).min(1)  # (B, R)
    b, ray = t.isfinite().nonzero(as_tuple=True)  # (M,)
    canvas = torch.zeros(len(t), 4, t.shape[1])  # rgb and coverage
    canvas[b, :3, ray] = _shade(things, things.index[b, slot[b, ray]], b, t[b, ray], tuple(c[ray] for c in d))
    canvas[b, 3, ray] = 1
    size, side = floor.shape[-1], math.isqrt(t.shape[1])
    canvas = F.avg_pool2d(canvas.view(-1, 4, side, side), side // size)  # (B, 4, H, W)
    floor = floor * _light_on_floor(things, size)
    return (floor * (1 - canvas[:, 3:]) + canvas[:, :3]) * 2 - 1


@torch.no_grad()
def render(scenes: list[Scene], size: int) -> Tensor:
    """Scenes -> images (B, 3, size, size) in [-1, 1], as many at a time as fit in a CPU's cache."""
    check("scenes", scenes, list)
    require(len(scenes) > 0 and all(isinstance(scene, Scene) for scene in scenes), "scenes: give a list of Scene")
    size = check("size", size, Side)
    chunk = max(1, 2**17 // (size * SUPERSAMPLE) ** 2)
    d, floor = _rays(size * SUPERSAMPLE), _floor(size)
    return torch.cat([_render(_Things(scenes[i : i + chunk]), d, floor) for i in range(0, len(scenes), chunk)])
