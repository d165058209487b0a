"""checks.py: the package's own functions pass, and each usual mistake fails by the name of what it breaks."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minimuse import cfg, editing, eval_metrics, masking, sampler, train_log, transformer
from minimuse.lab_worlds import World
from minimuse.text import Context
from minimuse.vqgan import VectorQuantizer

_FILE = Path(__file__).resolve().parent.parent / "notebooks" / "checks.py"
_spec = importlib.util.spec_from_file_location("checks", _FILE)
checks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(checks)


def pool(context):
    return (context.embeds * context.mask[..., None]).sum(1) / context.mask.sum(1, keepdim=True)


def nearest(z, codebook):
    quantizer = VectorQuantizer(*codebook.shape)
    quantizer.codebook.data = codebook
    return quantizer.nearest(z)


def straight_through(z, q):
    return z + (q - z).detach()


def board(logits, drawn, masked, u):
    side = math.isqrt(drawn.shape[1])
    place = torch.arange(drawn.shape[1])
    return ((place // side + place % side) % 2 == 0).float().expand_as(drawn)


class Corners(World):
    agree, coin, mend = 0.9, 0.5, 1.0

    def __init__(self):
        super().__init__((2, 2), 2)

    def log_evidence(self, e):
        p = torch.tensor([[self.agree, 1 - self.agree], [1 - self.agree, self.agree]], dtype=torch.double) / 2
        coin = torch.tensor([1 - self.coin, self.coin], dtype=torch.double)
        ends = torch.einsum("ba,bc,ac->b", e[:, 0], e[:, 3], p)
        return self.mend * (ends * (e[:, 1] @ coin) * (e[:, 2] @ coin)).log()


def corners(**change):
    return type("Wrong", (Corners,), change)


class Deaf(Corners):
    """Hears what is known for sure, and nothing between."""

    def log_evidence(self, e):
        return super().log_evidence(e.round())


def resample_step(logits_fn, tokens, *, mask_id, fraction, generator):
    how = {"mask_id": mask_id, "iterations": 1, "fraction": fraction, "top_k": None, "generators": [generator]}
    (step,) = editing.resample(logits_fn, tokens, **how)
    return step.tokens


def redrawn(mask_of, shown=lambda tokens, masked: tokens.masked_fill(masked, 2)):
    def fn(logits_fn, tokens, *, mask_id, fraction, generator):
        masked = mask_of(tokens, fraction, generator)
        return torch.where(masked, logits_fn(shown(tokens, masked), 1.0).argmax(-1), tokens)

    return fn


def mask_of(tokens, fraction, generator):
    return masking.random_mask(tokens, torch.tensor([fraction]), generator)


def join_memory(text, mask, low):
    return torch.cat([text, low], 1), F.pad(mask, (0, low.shape[1]), value=True)


def grow(weight, outputs, inputs, hears=0.0, says=1.0):
    new = says * torch.randn(outputs, inputs)
    new[: len(weight)] = hears
    new[: len(weight), : weight.shape[1]] = weight
    return new


def ddim_step(x, noise, now, then):
    clean = (x - (1 - now) ** 0.5 * noise) / now**0.5
    return then**0.5 * clean + (1 - then) ** 0.5 * noise


def wilson(right, n):
    return eval_metrics.proportion_interval(torch.arange(n) < right)[1:3]


def threshold(logits, masked, u, at=0.9):
    return ((logits.softmax(-1).amax(-1) >= at) & masked).sum(1)


def paired(a, b):
    return (a - b).mean(), 1.96 * (a - b).std() / len(a) ** 0.5


def frechet(m1, c1, m2, c2, root=lambda c1, c2: torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt().sum()):
    return (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * root(c1, c2)


OURS = {
    "check_pool": pool,
    "check_nearest": nearest,
    "check_straight_through": straight_through,
    "check_schedule": masking.SCHEDULES["cosine"],
    "check_mask_rate": masking.sample_mask_rate,
    "check_random_mask": masking.random_mask,
    "check_masked_loss": masking.masked_cross_entropy,
    "check_drop_text": cfg.drop_text,
    "check_guide": cfg.guide,
    "check_rising": cfg.rising,
    "check_reveal_counts": masking.reveal_counts,
    "check_decode": sampler.decode,
    "check_multi_axis": transformer.multi_axis_attention,
    "check_token_mask": editing.token_mask,
    "check_order": board,
    "check_world": Corners,
    "check_margin": sampler.margin,
    "check_threshold": threshold,
    "check_paired": paired,
    "check_attention": lambda q, k, v, attend: F.scaled_dot_product_attention(q, k, v, attn_mask=attend),
    "check_unigram": train_log.unigram_entropy,
    "check_resample_step": resample_step,
    "check_join_memory": join_memory,
    "check_grow": grow,
    "check_psnr": eval_metrics.psnr,
    "check_layer_parameters": lambda width, mlp_width: 8 * width**2 + 2 * width * mlp_width,
    "check_training_flops": lambda parameters, tokens: 6 * parameters * tokens,
    "check_nearest_picture": lambda samples, train: (
        (d := torch.cdist(samples.flatten(1).float(), train.flatten(1).float()).min(1)).values
        / samples[0].numel() ** 0.5,
        d.indices,
    ),
    "check_copied": lambda samples, held_out, q=0.1: (samples < held_out.quantile(q)).float().mean(),
    "check_sharded_bytes": lambda parameters, processes, sharded: 18 * parameters / (processes if sharded else 1),
    "check_add_noise": lambda x, noise, a: a**0.5 * x + (1 - a) ** 0.5 * noise,
    "check_ddim_step": ddim_step,
    "check_wilson": wilson,
    "check_frechet": frechet,
}


def wald(right, n):
    p = right / n
    return p - 1.96 * (p * (1 - p) / n) ** 0.5, p + 1.96 * (p * (1 - p) / n) ** 0.5


def roots_apart(c1, c2):
    """tr(C1^(1/2) C2^(1/2)), which is as large only where the two commute."""
    parts = [torch.linalg.eigh(c) for c in (c1, c2)]
    return torch.trace(torch.linalg.multi_dot([m for w, v in parts for m in (v * w.sqrt(), v.T)]))


def cosine_rates(n, generator):
    return masking.sample_mask_rate(n, generator=generator)


def mask_rows_alike(tokens, rate, generator):
    return masking.random_mask(tokens[:1], rate[:1], generator).expand_as(tokens)


def decode_with(**change):
    """Our decode with other arguments, or with each state changed by `after`."""
    after = change.pop("after", lambda state, before: state)

    def decode(logits_fn, tokens, **how):
        before = tokens
        for step in sampler.decode(logits_fn, tokens, **how | change):
            before = after(step.tokens, before)
            yield before

    return decode


def blind(logits_fn, tokens, **how):
    return sampler.decode(lambda _, u: logits_fn(tokens, u), tokens, **how)


def all_at_once(logits_fn, tokens, *, mask_id, steps, generator):
    yield tokens.masked_fill(tokens == mask_id, 0)


def redraw(logits_fn, tokens, *, mask_id, steps, generator):
    """Pitfall 8: what was fixed is drawn again at each step."""
    for step in sampler.decode(logits_fn, tokens, mask_id=mask_id, steps=steps, generator=generator):
        tokens = torch.where(
            step.masked, mask_id, logits_fn(step.tokens, 0.0).argmax(-1) if step.index else step.tokens
        )
        yield tokens


def drop(fraction=lambda p: p, null=cfg.null_text, whole=False):
    def drop_text(context, p, generator=None):
        u = torch.rand(1 if whole else len(context.mask), generator=generator)
        gone = (u < fraction(p)).expand(len(context.mask))
        return Context(torch.where(gone[:, None, None], 0, context.embeds), context.mask)

    return drop_text


def attention(block_of):
    def fn(q, k, v, block):
        local, dilated = block_of
        out = transformer.multi_axis_attention(q, k, v, block)
        return torch.cat([out[:, :1] if local else out[:, 1:], out[:, 1:] if dilated else out[:, :1]], 1)

    return fn


def ce(logits, targets):
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


WRONG = [
    ("check_order", lambda logits, drawn, masked, u: None, "a score for each place"),
    ("check_order", lambda l, d, m, u: -board(l, d, m, u), "every black field scores above every white one"),
    ("check_order", sampler.raster, "every black field scores above every white one"),
    ("check_world", corners(mend=1.1), "all pictures together have probability 1"),
    ("check_world", corners(agree=0.5), "the first and the last agree in 9 of 10"),
    ("check_world", corners(coin=0.4), "the others are fair coins"),
    ("check_world", Deaf, "evidence weighs pictures: log of the sum over x of p(x) e_1(x_1) ... e_N(x_N)"),
    ("check_add_noise", lambda x, noise, a: (1 - a) ** 0.5 * x + a**0.5 * noise, "a = 1 leaves the picture"),
    ("check_add_noise", lambda x, noise, a: x + (1 - a) ** 0.5 * noise, "a = 0 is noise alone"),
    ("check_add_noise", lambda x, noise, a: a * x + (1 - a) * noise, "the variance stays: amounts are square roots"),
    ("check_ddim_step", lambda x, noise, now, then: x, "then = 1 gives the picture"),
    ("check_ddim_step", lambda *given: given[3] ** 0.5 * ddim_step(*given[:3], 1.0), "nothing moves where then = now"),
    (
        "check_ddim_step",
        lambda x, noise, now, then: x if then == now else ddim_step(x, noise, now, 1.0),
        "the same picture and noise, in another ratio",
    ),
    ("check_pool", lambda c: None, "one token is its own mean"),
    ("check_pool", lambda c: c.embeds.mean((0, 1))[None].expand(len(c.embeds), -1), "each prompt has its own"),
    ("check_pool", lambda c: c.embeds.mean(1), "padding does not count"),
    ("check_nearest", lambda z, book: nearest(z, book).float(), "a code is nearest to itself"),
    (
        "check_nearest",
        lambda z, book: (z.flatten(2).transpose(1, 2) @ book.T).argmax(-1),
        "nearest by distance, not by product",
    ),
    (
        "check_nearest",
        lambda z, book: torch.cdist(z.reshape(1, -1, book.shape[1]), book).argmin(-1),
        "tokens are read row by row, a vector from each place",
    ),
    (
        "check_nearest",
        lambda z, book: nearest(z.transpose(2, 3), book),
        "tokens are read row by row, a vector from each place",
    ),
    ("check_straight_through", lambda z, q: z, "forwards it is q"),
    ("check_straight_through", lambda z, q: q.detach(), "backwards the gradient passes to z as it is"),
    ("check_straight_through", lambda z, q: q, "backwards the gradient passes to z as it is"),
    ("check_straight_through", lambda z, q: z - z.detach() + q, "on this way no gradient reaches q"),
    ("check_schedule", lambda u: u, "at u = 0 all is masked"),
    ("check_schedule", lambda u: 1.0, "at u = 1 nothing is"),
    ("check_schedule", lambda u: (1 - u) * (1 + 5 * u), "it never rises"),
    ("check_mask_rate", lambda n, generator: torch.rand((), generator=generator), "one rate an example"),
    (
        "check_mask_rate",
        lambda n, generator: cosine_rates(1, generator).expand(n),
        "rates differ within a batch",
    ),
    ("check_mask_rate", lambda n, generator: masking.sample_mask_rate(n), "the generator decides"),
    ("check_mask_rate", lambda n, generator: 1.4 * cosine_rates(n, generator), "rates lie in [0, 1]"),
    ("check_mask_rate", lambda n, generator: 1 - cosine_rates(n, generator), "the mean is 2 / pi"),
    ("check_mask_rate", lambda n, generator: torch.rand(n, generator=generator), "the mean is 2 / pi"),
    (
        "check_mask_rate",
        lambda n, generator: 2 / math.pi * torch.rand(n, generator=generator).acos(),
        "P(r > 0.9) = 0.287",
    ),
    (
        "check_mask_rate",
        lambda n, generator: masking.sample_mask_rate(n, schedule="arccos", generator=generator),
        "P(r > 0.9) = 0.287",
    ),
    ("check_random_mask", lambda tokens, rate, generator: rate, "True says masked"),
    (
        "check_random_mask",
        lambda tokens, rate, generator: ~masking.random_mask(tokens, rate, generator),
        "True says masked",
    ),
    (
        "check_random_mask",
        lambda tokens, rate, generator: torch.rand(tokens.shape, generator=generator) < rate[:, None],
        "exactly ceil(r N) are masked",
    ),
    (
        "check_random_mask",
        lambda tokens, rate, generator: masking.random_mask(tokens, rate[:1].expand(len(rate)), generator),
        "each row has its own rate",
    ),
    (
        "check_random_mask",
        lambda tokens, rate, generator: (
            masking.uniforms(1, tokens.shape[1], generator=generator).argsort(1).argsort(1)
            < masking.masked_counts(rate, tokens.shape[1])[:, None]
        ),
        "each row has its own places",
    ),
    (
        "check_random_mask",
        lambda tokens, rate, generator: (
            masking.random_mask(tokens, rate, generator).sort(1, descending=bool(tokens.shape[1] < 16)).values
            if tokens.shape[1] != 16
            else masking.random_mask(tokens, rate, generator)
        ),
        "all places are as likely",
    ),
    ("check_masked_loss", lambda logits, targets, masked: ce(logits, targets).mean(), "tokens that are not masked"),
    (
        "check_masked_loss",
        lambda logits, targets, masked: (ce(logits, targets) * ~masked).sum() / (~masked).sum(),
        "equal logits cost log V",
    ),
    (
        "check_masked_loss",
        lambda logits, targets, masked: masking.masked_cross_entropy(-logits, targets, masked),
        "it is the cross-entropy of the target",
    ),
    (
        "check_masked_loss",
        lambda logits, targets, masked: ((ce(logits, targets) * masked).sum(1) / masked.sum(1)).mean(),
        "the mean is over the batch's masked tokens",
    ),
    (
        "check_masked_loss",
        lambda logits, targets, masked: (ce(logits, targets) * masked).sum() / masked.sum(),
        "nothing masked costs 0",
    ),
    ("check_drop_text", lambda context, p, generator: None, "p = 0 leaves all as it is"),
    ("check_drop_text", drop(lambda p: 1 - p), "p = 0 leaves all as it is"),
    ("check_drop_text", drop(whole=True), "a fraction p is removed, each text by itself"),
    ("check_drop_text", drop(), "removed text has no text token in its mask"),
    ("check_guide", lambda c, u, t: ..., "t = 0 gives the conditional logits"),
    ("check_guide", lambda c, u, t: u + t * (c - u), "t = 0 gives the conditional logits"),
    ("check_guide", lambda c, u, t: (1 + t) * c + t * u, "cond = uncond gives cond, whatever t"),
    ("check_guide", lambda c, u, t: c + t * (u - c), "l_g = (1 + t) l_c - t l_u"),
    ("check_rising", lambda t, start: t, "it begins at start"),
    ("check_rising", lambda t, start: lambda u: t * u, "it begins at start"),
    ("check_rising", lambda t, start: lambda u: start + t * u, "it ends at t"),
    ("check_rising", lambda t, start: lambda u: start + (t - start) * u**2, "it is linear"),
    ("check_reveal_counts", lambda n, steps: [1] * min(n, steps), "counts sum to n"),
    ("check_reveal_counts", lambda n, steps: [0] * (steps - 1) + [n], "each step reveals at least one"),
    ("check_reveal_counts", lambda n, steps: [n], "as many steps as asked for, or as tokens"),
    (
        "check_reveal_counts",
        lambda n, steps: masking.reveal_counts(n, steps, "linear"),
        "after step i, floor(n cos(pi/2 (i+1)/T)) stay masked",
    ),
    ("check_decode", lambda logits_fn, tokens, mask_id, steps, generator: [tokens], "in the end nothing is masked"),
    ("check_decode", all_at_once, "each step reveals what the cosine says"),
    ("check_decode", decode_with(schedule="linear"), "each step reveals what the cosine says"),
    ("check_decode", redraw, "what is revealed stays"),
    (
        "check_decode",
        decode_with(after=lambda state, before: state.index_fill(1, torch.tensor([1]), 5) if 3 in before else state),
        "what was given stays",
    ),
    ("check_decode", decode_with(order="random"), "the surest are revealed first"),
    ("check_decode", decode_with(order=lambda *x: -sampler.confidence(*x)), "the surest are revealed first"),
    ("check_decode", blind, "the model sees what was revealed"),
    ("check_decode", decode_with(sampling_temperature=0.0), "tokens are drawn, each with its probability"),
    ("check_decode", decode_with(sampling_temperature=3.0), "tokens are drawn, each with its probability"),
    ("check_multi_axis", lambda q, k, v, block: v, "the first half of the heads sees its own block"),
    (
        "check_multi_axis",
        lambda q, k, v, block: F.scaled_dot_product_attention(q, k, v),
        "the first half of the heads sees its own block",
    ),
    ("check_multi_axis", attention((False, True)), "the first half of the heads sees its own block"),
    ("check_multi_axis", attention((True, False)), "the second half sees its own place in every block"),
    (
        "check_multi_axis",
        lambda q, k, v, block: transformer.multi_axis_attention(q, k * 2, v, block),
        "weights are softmax(q k / sqrt(d))",
    ),
    ("check_token_mask", lambda repaint, f: repaint, "nothing to repaint masks nothing"),
    ("check_token_mask", lambda repaint, f: repaint[:, ::f, ::f].flatten(1), "one pixel masks its token"),
    (
        "check_token_mask",
        lambda repaint, f: F.avg_pool2d(repaint.float(), f).flatten(1) >= 0.5,
        "one pixel masks its token",
    ),
    (
        "check_token_mask",
        lambda repaint, f: editing.token_mask(repaint.transpose(1, 2), f),
        "one pixel masks its token",
    ),
    ("check_paired", lambda a, b: (b.mean() - a.mean(), paired(a, b)[1]), "the mean of a - b"),
    ("check_paired", lambda a, b: (paired(a, b)[0], torch.hypot(a.std(), b.std())), "what is common"),
    ("check_paired", lambda a, b: (paired(a, b)[0], (a - b).std()), "1.96 times"),
    ("check_threshold", lambda l, m, u: ((l.softmax(-1)[..., 0] >= 0.9) & m).sum(1), "certain tokens count"),
    ("check_threshold", lambda l, m, u: threshold(l, m, u, at=0.5), "certain tokens count"),
    ("check_threshold", lambda l, m, u: threshold(l, m | True, u), "known tokens do not count"),
    ("check_margin", lambda logits, *_: logits.softmax(-1).amax(-1), "two codes alike are no margin"),
    ("check_margin", lambda logits, *_: logits.topk(2).values.diff().neg()[..., 0], "it is the first less the second"),
    ("check_margin", lambda logits, *_: logits[..., 0].exp() - logits[..., 1].exp(), "it is the first less the second"),
    (
        "check_margin",
        lambda logits, *_: (logits.softmax(-1)[..., 0] - logits.softmax(-1)[..., 1]).abs(),
        "codes may come in any order",
    ),
    (
        "check_margin",
        lambda logits, drawn, *_: sampler.margin(logits, drawn, None, 0.0) * (drawn == logits.argmax(-1)),
        "what was drawn does not count",
    ),
    ("check_attention", lambda q, k, v, attend: (q @ k.mT).sigmoid() @ v, "weights are a softmax over the memory"),
    ("check_attention", lambda q, k, v, attend: (q @ k.mT).softmax(-1) @ v, "scores are divided by sqrt(d)"),
    ("check_attention", lambda q, k, v, attend: v.mean(2, keepdim=True), "weights are a softmax over the memory"),
    (
        "check_attention",
        lambda q, k, v, attend: F.scaled_dot_product_attention(q[:, :, :1], k, v).expand(*q.shape[:3], v.shape[-1]),
        "each query has its own weights",
    ),
    (
        "check_attention",
        lambda q, k, v, attend: F.scaled_dot_product_attention(q, k, v),
        "what is not attended does not count",
    ),
    (
        "check_attention",
        lambda q, k, v, attend: F.scaled_dot_product_attention(q, k * attend.mT, v * attend.mT),
        "what is not attended does not count",
    ),
    ("check_unigram", lambda tokens, size: math.log(size), "codes that never occur do no harm"),
    (
        "check_unigram",
        lambda tokens, size: -sum(p * p.log2() for p in tokens.unique(return_counts=True)[1] / tokens.numel()),
        "two codes, equally common, have log 2",
    ),
    (
        "check_unigram",
        lambda tokens, size: -sum(p * p.log() for p in tokens.flatten().bincount(minlength=size) / tokens.numel()),
        "codes that never occur do no harm",
    ),
    ("check_unigram", lambda tokens, size: math.log(len(tokens.unique())), "how common each is counts"),
    (
        "check_unigram",
        lambda tokens, size: sum(train_log.unigram_entropy(row, size) for row in tokens) / len(tokens),
        "it is of all pictures together",
    ),
    ("check_resample_step", lambda _, tokens, **how: tokens.masked_fill(mask_of(tokens, 0.5, None), 2), "every state"),
    (
        "check_resample_step",
        redrawn(lambda t, fraction, g: torch.rand(t.shape, generator=g) < fraction),
        "exactly ceil(fraction",
    ),
    ("check_resample_step", redrawn(mask_of, lambda tokens, masked: tokens), "the model sees [MASK] there"),
    (
        "check_resample_step",
        redrawn(lambda t, fraction, g: torch.arange(8)[None] < math.ceil(8 * fraction)),
        "the places are",
    ),
    ("check_join_memory", lambda text, mask, low: join_memory(low, mask, text), "along the sequence"),
    ("check_join_memory", lambda text, mask, low: (text + low.mean(1, keepdim=True), mask), "along the sequence"),
    (
        "check_join_memory",
        lambda text, mask, low: (torch.cat([text, low], 1), torch.ones(2, 5).bool()),
        "padding is not attended to",
    ),
    ("check_grow", lambda weight, o, i: torch.randn(o, i), "the old weights fill the leading block"),
    ("check_grow", lambda weight, o, i: grow(weight, o, i, hears=0.1), "old outputs stay"),
    ("check_grow", lambda weight, o, i: grow(weight, o, i, says=0.0), "new outputs are not all zero"),
    ("check_psnr", lambda x, y: -10 * (x - y).square().mean((1, 2, 3)).log10(), "10 log10(1 / MSE)"),
    ("check_psnr", lambda x, y: eval_metrics.psnr(x, y).mean().expand(len(x)), "one figure an image"),
    (
        "check_psnr",
        lambda x, y: -20 * ((x - y) / 2).abs().mean((1, 2, 3)).clamp(min=1e-5).log10(),
        "the error is squared",
    ),
    ("check_layer_parameters", lambda width, mlp_width: 12 * width**2, "the MLP goes up and down"),
    (
        "check_layer_parameters",
        lambda width, mlp_width: 4 * width**2 + 2 * width * mlp_width,
        "attention to itself and to the text: four square matrices each",
    ),
    (
        "check_training_flops",
        lambda parameters, tokens: 2 * parameters * tokens,
        "a multiplication and an addition forwards, and two such products backwards",
    ),
    ("check_training_flops", lambda parameters, tokens: 6 * parameters, "each parameter meets each token"),
    (
        "check_nearest_picture",
        lambda x, y: (torch.zeros(3), torch.zeros(3, dtype=torch.long)),
        "which training picture",
    ),
    ("check_nearest_picture", lambda x, y: (torch.ones(3), torch.tensor([1, 0, 2])), "a copy is at distance 0"),
    (
        "check_nearest_picture",
        lambda x, y: tuple(torch.cdist(x.flatten(1).float(), y.flatten(1).float()).min(1)),
        "the root of the mean",
    ),
    ("check_copied", lambda x, y, q: (x > y.quantile(q)).float().mean(), "held-out pictures themselves"),
    ("check_copied", lambda x, y, q: 0.1, "copies: all"),
    ("check_copied", lambda x, y, q: (x < y.quantile(0.1)).float().mean(), "the quantile is q's"),
    ("check_sharded_bytes", lambda p, n, sharded: 16 * p / n, "weight 4, gradient 4, two moments 8, bf16 copy 2"),
    ("check_sharded_bytes", lambda p, n, sharded: 18 * p / n, "without sharding each process holds all"),
    ("check_sharded_bytes", lambda p, n, sharded: 18 * p, "sharded, each holds its part"),
    ("check_wilson", lambda k, n: (k / n + 0.1, k / n + 0.2), "it holds the fraction itself"),
    ("check_wilson", wald, "all right is not yet 100%"),
    ("check_wilson", lambda k, n: wilson(k, n) if k else (0.0, 0.0), "none right is not yet 0%"),
    ("check_wilson", lambda k, n: wilson(k, n) if n < 30 else wilson(9, 10), "more pictures make it narrower"),
    ("check_wilson", lambda k, n: wald(k, n) if n == 10 else wilson(k, n), "its middle is"),
    ("check_frechet", lambda m1, c1, m2, c2: c1.trace() + c2.trace(), "a Gaussian is at 0 from itself"),
    ("check_frechet", lambda m1, c1, m2, c2: frechet(m1, c1, m2, c2) - (m1 - m2).square().sum(), "means count"),
    ("check_frechet", lambda m1, c1, m2, c2: (m1 - m2).square().sum() + (c1 - c2).square().sum(), "so do standard"),
    ("check_frechet", lambda *given: frechet(*given, lambda c1, c2: (c1.diag() * c2.diag()).sqrt().sum()), "and corr"),
    ("check_frechet", lambda *given: frechet(*given, roots_apart), "the root is of the matrix"),
]


def test_all_checks_are_here():
    assert set(OURS) == {name for name in vars(checks) if name.startswith("check_")}
    assert {check for check, *_ in WRONG} == set(OURS)


@pytest.mark.parametrize("check", OURS)
def test_our_own_functions_pass(check):
    verdict = getattr(checks, check)(OURS[check])
    assert verdict, repr(verdict)
    assert repr(verdict) == f"{check}: all {verdict.properties} properties hold"


@pytest.mark.parametrize(("check", "fn", "failed"), WRONG, ids=[f"{c}-{i}" for i, (c, *_) in enumerate(WRONG)])
def test_a_mistake_fails_by_name(check, fn, failed):
    verdict = getattr(checks, check)(fn)
    assert not verdict
    assert verdict.failed.startswith(failed), repr(verdict)
    assert len(verdict.found) > 10, "no counter-example is shown"
    assert failed in repr(verdict)


@pytest.mark.parametrize("check", OURS)
@pytest.mark.parametrize("stub", [lambda *a, **k: None, lambda: None, lambda *a, **k: 1 / 0])
def test_stubs_and_errors_are_verdicts(check, stub):
    verdict = getattr(checks, check)(stub)
    assert not verdict
    assert verdict.found


def test_counter_examples_are_small():
    said = repr(checks.check_guide(lambda c, u, t: u + t * (c - u)))
    assert said == (
        "check_guide FAILS: t = 0 gives the conditional logits\n"
        "    fn(cond=[2.0], uncond=[1.0], t=0.0) gave [1.0]; expected [2.0]"
    )
    said = checks.check_reveal_counts(lambda n, steps: [0] * (steps - 1) + [n]).found
    assert said == "fn(1, 2) gave [0, 1]", "the smallest n first"
