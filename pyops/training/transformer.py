"""Transformers on real text: a byte language model on Python's documentation, and identifiers rewritten.

Preset "lm": GPT over bytes of the language reference. Preset "seq2seq": encoder and decoder turn the standard
library's names like some_name into SomeName, letter by letter; a right one is right to the last letter. They train
on the words of nine tenths of the names in new combinations and are tested on the other names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.models.gpt import GPT
from pyops.models.transformer import Transformer
from pyops.text import documentation, identifiers
from pyops.training import trainer

PRESETS = ("lm", "seq2seq")
EPOCHS = 20
CONTEXT = 128  # bytes
STEPS_PER_EPOCH = 50
TEST_BYTES = 32 * CONTEXT
PAD, START, END = 0, 1, 2  # tokens of seq2seq; letters are their code less 61
LONGEST = 16
PROMPT = "The "


@dataclass(frozen=True)
class Settings:
    """What a run is determined by, besides the machine it runs on."""

    model: str = "transformer"
    preset: str = "lm"
    seed: int = 0
    batch_size: int = 16
    learning_rate: float = 0.002
    dim: int = 96
    heads: int = 4
    layers: int = 2


@functools.cache
def _document() -> Tensor:
    return torch.frombuffer(bytearray(documentation().encode()), dtype=torch.uint8).long()


@functools.cache
def _names() -> tuple[list[str], list[str]]:
    """The names' words to train on, and whole names to test with: every tenth, none of the training's."""
    names = identifiers(LONGEST)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [names[i] for i in order]
    held_back = len(names) // 10
    words = {word for name in shuffled[held_back:] for word in name.split("_")}
    return sorted(words), shuffled[:held_back]


def _tokens(names: list[str]) -> tuple[Tensor, Tensor]:
    """Tokens of the names (count, LONGEST) and of what they become (count, LONGEST + 2), with start and end."""
    source = torch.full((len(names), LONGEST), PAD)
    target = torch.full((len(names), LONGEST + 2), PAD)
    for row, name in enumerate(names):
        became = "".join(part.capitalize() for part in name.split("_"))
        source[row, : len(name)] = torch.tensor([_letter(c) for c in name])
        codes = [START, *map(_letter, became), END]
        target[row, : len(codes)] = torch.tensor(codes)
    return source, target


def _letter(character: str) -> int:
    return ord(character) - 61


def _text(tokens: Tensor) -> str:
    return "".join(chr(t + 61) for t in tokens.tolist() if t > END)


class Trainer(trainer.Trainer):
    """Adam on cross-entropy, with a linear warm-up and a linear way down to a fiftieth over EPOCHS epochs."""

    def __init__(
        self,
        settings: Settings,
        ops: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.of_names = settings.preset == "seq2seq"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model: nn.Module
            sizes = (settings.dim, settings.heads, settings.layers)
            if self.of_names:
                model = Transformer(64, 64, *sizes, 4 * settings.dim, 0.0, PAD, LONGEST + 2)
            else:
                model = GPT(256, CONTEXT, *sizes)
        super().__init__(settings, ops, {"model": model}, device, dtype)
        self.model = self.modules["model"]
        self.optimizers["model"] = torch.optim.Adam(
            self.model.parameters(), settings.learning_rate, (0.9, 0.98)
        )

    @property
    def steps_per_epoch(self) -> int:
        return STEPS_PER_EPOCH

    def describe(self) -> str:
        if self.of_names:
            words, held_back = _names()
            return (
                f"names of {len(words)} words of the standard library, {len(held_back)} held back"
            )
        return f"{len(_document())} bytes of Python's documentation"

    def _loss(self, scores: Tensor, target: Tensor) -> Tensor:
        ignored = PAD if self.of_names else -100
        return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten(), ignore_index=ignored)

    def steps(self) -> Iterator[float]:
        self.model.train()
        optimizer = self.optimizers["model"]
        for step in range(STEPS_PER_EPOCH):
            done = self.epoch * STEPS_PER_EPOCH + step + 1
            left = max(0.02, 1 - done / (EPOCHS * STEPS_PER_EPOCH))
            for group in optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * min(left, done / 40)
            loss = self._names_loss() if self.of_names else self._bytes_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    def _draw(self, size: int) -> int:
        return int(torch.randint(size, (), generator=self.order))

    def _names_loss(self) -> Tensor:
        words, _ = _names()
        names: list[str] = []
        while len(names) < 4 * self.settings.batch_size:
            name = "_".join(words[self._draw(len(words))] for _ in range(2 + self._draw(3)))
            if len(name) <= LONGEST:
                names.append(name)
        source, target = (t.to(self.device) for t in _tokens(names))
        return self._loss(self.model(source, target[:, :-1]), target[:, 1:])

    def _bytes_loss(self) -> Tensor:
        text = _document()[:-TEST_BYTES]
        firsts = torch.randint(
            len(text) - CONTEXT, (self.settings.batch_size, 1), generator=self.order
        )
        piece = text[firsts + torch.arange(CONTEXT + 1)].to(self.device)
        return self._loss(self.model(piece[:, :-1]), piece[:, 1:])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        if self.of_names:
            source, target = (t.to(self.device) for t in _tokens(_names()[1]))
            made = self.model.greedy(source, START, END, LONGEST + 1)  # type: ignore[operator]
            made = F.pad(made, (0, LONGEST + 1 - made.shape[1]), value=PAD)
            right = (made == target[:, 1:]).all(1).float().mean().item()
            return {"whole-name accuracy": right}
        piece = _document()[-TEST_BYTES:].view(-1, CONTEXT).to(self.device)
        loss = self._loss(self.model(piece[:, :-1]), piece[:, 1:]).item()
        return {"test loss, nats a byte": loss}

    @torch.no_grad()
    def sample(self) -> str:
        self.model.eval()
        if self.of_names:
            source = _tokens(_names()[1][:4])[0].to(self.device)
            made = self.model.greedy(source, START, END, LONGEST + 1)  # type: ignore[operator]
            pairs = zip(source, made, strict=True)
            return "\n".join(f"  {_text(name)} -> {_text(became)}" for name, became in pairs)
        prompt = torch.tensor([list(PROMPT.encode())], device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        count = CONTEXT - len(PROMPT)
        made = self.model.generate(prompt, count, 0.7, generator)  # type: ignore[operator]
        text = bytes(made[0].tolist()).decode(errors="replace")
        return "\n".join(f"  {line}" for line in text.splitlines())
