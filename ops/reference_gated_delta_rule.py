"""The gated delta rule in PyTorch: the CPU implementation, and what the Triton kernels are tested against.

Chunks are handled all at once but for the state, which passes from each to the next; memory grows with T, never with
T * K * V. With Gamma_ij = exp(G_i - G_j) for the decays G summed within a chunk and gamma = exp(G),

    A = (I + tril(beta Gamma K K^T, -1))^-1      W = V - gamma (K S)      U = A (beta W)
    O = scale gamma (Q S) + P U,  P = scale Gamma tril(Q K^T)             S' = gamma_C S + K^T (gamma_C / gamma U)

(Yang et al. 2024 with the state kept on the right of K, so that neither A V nor A K is stored.)

Letters as in `gated_delta_rule`; R rows that are scanned side by side, M chunks in each, C tokens in a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from q3n_functional.ops.chunks import Chunks, chunk_table, gather, saved_shapes, scatter
from q3n_functional.ops.registration import Outputs, wide

# The options that the op folds in: normalisation, decay and sigmoid.


class Inputs(NamedTuple):
    """What the rule itself works on, wide: normalised q and k, log-decays, betas."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


def _activate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    qk_l2norm: bool,
    beta_scale: float,
) -> Inputs:
    q, k = (_l2norm(x) if qk_l2norm else x for x in (q, k))
    if A_log is not None and dt_bias is not None:
        g = -A_log.to(g.dtype).exp() * softplus(g + dt_bias.to(g.dtype))
    if beta_scale:
        beta = beta_scale * torch.sigmoid(beta)
    return Inputs(q, k, v, g, beta)


def _l2norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _l2norm_backward(dy: Tensor, x: Tensor, y: Tensor) -> Tensor:
    rstd = torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
    return rstd * (dy - y * (dy * y).sum(-1, keepdim=True))


def _widen(tensors: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> list[Tensor]:
    """Inputs in the wide dtype, zero outside every sequence, where they may hold anything."""
    dtype = wide(tensors[2].dtype)
    if cu_seqlens is None:
        return [x.to(dtype) for x in tensors]
    batch, length = tensors[0].shape[:2]
    outside = (torch.arange(batch * length, device=cu_seqlens.device) >= cu_seqlens[-1]).view(batch, length)
    return [x.to(dtype).masked_fill(outside.view(batch, length, *[1] * (x.ndim - 2)), 0) for x in tensors]


# The rule on chunks: [R, M, H, C, ...].


def _to_value_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[2], 2)


def _to_key_heads(x: Tensor, heads: int) -> Tensor:
    grouped: Tensor = x.unflatten(2, (heads, x.shape[2] // heads))
    return grouped.sum(3)


class Decays(NamedTuple):
    """Products of decays within a chunk: from its start, to its end, whole, and pairwise (lower triangle)."""

    start: Tensor
    end: Tensor
    whole: Tensor
    pairs: Tensor


def _decays(g: Tensor) -> Decays:
    # Summed in fp64: behind strong decays, the difference of two large sums would be all rounding error in fp32.
    g_cumsum = g.cumsum(-1, dtype=torch.float64)
    lower = torch.ones(g_cumsum.shape[-1], g_cumsum.shape[-1], dtype=torch.bool, device=g_cumsum.device).tril()
    difference = g_cumsum[..., :, None] - g_cumsum[..., None, :]
    # Above the diagonal the difference is positive and its exponential may overflow.
    pairs = difference.to(g.dtype).masked_fill(~lower, float("-inf")).exp()
    last = g_cumsum[..., -1:]
    start, end, whole = (x.to(g.dtype).exp()[..., None] for x in (g_cumsum, last - g_cumsum, last))
    return Decays(start, end, whole, pairs)


def _inverse(x: Inputs, decays: Decays) -> Tensor:
    lower = (x.beta[..., None] * decays.pairs * (x.k @ x.k.mT)).tril(-1)
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower + identity, identity, upper=False, unitriangular=True)
    return inverse


def _scan(
    x: Inputs, decays: Decays, inverse: Tensor, chunks: Chunks, state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pass the state along the chunks. Returns the states in front of them, W, U, and the final states."""
    final, S = state.clone(), torch.zeros_like(state[:1]).expand(chunks.sequence.shape[0], -1, -1, -1)
    states, errors, updates = [], [], []
    for i in range(chunks.sequence.shape[1]):
        sequence = chunks.sequence[:, i]
        S = torch.where(chunks.first[:, i, None, None, None], state[sequence], S)
        W = x.v[:, i] - decays.start[:, i] * (x.k[:, i] @ S)
        U = inverse[:, i] @ (x.beta[:, i, :, :, None] * W)
        states.append(S)
        errors.append(W)
        updates.append(U)
        S = decays.whole[:, i] * S + x.k[:, i].mT @ (decays.end[:, i] * U)
        final[sequence] = S
    return torch.stack(states, 1), torch.stack(errors, 1), torch.stack(updates, 1), final


def _initial(state: Tensor | None, like: Tensor, sequences: int, heads: int, K: int, V: int) -> Tensor:
    """States in front of the sequences, and one of zeros for the chunks without tokens: [S + 1, H, K, V]."""
    padded = like.new_zeros(sequences + 1, heads, K, V)
    if state is not None:
        padded[:-1] = state.to(padded.dtype)
    return padded


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    beta_scale: float,
    chunk_size: int,
) -> Outputs:
    """o, the final state, zeros in place of the kernels' gate vectors, and the inverse A; see `saved_shapes`."""
    tokens = Inputs(*_widen((q, k, v, g, beta), cu_seqlens))
    x, chunks, _ = _prepare(tokens, A_log, dt_bias, cu_seqlens, qk_l2norm, beta_scale, chunk_size)
    decays = _decays(x.g)
    inverse = _inverse(x, decays)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = _initial(initial_state, x.v, sequences, v.shape[2], q.shape[3], v.shape[3])
    states, _, U, final = _scan(x, decays, inverse, chunks, state)
    P = scale * decays.pairs * (x.q @ x.k.mT)
    o = scale * decays.start * (x.q @ states) + P @ U
    return scatter(o, chunks, v).to(v.dtype), final[:-1].clone(), *_saved(inverse, v, cu_seqlens)


def _saved(inverse_RMHCC: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    gates, chunks = saved_shapes(v, cu_seqlens, inverse_RMHCC.shape[-1])
    saved = inverse_RMHCC.new_zeros(chunks, dtype=v.dtype if v.is_cuda else inverse_RMHCC.dtype)
    used = inverse_RMHCC.flatten(0, 1)[: chunks[0]]
    saved[: used.shape[0]] = used
    return inverse_RMHCC.new_zeros(gates), saved


def _restored(saved: Tensor, x: Inputs) -> Tensor:
    """The inverse [R, M, H, C, C] from what `_saved` made of it."""
    rows, chunks = x.v.shape[:2]
    inverse = x.v.new_zeros(rows * chunks, *saved.shape[1:])
    inverse[: saved.shape[0]] = saved[: rows * chunks]
    return inverse.view(rows, chunks, *saved.shape[1:])


def _prepare(
    tokens: Inputs,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    qk_l2norm: bool,
    beta_scale: float,
    chunk_size: int,
) -> tuple[Inputs, Chunks, Inputs]:
    """The rule's inputs by chunks with q and k repeated to value heads, the chunks, and the inputs by tokens."""
    active = _activate(*tokens, A_log, dt_bias, qk_l2norm, beta_scale)
    chunks = chunk_table(tokens.v, cu_seqlens, chunk_size)
    heads = tokens.v.shape[2]
    q, k, v, g, beta = (gather(x, chunks) for x in active)
    # A chunk's padding must neither decay nor correct the state, whatever the gates make of zeros.
    return Inputs(_to_value_heads(q, heads), _to_value_heads(k, heads), v, g, beta), chunks, active


def backward(
    do: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    gates: Tensor,
    inverse: Tensor,
    scale: float,
    qk_l2norm: bool,
    beta_scale: float,
    chunk_size: int,
) -> Outputs:
    """Gradients of q, k, v, g, beta, A_log, dt_bias and the initial state; empty for those that are None."""
    tokens = Inputs(*_widen((q, k, v, g, beta), cu_seqlens))
    x, chunks, active = _prepare(tokens, A_log, dt_bias, cu_seqlens, qk_l2norm, beta_scale, chunk_size)
    decays, A = _decays(x.g), _restored(inverse, x)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = (sequences, v.shape[2], q.shape[3], v.shape[3])
    states, W, U, _ = _scan(x, decays, A, chunks, _initial(initial_state, x.v, *sizes))
    do_RMHCV = torch.zeros_like(x.v) if do is None else gather(do.to(x.v.dtype), chunks)
    dstates, Z, dinitial = _scan_back(x, decays, A, chunks, do_RMHCV, _initial(dfinal_state, x.v, *sizes), scale=scale)
    grads = _chunk_gradients(x, decays, do_RMHCV, states, dstates, W, U, Z, scale)
    key_heads = q.shape[2]
    dq, dk = (_to_key_heads(d, key_heads) for d in (grads.q, grads.k))
    dactive = Inputs(*(scatter(d, chunks, v) for d in (dq, dk, *grads[2:])))
    dtokens, dA_log, ddt_bias = _activate_backward(dactive, tokens, active, A_log, dt_bias, qk_l2norm, beta_scale)
    first = (d.to(p.dtype).contiguous() for d, p in zip(dtokens, (q, k, v, g, beta), strict=True))
    last = (dA_log, ddt_bias, None if initial_state is None else dinitial[:-1].clone())
    return (*first, *(q.new_empty(0) if d is None else d for d in last))


def _scan_back(
    x: Inputs, decays: Decays, inverse: Tensor, chunks: Chunks, do: Tensor, dfinal: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan's gradient. Returns the gradients of the states behind the chunks, Z = A^T dU, and of initial states."""
    P = scale * decays.pairs * (x.q @ x.k.mT)
    dU_local, dS_local = P.mT @ do, (scale * decays.start * x.q).mT @ do
    dinitial, dS = dfinal.clone(), torch.zeros_like(dfinal[:1]).expand(chunks.sequence.shape[0], -1, -1, -1)
    dstates, Zs = [], []
    for i in reversed(range(chunks.sequence.shape[1])):
        sequence = chunks.sequence[:, i]
        dS = torch.where(chunks.last[:, i, None, None, None], dfinal[sequence], dS)
        dU = dU_local[:, i] + decays.end[:, i] * (x.k[:, i] @ dS)
        Z = inverse[:, i].mT @ dU
        dstates.append(dS)
        Zs.append(Z)
        dW = x.beta[:, i, :, :, None] * Z
        dS = decays.whole[:, i] * dS + dS_local[:, i] - (decays.start[:, i] * x.k[:, i]).mT @ dW
        dinitial[sequence] = dS
    return torch.stack(dstates[::-1], 1), torch.stack(Zs[::-1], 1), dinitial


def _chunk_gradients(
    x: Inputs,
    decays: Decays,
    do: Tensor,
    states: Tensor,
    dstates: Tensor,
    W: Tensor,
    U: Tensor,
    Z: Tensor,
    scale: float,
) -> Inputs:
    """Gradients of the rule's inputs from what both scans left behind, every chunk by itself.

    The inverse needs no matrix of its own here: its gradient is the product -Z U^T (the rank of V).
    """
    pairs, beta = decays.pairs, x.beta[..., None]
    KK, QK = pairs * (x.k @ x.k.mT), scale * pairs * (x.q @ x.k.mT)
    dW = beta * Z
    dL, dP = -(Z @ U.mT).tril(-1), (do @ U.mT).tril()
    dqk, dkk = scale * pairs * dP, beta * pairs * dL
    dq_state = scale * decays.start * (do @ states.mT)
    dk_start = -decays.start * (dW @ states.mT)
    dk_end = decays.end * (U @ dstates.mT)
    dq = dq_state + dqk @ x.k
    dk = dqk.mT @ x.q + (dkk + dkk.mT) @ x.k + dk_start + dk_end
    dbeta = (Z * W).sum(-1) + (dL * KK).sum(-1)
    # A gate's gradient sums over what it decays: the pairs, starts and ends that it lies between. As differences of
    # sums over G it would lose its digits where the decay is strong.
    dpairs = _behind((dP * QK + dL * beta * KK).tril(-1)).tril().sum(-2)
    dstart = (dq_state * x.q + dk_start * x.k).sum(-1).flip(-1).cumsum(-1).flip(-1)
    dend = _behind((dk_end * x.k).sum(-1))
    dwhole = (decays.whole * states * dstates).sum((-1, -2))[..., None]
    return Inputs(dq, dk, dW, dpairs + dstart + dend + dwhole, dbeta)


def _behind(x: Tensor) -> Tensor:
    """The sum of the entries before each one in the last dim."""
    return torch.nn.functional.pad(x, (1, -1)).cumsum(-1)


def _activate_backward(
    d: Inputs,
    tokens: Inputs,
    active: Inputs,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    qk_l2norm: bool,
    beta_scale: float,
) -> tuple[Inputs, Tensor | None, Tensor | None]:
    if qk_l2norm:
        d = d._replace(q=_l2norm_backward(d.q, tokens.q, active.q), k=_l2norm_backward(d.k, tokens.k, active.k))
    if beta_scale:
        d = d._replace(beta=d.beta * active.beta * torch.sigmoid(-tokens.beta))
    if A_log is None or dt_bias is None:
        return d, None, None
    rate = -A_log.to(d.g.dtype).exp() * torch.sigmoid(tokens.g + dt_bias.to(d.g.dtype))
    dA_log, dprojection = (d.g * active.g).sum((0, 1)), d.g * rate
    return d._replace(g=dprojection), dA_log.to(A_log.dtype), dprojection.sum((0, 1)).to(dt_bias.dtype)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    qk_l2norm: bool,
    beta_scale: float,
    every_state: bool = False,
) -> Outputs:
    """o and the final state, one token after the other; or the states behind all tokens of rows, [B, T, H, K, V]."""
    tokens = Inputs(*_widen((q, k, v, g, beta), cu_seqlens))
    x, chunks, _ = _prepare(tokens, A_log, dt_bias, cu_seqlens, qk_l2norm, beta_scale, 1)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = _initial(initial_state, x.v, sequences, v.shape[2], q.shape[3], v.shape[3])
    final, S, outputs = state.clone(), torch.zeros_like(state[:1]).expand(chunks.sequence.shape[0], -1, -1, -1), []
    states = []
    for t in range(chunks.sequence.shape[1]):
        sequence = chunks.sequence[:, t]
        S = torch.where(chunks.first[:, t, None, None, None], state[sequence], S) * x.g[:, t, ..., None].exp()
        k_t = x.k[:, t]
        S = S + k_t.mT @ (x.beta[:, t, ..., None] * (x.v[:, t] - k_t @ S))
        outputs.append(scale * (x.q[:, t] @ S))
        final[sequence] = S
        states += [S] if every_state else []
    o = scatter(torch.stack(outputs, 1), chunks, v)
    # Rows without tokens have a chunk all the same.
    last = torch.stack(states, 1)[:, : v.shape[1]] if every_state else final[:-1].clone()
    return o.to(v.dtype), last


def recurrent_every_state(*arguments: Any) -> Outputs:
    """`recurrent` of rows, whose states behind all tokens are given."""
    given = [*arguments[:8], None, *arguments[8:], True]
    return recurrent(*given)
