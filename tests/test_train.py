"""Training on real digits, and checkpoints: resumed bit for bit, refused when damaged."""

import re

import pytest
import torch

from pyops import cli, training
from pyops.data import Dataset, load_digits, randomly_shifted
from pyops.training import cnn
from pyops.training.checkpoint import FORMAT


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def few(digits):
    """200 images: seven steps an epoch."""
    return Dataset(
        digits.train_images[:200],
        digits.train_labels[:200],
        digits.test_images[:50],
        digits.test_labels[:50],
    )


def same(a, b):
    """Bitwise equality of nested dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_digits_are_split_evenly_and_always_alike(digits):
    assert digits.train_images.shape == (1437, 1, 28, 28)
    assert digits.test_images.shape == (360, 1, 28, 28)
    assert digits.train_images.min() >= 0 and digits.train_images.max() <= 1
    counts = torch.bincount(digits.test_labels)
    assert counts.min() >= 34 and counts.max() <= 38
    again = load_digits()
    assert torch.equal(again.train_images, digits.train_images)
    assert torch.equal(again.test_labels, digits.test_labels)


def test_digits_at_another_size_and_in_colour():
    data = load_digits(32, channels=3)
    assert data.test_images.shape == (360, 3, 32, 32)
    assert torch.equal(data.test_images[:, 0], data.test_images[:, 2])


def test_shifted_images_keep_their_content():
    images = torch.zeros(64, 1, 9, 9)
    images[:, 0, 4, 4] = 1
    moved = randomly_shifted(images, 2, torch.Generator().manual_seed(0))
    assert moved.sum() == 64
    places = moved.flatten(1).argmax(1)
    rows, columns = places // 9, places % 9
    for places in (rows, columns):
        assert places.min() == 2 and places.max() == 6


def test_missing_scikit_learn_is_named(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    assert cli.main(["train", "cnn"]) == 2
    assert "scikit-learn" in capsys.readouterr().err


@pytest.mark.parametrize("ops", training.OPS)
def test_training_is_repeatable_and_learns(few, ops):
    runs = []
    for _ in range(2):
        trainer = cnn.Trainer(cnn.Settings(), ops, data=few)
        losses = [trainer.train_epoch() for _ in range(4)]
        runs.append((losses, trainer.model.state_dict()))
    assert same(runs[0], runs[1])
    assert sum(runs[0][0][-1]) < sum(runs[0][0][0])


def test_seed_decides_weights_and_order(few):
    first = [next(cnn.Trainer(cnn.Settings(seed=s), "fast", data=few).steps()) for s in (1, 2)]
    assert first[0] != first[1]


def test_building_a_trainer_leaves_the_global_generator_alone(few):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cnn.Trainer(cnn.Settings(), "fast", data=few)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("ops", training.OPS)
def test_resumed_run_is_bitwise_the_same(few, ops, tmp_path):
    path = tmp_path / "state.pt"
    whole = cnn.Trainer(cnn.Settings(), ops, data=few)
    for _ in range(4):
        whole.train_epoch()
    first = cnn.Trainer(cnn.Settings(), ops, data=few)
    for _ in range(2):
        first.train_epoch()
    first.save(path)
    torch.rand(10)  # what happens in between must not matter
    second = cnn.Trainer(cnn.Settings(), ops, data=few)
    second.restore(training.read_checkpoint(path))
    assert second.epoch == 2
    for _ in range(2):
        second.train_epoch()
    assert second.losses == whole.losses
    assert same(second.model.state_dict(), whole.model.state_dict())
    assert same(second.optimizers["model"].state_dict(), whole.optimizers["model"].state_dict())


def test_command_resumes_where_it_stopped(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cnn, "dataset", lambda settings: few)
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    assert cli.main(["train", "cnn", "--epochs", "2", "--checkpoint", str(whole)]) == 0
    assert cli.main(["train", "cnn", "--epochs", "1", "--checkpoint", str(parts)]) == 0
    capsys.readouterr()
    assert cli.main(["train", "cnn", "--epochs", "2", "--resume", str(parts)]) == 0
    text = capsys.readouterr().out
    assert "resumed" in text and "epoch 2/2" in text and "epoch 1/2" not in text
    a, b = training.read_checkpoint(whole), training.read_checkpoint(parts)
    assert same(a, b)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.pt", "whole.pt"]


@pytest.fixture
def checkpoint(few, tmp_path):
    path = tmp_path / "state.pt"
    trainer = cnn.Trainer(cnn.Settings(), "fast", data=few)
    trainer.train_epoch()
    trainer.save(path)
    return path


@pytest.mark.parametrize("share", (0.0, 0.001, 0.5, 0.999))
def test_cut_off_checkpoint_is_refused_and_kept(checkpoint, share, capsys):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(len(content) * share)])
    left = checkpoint.read_bytes()
    assert cli.main(["train", "cnn", "--resume", str(checkpoint)]) == 2
    error = capsys.readouterr().err
    assert "not a readable checkpoint" in error and error.count("\n") == 1
    assert checkpoint.read_bytes() == left


def test_other_files_are_no_checkpoints(tmp_path, capsys):
    for name, content in {"weights": {"weight": torch.ones(2)}, "list": [1, 2]}.items():
        path = tmp_path / name
        torch.save(content, path)
        assert cli.main(["train", "cnn", "--resume", str(path)]) == 2
        assert "not a checkpoint of pyops" in capsys.readouterr().err


class Harmful:
    def __reduce__(self):
        return (print, ("code from the file ran",))


def test_checkpoint_runs_no_code(tmp_path, capsys):
    path = tmp_path / "harmful.pt"
    torch.save({"format": FORMAT, "model": Harmful()}, path)
    assert cli.main(["train", "cnn", "--resume", str(path)]) == 2
    assert "code from the file ran" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ("settings", "epoch", "optimizers", "order", "version"))
def test_checkpoint_that_lacks_something_is_refused(checkpoint, key, capsys):
    state = torch.load(checkpoint, weights_only=True)
    del state[key]
    torch.save(state, checkpoint)
    left = checkpoint.read_bytes()
    assert cli.main(["train", "cnn", "--resume", str(checkpoint)]) == 2
    assert str(checkpoint) in capsys.readouterr().err
    assert checkpoint.read_bytes() == left


@pytest.mark.parametrize(
    ("argument", "value"), [("--preset", "cifar"), ("--seed", "3"), ("--batch-size", "8")]
)
def test_checkpoint_of_another_run_is_refused(checkpoint, argument, value, capsys):
    left = checkpoint.read_bytes()
    assert cli.main(["train", "cnn", argument, value, "--resume", str(checkpoint)]) == 2
    assert argument.strip("-") in capsys.readouterr().err
    assert checkpoint.read_bytes() == left


def test_checkpoint_with_other_weights_is_refused(checkpoint, few, capsys):
    state = torch.load(checkpoint, weights_only=True)
    state["modules"]["model"]["fc2.weight"] = torch.zeros(3, 3)
    torch.save(state, checkpoint)
    left = checkpoint.read_bytes()
    assert cli.main(["train", "cnn", "--resume", str(checkpoint)]) == 2
    error = capsys.readouterr().err
    assert "does not fit the model" in error and error.count("\n") == 1
    assert checkpoint.read_bytes() == left


def test_existing_checkpoint_is_not_overwritten(checkpoint, capsys):
    left = checkpoint.read_bytes()
    assert cli.main(["train", "cnn", "--checkpoint", str(checkpoint)]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert checkpoint.read_bytes() == left


def test_interrupted_save_leaves_the_old_checkpoint(checkpoint, few, monkeypatch):
    left = checkpoint.read_bytes()
    trainer = cnn.Trainer(cnn.Settings(), "fast", data=few)

    def cut_off(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        trainer.save(checkpoint)
    assert checkpoint.read_bytes() == left
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_both_kinds_of_ops_side_by_side(few, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cnn, "dataset", lambda settings: few)
    assert cli.main(["train", "cnn", "--epochs", "1", "--ops", "both"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ops")[0] for line in lines[-2:]] == ["reference", "fast"]
    losses = [re.search(r"loss ([\d.]+)", line)[1] for line in lines if "epoch 1/1" in line]
    assert len(losses) == 2 and abs(float(losses[0]) - float(losses[1])) < 0.01
    path = str(tmp_path / "state.pt")
    assert cli.main(["train", "cnn", "--ops", "both", "--checkpoint", path]) == 2
    assert "--ops both" in capsys.readouterr().err
