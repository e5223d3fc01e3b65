"""Training LSTMs and Transformers: both kinds of ops alike, resumed bit for bit, held back data kept out."""

import math

import pytest
import torch

from pyops import training
from pyops.text import identifiers
from pyops.training import lstm, transformer

CASES = [(lstm, "digits"), (lstm, "text"), (transformer, "lm"), (transformer, "seq2seq")]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(transformer, "STEPS_PER_EPOCH", 3)


def first_losses(trainer, count=3):
    torch.manual_seed(0)  # dropout
    steps = trainer.steps()
    return [next(steps) for _ in range(count)]


@pytest.mark.parametrize("module, preset", CASES)
def test_fast_and_plain_ops_train_alike(module, preset):
    """The same weights and the same examples: a step differs by rounding only."""
    runs = [module.Trainer(module.Settings(preset=preset), ops) for ops in training.OPS]
    losses, others = (first_losses(run) for run in runs)
    assert math.isclose(losses[0], others[0], rel_tol=1e-5)
    assert losses == pytest.approx(others, rel=1e-3)
    assert len(set(losses)) == 3
    for ours, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-2)


@pytest.mark.parametrize("preset", transformer.PRESETS)
def test_resumed_run_is_bitwise_the_same(preset, tmp_path):
    settings = transformer.Settings(preset=preset)
    whole = transformer.Trainer(settings, "fast")
    whole.train_epoch(), whole.train_epoch()
    first = transformer.Trainer(settings, "fast")
    first.train_epoch()
    first.save(tmp_path / "state.pt")
    torch.rand(10)  # what happens in between must not matter
    second = transformer.Trainer(settings, "fast")
    second.restore(training.read_checkpoint(tmp_path / "state.pt"))
    second.train_epoch()
    assert second.losses == whole.losses
    pairs = zip(second.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_names_to_test_with_are_none_to_train_on():
    words, held_back = transformer._names()
    names = identifiers(transformer.LONGEST)
    assert len(held_back) == len(names) // 10
    known = {w for n in set(names) - set(held_back) for w in n.split("_")}
    assert set(words) == known


def test_whole_name_accuracy_counts_only_names_right_to_the_last_letter(monkeypatch):
    """A model that knows every answer but the last letter of half of them."""
    trainer = transformer.Trainer(transformer.Settings(preset="seq2seq"), "reference")
    _, held_back = transformer._names()
    _, target = transformer._tokens(held_back)
    answers = target[:, 1:].clone()
    last = (answers == transformer.END).float().argmax(1) - 1
    for row in range(0, len(held_back), 2):
        answers[row, last[row]] += 1
    monkeypatch.setattr(trainer.model, "greedy", lambda *_: answers, raising=False)
    accuracy = trainer.evaluate()["whole-name accuracy"]
    assert accuracy == pytest.approx(len(held_back) // 2 / len(held_back))
