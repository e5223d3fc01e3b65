"""Attention swapped into models: literal calls, nn.MultiheadAttention, torch's Transformer layers."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyops
from pyops.models.transformer import GPT, BertConfig, BertForMaskedLM, Transformer


@pytest.fixture
def counted(monkeypatch):
    """The shapes of the queries that our op has run."""
    from pyops.ops import sdpa

    seen = []

    def counting(original):
        def call(query, *args):
            result = original(query, *args)
            if result is not None:
                seen.append(tuple(query.shape))
            return result

        return call

    for name in ("top_left_attention", "plain_attention"):
        monkeypatch.setattr(sdpa, name, counting(getattr(sdpa, name)))
    return seen


class Calls(nn.Module):
    """Attention called in two ways, one of them with the weights that our op does not give."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.proj(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y + nn.functional.scaled_dot_product_attention(y, k, v, scale=0.3)
        return y.transpose(1, 2).flatten(2)


def test_literal_calls(counted):
    torch.manual_seed(0)
    model, x = Calls(), torch.randn(2, 7, 8)
    plain = model(x)
    assert not counted
    report = pyops.optimize(model)
    assert [e.pattern for e in report.replaced] == ["attention"] * 2
    assert [e.place.split(":")[0] for e in report.replaced] == ["forward"] * 2
    torch.testing.assert_close(model(x), plain)
    assert counted == [(2, 2, 7, 4)] * 2
    pyops.restore(model)
    assert torch.equal(model(x), plain) and len(counted) == 2
    assert "forward" not in model.__dict__


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def small_bert():
    config = BertConfig(50, 16, 2, 4, 32, 20)
    tokens = torch.randint(1, 50, (3, 11))
    mask = (torch.arange(11) < torch.tensor([11, 5, 8])[:, None]).long()
    return BertForMaskedLM(config), (tokens, mask), 2


def small_gpt():
    return GPT(30, 16, 16, 2, 3), (torch.randint(0, 30, (2, 16)),), 3


def small_transformer():
    source, target = torch.randint(1, 20, (3, 9)), torch.randint(1, 20, (3, 7))
    source[0, 5:] = 0
    return Transformer(20, 20, 16, 2, 2, 32, 0.0), (source, target), 6


class OfTorch(nn.Module):
    def __init__(self, norm_first):
        super().__init__()
        self.transformer = nn.Transformer(
            16, 2, 2, 2, 32, 0.0, batch_first=True, norm_first=norm_first
        )

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)


def torchs_transformer(norm_first=False):
    return OfTorch(norm_first), (torch.randn(3, 9, 16), torch.randn(3, 7, 16)), 6


MODELS = {
    "bert": small_bert,
    "gpt": small_gpt,
    "transformer": small_transformer,
    "nn.Transformer": torchs_transformer,
    "nn.Transformer, norm first": lambda: torchs_transformer(True),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, training, counted):
    torch.manual_seed(0)
    model, inputs, calls = MODELS[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    model.train(training)
    plain = model(*inputs)
    plain_grads = gradients(model, plain.square().mean())
    report = pyops.optimize(model)
    assert len(report.replaced) >= calls, str(report)
    out = model(*inputs)
    assert len(counted) == calls
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(model, out.square().mean()), plain_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    counted.clear()
    clone = copy.deepcopy(model)
    torch.testing.assert_close(clone(*inputs), plain, rtol=1e-4, atol=1e-5)
    assert len(counted) == calls
    pyops.restore(model)
    counted.clear()
    assert torch.equal(model(*inputs), plain) and not counted


def test_inference_of_torchs_encoder_reaches_the_op(counted):
    """Torch's own shortcut would never call the attention module; padded batches become nested there."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(3, 9, 16)
    padding = torch.arange(9) >= torch.tensor([9, 4, 6])[:, None]
    with torch.no_grad():
        plain, padded = model(x), model(x, src_key_padding_mask=padding)
        pyops.optimize(model)
        torch.testing.assert_close(model(x), plain, rtol=1e-4, atol=1e-5)
        assert len(counted) == 2
        torch.testing.assert_close(
            model(x, src_key_padding_mask=padding), padded, rtol=1e-4, atol=1e-5
        )
        assert len(counted) == 4


def test_multihead_attention_with_weights_stays_torchs(counted):
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)
    output, weights = model(x, x, x)
    pyops.optimize(model)
    again, same = model(x, x, x)
    assert torch.equal(again, output) and torch.equal(same, weights) and not counted
    model(x, x, x, need_weights=False)
    assert len(counted) == 1


def test_skipped_modules_are_reported():
    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict(
        {"own": Own(8, 2), "added": nn.MultiheadAttention(8, 2, add_bias_kv=True)}
    )
    report = pyops.optimize(model)
    assert not report.replaced
    whys = {e.place: e.why for e in report.skipped}
    assert "not exactly nn.MultiheadAttention" in whys["own"]
    assert "add_bias_kv" in whys["added"]


def test_hooks_run(counted):
    model, x = nn.MultiheadAttention(8, 2), torch.randn(5, 2, 8)
    pyops.optimize(model)
    calls = []
    model.register_forward_hook(lambda *a: calls.append(1))
    model(x, x, x, need_weights=False)
    assert calls == [1] and len(counted) == 1


def test_pickled_model_comes_back_plain(counted):
    model = GPT(30, 16, 16, 2, 1)
    pyops.optimize(model)
    loaded = pickle.loads(pickle.dumps(model))
    loaded(torch.randint(0, 30, (1, 4)))
    assert not counted


def test_compiled_without_graph_break():
    torch.manual_seed(0)
    model, inputs, _ = small_gpt()
    plain = model(*inputs)
    pyops.optimize(model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), plain, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_generation_with_a_cache_is_the_same():
    torch.manual_seed(0)
    model = GPT(30, 24, 16, 2, 2).eval()
    start = torch.randint(0, 30, (2, 3))
    plain = model.generate(start, 12, temperature=0)
    pyops.optimize(model)
    assert torch.equal(model.generate(start, 12, temperature=0), plain)
