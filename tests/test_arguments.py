"""The command line: names and defaults, and that every wrong use ends in one sentence before weights are loaded."""

import argparse
import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SCRIPT, launch, run


REQUIRED = ["--pretrained_model_name_or_path", "model", "--dataset_name", "pairs"]

# What the diffusers SDXL trainers share, with their defaults; --learning_rate is the one that differs.
SHARED_DEFAULTS = {
    "pretrained_vae_model_name_or_path": None,
    "revision": None,
    "variant": None,
    "max_train_samples": None,
    "cache_dir": None,
    "seed": None,
    "resolution": 1024,
    "train_batch_size": 4,
    "num_train_epochs": 1,
    "max_train_steps": None,
    "checkpointing_steps": 500,
    "checkpoints_total_limit": None,
    "resume_from_checkpoint": None,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "scale_lr": False,
    "lr_scheduler": "constant",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "allow_tf32": False,
    "dataloader_num_workers": 0,
    "use_8bit_adam": False,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "push_to_hub": False,
    "hub_token": None,
    "hub_model_id": None,
    "logging_dir": "logs",
    "report_to": "tensorboard",
    "mixed_precision": None,
    "dataset_split_name": None,
    "run_validation": False,
    "validation_steps": 200,
    "vae_encode_batch_size": 8,
    "no_hflip": False,
    "random_crop": False,
    "snr_value": 0.5,
    "remove_ties": True,
    "rank": None,
}

COUNTS = [
    "rank",
    "max_bad_steps",
    "lora_rank",
    "shuffle_buffer_size",
    "max_train_samples",
    "resolution",
    "vae_encode_batch_size",
    "train_batch_size",
    "num_train_epochs",
    "max_train_steps",
    "gradient_accumulation_steps",
    "lr_num_cycles",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
    "validation_steps",
    "num_inference_steps",
    "num_validation_pairs",
]
# Kind of number: its flags, values out of range, and the values at the ends of the range.
NUMBERS = {
    "count": (COUNTS, ["0", "-1", "1.5", "1e3", "nan", "inf", "many", ""], []),
    "count or zero": (["dataloader_num_workers", "lr_warmup_steps"], ["-1", "0.5", "nan", "inf", "none"], ["0"]),
    "seed": (["seed"], ["-1", "0.5", "nan", str(2**32)], ["0", str(2**32 - 1)]),
    "share": (["label_noise_prob", "max_bad_rows"], ["-0.1", "1.1", "nan", "inf", "1%"], ["0", "1"]),
    "share below one": (["adam_beta1", "adam_beta2"], ["-0.1", "1", "1.1", "nan", "inf"], ["0", "0.9999"]),
    "not negative": (["adam_weight_decay", "guidance_scale"], ["-1e-9", "nan", "inf", "x"], ["0"]),
    "positive": (
        ["learning_rate", "lr_power", "adam_epsilon", "max_grad_norm", "snr_value"],
        ["0", "-1e-9", "nan", "inf", "x"],
        ["1e-30"],
    ),
    "positive or infinite": (["beta_mapo"], ["0", "-1", "nan", "-inf", "x"], ["1e-3", "inf"]),
}
WRONG_NUMBERS = [(name, value) for names, wrong, _ in NUMBERS.values() for name in names for value in wrong]
END_NUMBERS = [(name, value) for names, _, ends in NUMBERS.values() for name in names for value in ends]

# Wrong words and the flags that the sentence must name.
CONTRADICTIONS = [
    ("--resolution 65", ["--resolution"]),
    ("--cache_latents --random_crop", ["--cache_latents", "--random_crop"]),
    ("--full_bf16", ["--full_bf16", "--use_8bit_adam", "--mixed_precision"]),
    ("--full_bf16 --use_8bit_adam --mixed_precision fp16", ["--full_bf16", "--mixed_precision"]),
    ("--full_bf16 --use_8bit_adam --mixed_precision bf16 --rank 4", ["--full_bf16", "--rank"]),
    ("--streaming", ["--streaming", "--max_train_steps"]),
    ("--streaming --num_train_epochs 2", ["--streaming", "--max_train_steps"]),
    ("--chosen_column a", ["--chosen_column", "--rejected_column"]),
    ("--rejected_column a", ["--chosen_column", "--rejected_column"]),
    ("--loss_type mapo_v1 --beta_mapo inf", ["--beta_mapo", "--loss_type"]),
    ("--max_train_samples 4 --num_validation_pairs 4", ["--num_validation_pairs", "--max_train_samples"]),
    ("--max_train_samples 4 --num_validation_pairs 5", ["--num_validation_pairs", "--max_train_samples"]),
    ("--streaming --max_train_steps 1 --validation_split a", ["--validation_split", "--num_validation_pairs"]),
    ("--report_to wandb --hub_token secret", ["--report_to", "--hub_token"]),
    ("--report_to all --hub_token secret", ["--report_to", "--hub_token"]),
    # The libraries' own limits, of which they tell only when the models are loaded, or in the very last step.
    ("--lr_scheduler polynomial --learning_rate 1e-7", ["--learning_rate", "--lr_scheduler"]),
    ("--loss_type dpo", ["--loss_type"]),
    ("--lr_scheduler piecewise_constant", ["--lr_scheduler"]),
    ("--lr_scheduler cosin", ["--lr_scheduler"]),
    ("--mixed_precision fp8", ["--mixed_precision"]),
    ("--report_to comet_ml", ["--report_to"]),
    ("--validation_prompts", ["--validation_prompts"]),
    ("--seed", ["--seed"]),
]
ALLOWED = [
    "--resolution 72",
    "--streaming --max_train_steps 1",
    "--chosen_column a --rejected_column b",
    "--full_bf16 --use_8bit_adam --mixed_precision bf16",
    "--loss_type mapo_v1 --beta_mapo 5",
    "--max_train_samples 4 --num_validation_pairs 3",
    "--max_train_samples 4 --validation_split a --num_validation_pairs 4",
    "--streaming --max_train_steps 1 --validation_split a --num_validation_pairs 4",
    "--report_to tensorboard --hub_token secret",
    "--report_to none --hub_token secret",
    "--lr_scheduler cosine --learning_rate 1e-7",
    "--lr_scheduler polynomial --max_train_steps 500 --lr_warmup_steps 500",
]

# Words from elsewhere, and what the sentence must say to do about them.
FOREIGN = {
    "--enable_xformers_memory_efficient_attention": "leave it out",
    "--local_rank": "leave it out",
    "--sft_training": "--beta_mapo inf",
    "--mapo_training": "leave it out",
    "--train_unet": "leave it out",
    "--dpo_training": "train_diffusion_dpo_sdxl.py",
    "--beta_dpo": "--beta_mapo",
    "--train_data_dir": "--dataset_name",
    "--validation_prompt": "--validation_prompts",
    "True": "switches take no value",
    "False": "switches take no value",
}

# As they stand in the README of the authors and in that of the diffusers DPO script.
AUTHORS_COMMAND = """
  --pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0
  --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix
  --output_dir=mapo --mixed_precision=fp16 --dataset_name=kashif/pickascore --train_batch_size=8
  --gradient_accumulation_steps=2 --gradient_checkpointing --use_8bit_adam --learning_rate=1e-5
  --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=2000 --checkpointing_steps=500 --seed=0
"""
COMMANDS = {
    "full": AUTHORS_COMMAND,
    "lora": AUTHORS_COMMAND + "--lora_rank=8",
    "validation": AUTHORS_COMMAND + "--run_validation --validation_steps=50 --report_to=wandb",
    "pick-a-pic": AUTHORS_COMMAND + "--dataset_name=yuvalkirstain/pickapic_v2 --dataset_split_name=train",
    "dpo": AUTHORS_COMMAND + "--rank=8 --report_to=wandb --run_validation --validation_steps=50 --push_to_hub",
    "with blanks": AUTHORS_COMMAND.replace("=", " "),
}

# Packages that a full fine-tune without trackers must do without, and the module that hides them.
HIDDEN = ("wandb", "bitsandbytes", "peft", "deepspeed", "tensorboard")
HIDING_MODULE = f"""
import sys
from importlib.machinery import PathFinder


class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN}:
            with open(__file__ + ".asked", "a") as file:
                print(name, file=file)
            return None
        return PathFinder.find_spec(name, path, target)


sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def parse(script, words=""):
    return script.parse_args([*REQUIRED, *words.split()])


def refusal(script, capsys, words):
    """The sentence that `parse_args` refuses the words with; nothing else but the usage may be printed."""
    with pytest.raises(SystemExit) as stop:
        script.parse_args([*REQUIRED, *words])
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: accelerate launch")
    return error.partition(": error: ")[2]


def complaint(script, flags):
    """The sentence that `main` ends with."""
    with pytest.raises(script.TrainingError) as error:
        run(script, flags)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def refuse_to_load(*_, **__):
    raise AssertionError("weights were about to be loaded")


@pytest.fixture
def no_weights(script, monkeypatch):
    """From here on no weights can be loaded."""
    for part in (script.StableDiffusionXLPipeline, script.AutoencoderKL, script.UNet2DConditionModel):
        monkeypatch.setattr(part, "from_pretrained", refuse_to_load)


@pytest.fixture
def parser(script, monkeypatch):
    """The parser that `parse_args` makes."""
    parsers = []
    parse_known_args = argparse.ArgumentParser.parse_known_args
    monkeypatch.setattr(
        argparse.ArgumentParser,
        "parse_known_args",
        lambda self, *words: parsers.append(self) or parse_known_args(self, *words),
    )
    parse(script)
    return parsers[0]


@pytest.fixture(scope="module")
def trained(script, world, tmp_path_factory):
    """Flags of a finished run of one step, which left `checkpoint-1` in its output folder."""
    flags = {
        "pretrained_model_name_or_path": world / "pipeline",
        "dataset_name": world / "pairs",
        "cache_dir": world / "cache",
        "output_dir": tmp_path_factory.mktemp("trained") / "out",
        "resolution": 64,
        "rank": 4,
        "train_batch_size": 1,
        "max_train_steps": 1,
        "checkpointing_steps": 1,
        "seed": 0,
    }
    run(script, flags)
    return flags


def write_table(folder, columns):
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "data" / "train-00000-of-00001.parquet")
    return folder


# What is right ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARED_DEFAULTS)
def test_defaults_are_those_of_diffusers(script, name):
    value = getattr(parse(script), name)
    assert (value, type(value)) == (SHARED_DEFAULTS[name], type(SHARED_DEFAULTS[name]))


def test_own_defaults(script):
    args = parse(script)
    assert args.learning_rate == 1e-5
    assert args.label_noise_prob == 0
    assert args.max_bad_rows == 0.01
    assert args.logging_steps == 10
    assert args.loss_type == "mapo"
    assert not args.streaming
    columns = ["caption", "jpg_0", "jpg_1", "label_0", "label_1"]
    flags = ["caption_column", "image_0_column", "image_1_column", "label_0_column", "label_1_column"]
    assert [getattr(args, flag) for flag in flags] == columns
    assert args.chosen_column is None and args.rejected_column is None


def test_help_says_why_the_learning_rate_differs(parser):
    (action,) = [action for action in parser._actions if action.dest == "learning_rate"]
    assert "5e-4" in action.help and "1e-5" in action.help and "1e-7" in action.help


def test_help_is_grouped(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    assert stop.value.code == 0
    sections = re.split(r"^(\w+):$", capsys.readouterr().out, flags=re.MULTILINE)
    groups = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(groups) == ["options", "model", "pairs", "objective", "training", "optimizer", "output", "validation"]
    assert re.findall(r"^  (-\S+)", groups.pop("options"), flags=re.MULTILINE) == ["-h,"]
    assert "--rank" in groups["model"] and "--lora_rank" in groups["model"]
    assert "--streaming" in groups["pairs"] and "--no-remove_ties" in groups["pairs"]
    assert "--beta_mapo" in groups["objective"]
    assert "--seed" in groups["training"]
    assert "--learning_rate" in groups["optimizer"]
    assert "--resume_from_checkpoint" in groups["output"]
    assert "--validation_prompts" in groups["validation"]


@pytest.mark.parametrize("flag", ["--rank", "--lora_rank"])
def test_rank_has_two_spellings(script, flag):
    assert parse(script, f"{flag} 8").rank == 8


@pytest.mark.parametrize(
    ("words", "beta"),
    [
        ("", 8.0),
        ("--loss_type mapo", 8.0),
        ("--loss_type mapo_v1", 0.1),
        ("--beta_mapo 64", 64.0),
        ("--beta_mapo inf", math.inf),
        ("--beta_mapo 0.005 --loss_type mapo_v1", 0.005),
    ],
)
def test_beta_follows_the_objective(script, words, beta):
    assert parse(script, words).beta_mapo == beta


@pytest.mark.parametrize(
    ("words", "removed"),
    [("--remove_ties", True), ("--no-remove_ties", False), ("--remove_ties --no-remove_ties", False)],
)
def test_ties_can_be_kept(script, words, removed):
    assert parse(script, words).remove_ties is removed


def test_seed_0_is_a_seed(script, trained):
    """And not the absence of one, up to the checkpoint."""
    assert parse(script, "--seed 0").seed == 0
    assert json.loads((trained["output_dir"] / "checkpoint-1" / "mapo_state.json").read_text())["args"]["seed"] == 0


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_of_other_scripts_parse_as_they_stand(script, words):
    args = script.parse_args(words.split())
    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert args.pretrained_vae_model_name_or_path == "madebyollin/sdxl-vae-fp16-fix"
    assert (args.train_batch_size, args.gradient_accumulation_steps, args.max_train_steps) == (8, 2, 2000)
    assert (args.mixed_precision, args.learning_rate, args.lr_warmup_steps, args.seed) == ("fp16", 1e-5, 0, 0)
    assert args.use_8bit_adam and args.gradient_checkpointing
    assert args.rank == (8 if "rank" in words else None)


@pytest.mark.parametrize("words", ALLOWED)
def test_no_rule_refuses_too_much(script, words):
    parse(script, words)


@pytest.mark.parametrize(("name", "value"), END_NUMBERS)
def test_ends_of_ranges_are_allowed(script, name, value):
    assert getattr(parse(script, f"--{name} {value}"), name) == float(value)


def test_needs_no_optional_package(world, flags, tmp_path):
    """A full fine-tune through the real launcher where no optional package can be imported."""
    module = tmp_path / "hiding" / "sitecustomize.py"
    module.parent.mkdir()
    module.write_text(HIDING_MODULE)
    flags |= {"rank": None, "max_train_steps": 1, "report_to": "none"}
    result = launch(flags, env={"PYTHONPATH": str(module.parent)})
    assert result.returncode == 0, result.stderr
    assert (flags["output_dir"] / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    asked = set(Path(f"{module}.asked").read_text().split())
    assert {"wandb", "bitsandbytes", "peft", "deepspeed"} <= asked


# What is wrong on the command line alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["--pretrained_model_name_or_path", "--dataset_name"])
def test_required_flags(script, capsys, missing):
    index = REQUIRED.index(missing)
    with pytest.raises(SystemExit):
        script.parse_args(REQUIRED[:index] + REQUIRED[index + 2 :])
    assert missing in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("words", "named"), CONTRADICTIONS)
def test_contradictions(script, capsys, words, named):
    sentence = refusal(script, capsys, words.split())
    for flag in named:
        assert flag in sentence


@pytest.mark.parametrize(("name", "value"), WRONG_NUMBERS)
def test_numbers_out_of_range(script, capsys, name, value):
    sentence = refusal(script, capsys, [f"--{name}={value}"])
    assert f"--{name}" in sentence
    assert f"{value} is out of range" in sentence or f"{value!r} is not a" in sentence


def test_no_number_is_left_out_above(parser):
    typed = {option for action in parser._actions if action.type is not None for option in action.option_strings}
    assert typed == {f"--{name}" for names, _, _ in NUMBERS.values() for name in names}


@pytest.mark.parametrize(
    "words", ["--no_such_flag", "--no_such_flag=1", "--no_such_flag 1", "--resume latest", "stray"]
)
def test_unknown_words(script, capsys, words):
    """Abbreviations are unknown too: a flag added later would change what they mean."""
    name = re.split("[ =]", words)[0]
    assert f"unknown argument {name}:" in refusal(script, capsys, words.split())


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("form", ["{}", "{} 3", "{}=3"])
def test_foreign_flags_say_what_to_write(script, capsys, parser, name, form):
    sentence = refusal(script, capsys, ["--remove_ties", *form.format(name).split()])
    assert sentence.startswith(f"unknown argument {name}:")
    assert FOREIGN[name] in sentence
    known = {option for action in parser._actions for option in action.option_strings}
    advised = re.findall(r"--\w+", sentence.partition(":")[2])
    assert known.issuperset(set(advised) - {"--flag", "--no"})


def test_no_foreign_flag_is_left_out_above(script):
    assert set(script.FOREIGN_FLAGS) == set(FOREIGN)


@pytest.mark.parametrize(
    ("words", "flag", "package"),
    [
        ("--use_8bit_adam", "--use_8bit_adam", "bitsandbytes"),
        ("--rank 4", "--rank", "peft"),
        ("--report_to wandb", "--report_to", "wandb"),
        ("--report_to tensorboard", "--report_to", "tensorboard"),
    ],
)
def test_missing_packages(script, capsys, monkeypatch, words, flag, package):
    parse(script, words)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest)
    )
    sentence = refusal(script, capsys, words.split())
    assert flag in sentence and f"pip install {package}" in sentence
    parse(script, "--report_to none")
    parse(script, "--report_to all")
    assert parse(script, "").report_to == ("none" if package == "tensorboard" else "tensorboard")


# What is wrong in the files -----------------------------------------------------------------------------------------

COLUMN_FLAGS = ["caption_column", "image_0_column", "image_1_column", "label_0_column", "label_1_column"]
COLUMN_FLAGS += ["chosen_column", "rejected_column"]


@pytest.mark.parametrize("streaming", [None, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize("flag", COLUMN_FLAGS)
def test_missing_columns(script, flags, no_weights, flag, streaming):
    ordered = {"chosen_column": "jpg_0", "rejected_column": "jpg_1"} if flag in COLUMN_FLAGS[-2:] else {}
    sentence = complaint(script, flags | ordered | {flag: "nothing", "streaming": streaming})
    assert sentence.startswith(f"--{flag} nothing")
    assert "caption, jpg_0, jpg_1, label_0, label_1" in sentence


@pytest.mark.parametrize("streaming", [None, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize(
    ("flag", "column"), zip(COLUMN_FLAGS, ["jpg_0", "caption", "label_1", "caption", "jpg_0", "label_0", "caption"])
)
def test_columns_of_the_wrong_type(script, flags, no_weights, flag, column, streaming):
    ordered = {"chosen_column": "jpg_0", "rejected_column": "jpg_1"} if flag in COLUMN_FLAGS[-2:] else {}
    assert complaint(script, flags | ordered | {flag: column, "streaming": streaming}).startswith(f"--{flag} {column}")


@pytest.mark.parametrize(
    ("flag", "column", "values"),
    [
        ("caption_column", "nested", [["a"], ["b"]]),
        ("image_0_column", "nested", [{"bytes": b"a"}, {"bytes": b"b"}]),
        ("label_0_column", "nested", [[1], [0]]),
    ],
)
def test_nested_columns(script, flags, no_weights, tmp_path, flag, column, values):
    columns = {"caption": ["a", "b"], "jpg_0": [b"", b""], "jpg_1": [b"", b""], "label_0": [0, 1], "label_1": [1, 0]}
    folder = write_table(tmp_path / "nested", columns | {column: values})
    assert complaint(script, flags | {"dataset_name": folder, flag: column}).startswith(f"--{flag} {column}")


@pytest.mark.parametrize("flag", ["dataset_split_name", "validation_split"])
def test_missing_split(script, flags, no_weights, flag):
    sentence = complaint(script, flags | {flag: "nothing"})
    assert f"--{flag}" in sentence and "'nothing'" in sentence and "train" in sentence


@pytest.mark.parametrize(
    "wrong", [{"dataset_name": "/no/such/folder"}, {"dataset_name": "no/such"}, {"dataset_config_name": "nothing"}]
)
def test_missing_data_set(script, flags, no_weights, wrong):
    assert "--dataset_name" in complaint(script, flags | wrong)


def test_folder_without_data(script, flags, no_weights, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "--dataset_name" in complaint(script, flags | {"dataset_name": tmp_path / "empty"})


@pytest.mark.parametrize("below", ["", "below", "far/below"])
def test_output_folder_that_cannot_be(script, flags, no_weights, tmp_path, below):
    (tmp_path / "file").write_text("kept")
    sentence = complaint(script, flags | {"output_dir": tmp_path / "file" / below})
    assert sentence.startswith(f"--output_dir {tmp_path / 'file' / below}")
    assert (tmp_path / "file").read_text() == "kept"


def test_all_pairs_are_ties(script, flags, no_weights, tmp_path):
    columns = {"caption": ["a", "b"], "jpg_0": [b"", b""], "jpg_1": [b"", b""], "label_0": [1, 0], "label_1": [1, 0]}
    folder = write_table(tmp_path / "ties", columns)
    assert "--dataset_name" in complaint(script, flags | {"dataset_name": folder})
    assert "--num_validation_pairs" in complaint(script, flags | {"dataset_name": folder, "num_validation_pairs": 1})


def test_no_rows(script, flags, no_weights, tmp_path):
    types = {"caption": pa.string(), "jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.int64()}
    columns = {name: pa.array([], kind) for name, kind in (types | {"label_1": pa.int64()}).items()}
    assert "--dataset_name" in complaint(script, flags | {"dataset_name": write_table(tmp_path / "none", columns)})


@pytest.mark.parametrize("number", [48, 100])
def test_all_pairs_are_held_out(script, flags, no_weights, number):
    assert "leaves no pair to train on" in complaint(script, flags | {"num_validation_pairs": number})


def test_stream_without_pairs(script, flags, tmp_path):
    """What a stream holds is known only when it is read, so here the models are loaded."""
    columns = {"caption": ["a", "b"], "jpg_0": [b"", b""], "jpg_1": [b"", b""], "label_0": [1, 0], "label_1": [1, 0]}
    folder = write_table(tmp_path / "ties", columns)
    assert "--dataset_name" in complaint(script, flags | {"dataset_name": folder, "streaming": True})


@pytest.mark.parametrize("name", ["checkpoint-9", "no/such/checkpoint", "folder", "file"])
def test_unknown_checkpoint(script, flags, no_weights, name):
    (flags["output_dir"] / "folder").mkdir(parents=True)
    (flags["output_dir"] / "file").touch()
    sentence = complaint(script, flags | {"resume_from_checkpoint": name})
    assert sentence.startswith("--resume_from_checkpoint") and name in sentence


@pytest.mark.parametrize("checkpoint", ["latest", "checkpoint-1"])
@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("rank", 8, "4"),
        ("rank", None, "4"),
        ("seed", 1, "0"),
        ("use_8bit_adam", True, "False"),
        ("streaming", True, "False"),
    ],
)
def test_checkpoint_of_another_run(script, trained, no_weights, checkpoint, name, value, written):
    changed = {name: value, "max_train_steps": 2, "resume_from_checkpoint": checkpoint}
    sentence = complaint(script, trained | changed)
    assert sentence.startswith("--resume_from_checkpoint")
    assert f"--{name} is {value}" in sentence and f"{written} in " in sentence


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"])
@pytest.mark.parametrize("model", ["/no/such/folder", "no/such", "empty"])
def test_missing_model(script, flags, tmp_path, flag, model):
    if model == "empty":
        model = tmp_path / "empty"
        model.mkdir()
    sentence = complaint(script, flags | {flag: model})
    assert f"--{flag}" in sentence and str(model) in sentence


def test_pipeline_without_unet(script, flags, world, tmp_path):
    folder = shutil.copytree(world / "pipeline", tmp_path / "pipeline")
    shutil.rmtree(folder / "unet")
    assert "--pretrained_model_name_or_path" in complaint(script, flags | {"pretrained_model_name_or_path": folder})


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "text_encoder_2"])
def test_truncated_weights(script, flags, world, tmp_path, part):
    folder = shutil.copytree(world / "pipeline", tmp_path / "pipeline")
    weights = next((folder / part).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "--pretrained_model_name_or_path" in complaint(script, flags | {"pretrained_model_name_or_path": folder})


@pytest.mark.parametrize("rank", [4, None], ids=["lora", "full"])
def test_fp16_on_cpu(script, flags, no_weights, rank):
    """accelerate lets it pass, but then neither casts nor scales the loss."""
    assert "--mixed_precision fp16" in complaint(script, flags | {"rank": rank, "mixed_precision": "fp16"})


# Through the launcher -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"streaming": True, "max_train_steps": None},
        {"caption_column": "nothing"},
        {"pretrained_model_name_or_path": "/no/such/folder"},
    ],
    ids=["contradiction", "column", "pipeline"],
)
def test_users_see_one_sentence(flags, wrong):
    """The launcher adds a traceback of its own, but none goes through this script."""
    result = launch(flags | wrong)
    assert result.returncode != 0
    ours, *launchers = result.stderr.split("Traceback (most recent call last)")
    assert len(launchers) == 1
    assert f'{SCRIPT.name}", line' not in result.stderr
    errors = [line for line in ours.splitlines() if re.match(rf"({re.escape(SCRIPT.name)}: )?error: ", line)]
    assert errors == ours.splitlines()[-1:]
    assert f"--{next(iter(wrong))}" in errors[0]


# A flag exists only if a test exercises it --------------------------------------------------------------------------


def test_every_flag_is_exercised(parser):
    """The tables of this file do not count: they would name every flag."""
    here = {"--help", "-h", "--lora_rank"}
    files = [file for file in (ROOT / "tests").rglob("*.py") if file != Path(__file__)]
    text = "\n".join(file.read_text() for file in files)
    names = {option for action in parser._actions for option in action.option_strings} - here
    unused = {name for name in names if not re.search(rf'["\']{name[2:]}["\']|{name}\b|\b{name[2:]}=', text)}
    assert not unused
