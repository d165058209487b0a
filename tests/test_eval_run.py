"""eval_run.py, kinds.py, studio.py: the truth scores near 100%, chance scores like chance; resumed means the same."""

import json
from functools import cache
from random import Random

import pytest
import torch
from PIL import Image
from test_eval_prompts import perfect

from minimuse import cli
from minimuse.data_images import area_downsample, to_pil, to_uint8
from minimuse.data_scenes import MATERIALS, SIZES, Scene, relations, render
from minimuse.eval_metrics import Estimate
from minimuse.eval_prompts import _look, matches, parse_prompt, place_things, prompt_set
from minimuse.eval_run import ITERATIONS, KINDS, SWEEP, Judge, Studio, avoidance, evaluate, regions, table

ABOUT, SEED = {"checkpoint": "oracle"}, 1000
asked_of = cache(prompt_set)


def scene_of(prompt: str, seed: int, avoid: str = "") -> Scene:
    """A scene that has what the prompt names; what it does not name is drawn."""
    wants, rng = parse_prompt(prompt), Random(f"oracle/{seed}")
    while True:
        looks = []
        for group in wants.groups:
            named = group.looks
            extra = tuple(
                named.get(k) or next((w for w in words if avoid in words and w != avoid), "")
                for k, words in (("size", SIZES), ("material", MATERIALS))
            )
            looks += [_look((named["color"], named["shape"]), extra, rng)] * group.number
        things = place_things(rng, looks)
        if things and (not wants.relation or wants.relation in relations(*things)):
            return Scene(things)


class Oracle:
    """Draws what is asked for; is interrupted where it would draw for the `stop`-th time."""

    base_only, side, factor = False, 64, 1

    def __init__(self, n: int, before: object = None, stop: int = -1):
        self.n, self.before, self.left = n, before, stop

    def images(self, scenes):
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return to_uint8(render(list(scenes), self.side))

    real = images

    def draw(self, prompts, seeds, negatives=(), **sampling):
        negatives = negatives or prompts
        words = [[w for w in b.split() if w not in a.split()] for a, b in zip(prompts, negatives, strict=True)]
        return self.images([scene_of(p, s, *w) for p, s, w in zip(prompts, seeds, words, strict=True)])

    def after(self, name, seeds):
        return self.images([asked_of(name, self.n)[seed - SEED].scene for seed in seeds])

    def cascade(self, prompts, seeds):
        return (self.after("mixed", seeds),) * 3

    def inpaint(self, images, repaint, prompts, seeds):
        outpainting = repaint[:, :, self.side // 2 :].all() and not repaint[:, :, : self.side // 2].any()
        return self.after("outpaint" if outpainting else "inpaint", seeds)

    def edit(self, images, prompts, seeds):
        return [self.after("edit", seeds)] * (len(ITERATIONS) + 1)

    def reconstruct(self, images):
        return images, images

    def decoders(self, images):
        return images // 2, images


class Shuffled(Oracle):
    """It draws well, but what another prompt asks for."""

    def draw(self, prompts, seeds, negatives=(), **sampling):
        return self.images([self.other(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)])

    def other(self, prompt, seed):
        asked = next(a for k in ("seen", "counts") if (a := asked_of(k, self.n))[seed - SEED].prompt == prompt)
        return asked[Random(0).sample(range(self.n), self.n)[seed - SEED]].scene


class Plain:
    """In place of the scorer where it is not what is tested: brightness, whatever the prompt."""

    def __call__(self, images, prompts):
        return images.float().mean((1, 2, 3)) / 255

    def levels(self, images):
        return [images]


@pytest.fixture(scope="module")
def judge():
    return Judge(scorer=Plain())


def run(studio, out, judge, kinds, n=40, **how):
    return evaluate(studio, out, ABOUT, kinds=kinds, n=n, judge=judge, **{"batch": 20} | how)["kinds"]


# --- what scores what -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_truth_scores_near_100_percent_on_every_kind(tmp_path, judge):
    found = run(Oracle(20, before="yes"), tmp_path, judge, [], n=20)
    assert list(found) == list(KINDS), "all kinds, in order"
    for name, figures in found.items():
        value, low, high, n, _ = figures["right"]
        assert value >= 0.95, f"{name}: {value:.1%} right"
        assert 0 <= low <= value <= high <= 1
        assert n == 20
    for figures in (found["edit"], found["inpaint"], found["outpaint"]):
        assert figures.get("changed outside", [0])[0] == 0
    assert found["edit"]["colour, final"][0] >= 0.95
    assert found["edit"]["rest, 10"][0] >= 0.95
    assert found["superres"]["right, gain over no text"][0] == 0
    assert found["tokenizers"]["psnr"][0] == 100
    assert found["decoder"]["psnr, gain"][1] > 50, "half as bright before"
    assert found["decoder"]["frechet"][0] < 1e-6 < found["decoder"]["frechet, before"][0]
    assert found["seen"]["frechet"][0] < 2 < found["decoder"]["frechet, before"][0]


def test_an_obeyed_negative_prompt_is_seen(tmp_path, judge):
    found = run(Oracle(80), tmp_path, judge, ["negative"], n=80)["negative"]
    assert found["with"][0] <= 0.05
    assert 0.3 <= found["without"][0] <= 0.7, "sizes and materials are drawn evenly"


def test_words_that_unguided_pictures_seldom_show_do_not_count():
    words = ["small", "metal"] * 4
    rows = [{"word": w, "group": str(i), "right": True, "unguided": w == "metal"} for i, w in enumerate(words)]
    rows = [row | {"without": row["unguided"], "with": False} for row in rows]
    found = avoidance(rows, {})
    assert found["without"] == found["metal, without"]
    assert found["with"].n == 4


@pytest.mark.parametrize("name", ["seen", "counts"])
def test_shuffled_prompts_score_like_chance(tmp_path, judge, name):
    """Chance, exactly: how many of the scenes drawn happen to have what their own prompt asks for."""
    n = 60
    studio = Shuffled(n)
    asked = prompt_set(name, n)
    lucky = [
        matches(perfect(studio.other(ask.prompt, SEED + i)), parse_prompt(ask.prompt)).right
        for i, ask in enumerate(asked)
    ]
    chance = sum(lucky) / n
    assert chance <= 0.1, "of 21 pairs of colour and shape"
    found = run(studio, tmp_path, judge, [name], n=n)[name]
    assert found["right"][0] == pytest.approx(chance, abs=0.02)
    assert found["right, real"][0] >= 0.97


def test_an_untrained_model_scores_nothing(tmp_path, judge, tiny_muse):
    found = run(Studio(tiny_muse), tmp_path, judge, ["seen", "relations"], n=10)
    for name in ("seen", "relations"):
        assert found[name]["right"][0] <= 0.1
        assert found[name]["right, real"][0] >= 0.9
        assert found[name]["frechet"][0] > 5, "far from real renders"


# --- the folder -------------------------------------------------------------------------------------------------------


def test_resumed_after_any_interruption_the_figures_are_the_same(tmp_path, judge):
    how = {"kinds": ["seen", "edit"], "n": 12, "batch": 6}
    run(Oracle(12), tmp_path / "whole", judge, **how)
    whole = (tmp_path / "whole/eval.json").read_bytes()
    stops = 0
    for stop in range(100):
        out = tmp_path / str(stop)
        try:
            run(Oracle(12, stop=stop), out, judge, **how)
            break
        except KeyboardInterrupt:
            stops += 1
        run(Oracle(12), out, judge, **how)
        for name in ("eval.json", "eval.md", "kinds/seen.json", "kinds/edit.json", "kinds/edit.png"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), f"{name}, stopped at {stop}"
        assert not any((out / "parts").iterdir())
    assert stops >= 6
    assert (out / "eval.json").read_bytes() == whole, "and the same seed gives the same figures"


def test_a_done_kind_is_not_drawn_again_and_others_join(tmp_path, judge):
    how = {"n": 10, "batch": 10}
    run(Oracle(10), tmp_path, judge, ["tokenizers"], **how)
    run(Oracle(10, stop=0), tmp_path, judge, ["tokenizers"], **how)
    run(Oracle(10), tmp_path, judge, ["edit"], **how)
    assert list(json.loads((tmp_path / "eval.json").read_text())["kinds"]) == ["edit", "tokenizers"]


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path, judge):
    run(Oracle(10), tmp_path, judge, ["tokenizers"], n=10)
    before = (tmp_path / "eval.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"another evaluation: n was 10 and is 12; seed was 1000 and is 7\. Put it back"
    ):
        run(Oracle(12), tmp_path, judge, ["tokenizers"], n=12, seed=7)
    with pytest.raises(ValueError, match="checkpoint was 'oracle' and is 'nano'"):
        evaluate(Oracle(10), tmp_path, {"checkpoint": "nano"}, n=10, judge=judge, batch=20)
    assert (tmp_path / "eval.json").read_bytes() == before
    (tmp_path / "settings.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds eval\.json, .* but no settings\.json"):
        run(Oracle(10), tmp_path, judge, ["tokenizers"], n=10)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"kinds": ["sene"]}, "unknown kind 'sene'; known: seen"),
        ({"kinds": ["decoder"]}, "needs the decoder before fine-tuning: give --run"),
        ({"n": 4}, "at least 10 pictures"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(tmp_path, judge, how, says):
    with pytest.raises(ValueError, match=says):
        run(Oracle(10), tmp_path / "new", judge, **{"kinds": []} | how)
    assert not (tmp_path / "new").exists()


def test_the_base_model_alone_has_no_edits(tmp_path, judge, tiny_muse):
    studio = Studio(tiny_muse, base_only=True)
    with pytest.raises(ValueError, match="leave out --base-only"):
        run(studio, tmp_path, judge, ["edit"])
    assert studio.draw(["a red cube"], [0]).shape == (1, 3, 32, 32)
    assert studio.real([prompt_set("seen", 1)[0].scene]).shape == (1, 3, 32, 32)


def test_the_page_marks_what_is_wrong_and_the_table_has_intervals(tmp_path, judge):
    run(Oracle(10), tmp_path, judge, ["seen"], n=10)
    assert Image.open(tmp_path / "kinds/seen.png").width > 500
    text = (tmp_path / "eval.md").read_text()
    assert "| one object, seen combinations | 10 | 100.0% (" in text
    assert "| seen | diversity, real |" in text
    assert str(Estimate(0.5, 0.25, 0.75, 8, ".1%")) == "50.0% (25.0 to 75.0, n = 8)"
    line = table({"counts": {"right": Estimate(0.5, 0.25, 0.75, 8, ".1%")}}).splitlines()[2]
    assert line == "| two or three alike | 8 | 50.0% (25.0 to 75.0) |  |  |  |  |"


def test_a_sweep_is_one_call_and_two_plots(tmp_path, judge, monkeypatch):
    small = {line: dict(list(points.items())[:2]) for line, points in SWEEP.items() if line in ("guidance", "order")}
    monkeypatch.setattr("minimuse.eval_run.SWEEP", small)
    seen = []

    class Watched(Oracle):
        base_only = True

        def draw(self, prompts, seeds, negatives=(), **sampling):
            seen.append(sampling)
            return super().draw(prompts, seeds)

    found = evaluate(Watched(10), tmp_path, ABOUT, n=10, sweep=True, judge=judge)["kinds"]
    assert list(found) == ["guidance 0", "guidance 1", "order confidence", "order random"]
    assert seen == [{"guidance": 0.0}, {"guidance": 1.0}, {"order": "confidence"}, {"order": "random"}]
    for name in ("sweep-score.png", "sweep-right.png"):
        assert Image.open(tmp_path / name).width > 2 * 900, "two plots of 900 x 600, beside each other"


def test_a_sweep_pairs_rising_guidance_with_constant_of_the_same_mean(tmp_path, judge, monkeypatch):
    """Muse 2.7 says that rising guidance is better; whether it is here needs pairs, not two intervals side by side."""
    small = {"guidance": {"1": {"guidance": 1.0}}, "rising guidance": {"0-2": {"guidance": (0.0, 2.0)}}}
    monkeypatch.setattr("minimuse.eval_run.SWEEP", small)

    class Rises(Oracle):
        base_only = True

        def draw(self, prompts, seeds, negatives=(), guidance=0.0):
            right = super().draw(prompts, seeds)
            return right if isinstance(guidance, tuple) else torch.full_like(right, 128)  # constant: an empty floor

    found = evaluate(Rises(40), tmp_path, ABOUT, n=40, sweep=True, judge=judge)["kinds"]
    gap = Estimate(*found["rising guidance 0-2"]["right, less guidance 1"])
    right = [Estimate(*found[name]["right"]).value for name in ("rising guidance 0-2", "guidance 1")]
    assert right[1] == 0.0, "nothing is on an empty floor"
    assert gap.value == pytest.approx(right[0]), "all pairs differ where the rising one is right"
    assert gap.low > 0, "and the interval says so"
    again = evaluate(Rises(40), tmp_path, ABOUT, n=40, sweep=True, judge=judge)["kinds"]
    assert again == found, "a finished sweep tells the same from its files"
    assert "| rising guidance 0-2 | right, less guidance 1 | +" in (tmp_path / "eval.md").read_text()


# --- the studio does what a user would --------------------------------------------------------------------------------


def same(images, pictures):
    assert [p.tobytes() for p in to_pil(images)] == [p.tobytes() for p in pictures]


def test_the_studio_draws_what_generate_draws(tiny_muse):
    prompts, seeds = ["a red cube", "a blue sphere"], [5, 9]
    studio = Studio(tiny_muse)
    same(studio.draw(prompts, seeds), tiny_muse.generate(prompts, seed=seeds))
    same(studio.draw(prompts, seeds, ["a cube", "a sphere"], steps=3),
         tiny_muse.generate(prompts, seed=seeds, negative_prompt=["a cube", "a sphere"], steps=3))  # fmt: skip
    low, high, bare = studio.cascade(prompts, seeds)
    same(high, tiny_muse.generate(prompts, seed=seeds))
    assert low.shape[-1] == 32
    assert Studio(tiny_muse, base_only=True).draw(prompts, seeds).equal(low)
    assert not bare.equal(high)


def test_super_resolution_without_text_does_not_read_it(tiny_muse):
    studio, how = Studio(tiny_muse), {"superres": {"guidance": -1.0, "choice_temperature": 0.0}}
    low = torch.randint(16, (1, 64))
    jobs = [studio._jobs([prompt], [3]) for prompt in ("a red cube", "two blue spheres")]
    a, b = (studio._tokens(job, "superres", low=low, **how) for job in jobs)
    assert (a == b).float().mean() > 0.98, "but for rounding"


def test_the_studio_edits_as_muse_edits(tiny_muse):
    ask = prompt_set("inpaint", 2)[1]
    image = to_uint8(render([ask.before], 64))
    (picture,), region = to_pil(image), regions([ask], 64)
    studio = Studio(tiny_muse)
    same(
        studio.inpaint(image, region, [ask.prompt], [4]),
        tiny_muse.inpaint(picture, region[0], ask.prompt, seed=4, keep=False),
    )
    made = studio.edit(image, [ask.prompt], [4])
    same(made[-1], tiny_muse.edit(picture, ask.prompt, seed=4))
    assert [x.shape[-1] for x in made] == [32, 32, 32, 64]
    both = studio.edit(image.repeat(2, 1, 1, 1), ["a red cube", ask.prompt], [0, 4])
    same(both[-1][1:], tiny_muse.edit(picture, ask.prompt, seed=4))


def test_the_studio_outpaints_as_muse_outpaints(tiny_muse, judge):
    (ask,) = prompt_set("outpaint", 1)
    batch = KINDS["outpaint"].measure(Studio(tiny_muse), judge, [ask], [7])
    (wide,) = tiny_muse.outpaint(to_pil(to_uint8(render([ask.before], 64)))[0], (0, 0, 32, 0), ask.prompt, seed=7)
    same(batch.tensors["images"], [wide])


def test_reconstructions_are_the_tokenizers_own(tiny_muse):
    images = to_uint8(render([ask.scene for ask in prompt_set("seen", 2)], 64))
    high, low = Studio(tiny_muse).reconstruct(images)
    with torch.no_grad():
        net, x = tiny_muse.low_tokenizer, area_downsample(images.float() / 127.5 - 1)
        assert low.equal(to_uint8(net.decode(net.encode(x))))
    assert high.shape == images.shape


def test_regions_are_where_they_say():
    ask = prompt_set("seen", 1)[0]._replace(region=(0.5, 0.0, 1.0, 0.25))
    (region,) = regions([ask], 8)
    assert region[:2, 4:].all()
    assert region.sum() == 8


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_measures_a_run(tmp_path, tiny_run, monkeypatch, capsys):
    monkeypatch.setattr("minimuse.eval_run.SceneClip.from_pretrained", lambda: Plain())
    words = ["eval", str(tiny_run), "--out", str(tmp_path / "out"), "--n", "10", "--device", "cpu", "--kinds"]
    assert cli.main([*words, "seen,decoder"]) == 0
    assert "| decoder | psnr, gain |" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/eval.json").read_text())
    assert report["settings"]["checkpoint"] == "tiny"
    assert set(report["settings"]) >= {
        "minimuse",
        "torch",
        "weights of checkpoint",
        "config",
        "seed",
        "n",
        "batch",
        "device",
    }
    assert cli.main([*words, "seen", "--seed", "3"]) == 1
    assert "seed was 1000 and is 3" in capsys.readouterr().err
