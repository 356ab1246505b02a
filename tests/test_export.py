"""Exported programs, run in a process that cannot import the model, beside the model."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from q3n_functional import cache as caches
from q3n_functional import checkpoint, cli, decode, exported, model
from q3n_functional.export import export
from tests.configs import perturbed, small

ROWS, CAPACITY, STEPS = 3, 24, 10
CONFIG = small(
    num_hidden_layers=2,
    layer_types=("linear_attention", "full_attention"),
    mlp_only_layers=(0,),
    intermediate_size=24,
    linear_attention_chunk_size=4,
)
PARAMS = perturbed(CONFIG)
PIECES = ([[5, 9, 1, 33, 2], [7], [11, 12, 13, 14, 15, 16, 17, 18, 19]], [[3, 4], [], [60, 1, 2]], [[], [8], []])
"""Prompts by row, read in three pieces of very different lengths; the last is a single token."""

RUN = """
import json, sys
import torch
from q3n_functional import exported

folder, aot, pieces, steps, out = sys.argv[1], *map(json.loads, sys.argv[2:5]), sys.argv[5]
programs = exported.load(folder, aot=aot)
cache = exported.empty_cache(programs)
logits, last = [], torch.zeros(len(pieces[0]), programs.manifest["output"]["logits"]["shape"][1])
for piece in pieces:
    cu_seqlens = torch.tensor([0, *map(len, piece)]).cumsum(0, dtype=torch.int32)
    new = exported.prefill(programs, torch.tensor([sum(piece, [])]), cu_seqlens, cache)
    last = torch.where(cu_seqlens.diff()[:, None] > 0, new, last)
tokens = []
for step in range(steps):
    active = torch.tensor([True, step % 3 != 1, True])
    token = torch.where(active, last.argmax(1), -1)
    tokens.append(token)
    logits.append(last)
    last = torch.where(active[:, None], exported.decode(programs, token.clamp(min=0), active, cache), last)
torch.save({"tokens": torch.stack(tokens), "logits": torch.stack([*logits, last]), "cache": cache}, out)
print(json.dumps(sorted(name for name in sys.modules if name.startswith("q3n_functional"))))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of the model, with a tokenizer's file."""
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save(folder, PARAMS, CONFIG, extras=checkpoint.Extras({}, {"tokenizer.json": b"{}"}))
    return folder


@pytest.fixture(scope="module")
def programs(source, tmp_path_factory):
    """What the command writes."""
    out = tmp_path_factory.mktemp("out") / "programs"
    sizes = ("--rows", str(ROWS), "--capacity", str(CAPACITY))
    cli.main(["export", str(source), str(out), *sizes, "--device", "cpu"])
    return out


def run_apart(folder, out, aot=False):
    """What the programs give in another process, and which modules of this package it imported."""
    arguments = [str(folder), json.dumps(aot), json.dumps(PIECES), str(STEPS), str(out)]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(out), json.loads(done.stdout.splitlines()[-1])


def check(results, modules):
    """The programs' tokens are those of the whole model without a cache, their cache is that of `decode.extend`."""
    others = [m for m in modules if not m.startswith("q3n_functional.ops.")]
    assert others == ["q3n_functional", "q3n_functional.exported", "q3n_functional.ops"]
    texts = []
    for row in range(ROWS):
        text = [token for piece in PIECES for token in piece[row]]
        for step in range(STEPS):
            logits_V = model.forward(PARAMS, torch.tensor([text]), config=CONFIG)[0, -1]
            torch.testing.assert_close(results["logits"][step, row], logits_V, atol=1e-5, rtol=1e-5)
            token = int(results["tokens"][step, row])
            assert token == (-1 if row == 1 and step % 3 == 1 else int(logits_V.argmax()))
            text += [token] if token >= 0 else []
        logits_V = model.forward(PARAMS, torch.tensor([text]), config=CONFIG)[0, -1]
        torch.testing.assert_close(results["logits"][STEPS, row], logits_V, atol=1e-5, rtol=1e-5)
        texts.append(text)
    check_cache(results["cache"], texts)


def check_cache(given, texts):
    lengths = torch.tensor([len(text) for text in texts])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    empty = caches.empty(CONFIG, ROWS, CAPACITY, torch.float32)
    tokens_1T = torch.tensor([[token for text in texts for token in text]])
    _, cache = decode.extend(PARAMS, tokens_1T, cu_seqlens, empty, config=CONFIG)
    linear, full = cache.layers
    assert given["lengths_B"].tolist() == cache.lengths_B.tolist() == lengths.tolist()
    torch.testing.assert_close(given["layers.0.conv"], linear.conv, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given["layers.0.recurrent"], linear.recurrent, atol=1e-5, rtol=1e-5)
    kept = torch.arange(CAPACITY) < lengths[:, None]
    for name, leaf in (("k", full.k), ("v", full.v)):
        torch.testing.assert_close(given[f"layers.1.{name}"][kept], leaf[kept], atol=1e-5, rtol=1e-5)


def test_programs_write_what_the_model_writes_without_its_code(programs, tmp_path):
    check(*run_apart(programs, tmp_path / "results.pt"))


# AOTInductor copies tree specifications in a way that torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
def test_packages_of_aotinductor_too(source, tmp_path):
    export(source, tmp_path / "out", rows=ROWS, capacity=CAPACITY, aot=True)
    check(*run_apart(tmp_path / "out", tmp_path / "results.pt", aot=True))


def test_the_folder_is_whole_and_weights_are_in_it_once(programs):
    assert sorted(path.name for path in programs.iterdir()) == [
        "config.json", "decode.pt2", "exported.json", "prefill.pt2", "tokenizer.json", "weights.safetensors",
    ]  # fmt: skip
    assert json.loads((programs / "config.json").read_text())["model_type"] == "qwen3_next"
    for name in ("prefill.pt2", "decode.pt2"):
        with zipfile.ZipFile(programs / name) as file:
            data = sum(item.file_size for item in file.infolist() if "/data/" in item.filename)
        assert data < 5000 < (programs / "weights.safetensors").stat().st_size


def test_the_manifest_lists_the_inputs_of_the_graph_in_order(programs):
    manifest = json.loads((programs / "exported.json").read_text())
    for name, inputs in manifest["programs"].items():
        program = torch.export.load(programs / f"{name}.pt2")
        listed = [*inputs.values(), *manifest["cache"].values(), *manifest["weights"].values()]
        nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
        assert len(listed) == len(nodes)
        for described, node in zip(listed, nodes, strict=True):
            tensor = node.meta["val"]
            assert str(tensor.dtype) == f"torch.{described['dtype']}"
            assert [None if isinstance(size, list) else size for size in described["shape"]] == [
                size if isinstance(size, int) else None for size in tensor.shape
            ]


def test_operators_stay_operators(programs):
    for name, rule in (("prefill", "gated_delta_rule"), ("decode", "recurrent_gated_delta_rule")):
        targets = {str(node.target) for node in torch.export.load(programs / f"{name}.pt2").graph.nodes}
        rest = "attention", "causal_conv", "grouped_swiglu", "rms_norm_gated", "router_logits", "top_experts"
        for op in (rule, *rest):
            assert f"q3n.{op}.default" in targets


def test_a_precision_of_16_bits(source, tmp_path):
    export(source, tmp_path / "out", rows=1, capacity=2, dtype=torch.bfloat16)
    loaded = exported.load(tmp_path / "out")
    cache, params = exported.empty_cache(loaded), checkpoint.load(source, torch.bfloat16).params
    logits_NV = exported.prefill(loaded, torch.tensor([[3]]), torch.tensor([0, 1], dtype=torch.int32), cache)
    logits_NV = exported.decode(loaded, torch.tensor([4]), torch.tensor([True]), cache)
    wanted_BTV = model.forward(params, torch.tensor([[3, 4]]), config=CONFIG)
    assert logits_NV.dtype == torch.bfloat16
    torch.testing.assert_close(logits_NV, wanted_BTV[:, -1], atol=3e-2, rtol=3e-2)


def test_mistakes_in_exporting(source, tmp_path):
    def refuses(text, folder=source, out=tmp_path / "out", rows=1, capacity=8):
        with pytest.raises(ValueError, match=text):
            export(folder, out, rows=rows, capacity=capacity)

    refuses("no is not a folder; give a Hugging Face folder", folder=tmp_path / "no")
    refuses("exists: choose another folder or remove it", out=tmp_path)
    refuses("rows is 0; at least 1 sequence", rows=0)
    refuses("capacity is 1; a sequence needs room for 2 tokens", capacity=1)
    refuses("capacity is 257, above max_position_embeddings 256", capacity=257)
    # monkeypatch would leave the option deleted, for every test behind.
    without = torch._inductor.config.patch({"cpp.cxx": ("no-compiler",)})
    with without, pytest.raises(ValueError, match="AOTInductor finds no C\\+\\+ compiler: install g\\+\\+ or set CXX"):
        export(source, tmp_path / "out", rows=1, capacity=8, aot=True)
    assert not (tmp_path / "out").exists()


def test_programs_for_another_device(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    other = shutil.copytree(programs, tmp_path / "other")
    manifest = json.loads((other / "exported.json").read_text())
    (other / "exported.json").write_text(json.dumps({**manifest, "device": "cuda"}))
    with pytest.raises(ValueError, match="exported for cuda, which is not here; export it again with --device cpu"):
        exported.load(other)


def test_mistakes_in_running(programs, tmp_path):
    with pytest.raises(ValueError, match=r"exported.json is missing; give a folder that `q3n export` wrote"):
        exported.load(tmp_path)
    with pytest.raises(ValueError, match=r"prefill.aot.pt2 is missing; `q3n export` with --aot writes it"):
        exported.load(programs, aot=True)
    loaded = exported.load(programs)
    cache, tokens_N, active_N = exported.empty_cache(loaded), torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS) > 0
    with pytest.raises(ValueError, match=r"tokens is int64 \[4\]; the program was exported for int64 \[3\]"):
        exported.decode(loaded, torch.zeros(4, dtype=torch.int64), active_N, cache)
    with pytest.raises(ValueError, match=r"active is int64 \[3\]; the program was exported for bool \[3\]"):
        exported.decode(loaded, tokens_N, tokens_N, cache)
    with pytest.raises(ValueError, match=r"prefill: tokens is int64 \[1, 73\]; .* int64 \[1, \[2, 72\]\]"):
        exported.prefill(loaded, torch.zeros(1, 73, dtype=torch.int64), torch.zeros(4, dtype=torch.int32), cache)
    with pytest.raises(ValueError, match="decode got the tensors"):
        exported.decode(loaded, tokens_N, active_N, {"k": tokens_N})
