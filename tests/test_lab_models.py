"""lab_models.py: a trained model in the lab. Oracles: real renders, `Muse.decode`, closed forms for Gaussians."""

import pytest
import torch

from minimuse import cli
from minimuse.baseline_dit import Diffusion
from minimuse.data_sources import SceneDataset
from minimuse.eval_metrics import frechet_distance, mean_interval, paired_difference
from minimuse.lab import compare
from minimuse.lab_models import ModelEvaluator, MuseEvaluator
from minimuse.lab_optimum import GROUPS, information_curve, optimal_counts, schedule_of
from minimuse.utils import area_downsample, to_float


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Gaussians(ModelEvaluator):
    """Images are their own features, from N(shift, I); real ones from N(0, I). The score is the first feature."""

    titles = {"first": "first feature", "frechet": "distance"}  # noqa: RUF012

    batch = 256

    def __init__(self, shift, seed):
        self.shift = shift
        real = torch.randn(20_000, 6, generator=seeded(1))
        super().__init__("Gaussians", [""] * 256, real[:256], lambda images, prompts: images[:, 0], lambda x: x, seed)
        self.real = real

    def draw(self, prompts, seeds, sampling):
        return torch.randn(len(prompts), 6, generator=seeded(2 + seeds[0])) + self.shift, len(prompts)


def test_the_distance_is_that_of_the_distributions():
    """N(0, I) and N(m, I) have the distance |m|^2. The intervals hold it; the plain distance is biased upwards."""
    hits, plain, mean, shift = 0, 0.0, 0.0, 0.2
    for seed in range(30):
        evaluator = Gaussians(shift, seed)
        outcome = evaluator()
        found = mean_interval(outcome.groups["frechet"])
        hits += found.low <= 6 * shift**2 <= found.high
        fake = evaluator.draw(evaluator.prompts, [1_000_003 * seed], {})[0]
        plain, mean = plain + frechet_distance(evaluator.real, fake) / 30, mean + found.value / 30
        score = mean_interval(outcome.groups["first"]).value
        assert score == pytest.approx(fake[:, 0].double().mean().item()), "the mean over all images"
    assert hits >= 25, f"{hits} of 30 intervals of 95% hold the truth"
    assert abs(mean - 6 * shift**2) < 0.5 * (plain - 6 * shift**2), f"{mean} and, without the jackknife, {plain}"


# --- a Muse -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluator(tiny_muse):
    return MuseEvaluator(tiny_muse, samples=64)


def test_right_images_score_and_wrong_ones_do_not(evaluator, monkeypatch):
    scenes = SceneDataset(64, 64, "test", 0, fractions=(1, 1, 0), k=1)
    captions = [scenes.captions(i)[0] for i in range(64)]

    def rendered(images, batch=64):
        monkeypatch.setattr(evaluator, "batch", batch)
        draw = lambda prompts, *_: (images[[captions.index(p) for p in prompts]], 3 * len(prompts))  # noqa: E731
        monkeypatch.setattr(evaluator, "draw", draw)
        outcome = evaluator()
        assert outcome.nfe == 3
        return outcome.groups

    real = scenes.images()
    truth, wrong = rendered(real), rendered(real.roll(1, 0))
    assert mean_interval(truth["accuracy"]).value >= 0.95
    assert mean_interval(wrong["accuracy"]).value <= 0.1, "an image of another prompt is wrong"
    noise = rendered(torch.rand(real.shape, generator=seeded()) * 2 - 1)
    assert mean_interval(noise["frechet"]).value > 1 + mean_interval(truth["frechet"]).value
    batches = rendered(real, batch=24)
    assert batches["accuracy"] == truth["accuracy"]
    assert batches["frechet"] == pytest.approx(truth["frechet"], abs=1e-4)
    assert 0 <= evaluator.about["real images"]["accuracy"] <= 1


def test_it_draws_what_the_base_model_of_muse_draws(evaluator, tiny_muse):
    prompts, seeds = evaluator.prompts[:3], [5, 6, 7]
    sampling = {"schedule": "linear", "order": "confidence", "steps": 3}
    images, nfe = evaluator.draw(prompts, seeds, sampling)
    jobs = [{"prompt": p, "negative_prompt": None, "seed": s} for p, s in zip(prompts, seeds, strict=True)]
    *_, last = (s for s in tiny_muse.decode(jobs, **sampling) if s.stage == "base")
    torch.testing.assert_close(images, tiny_muse.low_tokenizer.decode(last.tokens))
    assert nfe == 3 * 3


@pytest.mark.parametrize("seed", [-1, 2**32, True, "0"])
def test_the_seed_is_checked_before_any_work(seed, tiny_muse):
    with pytest.raises(ValueError, match="seed is"):
        compare(tiny_muse, seed=seed, samples=64)


def test_a_baseline_without_orders_is_refused(tiny_muse):
    """A diffusion model ignores schedules and orders, so its numbers would mean nothing."""
    config = Diffusion.configure(tiny_muse.config)
    with pytest.raises(ValueError, match="target is tiny-dit"):
        compare(Diffusion(config, Diffusion.build(config), tiny_muse.encoder), samples=64)


def test_too_few_images_for_the_distance_are_said(tiny_muse):
    with pytest.warns(UserWarning, match="Frechet distance of 64 images"):
        MuseEvaluator(tiny_muse, samples=64)


def test_settings_and_seeds_of_each_sampler(evaluator, tiny_muse, monkeypatch):
    """What a sampler does not set comes from the checkpoint; image i has the same seed for each sampler."""
    seen = []

    def decode(logits_fn, tokens, **settings):
        seen.append(settings)
        raise StopIteration

    monkeypatch.setattr("minimuse.muse.decode", decode)
    monkeypatch.setattr(evaluator, "batch", 32)
    for preset, order in ((None, "confidence"), (None, "halton"), ("muse", None), ("maskgit", None)):
        where = ([], [], [2]) if preset else (["cosine"], [order], [2])
        with pytest.raises((RuntimeError, StopIteration)):
            compare(evaluator, *where, presets=[preset] if preset else [])
    defaults = tiny_muse.config.base_sampling
    noise = [s["choice_temperature"] for s in seen]
    assert noise == [defaults.choice_temperature, 0.0, 0.0, 4.5], "the noise of its own order; a preset sets its own"
    assert [s["sampling_temperature"] for s in seen] == [defaults.sampling_temperature] * 2 + [1.0] * 2
    assert {s["generator"][1].initial_seed() for s in seen} == {1}


def test_the_curve_and_the_optimum_of_a_muse(evaluator, tiny_muse):
    """h_0 is the cross-entropy where all is masked, by hand; the optimal schedule is that of the curve."""
    size, low = tiny_muse.config.high_tokenizer.image_size, tiny_muse.config.low_tokenizer.image_size
    scenes = SceneDataset(64, size, "test", 0, fractions=(1, 1, 0), k=1)
    images = to_float(area_downsample(scenes.images(), size // low))
    n, v = tiny_muse.base.config.tokens, tiny_muse.base.config.codebook_size
    with torch.inference_mode():
        tokens = tiny_muse.low_tokenizer.encode(images)
        text, _ = tiny_muse.contexts([{"prompt": p, "negative_prompt": None} for p in evaluator.prompts])
        logits = tiny_muse.base(torch.full_like(tokens, tiny_muse.base.mask_id), tiny_muse.base.memory(text))
    expected = torch.nn.functional.cross_entropy(logits.reshape(-1, v), tokens.flatten()).item()
    assert evaluator.curves.shape == (GROUPS, n)
    assert evaluator.curves.mean(0)[0].item() == pytest.approx(expected, abs=1e-4)
    wanted = schedule_of(optimal_counts(information_curve(evaluator.curves), 3))
    a, b = compare(evaluator, {"optimal": "optimal", "mine": wanted}, ["random"], [3]).cells
    assert a.groups == b.groups


@pytest.mark.slow
def test_compare_of_a_muse(tiny_muse, tmp_path):
    schedules = {"cosine": "cosine", "mine": lambda u: 1 - u**3}
    report = compare(tiny_muse, schedules, ["halton", "random"], [1, 2], samples=64, out=tmp_path / "out")
    assert len(report.cells) == 8
    one, other = (report[name, "halton", 1].groups["accuracy"] for name in ("cosine", "mine"))
    assert paired_difference(one, other)[:3] == (0, 0, 0), "with one step all schedules are the same, and so are seeds"
    paired = report.table(("cosine", "halton")).splitlines()
    assert len(paired) == 2 + 8 - 2
    assert "0.0000 ± 0.0000" in next(line for line in paired if "mine" in line and "halton | 1 " in line)
    assert report.about["target"] == "tiny, base model"
    assert {"samples", "seed", "real images", "sampling"} <= set(report.about)
    assert (tmp_path / "out" / "frechet.png").is_file()
    with pytest.raises(ValueError, match="multiple of 32"):
        MuseEvaluator(tiny_muse, 80)


def test_the_command(tiny_muse, tmp_path, capsys):
    folder = tiny_muse.save_pretrained(tmp_path / "tiny")
    words = f"compare --muse {folder} --order halton --steps 1 --samples 64 --out {tmp_path / 'out'}"
    assert cli.main(words.split()) == 0
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "out" / "accuracy.png").is_file()
    assert cli.main("compare --amused here".split()) == 2
    assert "--data" in capsys.readouterr().err
