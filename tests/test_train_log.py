"""train_log.py: the log and the pictures of a run; nothing without a folder."""

import itertools
import json
import math
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats

from minimuse.config import STAGES
from minimuse.masking import masked_cross_entropy
from minimuse.train import MaskedLoss
from minimuse.train_engine import Engine, Progress
from minimuse.train_log import (
    EVERY,
    RATES,
    TrainLog,
    _masks,
    add_record,
    codebook_usage,
    eval_mode,
    likelihood_bound,
    read_log,
    unigram_entropy,
    validate,
)
from minimuse.train_state import open_run
from minimuse.transformer import Transformer, TransformerConfig


@pytest.fixture
def config(tiny_muse):
    return tiny_muse.config


def watch(config, folder):
    return TrainLog(config, Engine(device="cpu", bf16=False, folder=folder))


def walk(eyes, stage, steps, of=40, first=0, **figures):
    """A stage's Progress of each of `steps`; before it, as a resumed stage does, one without figures."""
    if first:
        eyes(Progress(stage, first, of, {}, None))
    return [eyes(Progress(stage, step, of, {"loss": 1 / step, **figures}, None)) for step in steps]


def steps_of(folder, stage="base"):
    return [line["step"] for line in read_log(folder / "log.jsonl") if line["stage"] == stage]


# --- the log ----------------------------------------------------------------------------------------------------------


def test_a_line_every_ten_steps_and_the_last(config, tmp_path):
    walk(watch(config, tmp_path), "base", range(1, 38), of=37)
    assert steps_of(tmp_path) == [10, 20, 30, 37], f"{steps_of(tmp_path)}, every {EVERY}th"
    text = (tmp_path / "log.jsonl").read_text()
    first = json.loads(text.splitlines()[0])
    assert first.keys() == {"stage", "step", "loss", "images_per_s"}, "a JSON object a line"
    assert (first["stage"], first["loss"]) == ("base", 0.1), f"{first}"


def test_validation_is_logged_whenever_it_comes(config, tmp_path):
    eyes = watch(config, tmp_path)
    walk(eyes, "base", range(1, 4))
    walk(eyes, "base", [4], held_out_bound=2.0)
    assert steps_of(tmp_path) == [4], "a step with held-out figures has its line"
    assert read_log(tmp_path / "log.jsonl")[0]["held_out_bound"] == 2.0, "which holds them"


def test_a_stage_of_one_step_is_logged(config, tmp_path):
    walk(watch(config, tmp_path), "base", [1], of=1)
    walk(watch(config, tmp_path), "base", [1], of=1)  # it died before it was saved, and does the step again
    assert steps_of(tmp_path) == [1], f"{steps_of(tmp_path)}"


def test_what_is_no_stage_is_not_logged(config, tmp_path):
    eyes = watch(config, tmp_path)
    told = [eyes(Progress("done", 1, 1, {"minutes": 2.0}, None)) for _ in range(2)]
    assert told == [{"minutes": 2.0}] * 2, f"its figures pass through: {told}"
    assert not (tmp_path / "log.jsonl").exists(), "the log is of stages"


def test_speed_by_hand(config, tmp_path, monkeypatch):
    clock = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("minimuse.train_log.time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    eyes = watch(config, tmp_path)
    first, second, third = walk(eyes, "base", [1, 2, 6])
    assert "images_per_s" not in first, "before the first step there is nothing to measure from"
    batch = config.stages["base"].batch
    assert second["images_per_s"] == pytest.approx(batch / 2.0), "a step in 2 seconds"
    assert third["images_per_s"] == pytest.approx(4 * batch / 2.0), "four in 2 seconds"


def test_steps_done_again_after_a_resume_are_logged_once(config, tmp_path):
    walk(watch(config, tmp_path), "low_tokenizer", range(1, 41))
    walk(watch(config, tmp_path), "base", range(1, 36))  # and dies; its last state is of step 20
    walk(watch(config, tmp_path), "base", range(21, 41), first=20)
    assert steps_of(tmp_path) == [10, 20, 30, 40], f"{steps_of(tmp_path)}"
    assert steps_of(tmp_path, "low_tokenizer") == [10, 20, 30, 40], "another stage's lines stay"
    assert {p.name for p in tmp_path.iterdir()} == {"log.jsonl"}, "nothing is left of the rewriting"


def test_a_stage_begun_anew_forgets_what_it_had_logged(config, tmp_path):
    walk(watch(config, tmp_path), "base", range(1, 16))  # and dies before its first state
    walk(watch(config, tmp_path), "base", range(1, 41))
    assert steps_of(tmp_path) == [10, 20, 30, 40], f"{steps_of(tmp_path)}"


def test_a_half_written_last_line(config, tmp_path):
    path = tmp_path / "log.jsonl"
    walk(watch(config, tmp_path), "base", range(1, 31))
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert steps_of(tmp_path) == [10, 20], "the torn line is passed over, those before it are read"
    walk(watch(config, tmp_path), "base", range(21, 41), first=20)
    assert steps_of(tmp_path) == [10, 20, 30, 40], "and a resumed run writes on below it"
    for line in path.read_text().splitlines():
        json.loads(line)


def test_damaged_lines_are_passed_over(config, tmp_path):
    """Any flipped bit: the other lines are read, and a resumed run goes on."""
    path = tmp_path / "log.jsonl"
    walk(watch(config, tmp_path), "base", range(1, 31))
    whole, first = path.read_bytes(), path.read_bytes().index(b"\n")
    for at in range(first):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        assert [line["step"] for line in read_log(path)][-2:] == [20, 30], flipped[:first]
        walk(watch(config, tmp_path), "base", [31], first=30)
    for text in (
        "3",
        "[1]",
        '{"stage": "base"}',
        '{"stage": 1, "step": 1}',
        '{"stage": "base", "step": 1, "loss": "x"}',
    ):
        path.write_text(text + "\n")
        assert read_log(path) == [], text


def test_a_log_that_is_not_there(tmp_path):
    assert read_log(tmp_path / "log.jsonl") == [], "no log is an empty one"


def test_nothing_is_written_without_a_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    eyes = watch(config, None)
    told = walk(eyes, "base", range(1, 12))
    look = eyes.tokenizer("low_tokenizer", torch.zeros(3, 3, 32, 32).byte())
    assert "held_out_psnr" in look(Half(), 1), "validation is part of the figures all the same"
    assert "images_per_s" in told[-1], "and so is the speed"
    assert list(tmp_path.iterdir()) == [], f"{list(tmp_path.iterdir())}"


# --- pictures ---------------------------------------------------------------------------------------------------------


class Half(torch.nn.Module):
    """A tokenizer that gives back images at half their contrast."""

    def encode(self, images):
        assert not self.training, "pitfall 18: looked at in eval mode"
        return images

    def decode(self, tokens):
        return tokens / 2


def test_held_out_psnr_by_hand_and_its_picture(config, tmp_path):
    images = torch.full((12, 3, 32, 32), 255).byte()  # 1 in [-1, 1], given back as 1/2
    model = Half()
    figures = watch(config, tmp_path).tokenizer("low_tokenizer", images)(model, 30)
    assert figures == {"held_out_psnr": pytest.approx(10 * math.log10(4 / 0.25), abs=1e-4)}, f"{figures}"
    assert model.training, "its mode comes back"
    sheet = Image.open(tmp_path / "samples" / "low_tokenizer-0000030.png")
    assert sheet.getpixel((50, 50)) == (255, 255, 255), "above the images"
    assert sheet.getpixel((50, sheet.height - 50)) == (191, 191, 191), "below them what came back"


def test_a_run_leaves_log_and_pictures(tiny_run):
    """Of each stage a line and a picture: tokenizers 8 pairs of about 160 pixels, transformers one for each prompt."""
    log = read_log(tiny_run / "log.jsonl")
    assert [(line["stage"], line["step"]) for line in log] == [(stage, 2) for stage in STAGES], f"{log}"
    assert all("training_psnr" in line for line in log if "token" in line["stage"]), "pitfall 29: of 8 none is held out"
    assert all("training_loss@0.9" in line for line in log if line["stage"] in ("base", "superres")), "losses by rate"
    sizes = {path.name: Image.open(path).size for path in (tiny_run / "samples").iterdir()}
    assert set(sizes) == {f"{stage}-0000002.png" for stage in STAGES}, f"{sizes}"
    side, gap = 160, 8
    pairs = (gap + 8 * (side + gap), gap + 2 * (side + gap))
    assert {sizes[f"{s}-0000002.png"] for s in ("low_tokenizer",)} == {pairs}, f"{sizes}"
    for stage, scale in (("base", 32 * 5), ("superres", 64 * 2)):
        width, height = sizes[f"{stage}-0000002.png"]
        assert width == gap + 3 * (scale + gap), f"{stage}: three columns of {scale} pixels, {width} wide"
        assert height > gap + 2 * (scale + gap), f"{stage}: two rows with their prompts, {height} high"


def test_the_models_go_on_training_after_a_picture(config, tmp_path, tiny_muse):
    """A Muse is frozen; drawing with one must not freeze what trains."""
    from minimuse.muse import build

    parts = build(config).train()
    parts["low_tokenizer"].requires_grad_(False)
    few = replace(config, base_sampling=replace(config.base_sampling, steps=2))
    rows = torch.zeros(2, config.base.tokens, dtype=torch.long), Texts([torch.ones(2, config.base.text_width)] * 2)
    data = types.SimpleNamespace(encoder=tiny_muse.encoder, columns=lambda stage, held_out: rows)
    data.words = lambda: {"examples": ["a red cube"]}
    metrics = watch(few, tmp_path).transformer("base", data, parts)(MaskedLoss(parts["base"]), 7)
    assert "held_out_bound" in metrics
    assert (tmp_path / "samples" / "base-0000007.png").exists(), "the base model draws low-resolution pictures"
    assert all(p.requires_grad for p in parts["base"].parameters()), "the model that trains was frozen"
    assert not any(p.requires_grad for p in parts["low_tokenizer"].parameters()), "what was frozen was wakened"


# --- the model card ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pictures", "said"), [(49, "Nothing is held out"), (5000, "Every 50th picture is held out")])
def test_the_model_card_names_the_data(tmp_path, pictures, said):
    lines = [{"stage": "base", "step": s, "loss": 3.0, "images_per_s": 64.0} for s in (10, 20)]
    lines[1] |= {"loss": 2.0, "training_bound" if pictures < 50 else "held_out_bound": 2.75}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "README.md").write_text("# a card\n")
    data = {"source": str(tmp_path / "my pictures"), "fingerprint": "", "parts": 1, "files": {}}
    open_run(tmp_path / "run", {"config": {}, "seed": 0, "data": data}, resume=False)
    (tmp_path / "run/run.json").rename(tmp_path / "run.json")
    add_record(tmp_path, pictures, 2 * pictures)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# a card\n"), "what stood there stays"
    assert f"Data: {pictures:,} pictures with {2 * pictures:,} captions, from my pictures. {said}" in text, text
    assert (tmp_path / "curves.png").stat().st_size > 1000, "and the curves are drawn"


# --- validation -------------------------------------------------------------------------------------------------------

V, N, D_LM = 8, 16, 6
ENGINE = Engine(device="cpu", bf16=False)


class Texts(list):
    """Unpadded captions, one an example, read as a cache of them is."""

    def pick(self, at, u):
        return [self[i] for i in at.tolist()]


class Spy:
    """A loss by a function of (true tokens, masked) -> logits, which keeps what it was shown."""

    def __init__(self, logits):
        self.logits, self.shown = logits, []

    def modules(self):
        return iter(())

    def eval(self):
        return self

    def __call__(self, x, masked, context, low, count):
        self.shown.append((x, masked, context.embeds[:, 0, 0], low))
        logits = self.logits(x, masked)
        assert not torch.is_grad_enabled(), "validation builds no graph"
        right = ((logits.argmax(-1) == x) & masked).sum() / count
        return masked_cross_entropy(logits, x, masked, count=count), right


def flat(x, masked):
    return torch.zeros(*x.shape, V)


def rows(n=10):
    tokens = torch.randint(V, (n, N), generator=torch.Generator().manual_seed(0))
    return tokens, Texts(torch.full((2, D_LM), float(i + 1)) for i in range(n))


def measure(loss, tokens, texts, *low, **kwargs):
    return validate(loss, tokens, texts, *low, codebook_size=V, engine=ENGINE, **kwargs)


def test_a_flat_model_costs_log_v_at_each_rate():
    tokens, texts = rows()
    metrics = measure(Spy(flat), tokens, texts)
    keys = [f"{name}@{rate}" for rate in RATES for name in ("loss", "accuracy")]
    assert sorted(metrics) == sorted([*keys, "bound", "unigram"]), f"{sorted(metrics)}"
    for key in ("bound", *keys[::2]):
        assert metrics[key] == pytest.approx(math.log(V), rel=1e-6), f"{key} of a flat guess is {metrics[key]}"


def test_a_model_that_knows_all_costs_nothing():
    tokens, texts = rows()
    metrics = measure(Spy(lambda x, masked: 50.0 * F.one_hot(x, V)), tokens, texts)
    assert metrics["bound"] < 1e-6, f"{metrics}"
    assert all(metrics[f"accuracy@{rate}"] == pytest.approx(1) for rate in RATES), "each guess is right"


def test_unigram_entropy_by_hand():
    tokens = torch.tensor([[0, 0, 1, 2]])
    assert unigram_entropy(tokens, 5) == pytest.approx(1.5 * math.log(2)), "1/2, 1/4, 1/4: 1.5 bits"
    assert unigram_entropy(torch.zeros(3, 4).long(), 5) == 0, "one code, no surprise"
    assert unigram_entropy(torch.arange(6)[None], 6) == pytest.approx(math.log(6)), "all equally often"


def test_rates_are_the_buckets_they_name():
    tokens, texts = rows(64)
    spy = Spy(flat)
    measure(spy, tokens, texts, strata=0)
    assert len(spy.shown) == len(RATES), "without strata there is no bound to pay for"
    for rate, (_, masked, *_) in zip(RATES, spy.shown, strict=True):
        share = masked.float().mean(1)
        assert ((rate - 0.1 <= share) & (share <= rate + 0.1 + 1 / N)).all(), f"{rate}: {share}, rounded up to tokens"
        assert len(share.unique()) > 2, "one rate an example, not one a batch"


def test_the_bound_is_the_mean_over_uniform_counts():
    """A model whose loss is a function of the count alone: k masked cost log(1 + k) each; D3PM's mean by hand."""
    n = 8

    def by_count(x, masked):
        k = masked.sum(1, keepdim=True).float()  # p(x) = 1 / (1 + k), the rest on one other code
        true = F.one_hot(x, V).bool()
        other = F.one_hot((x + 1) % V, V).bool()
        p = torch.where(true, (1 / (1 + k))[..., None], torch.where(other, (k / (1 + k))[..., None], 1e-30))
        return p.log()

    tokens, texts = torch.randint(V, (6, n)), Texts([torch.ones(1, D_LM)] * 6)
    spy = Spy(by_count)
    metrics = measure(spy, tokens, texts)
    counts = [shown[1].sum(1) for shown in spy.shown[len(RATES) :]]
    assert [c.unique().tolist() for c in counts] == [[k] for k in range(1, n + 1)], "8 strata of 8: each count once"
    exact = sum(math.log(1 + k) for k in range(1, n + 1)) / n
    assert metrics["bound"] == pytest.approx(exact, rel=1e-5), "the bound is not the mean over uniform counts"


def test_the_bound_holds_for_a_world_that_is_known():
    """Two tokens that are equal: -log p / N = log(V) / 2, and for the perfect model the bound is no bound but exact."""
    values = torch.arange(V)

    def perfect(x, masked):
        both = masked.all(1)[:, None, None]
        seen = torch.where(masked[:, :1], x[:, 1:], x[:, :1])  # the one that is not masked
        return torch.where(both, 0.0, 50.0 * F.one_hot(seen, V)).expand(-1, 2, -1)

    tokens, texts = values[:, None].expand(V, 2).contiguous(), Texts([torch.ones(1, D_LM)] * V)
    bound = measure(Spy(perfect), tokens, texts)["bound"]
    assert bound == pytest.approx(math.log(V) / 2, rel=1e-5), "k = 1 costs 0, k = 2 costs log V each: mean log(V) / 2"


def test_masks_are_functions_of_the_example():
    tokens, _ = rows(6)
    for all_, some in zip(_masks(tokens, torch.arange(6), 0), _masks(tokens[2:5], torch.arange(2, 5), 0), strict=True):
        assert all_[1][2:5].equal(some[1]), "an example's mask depends on its neighbours"
    masks = [m for _, m in _masks(tokens, torch.arange(6), 8)]
    torch.manual_seed(99)
    assert all(a.equal(b[1]) for a, b in zip(masks, _masks(tokens, torch.arange(6), 8), strict=True)), "and on nothing"
    assert not masks[2][0].equal(masks[2][1]), "two examples share a mask"


def test_texts_and_low_tokens_belong_to_their_image():
    tokens, texts = rows(10)
    low = torch.arange(10)[:, None].expand(10, 4)
    spy = Spy(flat)
    measure(spy, tokens, texts, low, batch=4)
    for x, _, text, seen in spy.shown:
        at = (text - 1).long()
        assert x.equal(tokens[at]), "a caption of another example"
        assert seen[:, 0].equal(at), "low-resolution tokens of another example"
    assert sum(len(shown[0]) for shown in spy.shown) == 10 * (len(RATES) + 8), "each example once a mask"


@pytest.mark.parametrize("side", [10, 12])
def test_counts_of_the_bound_are_exact_where_n_is_no_power_of_two(side):
    """count / N in float32 is too large for some counts, and one more token would be masked."""
    x = torch.zeros(1, side**2, dtype=torch.long)
    counts = [int(masked.sum()) for names, masked in _masks(x, torch.arange(1), side**2) if "bound" in names[0]]
    assert counts == list(range(1, side**2 + 1))


def test_at_most_so_many_examples():
    tokens, texts = rows(10)
    spy = Spy(flat)
    measure(spy, tokens, texts, most=3)
    assert {len(shown[0]) for shown in spy.shown} == {3}, "`most` is not kept to"


def test_looking_changes_nothing():
    """Modes, gradients and the global draws are as before; within, everything is in eval mode."""
    model = Transformer(
        TransformerConfig(
            codebook_size=V, grid=4, text_width=D_LM, width=32, layers=2, heads=2, mlp_width=64, dropout=0.5
        )
    )
    loss = MaskedLoss(model).train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.Linear))
    frozen.eval()
    tokens, texts = rows()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    a = measure(loss, tokens, texts)
    assert a == measure(loss, tokens, texts), "dropout was on, or a mask differs from look to look"
    assert torch.get_rng_state().equal(state), "looking used up draws of the training"
    assert [m.training for m in (loss, model, frozen)] == [True, True, False], "a part's mode is not what it was"
    assert all(v.equal(before[k]) for k, v in model.state_dict().items()), "looking moved a weight"
    assert all(p.grad is None and p.requires_grad for p in model.parameters()), "looking left gradients"


def test_modes_come_back_after_an_error():
    net, part = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout()), []

    def broken():
        with eval_mode(net):
            part.extend(m.training for m in net.modules())
            raise RuntimeError("within")

    net[1].eval()
    with pytest.raises(RuntimeError, match="within"):
        broken()
    assert part == [False] * 3, "eval mode within"
    assert [m.training for m in net.modules()] == [True, True, False], "an error within left eval mode on"


@pytest.mark.parametrize(
    ("tokens", "size", "used", "perplexity"),
    [
        ([0, 0, 0, 0], 8, 1 / 8, 1.0),
        ([0, 1, 2, 3], 4, 1.0, 4.0),
        ([5, 5, 7, 7], 8, 2 / 8, 2.0),
        ([0, 0, 0, 1], 2, 1.0, math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))),
    ],
)
def test_pitfall_19_usage_and_perplexity_by_hand(tokens, size, used, perplexity):
    got = codebook_usage(torch.tensor(tokens).view(2, 2), size)
    assert got == (pytest.approx(used), pytest.approx(perplexity)), f"{tokens} of {size} codes"


# --- the likelihood bound ---------------------------------------------------------------------------------------------

P = torch.tensor([[0.4, 0.1], [0.15, 0.35]])  # p(x0, x1): two dependent tokens of two codes
MASK = 2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def oracle(tokens):
    """Exact conditionals of P, (B, 2) -> (B, 2, 2)."""
    table = {MASK: (P.sum(1), P.sum(0)), 0: (P[:, 0], P[0]), 1: (P[:, 1], P[1])}
    rows = [torch.stack([table[b][0], table[a][1]]) for a, b in tokens.tolist()]
    return torch.stack(rows).log()  # not normalized: a softmax does that


def test_likelihood_bound_is_exact_for_exact_conditionals():
    """Its mean over k and masks is the mean over orders of the chain rule, and that is -log p(x) / N for any x."""
    for x in itertools.product((0, 1), repeat=2):
        tokens = torch.tensor([x]).repeat(4000, 1)
        bound = likelihood_bound(oracle, tokens, MASK, seeded(sum(x)))
        assert bound.shape == (4000,), "one estimate an example"
        nll, error = -P[x].log().item() / 2, 4 * bound.std().item() / 4000**0.5
        assert bound.mean().item() == pytest.approx(nll, abs=error), f"x = {x}: -log p / N is {nll:.4f}"


def test_likelihood_bound_takes_the_values_of_the_enumeration():
    """For x = (0, 1): {0} masked, {1} masked, or both; k = 1 and k = 2 equally often."""
    tokens = torch.tensor([[0, 1]]).repeat(6000, 1)
    bound = likelihood_bound(oracle, tokens, MASK, seeded())
    only_0, only_1 = -math.log(0.1 / 0.45), -math.log(0.1 / 0.5)
    both = -(math.log(0.5) + math.log(0.45)) / 2
    for value, share in ((only_0, 0.25), (only_1, 0.25), (both, 0.5)):
        seen = (bound - value).abs().lt(1e-5).float().mean().item()
        assert seen == pytest.approx(share, abs=0.03), f"{value:.3f} should come up {share:.0%} of the time"


def test_likelihood_bound_of_a_worse_model_is_above_the_entropy():
    """A model that ignores the other token pays their mutual information, and no model goes below the entropy."""
    x = torch.multinomial(P.flatten(), 20_000, replacement=True, generator=seeded())
    tokens = torch.stack([x // 2, x % 2], 1)
    entropy = -(P * P.log()).sum().item() / 2
    apart = torch.stack([P.sum(1), P.sum(0)]).log()
    exact = likelihood_bound(oracle, tokens, MASK, seeded(1)).mean().item()
    worse = likelihood_bound(lambda t: apart.expand(len(t), 2, 2), tokens, MASK, seeded(1)).mean().item()
    information = (P * (P / (P.sum(1, keepdim=True) * P.sum(0))).log()).sum().item()
    assert exact == pytest.approx(entropy, abs=0.01), "the exact model reaches the entropy a token"
    assert worse == pytest.approx(entropy + information / 2, abs=0.01), "independence costs I(x0; x1) / N"


def test_likelihood_bound_hides_what_it_scores():
    seen = []

    def spy(tokens):
        seen.append(tokens)
        return torch.zeros(*tokens.shape, 5)

    tokens = torch.randint(5, (500, 6), generator=seeded())
    bound = likelihood_bound(spy, tokens, 5, seeded())
    hidden = (seen[0] == 5).sum(1)
    assert hidden.unique().tolist() == [1, 2, 3, 4, 5, 6], "k runs over 1..N"
    assert stats.chisquare(torch.bincount(hidden)[1:].numpy()).pvalue > 1e-3, "k is uniform"
    assert bound.allclose(torch.tensor(5.0).log()), "a uniform model scores log V, whatever k"
    assert (seen[0] == tokens)[seen[0] != 5].all(), "the rest is shown as it is"
