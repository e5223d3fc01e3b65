"""What `pyops.optimize` did to a model."""

from dataclasses import dataclass, field

from torch import nn

from pyops._swap.pattern import Pattern


@dataclass(frozen=True)
class Entry:
    """One place in a model.

    Attributes:
        place: qualified name of the module, with the method and line where it is not a module.
        pattern: the calls that were found, in the order in which they run.
        why: for a skipped place, what stands in the way; empty for a replaced one.
    """

    place: str
    pattern: str
    why: str = ""


@dataclass
class Report:
    """What was replaced and what was left as it is; prints as a table."""

    replaced: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)

    def __str__(self) -> str:
        header = ("", "place", "pattern", "why")
        rows = [
            *(("replaced", entry.place, entry.pattern, "") for entry in self.replaced),
            *(("skipped", entry.place, entry.pattern, entry.why) for entry in self.skipped),
        ]
        if not rows:
            return "nothing to replace"
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(3)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]
            ).rstrip()
            for row in (header, *rows)
        )


@dataclass(frozen=True)
class Run:
    """One run of `optimize` over a model.

    Attributes:
        names: qualified names of the model's modules by id.
        patterns: what chains are made of, and what runs them fused.
        backend: handed on to the fused op.
        report: grows as modules are visited.
    """

    names: dict[int, str]
    patterns: tuple[Pattern, ...]
    backend: str | None
    report: Report

    def place(self, module: nn.Module, method: str) -> str:
        """A method of a module as an `Entry` names it."""
        name = self.names[id(module)]
        return f"{name}.{method}" if name else method

    def replaced(self, place: str, kinds: list[str]) -> None:
        self.report.replaced.append(Entry(place, _pattern_text(kinds)))

    def skipped(self, place: str, kinds: list[str], why: str) -> None:
        self.report.skipped.append(Entry(place, _pattern_text(kinds), why))


def _pattern_text(kinds: list[str]) -> str:
    """Kinds of calls as an `Entry` shows them."""
    return " → ".join(kind for kind in kinds if kind != "identity")
