"""train_doctor.py: no false alarm on models that learnt their task, a true one on each that is broken on purpose."""

import copy
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from minimuse import checkpoint, cli
from minimuse import train_state as runs
from minimuse.config import StageConfig
from minimuse.data_cache import Subset
from minimuse.masking import masked_cross_entropy
from minimuse.train import MaskedLoss, train_tokenizer, train_transformer
from minimuse.train_doctor import (
    HINTS,
    Finding,
    examine,
    examine_discriminator,
    examine_log,
    examine_tokenizer,
    examine_transformer,
)
from minimuse.train_engine import Engine
from minimuse.transformer import SuperRes, Transformer, TransformerConfig
from minimuse.utils import to_float
from minimuse.vqgan import VQGAN, VQGANConfig

V, D_LM = 8, 6
SIZES = {"codebook_size": V, "text_width": D_LM, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64}
LEARN = StageConfig(steps=150, batch=32, learning_rate=5e-3, warmup=10, weight_decay=0.01)
WORDS = 3 * torch.randn(4, 2, D_LM, generator=torch.Generator().manual_seed(0))


def engine():
    return Engine(device="cpu", bf16=False)


class Texts(list):
    """One caption an example, read as a cache of captions is."""

    def pick(self, at, u):
        return [self[int(i)] for i in at]


def world(seed, n=256):
    """Tokens 2 c + b: c is told by the text, b by its half's other tokens and the low-resolution ones; a tenth noise.

    The low-resolution grid, 2 x 2, knows the b of the upper and of the lower half.
    """
    g = torch.Generator().manual_seed(seed)
    c, b = torch.randint(4, (n,), generator=g), torch.randint(2, (n, 2), generator=g)
    tokens = 2 * c[:, None] + b.repeat_interleave(8, 1)
    noise = torch.rand(n, 16, generator=g) < 0.1
    tokens = torch.where(noise, torch.randint(V, (n, 16), generator=g), tokens)
    return tokens, Texts(WORDS[i] for i in c.tolist()), b.repeat_interleave(2, 1)


def base(config=LEARN, rows=None):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SIZES, grid=4))
    tokens, texts, _ = rows or world(0)
    for _ in train_transformer(model, config, tokens, texts, engine=engine()) if config else ():
        pass
    return MaskedLoss(model)


def superres(wrong_low=False):
    torch.manual_seed(0)
    model = SuperRes(TransformerConfig(**SIZES, grid=4, block=2, low_layers=1, low_grid=2, low_codebook_size=2))
    tokens, texts, low = world(0)
    low = low[torch.randperm(len(low))] if wrong_low else low
    for _ in train_transformer(model, LEARN, tokens, texts, low_tokens=low, stage="superres", engine=engine()):
        pass
    return MaskedLoss(model)


@pytest.fixture(scope="module")
def healthy():
    return base()


def findings(loss, rows=2, train=None, held_out=None, **kwargs):
    sets = [(s or world(seed))[:rows] for s, seed in ((train, 0), (held_out, 1))]
    found = list(examine_transformer(loss, *sets, codebook_size=V, engine=engine(), **kwargs))
    return {f.check: f for f in found}


def verdicts(found):
    return {check: f.verdict for check, f in found.items()}


# --- transformers -----------------------------------------------------------------------------------------------------


def test_no_false_alarm_on_a_healthy_base_model(healthy):
    found = findings(healthy)
    checks = ["context", "leakage", "text", "overfitting"]
    assert verdicts(found) == dict.fromkeys(checks, "fine"), f"{found}"
    assert found["leakage"].number == pytest.approx(1, abs=1e-4), "p of all values of a hidden token adds up to 1"
    assert found["text"].number > 0.2, f"a wrong caption costs much: {found['text'].message}"
    assert "unigram" in found["context"].message, "the floor is told beside the losses"


def test_no_false_alarm_on_a_healthy_super_resolution():
    found = findings(superres(), rows=3)
    assert set(verdicts(found).values()) == {"fine"}, f"{found}"
    assert "low tokens" in found, "its low-resolution tokens are looked at too"


def test_pitfall_01_low_tokens_of_another_image():
    found = findings(superres(wrong_low=True), rows=3)
    assert found["low tokens"].verdict == "wrong", f"{found['low tokens']}"
    assert found["text"].verdict == "fine", "the text is read nevertheless"


def test_pitfall_03_text_ignored():
    found = findings(base(replace(LEARN, cond_drop_prob=1.0)))
    assert found["text"].verdict == "wrong", f"{found['text']}"
    assert found["context"].verdict == "fine", "the tokens' context is learnt nevertheless"


def test_captions_that_say_the_same_of_all_images(healthy):
    tokens, texts, _ = world(1)
    found = findings(healthy, held_out=(tokens, Texts(texts[:1] * len(texts))))
    assert found["text"].number == 0, f"another image's caption is the same: {found['text']}"
    assert found["text"].verdict == "look", "nobody can tell whether the model reads them"
    assert "All captions of 128 held-out examples are the same" in found["text"].message


def test_untrained():
    found = findings(base(config=None))
    assert found["context"].verdict == "wrong", f"{found}"
    found = findings(base(config=None), early=True)
    assert "wrong" not in verdicts(found).values(), f"after a few steps that is no alarm: {found}"


class Leaky(torch.nn.Module):
    """A broken loss whose logits read the true tokens: what `masked_fill` makes impossible in `MaskedLoss`."""

    def __init__(self, strength):
        super().__init__()
        self.strength = strength

    def forward(self, x, masked, context, low_tokens, count):
        logits = self.strength * F.one_hot(x, V).float()
        return masked_cross_entropy(logits, x, masked, count=count), ((logits.argmax(-1) == x) & masked).sum() / count


@pytest.mark.parametrize("strength", [0.5, 12.0])
def test_pitfall_07_leakage(strength):
    """Also a slight one, whose loss looks plausible: p of one hidden token's values adds up to more than 1."""
    leak = findings(Leaky(strength))["leakage"]
    p = math.exp(strength) / (math.exp(strength) + V - 1)
    assert leak.verdict == "wrong", f"{leak}"
    assert leak.number == pytest.approx(V * p, rel=1e-4), "each of V values has the same p"


def test_one_code_alone(healthy):
    """What a collapsed tokenizer leaves: an entropy of 0, and no division by it."""
    tokens, texts, _ = world(1)
    found = findings(healthy, held_out=(torch.zeros_like(tokens), texts))
    assert found["context"].verdict == "wrong", f"any loss is more than nothing: {found['context']}"
    assert all(math.isfinite(f.number) for f in found.values()), f"{found}"


def test_overfitted_on_8_examples():
    g = torch.Generator().manual_seed(2)
    tokens, texts = torch.randint(V, (8, 16), generator=g), Texts(torch.randn(8, 2, D_LM, generator=g))
    found = findings(base(rows=(tokens, texts, None)), train=(tokens, texts))
    assert found["overfitting"].verdict == "wrong", f"{found['overfitting']}"
    assert found["context"].verdict == "wrong", "on others it is worse than knowing nothing"


def test_with_few_held_out_training_examples_are_read(healthy):
    few = tuple(r[:4] for r in world(1))
    found = findings(healthy, held_out=(few[0], Texts(few[1])))
    assert found["overfitting"].verdict == "look", "four examples tell nothing of overfitting"
    few = findings(
        healthy, train=[Subset(r, torch.arange(128)) for r in world(0)[:2]], held_out=(few[0], Texts(few[1]))
    )
    assert "128 training examples" in few["context"].message, "it names the set"
    assert verdicts(found) | {"overfitting": "fine"} == verdicts(findings(healthy)), (
        "all else shows on training examples"
    )


# --- tokenizers -------------------------------------------------------------------------------------------------------

VQ = VQGANConfig(
    image_size=16,
    codebook_size=16,
    code_dim=4,
    width=16,
    multipliers=(1, 2),
    blocks=(0, 1),
    decoder_width=16,
    decoder_blocks=(0, 1),
)


def pictures(n, seed):
    """uint8 pictures, each of two of four colors, one left and one right."""
    g = torch.Generator().manual_seed(seed)
    colors = torch.tensor([[220, 30, 30], [30, 220, 30], [30, 30, 220], [220, 220, 220]], dtype=torch.uint8)
    two = colors[torch.randint(4, (n, 2), generator=g)]  # (n, 2, 3)
    return two.transpose(1, 2).repeat_interleave(8, 2)[:, :, None].expand(n, 3, 16, 16).contiguous()


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    config = StageConfig(
        steps=200, batch=8, learning_rate=5e-3, warmup=3, weight_decay=1e-4, betas=(0.9, 0.99), adversarial_weight=0.0
    )
    *_, last = train_tokenizer(VQGAN(VQ), config, pictures(48, 0), engine=engine())
    return last.model


def flat(n):
    """Pictures of one color each: their mean color has an infinite PSNR."""
    return torch.full((n, 3, 16, 16), 200, dtype=torch.uint8)


class Nearly(VQGAN):
    """A tokenizer that gives back each picture with an error of `off`, and uses one code."""

    def __init__(self, off):
        super().__init__(VQ)
        self.off = off

    def encode(self, images):
        self.seen = images
        return torch.zeros(len(images), 64, dtype=torch.long)

    def decode(self, tokens):
        return self.seen + self.off


def test_a_good_psnr_is_enough_however_easy_the_pictures_are():
    found = look(Nearly(0.02), flat(48), flat(16))
    assert found["pictures"].number == pytest.approx(40, abs=0.01), "10 log10(4 / 0.02^2)"
    assert found["pictures"].verdict == "fine", f"the mean color has more: {found['pictures']}"
    assert found["codebook"].verdict == "look", "one color needs one code"
    assert look(Nearly(0.1), flat(48), flat(16))["pictures"].verdict == "wrong", "26 dB is too little for one color"
    assert look(Nearly(math.nan))["pictures"].verdict == "wrong", "pitfall 30: NaN is not fine"


def test_pitfall_29_nothing_held_out(healthy, tokenizer):
    """With fewer than 50 examples the run trains on all of them, so no metric is held out."""
    rows = world(1)[:2]
    few = [Subset(Texts(r[:24]) if isinstance(r, list) else r[:24], torch.arange(24)) for r in rows]
    found = findings(healthy, train=few, held_out=few)
    assert found["overfitting"].verdict == "look", f"{found['overfitting']}"
    assert "Nothing is held out" in found["overfitting"].message
    assert math.isnan(found["overfitting"].number), "no gap is reported"
    for check in ("context", "text"):
        assert "24 training examples" in found[check].message, "each metric names its set"
    images = Subset(pictures(24, 0), torch.arange(24))
    found = look(tokenizer, images, images)
    assert found["overfitting"].verdict == "look", f"{found['overfitting']}"
    assert "The PSNR of 24 training examples" in found["pictures"].message
    assert "The PSNR of 16 held-out examples" in look(tokenizer)["pictures"].message


def look(model, train=None, held_out=None):
    sets = [pictures(48, 0) if train is None else train, pictures(16, 1) if held_out is None else held_out]
    return {f.check: f for f in examine_tokenizer(model, *sets, engine=engine())}


def test_no_false_alarm_on_a_healthy_tokenizer(tokenizer):
    found = look(tokenizer)
    assert verdicts(found) == dict.fromkeys(["codebook", "pictures", "pixel range", "overfitting"], "fine"), f"{found}"


def test_pitfall_19_a_collapsed_codebook(tokenizer):
    model = copy.deepcopy(tokenizer)
    with torch.no_grad():
        model.quantizer.codebook[1:] = 1e6
    found = look(model)
    assert found["codebook"].verdict == "wrong", f"{found['codebook']}"
    assert found["codebook"].number == pytest.approx(1), "one code is used"
    assert found["pictures"].verdict == "wrong", "with one code all pictures are the same"


def test_an_untrained_tokenizer():
    assert look(VQGAN(VQ))["pictures"].verdict == "wrong", "it gives back nothing like its input"


def test_pictures_that_the_tokenizer_never_saw_the_like_of(tokenizer):
    noise = torch.randint(256, (16, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    assert look(tokenizer, held_out=noise)["overfitting"].verdict == "wrong", "training images come back far better"
    assert look(tokenizer, held_out=noise[:3])["overfitting"].verdict == "look", "three tell nothing"


def test_dark_pictures_and_a_shift_of_the_mean():
    dark = pictures(16, 1) // 16  # 12 bits, read as 16
    found = look(Nearly(0.0), held_out=dark)["pixel range"]
    assert found.verdict == "look", f"{found}"
    assert "span 12 of 255" in found.message, f"220 // 16 - 30 // 16 is 12, of {found.message}"
    found = look(Nearly(0.6), held_out=pictures(16, 1))["pixel range"]
    assert (found.verdict, found.number) == ("wrong", pytest.approx(0.6 * 127.5, abs=0.1)), f"{found}"


def test_pictures_are_compared_with_copies_at_a_quarter_of_the_side(tokenizer):
    """Noise has a PSNR above that of its mean color, but a copy of a quarter of its side is nearer."""
    found = look(tokenizer)["pictures"]
    assert found.verdict == "fine", f"{found}"
    x = to_float(pictures(16, 1))
    small = F.interpolate(F.avg_pool2d(x, 4), scale_factor=4, mode="bilinear")
    assert f"a quarter of the side have {-10 * math.log10((small - x).square().mean() / 4):.1f} dB" in found.message
    assert found.number == pytest.approx(-10 * math.log10((decoded(tokenizer, x) - x).square().mean() / 4), abs=1e-3)


@torch.no_grad()
def decoded(model, x):
    return model.decode(model.encode(x))


# --- the log ----------------------------------------------------------------------------------------------------------


def lines(values, stage="base", key="loss"):
    return [{"stage": stage, "step": 10 * i, key: v} for i, v in enumerate(values)]


def test_trends_of_the_log():
    falling = [5 / (1 + i) + 1 for i in range(40)]
    f = examine_log(lines(falling))
    third, last = sum(falling[20:30]) / 10, sum(falling[30:]) / 10
    assert (f.verdict, f.number) == ("fine", pytest.approx(last / third - 1, rel=1e-5)), f"{f}"
    assert examine_log(lines([1.0] * 30 + [1.2] * 10)).verdict == "look", "a rising loss"
    spike = examine_log(lines([1.0] * 35 + [3.5] + [1.0] * 4))
    assert spike.verdict == "look", f"{spike}"
    assert "1 of 40" in spike.message, f"one line is a spike: {spike.message}"
    assert examine_log(lines([1.0] * 11)).verdict == "look", "too few lines for a trend"
    assert examine_log(lines(falling, "decoder", "l1")).verdict == "fine", "a tokenizer's l1"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_the_log(bad):
    f = examine_log([*lines([1.0] * 20), {"stage": "base", "step": 200, "loss": 1.0, "held_out_bound": bad}])
    assert f.verdict == "wrong", f"{f}"
    assert "held_out_bound" in f.message, "it names the figure"
    assert "200" in f.message, "and the step"


def adversarial(images):
    """The log of a tokenizer with a discriminator."""
    torch.manual_seed(0)
    config = StageConfig(
        steps=60, batch=8, learning_rate=2e-3, warmup=3, weight_decay=1e-4, betas=(0.9, 0.99), perceptual_weight=0.0
    )
    return [
        {"stage": "t", "step": p.step, **p.metrics} for p in train_tokenizer(VQGAN(VQ), config, images, engine=engine())
    ]


def test_a_discriminator_that_has_taken_over():
    (found,) = examine_discriminator(adversarial(pictures(48, 0)))
    assert found.verdict == "fine", f"{found}"
    noise = torch.randint(256, (48, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
    (found,) = examine_discriminator(adversarial(noise))
    assert found.verdict == "look", f"no decoder makes such noise, so it tells every patch: {found}"
    worse = [{"discriminator_loss": 0.02, "l1": 0.1 + i / 400} for i in range(40)]
    (found,) = examine_discriminator(worse)
    assert (found.verdict, found.number) == ("wrong", pytest.approx(0.02)), f"{found}"
    assert "l1 changed by +67.4%" in found.message, f"0.18625 / 0.11125 - 1: {found.message}"
    assert not list(examine_discriminator(lines([1.0] * 40, key="l1"))), "it has none"
    assert not list(examine_discriminator(worse[:11])), "too few lines"


# --- a run ------------------------------------------------------------------------------------------------------------


def tree(folder):
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.fixture
def a_copy(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


def test_a_run_is_examined_and_left_as_it_was(tiny_run):
    before = tree(tiny_run)
    found = examine(tiny_run, device="cpu")
    assert tree(tiny_run) == before, "examining changed the run"
    stages = list(dict.fromkeys(f.stage for f in found))
    assert stages == ["low_tokenizer", "base", "high_tokenizer", "superres", "decoder"], f"{stages}"
    of = {(f.stage, f.check): f for f in found}
    assert ("superres", "low tokens") in of, f"{list(of)}"
    assert not any(f.check == "files" for f in found), "the run holds all that is needed"
    assert of["base", "context"].verdict == "wrong", f"two steps teach nothing: {of['base', 'context']}"
    assert all(HINTS[f.check] and f.verdict in ("fine", "look", "wrong") for f in found), "each tells what to do"


def test_the_newest_weights_are_read(tiny_run):
    """The PSNR that the run itself logged after its last step."""
    (f,) = [f for f in examine(tiny_run, "low_tokenizer", device="cpu") if f.check == "pictures"]
    log = [json.loads(line) for line in (tiny_run / "log.jsonl").read_text().splitlines()]
    (told,) = [line["training_psnr"] for line in log if line["stage"] == "low_tokenizer" and line["step"] == 2]
    assert f.number == pytest.approx(told, abs=0.05), "all 8 images, of which none is held out"


@pytest.mark.parametrize("name", ["base", "superres"])
def test_weights_are_read_without_their_optimizer(tiny_run, tiny_muse, name):
    loss = MaskedLoss(copy.deepcopy(tiny_muse.parts[name]))
    assert runs.load_weights(tiny_run / name, loss) == 2, "the step of the newest state"
    weights = load_file(tiny_run / checkpoint.WEIGHTS)
    for key, value in loss.model.state_dict().items():
        assert value.equal(weights[f"{name}.{key}"]), f"{key} is not what the finished Muse has"


def test_a_damaged_state_is_told(a_copy):
    (file,) = a_copy.glob("base/step-*/*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    of = {(f.stage, f.check): f for f in examine(a_copy, "base", device="cpu")}
    assert "base holds no whole training state" in of["base", "files"].message, f"{of}"


def test_what_a_run_does_not_hold_is_told_and_not_computed(a_copy):
    for cache in (a_copy / "cache").glob("high_tokens-*"):
        shutil.rmtree(cache)
    before = tree(a_copy)
    of = {(f.stage, f.check): f for f in examine(a_copy, device="cpu")}
    assert of["superres", "files"].verdict == "look", f"{list(of)}"
    assert "high_tokens" in of["superres", "files"].message, "it names what is missing"
    assert ("base", "text") in of, "all else is examined"
    assert tree(a_copy) == before, "it was computed, or a folder made for it"


def test_a_run_under_way(a_copy):
    for stage in ("high_tokenizer", "superres", "decoder"):
        shutil.rmtree(a_copy / stage)
    assert {f.stage for f in examine(a_copy, device="cpu")} == {"low_tokenizer", "base"}, "the stages that have a state"
    with pytest.raises(ValueError, match=r"no state of superres yet.*'low_tokenizer', 'base'"):
        examine(a_copy, "superres", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"holds no run\.json"):
        examine(a_copy / "base", device="cpu")


def test_the_command(tiny_run, monkeypatch, capsys):
    with pytest.raises(SystemExit) as code:
        cli.main(["doctor", str(tiny_run), "--stage", "base", "--device", "cpu"])
    out = capsys.readouterr().out
    assert code.value.code == 1, "something is wrong after two steps"
    assert "wrong  base, context" in out, f"{out}"
    good = [Finding("text", "fine", 1.0, "It reads.", "base"), Finding("text", "fine", 1.0, "It too.", "superres")]
    monkeypatch.setattr("minimuse.train_doctor.examine", lambda *a, **k: good)
    assert cli.main(["doctor", str(tiny_run)]) == 0, "exit code 0 where nothing is wrong"
    out = " ".join(capsys.readouterr().out.split())
    assert HINTS["text"] not in out, "what is fine needs no hint"
    assert "It too. 2 findings, 0 to look at, 0 wrong" in out, f"{out}"
