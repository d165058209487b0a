"""The losses that train a VQGAN: pixels, perceptual features, a patch discriminator (Muse 2.2, A.2).

    generator loss      pixel_loss(x, x') + w_p * perceptual(x, x') - w_a * lambda * mean D(x')
    discriminator loss  the hinge loss, (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x'))) / 2

A perceptual loss is any function (x, x') -> (): LPIPS, or a distance of features that were trained on scenes.
Glossary: x images, x' reconstructions, D discriminator, w_p = 0.05 and w_a = 0.1 (A.2), lambda `adaptive_weight`.
Not here: the quantizer's losses (`vqgan.py`), the training loop (`train.py`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Perceptual = Callable[[Tensor, Tensor], Tensor]
Weight = Tensor | Callable[[Tensor], Tensor]  # lambda, or the function that computes it
COMMITMENT = 0.25  # weight of the quantizer's commitment loss (VQGAN)


def pyramid(width: int) -> list[nn.Module]:
    """images (B, 3, H, W) -> maps of 1/2, 1/4 and 1/8 of the size: a module for each."""
    sizes = [(3, width), (width, 2 * width), (2 * width, 4 * width)]
    return [nn.Sequential(nn.Conv2d(*size, 4, stride=2, padding=1), nn.LeakyReLU(0.2)) for size in sizes]


class PatchDiscriminator(nn.Sequential):
    """images (B, 3, H, W) -> one logit per patch, (B, 1, H/8, W/8), high where it looks real (pix2pix's PatchGAN).

    Choice: three layers and no normalization; VQGAN's has width 64 and BatchNorm.
    """

    def __init__(self, width: int = 32):
        super().__init__(*pyramid(width), nn.Conv2d(4 * width, 1, 3, padding=1))


def pixel_loss(made: Tensor, images: Tensor) -> Tensor:
    """mean |x - x'| + 4 mean (x - x')^2.

    Choice: VQGAN has only |x - x'|; the square weighs the large errors of small objects (benchmarks/choices.md).
    """
    return F.l1_loss(made, images) + 4 * F.mse_loss(made, images)


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Logits of real and of reconstructed patches -> (): (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x'))) / 2."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(gradients: Tensor) -> Tensor:
    """Gradients of both losses at the decoder's last layer, (2, ...) -> |first| / (|second| + 1e-4) (VQGAN 3.2)."""
    # 1e-4 and the limit 1e4 are those of VQGAN's code; its paper has 1e-6 and no limit
    reconstruction, adversarial = gradients.flatten(1).norm(dim=1)
    return (reconstruction / (adversarial + 1e-4)).clamp(0, 1e4)


class VQGANLoss(nn.Module):
    """The losses of a tokenizer, without the quantizer's. Its only parameters are the discriminator's."""

    def __init__(
        self, perceptual: Perceptual | None = None, perceptual_weight: float = 0.05, adversarial_weight: float = 0.1,
        adversarial_start: int = 0, discriminator_width: int = 32,
    ):  # fmt: skip
        super().__init__()
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight if perceptual else 0.0
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.discriminator = PatchDiscriminator(discriminator_width) if adversarial_weight else None

    def active(self, step: int) -> bool:
        """Is the adversarial term part of the loss at this step?"""
        return self.discriminator is not None and step >= self.adversarial_start

    def generator_loss(
        self, images: Tensor, made: Tensor, last_layer: Tensor, step: int, weight: Weight = adaptive_weight
    ) -> Tensor:
        """images, made (B, 3, H, W) -> (): pixels + perceptual + balanced adversarial term; weight is lambda."""
        loss = pixel_loss(made, images)
        if self.perceptual_weight:
            loss = loss + self.perceptual_weight * self.perceptual(images, made)
        if self.active(step):
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            fooled = -torch.func.functional_call(self.discriminator, frozen, made).mean()
            if callable(weight):
                gradients = [torch.autograd.grad(x, last_layer, retain_graph=True)[0] for x in (loss, fooled)]
                weight = weight(torch.stack(gradients))
            loss = loss + self.adversarial_weight * weight.detach() * fooled
        return loss

    def discriminator_loss(self, images: Tensor, made: Tensor) -> Tensor:
        """images, made (B, 3, H, W) -> (): the hinge loss. No gradient reaches the images."""
        return hinge_discriminator(*self.discriminator(torch.cat([images, made.detach()])).chunk(2))
