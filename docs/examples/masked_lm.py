"""Masked language modelling: train a small BERT on Python's documentation, then fill in [MASK]."""

from __future__ import annotations

import argparse
import copy
import re

import torch
import torch.nn.functional as F
from torch import Tensor

import pyops
from pyops.models.bert import BertConfig, BertForMaskedLM
from pyops.text import documentation

PAD, UNKNOWN, MASK = 0, 1, 2
SPECIAL = ("[PAD]", "[UNK]", "[MASK]")
WORDS, SEQLEN, BATCH = 2000, 32, 32
SENTENCES = (
    "the [MASK] statement is used to define a function",
    "a class is an object of type [MASK]",
    "an exception is raised if the name is [MASK] found",
    "the expression list is evaluated from left to [MASK]",
)


class Tokenizer:
    """The most frequent words of a text as numbers."""

    def __init__(self, text: str) -> None:
        counts: dict[str, int] = {}
        for word in self.split(text):
            counts[word] = counts.get(word, 0) + 1
        common = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
        self.words = [*SPECIAL, *common]
        self.numbers = {word: number for number, word in enumerate(self.words)}

    @staticmethod
    def split(text: str) -> list[str]:
        return re.findall(r"\[MASK\]|[a-z_]+|[.,:;()]", text)

    def __call__(self, text: str) -> Tensor:
        return torch.tensor([self.numbers.get(word, UNKNOWN) for word in self.split(text)])


def train(model: BertForMaskedLM, tokens: Tensor, steps: int) -> None:
    """Hide 15 % of the words; the loss is that of finding them again."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - SEQLEN, (BATCH,))
        batch = tokens[starts[:, None] + torch.arange(SEQLEN)]
        hidden = (torch.rand(batch.shape) < 0.15) & (batch != UNKNOWN)
        scores = model(batch.masked_fill(hidden, MASK))
        loss = F.cross_entropy(scores[hidden], batch[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def fill(model: BertForMaskedLM, tokenizer: Tokenizer, sentence: str) -> str:
    tokens = tokenizer(sentence)
    scores = model(tokens[None])[0, tokens == MASK][0]
    scores[: len(SPECIAL)] = -torch.inf
    chances, best = scores.softmax(0).topk(3)
    return ", ".join(f"{tokenizer.words[w]} {p:.0%}" for w, p in zip(best, chances, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    text = documentation().lower()
    tokenizer = Tokenizer(text)
    config = BertConfig(
        vocab_size=len(tokenizer.words),
        max_position_embeddings=SEQLEN,
        **{"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        intermediate_size=256,
    )
    plain = BertForMaskedLM(config)
    train(plain, tokenizer(text), steps)
    plain.eval()
    fast = copy.deepcopy(plain)
    pyops.optimize(fast)
    for sentence in SENTENCES:
        print(sentence)
        print(f"  plain: {fill(plain, tokenizer, sentence)}")
        print(f"  pyops: {fill(fast, tokenizer, sentence)}")


if __name__ == "__main__":
    main()
