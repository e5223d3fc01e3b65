"""BERT in plain torch.nn, with the parameter names of Hugging Face's BertForMaskedLM.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.models.checks import check_count


@dataclass(frozen=True)
class BertConfig:
    """Sizes; the defaults are those of BERT base. Names as in Hugging Face's BertConfig."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.vocab_size, size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(types)
        embedded: Tensor = self.dropout(self.LayerNorm(x + self.position_embeddings(places)))
        return embedded


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.query(x), self.key(x), self.value(x))
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(2)


class BertResidual(nn.Module):
    """Dense, dropout, added to what came before, layer norm."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        added: Tensor = self.LayerNorm(self.dropout(self.dense(x)) + before)
        return added


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertResidual(config.hidden_size, config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mixed: Tensor = self.output(self.self(x, mask), x)
        return mixed


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertResidual(config.intermediate_size, config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attention(x, mask)
        mixed: Tensor = self.output(self.intermediate(x), x)
        return mixed


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Bert(nn.Module):
    """Tokens to one vector each: (batch, seqlen) to (batch, seqlen, hidden_size).

    Raises:
        ValueError: a size is out of range; forward: tokens or mask of another shape, or too long.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            check_count(name, getattr(config, name))
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(
                f"num_attention_heads: expected a divisor of hidden_size {config.hidden_size}, "
                f"got {config.num_attention_heads}"
            )
        self.longest = config.max_position_embeddings
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """input_ids, attention_mask (0 where padded), token_type_ids: (batch, seqlen)."""
        if input_ids.dim() != 2 or input_ids.shape[1] > self.longest:
            raise ValueError(
                f"input_ids: expected shape (batch, at most {self.longest}), "
                f"got {tuple(input_ids.shape)}"
            )
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise ValueError(
                    f"attention_mask: expected the shape of input_ids {tuple(input_ids.shape)}, "
                    f"got {tuple(attention_mask.shape)}"
                )
            mask = attention_mask.bool()[:, None, None, :]
        encoded: Tensor = self.encoder(self.embeddings(input_ids, token_type_ids), mask)
        return encoded


class BertTransform(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        transformed: Tensor = self.LayerNorm(F.gelu(self.dense(x)))
        return transformed


class BertPredictions(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = BertTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias  # Hugging Face's state_dict has it under both names

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.decoder(self.transform(x))
        return scores


class BertMaskedLMHead(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = BertPredictions(config)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.predictions(x)
        return scores


class BertForMaskedLM(nn.Module):
    """The scores of every token at every place: (batch, seqlen) to (batch, seqlen, vocab_size).

    `load_state_dict` takes Hugging Face's BertForMaskedLM; the decoder's weight is the embedding's.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = Bert(config)
        self.cls = BertMaskedLMHead(config)
        self.apply(_initialise)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        scores: Tensor = self.cls(self.bert(input_ids, attention_mask, token_type_ids))
        return scores


class BertPooler(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class BertForClassification(nn.Module):
    """One label a sequence: (batch, seqlen) to (batch, num_labels), from the first token's vector."""

    def __init__(self, config: BertConfig, num_labels: int) -> None:
        super().__init__()
        check_count("num_labels", num_labels)
        self.bert = Bert(config)
        self.pooler = BertPooler(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        self.apply(_initialise)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        pooled = self.pooler(self.bert(input_ids, attention_mask, token_type_ids))
        scores: Tensor = self.classifier(self.dropout(pooled))
        return scores


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
