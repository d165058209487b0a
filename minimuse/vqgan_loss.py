"""What trains a VQGAN besides its quantizer: pixels, perceptual features, a patch discriminator (Muse 2.2, A.2).

    loss = pixel_loss(x, x') + w_p * perceptual(x, x') + w_a * lambda * hinge(D(x'))
           + codebook loss + 0.25 * commitment loss

The weights w_p = 0.05, w_a = 0.1 are Muse's (A.2). lambda balances the gradients of the two families (VQGAN 3.2), and
the adversarial term starts late, when there is something worth telling from real.
Perceptual losses are a plug, any (x, x') -> (): `feature_distance` over `SceneFeatures`, a small network trained on
scenes, which needs no download; or `lpips_distance()`, the extra `lpips`, for those who can fetch its weights.

Not here: the quantizer's losses (`vqgan.py`), the training loops (`train.py`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Perceptual = Callable[[Tensor, Tensor], Tensor]
COMMITMENT = 0.25  # VQGAN


def _down(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), nn.LeakyReLU(0.2))


class PatchDiscriminator(nn.Module):
    """images (B, 3, H, W) -> a logit a patch (B, 1, H/8, W/8), high where it looks real (VQGAN; pix2pix's PatchGAN)."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.layers = nn.Sequential(
            _down(3, width), _down(width, 2 * width), _down(2 * width, 4 * width), nn.Conv2d(4 * width, 1, 3, padding=1)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def pixel_loss(made: Tensor, images: Tensor) -> Tensor:
    """|x - x'| + 4 (x - x')^2, both means.

    Choice: the paper is silent and VQGAN takes |x - x'| alone; the square weighs the large errors of small things.
    On scenes it kept cyan from becoming blue: colours read right after the 64 px tokenizer 76% -> 100%.
    """
    return F.l1_loss(made, images) + 4 * F.mse_loss(made, images)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Logits of real and of reconstructed patches -> (): mean max(0, 1 - D(x)) + mean max(0, 1 + D(x')), halved."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, most: float = 1e4) -> Tensor:
    """VQGAN 3.2: lambda = |grad reconstruction| / (|grad adversarial| + 1e-4), at the decoder's last layer."""
    (r,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (a,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (r.norm() / (a.norm() + 1e-4)).clamp(0, most).detach()


class SceneFeatures(nn.Module):
    """images (B, 3, H, W) -> features at 1/2, 1/4 and 1/8 of the size; `classify` says which kinds of thing are there.

    Trained on scenes by `train.train_features`. It is for losses alone: nothing that measures shares its weights.
    """

    def __init__(self, kinds: int, width: int = 32):
        super().__init__()
        self.stages = nn.ModuleList([_down(3, width), _down(width, 2 * width), _down(2 * width, 4 * width)])
        self.head = nn.Linear(4 * width, kinds)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        return features

    def classify(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> logits (B, kinds): is a thing of this kind in the picture?"""
        return self.head(self(images)[-1].amax((2, 3)))


def feature_distance(features: Callable[[Tensor], list[Tensor]]) -> Perceptual:
    """LPIPS without learned weights: squared distance of channel-normalized features, over levels and places."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        pairs = zip(features(x), features(y), strict=True)
        return sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean() for a, b in pairs)

    return distance


def lpips_distance() -> Perceptual:
    """LPIPS with VGG features, as VQGAN; the weights are downloaded by the extra at first use."""
    try:
        import lpips
    except ImportError as e:
        raise ImportError('LPIPS is an extra: pip install "minimuse[lpips]"') from e
    net = lpips.LPIPS(net="vgg").eval().requires_grad_(False)
    return lambda x, y: net.to(x.device)(x, y).mean()


class VQGANLoss(nn.Module):
    """The whole loss of a tokenizer; its only parameters are the discriminator's."""

    def __init__(
        self,
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 0.05,
        adversarial_weight: float = 0.1,
        adversarial_start: int = 0,
    ):
        super().__init__()
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight if perceptual else 0.0
        self.adversarial_weight, self.adversarial_start = adversarial_weight, adversarial_start
        self.discriminator = PatchDiscriminator() if adversarial_weight else None

    def adversarial(self, step: int) -> bool:
        """Does the discriminator play yet?"""
        return self.discriminator is not None and step >= self.adversarial_start

    def generator(self, images: Tensor, made: Tensor, last_layer: Tensor, step: int) -> Tensor:
        """images, made (B, 3, H, W) -> (): pixels + perceptual + balanced adversarial."""
        loss = pixel_loss(made, images)
        if self.perceptual_weight:
            loss = loss + self.perceptual_weight * self.perceptual(images, made)
        if self.adversarial(step):
            frozen = {k: p.detach() for k, p in self.discriminator.named_parameters()}
            fooled = -torch.func.functional_call(self.discriminator, frozen, made).mean()
            loss = loss + self.adversarial_weight * adaptive_weight(loss, fooled, last_layer) * fooled
        return loss

    def critic(self, images: Tensor, made: Tensor, discriminator: nn.Module | None = None) -> Tensor:
        """images, made (B, 3, H, W) -> (): the discriminator's hinge loss; no gradient reaches the generator.

        `discriminator` is the same one as its engine wrapped it for several processes.
        """
        logits = (discriminator or self.discriminator)(torch.cat([images, made.detach()]))
        return hinge_discriminator(*logits.chunk(2))
