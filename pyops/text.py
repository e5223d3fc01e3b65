"""Real text for training, from what is installed anyway: Python's documentation, sources and docstrings."""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TEST_FRACTION = 0.2
PADDING, UNKNOWN = 0, 1  # tokens of words
LIBRARIES = ("python", "numpy", "torch", "sklearn")
# What would give the library away, or is no word of the text.
_GIVEAWAYS = {"np", "numpy", "torch", "pytorch", "sklearn", "scikit", "learn", "python", "ndarray"}
_GIVEAWAYS |= {"tensor", "tensors", "array_like", "estimator", "estimators"}


def documentation() -> str:
    """Python's language reference as its own `help` shows it: the topics, in order."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


@dataclass(frozen=True)
class TextDataset:
    """Texts as word tokens (count, steps), padded; lengths and labels (count,). int64."""

    train_tokens: Tensor
    train_lengths: Tensor
    train_labels: Tensor
    test_tokens: Tensor
    test_lengths: Tensor
    test_labels: Tensor
    vocabulary: int


def load_docstrings(per_library: int = 1200, steps: int = 40, words: int = 6000) -> TextDataset:
    """Docstrings of Python's standard library, NumPy, PyTorch and scikit-learn; the label is which.

    The first `steps` words of each, without the libraries' names; those that occur most are tokens. The split
    is by file, so that no test text has a twin of its own file among the training texts.

    Raises:
        ModuleNotFoundError: one of the libraries is not installed.
    """
    texts: dict[str, list[tuple[list[str], int]]] = {"train": [], "test": []}
    for label, library in enumerate(LIBRARIES):
        found: dict[str, list[list[str]]] = {"train": [], "test": []}
        for index, path in enumerate(_sources(library)):
            part = "test" if index % round(1 / TEST_FRACTION) == 0 else "train"
            found[part] += _docstrings(path)
            if len(found["train"]) >= per_library and len(found["test"]) >= per_library // 4:
                break
        texts["train"] += [(text, label) for text in found["train"][:per_library]]
        texts["test"] += [(text, label) for text in found["test"][: per_library // 4]]
    counts: dict[str, int] = {}
    for text, _ in texts["train"]:
        for word in text[:steps]:
            counts[word] = counts.get(word, 0) + 1
    common = sorted(counts, key=lambda word: (-counts[word], word))[: words - 2]
    token = {word: index + 2 for index, word in enumerate(common)}

    def encode(part: str) -> tuple[Tensor, Tensor, Tensor]:
        tokens = torch.full((len(texts[part]), steps), PADDING)
        for row, (text, _) in zip(tokens, texts[part], strict=True):
            codes = [token.get(word, UNKNOWN) for word in text[:steps]]
            row[: len(codes)] = torch.tensor(codes)
        lengths = torch.tensor([min(len(text), steps) for text, _ in texts[part]])
        return tokens, lengths, torch.tensor([label for _, label in texts[part]])

    return TextDataset(*encode("train"), *encode("test"), len(common) + 2)


def _sources(library: str) -> list[Path]:
    """The library's files, in an order that mixes its parts and is always the same."""
    if library == "python":
        root = Path(sysconfig.get_path("stdlib"))
        files = sorted(root.glob("*.py"))
    else:
        spec = importlib.util.find_spec(library)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"the texts come with {library}, which is not installed")
        root = Path(spec.origin).parent
        files = sorted(p for p in root.rglob("*.py") if "test" not in str(p.relative_to(root)))
    return sorted(files, key=lambda path: path.name[::-1])


def _docstrings(path: Path) -> list[list[str]]:
    """The words of each docstring of at least eight words."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    split = (re.findall(r"[a-z_]+", text.lower()) for text in texts if text)
    kept = ([word for word in text if word not in _GIVEAWAYS] for text in split)
    return [text for text in kept if len(text) >= 8]


def identifiers(longest: int = 16) -> list[str]:
    """Names like `some_name` in Python's standard library: two words or more, sorted."""
    found: set[str] = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found.update(re.findall(r"\b[a-z]{2,}(?:_[a-z]{2,})+\b", path.read_text(encoding="utf-8")))
    return sorted(name for name in found if len(name) <= longest)
