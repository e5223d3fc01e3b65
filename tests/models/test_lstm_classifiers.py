"""The LSTM classifiers: what they compute, parameters, sizes, errors, and the same with our ops."""

import copy

import pytest
import torch
from torch import nn

import pyops
from pyops import models
from pyops.testing import GRADIENT_BUDGET, assert_within_budget


def test_published_parameter_names_and_shapes():
    model = models.lstm128(28, 10)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == {
        **{f"lstm.weight_ih_l{layer}": (512, 128 if layer else 28) for layer in (0, 1)},
        **{f"lstm.weight_hh_l{layer}": (512, 128) for layer in (0, 1)},
        **{f"lstm.bias_{of}_l{layer}": (512,) for of in ("ih", "hh") for layer in (0, 1)},
        "fc.weight": (10, 128),
        "fc.bias": (10,),
    }
    text = models.TextClassifier(50, 8, 16, 4).state_dict()
    assert text["embedding.weight"].shape == (50, 8)
    assert text["lstm.weight_ih_l0"].shape == (64, 8) and text["fc.weight"].shape == (4, 16)


def test_the_classifier_is_the_last_step_and_a_dense_layer():
    model = models.LSTMClassifier(5, 7, 2, 3)
    x = torch.randn(4, 6, 5)
    hidden, _ = nn.LSTM.forward(model.lstm, x)
    want = hidden[:, -1] @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(model(x), want)
    probable = models.lstm128(5, 3)
    out = probable(x)
    torch.testing.assert_close(out.sum(1), torch.ones(4))
    logits = probable.fc(probable.lstm(x)[0][:, -1])
    torch.testing.assert_close(out, logits.softmax(1))
    raw = models.lstm128(5, 3, softmax=False)
    raw.load_state_dict(probable.state_dict())
    torch.testing.assert_close(raw(x), logits)


def test_text_of_any_length_ends_at_its_last_token():
    model = models.TextClassifier(20, 6, 9, 3).eval()
    tokens = torch.randint(1, 20, (4, 7))
    lengths = torch.tensor([3, 7, 1, 5])
    for row, length in enumerate(lengths):
        tokens[row, length:] = 0
    out = model(tokens, lengths)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length])
        torch.testing.assert_close(out[row : row + 1], alone)
    torch.testing.assert_close(out.sum(1), torch.ones(4))
    assert not torch.allclose(out, model(tokens))
    assert model.embedding.weight[0].eq(0).all()


def test_dropout_is_on_the_last_state_in_training_only():
    model = models.TextClassifier(20, 6, 64, 3, dropout=1.0, softmax=False)
    tokens = torch.randint(1, 20, (4, 7))
    torch.testing.assert_close(model(tokens), model.fc.bias.expand(4, 3))
    assert not torch.allclose(model.eval()(tokens), model.fc.bias.expand(4, 3))


CASES = {
    "classifier": (lambda: models.LSTMClassifier(6, 20, 3, 5), (torch.randn(8, 9, 6),)),
    "lstm128": (lambda: models.lstm128(28, 10), (torch.rand(8, 28, 28),)),
    "text": (
        lambda: models.TextClassifier(30, 12, 24, 4, dropout=0.0),
        (torch.randint(0, 30, (8, 11)), torch.tensor([11, 3, 7, 1, 11, 5, 2, 9])),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_with_our_ops_within_budget(name):
    """Output and the gradient of every parameter, in one training step."""
    make, inputs = CASES[name]
    torch.manual_seed(1)
    model = make()
    results = []
    for dtype, fast in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        twin = copy.deepcopy(model).to(dtype)
        if fast:
            report = pyops.optimize(twin)
            assert [entry.place for entry in report.replaced] == ["lstm"]
        args = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
        out = twin(*args)
        grads = torch.autograd.grad(out.square().sum(), list(twin.parameters()))
        results.append((out, *grads))
    for index, triple in enumerate(zip(*results, strict=True)):
        assert_within_budget(*triple, **({"k": GRADIENT_BUDGET} if index else {}))


@pytest.mark.parametrize("argument", ["input_size", "hidden_size", "num_layers", "num_classes"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_bad_counts(argument, value):
    sizes = {"input_size": 4, "hidden_size": 4, "num_layers": 1, "num_classes": 2}
    with pytest.raises(ValueError, match=f"{argument}: expected a positive integer, got {value}"):
        models.LSTMClassifier(**{**sizes, argument: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabulary": 0}, "vocabulary: expected a positive integer, got 0"),
        ({"embedding_size": 1.5}, "embedding_size: expected a positive integer, got 1.5"),
        ({"hidden_size": -2}, "hidden_size: expected a positive integer, got -2"),
        ({"num_classes": False}, "num_classes: expected a positive integer, got False"),
        ({"dropout": 1.5}, "dropout: expected a number between 0 and 1, got 1.5"),
        ({"dropout": "half"}, "dropout: expected a number between 0 and 1, got 'half'"),
        ({"padding": 9}, "padding: expected a token below 9, got 9"),
        ({"padding": -1}, "padding: expected a token below 9, got -1"),
    ],
)
def test_text_classifier_bad_arguments(options, message):
    sizes = {"vocabulary": 9, "embedding_size": 4, "hidden_size": 4, "num_classes": 2}
    with pytest.raises(ValueError, match=message):
        models.TextClassifier(**{**sizes, **options})


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4), (2, 0, 5), (1, 2, 3, 5)])
def test_classifier_bad_inputs(shape):
    model = models.LSTMClassifier(5, 4, 1, 2)
    with pytest.raises(ValueError, match=r"input: expected shape \(batch, steps, 5\)") as caught:
        model(torch.randn(shape))
    assert str(tuple(shape)) in str(caught.value)


def test_text_bad_inputs():
    model = models.TextClassifier(9, 4, 4, 2)
    tokens = torch.zeros(3, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"tokens: expected shape \(batch, steps\).*got \(5,\)"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"lengths: expected shape \(3,\), got \(2,\)"):
        model(tokens, torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="greater than 0"):
        model(tokens, torch.tensor([1, 0, 2]))
