"""Ops take and return DTensors: rows, heads or channels shared out, forward and backward, equal to one rank."""

import functools
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from q3n_functional.ops import causal_conv, gated_delta_rule, pre_norm, recurrent_gated_delta_rule, rms_norm_gated

RANKS = 2
GATES = {"qk_l2norm": True, "beta_scale": 1.0}


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rule_inputs(batch=2, length=10, cu=None):
    """q, k, v, g, beta, A_log, dt_bias, initial_state; cu_seqlens."""
    num = batch if cu is None else len(cu) - 1
    tensors = [random(batch, length, 2, 4), random(batch, length, 2, 4), random(batch, length, 4, 6)]
    tensors += [random(batch, length, 4), random(batch, length, 4), random(4), random(4), random(num, 4, 4, 6)]
    return tensors, None if cu is None else torch.tensor(cu, dtype=torch.int32)


def rule(op, chunk, q, k, v, g, beta, A_log, dt_bias, state, cu):
    return op(q, k, v, g, beta, state, cu, A_log=A_log, dt_bias=dt_bias, **GATES, **chunk)


CHUNKED = functools.partial(rule, gated_delta_rule, {"chunk_size": 4})
RECURRENT = functools.partial(rule, recurrent_gated_delta_rule, {})
HEADS = [2, 2, 2, 2, 2, 0, 0, 1]
ROWS = [0, 0, 0, 0, 0, None, None, 0]
CASES = {
    # function, inputs, the dims that are split (None: whole on each rank), of the outputs too
    "rule by heads": (CHUNKED, rule_inputs, HEADS, [2, 1]),
    "rule by heads, documents": (CHUNKED, functools.partial(rule_inputs, 1, 20, [0, 7, 7, 18]), HEADS, [2, 1]),
    "rule by rows": (CHUNKED, rule_inputs, ROWS, [0, 0]),
    "rule split over time": (CHUNKED, rule_inputs, [1, 1, 1, 1, 1, None, None, None], [None, None]),
    "recurrent rule by heads": (RECURRENT, rule_inputs, HEADS, [2, 1]),
    "convolution by channels": (
        lambda x, w, state, cu: causal_conv(x, w, state, cu),
        lambda: ([random(2, 9, 6), random(6, 4), random(2, 6, 3)], None), [2, 0, 1], [2, 1],
    ),
    "convolution by rows": (
        lambda x, w, state, cu: causal_conv(x, w, state, cu),
        lambda: ([random(2, 9, 6), random(6, 4), random(2, 6, 3)], None), [0, None, 0], [0, 0],
    ),
    "convolution without a state": (
        lambda x, w, cu: causal_conv(x, w, None, cu), lambda: ([random(2, 9, 6), random(6, 4)], None), [2, 0], [2, 1],
    ),
    "norm by heads": (
        lambda x, gate, w, cu: (rms_norm_gated(x, gate, w),),
        lambda: ([random(2, 3, 4, 5), random(2, 3, 4, 5), random(5)], None), [2, 2, None], [2],
    ),
    "norm before a block, by time": (
        lambda x, w, cu: pre_norm(x, w), lambda: ([random(2, 4, 5), random(5)], None), [1, None], [1, 1],
    ),
    "norm of three dims, by time": (
        lambda x, gate, w, cu: (rms_norm_gated(x, gate, w),),
        lambda: ([random(2, 4, 5), random(2, 4, 5), random(5)], None), [1, 1, None], [1],
    ),
}  # fmt: skip


def placed(x, dim, mesh):
    return distribute_tensor(x, mesh, [Replicate() if dim is None else Shard(dim)])


def value_and_gradients(function, tensors, cu, weights):
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = function(*leaves, cu)
    loss = sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(loss, leaves)


def check(name, mesh):
    function, make, dims, out_dims = CASES[name]
    torch.manual_seed(0)
    tensors, cu = make()
    weights = [torch.randn_like(y) for y in function(*tensors, cu)]
    wanted = value_and_gradients(function, tensors, cu, weights)
    shared = [placed(x, dim, mesh) for x, dim in zip(tensors, dims, strict=True)]
    where = [placed(w, dim, mesh) for w, dim in zip(weights, out_dims, strict=True)]
    shared_cu = None if cu is None else placed(cu, None, mesh)
    outputs, gradients = value_and_gradients(function, shared, shared_cu, where)
    for y, dim in zip(outputs, out_dims, strict=True):
        assert tuple(y.placements) == ((Replicate(),) if dim is None else (Shard(dim),)), (name, y.placements)
    for x, y in zip((*outputs, *gradients), (*wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(x.full_tensor(), y, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}")


def check_every_state(mesh):
    """That has no gradient."""
    op = functools.partial(rule, recurrent_gated_delta_rule, {"every_state": True})
    for dims, out_dims in ((HEADS, [2, 2]), (ROWS, [0, 0])):
        tensors, _ = rule_inputs()
        shared = [placed(x, dim, mesh) for x, dim in zip(tensors, dims, strict=True)]
        for y, wanted, dim in zip(op(*shared, None), op(*tensors, None), out_dims, strict=True):
            assert tuple(y.placements) == (Shard(dim),)
            torch.testing.assert_close(y.full_tensor(), wanted, rtol=1e-12, atol=1e-12)


def ranks(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for name in CASES:
        check(name, mesh)
    torch.manual_seed(0)
    check_every_state(mesh)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group: taking the process down around them aborts it now and then


@pytest.mark.filterwarnings("ignore")
def test_dtensors_give_what_one_rank_gives(tmp_path):
    torch.multiprocessing.spawn(ranks, (tmp_path / "rendezvous",), nprocs=RANKS)
