"""TOML files and options."""

import pytest

from q3n_functional import train_config
from tests import runs


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("stpes = 3", r"unknown key stpes: did you mean steps\?"),
        ("[optimizer]\nlearning_rate = 3", r"unknown key optimizer\.learning_rate: known are beta1"),
        (
            "[model.rope_parameters]\nrope_thetta = 1.0",
            r"unknown key model\.rope_parameters\.rope_thetta: did you",
        ),
        ("optimizer = 3", r"optimizer is 3, it must be a table"),
        ("[steps]\na = 3", r"steps is .*, it must be a value"),
        ("steps = ", r"run\.toml is not TOML"),
        ("steps = 0", r"steps is 0, it must be at least 1"),
        ("[data]\nvalidation_fraction = 1.0", r"validation_fraction is 1\.0, it must be in \[0, 1\)"),
        ("preset = 'huge'", r"preset is 'huge': neither a file nor one of qwen3_next_80b_a3b, small, tiny"),
        ("seed = 4294967296", r"seed is 4294967296"),
        ("[optimizer]\nbeta2 = 1.0", r"optimizer\.beta2 is 1\.0, it must be in \[0, 1\)"),
        ("[mesh]\ndpp = 2", r"unknown key mesh\.dpp: did you mean mesh\.dp\?"),
        ("[mesh]\ntp = 3", r"mesh\.tp is 3, but vocab_size is 512, not a multiple of it; this model allows tp 1, 2$"),
        ("[mesh]\ndp = 2", r"a batch has 1 rows, which replicate x dp x ep = 2 ranks cannot share: use a multiple"),
        ("timeout = 0", r"timeout is 0\.0, it must be at least 1"),
        ("overlap = true", r"overlap with compile 'layers' and a mesh of 1: "),
        ("overlap = true\ncompile = 'none'\n[mesh]\nep = 2", r"overlap with compile 'none' and a mesh of 2: "),
        ("reshard_after_forward = false", r"reshard_after_forward is false with overlap False and compile 'layers': "),
        ("cuda_graph = true", r"cuda_graph with dtype 'float32': fp32 attention waits"),
        ("dtype = 'bfloat16'\ncuda_graph = true\n[mesh]\nep = 2", r"cuda_graph with ep = 2: "),
        ("float8 = 'linears'", r"float8 is 'linears' with dtype 'float32': it is between bfloat16 tensors, so set"),
        ("dtype = 'bfloat16'\nfloat8 = 'linears'\n[mesh]\nep = 2", r"float8 is 'linears' with a mesh of 2 ranks"),
        ("float8 = 'linears_and_experts'", r"float8 is 'linears_and_experts' with dtype 'float32': it is between"),
        ("dtype = 'bfloat16'\nfloat8 = 'linears_and_experts'\n[mesh]\nep = 2", r"and_experts' with a mesh of 2"),
        ("[optimizer]\nlr = nan", r"optimizer\.lr is nan, it must be at least 0"),
        ("[optimizer]\nlr = inf", r"optimizer\.lr is inf, it must be finite"),
        ("[optimizer]\neps = -1.0", r"optimizer\.eps is -1\.0, it must be at least 0"),
        ("[optimizer]\nfinal_lr = -5.0", r"optimizer\.final_lr is -5\.0, it must be at least 0"),
        ("[optimizer]\nclip_norm = 0.0", r"optimizer\.clip_norm is 0\.0, it must be above 0; inf for no limit"),
        ("[optimizer]\ndecay_fraction = 0.0", r"optimizer\.decay_fraction is 0\.0, it must be in \(0, 1\]"),
        ("z_loss_coef = nan", r"z_loss_coef is nan, it must be at least 0"),
        ("timeout = inf", r"timeout is inf, it must be finite"),
        ("[output.sample]\ntop_p = 0.0", r"top_p must be above 0"),
        ("[output.sample]\nmax_new_tokens = 3\nprompt = ''", r"output\.sample\.prompt is empty"),
    ],
)
def test_toml_files_are_strict(tmp_path, toml, message):
    needed = {"run": '"r"', "steps": "1", "batch_size": "1", "seq_len": "8"}
    head = "".join(f"{key} = {value}\n" for key, value in needed.items() if key not in toml)
    path = tmp_path / "run.toml"
    path.write_text(head + (toml if toml.startswith("[data]") else toml + "\n[data]") + '\nsource = "a.txt"\n')
    with pytest.raises(ValueError, match=message):
        train_config.parse([str(path)])


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "bin.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bin\.toml is not TOML: 'utf-8' codec"):
        train_config.parse([str(tmp_path / "bin.toml")])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=many", "--steps"),
        ("--model.linear-num-value-heads=3", "linear_num_value_heads is 3"),
        ("--stesp=3", "Unrecognized options: --stesp=3"),
    ],
)
def test_a_bad_option_ends_in_a_usage_message(capsys, option, message):
    with pytest.raises(SystemExit, match="2"):
        train_config.parse(["--run=r", "--steps=1", "--batch-size=1", "--seq-len=8", "--data.source=a.txt", option])
    assert message in capsys.readouterr().err


def test_the_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'run = "r"\nsteps = 5\nbatch_size = 1\nseq_len = 8\ncompile = "none"\n'
        '[data]\nsource = "a.txt"\n[model]\nhidden_size = 64\nmlp_only_layers = [1, 2]\nnorm_topk_prob = false\n'
        "eos_token_id = 3\nintermediate_size = 8\n"
    )
    config = train_config.parse([str(path), "--steps", "7", "--model.hidden-size=32", "--optimizer.name=muon"])
    assert (config.steps, config.model.hidden_size, config.compile) == (7, 32, "none")
    assert config.model.mlp_only_layers == (1, 2)
    assert config.model.norm_topk_prob is False
    assert config.model.eos_token_id == 3
    assert config.optimizer.name == "muon"
    assert config.model.num_experts == train_config.PRESETS["tiny"]().num_experts


def test_overlap_needs_a_torch_that_orders_it_right(tmp_path, monkeypatch):
    monkeypatch.setattr(train_config, "SOUND", False)
    with pytest.raises(ValueError, match=r"overlap with compile 'model' and torch .*: it needs 2\.13"):
        runs.config(tmp_path, "--compile=model", "--mesh.dp=2", "--overlap")
    assert runs.config(tmp_path, "--compile=layers", "--mesh.dp=2", "--overlap").overlap
