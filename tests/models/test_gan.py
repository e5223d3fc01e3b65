"""The GAN models: shapes, labels, what they refuse, and that their gradients reach everything."""

import pytest
import torch

from pyops.models import gan

PAIRS = {
    "dense": (gan.DenseGenerator, gan.DenseDiscriminator, {}, 28),
    "dcgan28": (gan.DCGANGenerator, gan.DCGANDiscriminator, {"image_size": 28, "width": 8}, 28),
    "dcgan64": (gan.DCGANGenerator, gan.DCGANDiscriminator, {"image_size": 64, "width": 4}, 64),
}


def pair(name, num_classes=None):
    generator, discriminator, options, size = PAIRS[name]
    options = {**options, "num_classes": num_classes}
    return generator(latent_dim=12, **options), discriminator(**options), size


@pytest.mark.parametrize("num_classes", [None, 10])
@pytest.mark.parametrize("name", PAIRS)
def test_noise_becomes_images_and_images_probabilities(name, num_classes):
    torch.manual_seed(0)
    generator, discriminator, size = pair(name, num_classes)
    labels = None if num_classes is None else torch.tensor([1, 2, 9])
    images = generator(torch.randn(3, 12), labels)
    assert images.shape == (3, 1, size, size)
    assert images.abs().max() <= 1
    real = discriminator(images, labels)
    assert real.shape == (3, 1) and (real > 0).all() and (real < 1).all()
    real.sum().backward()
    for model in (generator, discriminator):
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", PAIRS)
def test_labels_matter(name):
    torch.manual_seed(0)
    generator, discriminator, _ = (
        m.eval() if isinstance(m, torch.nn.Module) else m for m in pair(name, 10)
    )
    noise = torch.randn(1, 12).expand(2, -1)
    images = generator(noise, torch.tensor([3, 4]))
    assert not torch.equal(images[0], images[1])
    same = images[:1].expand(2, -1, -1, -1)
    scores = discriminator.logits(same, torch.tensor([3, 4]))
    assert not torch.equal(scores[0], scores[1])


def test_dcgan_layers_are_the_published_ones():
    layers = gan.DCGANGenerator(64, latent_dim=100, width=64, channels=3).layers
    shapes = [tuple(m.weight.shape) for m in layers if isinstance(m, torch.nn.ConvTranspose2d)]
    assert shapes == [
        *((100, 512, 4, 4), (512, 256, 4, 4), (256, 128, 4, 4)),
        *((128, 64, 4, 4), (64, 3, 4, 4)),
    ]
    layers = gan.DCGANDiscriminator(64, width=64, channels=3).layers
    shapes = [tuple(m.weight.shape) for m in layers if isinstance(m, torch.nn.Conv2d)]
    assert shapes == [(64, 3, 4, 4), (128, 64, 4, 4), (256, 128, 4, 4), (512, 256, 4, 4)]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: gan.DCGANGenerator(32), "image_size: expected 28 or 64, got 32"),
        (lambda: gan.DCGANDiscriminator(width=0), "width: expected a positive integer"),
        (lambda: gan.DenseGenerator(latent_dim=-1), "latent_dim"),
        (lambda: gan.DenseGenerator()(torch.randn(2, 3)), r"noise: expected shape \(batch, 100\)"),
        (
            lambda: gan.DenseGenerator()(torch.randn(2, 100), torch.tensor([1, 2])),
            "labels: expected none, got some",
        ),
        (
            lambda: gan.DenseGenerator(num_classes=10)(torch.randn(2, 100)),
            "labels: expected classes below 10, got none",
        ),
        (
            lambda: gan.DCGANDiscriminator(num_classes=10)(
                torch.randn(2, 1, 28, 28), torch.tensor([1.0, 2.0])
            ),
            "labels: expected int64",
        ),
        (
            lambda: gan.DCGANDiscriminator()(torch.randn(2, 1, 32, 32)),
            "input: expected images of 28x28",
        ),
        (lambda: gan.DCGANDiscriminator()(torch.randn(2, 3, 28, 28)), "input: expected shape"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
