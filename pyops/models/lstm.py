"""LSTM classifiers in plain torch.nn: of sequences of features, and of text.

Nothing here uses the ops of pyops: `pyops.optimize` swaps them in.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from pyops.models.checks import check_count

__all__ = ["LSTMClassifier", "TextClassifier", "lstm128"]


class LSTMClassifier(nn.Module):
    """An LSTM over a sequence; a dense layer on its last step tells the class.

    Args:
        input_size: features of a step.
        hidden_size: units of each layer.
        num_layers: layers of the LSTM.
        num_classes: width of the output.
        softmax: whether the output is probabilities; otherwise logits, which is what
            cross-entropy takes.

    Shapes: (batch, steps, input_size) to (batch, num_classes).

    Raises:
        ValueError: a size is no positive integer; forward: the input's shape is another one.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        num_classes: int,
        *,
        softmax: bool = False,
    ):
        super().__init__()
        for name, value in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
            ("num_classes", num_classes),
        ):
            check_count(name, value)
        self.lstm = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True)
        self.fc = nn.Linear(hidden_size, num_classes)
        self.softmax = nn.Softmax(dim=1) if softmax else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.lstm.input_size
        if x.dim() != 3 or x.shape[2] != features or x.shape[1] < 1:
            raise ValueError(
                f"input: expected shape (batch, steps, {features}), one step at least, "
                f"got {tuple(x.shape)}"
            )
        outputs, _ = self.lstm(x)
        return self.softmax(self.fc(outputs[:, -1]))


def lstm128(input_size: int, num_classes: int, *, softmax: bool = True) -> LSTMClassifier:
    """Two layers of 128 units, and a softmax over the classes.

    Raises:
        ValueError: as `LSTMClassifier`.
    """
    return LSTMClassifier(input_size, 128, 2, num_classes, softmax=softmax)


class TextClassifier(nn.Module):
    """Embedding, LSTM, dropout on its last state, a dense layer and softmax.

    Args:
        vocabulary: number of tokens, the padding's included.
        embedding_size: features of an embedded token.
        hidden_size: units of the LSTM.
        num_classes: width of the output.
        dropout: probability of zeroing an element of the last state, in training.
        padding: the token that fills up short texts; its embedding stays zero.
        softmax: whether the output is probabilities; otherwise logits, which is what
            cross-entropy takes.

    Shapes: tokens (batch, steps), integers, and lengths (batch,), integers on the CPU, to (batch, num_classes).
    Without lengths the last step counts, padding or not.

    Raises:
        ValueError: an argument is out of range; forward: the tokens' shape is no pair, the
            lengths do not fit them.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding_size: int,
        hidden_size: int,
        num_classes: int,
        *,
        dropout: float = 0.5,
        padding: int = 0,
        softmax: bool = True,
    ):
        super().__init__()
        for name, value in (
            ("vocabulary", vocabulary),
            ("embedding_size", embedding_size),
            ("hidden_size", hidden_size),
            ("num_classes", num_classes),
        ):
            check_count(name, value)
        if not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected a number between 0 and 1, got {dropout!r}")
        if not isinstance(padding, int) or not 0 <= padding < vocabulary:
            raise ValueError(f"padding: expected a token below {vocabulary}, got {padding!r}")
        self.embedding = nn.Embedding(vocabulary, embedding_size, padding_idx=padding)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(hidden_size, num_classes)
        self.softmax = nn.Softmax(dim=1) if softmax else nn.Identity()

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(
                f"tokens: expected shape (batch, steps), one step at least, got {tuple(tokens.shape)}"
            )
        embedded = self.embedding(tokens)
        if lengths is not None:
            if lengths.shape != tokens.shape[:1]:
                raise ValueError(
                    f"lengths: expected shape ({tokens.shape[0]},), got {tuple(lengths.shape)}"
                )
            embedded = pack_padded_sequence(
                embedded, lengths, batch_first=True, enforce_sorted=False
            )
        _, (last, _) = self.lstm(embedded)
        return self.softmax(self.fc(self.dropout(last[-1])))
