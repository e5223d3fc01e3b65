"""What a training run refuses, before the work or in it: damaged states, targets that cannot be written, divergence."""

import os
import stat

import pytest
import torch

from pyops import cli, training
from pyops.data import Dataset, load_digits
from pyops.training import cnn

UNWRITABLE = "/proc"  # for root, too


@pytest.fixture(scope="module")
def few():
    digits = load_digits()
    return Dataset(
        *(digits.train_images[:64], digits.train_labels[:64]),
        *(digits.test_images[:20], digits.test_labels[:20]),
    )


@pytest.fixture
def checkpoint(few, tmp_path):
    path = tmp_path / "state.pt"
    trainer = cnn.Trainer(cnn.Settings(), "fast", data=few)
    trainer.train_epoch()
    trainer.save(path)
    return path


def refused(arguments, capsys, code=2):
    """The one line that a command gives for an error."""
    try:
        assert cli.main(arguments) == code
    except SystemExit as exit:  # argparse's own
        assert exit.code == code
        return capsys.readouterr().err.splitlines()[-1]
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


CHANGES = {
    "no examples a step": ({"settings": {"batch_size": 0}}, "batch_size"),
    "a bool of examples": ({"settings": {"batch_size": True}}, "batch_size"),
    "unknown preset": ({"settings": {"preset": "imagenet"}}, "preset"),
    "learning rate in words": ({"settings": {"learning_rate": "abc"}}, "learning_rate"),
    "infinite learning rate": ({"settings": {"learning_rate": float("inf")}}, "learning_rate"),
    "no learning rate": ({"settings": {"learning_rate": float("nan")}}, "learning_rate"),
    "seed beyond 64 bits": ({"settings": {"seed": 2**64}}, "seed"),
    "unknown setting": ({"settings": {"momentum": 0.9}}, "momentum"),
    "another model": ({"settings": {"model": "lstm"}}, "model"),
    "unknown ops": ({"ops": "faster"}, "ops"),
    "negative epoch": ({"epoch": -3}, "epoch"),
    "epoch a bool": ({"epoch": True}, "epoch"),
    "optimizer a number": ({"optimizers": {"model": 5}}, "optimizers"),
    "optimizer empty": ({"optimizers": {"model": {}}}, "does not fit"),
    "optimizer missing": ({"optimizers": {}}, "does not fit"),
    "modules a list": ({"modules": {"model": [1]}}, "modules"),
    "losses in words": ({"losses": ["low"]}, "losses"),
    "order too short": ({"order": torch.zeros(3, dtype=torch.uint8)}, "does not fit"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_checkpoints_are_refused_in_one_line(what, checkpoint, capsys):
    changes, word = CHANGES[what]
    state = torch.load(checkpoint, weights_only=True)
    settings = {**state["settings"], **changes.get("settings", {})}
    torch.save({**state, **changes, "settings": settings}, checkpoint)
    left = checkpoint.read_bytes()
    error = refused(["train", "cnn", "--resume", str(checkpoint)], capsys)
    assert str(checkpoint) in error and word in error
    assert checkpoint.read_bytes() == left


def test_optimizer_state_of_other_shapes_is_refused(checkpoint, few):
    state = training.read_checkpoint(checkpoint)
    state["optimizers"]["model"]["state"][0]["momentum_buffer"] = torch.zeros(7)
    with pytest.raises(training.CheckpointError, match="does not fit the model"):
        cnn.Trainer(cnn.Settings(), "fast", data=few).restore(state)


@pytest.mark.parametrize("seed", ["99999999999999999999", "1.5", "-9223372036854775809"])
@pytest.mark.parametrize("command", [["train", "cnn"], ["demo"]])
def test_seeds_out_of_range_are_refused(command, seed, capsys):
    error = refused([*command, f"--seed={seed}"], capsys)
    assert "--seed" in error and seed in error


def test_the_largest_seed_trains(few, monkeypatch):
    trainer = cnn.Trainer(cnn.Settings(seed=2**64 - 1), "reference", data=few)
    assert len(trainer.train_epoch()) == 2


def test_divergence_ends_the_run_and_keeps_the_last_good_checkpoint(
    few, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(cnn, "dataset", lambda settings: few)
    path = tmp_path / "state.pt"
    run = ["train", "cnn", "--learning-rate", "1e30", "--checkpoint", str(path), "--epochs", "2"]
    error = refused(run, capsys, code=1)
    assert "epoch 1" in error and "smaller learning rate than 1e+30" in error
    assert not path.exists()

    assert cli.main(["train", "cnn", "--epochs", "1", "--checkpoint", str(path)]) == 0
    capsys.readouterr()
    left = path.read_bytes()
    monkeypatch.setattr(cnn.F, "cross_entropy", lambda logits, labels: logits.sum() * torch.nan)
    error = refused(["train", "cnn", "--resume", str(path), "--epochs", "2"], capsys, code=1)
    assert "epoch 2" in error and "loss is nan" in error
    assert path.read_bytes() == left


def test_weights_that_the_last_step_ruined_are_noticed(few):
    trainer = cnn.Trainer(cnn.Settings(), "reference", data=few)
    steps = trainer.steps

    def ruin():
        yield from steps()
        trainer.model.fc2.bias.data[0] = torch.inf

    trainer.steps = ruin
    with pytest.raises(training.TrainingError, match="weights of the model"):
        trainer.train_epoch()
    assert trainer.epoch == 0


@pytest.mark.skipif(not os.path.isdir(UNWRITABLE), reason="needs a folder that nobody can write to")
@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        ("--out", ["demo", "--out", f"{UNWRITABLE}/x"]),
        ("--out", ["train", "gan", "--out", f"{UNWRITABLE}/x/y"]),
        ("--checkpoint", ["train", "cnn", "--checkpoint", f"{UNWRITABLE}/a.pt"]),
        ("--out", ["bench", "conv_relu_pool", "--shapes", "cpu", "--out", f"{UNWRITABLE}/x"]),
    ],
)
def test_targets_that_cannot_be_written_are_refused_at_the_start(option, arguments, capsys):
    error = refused(arguments, capsys)
    assert f"{option}: cannot write to {UNWRITABLE}" in error
    assert capsys.readouterr().out == ""


def test_a_file_on_the_way_is_named_and_left(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("mine")
    error = refused(["demo", "--out", str(path / "deeper")], capsys)
    assert f"--out: cannot write to {path}" in error
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_permissions_are_the_umasks(umask, mode, few, tmp_path):
    before = os.umask(umask)
    try:
        cnn.Trainer(cnn.Settings(), "reference", data=few).save(tmp_path / "state.pt")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state.pt").stat().st_mode) == mode
