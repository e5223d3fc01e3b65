"""The Transformers: against torch's and Hugging Face's, masks, caches, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F

from pyops.models.transformer import (
    GPT,
    BertConfig,
    BertForClassification,
    BertForMaskedLM,
    Transformer,
    sinusoidal_positions,
)


def test_positions_are_the_published_formula():
    table = sinusoidal_positions(50, 8)
    for place, i in ((0, 0), (3, 1), (49, 3)):
        angle = place / 10000 ** (2 * i / 8)
        assert table[place, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert table[place, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-5)
    assert sinusoidal_positions(5, 7).shape == (5, 7)


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    return Transformer(20, 25, 16, 4, 2, 32, dropout=0.0).eval()


def test_padding_changes_nothing(transformer):
    source, target = torch.randint(1, 20, (1, 6)), torch.randint(1, 25, (1, 5))
    alone = transformer(source, target)
    together = transformer(F.pad(source, (0, 3)), F.pad(target, (0, 2)))
    torch.testing.assert_close(together[:, :5], alone)


def test_target_sees_only_what_comes_before(transformer):
    source, target = torch.randint(1, 20, (2, 6)), torch.randint(1, 25, (2, 7))
    scores = transformer(source, target)
    changed = target.clone()
    changed[:, 4] = 1 + changed[:, 4] % 24
    other = transformer(source, changed)
    assert torch.equal(scores[:, :4], other[:, :4])
    assert not torch.allclose(scores[:, 4:], other[:, 4:])


def test_greedy_with_its_cache_is_greedy_without(transformer):
    source = torch.randint(1, 20, (3, 6))
    source[1, 4:] = 0
    made = transformer.greedy(source, 1, 2, 9)
    tokens = torch.ones(3, 1, dtype=torch.long)
    done = torch.zeros(3, dtype=torch.bool)
    for _ in range(made.shape[1]):
        chosen = transformer(source, tokens)[:, -1].argmax(-1).masked_fill(done, 0)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
        done |= chosen == 2
    assert torch.equal(tokens[:, 1:], made)


def test_finished_rows_go_on_with_padding(transformer):
    with torch.no_grad():
        transformer.head.weight.zero_()
        transformer.head.bias.zero_()
        transformer.head.bias[2] = 1
    made = transformer.greedy(torch.randint(1, 20, (2, 4)), 1, 2, 9)
    assert made.tolist() == [[2], [2]]


def test_gpt_is_causal_and_its_cache_changes_nothing():
    torch.manual_seed(0)
    model = GPT(30, 16, 16, 4, 2).eval()
    tokens = torch.randint(0, 30, (2, 16))
    scores = model(tokens)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 30
    assert torch.equal(model(changed)[:, :9], scores[:, :9])
    made = model.generate(tokens[:, :5], 8, temperature=0)
    slow = tokens[:, :5]
    for _ in range(8):
        slow = torch.cat([slow, model(slow)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, slow)
    assert model.generate(tokens[:, :15], 8).shape == (2, 16)
    assert model.head.weight is model.tokens.weight


def test_gpt_draws_by_its_generator():
    model = GPT(30, 16, 16, 4, 1).eval()
    tokens = torch.randint(0, 30, (2, 2))
    drawn = [
        model.generate(tokens, 10, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


SMALL = BertConfig(60, 32, 2, 4, 48, 24)


def test_bert_is_hugging_faces():
    """Its state_dict loads, and gives the same scores for a padded batch."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    names += ("intermediate_size", "max_position_embeddings")
    config = transformers.BertConfig(**{n: getattr(SMALL, n) for n in names})
    theirs = transformers.BertForMaskedLM(config).eval()
    ours = BertForMaskedLM(SMALL).eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")}
    ours.load_state_dict(state)
    assert ours.state_dict().keys() == state.keys()
    tokens = torch.randint(1, 60, (3, 11))
    types = torch.randint(0, 2, (3, 11))
    mask = (torch.arange(11) < torch.tensor([11, 4, 7])[:, None]).long()
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask, token_type_ids=types).logits
        found = ours(tokens, mask, types)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    predictions = ours.cls.predictions
    assert predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight


def test_bert_learns_to_classify():
    torch.manual_seed(0)
    model = BertForClassification(SMALL, 2)
    tokens = torch.randint(4, 60, (32, 8))
    labels = torch.arange(32) % 2
    tokens[:, 3] = 2 + labels  # the class is one token among others
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Transformer(20, 20, dim=15), "heads: expected a divisor of dim 15"),
        (lambda: Transformer(0, 20), "source_size: expected a positive integer"),
        (lambda: GPT(dim=10, heads=4), "heads: expected a divisor of dim 10"),
        (lambda: GPT(context=4)(torch.zeros(1, 5, dtype=torch.long)), r"tokens: expected shape \(batch, at most 4\)"),
        (lambda: GPT()(torch.zeros(5, dtype=torch.long)), "tokens: expected shape"),
        (lambda: BertForMaskedLM(BertConfig(60, 30, 1, 4)), "num_attention_heads: expected a divisor"),
        (lambda: BertForMaskedLM(SMALL)(torch.zeros(1, 25, dtype=torch.long)), "input_ids: expected shape"),
        (
            lambda: BertForMaskedLM(SMALL)(torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 4)),
            "attention_mask: expected the shape of input_ids",
        ),
        (lambda: BertForClassification(SMALL, 0), "num_labels"),
    ],
)  # fmt: skip
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
