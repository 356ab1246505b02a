"""What a run writes down: metrics.jsonl, TensorBoard events and loss.png; and how fast it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from q3n_functional.config import Config
from q3n_functional.flops import flops_per_token

PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bf16 tensor-core peak of a card, in operations a second, from its data sheet."""


class Log:
    """metrics.jsonl and TensorBoard events of a run from `step` on; drops what an earlier attempt wrote beyond."""

    def __init__(self, run: Path, step: int) -> None:
        """Opens the files in folder `run`."""
        self.path = run / "metrics.jsonl"
        rows = [row for row in read(self.path) if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._file = self.path.open("a", buffering=1)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Notes `values` as those after `step` updates."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        self._board.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none where there is no file. A last line that was cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def plot(run: Path) -> Path:
    """Draws loss.png from metrics.jsonl: the training loss, and validation in bits per byte where it was measured."""
    rows = read(run / "metrics.jsonl")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    measured = "validation_bits_per_byte" if any("validation_bits_per_byte" in row for row in rows) else ""
    training = "bits_per_byte" if measured else "cross_entropy"
    validation = measured or "validation_loss"
    for name, label, style in ((training, "training", "-"), (validation, "validation", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), style, label=label, linewidth=1, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte" if measured else "nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    path = run / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def peak_flops(device: torch.device) -> float | None:
    """Peak of a known CUDA card in bf16, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


def speed(
    tokens: int, seconds: float, config: Config, seq_len: int, device: torch.device, ranks: int = 1
) -> dict[str, float]:
    """Tokens a second of all ranks and, on cards whose peak is known, the share of it that the model takes (MFU)."""
    rate = tokens / seconds
    peak = peak_flops(device)
    return {"tokens_per_s": rate, **({"mfu": rate / ranks * flops_per_token(config, seq_len) / peak} if peak else {})}
