"""transformer.py: tokens + memory -> logits; base and super-resolution (Muse 2.3, 2.4)."""

import shutil
from dataclasses import replace

import pytest
import torch
from conftest import parameter_counts
from torch.nn.attention import SDPBackend, sdpa_kernel

from minimuse import transformer
from minimuse.cfg import drop_text, null_text
from minimuse.config import preset
from minimuse.masking import masked_cross_entropy
from minimuse.text import Context
from minimuse.transformer import (
    Memory,
    SuperRes,
    Transformer,
    TransformerConfig,
    attention,
    directional_bias,
    multi_axis_attention,
    sinusoids,
)

V, D_LM = 11, 6
SIZES = {"codebook_size": V, "text_width": D_LM, "width": 32, "layers": 2, "heads": 4, "mlp_width": 64}
BASE = TransformerConfig(**SIZES, grid=4)
READER = replace(BASE, text_layers=2)
SR = TransformerConfig(**SIZES, grid=8, block=4, low_layers=2, low_grid=4, low_codebook_size=9)


def base():
    return Transformer(BASE).eval()


def reader():
    return Transformer(READER).eval()


def superres():
    return SuperRes(SR).eval()


def context(batch=2, length=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.tensor([length, *([3] * (batch - 1))])[:, None]
    return Context(torch.randn(batch, length, D_LM, generator=g) * mask[..., None], mask)


def no_tokens(text):
    """The same text with no text token in its mask."""
    return text._replace(mask=torch.zeros_like(text.mask))


def tokens(batch=2, n=16, high=V + 1, seed=0):
    return torch.randint(high, (batch, n), generator=torch.Generator().manual_seed(seed))


def assert_same(a, b, why, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-4, msg=lambda m: f"{why}: {m}")


def differ(a, b):
    return (a - b).abs().max().item() > 1e-4


def drafted():
    return SuperRes(replace(SR, draft=True)).eval()


# --- shapes, what depends on what -------------------------------------------------------------------------------------


def test_shapes():
    model, x = base(), tokens()
    memory = model.memory(context())
    assert model(x, memory).shape == (2, 16, V), "logits (B, N, V): [MASK] itself is never predicted"
    assert len(memory.keys) == len(memory.values) == 2, "keys and values a layer"
    assert memory.keys[0].shape == (2, 4, 5, 8), "(B, H, L, d)"
    assert memory.attend.shape == (2, 1, 1, 5), "(B, 1, 1, M)"
    big = superres()
    memory = big.memory(context(), tokens(high=9))
    assert memory.keys[0].shape == (2, 4, 5 + 16, 8), "text and low-res tokens, along the sequence"
    assert big(tokens(n=64), memory).shape == (2, 64, V), "logits over the high codebook"


def test_mask_id_is_one_past_the_codebook():
    model = base()
    assert model.mask_id == V, "codes are 0..V-1"
    assert model.embed.codes.num_embeddings == V + 1, "[MASK] has a vector of its own"


def test_logits_depend_on_tokens_places_text_and_its_order():
    model, x, text = base(), tokens(), context()
    out = model(x, model.memory(text))
    other = x.clone()
    other[:, 3] = (x[:, 3] + 1) % V
    assert differ(model(other, model.memory(text))[:, 12], out[:, 12]), "a far token does not matter: no self-attention"
    same = torch.full((1, 16), model.mask_id)
    places = model(same, model.memory(Context(*(t[:1] for t in text))))[0]
    distances = torch.cdist(places, places) + torch.eye(16)
    assert distances.min() > 1e-4, "two places of an all-[MASK] grid cannot be told apart: no 2-D positions"
    changed = text._replace(embeds=text.embeds + torch.tensor([1.0, 0, 0, 0, 0, 0]))
    assert differ(model(x, model.memory(changed)), out), "text does not reach the logits"


@pytest.mark.parametrize("n", [1, 4, 15, 17])
def test_another_number_of_tokens_is_refused(n):
    """A shorter sequence would otherwise be read as the first rows of the grid."""
    model = base()
    with pytest.raises(ValueError, match=r"this model reads \(B, 16\) tokens"):
        model(tokens(n=n), model.memory(context()))
    with pytest.raises(ValueError, match=r"this model reads \(B, 16\) tokens"):
        superres().memory(context(), tokens(n=n))


def test_an_example_does_not_depend_on_its_neighbours():
    model, x, text = base(), tokens(), context()
    out = model(x, model.memory(text))
    alone = model(x[1:], model.memory(Context(text.embeds[1:], text.mask[1:])))
    assert_same(out[1:], alone, "a row of a batch is not what it is alone")


def test_pitfall_07_masked_tokens_do_not_leak():
    """Two images that differ at masked places alone are one input: logits there cannot know the truth."""
    model, truth = base(), tokens(high=V)
    masked = torch.rand(2, 16) < 0.6
    other = torch.where(masked, (truth + 3) % V, truth)
    memory = model.memory(context())
    a, b = (model(t.masked_fill(masked, model.mask_id), memory) for t in (truth, other))
    assert a.equal(b), "logits know what stood at a masked place"
    visible = torch.where(masked, truth, (truth + 3) % V)
    assert differ(a, model(visible.masked_fill(masked, model.mask_id), memory)), "visible tokens must matter"


# --- text: padding, removal, memories ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [base, reader, superres])
def test_pitfall_14_padding_of_the_text_does_not_matter(make):
    """More padding, and whatever stands in it, leaves the logits as they were."""
    model, text = make(), context()
    x, low = tokens(n=model.config.tokens), [tokens(high=9)] if make is superres else []
    out = model(x, model.memory(text, *low))
    for filler in (0.0, 50.0):
        embeds = torch.cat([text.embeds, torch.full((2, 4, D_LM), filler)], 1)
        padded = Context(embeds, torch.cat([text.mask, torch.zeros(2, 4, dtype=torch.bool)], 1))
        assert_same(model(x, model.memory(padded, *low)), out, f"padding of {filler} moved the logits")
    garbage = Context(torch.where(text.mask[..., None], text.embeds, 9.0), text.mask)
    assert_same(model(x, model.memory(garbage, *low)), out, "what stands under the mask moved the logits")


def test_pitfall_14_a_zero_embedding_that_is_real_is_attended_to():
    """The mask decides, not a test for zeros."""
    model, x = base(), tokens()
    one = Context(torch.randn(2, 1, D_LM), torch.ones(2, 1, dtype=torch.bool))
    zero = torch.cat([one.embeds, torch.zeros(2, 1, D_LM)], 1)
    attended = model(x, model.memory(Context(zero, torch.tensor([[True, True]] * 2))))
    padding = model(x, model.memory(Context(zero, torch.tensor([[True, False]] * 2))))
    assert differ(attended, padding), "a real text token of zeros was taken for padding"


@pytest.mark.parametrize("make", [base, superres])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_pitfall_24_unconditional_logits_are_finite_on_every_backend(make, backend):
    model = make()
    x, low = tokens(n=model.config.tokens), [tokens(high=9)] if make is superres else []
    expected = model(x, model.memory(null_text(context()), *low))
    assert expected.isfinite().all(), "removed text makes logits that are not finite"
    try:
        with sdpa_kernel([backend]):
            out = model(x, model.memory(null_text(context()), *low))
            both = model.memory(context(), *low).cat(model.memory(null_text(context()), *low))
            batch = model(torch.cat([x, x]), both)
    except RuntimeError as error:
        pytest.skip(f"{backend.name} is not on this machine: {str(error)[:80]}")
    assert_same(out, expected, f"{backend.name} disagrees")
    assert_same(batch[2:], expected, f"{backend.name}: as the second half of a guided batch")


def test_heads_that_read_text_look_ahead_or_back_the_nearer_the_more():
    """By hand: four heads, two tokens and one of padding, slopes 1/2 and 1/8."""
    inf = float("inf")
    bias = directional_bias(torch.tensor([[True, True, False]]), heads=4)[0]
    for head, slope in ((0, 0.5), (1, 0.125)):
        assert bias[head].tolist() == [[0, -slope, -inf], [-inf, 0, -inf], [-inf, -inf, 0]], "ahead"
        assert bias[head + 2].tolist() == [[0, -inf, -inf], [-slope, 0, -inf], [-2 * slope, -slope, 0]], "back"


def test_text_layers_tell_who_comes_first():
    """The same vectors in another order: to a memory without order they are the same set, to one that reads not."""
    text = Context(torch.randn(1, 3, D_LM), torch.ones(1, 3, dtype=torch.bool))
    turned = Context(text.embeds.flip(1), text.mask)
    for model, reads in ((base(), False), (reader(), True)):
        a, b = (model.memory(t).keys[0] for t in (text, turned))
        assert differ(a, b.flip(2)) == reads, (
            f"text_layers={model.config.text_layers}: order is {'lost' if reads else 'read'}"
        )
        a, b = (model.memory(t).values[0] for t in (text, turned))
        assert_same(a, b.flip(2), "what is found is the LM's own, whatever stands around it")
        removed = model.memory(null_text(text))
        assert removed.keys[0].abs().max() == removed.values[0].abs().max() == 0, "removed text stays zero"


def test_text_layers_learn_what_belongs_to_what():
    """Texts "a X b Y" and "b X a Y", the same words: left shows what stands before X, right what stands before Y.

    Without the layer the two texts are one and the same, so that it is right by chance: in half.
    """
    a, b, x, y = torch.randn(4, D_LM, generator=torch.Generator().manual_seed(1))
    embeds = torch.stack([torch.stack(words) for words in ((a, x, b, y), (b, x, a, y), (b, y, a, x), (a, y, b, x))])
    texts, shown = Context(embeds, torch.ones(4, 4, dtype=torch.bool)), torch.tensor([[0, 1], [1, 0]] * 2)
    shown = shown[:, [0, 1, 0, 1]]  # grid of 2 x 2: both rows are alike
    hidden = torch.full_like(shown, V)
    for layers in (0, 1):
        torch.manual_seed(0)
        model = Transformer(replace(BASE, grid=2, text_layers=layers))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(150):
            logits = model(hidden, model.memory(texts))
            optimizer.zero_grad()
            masked_cross_entropy(logits, shown, hidden == V).backward()
            optimizer.step()
        right = (model(hidden, model.memory(texts)).argmax(-1) == shown).float().mean().item()
        assert right == 1 if layers else right < 0.8, f"text_layers={layers}: {right:.0%} right"


def test_no_text_layers_leave_checkpoints_as_they_were():
    names = {name for name, _ in base().named_parameters()}
    assert not any("text_layers" in name for name in names), "a model without them has their weights"


def test_null_text_adds_nothing():
    """Pitfall 24: no softmax is empty, and cross-attention adds exactly 0, whatever the weights."""
    for model in (base(), reader()):
        for removed in (null_text(context()), drop_text(context(), 1.0), no_tokens(context())):
            memory = model.memory(removed)
            assert all(v.eq(0).all() for v in memory.values), "the value of removed text is not zero"
            assert memory.attend.any(-1).all(), "and it is attended"
            cross = model.layers[0].cross(torch.randn(2, 16, 32), memory.keys[0], memory.values[0], memory.attend)
            assert cross.eq(0).all(), "cross-attention to removed text is not zero"


def test_pitfall_27_without_text_super_resolution_sees_only_the_low_tokens():
    """Entries of removed text take no softmax mass, however many there are and whatever they hold."""
    model, x, low = superres(), tokens(n=64), tokens(high=9)
    memory = model.memory(null_text(context()), low)
    alone = Memory(
        tuple(k[:, :, 1:] for k in memory.keys), tuple(v[:, :, 1:] for v in memory.values), memory.attend[..., 1:]
    )
    assert memory.attend.sum(-1).eq(16).all(), "16 low-res tokens, and nothing else, are attended to"
    expected = model(x, alone)
    for removed in (null_text(context()), drop_text(context(), 1.0), no_tokens(context())):
        assert_same(model(x, model.memory(removed, low)), expected, "removed text takes softmax mass")


def test_memory_cat_is_two_runs():
    model, x, text = base(), tokens(batch=3), context()
    short = context(batch=1, length=2, seed=3)
    a, b = model.memory(text), model.memory(short)
    for first, second, rows in ((a, b, [(a, x[:2]), (b, x[2:])]), (b, a, [(b, x[:1]), (a, x[1:])])):
        joined = first.cat(second)
        assert joined.attend.shape == (3, 1, 1, 5), "as long as the longer"
        assert joined.attend.sum() == a.attend.sum() + b.attend.sum(), "padding is not attended"
        expected = torch.cat([model(t, memory) for memory, t in rows])
        assert_same(model(x, joined), expected, "one batch of both is not both")


def test_memory_is_made_once_for_a_decode():
    """Forward reads the memory alone: the same object serves any number of calls, and is not written to."""
    model, x = base(), tokens()
    memory = model.memory(context())
    before = Memory(
        tuple(k.clone() for k in memory.keys), tuple(v.clone() for v in memory.values), memory.attend.clone()
    )
    first, again = model(x, memory), model(x, memory)
    assert first.equal(again), "a second step with the same memory differs"
    assert all(a.equal(b) for a, b in zip(before.keys + before.values, memory.keys + memory.values, strict=True)), (
        "forward wrote into the memory"
    )


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "padding", "causal", "numbers"])
def test_plain_products_are_torchs_attention(mask, monkeypatch):
    """bf16 on a CPU goes a way of its own: its numbers and gradients are those of float32, to bf16's 8 bits."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 4, 12, 16).bfloat16())
    see = torch.rand(2, 1, 1, 12) < 0.6
    see[..., 0] = True
    attend = {"none": None, "padding": see, "causal": torch.ones(12, 12, dtype=torch.bool).tril()}.get(mask)
    if mask == "numbers":
        attend = directional_bias(see[:, 0, 0], heads=4)
    single = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = attention(*single, attend)
    monkeypatch.setattr(transformer.F, "scaled_dot_product_attention", lambda *a, **k: pytest.fail("it is torch's"))
    out = attention(q, k, v, attend)
    assert out.dtype == torch.bfloat16, "bf16 stays bf16"
    assert_same(out.float(), expected, "plain products", atol=0.03)
    for x in (out, expected):
        x.float().square().sum().backward()
    for a, b in zip((q, k, v), single, strict=True):
        assert_same(a.grad.float(), b.grad, "gradients of plain products", atol=0.15)


@pytest.mark.parametrize("make", [base, reader, superres])
def test_bf16_logits_are_those_of_float32(make):
    """Guided batches, padded text: within 3% of their length, five of bf16's roundings."""
    model, text = make(), context()
    x, low = tokens(n=model.config.tokens), [tokens(high=9)] if make is superres else []

    def logits(dtype):
        given = [Context(c.embeds.to(dtype), c.mask) for c in (text, null_text(text))]
        cond, uncond = (model.to(dtype).memory(c, *low) for c in given)
        return model(torch.cat([x, x]), cond.cat(uncond)).float()

    single, half = logits(torch.float32), logits(torch.bfloat16)
    assert half.isfinite().all(), "bf16 overflows"
    error = ((single - half).norm() / single.norm()).item()
    assert 0 < error < 0.03, f"bf16 is off by {error:.1%}"


def test_long_attention_is_fused(monkeypatch):
    """4,096 tokens' weights, 4,096^2 a head, are never in memory at once."""
    q, k, v = torch.randn(3, 1, 1, 1025, 4).bfloat16()
    calls, fused = [], transformer.F.scaled_dot_product_attention
    spy = lambda *a, **how: calls.append(1) or fused(*a, **how)  # noqa: E731
    monkeypatch.setattr(transformer.F, "scaled_dot_product_attention", spy)
    attention(q, k[:, :, :1024], v[:, :, :1024])
    assert not calls, "plain up to 1,024 entries"
    attention(q, k, v)
    assert calls == [1], "fused beyond"


# --- multi-axis attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("g", "b"), [(4, 2), (6, 2), (6, 3), (8, 4), (4, 4), (4, 1)])
def test_multi_axis_attention_is_full_attention_under_two_masks(g, b):
    """Local heads see their own block, dilated heads their place in every block: here by a mask over all pairs."""
    q, k, v = torch.randn(3, 2, 4, g * g, 8)
    place = torch.arange(g * g)
    row, column = place // g, place % g
    same_block = (row[:, None] // b == row // b) & (column[:, None] // b == column // b)
    same_place = (row[:, None] % b == row % b) & (column[:, None] % b == column % b)
    expected = []
    for head in range(4):
        mask = same_block if head < 2 else same_place
        weights = (q[:, head] @ k[:, head].mT / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        expected.append(weights @ v[:, head])
    assert_same(multi_axis_attention(q, k, v, b), torch.stack(expected, 1), f"grid {g}, blocks of {b}")


def test_two_layers_of_multi_axis_attention_reach_everywhere():
    """Local then dilated: any token hears of any other in two layers, though not in one."""
    one_layer = SuperRes(
        TransformerConfig(**SIZES | {"layers": 1}, grid=8, block=2, low_layers=1, low_grid=4, low_codebook_size=9)
    )
    two_layers = SuperRes(TransformerConfig(**SIZES, grid=8, block=2, low_layers=1, low_grid=4, low_codebook_size=9))
    x, low = tokens(n=64, high=V), tokens(high=9)
    other = x.clone()
    other[:, 0] = (x[:, 0] + 1) % V
    for model, heard in ((one_layer, False), (two_layers, True)):
        memory = model.eval().memory(context(), low)
        change = (model(other, memory) - model(x, memory)).abs().amax((0, 2))
        assert bool((change > 1e-6).all()) == heard, f"{len(model.layers)} layers: {change.view(8, 8)}"


# --- super-resolution -------------------------------------------------------------------------------------------------


def test_pitfall_01_super_resolution_reads_its_condition():
    model, x, low = superres(), tokens(n=64), tokens(high=9)
    masked = torch.ones(2, 64, dtype=torch.bool)

    def loss(low):
        logits = model(torch.full_like(x, model.mask_id), model.memory(context(), low))
        return masked_cross_entropy(logits, x % V, masked)

    shuffled = low[:, torch.randperm(16)]
    assert abs(loss(low) - loss(shuffled)) > 1e-5, "permuting the low-res tokens leaves the loss as it was"
    assert abs(loss(low) - loss((low + 1) % 9)) > 1e-5, "other low-res tokens leave the loss as it was"
    loss(low).backward()
    for name, p in model.named_parameters():
        if name.startswith("low_"):
            assert p.grad is not None, f"no gradient reaches {name}"
            assert p.grad.abs().sum() > 0, f"the gradient of {name} is zero"
    assert {n.split(".")[0] for n, _ in model.named_parameters()} >= {"low_embed", "low_layers", "low_norm"}, (
        "its parts"
    )


def test_pitfall_02_low_res_tokens_have_positions():
    """Attention alone does not know order: moving a token, the multiset being the same, must change the logits."""
    model, x = superres(), tokens(n=64)
    low = torch.zeros(2, 16, dtype=torch.long)
    low[:, 0] = 5
    out = model(x, model.memory(context(), low))
    for place in (1, 4, 15):
        moved = torch.zeros_like(low)
        moved[:, place] = 5
        assert differ(model(x, model.memory(context(), moved)), out), f"token moved from place 0 to {place}, unnoticed"
    assert model.low_embed.rows.shape == (4, 1, 32), "positions of its own, of the low grid"


def test_guidance_removes_the_text_alone():
    """The low-res tokens stay when the text goes."""
    model, x = superres(), tokens(n=64)
    null = null_text(context())
    one, other = (model(x, model.memory(null, tokens(high=9, seed=s))) for s in (1, 2))
    assert differ(one, other), "without text the low-res tokens do not count"
    assert not differ(*(model(x, model.memory(null_text(context(seed=s)), tokens(high=9))) for s in (1, 2))), (
        "removed text still counts"
    )


def test_low_res_entries_are_attended_whatever_the_text_mask():
    memory = superres().memory(context(), tokens(high=9))
    assert memory.attend[:, 0, 0, 5:].all(), "a low-res token counts as padding"
    assert memory.attend[1, 0, 0, :5].tolist() == [True] * 3 + [False] * 2, "text padding does not"


def test_super_resolution_needs_a_low_encoder():
    with pytest.raises(ValueError, match="low_layers > 0"):
        SuperRes(BASE)


# --- learning, numbers, compiling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [base, reader, superres])
def test_every_parameter_learns(make):
    model = make()
    n, low = model.config.tokens, [tokens(high=9)] if make is superres else []
    loss = model(tokens(n=n), model.memory(context(), *low)).square().mean()
    loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead, f"no gradient reaches {dead}"


def test_first_logits_are_mild():
    """Untrained, the loss starts near log V."""
    model, x = Transformer(TransformerConfig(**SIZES | {"codebook_size": 512}, grid=8)).eval(), tokens(n=64, high=512)
    logits = model(x, model.memory(context()))
    loss = masked_cross_entropy(logits, x, torch.ones_like(x, dtype=torch.bool))
    assert 5.5 < loss.item() < 8, f"log 512 is 6.2, the first loss {loss.item():.2f}"


def test_dropout_in_training_alone():
    model, x = Transformer(TransformerConfig(**SIZES, grid=4, dropout=0.5)), tokens()
    memory = model.memory(context())
    assert differ(model.train()(x, memory), model(x, memory)), "dropout does nothing in training"
    assert model.eval()(x, memory).equal(model(x, memory)), "dropout is on in eval"


@pytest.mark.parametrize(("name", "part", "target"), [("base", "base", 632e6), ("super-res", "superres", 268e6)])
def test_parameters_of_the_632m_preset(name, part, target):
    count = parameter_counts(preset("paper_632m"))[part]
    assert abs(count / target - 1) < 0.02, (
        f"{name} has {count / 1e6:.0f}M parameters, not {target / 1e6:.0f}M within 2%"
    )


def test_the_3b_preset_has_the_papers_numbers():
    config = preset("paper_3b")
    assert (config.base.layers, config.base.width, config.base.mlp_width) == (48, 2048, 8192), "Muse A.1"
    assert (config.superres.layers, config.superres.width, config.superres.mlp_width) == (32, 1024, 4096), "Muse A.3"
    assert config.superres.low_layers == 16, "Muse A.3: 16 layers over the low-res tokens"
    assert config.superres.block > 0, "Muse 2.4: multi-axis attention"
    counts = parameter_counts(config)
    assert 2.5e9 < counts["base"] < 3.5e9, f"3B, got {counts['base'] / 1e9:.2f}B"


@pytest.mark.parametrize("make", [base, superres])
def test_compiles_whole(make):
    """No graph break: `fullgraph` refuses them."""
    model = make()
    x, low = tokens(n=model.config.tokens), [tokens(high=9)] if make is superres else []
    memory = model.memory(context(), *low)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(compiled(x, memory), model(x, memory), "captured as one graph, it computes something else")
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
@pytest.mark.parametrize("make", [base, superres])
def test_compiled_by_inductor_computes_the_same(make):
    model = make()
    x, low = tokens(n=model.config.tokens), [tokens(high=9)] if make is superres else []
    memory = model.memory(context(), *low)
    compiled = torch.compile(model, fullgraph=True)
    assert_same(compiled(x, memory), model(x, memory), "inductor's code computes something else", atol=1e-4)
    torch.compiler.reset()


def test_positions_begin_alike_at_the_same_place_of_both_grids():
    low, high = sinusoids(8, 32), sinusoids(16, 32)
    nearest = (low @ high.T).topk(2, dim=1).indices.sort(1).values
    expected = torch.arange(16).view(8, 2)
    assert nearest.tolist() == expected.tolist(), "a low cell resembles most the two high cells that it covers"


# --- the draft --------------------------------------------------------------------------------------------------------


def test_a_draft_reaches_its_own_position_and_guidance_keeps_it():
    model, low, x = drafted(), tokens(high=9), tokens(n=64)
    draft = tokens(n=64, high=V, seed=1)
    plain = model(x, model.memory(context(), low, draft))
    changed = draft.clone()
    changed[:, 9] = (changed[:, 9] + 1) % V
    moved = (model(x, model.memory(context(), low, changed)) - plain).abs().amax(-1)
    assert moved[:, 9].min() > 1e-4, "the draft of a position changes its logits"
    both = model.memory(context(), low, draft).cat(model.memory(null_text(context()), low, changed))
    assert_same(model(x.repeat(2, 1), both)[:2], plain, "a joined batch keeps each row's draft")
    assert both.draft.shape == (4, 64, 32), "one vector for each position"


def test_a_draft_is_given_exactly_where_the_model_reads_one():
    low, draft = tokens(high=9), tokens(n=64, high=V)
    with pytest.raises(ValueError, match=r"give a draft if config\.draft is True"):
        drafted().memory(context(), low)
    with pytest.raises(ValueError, match="and only then"):
        superres().memory(context(), low, draft)
    with pytest.raises(ValueError, match="low_layers 0"):
        replace(BASE, draft=True)
