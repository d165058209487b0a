"""The bug zoo: mistakes that real implementations of this family made, as mutants of our own functions.

    library()            -> copies of the true modules: lib.masking, lib.sampler, lib.cfg, ...
    library(MUTANTS[0])  -> the same with one line of one of them changed
    score(tests)         -> which mutants a set of tests kills, which survive, which tests cry wolf on the truth

A test is a function of one argument, the library, that raises where something is wrong:

    def test_the_loss_is_finite(lib):
        assert lib.masking.masked_cross_entropy(logits, targets, masked).isfinite()

A mutant is made of the module's source as it stands, so that it never lags behind. Each looks fine at a glance: it
runs, shapes are right, pictures come out. Time and memory of tests are the grader's to limit, not ours.
"""

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

ROOMS = ("masking", "sampler", "cfg", "transformer", "vqgan", "editing", "train", "muse", "utils", "lab_samplers")
Test = Callable[[types.SimpleNamespace], None]


class Mutant(NamedTuple):
    """One line of `minimuse/<room>.py` changed."""

    name: str
    room: str
    old: str
    new: str
    story: str  # what was done, and what one sees of it
    source: str = ""  # where it was found, of those that were published


MUTANTS = [
    Mutant(
        "rate_inverted",
        "masking",
        "return torch.tensor([curve(u) for u",
        "return torch.tensor([1 - curve(u) for u",
        "The rate counts what is kept: training seldom sees the empty pictures that decoding begins from.",
    ),
    Mutant(
        "rate_thin_tail",
        "masking",
        "    curve = get_schedule(schedule)\n    return torch.tensor",
        '    curve = get_schedule("arccos" if schedule == "cosine" else schedule)\n    return torch.tensor',
        'The other reading of "truncated arccos": the same mean, and half as many nearly empty pictures.',
    ),
    Mutant(
        "rate_shared",
        "masking",
        "[curve(u) for u in uniforms(n, generator=generator).tolist()]",
        "[curve(u) for u in uniforms(n, generator=generator)[:1].tolist() * n]",
        "One rate for the whole batch: a batch counts the same, however little it hides, and the loss jumps.",
    ),
    Mutant(
        "loss_everywhere",
        "masking",
        "hidden = targets.masked_fill(~masked, -100).flatten()",
        "hidden = targets.flatten()",
        "The loss counts tokens that the model was shown: it falls quickly, and copying is what is learned.",
    ),
    Mutant(
        "schedule_falls_through",
        "masking",
        'name = check("schedule", schedule, ScheduleName)',
        'name = schedule if schedule in SCHEDULES or str(schedule)[:3] in ("log", "pow") else "cosine"',
        "A misspelt schedule is the cosine: whole comparisons come out equal.",
    ),
    Mutant(
        "schedule_off_by_one",
        "masking",
        "ratio = curve(u)",
        "ratio = curve(i / max(1, steps - 1))",
        "linspace(0, 1, T): the first step has nothing to reveal, and the others make up for it.",
    ),
    Mutant(
        "draws_shared",
        "utils",
        "return torch.stack([torch.rand(shape[1:], generator=g) for g in generator])",
        "return torch.stack([torch.rand(shape[1:], generator=generator[0]) for g in generator])",
        "All images draw from the first one's generator: a picture depends on its neighbours in the batch.",
    ),
    Mutant(
        "fixed_tokens_redrawn",
        "sampler",
        "drawn = torch.where(masked, draw(logits, random[:, i, 0], temperature, top_k, top_p), tokens)",
        "drawn = draw(logits, random[:, i, 0], temperature, top_k, top_p)",
        "Every step draws all tokens anew: what was fixed changes, and inpainting repaints the whole picture.",
    ),
    Mutant(
        "noise_on_probabilities",
        "sampler",
        "score = score + noise * gumbel",
        "score = score.exp() + noise * gumbel",
        "Gumbel noise is added to p, not to log p: the ranking is nearly random, and pictures are patchy.",
    ),
    Mutant(
        "noise_not_annealed",
        "sampler",
        "temperature, state.u, 1 - (state.index + 1) / state.steps)",
        "temperature, state.u, 1.0)",
        "The ranking stays as noisy at the end as it was at the beginning.",
    ),
    Mutant(
        "text_drop_inverted",
        "cfg",
        "uniforms(len(context.mask), generator=generator) < p",
        "uniforms(len(context.mask), generator=generator) >= p",
        "p = 0.1 removes 90% of the texts: pictures are good, and have little to do with their prompts.",
    ),
    Mutant(
        "guidance_of_another_convention",
        "cfg",
        "return cond + t * (cond - uncond)",
        "return uncond + t * (cond - uncond)",
        "t is read as the scale of l_u + s (l_c - l_u): no guidance is not conditional, and t = 1 does nothing.",
    ),
    Mutant(
        "removed_text_is_nothing",
        "transformer",
        "attend = attend | ~attend.any(1, keepdim=True)",
        "attend = attend & attend.any(1, keepdim=True)",
        "Removed text leaves nothing to attend to: an empty softmax, NaN or 0 by attention backend.",
    ),
    Mutant(
        "padding_attended",
        "transformer",
        "attend = F.pad(context.mask, (0,",
        "attend = F.pad(torch.ones_like(context.mask), (0,",
        "Padding is zeroed and attended to: a prompt means something else beside a longer one.",
    ),
    Mutant(
        "condition_lost",
        "transformer",
        "memory = super().memory(context, self.low_norm(low))",
        "memory = super().memory(context)",
        "The low-res tokens are encoded and never passed on: super-resolution paints from the text alone.",
    ),
    Mutant(
        "condition_without_positions",
        "transformer",
        "low = self.low_embed(low_tokens)  # (B, N_low, D)",
        "low = self.low_embed.codes(low_tokens)",
        "Low-res tokens have no place: super-resolution knows what is in the picture, and not where.",
    ),
    Mutant(
        "truth_leaks",
        "train",
        "logits = self.model(x.masked_fill(masked, self.model.mask_id), memory)",
        "logits = self.model(x, memory)",
        "The true tokens stand where [MASK] should: the loss falls to nothing, and so do the pictures.",
    ),
    Mutant(
        "dead_codes_stay_dead",
        "vqgan",
        "dead = (idle >= PATIENCE).nonzero().squeeze(1)",
        "dead = (idle > 1e9).nonzero().squeeze(1)",
        "Codes that are never nearest never learn: the codebook collapses onto a few.",
    ),
    Mutant(
        "half_covered_tokens_kept",
        "editing",
        "return F.max_pool2d(repaint[:, None].float(), downsampling).flatten(1) > 0",
        "return F.avg_pool2d(repaint[:, None].float(), downsampling).flatten(1) > 0.5",
        "A token that the region covers by less than half is kept: the rim of the old thing stays.",
    ),
    Mutant(
        "negative_prompt_ignored",
        "muse",
        "null = Context.cat(Context(*(x[i : i + 1] for x in row)) for i, row in enumerate(rows))",
        "Context.cat(Context(*(x[i : i + 1] for x in row)) for i, row in enumerate(rows))",
        "The negative prompt is encoded, and thrown away: it changes nothing.",
    ),
    Mutant(
        "p2_never_masks_again",
        "lab_samplers",
        "score = torch.where(state.masked, score, eta * score).masked_fill(",
        "score = torch.where(state.masked, score, math.inf).masked_fill(",
        "Known tokens have an infinite score, so none is ever taken back: P2 is the plain sampler.",
        "https://github.com/pengzhangzhi/Open-dLLM/issues/7",
    ),
    Mutant(
        "rare_codes_truncated",
        "sampler",
        "cdf = p.cumsum(-1, dtype=uniforms.dtype)",
        "cdf, uniforms = p.cumsum(-1), uniforms.float()",
        "32-bit uniforms have no place next to 1: the rarest codes are never drawn, as if the temperature were lower.",
        "https://arxiv.org/abs/2409.02908",
    ),
    Mutant(
        "guidance_off_by_one",
        "sampler",
        "u = i / (steps - 1) if steps > 1 else 1.0",
        "u = i / steps",
        "Progress ends one step before 1: guidance never reaches its full scale.",
        "https://github.com/valeoai/Halton-MaskGIT/issues/2",
    ),
    Mutant(
        "time_reversed",
        "sampler",
        "logits_fn(tokens, u).float()",
        "logits_fn(tokens, 1 - u).float()",
        "The network is told that it is at the end when it begins: guidance falls where it should rise.",
        "https://github.com/nathan-barry/tiny-diffusion/issues/2",
    ),
    Mutant(
        "one_count_for_the_batch",
        "sampler",
        "else torch.tensor(plan[i])",
        "else torch.tensor(plan[i])[:1]",
        "All images of a batch reveal as many tokens as the first one: fine until one of them has another region.",
        "https://github.com/baaivision/MUSE-Pytorch/blob/main/libs/muse.py",
    ),
    Mutant(
        "mask_id_in_the_codebook",
        "transformer",
        "self.mask_id = config.codebook_size  #",
        "self.mask_id = config.codebook_size - 1  #",
        "[MASK] is a code of the tokenizer: tokens that are known and have it look unknown.",
        "https://github.com/dome272/MaskGIT-pytorch/issues/9",
    ),
    Mutant(
        "text_mask_inverted",
        "transformer",
        "attend = F.pad(context.mask, (0,",
        "attend = F.pad(~context.mask, (0,",
        "Attention goes to the padding of the text, and to none of its words.",
        "https://github.com/lucidrains/muse-maskgit-pytorch/issues/38",
    ),
]


@functools.cache
def _compiled(room: str, old: str, new: str) -> types.CodeType:
    """A module's source with `old` replaced by `new`, compiled. Its file name does not tell what was changed."""
    source = inspect.getsource(importlib.import_module(f"minimuse.{room}"))
    if old and source.count(old) != 1:
        raise ValueError(f"{old!r} stands {source.count(old)} times in {room}.py; expected once")
    return compile(source.replace(old, new) if old else source, f"{room}.py", "exec")


def library(mutant: Mutant | None = None) -> types.SimpleNamespace:
    """Fresh copies of the modules of ROOMS by name; with a mutant, one line of one of them is changed.

    The true modules are copies too, so that no test can tell a mutant by its identity. Copies call the package.
    """
    lib = types.SimpleNamespace()
    for room in ROOMS:
        module = types.ModuleType(f"minimuse.{room}")
        changed = mutant is not None and mutant.room == room
        exec(_compiled(room, mutant.old if changed else "", mutant.new if changed else ""), vars(module))
        setattr(lib, room, module)
    return lib


def raises(test: Test, lib: types.SimpleNamespace) -> bool:
    """Does the test say that something is wrong with this library?"""
    torch.manual_seed(0)
    try:
        test(lib)
    except Exception:
        return True
    return False


class Score(NamedTuple):
    killed: dict[str, list[str]]  # mutant -> the tests that kill it
    survived: list[str]
    false_alarms: list[str]  # tests that raise on the true code; they kill nothing


def score(tests: Iterable[Test], mutants: Iterable[Mutant] = MUTANTS) -> Score:
    """Run each test against the truth and against each mutant."""
    tests, truth = list(tests), library()
    false_alarms = [test.__name__ for test in tests if raises(test, truth)]
    sound = [test for test in tests if test.__name__ not in false_alarms]
    kills = {}
    for mutant in mutants:
        lib = library(mutant)
        kills[mutant.name] = [test.__name__ for test in sound if raises(test, lib)]
    killed = {name: by for name, by in kills.items() if by}
    return Score(killed, [name for name in kills if name not in killed], false_alarms)
