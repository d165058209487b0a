"""Honest measurement: how good pictures are, and how well they fit their prompts (Muse 3.2).

    pictures --any feature function--> (n, D) --frechet, diversity--> Measured(value, low, high, n)
    pictures, prompts --any scorer--> (n,) --intervals.mean--> Measured
    pictures, a tokenizer's reconstruction of them --reconstruction--> Measured

Images are (B, 3, H, W), uint8 or in [-1, 1]. n, m rows, D features, V codebook size.
Not here: the intervals (`intervals.py`), who reads a picture, prompt sets.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minimuse.data_images import to_pil, to_uint8
from minimuse.intervals import Groups, Measured, half_samples, mean
from minimuse.vqgan import codebook_usage

Features = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> (B, D)


# ---------------------------------------------------------------- distributions of features


def in_batches(function: Callable[..., Tensor], *arrays: Sequence | Tensor, batch: int = 64) -> Tensor:
    """A feature function or scorer over arrays of n rows -> (n, ...) on the CPU, a batch at a time, no gradient."""
    n = len(arrays[0])
    if n == 0 or any(len(a) != n for a in arrays):
        raise ValueError(f"rows: {', '.join(str(len(a)) for a in arrays)}; expected as many of each, at least one")
    with torch.no_grad():
        return torch.cat([function(*(a[i : i + batch] for a in arrays)).cpu() for i in range(0, n, batch)])


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Features (n, D), (m, D) -> |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the Gaussians fitted to them.

    With C = R^T R, R from the QR of the centred features, tr (C1 C2)^(1/2) is the sum of the singular values of
    R1 R2^T: no matrix is squared, and n < D does no harm.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < 2:
        raise ValueError(f"features {tuple(real.shape)} and {tuple(fake.shape)}: expected (n, D), (m, D), n and m >= 2")
    if not (real.isfinite().all() and fake.isfinite().all()):
        raise ValueError("features hold NaN or infinite values; look for the picture that makes them")
    means = [x.double().mean(0) for x in (real, fake)]
    roots = [
        torch.linalg.qr((x.double() - m) / math.sqrt(len(x) - 1), mode="r")[1]
        for x, m in zip((real, fake), means, strict=True)
    ]
    traces = sum(r.square().sum() for r in roots)
    distance = (means[0] - means[1]).square().sum() + traces - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return max(0.0, distance.item())


def frechet(real: Tensor, fake: Tensor, groups: Groups = None, *, extrapolate: bool = False, **how) -> Measured:
    """Features (n, D), (m, D) -> their Frechet distance: FID for `inception_features`, rFID for reconstructions.

    Muse 3.2. It is biased upwards by about c / n: 0 is never measured, and only figures of equal n and equal reference
    compare. `extrapolate` estimates FD at infinite n (after arXiv 1911.07023, from two sizes); it may fall below 0.
    `groups` of the fakes; `how` (draws, seed, confidence) as `half_samples`. Where D = 2048, a draw takes seconds.
    """
    found = half_samples(frechet_distance, real, fake, groups=(None, groups), extrapolate=extrapolate, **how)
    return found if extrapolate else found._replace(low=max(0.0, found.low))


def inception_features(weights: str | None = None) -> Features:
    """FID's own Inception, images -> (B, 2048) (extra `metrics`); downloads its weights unless given their file."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises RuntimeError
        raise ImportError(
            "Inception features need torch-fidelity, and a torchvision made for this torch; "
            f"mend it: pip install 'minimuse[metrics]' ({error})"
        ) from error
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    net = net.eval()  # 0.3.0 leaves it in training mode (pitfall 18)
    return lambda images: net.to(images.device)(images if images.dtype == torch.uint8 else to_uint8(images))[0]


def pairwise(features: Tensor) -> float:
    """Features (k, D) of one prompt's pictures -> the mean Euclidean distance of two of them."""
    return torch.pdist(features.double()).mean().item()


def diversity(features: Tensor, prompts: Sequence[str], confidence: float = 0.95) -> Measured:
    """Features (n, D), the prompt of each -> `pairwise` within a prompt, averaged over prompts."""
    if len(features) != len(prompts):
        raise ValueError(f"{len(features)} pictures and {len(prompts)} prompts: give the prompt of each picture")
    rows = {prompt: [i for i, other in enumerate(prompts) if other == prompt] for prompt in dict.fromkeys(prompts)}
    if not rows or min(map(len, rows.values())) < 2:
        raise ValueError("diversity within a prompt needs at least 2 pictures of each prompt")
    return mean([pairwise(features[r]) for r in rows.values()], None, confidence)._replace(n=len(features))


# ---------------------------------------------------------------- pictures and prompts


class ClipScorer:
    """images (B, 3, H, W), B prompts -> (B,) cosines of a CLIP's image and text embeddings (Muse 3.2).

    The CLIP score is `mean(in_batches(scorer, images, prompts), groups=prompts)`, and any function of that shape can
    stand in. name: a folder or hub id of any CLIP of `transformers`; each has a level of its own, so say which it was.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        from transformers import AutoProcessor, CLIPModel

        self.processor = AutoProcessor.from_pretrained(name)
        model, info = CLIPModel.from_pretrained(name, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{name!r} is no whole CLIP: it lacks {sorted(info['missing_keys'])[0]!r} and others")
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        how = {"return_tensors": "pt", "padding": True, "truncation": True}
        out = self.model(**self.processor(text=list(prompts), images=to_pil(images), **how).to(self.model.device))
        return F.cosine_similarity(out.image_embeds, out.text_embeds)  # (B,)


# ---------------------------------------------------------------- tokenizers


def _pair(images: Tensor, again: Tensor) -> tuple[Tensor, Tensor]:
    """-> both as float64 in [0, 1]."""
    if images.shape != again.shape or images.ndim != 4:
        raise ValueError(f"images {tuple(images.shape)} and {tuple(again.shape)}: expected two of (B, C, H, W)")
    return tuple(x.double() / 255 if x.dtype == torch.uint8 else (x.double() + 1) / 2 for x in (images, again))


def psnr(images: Tensor, again: Tensor) -> Tensor:
    """(B, C, H, W) twice -> (B,) dB, 10 log10(1 / MSE) of pixels in [0, 1]. Choice: at most 100, so equal ones too."""
    x, y = _pair(images, again)
    return -10 * (x - y).square().mean((1, 2, 3)).clamp(min=1e-10).log10()


def ssim(images: Tensor, again: Tensor) -> Tensor:
    """(B, C, H, W) twice -> (B,) structural similarity, 1 for equal ones (Wang et al. 2004).

    (2 mx my + c1) (2 cov + c2) / ((mx^2 + my^2 + c1) (vx + vy + c2)), c1 = 0.01^2, c2 = 0.03^2, over Gaussian windows
    of 11 x 11, sigma 1.5, that lie wholly inside; the mean over places and channels.
    """
    x, y = _pair(images, again)
    if min(x.shape[2:]) < 11:
        raise ValueError(f"images {tuple(x.shape)}: SSIM's window needs at least 11 x 11 pixels")
    line = torch.exp(-(torch.arange(-5, 6, dtype=x.dtype, device=x.device).square()) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    blur = partial(F.conv2d, weight=window)
    x, y = x.flatten(0, 1)[:, None], y.flatten(0, 1)[:, None]  # (B*C, 1, H, W)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similar.view(len(images), -1).mean(1)


def reconstruction(images: Tensor, again: Tensor, features: Features | None = None) -> dict[str, Measured]:
    """Images and what a tokenizer makes of them -> "psnr", "ssim" and, with a feature function, "rfid"."""
    found = {"psnr": mean(psnr(images, again)), "ssim": mean(ssim(images, again))}
    if features is not None:  # an image and its reconstruction stay together in each half
        both = torch.stack([in_batches(features, images), in_batches(features, again)], 1)  # (B, 2, D)
        found["rfid"] = half_samples(lambda pairs: frechet_distance(*pairs.unbind(1)), both)
    return found


def codebook(tokens: Tensor, codebook_size: int) -> dict[str, Measured]:
    """tokens (B, N) of B images -> "used", the share of the V codes in use, and "perplexity" (pitfall 19)."""
    used, perplexity = (half_samples(lambda t, i=i: codebook_usage(t, codebook_size)[i], tokens) for i in (0, 1))
    return {"used": used._replace(shown=".1%"), "perplexity": perplexity}
