"""eval_metrics.py: closed forms, scipy's matrix square root, transformers' logits, bad pictures that must score badly."""

import math
import sys
import types

import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, ndimage

from minimuse.data_images import to_float, to_pil, to_uint8
from minimuse.data_scenes import COLORS, render, sample_scene
from minimuse.eval_metrics import (
    ClipScorer,
    codebook,
    diversity,
    frechet,
    frechet_distance,
    in_batches,
    inception_features,
    pairwise,
    psnr,
    reconstruction,
    ssim,
)
from minimuse.intervals import mean


def draws(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double() * scale + shift


def whitened(x: torch.Tensor) -> torch.Tensor:
    """Rows (n, D) with mean 0 and covariance I, exactly."""
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


# ---------------------------------------------------------------- Frechet distance


def test_frechet_of_two_gaussians_in_closed_form():
    """Covariances I and A A^T that commute: |m|^2 + sum (s_i - 1)^2."""
    x, y = whitened(draws(50, 4, 0)), whitened(draws(60, 4, 1))
    scales, shift = torch.tensor([1.0, 2.0, 0.5, 0.0]).double(), torch.tensor([1.0, 0.0, 0.0, -2.0]).double()
    truth = shift.square().sum() + (scales - 1).square().sum()
    assert frechet_distance(x, y * scales + shift) == pytest.approx(truth.item(), abs=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_frechet_is_scipys(seed, d):
    x, y = draws(30, d, seed), draws(40, d, seed + 1) @ draws(d, d, seed + 2) + 1
    covariances = [v.T.cov().view(d, d).numpy() for v in (x, y)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    truth = (x.mean(0) - y.mean(0)).square().sum().item() + (covariances[0] + covariances[1] - 2 * root).trace()
    assert frechet_distance(x, y) == pytest.approx(truth, rel=1e-5, abs=1e-6)


@given(st.integers(0, 10**6), st.floats(0.1, 10))
@settings(deadline=None, max_examples=20)
def test_frechet_invariances(seed, scale):
    x, y = draws(25, 5, seed), draws(30, 5, seed + 1, 2.0, 1.0)
    turn, _ = torch.linalg.qr(draws(5, 5, seed + 2))
    found = frechet_distance(x, y)
    assert frechet_distance(y, x) == pytest.approx(found)
    assert frechet_distance(x @ turn + 7, y @ turn + 7) == pytest.approx(found), "turned and moved together"
    assert frechet_distance(scale * x, scale * y) == pytest.approx(scale**2 * found)
    assert frechet_distance(x, x[torch.randperm(25)]) == pytest.approx(0, abs=1e-9)


def test_frechet_with_fewer_rows_than_features():
    """n < D: covariances of low rank, on which scipy's root of the product goes astray."""
    x, y = draws(10, 64, 0), draws(12, 64, 1, shift=0.5)
    grams = [(v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (x, y)]
    c1, c2 = (g.T @ g for g in grams)
    values, vectors = torch.linalg.eigh(c1)
    half = vectors * values.clamp(min=0).sqrt() @ vectors.T
    root = torch.linalg.eigvalsh(half @ c2 @ half).clamp(min=0).sqrt().sum()
    truth = (x.mean(0) - y.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * root
    assert frechet_distance(x, y) == pytest.approx(truth.item(), rel=1e-4)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_is_biased_upwards_and_extrapolates():
    """Equal distributions: plain FD is c / n above 0 at every n; extrapolated, intervals hold 0 as they say."""
    pairs = [(draws(100, 6, 2 * i), draws(100, 6, 2 * i + 1)) for i in range(100)]
    plain = [frechet(x, y) for x, y in pairs]
    better = [frechet(x, y, extrapolate=True) for x, y in pairs]
    bias = [torch.tensor([m.value for m in found]).mean().abs().item() for found in (plain, better)]
    assert bias[1] < bias[0] / 4, f"{bias[0]:.3f} -> {bias[1]:.3f}"
    assert sum(m.low <= 0 <= m.high for m in better) >= 92
    assert all(m.low >= 0 for m in plain), "a distance is not below 0"


def test_coverage_of_frechet_intervals():
    """N(0, I) against N(1, 2^2 I) in 4 dimensions, true FD 8: the extrapolated interval holds it in about 95%."""
    g = torch.Generator().manual_seed(0)  # one stream: neighbouring seeds are not quite independent
    pairs = [(torch.randn(150, 4, generator=g), 2 * torch.randn(150, 4, generator=g) + 1) for _ in range(250)]
    found = [frechet(*pair, extrapolate=True) for pair in pairs]
    held = sum(m.low <= 8 <= m.high for m in found) / len(found)
    assert 0.92 <= held <= 0.98, f"held in {held:.1%}"
    assert frechet(*pairs[0], extrapolate=True) == found[0], "one seed, one figure"
    assert frechet(*pairs[0], extrapolate=True, seed=1) != found[0]


def test_repeated_prompts_widen_the_interval():
    """Twenty prompts, each drawn ten times over with little between: they are worth about twenty."""
    centres = draws(20, 3, 1, 1.0).repeat_interleave(10, 0)
    fake, prompts = centres + draws(200, 3, 2, 0.05), torch.arange(20).repeat_interleave(10)
    naive, honest = (frechet(draws(400, 3, 0), fake, g) for g in (None, prompts))
    assert naive.value == honest.value
    assert honest.high - honest.low > 2 * (naive.high - naive.low)


# ---------------------------------------------------------------- diversity


def test_pairwise_by_hand():
    assert pairwise(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])) == pytest.approx(10 / 3)


def test_diversity_is_within_prompts():
    """Prompts that differ do not make the pictures of one prompt diverse; collapse is seen."""
    prompts = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    far = torch.tensor([0.0, 100.0, 200.0]).repeat_interleave(4)[:, None].expand(12, 3)
    found = diversity(far + draws(12, 3, 0), prompts)
    assert found.value < 10
    assert found.n == 12
    assert diversity(far, prompts)[:3] == (0, 0, 0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    features = far + draws(12, 3, 0)
    assert diversity(features[order], [prompts[i] for i in order]).value == pytest.approx(found.value)


# ---------------------------------------------------------------- reconstruction


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    y = x.clone()
    y[0] += 51  # a fifth of the range: MSE 1/25
    assert psnr(x, y).tolist() == pytest.approx([10 * math.log10(25), 100])
    assert psnr(to_float(x), to_float(y)).tolist() == pytest.approx([10 * math.log10(25), 100], abs=1e-4)


def test_ssim_is_the_published_one():
    """Against Gaussian filters of scipy, borders left out, as scikit-image computes it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 3, 24, 20), generator=g, dtype=torch.uint8)
    y = (x + torch.randint(0, 60, x.shape, generator=g, dtype=torch.uint8)).clamp(max=255)

    def one(a, b):
        def blur(v):
            return ndimage.gaussian_filter(v, 1.5, truncate=3.5)[5:-5, 5:-5]

        ma, mb = blur(a), blur(b)
        va, vb, ab = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
        return ((2 * ma * mb + 1e-4) * (2 * ab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean()

    a, b = (v.double().numpy() / 255 for v in (x, y))
    truth = [sum(one(a[i, c], b[i, c]) for c in range(3)) / 3 for i in range(2)]
    assert ssim(x, y).tolist() == pytest.approx(truth, abs=1e-10)
    assert ssim(x, x).tolist() == pytest.approx([1, 1])


def test_reconstruction_gets_worse_with_noise():
    images = render([sample_scene(i) for i in range(12)], 32)
    features = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten())
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    found = [reconstruction(images, (images + s * noise).clamp(-1, 1), features) for s in (0.0, 0.1, 0.5)]
    assert set(found[0]) == {"psnr", "ssim", "rfid"}
    assert [f["psnr"].value for f in found] == sorted((f["psnr"].value for f in found), reverse=True)
    assert found[0]["ssim"].value == pytest.approx(1)
    assert found[0]["rfid"].value == pytest.approx(0, abs=1e-9)
    assert found[0]["rfid"].high == pytest.approx(0, abs=1e-9), "an image stays with its reconstruction"
    assert 0 < found[1]["rfid"].value < found[2]["rfid"].low


def test_codebook_use():
    tokens = torch.arange(8).repeat(10, 2)
    found = codebook(tokens, 16)
    assert str(found["used"]) == "50.0% (50.0 to 50.0, n = 10)"
    assert found["perplexity"].value == pytest.approx(8)
    varied = codebook(torch.randint(0, 16, (10, 8), generator=torch.Generator().manual_seed(0)), 16)
    assert varied["perplexity"].low < varied["perplexity"].value < varied["perplexity"].high


# ---------------------------------------------------------------- pictures against renders, captions shuffled


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(i, n_things=1) for i in range(120)]


def features(images: torch.Tensor) -> torch.Tensor:
    """A fixed random convolution, then means and spreads by channel."""
    weight = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    maps = torch.relu(torch.nn.functional.conv2d(images, weight, stride=2)).flatten(2)
    return torch.cat([maps.mean(2), maps.std(2)], 1)


def test_random_pictures_are_far_from_renders(scenes):
    renders = in_batches(features, render(scenes, 32), batch=50)
    noise = in_batches(features, torch.rand(60, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    alike, random = frechet(renders[:60], renders[60:]), frechet(renders[:60], noise)
    assert random.low > 10 * alike.high, f"renders {alike}, noise {random}"


def colour_scorer(images: torch.Tensor, prompts) -> torch.Tensor:
    """How near the most colourful pixels are to the colour that the prompt names."""
    wanted = torch.stack([torch.tensor(COLORS[next(c for c in COLORS if c in p)]).float() for p in prompts])
    flat = images.flatten(2)
    vivid = (flat.amax(1) - flat.amin(1)).topk(20).indices  # (B, 20)
    hue = flat.gather(2, vivid[:, None].expand(-1, 3, -1)).mean(2)
    return torch.nn.functional.cosine_similarity(hue - hue.mean(1, True), wanted - wanted.mean(1, True))


def test_shuffled_captions_score_badly(scenes):
    scenes = [s for s in scenes if s.things[0].color not in ("gray", "brown")]
    images, prompts = render(scenes, 32), [f"a {s.things[0].color} {s.things[0].shape}" for s in scenes]
    shuffled = [prompts[i] for i in torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))]
    right, wrong = (mean(in_batches(colour_scorer, images, p), groups=p) for p in (prompts, shuffled))
    assert wrong.high < right.low, f"right captions {right}, shuffled {wrong}"
    assert wrong.low < 0.2, "shuffled captions are right by chance alone"


# ---------------------------------------------------------------- CLIP, Inception


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
    assert len(to_pil(images)) == 3


def test_half_a_clip_is_refused(tmp_path, tiny_clip):
    import shutil

    import transformers as tf

    shutil.copytree(tiny_clip, tmp_path / "half")
    model = tf.CLIPModel.from_pretrained(tiny_clip)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("visual_projection")}
    model.save_pretrained(tmp_path / "half", state_dict=state)
    with pytest.raises(ValueError, match="lacks 'visual_projection"):
        ClipScorer(str(tmp_path / "half"))


def test_inception_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"minimuse\[metrics\]"):
        inception_features()


def test_inception_gets_uint8(monkeypatch):
    """torch-fidelity takes uint8 alone, and answers with a tuple, one entry a layer asked for."""

    class Fake(torch.nn.Module):
        def __init__(self, name, layers, feature_extractor_weights_path):
            super().__init__()
            assert layers == ["2048"]
            assert feature_extractor_weights_path == "weights.pth"

        def forward(self, images):
            assert images.dtype == torch.uint8
            assert not self.training, "pitfall 18: frozen, yet in training mode"
            return (images.double().mean((2, 3)),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Fake
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    found = inception_features("weights.pth")
    assert found(torch.ones(2, 3, 8, 8)).tolist() == found(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)).tolist()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4)), r"\(5, 3\) and \(5, 4\)"),
        (lambda: frechet_distance(torch.zeros(5, 3), torch.full((5, 3), math.nan)), "NaN"),
        (lambda: frechet(torch.zeros(3, 2), torch.zeros(9, 2)), "too few"),
        (lambda: diversity(torch.zeros(3, 2), ["a", "a", "b"]), "at least 2"),
        (lambda: diversity(torch.zeros(3, 2), ["a"]), "3 pictures and 1 prompts"),
        (lambda: psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 9, 8)), "expected two"),
        (lambda: ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)), "11 x 11"),
        (lambda: in_batches(features, torch.zeros(0, 3, 8, 8)), "at least one"),
        (lambda: in_batches(colour_scorer, torch.zeros(2, 3, 8, 8), ["a red cube"]), "rows: 2, 1"),
    ],
)
def test_wrong_inputs_say_what_to_do(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
