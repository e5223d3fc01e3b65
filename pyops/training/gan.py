"""Class-conditional GANs on handwritten digits, judged by a classifier trained on real ones.

Losses: "standard" (non-saturating, Goodfellow et al. 2014), "wgan-gp" (Gulrajani et al. 2017), "r1"
(non-saturating with a penalty on the gradient at real images, Mescheder et al. 2018).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.data import Dataset, load_digits
from pyops.models import gan
from pyops.training import cnn, trainer

PRESETS = ("dcgan28", "dcgan64", "dense")
LOSSES = ("standard", "wgan-gp", "r1")
EPOCHS = 12
CLASSES = 10
IMAGE_SIZES = {"dcgan28": 28, "dcgan64": 64, "dense": 28}
CRITIC_STEPS = 2  # of the discriminator for each of the generator, with wgan-gp
PENALTY = {"wgan-gp": 10.0, "r1": 1.0}


@dataclass(frozen=True)
class Settings:
    """What a run is determined by, besides the machine it runs on."""

    model: str = "gan"
    preset: str = "dcgan28"
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 0.0005
    loss: str = "standard"
    width: int = 32
    latent_dim: int = 64


def build_models(settings: Settings) -> dict[str, nn.Module]:
    """Generator and discriminator in plain torch, their parameters determined by the seed alone."""
    latent, size = settings.latent_dim, IMAGE_SIZES[settings.preset]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.preset == "dense":
            return {
                "generator": gan.DenseGenerator(latent, num_classes=CLASSES),
                "discriminator": gan.DenseDiscriminator(num_classes=CLASSES),
            }
        return {
            "generator": gan.DCGANGenerator(size, latent, settings.width, num_classes=CLASSES),
            "discriminator": gan.DCGANDiscriminator(size, settings.width, num_classes=CLASSES),
        }


class Trainer(trainer.Trainer):
    """Alternating training; the loss of a step is the discriminator's, `generator_losses` the other's."""

    def __init__(
        self,
        settings: Settings,
        ops: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        data: Dataset | None = None,
    ) -> None:
        if settings.loss not in LOSSES:
            raise ValueError(f"loss: expected one of {LOSSES}, got {settings.loss!r}")
        super().__init__(settings, ops, build_models(settings), device, dtype)
        self.data = (data or load_digits(IMAGE_SIZES[settings.preset])).to(self.device, dtype)
        self.generator: Any = self.modules["generator"]
        self.discriminator: Any = self.modules["discriminator"]
        betas = (0.0, 0.9) if settings.loss == "wgan-gp" else (0.5, 0.999)
        for name, module in self.modules.items():
            self.optimizers[name] = torch.optim.Adam(
                module.parameters(), settings.learning_rate, betas
            )
        self.generator_losses: list[float] = []

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train_labels) // self.settings.batch_size

    def describe(self) -> str:
        return f"{len(self.data.train_labels)} images of real digits, {self.settings.loss} loss"

    def noise(self, count: int) -> Tensor:
        noise = torch.randn(count, self.settings.latent_dim, generator=self.order)
        return noise.to(self.device, self.data.train_images.dtype)

    def steps(self) -> Iterator[float]:
        self.generator.train()
        self.discriminator.train()
        size = self.settings.batch_size
        order = torch.randperm(len(self.data.train_labels), generator=self.order)
        for index, chosen in enumerate(order[: self.steps_per_epoch * size].split(size)):
            chosen = chosen.to(self.device)
            images, labels = self.data.train_images[chosen] * 2 - 1, self.data.train_labels[chosen]
            loss = self.discriminator_step(images, labels)
            if self.settings.loss != "wgan-gp" or index % CRITIC_STEPS == CRITIC_STEPS - 1:
                self.generator_losses.append(self.generator_step(labels))
            yield loss

    def discriminator_step(self, images: Tensor, labels: Tensor) -> float:
        """One step on real `images`, in [-1, 1], and as many made ones; returns the loss."""
        kind = self.settings.loss
        with torch.no_grad():
            made = self.generator(self.noise(len(labels)), labels)
        logits = functools.partial(self.discriminator.logits, labels=labels)
        images = images.detach().requires_grad_(kind == "r1")
        real, fake = logits(images), logits(made)
        if kind == "wgan-gp":
            loss = fake.mean() - real.mean()
            share = torch.rand(len(labels), 1, 1, 1, generator=self.order).to(images)
            between = torch.lerp(images, made, share).requires_grad_()
            norm = _gradient(logits(between), between).flatten(1).norm(dim=1)
            loss = loss + PENALTY[kind] * (norm - 1).square().mean()
        else:
            loss = F.softplus(-real).mean() + F.softplus(fake).mean()
            if kind == "r1":
                squared = _gradient(real, images).flatten(1).square().sum(1).mean()
                loss = loss + PENALTY[kind] / 2 * squared
        return self._step("discriminator", loss)

    def generator_step(self, labels: Tensor) -> float:
        """One step of the generator; returns its loss."""
        made = self.generator(self.noise(len(labels)), labels)
        score = self.discriminator.logits(made, labels)
        loss = -score.mean() if self.settings.loss == "wgan-gp" else F.softplus(-score).mean()
        return self._step("generator", loss)

    def _step(self, name: str, loss: Tensor) -> float:
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()
        return loss.item()

    @torch.no_grad()
    def make_images(self, labels: Tensor, seed: int = 0) -> Tensor:
        """(count, 1, height, width) in [0, 1], the same noise for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(labels), self.settings.latent_dim, generator=generator)
        noise = noise.to(self.device, self.data.train_images.dtype)
        self.generator.eval()
        images: Tensor = self.generator(noise, labels.to(self.device))
        return (images + 1) / 2

    def evaluate(self) -> dict[str, float]:
        """How often the classifier recognises what was asked for, and the Fréchet distance."""
        labels = torch.arange(50 * CLASSES, device=self.device) % CLASSES
        made = self.make_images(labels).float()
        judge = classifier(IMAGE_SIZES[self.settings.preset]).to(self.device)
        with torch.no_grad():
            right = (judge(made).argmax(1) == labels).float().mean().item()
            real = self.data.test_images.float()
            distance = frechet_distance(features(judge, made), features(judge, real))
        return {"sample accuracy": right, "Fréchet distance": distance}

    def sample_grid(self, rows: int = 8) -> Tensor:
        """(rows * height, 10 * width) in [0, 1]: a column for each digit."""
        labels = torch.arange(rows * CLASSES, device=self.device) % CLASSES
        made = self.make_images(labels).float()
        size = made.shape[-1]
        grid = made.view(rows, CLASSES, size, size).transpose(1, 2)
        return grid.reshape(rows * size, CLASSES * size).clamp(0, 1).cpu()

    def write_pictures(self, folder: Path) -> list[Path]:
        """Writes the grid of samples after this epoch, and the loss curve so far."""
        from pyops.training.pictures import write_curves, write_gray

        grid = folder / f"gan_{self.ops}_epoch{self.epoch:03d}.png"
        curves = folder / f"gan_{self.ops}_losses.png"
        write_gray(grid, self.sample_grid())
        write_curves(
            curves, {"discriminator": self.losses, "generator": self.generator_losses}, "step"
        )
        return [grid, curves]


def _gradient(output: Tensor, input: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(output.sum(), input, create_graph=True)
    return gradient


@functools.cache
def classifier(image_size: int) -> nn.Module:
    """The small CNN, trained on the real digits; always the same."""
    settings = cnn.Settings(preset="mnist")
    judge = cnn.Trainer(settings, "reference")
    for _ in range(6):
        judge.train_epoch()
    model = judge.model.eval().requires_grad_(False)
    if image_size == 28:
        return model
    return nn.Sequential(nn.AdaptiveAvgPool2d(28), model)


def features(model: nn.Module, images: Tensor) -> Tensor:
    """(count, 64): what the classifier's last layer sees."""
    seen: list[Tensor] = []
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return seen[0]


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the normal distributions with the means and covariances of two sets of features.

    a, b: (count, dim). Source: Dowson and Landau, 1982; Heusel et al. 2017 for judging GANs.
    """
    a, b = a.double(), b.double()
    difference = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The trace of the root of cov_a @ cov_b, from its eigenvalues, which are real and not negative.
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return (difference + cov_a.trace() + cov_b.trace() - 2 * roots).item()
