"""attn_implementation="pyops" against transformers' own, in small models of random weights."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from pyops.integrations import transformers as integration
from pyops.testing import GRADIENT_BUDGET, assert_within_budget

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
ROTARY = {**SMALL, **WIDE, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert():
    config = transformers.BertConfig(**SMALL, **WIDE, **NO_DROPOUT, num_attention_heads=4)
    return transformers.BertForMaskedLM(config)


def gpt2():
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**SMALL, **dropout, n_embd=48, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**ROTARY))


def mistral():  # a sliding window, shorter than the text
    config = transformers.MistralConfig(**ROTARY, sliding_window=4)
    return transformers.MistralForCausalLM(config)


def gemma2():  # soft-capping, every other layer with a window; scale not head_dim ** -0.5
    config = transformers.Gemma2Config(
        **ROTARY, sliding_window=4, attn_logit_softcapping=0.5, query_pre_attn_scalar=3
    )
    return transformers.Gemma2ForCausalLM(config)


def gpt_oss():  # attention sinks
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = transformers.GptOssConfig(
        **ROTARY, **experts, experts_implementation="eager", sliding_window=4
    )  # the other experts take no float64
    return transformers.GptOssForCausalLM(config)


def t5():  # a bias learned from relative positions, in encoder and decoder
    config = transformers.T5Config(
        **SMALL,
        d_model=48,
        d_kv=12,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def bart():
    sides = {
        f"{s}_{n}": v
        for s in ("encoder", "decoder")
        for n, v in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
    }
    config = transformers.BartConfig(**SMALL, **sides, d_model=48, dropout=0.0)
    return transformers.BartForConditionalGeneration(config)


CAUSAL = (gpt2, llama, mistral, gemma2, gpt_oss)
ENCODER_DECODER = (t5, bart)
NO_SDPA = (gemma2, gpt_oss)  # soft-capping and sinks: there is only "eager" to compare with


@pytest.fixture(autouse=True)
def _registered():
    integration.register()
    yield
    integration.unregister()


def make(build, dtype=torch.float32):
    torch.manual_seed(0)
    model = build()
    for name, parameter in model.named_parameters():
        if "bias" in name or "norm" in name.lower() or "sinks" in name:
            nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.3)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.to(dtype).eval()


def padded(build):
    """(inputs, what is valid (batch, seqlen)): the second text is shorter, on the side its model pads."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 61, (2, 9), generator=generator)
    mask = torch.ones_like(tokens)
    gone = slice(0, 3) if build in CAUSAL else slice(6, 9)
    tokens[1, gone], mask[1, gone] = 0, 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if build in ENCODER_DECODER:
        inputs["decoder_input_ids"] = torch.randint(3, 61, (2, 7), generator=generator)
        return inputs, torch.ones(2, 7, dtype=torch.bool)
    return inputs, mask.bool()


def run(model, implementation, inputs, valid):
    """Logits where the text is, and the gradients of all parameters."""
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    logits = model(**inputs).logits[valid]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight.to(logits.dtype)).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits, found


@pytest.mark.parametrize("pad", (True, False), ids=("padded", "full"))
@pytest.mark.parametrize("build", (bert, *CAUSAL, *ENCODER_DECODER))
def test_logits_and_gradients(build, pad):
    model = make(build)
    inputs, valid = padded(build)
    if not pad:
        inputs, valid = dict(inputs, attention_mask=None), torch.ones_like(valid)
    best, best_grads = run(copy.deepcopy(model).double(), "eager", inputs, valid)
    ours, grads = run(model, "pyops", inputs, valid)
    for other in ("eager",) if build in NO_SDPA else ("eager", "sdpa"):
        theirs, their_grads = run(model, other, inputs, valid)
        assert_within_budget(ours, theirs, best, name=f"logits, {other}")
        assert grads.keys() == their_grads.keys() == best_grads.keys()
        # All gradients as one: in a single bias, plain torch's error is now and then nothing at all.
        flat = [
            torch.cat([g[n].flatten() for n in grads]) for g in (grads, their_grads, best_grads)
        ]
        assert_within_budget(*flat, GRADIENT_BUDGET, f"gradients, {other}")


@pytest.mark.parametrize("build", (*CAUSAL, *ENCODER_DECODER))
def test_generate_with_a_cache(build):
    model = make(build)
    inputs, _ = padded(build)
    inputs.pop("decoder_input_ids", None)
    made = []
    for implementation in ("pyops", "eager" if build in NO_SDPA else "sdpa"):
        model.set_attn_implementation(implementation)
        made.append(model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=True))
    assert torch.equal(*made)
    assert made[0].shape[1] > 2


def test_a_static_cache():
    model = make(llama)
    inputs = {"input_ids": padded(llama)[0]["input_ids"][:1]}
    made = []
    for implementation in ("pyops", "sdpa"):
        model.set_attn_implementation(implementation)
        made.append(
            model.generate(
                **inputs,
                max_new_tokens=6,
                do_sample=False,
                cache_implementation="static",
                disable_compile=True,
            )
        )
    assert torch.equal(*made)


def test_our_kernels_are_what_runs(monkeypatch):
    calls = []
    forward = integration.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(args[1].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(integration, "scaled_dot_product_attention", counted)
    model = make(llama)
    model.set_attn_implementation("pyops")
    model(**padded(llama)[0])
    assert calls == [2, 2]  # a call a layer, the two key/value heads not repeated


def test_chosen_at_construction_and_given_up():
    config = transformers.LlamaConfig(**ROTARY, attn_implementation="pyops")
    assert transformers.LlamaForCausalLM(config).config._attn_implementation == "pyops"
    integration.register()  # once more does no harm
    integration.unregister()
    integration.unregister()
    with pytest.raises(ValueError, match="pyops"):
        transformers.LlamaForCausalLM(config)


class Layer(nn.Module):
    is_causal = True


def test_the_causal_rules():
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 7, 8)

    def call(q, k, mask=None, **options):
        return integration.attention_forward(Layer(), q, k, k, mask, **options)[0].transpose(1, 2)

    def want(q, k, hidden):
        scores = (q @ k.mT * 8**-0.5).masked_fill(hidden, -torch.inf)
        return scores.softmax(-1) @ k

    after = torch.ones(4, 7, dtype=torch.bool).triu(1)
    no = torch.zeros(1, dtype=torch.bool)
    close = torch.testing.assert_close
    close(call(query, key), want(query, key, after))  # the diagonal starts at the first key
    close(call(query, key, is_causal=False), want(query, key, no))
    close(call(query[:, :, :1], key), want(query[:, :, :1], key, no))  # decoding
    gaps = torch.arange(7) % 3 == 1  # a mask counts alone
    close(call(query, key, ~gaps.expand(1, 1, 4, 7)), want(query, key, gaps))
    few = key[:, :, :3]
    close(call(query, few), want(query, few, after[:, :3]))
    distance = torch.arange(4)[:, None] - torch.arange(4)
    hidden = (distance < 0) | (distance >= 2)
    close(call(query, query, sliding_window=2), want(query, query, hidden))
    bias = torch.randn(1, 2, 4, 7)
    scores = query @ key.mT * 8**-0.5 + bias
    close(
        call(query, key, position_bias=bias),
        scores.masked_fill(after, -torch.inf).softmax(-1) @ key,
    )


def test_dropout_reaches_the_kernel():
    x = torch.randn(1, 2, 64, 8)
    ones = torch.ones_like(x)
    output, weights = integration.attention_forward(Layer(), x, x, ones, None, dropout=0.5)
    assert weights is None and output.shape == (1, 64, 2, 8)
    assert output.std() > 0.05 and output.mean().item() == pytest.approx(1.0, abs=0.2)


def test_without_transformers_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="needs transformers"):
        integration.register()
    monkeypatch.undo()
