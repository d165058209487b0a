"""What a sampler costs in a trained model: are its pictures right, and do they look like real ones?

    MuseJudge     the base model of a Muse alone, its low-resolution pictures of held-out scenes
        accuracy  share of pictures that have everything their prompt names (`eval_detector.py`, `eval_prompts.py`)
        frechet   Frechet distance of the detector's features to those of renders of the very scenes
    AmusedJudge   published weights, on the captions of a folder of pictures (extras `amused`, `metrics`)
        clip      CLIP score, the mean cosine of picture and prompt
        fid       Frechet distance of Inception's features to those of the folder's pictures

Picture i has prompt i and seed i in every cell, so that cells compare pair by pair. As in `judge.py` each measure is
kept as GROUPS values: means of groups, or jackknife pseudo-values of the distance, whose mean is free of a bias c / n.
That asks for n well above the number of features (192 of the detector); with fewer, compare only equal n. Where all
pictures are right, or all wrong, the accuracy's interval is 0: no error can be seen, and `eval_metrics.proportion_interval` does better.
Not here: the whole cascade and its prompt sets, the comparison of many samplers (`lab.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from minimuse.cfg import guided
from minimuse.data_images import area_downsample
from minimuse.data_sources import Problems, SceneDataset
from minimuse.eval_detector import Detector
from minimuse.eval_metrics import Features, frechet_distance, in_batches, inception_features
from minimuse.eval_prompts import matches, parse_prompt
from minimuse.judge import GROUPS, Outcome, check_samples, drawn
from minimuse.muse import Muse, sampling_settings
from minimuse.sampler import Order
from minimuse.utils import content_hash

if TYPE_CHECKING:
    from minimuse.amused import Amused

Scorer = Callable[[Tensor, Sequence[str]], Tensor]  # images (B, 3, H, W), B prompts -> (B,), more is better


def jackknife(statistic: Callable[[Tensor], float], rows: Tensor) -> list[float]:
    """Rows (n, ...) -> GROUPS pseudo-values G S - (G - 1) S(all but one group): S without its bias c / n, their mean.

    G divides n.
    """
    parts, whole = rows.chunk(GROUPS), statistic(rows)
    without = [statistic(torch.cat(parts[:g] + parts[g + 1 :])) for g in range(GROUPS)]
    return [GROUPS * whole - (GROUPS - 1) * s for s in without]


def right(detector: Detector) -> Scorer:
    """-> images, prompts -> (B,), 1.0 where the picture has everything that its prompt names."""

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = zip(detector.detect(images), prompts, strict=True)
        return torch.tensor([float(matches(reading, parse_prompt(p)).right) for reading, p in seen])

    return score


class PictureJudge:
    """Prompts with a seed each, a scorer, real pictures to be like. A subclass draws, and names both measures."""

    n: int
    v: int
    titles: dict[str, str]

    def __init__(self, prompts: list[str], real: Tensor, score: Scorer, features: Features, seed: int, batch: int):
        check_samples(len(prompts))
        self.prompts, self.score, self.features, self.seed, self.batch = prompts, score, features, seed, batch
        self.real, level = in_batches(features, real), in_batches(score, real, prompts)  # (n, D), (n,)
        self.about = {"pictures": len(prompts), "seed": seed, "prompts": content_hash(prompts)[:16]}
        # rounded, since threads add up in another order: what tells a scorer, features and pictures from others
        levels = {next(iter(self.titles)): level, "features": self.real}
        self.about["real pictures"] = {k: round(x.double().mean().item(), 4) for k, x in levels.items()}

    def order(self, name: str) -> str | Order:
        """Grids are square here, as `sampler.halton` asks."""
        return name

    def draw(self, prompts: list[str], sampling: dict[str, Any], draws: Any) -> tuple[Tensor, int]:
        """B prompts, B generators -> images (B, 3, H, W) in [-1, 1], and their forward passes."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, **sampling: Any) -> Outcome:
        """What `draw` takes -> the groups' means of the score, and the distance's pseudo-values."""
        scores, seen, passes = [], [], 0
        for start in range(0, len(self.prompts), self.batch):
            prompts = self.prompts[start : start + self.batch]
            draws = [torch.Generator().manual_seed(1_000_003 * self.seed + start + i) for i in range(len(prompts))]
            images, took = self.draw(prompts, sampling, draws)
            scores.append(self.score(images, prompts).double().cpu())
            seen.append(self.features(images).cpu())
            passes += took
        each = torch.cat(scores).view(GROUPS, -1).mean(1).tolist()
        distances = jackknife(lambda fake: frechet_distance(self.real, fake), torch.cat(seen))
        return Outcome(passes / len(self.prompts), dict(zip(self.titles, (each, distances), strict=True)))


class MuseJudge(PictureJudge):
    """Samplers of a Muse's base model. Choice: of it alone, since it decides what is where, at a fraction of the cost.

    The prompts are captions of `samples` scenes of split "test" with one or two things. What a sampler does not say
    comes from the checkpoint: guidance, temperature, and the ranking noise where the order is the checkpoint's own.
    """

    titles: ClassVar = {
        "accuracy": "pictures with all that is asked for",
        "frechet": "Frechet distance of detector features",
    }

    def __init__(self, muse: Muse, samples: int = 512, seed: int = 0, batch: int = 64):
        check_samples(samples)
        side, low = (getattr(muse.config, f"{name}_tokenizer").image_size for name in ("high", "low"))
        scenes = SceneDataset(samples, side, "test", seed, fractions=(1, 1, 0), k=1)
        detector, prompts = Detector.from_pretrained().to(muse.device), [scenes.captions(i)[0] for i in range(samples)]
        super().__init__(
            prompts, area_downsample(scenes.images(), side // low), right(detector), detector.features, seed, batch
        )
        self.muse, self.n, self.v = muse, muse.config.base.tokens, muse.config.base.codebook_size

    def identity(self) -> dict[str, Any]:
        muse = self.muse
        parts = [muse.base.state_dict(), muse.low_tokenizer.state_dict(), asdict(muse.config.base_sampling)]
        weights = content_hash(*parts, muse.config.text_encoder)[:16]
        return {"target": f"{muse.config.name}, base model alone", "weights": weights, **self.about}

    def draw(self, prompts: list[str], sampling: dict[str, Any], draws: Any) -> tuple[Tensor, int]:
        """B prompts -> the base model's images (B, 3, H, W), and how many forward passes they took."""
        muse, base = self.muse, self.muse.base
        text, null = muse.contexts([{"prompt": p, "negative_prompt": None} for p in prompts])
        t, sampling = sampling_settings(muse.config.base_sampling, sampling)
        logits_fn = guided(base, base.memory(text), base.memory(null), t)
        start = torch.full((len(prompts), self.n), base.mask_id, device=muse.device)
        tokens, passes = drawn(logits_fn, start, base.mask_id, generator=draws, **sampling)
        return muse.low_tokenizer.decode(tokens).float(), passes


class AmusedJudge(PictureJudge):
    """Samplers of published weights, against the first `samples` pictures of a captioned folder (`data_sources.py`).

    score: such as `ClipScorer(name)`; features: Inception's by default. A picture's first caption is its prompt.
    guidance is constant at t = 9 unless a sampler says so; the ranking noise is aMUSEd's where none is given and the
    order is "confidence".
    """

    titles: ClassVar = {"clip": "CLIP score", "fid": "FID to the folder's pictures"}

    def __init__(
        self,
        amused: "Amused",
        folder: str | Path,
        score: Scorer,
        features: Features | None = None,
        samples: int = 512,
        seed: int = 0,
        batch: int = 16,
    ):
        from minimuse.data_sources import FolderDataset

        check_samples(samples)
        grid = amused.transformer.config.sample_size
        source, found = FolderDataset(folder), []
        for part in range(source.parts):
            found += source.read(part, grid * amused.tokenizer.downsampling, Problems()) if len(found) < samples else ()
        if len(found) < samples:
            raise ValueError(
                f"{folder} holds {len(found)} usable pictures; give samples={len(found) // GROUPS * GROUPS}"
            )
        real = torch.stack([e.image for e in found[:samples]])
        prompts, features = [e.captions[0] for e in found[:samples]], features or inception_features()
        super().__init__(prompts, real, score, features, seed, batch)
        self.amused, self.n, self.v = amused, grid**2, amused.tokenizer.codebook_size

    def identity(self) -> dict[str, Any]:
        return {"target": "aMUSEd", "weights": content_hash(self.amused.state_dict())[:16], **self.about}

    def draw(self, prompts: list[str], sampling: dict[str, Any], draws: Any) -> tuple[Tensor, int]:
        """B prompts -> images of the published weights (B, 3, H, W), and how many forward passes they took."""
        from minimuse.amused import settings

        amused, how = self.amused, dict(sampling)
        if how.get("order") == "confidence":
            how.setdefault("choice_temperature", settings(how["steps"])["choice_temperature"])
        logits_fn = amused.logits_fn(prompts, guidance=how.pop("guidance", 9.0))
        start = torch.full((len(prompts), self.n), amused.mask_id, device=amused.transformer.device)
        tokens, passes = drawn(logits_fn, start, amused.mask_id, generator=draws, **how)
        return amused.decode(tokens).float(), passes
