"""The command line, in a process of its own where that matters."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from expecttest import assert_expected_inline

from q3n_functional import checkpoint, cli, generate, params, tokenizer, train
from q3n_functional.config import PRESETS
from q3n_functional.ops import registration
from tests import runs
from tests.configs import small


def q3n(*arguments, **options):
    command = [sys.executable, "-m", "q3n_functional", *map(str, arguments)]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)


def failure(capsys, *arguments):
    """What a command that fails says, which must be one line and nothing else."""
    with pytest.raises(SystemExit) as exit_:
        cli.main([str(a) for a in arguments])
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("q3n: ")
    assert output.err.count("\n") == 1
    return output.err.removeprefix("q3n: ").strip()


def output(capsys, *arguments):
    cli.main([str(a) for a in arguments])
    return capsys.readouterr().out


def help_text(capsys, *arguments):
    """The words of --help, an option a line: frames and line breaks depend on the terminal."""
    with pytest.raises(SystemExit, match="0"):
        cli.main([*arguments, "--help"])
    words = " ".join(re.sub(r"[─│╭╮╰╯]|-{3,}", " ", capsys.readouterr().out).split())
    return re.sub(
        r" (?=positional arg|options -|mesh options|-h, |--[a-z]|[A-Z]{4,} (?:the|an?) |[A-Z][a-z]+s [tP])", "\n", words
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train.train(runs.config(folder))
    return folder / "run"


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert_expected_inline(
        capsys.readouterr().out,
        """\
q3n: train, generate, serve, convert, export, inspect and plan Qwen3-Next models.

  q3n train CONFIG.toml [--key value ...]   train as the TOML file says; options override its keys
  q3n profile CONFIG.toml [--key value ...] where the time of a step of it goes: trace, table, picture
  q3n generate FOLDER PROMPT [options]      continue a text
  q3n chat FOLDER [options]                 talk with a model in the terminal
  q3n serve FOLDER [options]                OpenAI's endpoints over HTTP, and a page for trying prompts
  q3n convert SOURCE TARGET [--dtype TYPE]  write a Hugging Face folder again, in another precision
  q3n export FOLDER OUT [options]           programs of it that run without the model's code
  q3n inspect MODEL [--mesh dp=2,tp=4]      the parameter tree of a folder, a config.json or a preset
  q3n plan MODEL --mesh dp=64,tp=2          memory, traffic and time of a training step on cards that are not here

Each has its own --help. FOLDER is a Hugging Face folder, a checkpoint step-N, or a run with checkpoints.

""",
    )


def test_help_of_generate(capsys):
    assert_expected_inline(
        help_text(capsys, "generate"),
        """\
usage: q3n generate [-h] [OPTIONS] FOLDER PROMPT
Continues PROMPT with the model in FOLDER, and prints the text as it is written.
positional arguments
FOLDER a Hugging Face folder, a checkpoint step-N, or a run with checkpoints. (required)
PROMPT the text to continue. (required)
options
-h,
--help show this help message and exit
--max-new-tokens INT the most tokens to write. (default: 256)
--stop [STR [STR ...]] texts that end the writing and are not printed. (default: )
--chunk-length INT tokens of the prompt that are read at once, which bounds the memory. (default: 4096)
--draft-tokens INT tokens that the prediction module drafts a step; the text stays the same. (default: 0)
--compile,
--no-compile compile the step first, which pays for long texts on cuda. (default: False)
--device STR "auto" is cuda where there is one, else cpu. (default: auto)
--temperature FLOAT 0 takes the likeliest token each time. (default: 1.0)
--top-k INT draw among this many likeliest tokens; 0 for all. (default: 0)
--top-p FLOAT draw among the fewest likeliest tokens with this much probability together; 1 for all. (default: 1.0)
--min-p FLOAT draw among the tokens with at least this share of the likeliest one's probability. (default: 0.0)
--repetition-penalty FLOAT divides the logits of tokens in prompt and text; 1 for none. (default: 1.0)
--presence-penalty FLOAT subtracted once from the logits of tokens in the text. (default: 0.0)
--frequency-penalty FLOAT subtracted from the logits of tokens in the text as often as they are there. (default: 0.0)
--seed INT the same seed writes the same text; any signed 64-bit integer. (default: 0)
--logit-bias [INT FLOAT [INT FLOAT ...]] token ids and what is added to their logits, in pairs. (default: )
mesh options how many ranks share the model.
--mesh.tp INT The number of ranks that share heads, widths and vocabulary. (default: 1)
--mesh.ep INT The number of ranks that share the experts. (default: 1)""",
    )


def test_help_of_convert(capsys):
    assert_expected_inline(
        help_text(capsys, "convert"),
        """\
usage: q3n convert [-h] SOURCE TARGET [--dtype {keep,float32,bfloat16,float16}]
Writes the model in SOURCE to TARGET as a Hugging Face folder, with its tokenizer and unknown tensors.
positional arguments
SOURCE a Hugging Face folder, a checkpoint step-N, or a run with checkpoints. (required)
TARGET a new folder. (required)
options
-h,
--help show this help message and exit
--dtype {keep,float32,bfloat16,float16} of the weights; those that are always float32 stay so. (default: keep)""",
    )


def test_help_of_export(capsys):
    assert_expected_inline(
        help_text(capsys, "export"),
        """\
usage: q3n export [-h] [OPTIONS] FOLDER OUT
Writes the model in FOLDER to OUT as programs of torch.export: a prefill and a decoding step.
positional arguments
FOLDER a Hugging Face folder, a checkpoint step-N, or a run with checkpoints. (required) OUT a new folder. (required)
options
-h,
--help show this help message and exit
--rows INT sequences that run together. (required)
--capacity INT tokens that each has room for. (required)
--dtype {keep,float32,bfloat16,float16} of the weights; those that are always float32 stay so. (default: keep)
--device STR on which the programs will run; "auto" is cuda where there is one, else cpu. (default: auto)
--aot,
--no-aot write AOTInductor packages too, which needs a C++ compiler. (default: False)""",
    )


def test_help_of_inspect(capsys):
    assert_expected_inline(
        help_text(capsys, "inspect"),
        """\
usage: q3n inspect [-h] MODEL [--mesh STR]
Prints the parameter tree of MODEL with shapes, axes, counts and bytes; loads no weights.
positional arguments
MODEL a folder, a config.json, or a preset such as qwen3_next_80b_a3b. (required)
options
-h,
--help show this help message and exit
--mesh STR degrees such as dp=2,tp=4 (also replicate, cp, ep): shows what each rank holds. (default: '')""",
    )


def test_options_of_train(capsys):
    words = help_text(capsys, "train")
    found = re.findall(r"^(--\S+?),? .*?\((required|default: .*?)\)", words.replace(",\n--no", ", --no"), re.M)
    own = [f"{option} {default}" for option, default in found if not option.startswith("--model.")]
    assert len(found) > len(own) + 30
    assert_expected_inline(
        "\n".join(own),
        """\
--run required
--preset default: tiny
--init-from default: ''
--resume default: False
--steps required
--batch-size required
--accumulate default: 1
--seq-len required
--seed default: 0
--dtype default: float32
--device default: auto
--compile default: layers
--recompute default: none
--float8 default: none
--cuda-graph default: False
--overlap default: False
--reshard-after-forward default: True
--z-loss-coef default: 0.0
--timeout default: 600.0
--data.source required
--data.tokenizer default: bpe
--data.validation-fraction default: 0.1
--optimizer.name default: adamw
--optimizer.lr default: 0.001
--optimizer.beta1 default: 0.9
--optimizer.beta2 default: 0.95
--optimizer.eps default: 1e-08
--optimizer.momentum default: 0.95
--optimizer.weight-decay default: 0.1
--optimizer.clip-norm default: 1.0
--optimizer.schedule default: cosine
--optimizer.warmup-steps default: 100
--optimizer.final-lr default: 0.1
--optimizer.state-dtype default: float32
--optimizer.decay-fraction default: 0.2
--output.validate-every default: 100
--output.validation-batches default: 100
--output.save-every default: 1000
--output.keep default: 2
--output.sample.prompt default: ' '
--output.sample.max-new-tokens default: 0
--output.sample.temperature default: 0.8
--output.sample.top-k default: 0
--output.sample.top-p default: 0.95
--output.sample.seed default: 0
--mesh.dp default: 1
--mesh.replicate default: 1
--mesh.cp default: 1
--mesh.ep default: 1
--mesh.tp default: 1
--mesh.no-sequence default: True""",
    )


def test_without_a_command_it_says_how_to_use_it(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "q3n train CONFIG.toml" in capsys.readouterr().out


def test_mistakes_are_one_line(capsys, tmp_path, trained):
    known = "train, profile, generate, chat, serve, convert, export, inspect, plan"
    assert failure(capsys, "trian") == f"there is no command 'trian', only {known}"
    assert failure(capsys, "train", "no.toml") == "no.toml does not exist: the first argument is the run's TOML file"
    assert failure(capsys, "inspect", "no") == (
        "no is neither a file, a folder nor one of the presets qwen3_next_80b_a3b, small, tiny"
    )
    holds = f"{tmp_path} holds no model: neither config.json nor a complete step-N folder"
    assert failure(capsys, "generate", tmp_path, "a") == holds
    assert failure(capsys, "convert", tmp_path, tmp_path / "b") == holds
    target = f"{tmp_path} exists: choose another target or remove it"
    assert failure(capsys, "convert", trained, tmp_path) == target
    assert "temperature must be 0" in failure(capsys, "generate", trained, "a", "--temperature", "-1")
    assert "a stop string is empty" in failure(capsys, "generate", trained, "a", "--max-new-tokens=9", "--stop", "")
    assert failure(capsys, "generate", trained, "h\udcff") == "the text has bytes that are not UTF-8: write it in UTF-8"
    assert failure(capsys, "generate", trained, "a", "--mesh.tp", "0") == "mesh.tp is 0, it must be at least 1"


def test_files_that_cannot_be_read_or_written_are_one_line(capsys, tmp_path, trained, monkeypatch):
    (tmp_path / "file").write_text("")
    for command in ("train", "profile"):
        assert failure(capsys, command, tmp_path) == f"[Errno 21] Is a directory: '{tmp_path}'"
    monkeypatch.setattr(os, "fsync", lambda _: (tmp_path / "file/x").open())  # raises, as a full disk does
    assert f"{tmp_path}/new cannot be written (" in failure(capsys, "convert", trained, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_train_then_generate_in_their_own_processes(tmp_path):
    more = ["--output.sample.prompt=DUKE.", "--output.sample.max-new-tokens=8"]
    trained = q3n("train", *runs.arguments(tmp_path, *more))
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.startswith("DUKE.")
    assert len(trained.stdout) > len("DUKE.") + 4
    assert "running eagerly: compile is none" in trained.stderr
    assert "10/10" in trained.stderr
    assert f"model: {tmp_path}/run/step-10/model, curves: {tmp_path}/run/loss.png" in trained.stderr
    assert "validation: " in trained.stderr
    assert "Traceback" not in trained.stderr
    same = ["--max-new-tokens=8", "--temperature=0.8", "--top-p=0.95"]
    written = q3n("generate", tmp_path / "run", "DUKE.", *same)
    assert (written.returncode, written.stdout) == (0, trained.stdout), written.stderr


def test_control_c_saves_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "q3n_functional", "train", *runs.arguments(tmp_path, "--steps=100000")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "run").glob("metrics.jsonl"))) == 0 or not runs.rows(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGINT
    done = len(runs.rows(tmp_path))
    assert f"stopped by SIGINT; saved {tmp_path}/run/step-{done}; --resume goes on from there" in errors
    assert "Traceback" not in errors


def test_generate_streams_up_to_a_stop_string(trained, capsys):
    whole = output(capsys, "generate", trained, "DUKE.", "--max-new-tokens=30", "--seed=3")
    assert whole == output(capsys, "generate", trained / "step-10", "DUKE.", "--max-new-tokens=30", "--seed=3")
    letter = whole[12]
    short = output(capsys, "generate", trained, "DUKE.", "--max-new-tokens=30", "--seed=3", "--stop", letter, "\x00")
    assert short == "DUKE." + whole[5 : whole.index(letter, 5)] + "\n"


def test_generate_ends_at_the_end_tokens(trained, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(trained / "step-10/model", tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5]}')
    monkeypatch.setattr(generate, "generate", lambda *a, stop_tokens, **k: iter(stop_tokens))
    words = tokenizer.read(folder / "tokenizer.json")
    seen = []
    monkeypatch.setattr(tokenizer, "stream", lambda words, ids, stop: seen.extend(ids) or [])
    output(capsys, "generate", folder, "DUKE.")
    assert seen == [words.token_to_id(tokenizer.END), 5]


def test_what_is_logged_comes_behind_the_text(trained, capsys, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(sys.stdout)])
    registration._say_once.cache_clear()
    said = output(capsys, "generate", trained, "DUKE.", "--max-new-tokens=9", "--seed=3", "--draft-tokens=1")
    text, _, lines = said.partition("\nq3n::")
    assert len(text) > len("DUKE.")
    assert lines.splitlines()[-1].startswith("accepted ")


def test_an_error_amid_the_text_begins_a_line(trained, tmp_path, capsys):
    model = checkpoint.load(trained / "step-10/model")
    model.params.norm.fill_(torch.nan)
    checkpoint.save(tmp_path / "nan", model.params, model.config, model.dtypes, model.extras)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", str(tmp_path / "nan"), "DUKE.", "--max-new-tokens=9"])
    out, err = capsys.readouterr()
    assert out == "DUKE.\n"
    assert err.startswith("q3n: the logits are not finite (a token's log-probability is nan): the model's weights are")


def test_convert_changes_the_precision_and_keeps_the_rest(trained, tmp_path, capsys):
    output(capsys, "convert", trained, tmp_path / "half", "--dtype", "bfloat16")
    output(capsys, "convert", tmp_path / "half", tmp_path / "again")
    folders = (trained / "step-10/model", tmp_path / "half", tmp_path / "again")
    source, half, again = map(checkpoint.load, folders)
    leaves = params.named_leaves(source.params)
    for name, tensor in params.named_leaves(half.params).items():
        fixed = name.split(".")[-1] in ("A_log", "dt_bias") or name.endswith("mixer.norm")
        assert tensor.dtype == (torch.float32 if fixed else torch.bfloat16), name
        assert torch.equal(tensor, leaves[name].to(tensor.dtype)), name
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "half/model.safetensors").read_bytes()
    assert (tmp_path / "half/tokenizer.json").read_bytes() == (trained / "step-10/model/tokenizer.json").read_bytes()
    assert half.dtypes != source.dtypes
    assert half.config == source.config == again.config


def test_inspect_shows_every_leaf_and_alike_layers_once(capsys, tmp_path):
    small().to_json(tmp_path / "config.json")
    assert_expected_inline(
        output(capsys, "inspect", tmp_path / "config.json"),
        """\
parameter                        shape            axes dtype        parameters      bytes
embed_tokens                     [64, 32]         VD   bfloat16          2,048      4 KiB
layers 0-2                       3 alike                                61,212  119.7 KiB
  input_layernorm                [32]             D    bfloat16             32       64 B
  mixer.q                        [16, 32]         ND   bfloat16            512      1 KiB
  mixer.k                        [16, 32]         ND   bfloat16            512      1 KiB
  mixer.v                        [48, 32]         MD   bfloat16          1,536      3 KiB
  mixer.z                        [48, 32]         MD   bfloat16          1,536      3 KiB
  mixer.b                        [4, 32]          HD   bfloat16            128      256 B
  mixer.a                        [4, 32]          HD   bfloat16            128      256 B
  mixer.conv_q                   [16, 4]          NC   bfloat16             64      128 B
  mixer.conv_k                   [16, 4]          NC   bfloat16             64      128 B
  mixer.conv_v                   [48, 4]          MC   bfloat16            192      384 B
  mixer.A_log                    [4]              H    float32               4       16 B
  mixer.dt_bias                  [4]              H    float32               4       16 B
  mixer.norm                     [12]             K    float32              12       48 B
  mixer.out                      [32, 48]         DM   bfloat16          1,536      3 KiB
  post_attention_layernorm       [32]             D    bfloat16             32       64 B
  mlp.router                     [8, 32]          RD   bfloat16            256      512 B
  mlp.experts.gate               [8, 16, 32]      EFD  bfloat16          4,096      8 KiB
  mlp.experts.up                 [8, 16, 32]      EFD  bfloat16          4,096      8 KiB
  mlp.experts.down               [8, 32, 16]      EDF  bfloat16          4,096      8 KiB
  mlp.shared_expert.gate         [16, 32]         WD   bfloat16            512      1 KiB
  mlp.shared_expert.up           [16, 32]         WD   bfloat16            512      1 KiB
  mlp.shared_expert.down         [32, 16]         DW   bfloat16            512      1 KiB
  mlp.shared_expert_gate         [1, 32]          1D   bfloat16             32       64 B
layer 3                                                                 22,400  43.75 KiB
  input_layernorm                [32]             D    bfloat16             32       64 B
  mixer.q                        [64, 32]         QD   bfloat16          2,048      4 KiB
  mixer.gate                     [64, 32]         QD   bfloat16          2,048      4 KiB
  mixer.k                        [32, 32]         GD   bfloat16          1,024      2 KiB
  mixer.v                        [32, 32]         GD   bfloat16          1,024      2 KiB
  mixer.q_norm                   [16]             K    bfloat16             16       32 B
  mixer.k_norm                   [16]             K    bfloat16             16       32 B
  mixer.out                      [32, 64]         DQ   bfloat16          2,048      4 KiB
  post_attention_layernorm       [32]             D    bfloat16             32       64 B
  mlp.router                     [8, 32]          RD   bfloat16            256      512 B
  mlp.experts.gate               [8, 16, 32]      EFD  bfloat16          4,096      8 KiB
  mlp.experts.up                 [8, 16, 32]      EFD  bfloat16          4,096      8 KiB
  mlp.experts.down               [8, 32, 16]      EDF  bfloat16          4,096      8 KiB
  mlp.shared_expert.gate         [16, 32]         WD   bfloat16            512      1 KiB
  mlp.shared_expert.up           [16, 32]         WD   bfloat16            512      1 KiB
  mlp.shared_expert.down         [32, 16]         DW   bfloat16            512      1 KiB
  mlp.shared_expert_gate         [1, 32]          1D   bfloat16             32       64 B
norm                             [32]             D    bfloat16             32       64 B
lm_head                          [64, 32]         VD   bfloat16          2,048      4 KiB
mtp                                                                     24,544  47.94 KiB
  pre_fc_norm_embedding          [32]             D    bfloat16             32       64 B
  pre_fc_norm_hidden             [32]             D    bfloat16             32       64 B
  fc                             [32, 64]         DX   bfloat16          2,048      4 KiB
  layer.input_layernorm          [32]             D    bfloat16             32       64 B
  layer.mixer.q                  [64, 32]         QD   bfloat16          2,048      4 KiB
  layer.mixer.gate               [64, 32]         QD   bfloat16          2,048      4 KiB
  layer.mixer.k                  [32, 32]         GD   bfloat16          1,024      2 KiB
  layer.mixer.v                  [32, 32]         GD   bfloat16          1,024      2 KiB
  layer.mixer.q_norm             [16]             K    bfloat16             16       32 B
  layer.mixer.k_norm             [16]             K    bfloat16             16       32 B
  layer.mixer.out                [32, 64]         DQ   bfloat16          2,048      4 KiB
  layer.post_attention_layernorm [32]             D    bfloat16             32       64 B
  layer.mlp.router               [8, 32]          RD   bfloat16            256      512 B
  layer.mlp.experts.gate         [8, 16, 32]      EFD  bfloat16          4,096      8 KiB
  layer.mlp.experts.up           [8, 16, 32]      EFD  bfloat16          4,096      8 KiB
  layer.mlp.experts.down         [8, 32, 16]      EDF  bfloat16          4,096      8 KiB
  layer.mlp.shared_expert.gate   [16, 32]         WD   bfloat16            512      1 KiB
  layer.mlp.shared_expert.up     [16, 32]         WD   bfloat16            512      1 KiB
  layer.mlp.shared_expert.down   [32, 16]         DW   bfloat16            512      1 KiB
  layer.mlp.shared_expert_gate   [1, 32]          1D   bfloat16             32       64 B
  norm                           [32]             D    bfloat16             32       64 B
total                                                                  112,284  219.4 KiB
""",
    )


def test_inspect_counts_the_large_model_without_making_it(capsys):
    text = output(capsys, "inspect", "qwen3_next_80b_a3b")
    total = params.count(PRESETS["qwen3_next_80b_a3b"]())
    assert text.splitlines()[-1].split()[:2] == ["total", f"{total:,}"]
    assert "layers 3 7 11 15 19 23 27 31 35 39 43 47" in text


def test_inspect_reads_folders_and_files(capsys, trained):
    names = (trained, trained / "step-10", trained / "step-10/model/config.json")
    texts = {output(capsys, "inspect", name) for name in names}
    assert len(texts) == 1
    assert "[300, 32]" in texts.pop()


def test_a_closed_pipe_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", "q3n_functional", "inspect", "tiny"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
