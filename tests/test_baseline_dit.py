"""baseline_dit.py: adaLN-Zero, noise, the loss, training, DDIM against diffusers (DiT, arXiv 2212.09748)."""

import math
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from minimuse.baseline_dit import (
    LEVELS,
    Block,
    DiT,
    NoiseLoss,
    add_noise,
    ddim,
    dit_sizes,
    gaussians,
    latents,
    noise_levels,
    time_waves,
    train_dit,
)
from minimuse.cfg import guided, null_text
from minimuse.config import StageConfig
from minimuse.text import Context
from minimuse.train_engine import Engine, hidden_matrices
from minimuse.transformer import TransformerConfig
from minimuse.vqgan import VQGAN, VQGANConfig

CHANNELS, D_LM = 3, 6
CONFIG = TransformerConfig(codebook_size=11, grid=4, text_width=D_LM, width=32, layers=2, heads=4, mlp_width=64)


def dit(*, patch=1, **changes):
    torch.manual_seed(0)
    return DiT(replace(CONFIG, grid=4 // patch, **changes), CHANNELS, patch).eval()


def awake(model):
    """The same with nothing left at zero, as after training."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def context(batch=2, length=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.tensor([length, *([3] * (batch - 1))])[:, None]
    return Context(torch.randn(batch, length, D_LM, generator=g) * mask[..., None], mask)


def noisy(batch=2, seed=0):
    return torch.randn(batch, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(seed))


# --- the network ------------------------------------------------------------------------------------------------------


def test_every_block_is_the_identity_at_the_start():
    model = dit()
    memory = model.memory(context())
    x, c = torch.randn(2, 16, 32), torch.randn(2, 1, 32)
    for block, k, v in zip(model.layers, memory.keys, memory.values, strict=True):
        assert block(x, c, k, v, memory.attend).equal(x), "adaLN-Zero: bit for bit, whatever time and text say"
    step = torch.tensor([3, 900])
    spread = (1 - LEVELS[step]).sqrt().float().view(2, 1, 1, 1)
    assert torch.allclose(model(noisy(), memory, step), spread * noisy()), "the head begins at zero, and so does v"


def test_the_identity_can_be_left():
    """A gate at zero has a gradient, though what it closes off has none yet."""
    model = dit()
    nn.init.normal_(model.head.weight, std=0.1)
    NoiseLoss(model)(noisy(), noisy(seed=1), torch.tensor([10, 500]), context()).backward()
    block = model.layers[0]
    gates = block.condition.weight.grad.view(6, 32, 32)[[2, 5]].abs().sum((1, 2))
    assert (gates > 0).all(), "a gate gets no gradient"
    assert block.cross.out.weight.grad.abs().sum() > 0, "the text's way in gets no gradient"
    assert block.mlp[2].weight.grad.abs().sum() == 0, "behind a closed gate"


def test_the_noise_follows_from_the_velocity():
    """v = sqrt(a) e - sqrt(1 - a) x0 (arXiv 2202.00512): where the head is right, the noise is, at every level."""
    model, x, e = dit(), noisy(), noisy(seed=1)
    for s in (0, 200, 500, 900, 998):
        a = LEVELS[s].item()
        velocity = a**0.5 * e - (1 - a) ** 0.5 * x
        model.head.register_forward_hook(lambda *_, v=velocity: v.flatten(2).transpose(1, 2))  # patch 1: (B, N, d)
        step = torch.tensor([s, s])
        assert torch.allclose(model(add_noise(x, e, step), model.memory(context()), step), e, atol=1e-5), f"step {s}"
    text = context()._replace(embeds=context().embeds.bfloat16())
    half = model.bfloat16()(x.bfloat16(), model.memory(text), torch.tensor(900))
    assert half.dtype == torch.float32, "in bf16 the picture would drown in rounding where all is noise"


def test_the_noise_depends_on_picture_place_time_and_text():
    model, x, text = awake(dit()), noisy(), context()
    step = torch.tensor([100, 100])
    out = model(x, model.memory(text), step)
    assert out.shape == x.shape
    far = x.clone()
    far[:, :, 0, 0] += 1
    assert (model(far, model.memory(text), step) - out)[:, :, 3, 3].abs().max() > 1e-4, "no self-attention"
    flat = model(torch.zeros_like(x), model.memory(text), step)[0].flatten(1).T
    assert (torch.cdist(flat, flat) + torch.eye(16)).min() > 1e-5, "two places cannot be told apart"
    assert (model(x, model.memory(text), step + 500) - out).abs().max() > 1e-3, "the time is not told"
    each = model(x, model.memory(text), torch.tensor([100, 700]))
    assert torch.allclose(each[0], out[0], atol=1e-6), "each picture has its own time"
    assert (each[1] - out[1]).abs().max() > 1e-3
    assert torch.allclose(model(x, model.memory(text), torch.tensor(100)), out, atol=1e-6), "one time for all"
    other = text._replace(embeds=text.embeds + torch.tensor([1.0, 0, 0, 0, 0, 0]) * text.mask[..., None])
    assert (model(x, model.memory(other), step) - out).abs().max() > 1e-4, "the text is not read"
    padded = Context(*(torch.nn.functional.pad(t, pad) for t, pad in zip(text, [(0, 0, 0, 4), (0, 4)], strict=True)))
    assert torch.allclose(model(x, model.memory(padded), step), out, atol=1e-5), "padding is attended to"


def test_text_is_read_as_muse_reads_it():
    """With text_layers the order of the words matters to the memory, as it does to the masked transformer's."""
    text = Context(torch.randn(1, 3, D_LM), torch.ones(1, 3, dtype=torch.bool))
    turned = Context(text.embeds.flip(1), text.mask)
    for layers, reads in ((0, False), (1, True)):
        model = awake(dit(text_layers=layers))
        a, b = (model.memory(t).keys[0] for t in (text, turned))
        assert ((a - b.flip(2)).abs().max() > 1e-4) == reads, f"text_layers={layers}"


def test_a_patch_is_a_square_of_the_grid():
    model = awake(dit(patch=2))
    assert model.places.shape == (4, 32), "four tokens of 2 x 2"
    memory, step = model.memory(context()), torch.tensor(5)
    out = model(noisy(), memory, step)
    assert out.shape == (2, CHANNELS, 4, 4)
    for block in model.layers:  # no attention: each token by itself
        nn.init.zeros_(block.attention.out.weight)
    before = model(noisy(), memory, step)
    x = noisy()
    x[:, :, 0, 1] += 1
    changed = (model(x, memory, step) - before).abs().amax((0, 1)) > 1e-6
    assert changed.tolist() == [[True, True, False, False]] * 2 + [[False] * 4] * 2, "one patch, and no other"


def test_time_waves_by_hand():
    waves = time_waves(torch.tensor([0, 2]), 4)
    assert waves[0].tolist() == [1, 1, 0, 0], "cos 0 and sin 0"
    assert waves[1].tolist() == pytest.approx([math.cos(2), math.cos(0.02), math.sin(2), math.sin(0.02)])


def test_latents_are_standardized_channel_by_channel_and_back():
    torch.manual_seed(0)
    vqgan = VQGAN(
        VQGANConfig(
            image_size=16, codebook_size=8, code_dim=CHANNELS, width=16, multipliers=(1, 2), blocks=(0, 1),
            decoder_width=16, decoder_blocks=(0, 1),
        )
    ).eval()  # fmt: skip
    images = torch.randint(0, 256, (10, 3, 16, 16), dtype=torch.uint8)
    z = latents(vqgan, images, batch=4)
    assert z.shape == (10, CHANNELS, 8, 8)
    assert vqgan.quantizer.nearest(z).equal(vqgan.encode(images / 127.5 - 1)), "before quantization"
    model = dit()
    model.observe(z)
    x = model.standardize(z)
    assert x.mean((0, 2, 3)).abs().max() < 1e-4
    assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-4
    assert torch.allclose(model.standardize(x, back=True), z, atol=1e-5)
    assert {"mean", "std"} <= model.state_dict().keys(), "a checkpoint brings them along"


# --- noise and loss ---------------------------------------------------------------------------------------------------


def test_noise_levels_by_hand_and_as_diffusers():
    schedulers = pytest.importorskip("diffusers.schedulers")
    f = [math.cos(math.pi / 2 * (s / 3 + 0.008) / 1.008) ** 2 for s in (0, 1, 2)]
    expected = [f[1] / f[0], f[2] / f[0], f[2] / f[0] * 0.001]  # the last would be 0: b is 0.999 at most
    assert noise_levels(3).tolist() == pytest.approx(expected)
    assert expected[:2] == pytest.approx([0.75, 0.25], abs=0.01), "about cos^2 of 30 and 60 degrees"
    theirs = schedulers.DDIMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert torch.allclose(LEVELS.float(), theirs, rtol=1e-4)
    assert LEVELS[-1] < 1e-4, "nothing is left of the picture at the last step"
    assert ((LEVELS[1:] < LEVELS[:-1]) & (LEVELS[1:] > 0)).all(), "each step is noisier, and none is divided by zero"


def test_add_noise_as_diffusers_does():
    schedulers = pytest.importorskip("diffusers.schedulers")
    x, e, step = noisy(), noisy(seed=1), torch.tensor([0, 700])
    theirs = schedulers.DDIMScheduler(beta_schedule="squaredcos_cap_v2").add_noise(x, e, step)
    assert torch.allclose(add_noise(x, e, step), theirs, atol=1e-4)


def test_the_loss_by_hand():
    """One channel, one latent: z = 3 standardizes to (3 - 1) / 2 = 1; the model answers with half of what it sees."""

    class Half(nn.Module):
        mean, std = 1.0, 2.0

        standardize = DiT.standardize

        def memory(self, context):
            return None

        def forward(self, x, memory, step):
            self.saw = x
            return x / 2

    model = Half()
    z, e = torch.tensor([3.0, 3.0]).view(2, 1, 1, 1), torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)
    step = torch.tensor([0, 800])
    loss = NoiseLoss(model)(z, e, step, None)
    a = LEVELS[[0, 800]].tolist()
    saw = [math.sqrt(a[0]) + math.sqrt(1 - a[0]), math.sqrt(a[1]) - 2 * math.sqrt(1 - a[1])]
    assert model.saw.flatten().tolist() == pytest.approx(saw, abs=1e-5)
    expected = (saw[0] / 2 - 1) ** 2 / a[0] + (saw[1] / 2 + 2) ** 2 / a[1]
    assert loss.item() == pytest.approx(expected, rel=1e-5), "the sum of squared errors / a"


def test_the_loss_is_the_velocitys_squared_error_at_every_level():
    """The head begins at v = 0: the loss is the mean of (sqrt(a) e - sqrt(1 - a) x0)^2, about 1, clear or noisy."""
    model, z, e = dit(), noisy(), noisy(seed=1)
    for s in (0, 500, 999):
        step, a = torch.tensor([s, s]), LEVELS[s].item()
        loss = NoiseLoss(model)(z, e, step, context()) / z.numel()
        expected = (a**0.5 * e - (1 - a) ** 0.5 * z).square().mean()
        assert loss.item() == pytest.approx(expected.item(), rel=2e-3), f"step {s}"


def test_gaussians_are_normal_and_each_images_own():
    x = gaussians(50_000, generator=torch.Generator().manual_seed(0))
    assert x.mean().abs() < 0.02
    assert (x.std() - 1).abs() < 0.02
    assert ((x > 1.96).float().mean() - 0.025).abs() < 0.003
    each = [torch.Generator().manual_seed(s) for s in (5, 6)]
    both = gaussians(2, 3, 4, 4, generator=each)
    assert both[1:].equal(gaussians(1, 3, 4, 4, generator=[torch.Generator().manual_seed(6)])), "pitfall 17"


# --- sampling ---------------------------------------------------------------------------------------------------------


def bent(x, u, step):
    """A noise function that is no constant and no line."""
    return torch.tanh(x + step / 1000) + 0.1 * x.flip(-1)


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
def test_ddim_is_diffusers_step_by_step(steps):
    schedulers = pytest.importorskip("diffusers.schedulers")
    how = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "clip_sample_range": 5.0}
    theirs = schedulers.DDIMScheduler(**how, timestep_spacing="trailing", set_alpha_to_one=True)
    theirs.set_timesteps(steps)
    expected = 4 * noisy()
    seen = 0
    for (_, x, clean), s in zip(ddim(bent, 4 * noisy(), steps=steps), theirs.timesteps, strict=True):
        made = theirs.step(bent(expected, 0.0, s), s, expected, use_clipped_model_output=True)
        expected, seen = made.prev_sample, seen + 1
        assert torch.allclose(x, expected, atol=2e-3, rtol=1e-3), f"step {seen}: another picture"
        assert torch.allclose(clean, made.pred_original_sample, atol=2e-3 * (1 / LEVELS[s].item() ** 0.5), rtol=1e-3)
    assert seen == steps
    assert x.equal(clean), "the last step leaves no noise"
    assert steps > 1 or x.abs().max() == 5, "clipped"


def test_ddim_finds_the_picture_where_the_noise_is_known():
    """All data are one picture: then the noise in x is (x - sqrt(a) picture) / sqrt(1 - a), and any T finds it."""
    picture = noisy(1, seed=7)

    def exact(x, u, step):
        a = LEVELS[step].float()
        return (x - a.sqrt() * picture) / (1 - a).sqrt()

    for steps in (1, 3, 16, 1000):
        *_, (u, x, _) = ddim(exact, gaussians(2, CHANNELS, 4, 4), steps=steps)
        assert torch.allclose(x, picture.expand(2, -1, -1, -1), atol=1e-2), f"{steps} steps"
        assert u == 1.0
    assert [u for u, _, _ in ddim(exact, noisy(), steps=3)] == [0, 0.5, 1]


@pytest.mark.parametrize("wrong", [0, -1, 1001, 10**9, True, 2.5, "4", None, math.nan])
def test_the_steps_of_ddim_are_checked_before_it_draws(wrong):
    with pytest.raises(ValueError, match="steps is"):
        next(ddim(lambda *_: pytest.fail("it draws"), noisy(), steps=wrong))
    assert len(list(ddim(bent, noisy(), steps=np.int64(2)))) == 2, "numpy scalars are numbers"


def test_blocks_are_where_muon_looks():
    assert len(hidden_matrices(dit())) == 2 * len([p for p in Block(CONFIG).parameters() if p.ndim == 2])


# --- training ---------------------------------------------------------------------------------------------------------

STAGE = StageConfig(steps=200, batch=16, learning_rate=1e-2, warmup=5, weight_decay=0.01, optimizer="muon")


@pytest.mark.slow
def test_training_learns_what_the_text_says():
    codes = torch.arange(32) % 4
    words = 3 * torch.randn(4, 3, D_LM, generator=torch.Generator().manual_seed(0))
    patterns = 5 + 2 * torch.randn(4, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(2))
    model, texts = dit(heads=2), [[words[c]] for c in codes.tolist()]
    run = train_dit(model, STAGE, patterns[codes], texts, engine=Engine(device="cpu", bf16=False))
    losses = [p.metrics["loss"] for p in run]
    assert losses[0] == pytest.approx(1, abs=0.1), "at first the velocity is 0: the loss is its variance"
    assert sum(losses[-20:]) / 20 < 0.2
    assert torch.allclose(model.mean.flatten(), patterns.mean((0, 2, 3)), atol=1e-4), "the latents are standardized"

    text = Context(words, torch.ones(4, 3, dtype=torch.bool))
    memories = model.memory(text), model.memory(null_text(text))

    def noise_fn(x, u, step):
        return guided(lambda x, memory: model(x, memory, step), *memories, 1.0)(x, u)

    with torch.inference_mode():
        noise = gaussians(4, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(0))
        *_, (_, x, _) = ddim(noise_fn, noise, steps=20)
    found = model.standardize(x, back=True).flatten(1)
    distances = torch.cdist(found, patterns.flatten(1))
    assert distances.argmin(1).tolist() == [0, 1, 2, 3], f"the text does not decide: {distances}"
    assert distances.diag().max() < 0.5 * distances[~torch.eye(4, dtype=torch.bool)].min(), f"{distances}"


def test_micro_batches_make_the_same_gradient():
    """Pitfall 22, for the noise loss."""
    z = torch.randn(32, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(3))
    texts = [[w] for w in torch.randn(32, 3, D_LM, generator=torch.Generator().manual_seed(0))]
    ends = []
    for accumulate in (1, 4):
        model, engine = dit(), Engine(device="cpu", bf16=False, accumulate=accumulate)
        draws = torch.Generator().manual_seed(1)
        with torch.no_grad():  # DiT begins as the identity; Adam would turn the rounding of gradients near 0 into steps
            for p in model.parameters():
                p += 0.1 * torch.randn(p.shape, generator=draws)
        deque(train_dit(model, replace(STAGE, steps=3, optimizer="adamw"), z, texts, engine=engine), maxlen=0)
        ends.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.allclose(*ends, atol=1e-5)


def test_a_patch_must_divide_the_grid():
    for wrong in (3, 0, True, 1.5):
        with pytest.raises(ValueError, match="patch is"):
            dit_sizes(CONFIG, wrong)
    assert dit_sizes(CONFIG, 2).grid == 2
