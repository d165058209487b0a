"""Budgets against closed forms worked by hand, real optimizers, real models on the CPU, and a real decode."""

from dataclasses import replace

import pytest
import torch
from conftest import parameter_counts
from torch import nn

from minimuse import train_budget as budget
from minimuse.config import STAGES, preset
from minimuse.muse import build
from minimuse.text import TextEncoder
from minimuse.train_budget import (
    count_flops,
    duration,
    matmul_ceiling,
    optimizer_bytes,
    report,
    saved_bytes,
    si,
    stage_budget,
)
from minimuse.train_engine import checkpoint_activations, make_optimizers
from minimuse.transformer import Layer, SelfAttention, Transformer
from minimuse.vqgan import ResBlock
from minimuse.vqgan_loss import PatchDiscriminator

NANO = preset("nano")
NANO = replace(NANO, stages={name: replace(stage, optimizer="adamw") for name, stage in NANO.stages.items()})


@pytest.fixture(scope="module")
def nano() -> dict[str, budget.StageBudget]:
    return {stage: stage_budget(NANO, stage) for stage in STAGES}


@pytest.fixture
def counted(nano, monkeypatch):
    """Reports of nano that take what was counted once."""
    monkeypatch.setattr(budget, "stage_budget", lambda config, stage, checkpointing: nano[stage])


def transformer_flops(config, text_tokens: int) -> int:
    """Forward and backward of a base model and one example, term by term."""
    d, f, n, l = config.width, config.mlp_width, config.tokens, text_tokens
    layer = 2 * n * (3 * d * d + d * d)  # self-attention: q, k, v; out
    layer += 4 * n * n * d  # its two products, over all heads
    layer += 2 * n * (d * d + d * d) + 2 * l * 2 * d * d  # cross-attention: q, out; k and v of the text
    layer += 4 * n * l * d
    layer += 2 * n * 2 * d * f
    text = 2 * l * config.text_width * d
    return 3 * (config.layers * layer + 2 * n * d * config.codebook_size) + 2 * text  # no gradient goes into the text


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def test_flops_of_the_base_model_by_hand(nano):
    assert nano["base"].step_flops == NANO.stages["base"].batch * transformer_flops(NANO.base, NANO.text_tokens)
    assert nano["base"].flops == nano["base"].step_flops * NANO.stages["base"].steps


def test_a_plain_transformer_costs_6_n_t_and_attention():
    d, layers, tokens = 32, 3, 20
    model = nn.Sequential(*(Layer(d, 4, 4 * d, 0, 0.0, cross=False) for _ in range(layers)))
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    x = torch.randn(1, tokens, d, requires_grad=True)
    assert count_flops(lambda: model(x).sum().backward()) == 6 * matrices * tokens + 12 * layers * tokens**2 * d


def test_multi_axis_attention_costs_what_it_attends_to():
    d, g, b = 32, 16, 4
    n, x = g * g, torch.randn(1, g * g, d)
    linear = 2 * n * 4 * d * d
    assert count_flops(lambda: SelfAttention(d, 4, b)(x)) == linear + 4 * n * (b**2 + n // b**2) // 2 * d
    assert count_flops(lambda: SelfAttention(d, 4)(x)) == linear + 4 * n * n * d


def test_a_residual_block_by_hand():
    x = torch.randn(2, 16, 8, 6, requires_grad=True)
    forward = 2 * 2 * (2 * 9 * 16 * 16 * 8 * 6)
    assert count_flops(lambda: ResBlock(16)(x).sum().backward()) == 3 * forward


@pytest.mark.slow
def test_full_depth_of_paper_632m_at_reduced_width():
    config = preset("paper_632m")
    config = replace(config, base=replace(config.base, width=32, heads=4, mlp_width=128))  # and all of its 36 layers
    b = stage_budget(config, "base")
    assert b.step_flops == 512 * transformer_flops(config.base, config.text_tokens)
    assert b.parameters == parameter_counts(config)["base"]


@pytest.mark.parametrize("stage", ["superres", "decoder"])
def test_flops_are_linear_in_the_batch(stage):
    with torch.device("meta"):
        step, (_, losses) = 20_000, budget._networks(preset("toy"), stage)
        one, three = (count_flops(lambda n=n: [x.backward() for x in losses(n, step)]) for n in (1, 3))
    assert three == 3 * one


def test_a_discriminator_costs_from_its_start_on():
    how = replace(NANO.stages["low_tokenizer"], steps=100, adversarial_weight=0.1)

    def flops(**changes) -> float:
        stages = {"low_tokenizer": replace(how, **changes)}
        return stage_budget(replace(NANO, stages=stages), "low_tokenizer").step_flops

    without, late, always = flops(adversarial_weight=0.0), flops(adversarial_start=75), flops()
    assert flops(adversarial_start=100) == without < late < always
    assert late == pytest.approx(0.75 * without + 0.25 * always, rel=1e-12)
    assert flops(perceptual_weight=0.05) > always == flops(perceptual_weight=0.05, perceptual="none")
    assert flops(discriminator_width=64) > always


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("part", ["base", "low_tokenizer"])
def test_optimizer_bytes_are_a_real_optimizers(optimizer, part):
    model = build(NANO)[part]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    size = 0
    for real in make_optimizers(model, replace(NANO.stages[part], optimizer=optimizer)):
        real.step()
        size += sum(x.numel() * x.element_size() for values in real.state.values() for x in values.values())
    assert optimizer_bytes(model, optimizer) == size


def test_weights_and_gradients_are_a_real_models(nano):
    parts = build(NANO)
    for stage in ("base", "superres", "low_tokenizer"):
        real = sum(p.numel() * p.element_size() for p in parts[stage].parameters())
        assert nano[stage].weights == nano[stage].gradients == real
    tuned = nano["decoder"]
    assert tuned.trained == sum(p.numel() for p in parts["high_tokenizer"].decoder.parameters())
    assert tuned.parameters == sum(p.numel() for p in parts["high_tokenizer"].parameters())
    assert tuned.weights > tuned.gradients == 4 * tuned.trained


def test_the_discriminator_is_among_the_parameters():
    how = replace(NANO.stages["low_tokenizer"], adversarial_weight=0.1)
    config = replace(NANO, stages={"low_tokenizer": how})
    critic = sum(p.numel() for p in PatchDiscriminator().parameters())
    assert stage_budget(config, "low_tokenizer").trained == parameter_counts(config)["low_tokenizer"] + critic


def really_saved(run, weights: nn.Module) -> int:
    """Bytes that torch itself keeps for a backward pass, on the CPU in fp32."""
    storages = {}
    ours = {x.data_ptr() for x in [*weights.parameters(), *weights.buffers()]}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    assert result.requires_grad
    return sum(storage.nbytes() for at, storage in storages.items() if at not in ours)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["low_tokenizer", "base", "superres"])
def test_activations_are_a_real_models(stage, checkpointing):
    found = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            networks, losses = budget._networks(NANO, stage)
            if checkpointing:
                checkpoint_activations(networks)
            if device == "meta":
                found.append(saved_bytes(lambda losses=losses: next(losses(2, 0)), networks, bf16=False))
    (counted,) = found
    assert counted == pytest.approx(really_saved(lambda: next(losses(2, 0)), networks), rel=0.02)


def test_activations_are_linear_in_the_batch(nano):
    with torch.device("meta"):
        networks, losses = budget._networks(NANO, "superres")
        three = saved_bytes(lambda: next(losses(3, 0)), networks)
    b = nano["superres"]
    assert three == pytest.approx(b.casts + 3 * b.activations, rel=1e-3)


def test_activations_of_a_layer_by_hand():
    d, f, heads, n = 32, 96, 4, 20
    layer, x = Layer(d, heads, f, 0, 0.0, cross=False), torch.randn(1, n, d, requires_grad=True)
    attention = (
        d + 2 + d + 3 * d + heads + d
    )  # x and its mean and spread; normed; q, k, v; a log-sum a head; heads' out
    mlp = d + 2 + d + 2 * f  # x and its mean and spread; normed; before and after GELU
    with torch.device("meta"):
        fake, y = Layer(d, heads, f, 0, 0.0, cross=False), torch.randn(1, n, d, requires_grad=True)
        assert saved_bytes(lambda: fake(y), fake, bf16=False) == 4 * n * (attention + mlp)
    assert saved_bytes(lambda: layer(x), layer, bf16=False) == 4 * n * (attention + mlp)


def test_bf16_copies_are_half_of_the_matrices(nano):
    matrices = [p for n, p in Transformer(NANO.base).named_parameters() if p.ndim == 2 and "codes" not in n]
    saved = matrices[1:]  # not the text projection: what it reads asks for no gradient
    assert matrices[0].shape == (NANO.base.width, NANO.base.text_width)
    assert nano["base"].casts == pytest.approx(2 * sum(p.numel() for p in saved), abs=16)  # and a few scalars


def test_normalization_is_saved_in_float():
    block, x = ResBlock(16), torch.randn(1, 16, 8, 8, requires_grad=True)
    bf16 = saved_bytes(lambda: block(x), block)
    norms = 2 * (4 + 4 + 2) * x.numel()  # each: its input, SiLU's input, the convolution's
    copies = sum(2 * p.numel() for p in block.parameters() if p.ndim == 4)
    assert bf16 == norms + copies + 2 * 2 * 4  # and a mean and a spread a group


@pytest.mark.parametrize("stage", ["base", "high_tokenizer"])
def test_checkpointing_trades_bytes_for_flops(stage, nano):
    again = stage_budget(NANO, stage, checkpointing=True)
    assert again.activations < nano[stage].activations / 2
    assert nano[stage].step_flops < again.step_flops < nano[stage].step_flops * 4 / 3
    assert again[:5] == nano[stage][:5]


def test_a_checkpointed_layer_saves_its_input_and_its_memory():
    config, l = NANO.base, NANO.text_tokens
    more = replace(NANO, base=replace(config, layers=config.layers + 1))
    a, b = (stage_budget(c, "base", checkpointing=True).activations for c in (NANO, more))
    entries = 2 * l * config.width  # cast for the layer's own keys and values
    assert b - a == 4 * config.tokens * config.width + 2 * l * 2 * config.width + entries


def test_examples_that_fit():
    b = budget.StageBudget("base", 1, 8, 10, 10, 1.0, weights=40, gradients=40, optimizer=80, casts=20, activations=100)
    assert b.fixed == 180
    assert [b.examples(m) for m in (100, 279, 280, 1000)] == [0, 0, 1, 8]
    assert b.examples(280, shards=2) == 1
    assert b.examples(280, shards=4) == 2


# --- ceiling, report ----------------------------------------------------------------------------------------


def test_ceiling_of_this_machine():
    assert 1e7 < matmul_ceiling("cpu", torch.float32, size=128, seconds=0.01) < 1e15


def test_report_is_a_table_of_all_stages(nano, counted):
    text = report(NANO, ceiling=1e11, memory_gb=80)
    assert max(map(len, text.splitlines())) <= 120
    for stage, b in nano.items():
        (row,) = [line for line in text.splitlines() if line.startswith(stage + " ")]
        for figure in (si(b.step_flops, "FLOP"), si(b.fixed, "B"), si(b.activations, "B"), duration(b.flops / 1e11)):
            assert figure in row
    assert "fits in 80 GB" in text
    assert "as given" in text
    assert "at best" in text


def test_report_divides_by_the_accelerators(nano, counted):
    rows = report(NANO, 4, ceiling=1e11).splitlines()
    assert duration(sum(b.flops for b in nano.values()) / 4e11) in next(x for x in rows if x.startswith("all "))


@pytest.mark.parametrize(
    ("accelerators", "gigabytes", "told"),
    [(1, 0.03, "4 of 16, 4"), (4, 0.02, "0 of 4, 7")],
)
def test_report_says_how_many_fit(accelerators, gigabytes, told, counted):
    text = report(NANO, accelerators, ceiling=1e11, memory_gb=gigabytes)
    assert next(x for x in text.splitlines() if x.startswith("base ")).endswith(f"  {told}"), text


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match=r"no stage 'bass' in 'nano'; known: low_tokenizer, base, .*"):
        stage_budget(NANO, "bass")
    for nonsense in ({"accelerators": 0}, {"ceiling": 0.0}, {"memory_gb": -1}, {"ceiling": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(nonsense))} is .*; give "):
            report(NANO, **nonsense)


@pytest.mark.slow
def test_paper_3b_takes_no_memory():
    b = stage_budget(preset("paper_3b"), "base")
    assert b.step_flops == pytest.approx(6 * b.parameters * 256 * 512, rel=0.1)


# --- numbers for people -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "expected"), [(0, "0.00 B"), (999, "999 B"), (999.9, "1.00 kB"), (32.6e9, "32.6 GB"), (2e27, "2000.0 YB")]
)
def test_si(x, expected):
    assert si(x, "B") == expected


@pytest.mark.parametrize(
    ("x", "expected"), [(0.0123, "12.3 ms"), (59.0, "59.0 s"), (90, "1.5 min"), (7200, "2.0 h"), (3.6e6, "1,000.0 h")]
)
def test_duration(x, expected):
    assert duration(x) == expected


@pytest.mark.parametrize("kind", ["t5", "bert", "albert", "clip"])
def test_bytes_of_a_language_model_without_its_weights(tiny_lms, kind):
    encoder = TextEncoder(tiny_lms[kind])
    size = budget.language_model_bytes(encoder)
    assert "_lm" not in vars(encoder), "nothing is loaded"
    weights = {w.data_ptr(): w.nbytes for name, w in encoder.weights.items() if "position_ids" not in name}
    assert size == sum(weights.values()), "each once, though T5 has its embedding twice"
    assert budget.language_model_bytes(TextEncoder(tiny_lms[kind], dtype=torch.bfloat16)) == size / 2
