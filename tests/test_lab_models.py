"""lab_models.py: a trained model in the lab. Oracles: real renders, Muse's own decode, closed forms of Gaussians."""

from dataclasses import replace

import pytest
import torch

from minimuse import cli, lab
from minimuse import lab_models as picture_judge
from minimuse.data_sources import SceneDataset
from minimuse.eval_detector import Detector
from minimuse.eval_metrics import frechet_distance
from minimuse.judge import GROUPS, estimate
from minimuse.lab import compare, difference
from minimuse.lab_models import MuseJudge, PictureJudge, jackknife, right
from minimuse.muse import Muse


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the intervals ----------------------------------------------------------------------------------------------------


def test_the_jackknife_of_a_mean_is_its_groups():
    rows = torch.randn(96, 1, generator=seeded())
    pseudo = jackknife(lambda x: x.double().mean().item(), rows)
    assert pseudo == pytest.approx(rows.double().view(GROUPS, -1).mean(1).tolist())


def test_the_jackknifed_distance_is_that_of_the_distributions():
    """N(0, I) and N(m, I) are |m|^2 apart: intervals hold it, where the plain distance is biased upwards."""
    hits, plain, mean, d, shift = 0, 0.0, 0.0, 6, 0.2
    real = torch.randn(20_000, d, generator=seeded(1))
    for seed in range(30):
        fake = torch.randn(256, d, generator=seeded(2 + seed)) + shift
        found = estimate(jackknife(lambda x: frechet_distance(real, x), fake))
        hits += abs(found.mean - d * shift**2) <= found.half
        plain, mean = plain + frechet_distance(real, fake) / 30, mean + found.mean / 30
    assert hits >= 25, f"{hits} of 30 intervals of 95% hold the truth"
    assert abs(mean - d * shift**2) < 0.5 * (plain - d * shift**2), f"{mean} and, without it, {plain}"


# --- a judge whose pictures are known ---------------------------------------------------------------------------------


class Renders(PictureJudge):
    """Draws the scene that was asked for, or that of another prompt."""

    titles = {"accuracy": "accuracy", "frechet": "distance"}  # noqa: RUF012

    def __init__(self, shift, batch=64):
        scenes = SceneDataset(64, 64, "test", 0, fractions=(1, 1, 0), k=1)
        self.images, detector = scenes.images().roll(shift, 0), Detector.from_pretrained()
        prompts = [scenes.captions(i)[0] for i in range(64)]
        super().__init__(prompts, scenes.images(), right(detector), detector.features, 0, batch)

    def draw(self, prompts, sampling, draws):
        assert len(draws) == len(prompts)
        return self.images[[self.prompts.index(p) for p in prompts]], 3 * len(prompts)


def test_right_pictures_score_and_wrong_ones_do_not():
    truth, wrong = Renders(0)(), Renders(1)()
    assert truth.passes == 3
    accuracy = [estimate(o.groups["accuracy"]).mean for o in (truth, wrong)]
    assert accuracy[0] >= 0.95
    assert accuracy[1] <= 0.1, "the picture of another prompt is wrong"
    assert Renders(0).about["real pictures"]["accuracy"] == pytest.approx(accuracy[0]), "what real pictures reach"
    for outcome in (truth, wrong):  # the same set of pictures; below 0 by the bias that n < D leaves
        assert estimate(outcome.groups["frechet"]).mean < 0.05
    noise = Renders(0)
    noise.images = torch.rand(noise.images.shape, generator=seeded()) * 2 - 1
    assert estimate(noise().groups["frechet"]).mean > 1, "noise is far from renders"


def test_batches_do_not_matter():
    some, all_ = Renders(1, batch=24)(), Renders(1)()
    assert some.groups["accuracy"] == all_.groups["accuracy"]
    assert some.groups["frechet"] == pytest.approx(all_.groups["frechet"], abs=1e-4)


# --- a Muse -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tiny_muse):
    return MuseJudge(tiny_muse, samples=64)


def test_it_draws_what_the_base_model_of_muse_draws(judge, tiny_muse):
    prompts = judge.prompts[:3]
    sampling = {"schedule": "linear", "order": "confidence", "steps": 3}
    draws = [seeded(s) for s in (5, 6, 7)]
    images, passes = judge.draw(prompts, sampling, draws)
    jobs = [{"prompt": p, "negative_prompt": None, "seed": s} for p, s in zip(prompts, (5, 6, 7), strict=True)]
    *_, last = (s for s in tiny_muse.decode(jobs, **sampling) if s.stage == "base")
    torch.testing.assert_close(images, tiny_muse.low_tokenizer.decode(last.tokens))
    assert passes == 3 * 3


def test_what_a_sampler_does_not_say_is_the_checkpoints(judge, monkeypatch):
    seen = []

    def spy(logits_fn, start, mask_id, **sampling):
        seen.append(sampling)
        return torch.zeros_like(start), 1

    monkeypatch.setattr(picture_judge, "drawn", spy)
    monkeypatch.setattr(picture_judge, "jackknife", lambda statistic, rows: [0.0] * GROUPS)
    compare(judge, ["cosine"], ["confidence", "halton"], [2], presets=["muse", "maskgit"])
    defaults = judge.muse.config.base_sampling
    noise = [s["choice_temperature"] for s in seen]
    assert noise == [defaults.choice_temperature, 0.0, 0.0, 4.5], "its own order's noise; a preset says its own"
    assert [s["sampling_temperature"] for s in seen] == [defaults.sampling_temperature] * 2 + [1.0] * 2
    assert len({id(s["generator"][0]) for s in seen}) == 4
    assert len({s["generator"][0].initial_seed() for s in seen}) == 1, "picture i has the same seed in every cell"


def test_compare_of_a_muse(judge, tiny_muse, tmp_path, monkeypatch):
    """All that a world's report does: kept cells, paired differences, tables, plots, files."""
    schedules, grid = {"cosine": "cosine", "mine": lambda u: 1 - u**3}, (["halton", "random"], [1, 2])
    report = compare(tiny_muse, schedules, *grid, samples=64, out=tmp_path)
    assert len(report.cells) == 8
    same = difference(report["cosine", "halton", 1], report["mine", "halton", 1], "accuracy")
    assert same == (0, 0), "in one step all schedules are one: paired by seed nothing is left"
    paired = report.table(("cosine", "halton")).splitlines()
    assert len(paired) == 2 + 8 - 2
    assert "0.0000 ± 0.0000" in next(line for line in paired if "mine" in line and "halton | 1 " in line)
    assert report.about["target"] == "tiny, base model alone"
    assert {"pictures", "prompts", "weights", "seed"} <= set(report.about)
    report.save(tmp_path / "report")
    assert (tmp_path / "report" / "frechet.pdf").is_file()
    monkeypatch.setattr(MuseJudge, "draw", lambda *a: pytest.fail("a finished cell was drawn again"))
    again = compare(tiny_muse, schedules, *grid, samples=64, out=tmp_path)
    assert again.cells == report.cells


def test_identity_is_all_that_the_figures_depend_on(judge, tiny_muse):
    assert MuseJudge(tiny_muse, 64).identity() == judge.identity()
    assert MuseJudge(tiny_muse, 64, seed=1).identity() != judge.identity()
    sharper = replace(tiny_muse.config.base_sampling, sampling_temperature=0.1)
    other = Muse(replace(tiny_muse.config, base_sampling=sharper), tiny_muse.parts, tiny_muse.encoder)
    assert MuseJudge(other, 64).identity()["weights"] != judge.identity()["weights"]
    with pytest.raises(ValueError, match="multiple of 32"):
        MuseJudge(tiny_muse, 80)


def test_the_command(tiny_muse, tmp_path, capsys):
    folder = tiny_muse.save_pretrained(tmp_path / "tiny")
    words = f"compare --muse {folder} --order halton --steps 1 --samples 64 --out {tmp_path / 'out'}"
    assert cli.main(words.split()) == 0
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "out" / "accuracy.png").is_file()
    assert cli.main("compare --amused here".split()) == 1
    assert "--data" in capsys.readouterr().err


def test_the_axis_of_a_share_is_no_powers_of_ten():
    cells = [lab.Cell("cosine", "random", t, t, {"accuracy": [0.3 + t / 20] * GROUPS}, False) for t in (2, 8)]
    report = lab.Report(cells, {"accuracy": "share"}, {"target": "fake"})
    assert report.plot().get_yscale() == "linear"
