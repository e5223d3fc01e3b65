"""Training GANs on real digits: losses, penalties, the judge, pictures, and resuming."""

import math

import pytest
import torch

from pyops import cli, training
from pyops.data import Dataset, load_digits
from pyops.training import gan
from pyops.training.pictures import write_gray


@pytest.fixture(scope="module")
def few():
    digits = load_digits()
    return Dataset(
        digits.train_images[:128],
        digits.train_labels[:128],
        digits.test_images[:50],
        digits.test_labels[:50],
    )


def settings(**changed):
    return gan.Settings(**{"width": 8, "latent_dim": 16, "batch_size": 32, **changed})


@pytest.mark.parametrize("loss", gan.LOSSES)
@pytest.mark.parametrize("preset", ["dcgan28", "dense"])
def test_fast_and_plain_ops_train_alike(few, preset, loss):
    """The same numbers are drawn, so a step differs by rounding only."""
    runs = [gan.Trainer(settings(preset=preset, loss=loss), ops, data=few) for ops in training.OPS]
    before = [p.clone() for p in runs[0].discriminator.parameters()]
    losses, others = (run.train_epoch() for run in runs)
    assert math.isclose(losses[0], others[0], rel_tol=1e-4)
    assert len(losses) == runs[0].steps_per_epoch == 4
    assert all(map(math.isfinite, losses + runs[0].generator_losses))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(before, runs[0].discriminator.parameters(), strict=True)
    )


def test_penalties_pull_the_gradient_where_they_should(few):
    """After some steps on the same batch the critic's gradient norm is nearer to 1."""
    torch.manual_seed(0)
    trainer = gan.Trainer(settings(loss="wgan-gp", learning_rate=0.002), "fast", data=few)
    images, labels = few.train_images[:32] * 2 - 1, few.train_labels[:32]

    def norm():
        x = images.clone().requires_grad_()
        (g,) = torch.autograd.grad(trainer.discriminator.logits(x, labels).sum(), x)
        return g.flatten(1).norm(dim=1).mean().item()

    before = norm()
    for _ in range(40):
        trainer.discriminator_step(images, labels)
    assert abs(norm() - 1) < abs(before - 1)


def test_judge_knows_real_digits_and_not_noise():
    digits = load_digits()
    judge = gan.classifier(28)
    with torch.no_grad():
        right = (judge(digits.test_images).argmax(1) == digits.test_labels).float().mean()
    assert right > 0.95
    real = gan.features(judge, digits.test_images)
    others = gan.features(judge, digits.train_images[:360])
    noise = gan.features(judge, torch.rand(360, 1, 28, 28))
    assert gan.frechet_distance(real, others) * 10 < gan.frechet_distance(real, noise)


def test_frechet_distance_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 2, generator=generator)
    assert abs(gan.frechet_distance(a, a)) < 1e-6
    # N(0, 1) to N(m, s^2) in each dimension: m^2 + (1 - s)^2
    assert gan.frechet_distance(a, 3 * a + 2) == pytest.approx(2 * (4 + 4), rel=0.05)


def test_command_writes_pictures_and_resumes(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gan, "load_digits", lambda size: few)
    common = ["train", "gan", "--batch-size", "32", "--out", str(tmp_path / "pictures")]
    monkeypatch.setattr(gan.Trainer, "evaluate", lambda self: {"sample accuracy": 0.5})
    for epochs, state in (("2", "whole"), ("1", "parts")):
        path = str(tmp_path / state)
        assert cli.main([*common, "--epochs", epochs, "--checkpoint", path]) == 0
    assert cli.main([*common, "--epochs", "2", "--resume", str(tmp_path / "parts")]) == 0
    whole, parts = (training.read_checkpoint(tmp_path / n) for n in ("whole", "parts"))
    assert whole["losses"] == parts["losses"] and len(whole["losses"]) == 8
    for name, tensor in whole["modules"]["generator"].items():
        assert torch.equal(tensor, parts["modules"]["generator"][name]), name
    names = sorted(p.name for p in (tmp_path / "pictures").iterdir())
    assert names == ["gan_fast_epoch001.png", "gan_fast_epoch002.png", "gan_fast_losses.png"]
    assert "sample accuracy 50.00%" in capsys.readouterr().out


def test_png_holds_the_image(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    image = torch.linspace(0, 1, 12).view(3, 4)
    write_gray(tmp_path / "x.png", image)
    read = torch.from_numpy(pyplot.imread(tmp_path / "x.png"))
    torch.testing.assert_close(read, (image * 255).round() / 255)


def test_unknown_loss_is_refused(few):
    with pytest.raises(ValueError, match="loss: expected one of"):
        gan.Trainer(settings(loss="hinge"), "fast", data=few)
