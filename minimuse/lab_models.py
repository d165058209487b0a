"""Samplers of a trained model: are its images right, and do they look like real ones?

    MuseEvaluator     accuracy  fraction of images with everything that the prompt names (`eval_networks.py`)
                      frechet   Frechet distance between detector features of images and renders of the same scenes
    AmusedEvaluator   clip      CLIP score, the mean cosine similarity of image and prompt
                      fid       Frechet distance between Inception features of the images and of an image folder

Image i has the same prompt and seed for every sampler, so samplers are compared in pairs. A metric has GROUPS values:
group means of the score, or jackknife pseudo-values of the distance, without the bias c / n. The distance needs more
images than features. An accuracy of 0 or 1 has an interval of width 0, which is too narrow.
Not here: the whole cascade (`eval_run.py`), the comparison of many samplers (`lab.py`).
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from minimuse.data_sources import FolderDataset, Problems, SceneDataset
from minimuse.eval_metrics import Features, frechet_distance, in_batches, inception_features, jackknife
from minimuse.eval_networks import ClipScorer, Detector
from minimuse.eval_prompts import matches, parse_prompt
from minimuse.lab_optimum import GROUPS, Outcome, check_samples, run, sampled_curves
from minimuse.lab_samplers import preset_settings
from minimuse.muse import Muse
from minimuse.sampler import decode
from minimuse.utils import OneSeed, area_downsample, check, generator_of, pick_device, require, to_float

if TYPE_CHECKING:
    from minimuse.amused import Amused

Scorer = Callable[[Tensor, Sequence[str]], Tensor]  # images (B, 3, H, W), B prompts -> (B,), higher is better


class ModelEvaluator:
    """Measures samplers of a model on fixed prompts and seeds, against real images (n, 3, H, W).

    A subclass defines `titles` (of the score, then of the distance), `grid`, `codebook_size` and `draw`: B prompts, a
    seed each, settings -> images (B, 3, H, W) in [-1, 1], and the forward passes of all of them together.
    """

    titles: ClassVar[dict[str, str]]
    draw: Callable[..., tuple[Tensor, int]]
    batch = 64  # images at a time

    def __init__(self, target: str, prompts: list[str], real: Tensor, score: Scorer, features: Features, seed: int):
        self.seed = check("seed", seed, OneSeed)
        self.prompts, self.score, self.features = prompts, score, features
        self.real = in_batches(features, real)  # (n, D)
        if len(prompts) <= self.real.shape[1]:
            few = f"the Frechet distance of {len(prompts)} images is unreliable"
            warnings.warn(f"{few}: samples should be more than its {self.real.shape[1]} features", stacklevel=3)
        level = {next(iter(self.titles)): round(in_batches(score, real, prompts).double().mean().item(), 4)}
        self.about = {"target": target, "samples": len(prompts), "seed": seed, "real images": level}

    @torch.no_grad()
    def __call__(self, **sampling: Any) -> Outcome:
        """Settings of the sampler -> the groups' means of the score, and pseudo-values of the distance."""
        scores, features, nfe = [], [], 0
        for start in range(0, len(self.prompts), self.batch):
            prompts = self.prompts[start : start + self.batch]
            seeds = [(1_000_003 * self.seed + start + i) % 2**32 for i in range(len(prompts))]
            images, passes = self.draw(prompts, seeds, sampling)
            scores.append(self.score(images, prompts).double().cpu())
            features.append(self.features(images).cpu())
            nfe += passes
        fake = torch.cat(features)
        group = torch.arange(len(fake)) * GROUPS // len(fake)
        without = [frechet_distance(self.real, fake[group != g]) for g in range(GROUPS)]
        distances = jackknife(frechet_distance(self.real, fake), torch.tensor(without, dtype=torch.double)).tolist()
        means = torch.cat(scores).view(GROUPS, -1).mean(1).tolist()
        return Outcome(nfe / len(self.prompts), dict(zip(self.titles, (means, distances), strict=True)))


def muse_settings(muse: Any, sampler: str, steps: int | None = None) -> dict[str, Any]:
    """-> the settings of `Muse.generate` that draw low tokens as a sampler of `lab_samplers.py` does."""
    require("order" in getattr(muse, "settings", ("order",)), f"{muse.config.name} has no orders; give another model")
    network, defaults = muse.config.base, muse.config.base_sampling
    return preset_settings(sampler, network.tokens, network.codebook_size, steps or defaults.steps)


class MuseEvaluator(ModelEvaluator):
    """The base model of a Muse, on captions of scenes of the split "test" with one or two objects.

    What the sampler does not set comes from the checkpoint. Choice: no super-resolution; the base model decides what is
    where.
    """

    titles: ClassVar = {
        "accuracy": "fraction of images with everything asked for",
        "frechet": "Frechet distance of detector features",
    }

    def __init__(self, muse: Muse, samples: int = 512, seed: int = 0):
        samples, seed = check_samples(samples), check("seed", seed, OneSeed)
        settings = getattr(muse, "settings", ("order",))  # of a baseline
        require("order" in settings, f"target is {muse.config.name}; give a model that has schedules and orders")
        config, detector = muse.config, Detector.from_pretrained().to(muse.device)
        scenes = SceneDataset(samples, config.high_tokenizer.image_size, "test", seed, fractions=(1, 1, 0), k=1)
        prompts = [scenes.captions(i)[0] for i in range(samples)]

        def accuracy(images: Tensor, prompts: Sequence[str]) -> Tensor:
            found = zip(detector.detect(images), prompts, strict=True)
            return torch.tensor([float(matches(detections, parse_prompt(p)).right) for detections, p in found])

        real = area_downsample(scenes.images(), config.high_tokenizer.image_size // config.low_tokenizer.image_size)
        super().__init__(f"{config.name}, base model", prompts, real, accuracy, detector.features, seed)
        self.muse, self.images, self.codebook_size = muse, real, config.base.codebook_size
        self.grid = (config.base.grid, config.base.grid)

    @cached_property
    @torch.inference_mode()
    def curves(self) -> Tensor:
        """(GROUPS, N): the information curve that each group of scenes estimates, without guidance."""
        network, curves = self.muse.base, []
        for start in range(0, len(self.prompts), self.batch):
            part = slice(start, start + self.batch)
            tokens = self.muse.low_tokenizer.encode(to_float(self.images[part]).to(self.muse.device, self.muse.dtype))
            text = self.muse.encoder.encode(self.prompts[part]).to(self.muse.device, self.muse.dtype)
            logits_fn = self.muse.guided(network, network.memory(text), network.memory(text), 0.0)
            curves.append(sampled_curves(logits_fn, tokens, network.mask_id, self.seed + start, points=17))
        return torch.cat(curves).unflatten(0, (GROUPS, -1)).mean(1)

    def draw(self, prompts: list[str], seeds: list[int], sampling: dict[str, Any]) -> tuple[Tensor, int]:
        """See `ModelEvaluator`."""
        jobs = [{"prompt": p, "negative_prompt": None, "seed": s} for p, s in zip(prompts, seeds, strict=True)]
        tokens, nfe = run(self.muse.decode_base(jobs, **sampling), sampling.get("corrector"))
        return self.muse.low_tokenizer.decode(tokens).float(), nfe


class AmusedEvaluator(ModelEvaluator):
    """Published weights, against the first `samples` images of a captioned folder, each with its first caption.

    The guidance is t = 9, and the ranking noise of the order "confidence" aMUSEd's, unless the sampler sets them.
    """

    titles: ClassVar = {"clip": "CLIP score", "fid": "FID to the images of the folder"}
    batch = 16

    def __init__(
        self, amused: "Amused", folder: str | Path, clip: Scorer, features: Features, samples: int = 512, seed: int = 0
    ):
        samples = check_samples(samples)
        grid = amused.transformer.config.sample_size
        source, size = FolderDataset(folder), grid * amused.tokenizer.downsampling
        every = (example for part in range(source.parts) for example in source.read(part, size, Problems()))
        found = list(islice(every, samples))
        enough = len(found) == samples
        require(enough, f"{folder} holds {len(found)} images, samples is {samples}; give more images or fewer samples")
        prompts = [e.captions[0] for e in found]
        super().__init__("aMUSEd", prompts, torch.stack([e.image for e in found]), clip, features, seed)
        self.amused, self.grid, self.codebook_size = amused, (grid, grid), amused.tokenizer.codebook_size

    def draw(self, prompts: list[str], seeds: list[int], sampling: dict[str, Any]) -> tuple[Tensor, int]:
        """See `ModelEvaluator`."""
        from minimuse.amused import settings

        amused = self.amused
        sampling = {"guidance": 9.0, **sampling, "generator": [generator_of(s) for s in seeds]}
        if sampling.get("order") == "confidence":
            sampling.setdefault("choice_temperature", settings(sampling["steps"])["choice_temperature"])
        logits_fn = amused.logits_fn(prompts, guidance=sampling.pop("guidance"))
        start = torch.full((len(prompts), self.grid[0] ** 2), amused.mask_id, device=amused.transformer.device)
        tokens, nfe = run(decode(logits_fn, start, mask_id=amused.mask_id, **sampling), sampling.get("corrector"))
        return amused.tokenizer.decode(tokens).float(), nfe


def open_amused(name: str, folder: str, clip: str, *, device: Any = None, **settings: Any) -> AmusedEvaluator:
    """Names of aMUSEd weights and of a CLIP, a folder of captioned images -> the evaluator of `minimuse compare`."""
    from minimuse.amused import Amused

    require(folder and clip, "--amused needs --data, a folder of captioned pictures, and --clip, the name of a CLIP")
    device = pick_device(device)
    amused = Amused.from_pretrained(name).to(device)
    return AmusedEvaluator(amused, folder, ClipScorer(clip, device), inception_features(), **settings)
