"""Time, memory and error of the head's loss on one card: our op beside the logits written down and torch's own.

    python examples/benchmarks/linear_cross_entropy.py [--commit HASH] [--out FOLDER]

Prints a table and writes results/linear_cross_entropy.json. bf16, model width 2048, vocabulary 151,936, one target in
eight ignored, no z-loss; times are medians of forward alone and of forward plus backward to hidden states and head.
Implementations: q3n; logits, the plain definition compiled (what q3n ran before); torch, its linear_cross_entropy with
chunks (2.13 and newer); limit, the products alone, at the rate that the same run reaches for the product of 4096 tokens
with the head. Peak is what forward plus backward allocate, gradients included. Errors are relative to fp32 logits of
the same bf16 inputs, over 512 tokens.
"""

from collections.abc import Callable

import report
import torch
from torch import Tensor
from torch.nn import functional
from triton.testing import do_bench

from q3n_functional.ops import linear_cross_entropy

WIDTH, VOCABULARY = 2048, 151_936
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def q3n(h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(h, head, targets, impl="triton").total


def plain(h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy((h @ head.mT).float(), targets, reduction="sum")


def torchs(h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    if not hasattr(functional, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(h, head, targets, reduction="sum", options=options)


IMPLEMENTATIONS: dict[str, Function] = {"q3n": q3n, "logits": torch.compile(plain), "torch": torchs}


def inputs(tokens: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    h = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    head = torch.randn(VOCABULARY, WIDTH, device="cuda", dtype=torch.bfloat16).mul_(0.02)
    targets = torch.randint(VOCABULARY, (tokens,), device="cuda")
    targets[::8] = -100
    return [h.requires_grad_(), head.requires_grad_()], targets


def gradients(function: Function, tensors: list[Tensor], targets: Tensor) -> tuple[Tensor, ...]:
    loss = function(*tensors, targets)
    return loss.detach(), *torch.autograd.grad(loss, tensors, torch.full_like(loss, 1 / len(targets)))


def errors(function: Function) -> dict[str, float]:
    tensors, targets = inputs(512)
    exact = gradients(plain, [x.detach().float().requires_grad_() for x in tensors], targets)
    found, again = (gradients(function, tensors, targets) for _ in range(2))
    pairs = zip(("loss", "dh", "dhead"), found, exact, strict=True)
    measured = {f"error_{name}": float((a.double() - b.double()).norm() / b.double().norm()) for name, a, b in pairs}
    return measured | {"repeats": float(all(map(torch.equal, found, again)))}


def measure(function: Function, tokens: int) -> dict[str, float]:
    tensors, targets = inputs(tokens)
    before = torch.cuda.memory_allocated()
    gradients(function, tensors, targets)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    gradients(function, tensors, targets)
    peak = torch.cuda.max_memory_allocated() - before
    with torch.no_grad():
        forward = do_bench(lambda: function(*tensors, targets), warmup=10, rep=100, return_mode="median")
    both = do_bench(lambda: gradients(function, tensors, targets), warmup=10, rep=200, return_mode="median")
    flops = 2 * tokens * WIDTH * VOCABULARY
    return {
        "fwd_ms": forward, "fwd_bwd_ms": both, "fwd_tflops": flops / forward / 1e9,
        "fwd_bwd_tflops": 3 * flops / both / 1e9, "peak_mib": peak / 2**20,
    }  # fmt: skip


def limit(tokens: int) -> dict[str, float]:
    (h, head), _ = inputs(4096)
    with torch.no_grad():
        rate = 2 * 4096 * WIDTH * VOCABULARY / do_bench(lambda: h @ head.mT, warmup=20, rep=100, return_mode="median")
    forward = 2 * tokens * WIDTH * VOCABULARY / rate
    return {"fwd_ms": forward, "fwd_bwd_ms": 3 * forward, "tflops": rate / 1e9}


def main() -> None:
    parser = report.parser(__doc__)
    options = parser.parse_args()
    rows = []
    for name, function in IMPLEMENTATIONS.items():
        rows += report.measured("512", name, lambda f=function: errors(f))
    for tokens in (8192, 32768):
        rows += report.measured(str(tokens), "limit", lambda n=tokens: limit(n))
        for name, function in IMPLEMENTATIONS.items():
            rows += report.measured(str(tokens), name, lambda f=function, n=tokens: measure(f, n))
    report.write(rows, "linear_cross_entropy", options.commit, options.out)


if __name__ == "__main__":
    main()
