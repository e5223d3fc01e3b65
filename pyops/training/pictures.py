"""PNG files of samples and curves."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor


def write_gray(path: Path, image: Tensor) -> None:
    """`image`: (height, width) in [0, 1]; written as an 8-bit grey PNG."""
    levels = (image * 255).round().clamp(0, 255).to(torch.uint8).cpu()
    height, width = levels.shape
    # every row is preceded by its filter: none
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), levels], 1)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.numpy().tobytes())),
        (b"IEND", b""),
    )
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + checksum
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_curves(path: Path, curves: Mapping[str, Sequence[float]], x_label: str) -> None:
    """One line a name. Needs matplotlib (ModuleNotFoundError)."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib, which is not installed: pip install matplotlib"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, values in curves.items():
        axes.plot(values, label=name, linewidth=0.8)
    axes.set_xlabel(x_label)
    axes.set_ylabel("loss")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
