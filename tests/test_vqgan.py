"""vqgan.py: images <-> tokens, the codebook, the fine-tuned decoder (Muse 2.2, 2.5)."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minimuse.train_log import codebook_usage
from minimuse.vqgan import PATIENCE, VQGAN, ResBlock, VectorQuantizer, VQGANConfig, draft_tokens

CFG = VQGANConfig(
    image_size=16,
    codebook_size=12,
    code_dim=4,
    width=16,
    multipliers=(1, 2, 2),
    blocks=(0, 1, 1),
    decoder_width=16,
    decoder_blocks=(0, 1, 1),
)
BIGGER = replace(CFG, decoder_width=32, decoder_blocks=(1, 2, 2))
OFF = settings(deadline=None, max_examples=25, derandomize=True)


def tokenizer(seed=0):
    torch.manual_seed(seed)
    return VQGAN(CFG).eval()


def images(batch=2, h=16, w=16):
    return torch.rand(batch, 3, h, w) * 2 - 1


def shaken(model, scale=0.1):
    """As after training: residual blocks are no longer the identity, nor normalizations without a shift."""
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.add_(scale * torch.randn_like(p))
    return model


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "w"), [(16, 16), (4, 4), (8, 20), (32, 12)])
def test_any_multiple_of_f_works(h, w):
    model, x = tokenizer(), images(2, h, w)
    tokens = model.encode(x)
    assert tokens.shape == (2, h // 4 * (w // 4)), "(B, h*w) of the token grid"
    assert tokens.dtype == torch.long, "tokens are whole numbers"
    assert tokens.min() >= 0, "a token below 0"
    assert tokens.max() < 12, "a token beyond the codebook"
    assert model.decode(tokens, (h // 4, w // 4)).shape == x.shape, "back to the images' size"


def test_square_is_the_default_grid():
    model = tokenizer()
    tokens = model.encode(images())
    assert model.decode(tokens).equal(model.decode(tokens, (4, 4))), "16 tokens are 4 x 4"


def test_the_contract_of_a_tokenizer():
    model = tokenizer()
    assert (model.codebook_size, model.downsampling) == (12, 4), "codebook_size and downsampling"
    pixels = shaken(model, 3.0).decode(model.encode(images()))
    assert pixels.abs().max() <= 1, "decode stays in [-1, 1]"


@pytest.mark.parametrize("shape", [(2, 3, 15, 16), (2, 3, 16, 18), (2, 1, 16, 16), (3, 16, 16), (2, 16, 16, 3)])
def test_images_that_cannot_be_tokenized_are_refused(shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        tokenizer().encode(torch.zeros(shape))


def test_tokens_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match=r"pass grid=\(h, w\)"):
        tokenizer().decode(torch.zeros(1, 15, dtype=torch.long))
    with pytest.raises(ValueError, match="grid of 3 x 4"):
        tokenizer().decode(torch.zeros(1, 16, dtype=torch.long), (3, 4))


def test_tokens_keep_their_place():
    """Row by row: painting the lower right corner moves tokens there, and no others far from it."""
    model = tokenizer()
    codes = torch.randn(12, 4)
    model.quantizer.codebook.data = codes
    grid = model.quantizer.embed_code(torch.arange(6)[None], (2, 3))
    assert grid[0, :, 1, 0].equal(codes[3]), "token 3 of a 2 x 3 grid is the second row's first"
    x = images(1, 64, 64)
    z = model.encoder(x)
    y = x.clone()
    y[:, :, 62:, 62:] *= -1
    moved = (model.encoder(y) - z).abs().amax(1)[0]
    assert moved[15, 15] > 0, "the corner's token does not see the corner"
    assert moved[15, 15] > 10 * moved[:8, :8].max(), "the far corner changes as much: not the place it stands for"


def test_it_is_all_convolutional():
    """Muse 2.2 removes VQGAN's attention block."""
    kinds = {type(m) for m in tokenizer().modules() if list(m.parameters(recurse=False))}
    assert kinds == {nn.Conv2d, nn.GroupNorm, VectorQuantizer}, f"layers of {kinds}"


def test_encode_is_deterministic_and_writes_nothing():
    model, x = tokenizer(), images()
    before = copy.deepcopy(model.state_dict())
    assert model.encode(x).equal(model.encode(x)), "one image, two token sequences"
    assert model.encode(x)[:1].equal(model.encode(x[:1])), "an image's tokens depend on its neighbours"
    model.train().encode(x)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items()), "encode changed the model"


def test_residual_blocks_begin_as_the_identity():
    x = torch.randn(2, 32, 5, 5)
    assert ResBlock(32)(x).equal(x), "a fresh residual block changes its input"


# --- the quantizer ----------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 6))
@OFF
def test_nearest_is_the_brute_force_nearest(seed, codebook_size, dim):
    g = torch.Generator().manual_seed(seed)
    quantizer = VectorQuantizer(codebook_size, dim)
    quantizer.codebook.data = torch.randn(codebook_size, dim, generator=g)
    z = 2 * torch.randn(2, dim, 3, 4, generator=g)
    tokens = quantizer.nearest(z)
    rows = z.permute(0, 2, 3, 1).reshape(2, 12, dim)  # row by row
    distances = (rows[:, :, None].double() - quantizer.codebook.double()).square().sum(-1)
    chosen = distances.gather(-1, tokens[..., None])[..., 0]
    assert (chosen <= distances.amin(-1) + 1e-4).all(), "a nearer code exists"


def test_codes_of_the_codebook_are_fixed_points():
    quantizer = VectorQuantizer(10, 4).eval()
    tokens = torch.randint(10, (2, 12))
    z = quantizer.embed_code(tokens, (3, 4))
    assert quantizer.nearest(z).equal(tokens), "embed_code and nearest are not inverse"
    out = quantizer(z)
    assert out.tokens.equal(tokens), "forward gives other tokens than nearest"
    assert out.codebook_loss.item() == out.commitment_loss.item() == 0, "no loss where z is a code"


def test_straight_through_gradient():
    """The value is the code, the gradient passes as if it were z."""
    quantizer = VectorQuantizer(10, 4).eval()
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    out = quantizer(z)
    torch.testing.assert_close(
        out.codes, quantizer.embed_code(out.tokens, (3, 3)), msg=lambda m: f"the forward value is not the code: {m}"
    )
    weights = torch.randn_like(z)
    (out.codes * weights).sum().backward()
    assert z.grad.equal(weights), "d codes / d z is not 1"
    assert quantizer.codebook.grad is None, "the codebook learns from its own loss alone"


def test_each_loss_moves_its_own_side():
    quantizer = VectorQuantizer(10, 4).eval()
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    out = quantizer(z)
    expected = F.mse_loss(z, quantizer.embed_code(out.tokens, (3, 3))).item()
    assert out.codebook_loss.item() == pytest.approx(expected), "|sg(z) - e|^2"
    assert out.commitment_loss.item() == pytest.approx(expected), "|z - sg(e)|^2"
    book = torch.autograd.grad(out.codebook_loss, (z, quantizer.codebook), allow_unused=True, retain_graph=True)
    assert book[0] is None, "the codebook loss pulls the encoder"
    assert book[1].abs().sum() > 0, "the codebook loss leaves the codes"
    hold = torch.autograd.grad(out.commitment_loss, (z, quantizer.codebook), allow_unused=True)
    assert hold[0].abs().sum() > 0, "the commitment loss leaves the encoder"
    assert hold[1] is None, "the commitment loss pulls the codes"


def train_step(quantizer, z, idle, generator=None):
    """What a training does with a batch z, without the gradient."""
    out = quantizer(z)
    quantizer.restart_dead_codes(out.z, out.tokens, idle, generator)
    return codebook_usage(out.tokens, len(quantizer.codebook))


def test_pitfall_19_dead_codes_restart():
    """All codes but one far away: without restarts one code would serve everything, for ever."""
    quantizer = VectorQuantizer(8, 2)
    quantizer.codebook.data = torch.full((8, 2), 100.0)
    quantizer.codebook.data[0] = 0
    idle = torch.zeros(8, dtype=torch.long)
    for step in range(PATIENCE + 1):
        used, perplexity = train_step(quantizer, torch.randn(4, 2, 6, 6), idle)
        assert (used, perplexity) == (1 / 8, pytest.approx(1)), f"step {step}: patience is not over"
    used, perplexity = train_step(quantizer, torch.randn(4, 2, 6, 6), idle)
    assert used == 1, f"{used:.0%} of the codes are in use after their restart"
    assert perplexity > 4, f"perplexity {perplexity:.1f} of 8"
    assert quantizer.codebook.abs().max() < 10, "restarted codes are outputs of the encoder"


def test_pitfall_19_codes_in_use_are_left_alone():
    quantizer = VectorQuantizer(4, 2)
    quantizer.codebook.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    idle = torch.zeros(4, dtype=torch.long)
    before = quantizer.codebook.detach().clone()
    for _ in range(3 * PATIENCE):
        train_step(quantizer, torch.rand(2, 2, 8, 8), idle)
    assert quantizer.codebook.equal(before), "a living code was restarted"


def test_the_first_batch_fills_the_codebook():
    quantizer = VectorQuantizer(8, 2)
    z = torch.randn(4, 2, 6, 6) + 50
    train_step(quantizer, z, quantizer.new_idle_counts())
    used, _ = codebook_usage(quantizer(z).tokens, 8)
    assert used == 1, "codes start where the encoder's outputs are"
    outputs = z.permute(0, 2, 3, 1).reshape(-1, 2)
    assert all(code in outputs.tolist() for code in quantizer.codebook.tolist()), "at outputs, not between them"


@pytest.mark.parametrize("parts", [2, 4])
def test_pitfall_28_a_step_is_the_same_however_it_is_split(parts):
    """Codes die by optimizer steps, not by micro-batches, and restart at outputs of the whole batch."""
    whole, split = VectorQuantizer(8, 2), VectorQuantizer(8, 2)
    split.load_state_dict(whole.state_dict())
    counts = [whole.new_idle_counts(), split.new_idle_counts()]
    for step in range(PATIENCE + 5):
        z = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(step)) * (1 if step else 9)
        train_step(whole, z, counts[0], torch.Generator().manual_seed(step))
        outs = [split(part) for part in z.chunk(parts)]
        z, tokens = torch.cat([o.z for o in outs]), torch.cat([o.tokens for o in outs])
        split.restart_dead_codes(z, tokens, counts[1], torch.Generator().manual_seed(step))
        assert split.codebook.equal(whole.codebook), f"step {step}: the codebooks differ"
        assert counts[0].equal(counts[1]), f"step {step}: the counts differ"


def test_the_forward_pass_changes_nothing():
    """Neither the codebook nor any count: only `restart_dead_codes` does."""
    quantizer = VectorQuantizer(8, 2).train()
    before = quantizer.codebook.detach().clone()
    for _ in range(PATIENCE + 5):
        quantizer(torch.randn(4, 2, 6, 6) + 50)
    assert quantizer.codebook.equal(before), "the codebook moved in a forward pass"


# --- the whole --------------------------------------------------------------------------------------------------------


def test_forward_is_encode_then_decode():
    model, x = shaken(tokenizer()), images()
    made, quantized = model(x)
    assert quantized.tokens.equal(model.encode(x)), "training sees other tokens than encode gives"
    torch.testing.assert_close(
        made.clamp(-1, 1), model.decode(quantized.tokens), atol=1e-5, rtol=1e-4, msg=lambda m: f"the round trip: {m}"
    )


def test_everything_learns():
    model = shaken(tokenizer()).train()
    made, quantized = model(images())
    (made.square().mean() + quantized.codebook_loss + quantized.commitment_loss).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None]
    assert not dead, f"no gradient reaches {dead}"
    assert all(p.grad.abs().sum() > 0 for p in model.encoder.layers[0].parameters()), "the first layer learns nothing"


# --- the fine-tuned decoder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [BIGGER, replace(CFG, decoder_blocks=(2, 3, 1)), replace(CFG, decoder_width=48), CFG]
)
def test_a_grown_decoder_begins_as_the_same_function(config):
    small = shaken(tokenizer())
    grown = small.grow_decoder(config).eval()
    tokens = torch.randint(12, (3, 16))
    torch.testing.assert_close(
        grown.decode(tokens),
        small.decode(tokens),
        atol=1e-4,
        rtol=1e-4,
        msg=lambda m: f"it decodes another picture: {m}",
    )
    assert sum(p.numel() for p in grown.decoder.parameters()) >= sum(p.numel() for p in small.decoder.parameters()), (
        "the decoder did not grow"
    )
    assert grown.encode(images()).shape == (2, 16), "it is a whole tokenizer"


def test_growing_leaves_the_old_one_as_it_was():
    small = shaken(tokenizer())
    before = copy.deepcopy(small.state_dict())
    grown = small.grow_decoder(BIGGER)
    with torch.no_grad():
        for p in grown.parameters():
            p.add_(1)
    assert all(v.equal(before[k]) for k, v in small.state_dict().items()), "the two share memory"
    assert all(p.requires_grad for p in small.parameters()), "the old one was frozen"


def fine_tune(grown, steps=4):
    idle = grown.quantizer.new_idle_counts()
    optimizer = torch.optim.AdamW([p for p in grown.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        x = images(4)
        made, quantized = grown(x)
        loss = F.l1_loss(made, x) + quantized.codebook_loss + quantized.commitment_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grown.quantizer.restart_dead_codes(quantized.z, quantized.tokens, idle)


def test_fine_tuning_keeps_encoder_and_codebook_bit_for_bit():
    small, x = shaken(tokenizer()).train(), images(8)
    grown = small.grow_decoder(BIGGER)
    decoder = copy.deepcopy(grown.decoder.state_dict())
    fine_tune(grown)
    for part in ("encoder", "quantizer"):
        old, new = getattr(small, part).state_dict(), getattr(grown, part).state_dict()
        assert all(v.equal(old[k]) for k, v in new.items()), f"fine-tuning moved the {part}"
    moved = [k for k, v in grown.decoder.state_dict().items() if not v.equal(decoder[k])]
    assert len(moved) == len(decoder), f"only {len(moved)} of {len(decoder)} decoder tensors learn"
    assert grown.encode(x).equal(small.encode(x)), "the token language changed"


def test_pitfall_18_frozen_parts_stay_frozen_whatever_the_mode():
    """A notebook calls `.train()`; the codebook must not restart its dead codes for that."""
    grown = shaken(tokenizer()).grow_decoder(BIGGER)
    assert not grown.encoder.training, "the frozen encoder is in train mode"
    assert not grown.quantizer.training, "the frozen codebook is in train mode"
    frozen = [*grown.encoder.parameters(), *grown.quantizer.parameters()]
    assert not any(p.requires_grad for p in frozen), "a frozen part has gradients"
    before = [p.clone() for p in frozen]
    grown.train()
    fine_tune(grown, steps=2)
    assert all(a.equal(b) for a, b in zip(before, frozen, strict=True)), "train() woke the frozen codebook"


def test_a_draft_is_the_enlarged_low_res_picture_in_high_tokens():
    low, high = tokenizer(), VQGAN(replace(CFG, image_size=32)).eval()
    tokens = torch.randint(12, (3, 16), generator=torch.Generator().manual_seed(0))
    draft = draft_tokens(low, high, tokens)
    assert draft.shape == (3, 64), "one for each position of the high grid"
    pixels = F.interpolate(low.decode(tokens).clamp(-1, 1), scale_factor=2, mode="bicubic")
    assert draft.equal(high.encode(pixels)), "decoded, enlarged, encoded"
    assert not draft.requires_grad
