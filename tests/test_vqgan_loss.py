"""vqgan_loss.py: perceptual, patch-adversarial, and their balance (Muse 2.2)."""

import builtins
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minimuse.eval_metrics import feature_distance, lpips_distance
from minimuse.eval_networks import SceneFeatures
from minimuse.vqgan_loss import (
    PatchDiscriminator,
    VQGANLoss,
    adaptive_weight,
    hinge_discriminator,
    pixel_loss,
)


def images(seed=0, size=16):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Generator(nn.Module):
    """One convolution: the smallest decoder with a last layer."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.last(x)


@pytest.mark.parametrize(
    ("real", "fake", "loss"),
    [
        ([2.0, 1.0], [-1.0, -5.0], 0.0),  # beyond the margins: nothing left to learn
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([0.5, 3.0], [-0.5, 1.0], 0.5 * (0.25 + 1.25)),  # (0.5 + 0) / 2, (0.5 + 2) / 2
        ([-1.0], [1.0], 2.0),
    ],
)
def test_hinge_by_hand(real, fake, loss):
    got = hinge_discriminator(torch.tensor(real), torch.tensor(fake)).item()
    assert got == pytest.approx(loss), f"half of mean max(0, 1 - {real}) + mean max(0, 1 + {fake})"


def test_the_discriminator_judges_patches():
    net, x = PatchDiscriminator(8), images(size=32)
    assert net(x).shape == (2, 1, 4, 4), "a logit for each 8 x 8 pixels"
    x.requires_grad_()
    (grad,) = torch.autograd.grad(net(x)[0, 0, 0, 0], x)
    assert grad[0, :, :8, :8].abs().sum() > 0, "a patch's logit does not see its patch"
    assert grad[1].eq(0).all(), "a patch's logit sees another image"


def test_adaptive_weight_by_hand():
    """Gradients (2, 2, 1) and (4, 3, 0) have the norms 3 and 5."""
    weight = adaptive_weight(torch.tensor([[2.0, 2.0, 1.0], [4.0, 3.0, 0.0]]))
    assert weight.item() == pytest.approx(3 / 5.0001), "the ratio of the norms, with the 1e-4 of VQGAN's code"
    assert adaptive_weight(torch.tensor([[1e6], [0.0]])).item() == 1e4, "an adversarial loss without gradient"


# --- perceptual -------------------------------------------------------------------------------------------------------


def test_feature_distance_by_hand():
    """Features (3, 4) and (4, 3) have the directions (0.6, 0.8) and (0.8, 0.6); (0, 1) and (1, 0) are 2 apart."""

    def features(x):
        return [x, torch.stack([x[:, 0] > x[:, 1], x[:, 0] <= x[:, 1]], 1).float()]

    a, b = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([4.0, 3.0]).view(1, 2, 1, 1)
    assert feature_distance(features)(a, b).item() == pytest.approx(0.04 + 0.04 + 2), (
        "0.08 at one level, 2 at the other"
    )
    assert feature_distance(features)(a, 10 * a).item() == pytest.approx(0, abs=1e-6), (
        "directions count, lengths do not"
    )


def test_feature_distance_of_scene_features():
    net = SceneFeatures(5, width=8)
    distance, x = feature_distance(net), images()
    assert distance(x, x).item() == 0, "equal images are no distance apart"
    near, far = distance(x, x + 0.02 * torch.randn_like(x)).item(), distance(x, images(1)).item()
    assert 0 < near < far, f"a trace of noise is {near} away, another image {far}"
    assert distance(x, images(1)).item() == pytest.approx(distance(images(1), x).item()), "the same both ways"
    y = images(1).requires_grad_()
    distance(x, y).backward()
    assert y.grad.abs().sum() > 0, "no gradient reaches the picture"


def test_scene_features_shapes():
    net, x = SceneFeatures(5, width=8), images(size=32)
    assert [tuple(f.shape) for f in net(x)] == [(2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)], "1/2, 1/4, 1/8"
    assert net.classify(x).shape == (2, 5), "one logit per class"


def test_lpips_is_an_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "lpips":
            raise ImportError("No module named 'lpips'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"minimuse\[lpips\]"):
        lpips_distance()


def test_lpips_is_frozen_and_averaged(monkeypatch):
    """A stand-in with the interface of the package: the real one downloads its weights."""
    made = []

    class LPIPS(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.kind, self.weight = net, nn.Parameter(torch.ones(()))
            made.append(self)

        def forward(self, x, y):
            return self.weight * (x - y).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
    x, y = images(0), images(1)
    assert lpips_distance()(x, y).item() == pytest.approx(F.l1_loss(x, y).item()), "the mean over the batch"
    assert made[0].kind == "vgg", "VQGAN's features"
    assert not made[0].training, "pitfall 18: a frozen network in train mode"
    assert not made[0].weight.requires_grad, "pitfall 18: a frozen network with gradients"


# --- the whole loss ---------------------------------------------------------------------------------------------------


def test_pixels_alone():
    loss = VQGANLoss(adversarial_weight=0.0)
    x, y = images(0), images(1)
    assert loss.generator_loss(x, y, torch.zeros(1), 0).item() == pytest.approx(pixel_loss(x, y).item()), "pixels alone"
    assert loss.discriminator is None, "no weight, no discriminator"
    assert not list(loss.parameters()), "nothing to train"
    assert not loss.active(10**9), "it is never active"


def test_perceptual_is_weighted():
    loss = VQGANLoss(lambda x, y: torch.tensor(2.0), perceptual_weight=0.05, adversarial_weight=0.0)
    x, y = images(0), images(1)
    expected = pixel_loss(x, y).item() + 0.05 * 2
    assert loss.generator_loss(x, y, torch.zeros(1), 0).item() == pytest.approx(expected), "w_p = 0.05 (Muse A.2)"


def test_the_papers_weights_are_the_default():
    loss = VQGANLoss(lambda x, y: x.sum())
    assert (loss.perceptual_weight, loss.adversarial_weight) == (0.05, 0.1), "Muse A.2"


def test_the_adversarial_term_starts_late():
    torch.manual_seed(0)
    loss, net, x = VQGANLoss(adversarial_start=5), Generator(), images()
    assert [loss.active(s) for s in (0, 4, 5, 6)] == [False, False, True, True], "from step 5 on"
    made = net(x)
    pixels = pixel_loss(made, x).item()
    assert loss.generator_loss(x, made, net.last.weight, 4).item() == pytest.approx(pixels), "before: pixels alone"
    fooled = -loss.discriminator(made).mean()
    sides = [torch.autograd.grad(l, net.last.weight, retain_graph=True)[0] for l in (pixel_loss(made, x), fooled)]
    weight = adaptive_weight(torch.stack(sides))
    expected = pixels + 0.1 * (weight * fooled).item()
    got = loss.generator_loss(x, made, net.last.weight, 5)
    assert got.item() == pytest.approx(expected, rel=1e-5), "then w_a * lambda * -D(x')"
    assert got.item() != pytest.approx(pixels, rel=1e-6), "this example cannot tell the two apart"
    given = loss.generator_loss(x, made, net.last.weight, 5, torch.tensor(7.0)).item()
    assert given == pytest.approx(pixels + 0.7 * fooled.item(), rel=1e-5), "lambda may be given"


def test_the_width_of_the_discriminator_is_a_setting():
    loss = VQGANLoss(discriminator_width=48)
    assert loss.discriminator[0][0].out_channels == 48


def test_balanced_gradients_at_the_last_layer():
    """lambda makes the adversarial gradient there as long as the reconstruction's; w_a = 0.1 then scales it."""
    torch.manual_seed(0)
    loss, net, x = VQGANLoss(), Generator(), images()
    made = net(x)
    (whole,) = torch.autograd.grad(loss.generator_loss(x, made, net.last.weight, 0), net.last.weight, retain_graph=True)
    (pixels,) = torch.autograd.grad(pixel_loss(made, x), net.last.weight)
    ratio = ((whole - pixels).norm() / pixels.norm()).item()
    assert ratio == pytest.approx(0.1, rel=0.05), f"the adversarial fraction of the gradient is {ratio:.3f}"


def test_the_generator_is_pushed_towards_what_looks_real():
    torch.manual_seed(0)
    loss, net, x = VQGANLoss(adversarial_weight=100.0), Generator(), images()
    before = loss.discriminator(net(x)).mean().item()
    loss.generator_loss(x, net(x), net.last.weight, 0).backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 1e-3 * p.grad / p.grad.norm()
    assert loss.discriminator(net(x)).mean().item() > before, "the pictures look less real to the discriminator"


def test_the_discriminator_loss_sends_no_gradient_to_the_generator():
    torch.manual_seed(0)
    loss, net, x = VQGANLoss(), Generator(), images()
    discriminator_loss = loss.discriminator_loss(x, net(x))
    discriminator_loss.backward()
    assert all(p.grad is None for p in net.parameters()), "the discriminator loss reaches the generator"
    weights = [p for p in loss.discriminator.parameters() if p.ndim > 1]
    assert all(p.grad.abs().sum() > 0 for p in weights), "the discriminator learns nothing"
    expected = hinge_discriminator(loss.discriminator(x), loss.discriminator(net(x)))
    assert discriminator_loss.item() == pytest.approx(expected.item()), "hinge of real and made"


def test_pixel_loss_by_hand():
    made, images = torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.0])
    assert pixel_loss(made, images).item() == pytest.approx(0.25 + 4 * 0.125), "mean |e| + 4 mean e^2, e = 0 and 1/2"
