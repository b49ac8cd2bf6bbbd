"""The command line: names, defaults, and an error of one line for every wrong use."""

import argparse
import importlib.util
import re
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT, launch


REQUIRED = ["--pretrained_model_name_or_path", "model", "--dataset_name", "pairs"]

# Flags of the diffusers SDXL trainers, with their defaults.
DIFFUSERS_DEFAULTS = {
    "dataloader_num_workers": 0,
    "resolution": 1024,
    "vae_encode_batch_size": 1,
    "lr_power": 1.0,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "checkpointing_steps": 500,
    "logging_dir": "logs",
    "report_to": "tensorboard",
    "validation_steps": 200,
}
# Flags with a default of this script.
OWN_DEFAULTS = {
    "learning_rate": 1e-5,
    "loss_type": "mapo",
    "beta_mapo": 8.0,
    "snr_value": 0.5,
    "remove_ties": True,
    "label_noise_prob": 0.0,
    "max_bad_rows": 0.01,
    "logging_steps": 10,
    "caption_column": "caption",
    "image_0_column": "jpg_0",
    "image_1_column": "jpg_1",
    "label_0_column": "label_0",
    "label_1_column": "label_1",
}
COUNTS = """
    rank lora_rank shuffle_shards max_train_samples resolution vae_encode_batch_size train_batch_size num_train_epochs
    max_train_steps gradient_accumulation_steps lr_num_cycles max_bad_steps checkpointing_steps
    checkpoints_total_limit logging_steps validation_steps num_inference_steps num_validation_pairs
""".split()
# Flags that take the same kind of number, values outside of the range, and values at its ends.
NUMBERS = [
    (COUNTS, ["0", "-1", "1.5", "1e3", "nan", "inf", "many", ""], []),
    (["dataloader_num_workers", "lr_warmup_steps", "seed"], ["-1", "0.5", "nan", "inf", "x"], ["0"]),
    (["label_noise_prob", "max_bad_rows"], ["-0.1", "1.1", "nan", "inf", "1%"], ["0", "1"]),
    (["adam_beta1", "adam_beta2"], ["-0.1", "1", "1.1", "nan", "inf"], ["0", "0.9999"]),
    (["adam_weight_decay", "guidance_scale"], ["-1e-9", "nan", "inf", "x"], ["0"]),
    (
        ["learning_rate", "text_encoder_lr", "lr_power", "adam_epsilon", "snr_value"],
        ["0", "-1e-9", "nan", "inf", "x"],
        ["1e-30"],
    ),
    (["lora_alpha"], ["0", "-1e-9", "nan", "inf", "x"], []),
    (["max_grad_norm"], ["-1e-9", "nan", "-inf", "x"], ["0", "inf"]),
    (["beta_mapo"], ["0", "-1", "nan", "-inf", "x"], ["1e-3", "inf"]),
]

# Command lines that cannot work, and what the error must name.
WRONG_USES = [
    ("--resolution 65", ["--resolution"]),
    ("--pretrained_model_name_or_path a.safetensors", ["python convert_sdxl.py single_file a.safetensors FOLDER"]),
    ("--cache_latents --random_crop", ["--cache_latents", "--random_crop"]),
    ("--full_bf16", ["--full_bf16", "--use_8bit_adam", "--mixed_precision"]),
    ("--full_bf16 --use_8bit_adam --mixed_precision bf16 --rank 4", ["--full_bf16", "--rank"]),
    ("--chosen_column a", ["--chosen_column", "--rejected_column"]),
    ("--loss_type mapo_v1 --beta_mapo inf", ["--beta_mapo", "--loss_type"]),
    ("--report_to all --hub_token secret", ["--report_to", "--hub_token"]),
    ("--lr_scheduler polynomial --learning_rate 1e-7", ["--learning_rate", "--lr_scheduler"]),
    ("--lr_scheduler piecewise_constant", ["--lr_scheduler"]),
    ("--mixed_precision fp8", ["--mixed_precision"]),
    ("--lora_alpha 8", ["--lora_alpha", "--rank"]),
    ("--lora_layers all", ["--lora_layers", "--rank"]),
    ("--train_text_encoder", ["--train_text_encoder", "--rank"]),
    ("--init_lora lora", ["--init_lora", "--rank"]),
    ("--rank 4 --init_lora lora --lora_layers all", ["--init_lora", "--lora_layers"]),
    ("--rank 4 --train_text_encoder --cache_latents", ["--train_text_encoder", "--cache_latents"]),
    ("--center_crop --random_crop", ["--center_crop", "--random_crop"]),
    ("--random_flip --no_hflip", ["--random_flip", "--no_hflip"]),
    ("--output_dir=", ["--output_dir"]),
    ("--logging_dir=/logs", ["--logging_dir"]),
    ("--logging_dir=.", ["--logging_dir"]),
    ("--logging_dir=../logs", ["--logging_dir"]),
]

# What the README says to write instead of flags of other scripts.
REPLACED = {
    "--sft_training": "--beta_mapo inf",
    "--validation_prompt": "--validation_prompts",
    "--train_unet": "leave it out",
    "--remove_ties True": "take no value",
}
# Flags of other scripts that ask for what this script does anyway.
IGNORED = "--center_crop --random_flip --mapo_training --enable_xformers_memory_efficient_attention --local_rank 3"

# The command in the README of the authors' code.
AUTHORS_COMMAND = """
  --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0
  --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix
  --output_dir=mapo --mixed_precision=fp16 --dataset_name=kashif/pickascore --train_batch_size=8
  --gradient_accumulation_steps=2 --gradient_checkpointing --use_8bit_adam --learning_rate=1e-5
  --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=2000 --checkpointing_steps=500 --seed=0
"""

# Hides packages that a full fine-tune without trackers does not need, and what Windows lacks. Starts processes like
# Windows and macOS.
HIDING_MODULE = """
import multiprocessing
import signal
import sys
from importlib.machinery import PathFinder

import psutil  # on Linux it needs `resource`

del signal.SIGUSR1
sys.modules["resource"] = None
multiprocessing.set_start_method("spawn")


class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ("wandb", "bitsandbytes", "peft", "deepspeed", "tensorboard"):
            with open(__file__ + ".requested", "a") as file:
                print(name, file=file)
            return None
        return PathFinder.find_spec(name, path, target)


sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def parse(script, words=""):
    return script.parse_args([*REQUIRED, *words.split()])


def parse_error(script, capsys, words):
    """The message of `parse_args`, which prints only the usage and one line."""
    with pytest.raises(SystemExit) as stop:
        parse(script, words)
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: accelerate launch")
    return error.partition(": error: ")[2]


@pytest.fixture
def parser(script, record_calls):
    """The parser that `parse_args` builds."""
    calls = record_calls(argparse.ArgumentParser, "parse_known_args")
    parse(script)
    return calls[0].args[0]


@pytest.fixture
def all_flags(parser):
    """All flags of the script, with the two dashes."""
    return set(parser._option_string_actions)


# Valid command lines ------------------------------------------------------------------------------------------------
def test_defaults(script):
    args = vars(parse(script))

    for name, value in {**DIFFUSERS_DEFAULTS, **OWN_DEFAULTS}.items():
        assert args[name] == value, name
        assert type(args[name]) is type(value), name


def test_help_is_grouped_and_shows_defaults(script, parser, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])

    assert stop.value.code == 0
    sections = re.split(r"^(\w+):$", capsys.readouterr().out, flags=re.MULTILINE)
    titles = sections[1::2]
    texts = sections[2::2]
    assert titles == ["options", "model", "pairs", "objective", "training", "optimizer", "output", "validation"]
    assert re.findall(r"^  (-\S+)", texts[0], flags=re.MULTILINE) == ["-h,"]
    assert "--rank" in texts[1]
    assert "--lora_rank" in texts[1]
    help_text = " ".join(" ".join(texts).split())
    for action in parser._actions:
        assert action.dest == "help" or action.help, action.option_strings
        if action.type is not None and action.default is not None:
            pattern = rf"{action.option_strings[0]}\b.*? \(default: {action.default}\)"
            assert re.search(pattern, help_text), action.dest


def test_default_beta_depends_on_the_loss(script):
    assert parse(script, "--loss_type mapo_v1").beta_mapo == 0.1
    assert parse(script, "--beta_mapo 0.005 --loss_type mapo_v1").beta_mapo == 0.005


@pytest.mark.parametrize(
    ("more", "rank"),
    [("", None), ("--lora_rank=8 --report_to=wandb --run_validation --validation_steps=50 --push_to_hub", 8)],
    ids=["authors", "diffusers DPO"],
)
def test_commands_of_other_scripts_work_unchanged(script, more, rank):
    args = script.parse_args(f"{AUTHORS_COMMAND} {more}".split())

    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert args.pretrained_vae_model_name_or_path == "madebyollin/sdxl-vae-fp16-fix"
    assert args.rank == rank
    assert args.train_batch_size == 8
    assert args.gradient_accumulation_steps == 2
    assert args.max_train_steps == 2000
    assert args.mixed_precision == "fp16"
    assert args.learning_rate == 1e-5
    assert args.lr_warmup_steps == 0
    assert args.seed == 0
    assert args.use_8bit_adam
    assert args.gradient_checkpointing


def test_harmless_flags_of_other_scripts_change_nothing(script):
    assert parse(script, IGNORED) == parse(script)


def test_home_is_expanded_in_paths(script, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")

    args = parse(script, "--output_dir ~/mapo --cache_dir=~/cache --dataset_name ~/pairs")

    assert args.output_dir == "/home/me/mapo"
    assert args.cache_dir == "/home/me/cache"
    assert args.dataset_name == "/home/me/pairs"


def test_full_fine_tuning_works_without_optional_packages_and_on_windows(flags, tmp_path):
    """With the real launcher, and a loader worker that is spawned."""
    module = tmp_path / "hiding" / "sitecustomize.py"
    module.parent.mkdir()
    module.write_text(HIDING_MODULE)
    flags.update(rank=None, max_train_steps=1, report_to="none", dataloader_num_workers=1)

    result = launch(flags, env={"PYTHONPATH": str(module.parent)})

    assert result.returncode == 0, result.stderr
    assert (flags["output_dir"] / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    requested = Path(f"{module}.requested").read_text().split()
    assert {"wandb", "bitsandbytes", "peft", "deepspeed"} <= set(requested)


# Wrong command lines ------------------------------------------------------------------------------------------------
def test_required_flags(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args([])

    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("required: --pretrained_model_name_or_path, --dataset_name")


@pytest.mark.parametrize(("words", "named"), WRONG_USES)
def test_contradictions_and_wrong_values_are_refused(script, capsys, words, named):
    error = parse_error(script, capsys, words)

    for part in named:
        assert part in error


def test_loader_workers_are_refused_if_the_temporary_folder_has_a_long_path(script, capsys, monkeypatch):
    """They would wait for each other forever."""
    monkeypatch.setattr(tempfile, "tempdir", "/" + 140 * "t")

    parse(script)
    error = parse_error(script, capsys, "--dataloader_num_workers 2")

    assert "TMPDIR" in error


def test_table_of_numbers_is_complete(script, parser):
    numeric = set()
    for flag, action in parser._option_string_actions.items():
        if action.type not in (None, script.PATH):
            numeric.add(flag)
    tested = set()
    for names, _, _ in NUMBERS:
        tested.update(f"--{name}" for name in names)

    assert numeric == tested


@pytest.mark.parametrize(("names", "wrong", "ends"), NUMBERS)
def test_numbers_out_of_range_are_refused(script, capsys, names, wrong, ends):
    for name in names:
        for value in wrong:
            error = parse_error(script, capsys, f"--{name}={value}")
            assert f"--{name}" in error
            assert f"{value} is not " in error or f"{value!r} is not " in error
        for value in ends:
            assert getattr(parse(script, f"--{name} {value}"), name) == float(value)


@pytest.mark.parametrize("words", ["--no_such_flag=1 --sft_training --another", "--resume latest", "stray"])
def test_unknown_words_are_refused_and_named_at_once(script, capsys, words):
    """Abbreviations are unknown as well: a flag that is added later would change what they mean."""
    assert parse_error(script, capsys, words) == f"unrecognized arguments: {words}"


def test_readme_says_what_to_write_instead_of_flags_of_other_scripts(script, capsys, all_flags):
    _, _, rest = (ROOT / "README.md").read_text().partition("| there | here |\n|---|---|\n")
    table, _, _ = rest.partition("\n\n")
    rows = dict(re.fullmatch(r"\| (.*) \| (.*) \|", line).groups() for line in table.splitlines())

    # Flags that are refused, each with what to write instead.
    for words, advice in REPLACED.items():
        assert advice in rows.pop(f"`{words}`").replace("`", "")
        assert parse_error(script, capsys, words) == f"unrecognized arguments: {words.split()[-1]}"
    assert not rows
    # All others exist.
    others = set(re.findall(r"--[\w-]+", table)) - set(REPLACED)
    assert others <= all_flags


@pytest.mark.parametrize(
    ("words", "package"),
    [("--use_8bit_adam", "bitsandbytes"), ("--rank 4", "peft"), ("--report_to wandb", "wandb")],
)
def test_missing_package_is_named_with_its_flag(script, capsys, monkeypatch, words, package):
    parse(script, words)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == package else True)

    error = parse_error(script, capsys, words)

    assert words.split()[0] in error
    assert f"pip install {package}" in error
    parse(script, "--report_to none")


# Usage --------------------------------------------------------------------------------------------------------------
def test_error_is_printed_in_one_line(flags):
    """The launcher prints its own traceback, but none goes through this script."""
    result = launch({**flags, "caption_column": "nothing"})

    assert result.returncode != 0
    printed, *launcher_tracebacks = result.stderr.split("Traceback (most recent call last)")
    assert len(launcher_tracebacks) == 1
    assert f'{SCRIPT.name}", line' not in result.stderr
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert errors == printed.splitlines()[-1:]
    assert "--caption_column: " in errors[0]
    assert "no column 'nothing'" in errors[0]


def test_every_flag_is_exercised(all_flags):
    """The tables of this file, which name every flag, and the errors of test_errors.py do not count."""
    files = []
    for file in (ROOT / "tests").rglob("*.py"):
        if file.name not in (Path(__file__).name, "test_errors.py"):
            files.append(file.read_text())
    text = "\n".join(files)

    unused = set()
    for flag in all_flags - {"--help", "-h", "--lora_rank", *IGNORED.split()}:
        name = flag.removeprefix("--")
        if not re.search(rf'["\']{name}["\']|{flag}\b|\b{name}=', text):
            unused.add(flag)

    assert unused == set()
