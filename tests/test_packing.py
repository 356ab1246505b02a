"""Documents against plain Python lists of them."""

import itertools

import pytest
import torch
from expecttest import assert_expected_inline

from q3n_functional import packing
from q3n_functional.packing import IGNORE, documents, documents_from_mask, same_document, shift

# Rows, row length, document offsets.
CASES = {
    "one": (1, 6, [0, 6]),
    "several": (1, 9, [0, 2, 3, 9]),
    "empty documents": (1, 7, [0, 0, 3, 3, 3, 7]),
    "repeated last entry and padding": (1, 9, [0, 2, 5, 5, 5]),
    "all padding": (1, 4, [0, 0]),
    "no document": (1, 4, [0]),
    "rows": (3, 4, [0, 4, 5, 8, 12]),
    "rows and padding": (3, 4, [0, 3, 4, 8, 9, 9]),
}
each_case = pytest.mark.parametrize(("rows", "length", "bounds"), CASES.values(), ids=CASES)


def offsets(bounds):
    return torch.tensor(bounds, dtype=torch.int32)


def owners(rows, length, bounds):
    """For each token the document, the position in it and its length; documents count from 0."""
    tokens = [(i, t - a, b - a) for i, (a, b) in enumerate(itertools.pairwise(bounds)) for t in range(a, b)]
    return tokens + [None] * (rows * length - bounds[-1])


@each_case
def test_documents(rows, length, bounds):
    docs = documents(offsets(bounds), rows, length)
    expected = owners(rows, length, bounds)
    assert docs.cu_seqlens.tolist() == bounds
    assert docs.valid_BT.flatten().tolist() == [owner is not None for owner in expected]
    segments, positions = docs.segment_ids_BT.flatten().tolist(), docs.positions_BT.flatten().tolist()
    lengths = packing.lengths(docs).flatten().tolist()
    kept = bounds[-1]
    assert list(zip(segments, positions, lengths, strict=True))[:kept] == expected[:kept]
    # Padding is nobody's: its segment is no document's and its length 0.
    assert set(segments[kept:]) <= {len(bounds) - 1}
    assert set(lengths[kept:]) <= {0}
    assert {x.dtype for x in (docs.positions_BT, docs.segment_ids_BT, packing.lengths(docs))} == {torch.int32}
    assert {x.shape for x in docs[1:]} == {(rows, length)}


@each_case
@pytest.mark.parametrize("by", [0, 1, 2, 5, 20])
def test_shift(rows, length, bounds, by):
    docs, owner = documents(offsets(bounds), rows, length), owners(rows, length, bounds)
    values = torch.arange(rows * length).view(rows, length) + 100
    same, shifted = [], []
    for i in range(rows * length):
        target = i + by
        inside = target < rows * length and owner[i] is not None and owner[target] is not None
        same.append(inside and owner[i][0] == owner[target][0] and i // length == target // length)
        shifted.append(100 + target if same[-1] else IGNORE)
    assert same_document(docs, by).flatten().tolist() == same
    assert shift(values, docs, by, IGNORE).flatten().tolist() == shifted


@pytest.mark.parametrize("by", [0, 1, 3, 4, 9])
def test_shift_of_rows(by):
    """Without documents each row is one."""
    values = torch.arange(8).view(2, 4)
    expected = [[row[t + by] if t + by < 4 else -1 for t in range(4)] for row in values.tolist()]
    assert shift(values, None, by, -1).tolist() == expected
    whole_rows = documents(offsets([0, 4, 8]), 2, 4)
    assert torch.equal(shift(values, None, by, -1), shift(values, whole_rows, by, -1))


MASKS = {
    "nothing padded": ["1111", "1111"],
    "right": ["1110", "1000"],
    "left": ["0111", "0001"],
    "both": ["0110", "1111"],
    "holes": ["1011", "0101"],
    "an empty row": ["0000", "0110"],
    "one row": ["0011"],
}


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", [lambda m: m.bool(), lambda m: m.long(), lambda m: 7 * m.long(), lambda m: m.float()])
def test_documents_from_mask(rows, kind):
    mask = torch.tensor([[int(c) for c in row] for row in rows])
    docs = documents_from_mask(kind(mask))
    assert torch.equal(docs.valid_BT, mask.bool())
    assert docs.cu_seqlens.shape == (3 * len(rows) + 1,)
    assert docs.cu_seqlens[-1] == mask.numel()
    seen = set()
    for row, segments, positions in zip(rows, docs.segment_ids_BT.tolist(), docs.positions_BT.tolist(), strict=True):
        if "1" in row:
            first, end = row.index("1"), row.rindex("1") + 1
            assert positions[first:end] == list(range(end - first))
            assert len(set(segments[first:end])) == 1
            # What is padded on either side belongs to other documents.
            assert segments[first] not in segments[:first] + segments[end:]
        assert not seen & set(segments)
        seen |= set(segments)


def test_holes_have_no_targets():
    docs = documents_from_mask(torch.tensor([[0, 1, 0, 1, 1]]))
    tokens = torch.tensor([[10, 11, 12, 13, 14]])
    assert shift(tokens, docs, 1, IGNORE).tolist() == [[IGNORE, IGNORE, IGNORE, 14, IGNORE]]
    assert shift(tokens, docs, 2, IGNORE).tolist() == [[IGNORE, 13, IGNORE, IGNORE, IGNORE]]


def test_compiles_once():
    def everything(cu_seqlens, mask, values):
        docs, padded = documents(cu_seqlens, *values.shape), documents_from_mask(mask)
        return docs, packing.lengths(docs), padded, shift(values, docs, 1, IGNORE), shift(values, padded, 2, IGNORE)

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length, bounds in ((6, [0, 2, 2, 5, 5]), (9, [0, 1, 9, 18, 18]), (14, [0, 0, 14, 14, 28])):
            values = torch.arange(2 * length).view(2, length)
            arguments = offsets(bounds), values % 3 > 0, values
            torch.testing.assert_close(compiled(*arguments), everything(*arguments), rtol=0, atol=0)


def test_errors():
    messages = []
    values = [[1, 4], [0, 3, 2, 4], [0, 9], [-1, 4], [0, 1, 1, 3, 4, 5], range(20)]
    for wrong in (torch.tensor([0, 4]), offsets([[0, 4]]), torch.tensor([0.0, 4.0]), *map(offsets, values)):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 (all texts are pinned below)
            documents(wrong, 4, 2)
        messages.append(str(raised.value))
    assert_expected_inline(
        "\n".join(messages),
        """\
cu_seqlens must be int32 [S+1], got torch.int64 (2,)
cu_seqlens must be int32 [S+1], got torch.int32 (1, 2)
cu_seqlens must be int32 [S+1], got torch.float32 (2,)
cu_seqlens must be offsets into 8 tokens, from 0 on, that never fall, got [1, 4]
cu_seqlens must be offsets into 8 tokens, from 0 on, that never fall, got [0, 3, 2, 4]
cu_seqlens must be offsets into 8 tokens, from 0 on, that never fall, got [0, 9]
cu_seqlens must be offsets into 8 tokens, from 0 on, that never fall, got [-1, 4]
document 2 has tokens 1 to 3, over the end of a row of 2: cut it there
cu_seqlens must be offsets into 8 tokens, from 0 on, that never fall, got [0, 1, 2, 3, 4, 5, 6, 7, ...]""",
    )
