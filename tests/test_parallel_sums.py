"""The table of sums over ranks in a step, pinned; without any one of them the step is another."""

import pytest
from expecttest import assert_expected_inline

from q3n_functional.parallel import mesh, rules
from q3n_functional.parallel.rules import STORAGE
from tests import parallel_ranks
from tests.parallel_ranks import SHALLOW, Case
from tests.simulated import simulate
from tests.sums import noted

GRADIENT = "gradients "
CASES = [Case(layout, SHALLOW, steps=1) for layout in ("dp=2", "replicate=2", "tp=2", "cp=2", "ep=2")]
CASES.insert(3, Case("tp=2", SHALLOW, steps=1, sequence=False))


def name(case):
    """Of its layout."""
    return case.mesh + " without sequence" * (not case.sequence)


def errors(case, missing=None):
    """The largest error of any rank by name, and the sums that were done or left out."""
    parallel_ranks.expected(case)
    with noted(missing) as sums:
        ranks = simulate(2, lambda: parallel_ranks.errors(case))
    return {name: max(rank[name] for rank in ranks) for name in ranks[0]}, sums.found


def row(one):
    asked = f"{one.asked.function}: {one.asked.calls}"
    return f"  {asked:36} {one.kind:15} {one.axis:10} {'backward' if one.backward else 'forward'}"


@pytest.fixture(scope="module")
def table():
    """The sums of each case that no case before it has."""
    known, found = set(), {}
    for case in CASES:
        wrong, sums = errors(case)
        assert max(wrong.values()) < 1e-10
        found[name(case)] = sorted(sums - known)
        known |= sums
    return found


def test_the_sums_of_a_step(table):
    lines = [line for layout, sums in table.items() for line in (layout, *dict.fromkeys(map(row, sums)))]
    assert_expected_inline(
        "\n".join(lines),
        """\
dp=2
  _around_layer: whole                 all_reduce sum  fsdp       backward
  _around_layer: whole                 reduce_scatter  fsdp       backward
  _outer: whole                        all_reduce sum  fsdp       backward
  _outer: whole                        reduce_scatter  fsdp       backward
  _over_ranks: summed                  all_reduce sum  tokens     forward
  _over_ranks: summed                  all_reduce sum  tokens     backward
  finish: summed                       all_reduce sum  tokens     forward
  finish: summed                       all_reduce sum  world      forward
  finish: worth                        all_reduce sum  world      forward
  run: whole                           all_reduce sum  fsdp       backward
  run: whole                           reduce_scatter  fsdp       backward
  update_: total_norm                  all_reduce sum  world      forward
replicate=2
  _around_layer: whole                 all_reduce sum  replicate  backward
  _outer: whole                        all_reduce sum  replicate  backward
  run: whole                           all_reduce sum  replicate  backward
tp=2
  _around_layer: whole                 all_reduce sum  tp         backward
  _outer: whole                        all_reduce sum  tp         backward
  decoder_layer: enter_block           reduce_scatter  tp         backward
  decoder_layer: leave_block           reduce_scatter  tp         forward
  finish: cross_entropy                all_reduce max  tp         forward
  finish: cross_entropy                all_reduce sum  tp         forward
  finish: cross_entropy                all_reduce sum  tp         backward
  finish: cross_entropy                reduce_scatter  tp         backward
  loss: embed                          reduce_scatter  tp         forward
  run: whole                           all_reduce sum  tp         backward
tp=2 without sequence
  decoder_layer: leave_block           all_reduce sum  tp         forward
  decoder_layer: leave_block           all_reduce sum  tp         backward
  loss: embed                          all_reduce sum  tp         forward
  loss: embed                          all_reduce sum  tp         backward
cp=2
  _delta_rule: carried_inputs          reduce_scatter  cp         backward
  _delta_rule: carried_rule            reduce_scatter  cp         backward
  gated_attention: crossing_attention  reduce_scatter  cp         backward
ep=2
  _around_layer: whole                 all_reduce sum  ep_copies  backward
  _outer: whole                        all_reduce sum  ep_copies  backward
  run: whole                           all_reduce sum  ep_copies  backward""",
    )


@pytest.mark.parametrize("case", CASES, ids=name)
def test_each_sum_is_needed(table, case):
    shown = {}
    for missing in table[name(case)]:
        wrong, done = errors(case, missing)
        assert missing in done
        assert max(wrong.values()) > 1e-6, row(missing)
        if missing.asked.calls == "whole":
            names = {name.removeprefix(GRADIENT) for name, value in wrong.items() if value > 1e-6 and GRADIENT in name}
            axis = missing.axis.removesuffix("_copies")
            shown.setdefault((missing.kind == "reduce_scatter", axis), set()).update(names)
    # Each parameter's gradient has its own part in these: the norms', which are whole everywhere, and all others'.
    layouts = rules.named_layouts(parallel_ranks.expected(case)[0], mesh.parse(case.mesh))
    for (scattered, axis), names in shown.items():
        cut = {name for name, where in layouts.items() if dict(zip(STORAGE, where.dims, strict=True))[axis] is not None}
        assert names == (cut if scattered else layouts.keys() - cut), axis
