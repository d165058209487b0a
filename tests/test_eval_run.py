"""eval_run.py: the truth scores near 100%, chance like chance; an EvalModel draws what Muse draws; reports continue."""

import itertools
import json
import math
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_eval_prompts import perfect

from minimuse import cli
from minimuse.data_scenes import MATERIALS, SIZES, Scene, place_things, relations, render
from minimuse.editing import tokenize
from minimuse.eval_metrics import Estimate, frechet_interval, outline_features
from minimuse.eval_prompts import matches, parse_prompt, prompt_set
from minimuse.eval_run import ITERATIONS, SWEEP, TASKS, EvalModel, Evaluator, evaluate, table
from minimuse.muse import Muse
from minimuse.utils import area_downsample, to_float, to_pil, to_uint8


def scene_of(prompt: str, seed: int, avoid: str = "") -> Scene:
    """A scene that fits the prompt. What the prompt does not name is random, but never `avoid`."""
    spec, rng = parse_prompt(prompt), Random(f"oracle/{seed}")
    while True:
        looks = []
        for group in spec.groups:
            named = group.attributes
            extra = [
                named.get(field) or rng.choice([word for word in words if word != avoid])
                for field, words in (("size", SIZES), ("material", MATERIALS))
            ]
            looks += [(named["color"], named["shape"], *extra)] * group.number
        things = place_things(rng, looks)
        if things and (not spec.relation or spec.relation in relations(*things)):
            return Scene(things)


class Oracle(EvalModel):
    """Draws what is asked for. With `stop`, it is interrupted when it draws for the `stop`-th time."""

    def __init__(self, before: object = None, stop: int = -1, base_only: bool = False):
        self.before, self.left, self.base_only, self.side = before, stop, base_only, 64

    def real(self, scenes):
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return to_uint8(render(list(scenes), self.side))

    def draw(self, prompts, seeds, negatives=(), **sampling):
        negatives = negatives or prompts
        words = [[w for w in b.split() if w not in a.split()] for a, b in zip(prompts, negatives, strict=True)]
        return self.real([scene_of(p, s, *w) for p, s, w in zip(prompts, seeds, words, strict=True)])

    def variants(*names):
        return lambda self, asked, seeds: dict.fromkeys((*names, ""), self.real(ask.scene for ask in asked))

    edit, superres, tokenizers = variants(*map(str, ITERATIONS)), variants("bicubic", "no text"), variants("low")
    inpaint = outpaint = variants()

    def decoder(self, asked, seeds):
        images = self.real(ask.scene for ask in asked)
        return {"before": images // 2, "": images}


class Shuffled(Oracle):
    """It draws well, but what another prompt asks for."""

    def prompts(self, asked, seeds, **sampling):
        return {"": self.real(self.others(asked))}

    def others(self, asked):
        return [ask.scene for ask in Random(0).sample(asked, len(asked))]


class Brightness:
    """In place of SceneClip where the score is not what is tested."""

    def __call__(self, images, prompts):
        return images.float().mean((1, 2, 3)) / 255


@pytest.fixture(scope="module")
def evaluator():
    return Evaluator(clip=Brightness())


def run(model, out, evaluator, tasks, n=40, **options):
    """Tasks -> their metrics."""
    found = evaluate(model, out, {}, tasks=tasks, n=n, evaluator=evaluator, **{"batch": 20} | options)["tasks"]
    return {name: {key: Estimate(*value) for key, value in metrics.items()} for name, metrics in found.items()}


# --- what scores what -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_truth_scores_near_100_percent_in_every_task(tmp_path, evaluator):
    found = run(Oracle(before="yes"), tmp_path, evaluator, [], n=12)
    assert list(found) == list(TASKS), "all tasks, in order"
    for name, metrics in found.items():
        value, low, high, n, _ = metrics["right"]
        assert value >= 0.9, f"{name}: {value:.1%} right"
        assert 0 <= low <= value <= high <= 1
        assert n == 12
    assert found["edit"]["right, 10"].value >= 0.9
    assert found["superres"]["right, no text"].value == found["superres"]["right"].value
    assert found["tokenizers"]["psnr"].value == 100
    assert found["tokenizers"]["gmsd, low"].value == found["tokenizers"]["perceptual"].value == 0
    assert found["decoder"]["psnr, before"].high < 50, "half as bright before"
    assert found["decoder"]["psnr, less before"].low > 50
    assert found["decoder"]["frechet"].value < 1e-6 < found["decoder"]["frechet, before"].value
    assert found["seen"]["frechet"].value < 2 < found["decoder"]["frechet, before"].value


def test_an_obeyed_negative_prompt_is_seen(tmp_path, evaluator):
    found = run(Oracle(), tmp_path, evaluator, ["negative"])["negative"]
    assert found["word shown"].value <= 0.05
    assert 0.3 <= found["word shown, without"].value <= 0.7, "sizes and materials are drawn evenly"


@pytest.mark.parametrize("name", ["seen", "counts"])
def test_shuffled_prompts_score_like_chance(tmp_path, evaluator, name):
    """Chance is known exactly: how many of the drawn scenes happen to fit their own prompt."""
    model, asked = Shuffled(), prompt_set(name, 40)
    pairs = zip(model.others(asked), asked, strict=True)
    lucky = [matches(perfect(scene), parse_prompt(ask.prompt)).right for scene, ask in pairs]
    chance = sum(lucky) / 40
    assert chance <= 0.1, "of 21 pairs of color and shape"
    found = run(model, tmp_path, evaluator, [name], batch=40)[name]
    assert found["right"].value == pytest.approx(chance, abs=0.03)
    assert found["right, real"].value >= 0.97


def test_an_untrained_model_scores_nothing(tmp_path, evaluator, tiny_muse):
    for name, metrics in run(EvalModel(tiny_muse), tmp_path, evaluator, ["seen", "relations"], n=10).items():
        assert metrics["right"].value <= 0.1, name
        assert metrics["frechet"].low > 5, "far from real renders"


# --- an EvalModel does what a user would do ---------------------------------------------------------------------------


def same(images, pictures):
    assert [p.tobytes() for p in to_pil(images)] == [p.tobytes() for p in pictures]


def test_it_draws_what_generate_draws(tiny_muse):
    prompts, seeds = ["a red cube", "a blue sphere"], [5, 9]
    model = EvalModel(tiny_muse)
    same(model.draw(prompts, seeds), tiny_muse.generate(prompts, seed=seeds))
    same(model.draw(prompts, seeds, ["a cube", "a sphere"], steps=3),
         tiny_muse.generate(prompts, seed=seeds, negative_prompt=["a cube", "a sphere"], steps=3))  # fmt: skip


def test_super_resolution_is_that_of_generate_with_and_without_text(tiny_muse):
    asked, seeds = prompt_set("mixed", 2), [0, 1]
    made = EvalModel(tiny_muse).superres(asked, seeds)
    assert {name: images.shape for name, images in made.items()} == dict.fromkeys(
        ("bicubic", "", "no text", "true", "true bicubic", "true tokenizer"), (2, 3, 64, 64)
    )
    same(made[""], tiny_muse.generate([ask.prompt for ask in asked], seed=seeds))
    low = EvalModel(tiny_muse, base_only=True).prompts(asked, seeds)[""]
    assert low.shape[-1] == 32
    assert (area_downsample(made["bicubic"]).float() - low).abs().mean() < 16
    assert not made["no text"].equal(made[""])
    reconstructed = EvalModel(tiny_muse).tokenizers(asked, seeds)
    assert made["true tokenizer"].equal(reconstructed[""])
    assert (area_downsample(made["true bicubic"]).float() - reconstructed["low"]).abs().mean() < 16
    low, _ = tokenize(tiny_muse, *to_pil(EvalModel(tiny_muse).real(ask.scene for ask in asked)))
    *_, step = tiny_muse.decode_superres(tiny_muse.jobs([ask.prompt for ask in asked], seed=seeds), low)
    same(made["true"], tiny_muse.picture(step))


def test_super_resolution_without_text_does_not_read_it(tiny_muse, monkeypatch):
    low = torch.randint(16, (1, 64))
    jobs = [tiny_muse.jobs(prompt, seed=3) for prompt in ("a red cube", "two blue spheres")]
    (*_, a), (*_, b) = (tiny_muse.decode_superres(job, low, guidance=-1.0, choice_temperature=0.0) for job in jobs)
    assert (a.tokens == b.tokens).float().mean() > 0.98, "apart from rounding"


def test_it_edits_as_muse_edits(tiny_muse):
    model, ask = EvalModel(tiny_muse), prompt_set("inpaint", 2)[1]
    asked = [ask._replace(prompt="a red cube"), ask]
    pictures = to_pil(to_uint8(render([ask.before for ask in asked], 64)))
    made = model.edit(asked, [0, 4])
    assert [x.shape[-1] for x in made.values()] == [64, 32, 32, 32, 64]
    same(made["before"], pictures)
    (alone,) = tiny_muse.edit(pictures[1], asked[1].prompt, seed=4)
    off = np.abs(np.array(to_pil(made[""])[1]).astype(int) - np.array(alone))
    assert off.max() <= 1, "the decoder rounds a batch of two in another order"
    assert (off > 0).mean() < 0.001


def test_it_inpaints_the_region_and_keeps_the_rest(tiny_muse):
    ask = prompt_set("inpaint", 1)[0]._replace(region=(0.5, 0.0, 1.0, 0.25))
    made = EvalModel(tiny_muse).inpaint([ask], [4])
    region = torch.zeros(64, 64, dtype=torch.bool)
    region[:16, 32:] = True
    inside, outside = (made[""] == made["before"])[..., region].all(), (made[""] == made["before"])[..., ~region].all()
    assert outside and not inside  # noqa: PT018
    (picture,) = to_pil(made["before"])
    drawn = tiny_muse.inpaint(picture, region, ask.prompt, seed=4, keep=False)[0]
    expected = torch.where(region, torch.from_numpy(np.array(drawn)).permute(2, 0, 1), made["before"][0])
    assert made[""][0].equal(expected)


def test_it_outpaints_as_muse_outpaints(tiny_muse):
    (ask,) = prompt_set("outpaint", 1)
    made = EvalModel(tiny_muse).outpaint([ask], [7])
    (wide,) = tiny_muse.outpaint(to_pil(to_uint8(render([ask.before], 64)))[0], (0, 0, 32, 0), ask.prompt, seed=7)
    same(made[""], [wide.crop((32, 0, 96, 64))])


def test_reconstructions_are_the_tokenizers_own(tiny_muse):
    asked = prompt_set("seen", 2)
    images = to_uint8(render([ask.scene for ask in asked], 64))
    model = EvalModel(tiny_muse, before=tiny_muse.high_tokenizer)
    made = model.tokenizers(asked, [0, 1])
    with torch.no_grad():
        net, x = tiny_muse.low_tokenizer, area_downsample(images.float() / 127.5 - 1)
        assert made["low"].equal(to_uint8(net.decode(net.encode(x))))
    assert made[""].shape == images.shape
    for decoded in model.decoder(asked, [0, 1]).values():
        assert decoded.equal(made[""]), "the same tokenizer here"


# --- what sees outlines -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    """The shipped model, and real pictures of 12 scenes with their tokens and their bicubic enlargement."""
    muse = Muse.from_pretrained("toy", device="cpu", dtype=torch.float32)
    real = EvalModel(muse).real(ask.scene for ask in prompt_set("mixed", 12))
    low, high = tokenize(muse, *to_pil(real))
    with torch.no_grad():
        small, reconstructed = (
            to_uint8(net.decode(x)) for net, x in ((muse.low_tokenizer, low), (muse.high_tokenizer, high))
        )
    bicubic = to_uint8(F.interpolate(to_float(small), size=real.shape[2:], mode="bicubic"))
    return SimpleNamespace(
        muse=muse, low=low, high=high, shown={"real": real, "tokens": reconstructed, "bicubic": bicubic}
    )


def ragged(images, pixels):
    """Each pixel comes from up to `pixels` away; places 4 px apart move independently."""
    size = images.shape[-1]
    moves = torch.rand(len(images), 2, size // 4, size // 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moves = F.interpolate(moves, size=(size, size), mode="bilinear") * pixels * 2 / size  # a picture is 2 wide
    at = (torch.arange(size) + 0.5) / size * 2 - 1
    places = (torch.stack(torch.meshgrid(at, at, indexing="xy")) + moves).permute(0, 2, 3, 1)
    return to_uint8(F.grid_sample(to_float(images), places, padding_mode="border", align_corners=False))


def test_outlines_rank_renders_reconstructions_bicubic_and_ragged_pictures(toy):
    """Straight but blurred outlines are nearer to the real ones than sharp outlines that are ragged by 1 px."""
    shown = toy.shown | {"ragged": ragged(toy.shown["real"], 1)}
    found = {name: outline_features(images) for name, images in shown.items()}
    for better, worse in itertools.pairwise(found):
        gap = frechet_interval(found["real"], found[worse], less=found[better])
        assert gap.low > 0, f"{better} should be nearer to real pictures than {worse}: {gap}"


@pytest.mark.parametrize(("wrong", "verdict"), [pytest.param(0.0, "better", marks=pytest.mark.slow), (0.2, "worse")])
def test_a_bad_super_resolution_is_told_apart(tmp_path, evaluator, toy, monkeypatch, wrong, verdict):
    """It knows the true tokens, but a fraction of them is random."""
    random = torch.Generator().manual_seed(0)
    others = torch.randint(toy.muse.config.high_tokenizer.codebook_size, toy.high.shape, generator=random)
    high = torch.where(torch.rand(toy.high.shape, generator=random) < wrong, others, toy.high)
    monkeypatch.setattr(toy.muse, "decode_base", lambda jobs: [SimpleNamespace(stage="base", tokens=toy.low)])
    made = [SimpleNamespace(stage="superres", tokens=high)]
    monkeypatch.setattr(toy.muse, "decode_superres", lambda jobs, low, **sampling: made)
    found = run(EvalModel(toy.muse), tmp_path, evaluator, ["superres"], n=12, batch=12)["superres"]
    lines = (tmp_path / "eval.md").read_text().splitlines()
    for metric in ("psnr", "gmsd", "perceptual", "frechet of outlines"):
        name = f"{metric}, true less true bicubic"
        (line,) = (line for line in lines if name in line)
        assert f"): {verdict} | 12 |" in line
        values = [found[f"{metric}, {variant}"].value for variant in ("true", "true bicubic")]
        assert found[name].value == pytest.approx(values[0] - values[1])
    assert found["frechet of outlines, less bicubic"] == found["frechet of outlines, true less true bicubic"]


# --- reports ----------------------------------------------------------------------------------------------------------


def test_a_stopped_evaluation_gives_the_same_report(tmp_path, evaluator):
    options = {"tasks": ["seen", "tokenizers"], "n": 12, "batch": 6}
    run(Oracle(), tmp_path / "whole", evaluator, **options)
    for stop in (0, 6):
        out = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            run(Oracle(stop=stop), out, evaluator, **options)
        run(Oracle(), out, evaluator, **options)
        for name in ("eval.json", "eval.md", "tasks/seen.json", "tasks/tokenizers.json", "tasks/tokenizers.png"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), f"{name}, stopped at {stop}"


def test_a_finished_task_is_not_drawn_again_and_others_join(tmp_path, evaluator):
    run(Oracle(), tmp_path, evaluator, ["tokenizers"], n=10)
    run(Oracle(stop=0), tmp_path, evaluator, ["tokenizers"], n=10)
    run(Oracle(), tmp_path, evaluator, ["edit"], n=10)
    assert list(json.loads((tmp_path / "eval.json").read_text())["tasks"]) == ["edit", "tokenizers"]


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path, evaluator):
    run(Oracle(), tmp_path, evaluator, ["tokenizers"], n=10)
    before = (tmp_path / "eval.json").read_bytes()
    with pytest.raises(ValueError, match=r"another evaluation: n was 10 and is 12; seed was 1000 and is 7\. Give"):
        run(Oracle(), tmp_path, evaluator, ["tokenizers"], n=12, seed=7)
    with pytest.raises(ValueError, match="checkpoint was None and is 'nano'"):
        evaluate(Oracle(), tmp_path, {"checkpoint": "nano"}, n=10, evaluator=evaluator)
    assert (tmp_path / "eval.json").read_bytes() == before
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="holds another evaluation"):
        run(Oracle(), tmp_path, evaluator, ["tokenizers"], n=10)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds files but no settings\.json"):
        run(Oracle(), tmp_path, evaluator, ["tokenizers"], n=10)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tasks": ["sene"]}, "task 'sene' is not possible. Known tasks: seen"),
        ({"tasks": "seen"}, "task 's' is not possible"),
        ({"tasks": ["decoder"]}, "decoder needs --run"),
        ({"tasks": ["seen"], "sweep": True}, "a sweep has its own prompts"),
        *(({"n": n}, "n is .*at least 10 pictures") for n in (4, 0, -1, 10**9, math.nan, math.inf, True, "20", 12.5)),
        *(({"batch": b}, "batch is .* from 1 to 1,000") for b in (0, -5, 10**9, math.nan, 2.0, False, "x")),
        *(({"seed": s}, r"seed is .*2\*\*32 - 1") for s in (-1, 2**32, math.nan, 1.5, "7", True)),
        ({"seed": 2**32 - 5}, r"seed \+ n - 1 is 4294967330"),
    ],
)
def test_impossible_tasks_are_refused_before_anything_is_written(tmp_path, evaluator, options, says):
    with pytest.raises(ValueError, match=says):
        run(Oracle(), tmp_path / "new", evaluator, **{"tasks": []} | options)
    assert not (tmp_path / "new").exists()


def test_the_base_model_alone_has_no_edits(tmp_path, evaluator, tiny_muse):
    model = EvalModel(tiny_muse, base_only=True)
    with pytest.raises(ValueError, match="--base-only leaves only the first six"):
        run(model, tmp_path, evaluator, ["edit"])
    assert model.draw(["a red cube"], [0]).shape == (1, 3, 32, 32)
    assert model.real([prompt_set("seen", 1)[0].scene]).shape == (1, 3, 32, 32)


def test_the_page_marks_wrong_pictures_and_the_table_has_intervals(tmp_path, evaluator):
    run(Oracle(), tmp_path, evaluator, ["seen"], n=10)
    assert Image.open(tmp_path / "tasks/seen.png").width > 500
    text = (tmp_path / "eval.md").read_text()
    assert "| seen | 10 | 100.0% (" in text
    assert "| seen | diversity, real |" in text
    line = table({"counts": {"right": Estimate(0.5, 0.25, 0.75, 8, ".1%")}}).splitlines()[2]
    assert line == "| counts | 8 | 50.0% (25.0 to 75.0) |  |  |  |  |"


def test_a_sweep_is_one_call_and_two_plots(tmp_path, evaluator, monkeypatch):
    small = {line: dict(list(points.items())[:2]) for line, points in SWEEP.items() if line in ("guidance", "order")}
    monkeypatch.setattr("minimuse.eval_run.SWEEP", small)
    seen = []

    class Recorded(Oracle):
        def draw(self, prompts, seeds, negatives=(), **sampling):
            seen.append(sampling)
            return super().draw(prompts, seeds)

    found = evaluate(Recorded(base_only=True), tmp_path, {}, n=10, sweep=True, evaluator=evaluator)["tasks"]
    assert list(found) == ["guidance 0", "guidance 1", "order confidence", "order random"]
    assert seen == [{"guidance": 0.0}, {"guidance": 1.0}, {"order": "confidence"}, {"order": "random"}]
    for name in ("sweep-score.png", "sweep-right.png"):
        assert Image.open(tmp_path / name).width > 2 * 900, "two plots of 900 x 600, next to each other"


@pytest.mark.slow
def test_the_command_measures_a_run(tmp_path, tiny_run, monkeypatch, capsys):
    monkeypatch.setattr("minimuse.eval_run.SceneClip.from_pretrained", lambda: Brightness())
    words = ["eval", str(tiny_run), "--out", str(tmp_path / "out"), "--n", "10", "--device", "cpu", "--kinds"]
    assert cli.main([*words, "seen,decoder"]) == 0
    assert "| decoder | psnr, before |" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/eval.json").read_text())
    assert report["settings"]["checkpoint"] == "tiny"
    assert set(report["settings"]) >= {"minimuse", "torch", "fingerprint", "weights of clip", "seed", "n", "device"}
    assert cli.main([*words, "seen", "--seed", "3"]) == 2
    assert "seed was 1000 and is 3" in capsys.readouterr().err
