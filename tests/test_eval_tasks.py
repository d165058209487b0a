"""eval_tasks.py: the truth scores near 100%, chance scores like chance, and an EvalModel draws what Muse draws."""

from functools import cache
from random import Random

import pytest
import torch
from test_eval_prompts import perfect

from minimuse.data_images import area_downsample, to_pil, to_uint8
from minimuse.data_scenes import MATERIALS, SIZES, Scene, place_things, relations, render
from minimuse.eval_metrics import Estimate
from minimuse.eval_prompts import matches, parse_prompt, prompt_set
from minimuse.eval_run import evaluate
from minimuse.eval_tasks import ITERATIONS, TASKS, EvalModel, Evaluator, draw_outpaint, draw_superres, regions

SEED = 1000
asked_of = cache(prompt_set)


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


class Oracle:
    """Draws what is asked for. With `stop`, it is interrupted when it draws for the `stop`-th time."""

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
        return {"": images, "low": images, "before": images // 2}


class Shuffled(Oracle):
    """It draws well, but what another prompt asks for."""

    def draw(self, prompts, seeds, negatives=(), **sampling):
        return self.images([self.other(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)])

    def other(self, prompt, seed):
        asked = next(a for k in ("seen", "counts") if (a := asked_of(k, self.n))[seed - SEED].prompt == prompt)
        return asked[Random(0).sample(range(self.n), self.n)[seed - SEED]].scene


class Brightness:
    """In place of SceneClip where the score is not what is tested."""

    def __call__(self, images, prompts):
        return images.float().mean((1, 2, 3)) / 255

    def levels(self, images):
        return [images]


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
    found = run(Oracle(12, before="yes"), tmp_path, evaluator, [], n=12)
    assert list(found) == list(TASKS), "all tasks, in order"
    for name, metrics in found.items():
        value, low, high, n, _ = metrics["right"]
        assert value >= 0.9, f"{name}: {value:.1%} right"
        assert 0 <= low <= value <= high <= 1
        assert n == 12
    assert found["inpaint"]["psnr"].value == pytest.approx(100, abs=3), "pixels outside the region are kept"
    assert found["edit"]["right, 10"].value >= 0.9
    assert found["superres"]["right, no text"].value == found["superres"]["right"].value
    assert found["tokenizers"]["psnr"].value == 100
    assert found["decoder"]["psnr, before"].high < 50, "half as bright before"
    assert found["decoder"]["frechet"].value < 1e-6 < found["decoder"]["frechet, before"].value
    assert found["seen"]["frechet"].value < 2 < found["decoder"]["frechet, before"].value


def test_an_obeyed_negative_prompt_is_seen(tmp_path, evaluator):
    found = run(Oracle(40), tmp_path, evaluator, ["negative"])["negative"]
    assert found["word shown"].value <= 0.05
    assert 0.3 <= found["word shown, without"].value <= 0.7, "sizes and materials are drawn evenly"


@pytest.mark.parametrize("name", ["seen", "counts"])
def test_shuffled_prompts_score_like_chance(tmp_path, evaluator, name):
    """Chance is known exactly: how many of the drawn scenes happen to fit their own prompt."""
    model, asked = Shuffled(40), prompt_set(name, 40)
    lucky = [
        matches(perfect(model.other(ask.prompt, SEED + i)), parse_prompt(ask.prompt)).right
        for i, ask in enumerate(asked)
    ]
    chance = sum(lucky) / 40
    assert chance <= 0.1, "of 21 pairs of color and shape"
    found = run(model, tmp_path, evaluator, [name])[name]
    assert found["right"].value == pytest.approx(chance, abs=0.03)
    assert found["right, real"].value >= 0.97


def test_an_untrained_model_scores_nothing(tmp_path, evaluator, tiny_muse):
    for name, metrics in run(EvalModel(tiny_muse), tmp_path, evaluator, ["seen", "relations"], n=10).items():
        assert metrics["right"].value <= 0.1, name
        assert metrics["frechet"].low > 5, "far from real renders"


def test_tiles_of_large_pictures_have_features_of_their_own(evaluator):
    images = torch.arange(2 * 3 * 128 * 128).remainder(256).to(torch.uint8).view(2, 3, 128, 128)
    features = evaluator.features(images)
    assert features["tiles"].shape[:2] == (2, 4)
    torch.testing.assert_close(features["tiles"][1, 2], evaluator.detector.features(images[1:, :, 64:, :64])[0])
    assert set(evaluator.features(images[..., :64, :64])) == {""}


def test_regions_are_where_they_say():
    ask = prompt_set("seen", 1)[0]._replace(region=(0.5, 0.0, 1.0, 0.25))
    (region,) = regions([ask], 8)
    assert region[:2, 4:].all()
    assert region.sum() == 8


def test_psnr_is_that_of_the_pixels_outside_the_region(evaluator):
    ask = prompt_set("seen", 1)[0]._replace(region=(0.5, 0.0, 1.0, 1.0))
    reference = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images = reference + 51  # a fifth of the range: 10 log10(25) dB
    images[..., 4:] = 255
    assert evaluator.against(images, reference, [ask])["psnr"] == pytest.approx([13.979], abs=1e-3)


# --- an EvalModel does what a user would do ---------------------------------------------------------------------------


def same(images, pictures):
    assert [p.tobytes() for p in to_pil(images)] == [p.tobytes() for p in pictures]


def test_it_draws_what_generate_draws(tiny_muse):
    prompts, seeds = ["a red cube", "a blue sphere"], [5, 9]
    model = EvalModel(tiny_muse)
    same(model.draw(prompts, seeds), tiny_muse.generate(prompts, seed=seeds))
    same(model.draw(prompts, seeds, ["a cube", "a sphere"], steps=3),
         tiny_muse.generate(prompts, seed=seeds, negative_prompt=["a cube", "a sphere"], steps=3))  # fmt: skip
    low, high, without_text = model.cascade(prompts, seeds)
    same(high, tiny_muse.generate(prompts, seed=seeds))
    assert low.shape[-1] == 32
    assert EvalModel(tiny_muse, base_only=True).draw(prompts, seeds).equal(low)
    assert not without_text.equal(high)


def test_super_resolution_without_text_does_not_read_it(tiny_muse, monkeypatch):
    low = torch.randint(16, (1, 64))
    jobs = [tiny_muse.jobs(prompt, seed=3) for prompt in ("a red cube", "two blue spheres")]
    (*_, a), (*_, b) = (tiny_muse.decode_superres(job, low, guidance=-1.0, choice_temperature=0.0) for job in jobs)
    assert (a.tokens == b.tokens).float().mean() > 0.98, "apart from rounding"


def test_it_edits_as_muse_edits(tiny_muse):
    ask = prompt_set("inpaint", 2)[1]
    image = to_uint8(render([ask.before], 64))
    (picture,), region = to_pil(image), regions([ask], 64)
    model = EvalModel(tiny_muse)
    same(
        model.inpaint(image, region, [ask.prompt], [4]),
        tiny_muse.inpaint(picture, region[0], ask.prompt, seed=4, keep=False),
    )
    made = model.edit(image.repeat(2, 1, 1, 1), ["a red cube", ask.prompt], [0, 4])
    same(made[-1][1:], tiny_muse.edit(picture, ask.prompt, seed=4))
    assert [x.shape[-1] for x in made] == [32, 32, 32, 64]


def test_it_outpaints_as_muse_outpaints(tiny_muse):
    (ask,) = prompt_set("outpaint", 1)
    drawn = draw_outpaint(EvalModel(tiny_muse), [ask], [7])
    (wide,) = tiny_muse.outpaint(to_pil(to_uint8(render([ask.before], 64)))[0], (0, 0, 32, 0), ask.prompt, seed=7)
    same(drawn.variants[""], [wide.crop((32, 0, 96, 64))])


def test_variants_of_super_resolution_have_one_size(tiny_muse):
    drawn = draw_superres(EvalModel(tiny_muse), prompt_set("mixed", 2), [0, 1])
    assert {name: images.shape for name, images in drawn.variants.items()} == dict.fromkeys(
        ("bicubic", "", "no text"), (2, 3, 64, 64)
    )


def test_reconstructions_are_the_tokenizers_own(tiny_muse):
    images = to_uint8(render([ask.scene for ask in prompt_set("seen", 2)], 64))
    made = EvalModel(tiny_muse, before=tiny_muse.high_tokenizer).reconstruct(images)
    with torch.no_grad():
        net, x = tiny_muse.low_tokenizer, area_downsample(images.float() / 127.5 - 1)
        assert made["low"].equal(to_uint8(net.decode(net.encode(x))))
    assert made[""].shape == images.shape
    assert made["before"].equal(made[""]), "the same tokenizer here"
