"""A training step of the DCGAN pair with each loss, with the fast ops and with plain torch."""

import pytest
import torch

from pyops.training.gan import LOSSES, Settings, Trainer


@pytest.mark.parametrize("ops", ("fast", "reference"))
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("preset", ("dcgan28", "dcgan64"))
def test_training_step(benchmark, timed, device, preset, loss, ops):
    """One step of each model on 64 images; the first must give the losses of plain torch."""
    benchmark.group = f"{preset} {loss}"
    trainer = Trainer(Settings(preset=preset, loss=loss, width=64), ops, device)
    images = trainer.data.train_images[:64] * 2 - 1
    labels = trainer.data.train_labels[:64]

    def step():
        return [trainer.discriminator_step(images, labels), trainer.generator_step(labels)]

    if ops == "fast":
        plain = Trainer(trainer.settings, "reference", device)
        expected = [plain.discriminator_step(images, labels), plain.generator_step(labels)]
        torch.testing.assert_close(step(), expected, rtol=1e-3, atol=1e-4)
    timed(step)
