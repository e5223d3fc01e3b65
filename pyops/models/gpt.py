"""A causal language model in the style of GPT, in plain torch.nn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.models.checks import check_count


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention; with a cache, of new positions over all before."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cache: dict[str, Tensor] | None = None) -> Tensor:
        """x: (batch, seqlen, dim). A cache is read and added to; then x is one position."""
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)
        )
        causal = True
        if cache is not None and "key" in cache:
            key = torch.cat([cache["key"], key], 2)
            value = torch.cat([cache["value"], value], 2)
            causal = False
        if cache is not None:
            cache["key"], cache["value"] = key, value
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal
        )
        joined: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return joined


class Block(nn.Module):
    """Attention and feed-forward, each after a layer norm and added to its input."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = CausalSelfAttention(dim, heads, dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, cache: dict[str, Tensor] | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache)
        mixed: Tensor = x + self.feed_forward(self.norm2(x))
        return mixed


class GPT(nn.Module):
    """Tokens to the scores of each next token: (batch, seqlen) to (batch, seqlen, vocab_size).

    Args:
        vocab_size: number of tokens; context: longest sequence, in tokens.
        dim: width, divisible by heads; layers: blocks; dropout: probability, in training.

    Raises:
        ValueError: an argument is out of range; forward: tokens that are not (batch, at most context).
    """

    def __init__(
        self,
        vocab_size: int = 256,
        context: int = 256,
        dim: int = 128,
        heads: int = 4,
        layers: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (
            *(("vocab_size", vocab_size), ("context", context), ("dim", dim)),
            *(("heads", heads), ("layers", layers)),
        ):
            check_count(name, value)
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of dim {dim}, got {heads}")
        self.context = context
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor, caches: list[dict[str, Tensor]] | None = None) -> Tensor:
        first = 0
        if caches is not None and caches[0]:
            first = caches[0]["key"].shape[2]
        if tokens.dim() != 2 or first + tokens.shape[1] > self.context:
            raise ValueError(
                f"tokens: expected shape (batch, at most {self.context - first}), "
                f"got {tuple(tokens.shape)}"
            )
        places = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        for index, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[index])
        scores: Tensor = self.head(self.norm(x))
        return scores

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`tokens` (batch, length) with up to `count` more, as many as the context holds.

        temperature: 0 takes the likeliest token, else scores are divided by it and a token is drawn.
        """
        caches: list[dict[str, Tensor]] = [{} for _ in self.blocks]
        new = tokens
        for _ in range(min(count, self.context - tokens.shape[1])):
            scores = self(new, caches)[:, -1]
            if temperature == 0:
                new = scores.argmax(-1, keepdim=True)
            else:
                shares = torch.softmax(scores.float() / temperature, -1)
                new = torch.multinomial(shares, 1, generator=generator)
            tokens = torch.cat([tokens, new], 1)
        return tokens
