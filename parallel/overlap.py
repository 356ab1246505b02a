"""Exchanges behind computation where a step is compiled as one graph, as options of torch.compile.

Where each layer is compiled by itself, `q3n_functional.parallel.ahead` sends between them. In one graph, as written,
every shard is waited for as soon as it is asked for. Inductor's scheduler knows both halves of a collective and has
passes that move them apart; of those that it has, `raise_comms` would gather the whole model at the start.
`reorder_compute_for_overlap` leaves collectives in their order, the same on every rank, sends each ahead of as much
computation as hides it by Inductor's estimate, and waits as late as it can.
"""

from __future__ import annotations

from typing import Any

import torch

OPTIONS: dict[str, Any] = {
    "reorder_for_compute_comm_overlap": True,
    "reorder_for_compute_comm_overlap_passes": ["reorder_compute_for_overlap"],
}
"""What is reordered is one graph."""

SOUND: bool = torch.__version__ >= "2.13"  # compared as versions are
"""Whether it may be used: by torch 2.11 so ordered, gradients of two tensor parallel ranks came out wrong by 1e-3."""
