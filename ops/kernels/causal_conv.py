# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, assignment"
# ruff: noqa: RUF005  (Triton's language has no starred expressions)
"""The short causal convolution with SiLU in Triton: forward and backward, documents, carried states.

Tap k is the one k tokens back, x[s-k] its input at token s, and age = s - (first token of s's document):

    total[s] = sum_k w_k x[s-k]                      where k > age reads the document's initial state instead
    y[s] = silu(total[s])
    p[s] = dy[s] silu'(total[s])
    dx[s] = sum_k w_k p[s+k] + (dfinal_state of s, if s is among its document's last W-1 tokens)
    dw_k = sum_s p[s] x[s-k]

A program takes a tile of channels and a span of consecutive tokens, and walks the span with the last W-1 inputs in
registers: every input is read once. Backward also keeps the W-1 gradients that later tokens still add to, and its
share of dw over the whole span. Where nothing special happens a step is ROWS tokens, all loaded before anything is
stored; at the ends of a document or a span it is one token, with every case masked. The states [N, C, W-1] are tiny and
have programs of their own at the end of the same grid. What leaves a program depends on shapes alone, so repeated runs
agree bit by bit. Which products are added without rounding is written down and not left to the compiler (fma, and
enable_fp_fusion off), or a token's bits would depend on whether a step took it alone.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3n_functional.ops.kernels.launch import launch
from q3n_functional.ops.kernels.partial_sums import sum_partials
from q3n_functional.ops.kernels.rows import as_rows
from q3n_functional.ops.kernels.sigmoid import sigmoid
from q3n_functional.ops.registration import UnsupportedError

MAX_TAPS = 4
MIN_CHANNELS = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NUM_SMS = 132  # of the card that the configurations below are meant for; results depend on it, so it is not asked


@triton.jit
def _document(token, cu, num_docs, num_tokens, T, DOCUMENTS: tl.constexpr):
    """The document that holds `token`, its first token and the one behind its last; num_docs on the tail."""
    if DOCUMENTS:
        n = token * 0
        high = n + num_docs
        while n < high:
            middle = (n + high) // 2
            before = tl.load(cu + middle + 1) <= token
            n = tl.where(before, middle + 1, n)
            high = tl.where(before, high, middle)
        start = tl.load(cu + n).to(tl.int64)
        end = tl.load(cu + n + 1, mask=n < num_docs, other=num_tokens).to(tl.int64)
    else:
        n = token // T
        start = n * T
        end = start + T
    return n, start, end


@triton.jit
def _advance(token, n, start, end, cu, num_docs, num_tokens, T, DOCUMENTS: tl.constexpr):
    """`_document` of `token`, from that of the token before."""
    if DOCUMENTS:
        while (end <= token) & (n < num_docs):
            n += 1
            start = end
            end = tl.load(cu + n + 1, mask=n < num_docs, other=num_tokens).to(tl.int64)
    else:
        beyond = end <= token
        n = tl.where(beyond, n + 1, n)
        start = tl.where(beyond, end, start)
        end = tl.where(beyond, end + T, end)
    return n, start, end


@triton.jit
def _weights(weight, c, C: tl.constexpr, W: tl.constexpr):
    """The W taps of the channels c, the current token's first."""
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight + c * W + (W - 1 - k), mask=c < C, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def _history(x, x_row, token, c, C: tl.constexpr, W: tl.constexpr):
    """The W-1 inputs before `token`, the nearest first, whatever document they belong to."""
    rows = ()
    for k in tl.static_range(1, W):
        row = tl.load(x + (token - k) * x_row + c, mask=(c < C) & (token >= k), other=0.0)
        rows = rows + (row.to(tl.float32),)
    return rows


@triton.jit
def _own_taps(now, history, initial, n, age, inside, c, C: tl.constexpr, W: tl.constexpr, INITIAL: tl.constexpr):
    """The W inputs that a token sees: its document's own, or those of the initial state, or zeros."""
    taps = (now,)
    for k in tl.static_range(1, W):
        tap = tl.where(inside & (age >= k), history[k - 1], 0.0)
        if INITIAL:
            at = initial + (n * C + c) * (W - 1) + (W - 1 - k + age)
            tap += tl.load(at, mask=(c < C) & inside & (age < k), other=0.0).to(tl.float32)
        taps = taps + (tap,)
    return taps


@triton.jit
def _total(taps, w, W: tl.constexpr):
    total = taps[0] * w[0]
    for k in tl.static_range(1, W):
        total = tl.fma(taps[k], w[k], total)
    return total


@triton.jit
def _silu_gradient(dy, total):
    gate = sigmoid(total)
    return dy * (gate * tl.fma(total, 1.0 - gate, 1.0))


@triton.jit
def _load_rows(x, x_row, token, c, C: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows from `token` on; what lies beyond the last channel is anything, and never stored."""
    rows = ()
    for r in tl.static_range(ROWS):
        rows = rows + (tl.load(x + (token + r) * x_row + c, mask=c < C),)
    return rows


@triton.jit(do_not_specialize=["num_docs", "num_tokens", "T", "span"])
def _forward_kernel(
    x, weight, initial, cu, y, final, num_docs, num_tokens, T, span, x_row,
    C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
    DOCUMENTS: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """y of one span and tile of channels, or one document's final state of a tile of channels."""
    TILES: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    c = (pid % TILES) * BC + tl.arange(0, BC)
    item = (pid // TILES).to(tl.int64)
    num_spans = (num_tokens + span - 1) // span
    if item < num_spans:
        w = _weights(weight, c, C, W)
        token = item * span
        stop = tl.minimum(token + span, num_tokens)
        n, start, end = _document(token, cu, num_docs, num_tokens, T, DOCUMENTS)
        history = _history(x, x_row, token, c, C, W)
        while token < stop:
            if (n < num_docs) & (start + (W - 1) <= token) & (token + ROWS <= tl.minimum(end, stop)):
                rows = _load_rows(x, x_row, token, c, C, ROWS)
                for r in tl.static_range(ROWS):
                    taps = (rows[r].to(tl.float32),) + history
                    total = _total(taps, w, W)
                    out = total * sigmoid(total)
                    tl.store(y + (token + r) * C + c, out.to(y.dtype.element_ty), mask=c < C)
                    history = taps[: W - 1]
                token += ROWS
            else:
                n, start, end = _advance(token, n, start, end, cu, num_docs, num_tokens, T, DOCUMENTS)
                inside = n < num_docs
                now = tl.load(x + token * x_row + c, mask=(c < C) & inside, other=0.0).to(tl.float32)
                taps = _own_taps(now, history, initial, n, token - start, inside, c, C, W, INITIAL)
                total = _total(taps, w, W)
                out = tl.where(inside, total * sigmoid(total), 0.0)
                tl.store(y + token * C + c, out.to(y.dtype.element_ty), mask=c < C)
                history = ((now,) + history)[: W - 1]
                token += 1
    else:
        n = item - num_spans
        _final_state(x, initial, cu, final, n, T, x_row, c, C, W, DOCUMENTS, INITIAL)


@triton.jit
def _bounds(n, cu, T, DOCUMENTS: tl.constexpr):
    """First token and length of document n."""
    if DOCUMENTS:
        start = tl.load(cu + n).to(tl.int64)
        length = tl.load(cu + n + 1).to(tl.int64) - start
    else:
        start = n * T
        length = (n * 0) + T
    return start, length


@triton.jit
def _final_state(
    x, initial, cu, final, n, T, x_row, c,
    C: tl.constexpr, W: tl.constexpr, DOCUMENTS: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """The last W-1 inputs of document n, its initial state in front of it."""
    start, length = _bounds(n, cu, T, DOCUMENTS)
    for i in tl.static_range(W - 1):
        position = length - (W - 1) + i
        value = tl.load(x + (start + position) * x_row + c, mask=(c < C) & (position >= 0), other=0.0)
        if INITIAL:
            at = initial + (n * C + c) * (W - 1) + (i + length)
            value = tl.where(position >= 0, value, tl.load(at, mask=(c < C) & (position < 0), other=0.0))
        tl.store(final + (n * C + c) * (W - 1) + i, value, mask=c < C)


@triton.jit
def _step_back(p, p_own, taps, w, pending, sums, W: tl.constexpr):
    """What one token's p adds: to dx of the W tokens that it sees (its own first), and to dw."""
    grads = (w[0] * p,)
    added = (tl.fma(p_own, taps[0], sums[0]),)
    for k in tl.static_range(1, W):
        grads = grads + (tl.fma(w[k], p, pending[k - 1]),)
        added = added + (tl.fma(p_own, taps[k], sums[k]),)
    return grads, added


@triton.jit
def _slow_step_back(
    token, first, own, n, start, end, history, pending, sums, w, dy, dfinal, x, initial, dx, num_docs, x_row, dy_row, c,
    C: tl.constexpr, W: tl.constexpr, INITIAL: tl.constexpr, DY: tl.constexpr, DFINAL: tl.constexpr,
):  # fmt: skip
    """One token of the walk, with every case masked: returns the next history, pending gradients and sums."""
    inside = n < num_docs
    age = token - start
    mask = (c < C) & inside
    now = tl.zeros(c.shape, tl.float32)
    grads = (now,)
    for k in tl.static_range(1, W):
        grads = grads + (pending[k - 1],)
    if DY:
        now = tl.load(x + token * x_row + c, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + token * dy_row + c, mask=mask, other=0.0).to(tl.float32)
        taps = _own_taps(now, history, initial, n, age, inside, c, C, W, INITIAL)
        p = tl.where(inside, _silu_gradient(grad, _total(taps, w, W)), 0.0)
        every, sums = _step_back(p, tl.where(token < own, p, 0.0), taps, w, pending, sums, W)
        grads = (every[0],)
        for k in tl.static_range(1, W):
            grads = grads + (tl.where(inside & (age >= k), every[k], pending[k - 1]),)
    if DFINAL:
        at = dfinal + (n * C + c) * (W - 1) + (W - 1 - (end - token))
        last = tl.load(at, mask=mask & (end - token < W), other=0.0).to(tl.float32)
        grads = (grads[0] + last,) + grads[1:]
    out = grads[W - 1].to(dx.dtype.element_ty)
    tl.store(dx + (token - (W - 1)) * C + c, out, mask=(c < C) & (token - (W - 1) >= first))
    return ((now,) + history)[: W - 1], grads[: W - 1], sums


@triton.jit(do_not_specialize=["num_docs", "num_tokens", "T", "span"])
def _backward_kernel(
    dy, dy_k, dy_v, dfinal, x, weight, initial, cu, dx, partials, dinitial, num_docs, num_tokens, T, span, x_row,
    dy_row, dy_k_row, dy_v_row, C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
    DOCUMENTS: tl.constexpr, INITIAL: tl.constexpr, DY: tl.constexpr, DFINAL: tl.constexpr, PARTS: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """dx of one span and tile of channels and its share of dweight, or one document's dinitial of such a tile.

    dy is that of all channels, or with PARTS of those before KEYS, dy_k of those from there to VALUES, dy_v of the
    others. A tile is of one of them.
    """
    TILES: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    c = (pid % TILES) * BC + tl.arange(0, BC)
    if PARTS:
        if (pid % TILES) * BC >= VALUES:
            dy = dy_v - VALUES
            dy_row = dy_v_row
        elif (pid % TILES) * BC >= KEYS:
            dy = dy_k - KEYS
            dy_row = dy_k_row
    item = (pid // TILES).to(tl.int64)
    num_spans = (num_tokens + span - 1) // span
    w = _weights(weight, c, C, W)
    if item < num_spans:
        first = item * span
        token = first
        own = tl.minimum(first + span, num_tokens)
        n, start, end = _document(token, cu, num_docs, num_tokens, T, DOCUMENTS)
        history = _history(x, x_row, token, c, C, W)
        pending = ()  # what is known of dx of the W-1 tokens before, the nearest first
        sums = (tl.zeros([BC], tl.float32),)
        for _ in tl.static_range(1, W):
            pending = pending + (tl.zeros([BC], tl.float32),)
            sums = sums + (tl.zeros([BC], tl.float32),)
        LAST: tl.constexpr = W - 1 if DFINAL else 0
        while token < own + (W - 1):  # the W-1 tokens behind the span add to dx of its last ones
            early = (n >= num_docs) | (token < tl.maximum(start, first) + (W - 1))
            if early | (token + ROWS > tl.minimum(end - LAST, own)) | (not DY):
                n, start, end = _advance(token, n, start, end, cu, num_docs, num_tokens, T, DOCUMENTS)
                history, pending, sums = _slow_step_back(
                    token, first, own, n, start, end, history, pending, sums, w, dy, dfinal, x, initial, dx, num_docs,
                    x_row, dy_row, c, C, W, INITIAL, DY, DFINAL,
                )  # fmt: skip
                token += 1
            else:
                x_rows = _load_rows(x, x_row, token, c, C, ROWS)
                dy_rows = _load_rows(dy, dy_row, token, c, C, ROWS)
                for r in tl.static_range(ROWS):
                    taps = (x_rows[r].to(tl.float32),) + history
                    p = _silu_gradient(dy_rows[r].to(tl.float32), _total(taps, w, W))
                    grads, sums = _step_back(p, p, taps, w, pending, sums, W)
                    out = grads[W - 1].to(dx.dtype.element_ty)
                    tl.store(dx + (token + r - (W - 1)) * C + c, out, mask=c < C)
                    history = taps[: W - 1]
                    pending = grads[: W - 1]
                token += ROWS
        for k in tl.static_range(W):
            at = partials + (item * W + (W - 1 - k)) * C + c
            tl.store(at, sums[k], mask=c < C)
    elif INITIAL:
        n = item - num_spans
        _initial_gradient(dy, dfinal, x, initial, cu, dinitial, n, T, x_row, dy_row, w, c, C, W, DOCUMENTS, DY, DFINAL)


@triton.jit
def _initial_gradient(
    dy, dfinal, x, initial, cu, dinitial, n, T, x_row, dy_row, w, c,
    C: tl.constexpr, W: tl.constexpr, DOCUMENTS: tl.constexpr, DY: tl.constexpr, DFINAL: tl.constexpr,
):  # fmt: skip
    """dinitial of document n, from its first W-1 tokens; what a shorter one hands through to its final state too."""
    start, length = _bounds(n, cu, T, DOCUMENTS)
    state = (n * C + c) * (W - 1)
    # A walk over those tokens, with the initial inputs for a history.
    history = ()
    pending = ()
    for k in tl.static_range(1, W):
        history = history + (tl.load(initial + state + (W - 1 - k), mask=c < C, other=0.0).to(tl.float32),)
        pending = pending + (tl.zeros(c.shape, tl.float32),)
    for m in tl.static_range(W - 1):
        grads = (tl.zeros(c.shape, tl.float32),) + pending
        if DY:
            mask = (c < C) & (m < length)
            now = tl.load(x + (start + m) * x_row + c, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(dy + (start + m) * dy_row + c, mask=mask, other=0.0).to(tl.float32)
            taps = (now,) + history
            p = tl.where(m < length, _silu_gradient(grad, _total(taps, w, W)), 0.0)
            for k in tl.static_range(1, W):
                grads = grads[:k] + (tl.fma(w[k], p, grads[k]),) + grads[k + 1 :]
            history = taps[: W - 1]
        out = grads[W - 1]  # of the initial input m
        if DFINAL:
            passed = tl.load(dfinal + state + (m - length), mask=(c < C) & (length <= m), other=0.0)
            out += passed.to(tl.float32)
        tl.store(dinitial + state + m, out.to(dinitial.dtype.element_ty), mask=c < C)
        pending = grads[: W - 1]


class Config(NamedTuple):
    """Launch configuration: channels a program takes, tokens a fast step takes, warps, programs to aim for."""

    channels: int
    rows: int
    warps: int
    programs: int


FORWARD = Config(channels=512, rows=8, warps=4, programs=NUM_SMS * 32)
BACKWARD = Config(channels=512, rows=8, warps=4, programs=NUM_SMS * 8)
FORWARD_MAX_SPAN = 256


def _shrunk(config: Config, channels: int) -> Config:
    """The same work a thread for fewer channels."""
    wanted = max(MIN_CHANNELS, triton.next_power_of_2(channels))
    if wanted >= config.channels:
        return config
    return config._replace(channels=wanted, warps=max(1, config.warps * wanted // config.channels))


def _check(x: Tensor, weight: Tensor) -> None:
    width = weight.shape[1]
    if not 1 <= width <= MAX_TAPS:
        raise UnsupportedError(f"{width} taps: the Triton kernels take 1 to {MAX_TAPS}")
    if x.dtype not in DTYPES:
        raise UnsupportedError(f"x is {x.dtype}: the Triton kernels take bf16, fp16 and fp32")


def forward(
    x_BTC: Tensor, weight_CW: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, config: Config = FORWARD
) -> tuple[Tensor, Tensor]:
    """Return y and the final state, as `q3n_functional.ops.causal_conv` says."""
    _check(x_BTC, weight_CW)
    batch, length, channels = x_BTC.shape
    width, tokens = weight_CW.shape[1], batch * length
    num_docs = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = torch.empty(x_BTC.shape, dtype=x_BTC.dtype, device=x_BTC.device)
    final = torch.empty(num_docs, channels, width - 1, dtype=x_BTC.dtype, device=x_BTC.device)
    config = _shrunk(config, channels)
    tiles = triton.cdiv(channels, config.channels)
    span = min(FORWARD_MAX_SPAN, triton.next_power_of_2(max(1, tokens * tiles // config.programs)))
    programs = tiles * (triton.cdiv(tokens, span) + num_docs)
    if programs:
        x = as_rows(x_BTC)
        launch(_forward_kernel, programs)(
            x, weight_CW.contiguous(), _contiguous(initial_state), _contiguous(cu_seqlens), y, final,
            num_docs, tokens, length, span, x.stride(0), C=channels, W=width, BC=config.channels, ROWS=config.rows,
            DOCUMENTS=cu_seqlens is not None, INITIAL=initial_state is not None, num_warps=config.warps, num_stages=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    return y, final


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def backward(
    dy_BTC: Tensor | None, dfinal_state: Tensor | None, x_BTC: Tensor, weight_CW: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, config: Config = BACKWARD,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight and initial_state (empty where that is None)."""
    dys = () if dy_BTC is None else (dy_BTC,)
    return _backward(dys, dfinal_state, x_BTC, weight_CW, initial_state, cu_seqlens, config)


def backward_of_parts(
    dq_BTC: Tensor, dk_BTC: Tensor, dv_BTC: Tensor, dfinal_state: Tensor | None, x_BTC: Tensor, weight_CW: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, config: Config = BACKWARD,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`backward` of three parts of y."""
    dys = dq_BTC, dk_BTC, dv_BTC
    tile = math.gcd(_shrunk(config, x_BTC.shape[2]).channels, dq_BTC.shape[2], dk_BTC.shape[2])
    # Tiles of one part each would be too narrow; the row of a part without channels a constant to Triton.
    if tile < MIN_CHANNELS or not all(dy.numel() for dy in dys):
        dys = (torch.cat(dys, -1),)
    else:
        config = _shrunk(config, tile)
    return _backward(dys, dfinal_state, x_BTC, weight_CW, initial_state, cu_seqlens, config)


def _backward(
    dys: tuple[Tensor, ...], dfinal_state: Tensor | None, x_BTC: Tensor, weight_CW: Tensor,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, config: Config,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check(x_BTC, weight_CW)
    batch, length, channels = x_BTC.shape
    width, tokens = weight_CW.shape[1], batch * length
    num_docs = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dx = torch.empty(x_BTC.shape, dtype=x_BTC.dtype, device=x_BTC.device)
    dinitial = x_BTC.new_empty(0)
    if initial_state is not None:
        dinitial = torch.empty(initial_state.shape, dtype=initial_state.dtype, device=x_BTC.device)
    config = _shrunk(config, channels)
    tiles = max(1, triton.cdiv(channels, config.channels))
    # A span ends in W-1 single steps, and begins with as many.
    steps = triton.cdiv(triton.cdiv(tokens * tiles, config.programs), config.rows)
    span = max(1, steps) * config.rows + width - 1
    spans = triton.cdiv(tokens, span)
    partials = torch.empty(spans, width, channels, dtype=torch.float32, device=x_BTC.device)
    programs = tiles * (spans + (0 if initial_state is None else num_docs))
    if programs and channels:
        x = as_rows(x_BTC)
        given = [as_rows(dy) for dy in dys]
        given += [x] * (3 - len(given))  # stand-ins: the branches that are never taken compile too
        parts = len(dys) == 3
        keys, values = (dys[0].shape[2], channels - dys[2].shape[2]) if parts else (0, 0)
        launch(_backward_kernel, programs)(
            *given, _contiguous(dfinal_state), x, weight_CW.contiguous(), _contiguous(initial_state),
            _contiguous(cu_seqlens), dx, partials, dinitial, num_docs, tokens, length, span, x.stride(0),
            *(dy.stride(0) for dy in given), C=channels, W=width, BC=config.channels, ROWS=config.rows,
            DOCUMENTS=cu_seqlens is not None, INITIAL=initial_state is not None, DY=len(dys) > 0,
            DFINAL=dfinal_state is not None, PARTS=parts, KEYS=keys, VALUES=values, num_warps=config.warps,
            num_stages=1, maxnreg=128 if x.element_size() == 2 else None, enable_fp_fusion=False,
        )  # fmt: skip
    return dx, sum_partials(partials, weight_CW.dtype), dinitial
