"""Cards that a plan can be made for, and how much of their peaks programs reach."""

from __future__ import annotations

from typing import NamedTuple

from q3n_functional.metrics import PEAK_FLOPS


class Card(NamedTuple):
    """What one card of a host does: bytes of memory, dense bf16 and fp32 operations a second, bytes a second.

    nvlink and network are what the card sends a second, one way, to cards of its host and to other hosts.
    """

    name: str
    memory: float
    flops: float
    fp32_flops: float
    bandwidth: float
    nvlink: float
    network: float
    per_host: int = 8

    @property
    def usable(self) -> float:
        """Bytes of memory that a program can have."""
        return USABLE * self.memory


# NVIDIA's data sheets of the SXM modules (H100, H200, A100 80GB) and of DGX B200; the network is that of NVIDIA's own
# hosts, one adapter a card: 400 Gb/s ConnectX-7 in DGX H100, H200 and B200, 200 Gb/s ConnectX-6 in DGX A100. NVLink's
# sheets count both directions: here is half. fp32 is that of the vector units, TF32 being off by default in torch.
CARDS = {
    "h100": Card("H100 SXM", 80e9, PEAK_FLOPS["H100"], 67e12, 3.35e12, 450e9, 50e9),
    "h200": Card("H200 SXM", 141e9, PEAK_FLOPS["H200"], 67e12, 4.8e12, 450e9, 50e9),
    "a100": Card("A100 SXM 80GB", 80e9, PEAK_FLOPS["A100"], 19.5e12, 2.04e12, 300e9, 25e9),
    "b200": Card("B200", 180e9, PEAK_FLOPS["B200"], 75e12, 8e12, 900e9, 50e9),
}

USABLE = 0.92
"""Of the memory: the rest is for the CUDA context, NCCL's buffers and the allocator's gaps (not measured here)."""
PRODUCT = 0.7
"""Of dense bf16 in large products: 0.69 and 0.73 measured on an H100 (the limit in results/grouped_swiglu.json)."""
FP32_PRODUCT = 0.8
"""Of fp32 in products on the vector units (not measured here)."""
COPY = 0.9
"""Of the memory's bandwidth in a copy: 0.90 measured on an H100 (examples/benchmarks/NOTES.md, decoding)."""
POINTWISE = 0.75
"""The same in what a compiler fuses and in the update: 0.78 in AdamW, less in reductions (the profiles in NOTES.md)."""
LINK = 0.73
"""Of NVLink and network in NCCL's rings: an all-reduce of 1 GiB between two H100 ran at 329 GB/s (no script here)."""
LAUNCH = 3e-6
"""Seconds that the shortest kernel takes with its launch (not measured here)."""
EXCHANGE = 20e-6
"""Seconds that an exchange takes beside its bytes and rounds. Between two H100 17 MB one way took 92 to 97 us, of which
51 by `LINK` (no script here)."""
NVLINK_ROUND, NETWORK_ROUND = 4e-6, 12e-6
"""Seconds of one of the log2(ranks) rounds that the first byte takes, in a host and between hosts (not measured)."""
OPERATORS = {
    # Model operations, as flops.py counts them, over dense bf16; from times on an H100 (NOTES.md: the delta rule at
    # 1x32768, experts and attention over rows at 2x4096).
    "gated_delta_rule": 0.146,
    "gated_delta_rule_backward": 0.093,
    "grouped_swiglu": 0.45,
    "grouped_swiglu_backward": 0.41,
    "attention": 0.61,
    "attention_backward": 0.26,
    "piece_attention": 0.61,  # the same kernels, in blocks: not timed
    "piece_attention_backward": 0.26,
    "router_logits_backward": 0.25,
}
"""The share of the dense bf16 peak that operators of this package reach; others reach `PRODUCT`."""
