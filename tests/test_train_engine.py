"""train_engine.py: the same draws and gradients however a step is shared, and a state that holds all of a run."""

import copy
import itertools
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train import PIXELS, VQ, plain_images
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import _CHECKPOINT_PREFIX

from minimuse import checkpoint
from minimuse import train_state as runs
from minimuse import transformer as transformer_module
from minimuse.config import StageConfig, to_dict
from minimuse.text import pad_contexts
from minimuse.train import train_tokenizer, train_transformer
from minimuse.train_engine import (
    Engine,
    Stage,
    Stopped,
    batch_indices,
    checkpoint_activations,
    init_from_codebook,
    random_features,
)
from minimuse.transformer import SuperRes, Transformer, TransformerConfig
from minimuse.utils import NoBfloat16
from minimuse.vqgan import VQGAN

V, D_LM, N = 8, 6, 16
LAUNCH = Path(checkpoint.__file__).parent / "launch"
SIZES = {"codebook_size": V, "text_width": D_LM, "width": 32, "layers": 2, "heads": 2, "mlp_width": 64}
CFG = StageConfig(steps=3, batch=8, learning_rate=5e-3, warmup=1, weight_decay=0.01)


def transformer(**changes):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(**SIZES, grid=4, **changes))


def superres():
    torch.manual_seed(0)
    return SuperRes(TransformerConfig(**SIZES, grid=4, block=2, low_layers=1, low_grid=2, low_codebook_size=4))


def data(n=24):
    """Tokens, captions of several lengths, low-res tokens."""
    g = torch.Generator().manual_seed(0)
    texts = [[torch.randn(k % 4 + 1, D_LM, generator=g), torch.randn(2, D_LM, generator=g)] for k in range(n)]
    return torch.randint(V, (n, N), generator=g), texts, torch.randint(4, (n, 4), generator=g)


def fp32(**settings_):
    return Engine(bf16=False, **settings_)


def run(model, config=CFG, engine=None, low=False, steps=None):
    """Some steps of training; the model, after them."""
    tokens, texts, low_tokens = data()
    stage = train_transformer(
        model, config, tokens, texts, low_tokens=low_tokens if low else None, engine=engine or fp32()
    )
    for _ in itertools.islice(stage, steps):
        pass
    return model


def gradients(model):
    return {name.replace(_CHECKPOINT_PREFIX, ""): p.grad.clone() for name, p in model.named_parameters()}


def weights(model):
    return {name: p.detach().clone().contiguous() for name, p in model.named_parameters()}


def assert_close(a, b, why, atol=1e-4):
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{why}: {n}: {m}")


# --- pitfall 22: one gradient, however it is shared -------------------------------------------------------------------


@pytest.mark.parametrize("make", [transformer, superres])
def test_pitfall_22_micro_batches_make_the_same_gradient(make):
    low = make is superres
    whole = run(make(), engine=fp32(), low=low, steps=1)
    parts = run(make(), engine=fp32(accumulate=4), low=low, steps=1)
    assert_close(gradients(whole), gradients(parts), "4 micro-batches against one batch", atol=1e-5)


def test_masks_of_an_example_do_not_depend_on_the_batch():
    """The draws of place p are the same in a batch of 8 and in two of 4."""
    seen = []
    for batch, steps in ((8, 1), (4, 2)):
        stage = Stage(fp32(), "s", replace(CFG, batch=batch, steps=steps), {"model": torch.nn.Linear(2, 2)})
        draws = [g for step in stage.steps() for _, gs in stage.micro_batches(24, step) for g in gs]
        seen.append(torch.stack([torch.rand(3, generator=g) for g in draws]))
    assert seen[0].equal(seen[1]), "an example's draws depend on how batches are cut"


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match=r"a batch of 8 does not split.*multiple of 3"):
        run(transformer(), engine=fp32(accumulate=3))
    for wrong in ({"accumulate": 0}, {"accumulate": -1}, {"keep": -1}, {"seed": 2**32}, {"accumulate": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; give "):
            Engine(**wrong)


def port():
    """One that is free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


TWO = """
import sys
import torch
from test_train_engine import fp32, gradients, run, superres, transformer, weights
from test_train import PIXELS, VQ, plain_images
from dataclasses import replace
from minimuse.train import train_tokenizer
from minimuse.vqgan import VQGAN

engine = fp32(accumulate=int(sys.argv[2]))
assert engine.processes == 2, engine.processes
found = {}
for make in (transformer, superres):
    model = run(make(), engine=engine, low=make is superres, steps=1)
    found |= {f"{make.__name__}.{k}": v for k, v in gradients(model).items()}
torch.manual_seed(0)
vqgan = VQGAN(VQ)
config = replace(PIXELS, steps=4, adversarial_weight=0.1, adversarial_start=1)
*_, last = train_tokenizer(vqgan, config, plain_images(), engine=engine)
found |= {f"vqgan{engine.rank}.{k}": v for k, v in weights(vqgan).items()}
torch.manual_seed(0)
*_, last = train_tokenizer(VQGAN(VQ), replace(config, steps=1, adversarial_start=0), plain_images(), engine=engine)
found |= {f"tokenizer.{k}": v.contiguous() for k, v in gradients(last.model).items()}
from safetensors.torch import save_file
save_file(found, sys.argv[1] + f"/{engine.rank}.safetensors")
"""


def launch(script, *arguments):
    """A script under two processes of gloo, with tests and package on its path."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port())]
    path = os.pathsep.join(str(p) for p in (Path(__file__).parent, Path(__file__).parent.parent))
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command += [str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_pitfall_22_two_processes_make_the_same_gradient(tmp_path):
    """gloo on the CPU: base and super-res against one process, and the tokenizers of both stay the same."""
    (tmp_path / "two.py").write_text(TWO)
    launch(tmp_path / "two.py", tmp_path, 2)
    found = [load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    for make in (transformer, superres):
        alone = gradients(run(make(), low=make is superres, steps=1))
        for rank in (0, 1):
            shared = {k: found[rank][f"{make.__name__}.{k}"] for k in alone}
            assert_close(alone, shared, f"process {rank} of 2 against one")
    config = replace(PIXELS, steps=1, adversarial_weight=0.1)
    torch.manual_seed(0)
    (alone,) = train_tokenizer(VQGAN(VQ), config, plain_images(), engine=fp32())
    for rank in (0, 1):
        shared = {k: found[rank][f"tokenizer.{k}"] for k in gradients(alone.model)}
        assert_close(gradients(alone.model), shared, f"pitfall 28: process {rank} of 2 trains another tokenizer")
    for key in [k for k in found[0] if k.startswith("vqgan0")]:
        assert found[0][key].equal(found[1][key.replace("vqgan0", "vqgan1")]), f"the processes part ways: {key}"


SHARDED = """
import itertools
import sys
from dataclasses import replace
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from test_train_engine import CFG, fp32, run, superres

engine = fp32()
# accelerate knows FSDP on accelerators alone; torch shards on CPUs too, so we tell it that this is one
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=sys.argv[2].split(",")
)
AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
PartialState._shared_state["distributed_type"] = DistributedType.FSDP
assert engine.accelerator.is_fsdp2 and engine.processes == 2
for folder, steps in (("a", None), ("b", 2), ("b", None)):
    engine = fp32(folder=f"{sys.argv[1]}/{folder}")
    model = run(superres(), replace(CFG, steps=4, save_every=1, ema=0.5), engine, low=True, steps=steps)
    assert type(next(model.parameters())).__name__ == "DTensor", "nothing is sharded"
    whole = engine.gather_full_model(model, superres)
    save_file(whole.state_dict(), f"{sys.argv[1]}/{folder}{engine.rank}.safetensors")
wrong = replace(CFG, steps=4, learning_rate=1e30)
try:
    run(superres(), wrong, fp32(folder=f"{sys.argv[1]}/c"), low=True)
except ValueError as e:
    assert "base diverged at step" in str(e), e
else:
    raise AssertionError("a sharded run that diverges does not stop")
"""


@pytest.mark.slow
def test_a_sharded_run_makes_the_same_weights_and_goes_on_to_the_same_bits(tmp_path):
    """FSDP2, with the classes that launch/fsdp8.yaml wraps: against one process, stopped and resumed, averaged."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    wrap = yaml.safe_load((LAUNCH / "fsdp8.yaml").read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    launch(tmp_path / "sharded.py", tmp_path, wrap)
    a, b, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("a0", "b0", "a1"))
    assert all(a[k].equal(b[k]) for k in a), "a resumed sharded run parts ways"
    assert all(a[k].equal(other[k]) for k in a), "the second process does not have the trained weights"
    alone = run(superres(), replace(CFG, steps=4, ema=0.5), low=True)
    assert_close(weights(alone), a, "two shards against one process")
    states = runs.states(tmp_path / "a" / "base")
    assert len(list(states[-1].glob("*.distcp"))) == 2, "each process writes its own part"
    averaged = runs.average(states[-1:], 0.7)
    assert all(averaged[k].equal(a[k]) for k in a), "sharded states cannot be averaged"


# --- launch files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(p.name for p in LAUNCH.glob("*.yaml")))
def test_launch_files_are_what_accelerate_reads(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(LAUNCH / name))
    assert config.mixed_precision == "bf16"
    assert config.num_processes == (1 if name == "1gpu.yaml" else 8)
    assert "-m minimuse.cli train" in (LAUNCH / name).read_text(), "the file says how it is used"
    if "fsdp" in name:
        assert config.fsdp_config["fsdp_version"] == 2
        for cls in config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(","):
            assert hasattr(transformer_module, cls), f"{cls} is no class of transformer.py"


# --- switches ---------------------------------------------------------------------------------------------------------


def test_recompute_changes_no_gradient():
    plain = run(superres(), low=True, steps=1)
    again = run(superres(), engine=fp32(recompute=True), low=True, steps=1)
    assert "forward" in vars(again.layers[0]), "no layer is checkpointed"
    assert_close(gradients(plain), gradients(again), "activation checkpointing", atol=1e-6)
    forward = again.layers[0].forward
    checkpoint_activations(again)
    assert again.layers[0].forward is forward, "a layer is checkpointed once"


@pytest.mark.slow
def test_compile_changes_no_gradient():
    plain = run(transformer(), steps=1)
    compiled = run(transformer(), engine=fp32(compile=True), steps=1)
    assert_close(gradients(plain), gradients(compiled), "torch.compile", atol=1e-5)


def test_the_moving_average_is_the_result():
    """By hand: after T steps the weights are d^T w0 + (1 - d) sum d^(T-i) w_i."""
    decay, path = 0.9, []
    tokens, texts, _ = data()
    for _ in train_transformer(model := transformer(), CFG, tokens, texts, engine=fp32()):
        path.append(weights(model))
    averaged = weights(run(transformer(), replace(CFG, ema=decay)))
    start = weights(transformer())
    for name, value in start.items():
        for step in path:
            value = decay * value + (1 - decay) * step[name]
        torch.testing.assert_close(averaged[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_steps_train_fewer_the_later_a_rate_is():
    stage = Stage(fp32(), "s", CFG, {"model": torch.nn.Linear(2, 2)})
    for step in range(3):
        stage.update(step)
    assert stage.optimizers["model"][0].param_groups[0]["lr"] < CFG.learning_rate, "the rate falls along the cosine"


# --- states -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [replace(CFG, save_every=1), replace(CFG, save_every=1, ema=0.9, optimizer="adafactor")]
)
def test_a_stopped_stage_goes_on_to_the_same_bits(tmp_path, config):
    config = replace(config, steps=6)
    whole = run(transformer(dropout=0.2), config, fp32(folder=tmp_path / "whole"))
    run(transformer(dropout=0.2), config, fp32(folder=tmp_path / "parts"), steps=3)
    torch.manual_seed(99)  # another process would not be where this one is
    other = Transformer(TransformerConfig(**SIZES, grid=4, dropout=0.2))
    resumed = run(other, config, fp32(folder=tmp_path / "parts"))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert a.equal(b), f"{name} differs after a resume"
    done = run(transformer(dropout=0.2), config, fp32(folder=tmp_path / "parts"))
    assert all(a.equal(b) for a, b in zip(whole.parameters(), done.parameters(), strict=True)), "a finished stage moves"


def test_states_are_rotated_and_tell_what_they_are_of(tmp_path):
    run(transformer(), replace(CFG, steps=5, save_every=1), fp32(folder=tmp_path, keep=2, seed=7))
    assert sorted(p.name for p in (tmp_path / "base").iterdir()) == ["step-00000004", "step-00000005"]
    values = json.loads((tmp_path / "base" / "step-00000005" / "state.json").read_text())
    assert (values["step"], values["about"]["seed"], values["about"]["stage"]) == (5, 7, "base")
    with pytest.raises(ValueError, match=r"seed was 7 and is 8"):
        run(transformer(), replace(CFG, steps=5, save_every=1), fp32(folder=tmp_path, seed=8))
    with pytest.raises(ValueError, match=r"config.learning_rate was 0.005 and is 0.1"):
        run(transformer(), replace(CFG, steps=5, learning_rate=0.1), fp32(folder=tmp_path, seed=7))
    run(transformer(), replace(CFG, steps=5, save_every=3, eval_every=9), fp32(folder=tmp_path, seed=7))


def test_told_to_stop_it_ends_the_step_and_saves(tmp_path):
    engine = fp32(folder=tmp_path)
    tokens, texts, _ = data()
    stage = train_transformer(transformer(), replace(CFG, steps=50), tokens, texts, engine=engine)
    next(stage)
    engine.signal = 15
    with pytest.raises(Stopped):
        next(stage)
    assert [p.name for p in (tmp_path / "base").iterdir()] == ["step-00000002"], "the step in progress is saved"


def test_a_state_does_not_share_memory_with_what_is_read_back(tmp_path):
    """In place: the optimizer keeps its own tensors, in the strides that it made them with."""
    module = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    config = replace(CFG, save_every=1)
    stage = Stage(fp32(folder=tmp_path), "s", config, {"model": module})
    stage.backward(module(torch.randn(2, 3, 8, 8)).square().sum())
    stage.finish(0)
    before = {k: v.clone() for k, v in stage.state().items()}
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    again = Stage(fp32(folder=tmp_path), "s", config, {"model": module})
    assert again.first == 1
    for key, value in again.state().items():
        assert value.equal(before[key]), f"{key} was not read back"
        assert value.stride() == before[key].stride(), f"{key} has other strides"


def test_a_training_that_diverges_stops(tmp_path):
    """Nothing that is not finite is saved. The error says where it happened and what to try."""
    hint = r"nothing of this step is saved\. Lower stages\.base\.learning_rate or raise its warmup"
    config = replace(CFG, steps=4, save_every=1, learning_rate=1e30)
    with pytest.raises(ValueError, match=rf"^base diverged at step \d: .* is (nan|inf); {hint}$"):
        run(transformer(), config, fp32(folder=tmp_path))
    for state in runs.states(tmp_path / "base"):
        assert all(x.isfinite().all() for x in runs.read_tensors(state).values())


@pytest.mark.parametrize(("loss", "what"), [(math.nan, "loss is nan"), (0.0, "the gradient norm of the model is nan")])
def test_the_last_good_state_stays(tmp_path, loss, what):
    """The third step has a loss or a gradient that is not a number: model and states stay as after the second."""
    net = torch.nn.Linear(2, 2)
    stage = Stage(fp32(folder=tmp_path), "s", replace(CFG, steps=9, save_every=1), {"model": net})
    for step in range(3):
        before = weights(net)
        for at, _ in stage.micro_batches(24, step):
            y = net(at.float()[:2]).square().mean()
            bad = 0 * torch.sqrt(y - y) if step == 2 else 0  # its gradient is 0 / 0
            stage.backward(y + bad, loss=y + (loss if step == 2 else 0))
        if step < 2:
            stage.finish(step)
    with pytest.raises(ValueError, match=f"s diverged at step 3: {what}"):
        stage.finish(2)
    assert runs.states(tmp_path / "s")[-1].name == "step-00000002"
    assert all(value.equal(before[name]) for name, value in weights(net).items()), "the bad step changed the weights"


def test_a_last_step_to_infinity_is_not_saved(tmp_path):
    net = torch.nn.Linear(2, 2)
    stage = Stage(fp32(folder=tmp_path), "s", replace(CFG, steps=1, learning_rate=3e38), {"model": net})
    stage.backward(net(torch.ones(2, 2)).square().sum())
    with pytest.raises(ValueError, match="s diverged at step 1: the weight norm of the model is inf"):
        stage.finish(0)
    assert not runs.states(tmp_path / "s")


# --- batches ----------------------------------------------------------------------------------------------------------


def test_shares_of_a_step_make_the_whole_batch():
    stage = Stage(fp32(accumulate=4), "s", CFG, {"model": torch.nn.Linear(2, 2)})
    shares = [at for at, _ in stage.micro_batches(24, 1)]
    assert [len(at) for at in shares] == [2] * 4, "equal shares"
    assert torch.cat(shares).equal(batch_indices(24, 8, 1, 0)), "in the order of the batch"


def test_metrics_are_summed_over_shares():
    net = torch.nn.Linear(2, 2)
    stage = Stage(fp32(accumulate=2), "s", CFG, {"model": net})
    for (at, _), value in zip(stage.micro_batches(24, 0), (1.0, 2.5), strict=True):
        stage.backward(net(at.float()[:2]).sum(), a=torch.tensor(value))
    assert stage.finish(0) == {"a": 3.5}


def test_an_engine_leaves_the_model_alone_that_it_is_not_given():
    model = transformer()
    other = copy.deepcopy(model)
    run(model, steps=1)
    assert all(a.equal(b) for a, b in zip(other.parameters(), transformer().parameters(), strict=True))


WATCHED = """
import json, sys
from minimuse.config import from_dict
from minimuse.train_engine import Engine
from minimuse.train import train_muse

engine = Engine(bf16=False, folder=sys.argv[1])
*_, last = train_muse(from_dict(json.load(open(sys.argv[1] + "/config.json"))), engine=engine)
assert engine.device.index is None, "moving to cpu:0 copies what is on cpu"
"""


@pytest.mark.slow
def test_two_processes_go_on_after_a_look(tiny_muse, tmp_path):
    """Sample grids are drawn in inference mode by the first process; its parameters must stay ordinary tensors."""
    stages = {name: replace(stage, steps=4, eval_every=2) for name, stage in tiny_muse.config.stages.items()}
    (tmp_path / "config.json").write_text(json.dumps(to_dict(replace(tiny_muse.config, stages=stages))))
    (tmp_path / "two.py").write_text(WATCHED)
    launch(tmp_path / "two.py", tmp_path)
    drawn = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert len(drawn) == 2 * len(stages), f"two looks a stage: {drawn}"


# --- embeddings that start from the codebook --------------------------------------------------------------------------


def test_random_features_are_as_alike_as_the_vectors_are_near():
    vectors = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    distance = torch.cdist(vectors, vectors)
    torch.manual_seed(0)
    features = random_features(vectors, 20_000)
    scale = 0.5 * distance[distance > 0].median()
    expected = (-distance.square() / (2 * scale**2)).exp()
    error = (features @ features.T / 20_000 - expected).abs().max().item()
    assert error < 0.06, f"products of random features are Gaussian in the distance, off by {error}"
    assert random_features(torch.zeros(3, 4), 8).isfinite().all(), "codes that all coincide have no median distance"


def test_like_codes_begin_alike():
    codebook = torch.randn(V, 3, generator=torch.Generator().manual_seed(1))
    codebook[1] = codebook[0]
    low_codebook = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    low_codebook[1] = low_codebook[0]
    model = superres()
    mask = model.embed.codes.weight[V].clone()
    init_from_codebook(model, codebook, low_codebook)
    for name, weight in [
        ("embedding", model.embed.codes.weight),
        ("low embedding", model.low_embed.codes.weight),
        ("head", model.head.weight),
    ]:
        assert torch.equal(weight[0], weight[1]), f"{name}: the same code twice begins as the same vector"
        assert not torch.allclose(weight[0], weight[2]), f"{name}: other codes begin as other vectors"
    assert torch.equal(model.embed.codes.weight[V], mask), "[MASK] is no code"
    assert not torch.equal(*model.low_embed.codes.weight[[0, 4]]), "nor is the low grid's"
    tokens, texts, low_tokens = data(2)
    logits = model(tokens, model.memory(pad_contexts([text[0] for text in texts]), low_tokens))
    assert logits.abs().max() < 2, "the first logits are as mild as before"


@pytest.mark.parametrize("device", ["nowhere", "meta", "cuda:-1", "0"])
def test_a_device_that_is_not_here_is_refused(device):
    with pytest.raises(ValueError, match=f"device '{device}' is not on this machine"):
        Engine(device=device)


@pytest.mark.parametrize("fast", [True, False])
def test_muon_multiplies_in_float32_where_bf16_is_slow(fast, monkeypatch):
    """An emulated bf16 product takes many times as long, and Muon makes dozens in a step."""
    monkeypatch.setattr("minimuse.utils.fast_bf16", lambda device: fast)
    seen, real = set(), torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda x, *args, **rest: (seen.add(x.dtype), real(x, *args, **rest))[1])
    run(transformer(), replace(CFG, optimizer="muon"), steps=1)
    assert seen == {torch.bfloat16 if fast else torch.float32}


def test_inside_no_bfloat16_the_original_stays():
    x = torch.ones(2)
    with NoBfloat16():
        y = x.bfloat16().mul_(2)
    assert y.dtype == torch.float32
    assert x.equal(torch.ones(2))
