"""Transformers in plain torch.nn: the encoder-decoder here, the BERT and GPT styles beside.

Attention runs through torch.nn.functional.scaled_dot_product_attention; nothing here uses the ops of pyops:
`pyops.optimize` swaps them in. Source: Vaswani et al., "Attention Is All You Need", 2017.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.models.bert import Bert, BertConfig, BertForClassification, BertForMaskedLM
from pyops.models.checks import check_count
from pyops.models.gpt import GPT

__all__ = [
    "GPT",
    "Bert",
    "BertConfig",
    "BertForClassification",
    "BertForMaskedLM",
    "Transformer",
    "sinusoidal_positions",
]


def sinusoidal_positions(length: int, dim: int) -> Tensor:
    """(length, dim): sines in the even columns, cosines in the odd ones, wavelengths 2π to 10000·2π."""
    position = torch.arange(length, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * (-math.log(10000.0) / dim))
    table = torch.zeros(length, dim)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)[:, : dim // 2]
    return table


class Attention(nn.Module):
    """Multi-head attention of queries over keys and values, with projections in and out."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """(batch, seqlen, dim) as (batch, heads, seqlen, head_dim)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """x: (batch, seqlen_q, dim); memory: (batch, seqlen_k, dim); mask: bool, True is attended."""
        return self.attend(
            x, self.split(self.key(memory)), self.split(self.value(memory)), mask, causal
        )

    def attend(
        self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        """The same with keys and values projected already: (batch, heads, seqlen_k, head_dim)."""
        query = self.split(self.query(x))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )
        joined: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return joined


class FeedForward(nn.Sequential):
    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each after a layer norm and added to its input."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout)
        self.feed_forward = FeedForward(dim, hidden, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, y, mask))
        mixed: Tensor = x + self.dropout(self.feed_forward(self.norm2(x)))
        return mixed


class DecoderLayer(nn.Module):
    """Causal self-attention, attention over the source, feed-forward."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(dim, heads, dropout)
        self.cross_attention = Attention(dim, heads, dropout)
        self.feed_forward = FeedForward(dim, hidden, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: Tensor, mask: Tensor | None, source_mask: Tensor | None
    ) -> Tensor:
        y = self.norm1(x)
        causal = mask is None
        x = x + self.dropout(self.self_attention(y, y, mask, causal))
        x = x + self.dropout(self.cross_attention(self.norm2(x), memory, source_mask))
        mixed: Tensor = x + self.dropout(self.feed_forward(self.norm3(x)))
        return mixed

    def step(self, x: Tensor, cache: dict[str, Tensor], source_mask: Tensor | None) -> Tensor:
        """One more position; `cache` holds the keys and values of those before and of the source."""
        y = self.norm1(x)
        attention = self.self_attention
        for name, project in (("key", attention.key), ("value", attention.value)):
            new = attention.split(project(y))
            cache[name] = torch.cat([cache[name], new], 2) if name in cache else new
        x = x + attention.attend(y, cache["key"], cache["value"], None, False)
        x = x + self.cross_attention.attend(
            self.norm2(x), cache["source_key"], cache["source_value"], source_mask, False
        )
        mixed: Tensor = x + self.feed_forward(self.norm3(x))
        return mixed


class Transformer(nn.Module):
    """Encoder and decoder over tokens, with sinusoidal positions and a padding token.

    Args:
        source_size, target_size: numbers of tokens.
        dim: width of the model, divisible by heads; hidden: of the feed-forward layers.
        layers: of the encoder, and as many of the decoder.
        dropout: probability, in training.
        pad: the token that is not attended to.
        max_length: of source and target, in tokens.

    Raises:
        ValueError: an argument is out of range; forward: tokens of another shape, or too long.
    """

    def __init__(
        self,
        source_size: int,
        target_size: int,
        dim: int = 128,
        heads: int = 4,
        layers: int = 2,
        hidden: int = 512,
        dropout: float = 0.1,
        pad: int = 0,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        for name, value in (
            *(("source_size", source_size), ("target_size", target_size), ("dim", dim)),
            *(("heads", heads), ("layers", layers), ("hidden", hidden), ("max_length", max_length)),
        ):
            check_count(name, value)
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of dim {dim}, got {heads}")
        self.dim, self.pad, self.max_length = dim, pad, max_length
        self.source_embedding = nn.Embedding(source_size, dim, padding_idx=pad)
        self.target_embedding = nn.Embedding(target_size, dim, padding_idx=pad)
        self.register_buffer("positions", sinusoidal_positions(max_length, dim), persistent=False)
        self.encoder = nn.ModuleList(
            EncoderLayer(dim, heads, hidden, dropout) for _ in range(layers)
        )
        self.decoder = nn.ModuleList(
            DecoderLayer(dim, heads, hidden, dropout) for _ in range(layers)
        )
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, target_size)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Scores of each next target token, (batch, target_len, target_size).

        source: (batch, source_len), target: (batch, target_len), int64; a target position sees those up to it.
        """
        memory, source_mask = self.encode(source)
        x = self.embed(self.target_embedding, "target", target)
        mask = None
        if bool((target == self.pad).any()):
            length = target.shape[1]
            lower = torch.ones(length, length, dtype=torch.bool, device=target.device).tril()
            # A padded position still sees itself, so that no row is empty.
            seen = (target != self.pad)[:, None, None, :] | torch.eye(
                length, dtype=torch.bool, device=target.device
            )
            mask = lower & seen
        for layer in self.decoder:
            x = layer(x, memory, mask, source_mask)
        scores: Tensor = self.head(self.decoder_norm(x))
        return scores

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """(batch, source_len, dim), and a mask (batch, 1, 1, source_len) if there is padding."""
        x = self.embed(self.source_embedding, "source", source)
        mask = None
        if bool((source == self.pad).any()):
            mask = (source != self.pad)[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x), mask

    def embed(self, embedding: nn.Module, name: str, tokens: Tensor, first: int = 0) -> Tensor:
        if tokens.dim() != 2 or first + tokens.shape[1] > self.max_length:
            raise ValueError(
                f"{name}: expected shape (batch, at most {self.max_length - first}), "
                f"got {tuple(tokens.shape)}"
            )
        positions: Tensor = self.positions[first : first + tokens.shape[1]]  # type: ignore[index]  # a buffer
        embedded: Tensor = self.dropout(embedding(tokens) * self.dim**0.5 + positions)
        return embedded

    @torch.no_grad()
    def greedy(self, source: Tensor, start: int, end: int, longest: int) -> Tensor:
        """The likeliest token after another, (batch, at most longest), keys and values cached.

        A row that has produced `end` goes on with padding.
        """
        memory, source_mask = self.encode(source)
        caches: list[dict[str, Tensor]] = []
        for layer in self.decoder:
            cross: Attention = layer.cross_attention  # type: ignore[assignment]
            caches.append(
                {
                    "source_key": cross.split(cross.key(memory)),
                    "source_value": cross.split(cross.value(memory)),
                }
            )
        tokens = torch.full((len(source), 1), start, device=source.device)
        done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        for position in range(longest):
            x = self.embed(self.target_embedding, "target", tokens[:, -1:], position)
            for layer, cache in zip(self.decoder, caches, strict=True):
                x = layer.step(x, cache, source_mask)  # type: ignore[operator]
            chosen = self.head(self.decoder_norm(x[:, -1])).argmax(-1)
            chosen = chosen.masked_fill(done, self.pad)
            tokens = torch.cat([tokens, chosen[:, None]], 1)
            done |= chosen == end
            if done.all():
                break
        return tokens[:, 1:]
