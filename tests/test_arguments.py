"""The command line: names and defaults, and that every wrong use ends in one sentence before weights are loaded."""

import argparse
import importlib.util
import json
import logging
import math
import re
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SCRIPT, command_line, launch, run


REQUIRED = ["--pretrained_model_name_or_path", "model", "--dataset_name", "pairs"]

# What the diffusers SDXL trainers share, with their defaults.
DEFAULTS = {"pretrained_vae_model_name_or_path": None, "revision": None, "variant": None, "cache_dir": None}
DEFAULTS |= {"dataset_split_name": None, "max_train_samples": None, "dataloader_num_workers": 0, "seed": None}
DEFAULTS |= {"resolution": 1024, "random_crop": False, "no_hflip": False, "vae_encode_batch_size": 1, "lr_power": 1.0}
DEFAULTS |= {"train_batch_size": 4, "gradient_accumulation_steps": 1, "num_train_epochs": 1, "max_train_steps": None}
DEFAULTS |= {"gradient_checkpointing": False, "mixed_precision": None, "allow_tf32": False, "rank": None}
DEFAULTS |= {"scale_lr": False, "lr_scheduler": "constant", "lr_warmup_steps": 500, "lr_num_cycles": 1}
DEFAULTS |= {"use_8bit_adam": False, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 1e-2}
DEFAULTS |= {"adam_epsilon": 1e-8, "max_grad_norm": 1.0, "checkpointing_steps": 500, "checkpoints_total_limit": None}
DEFAULTS |= {"resume_from_checkpoint": None, "logging_dir": "logs", "report_to": "tensorboard", "push_to_hub": False}
DEFAULTS |= {"hub_token": None, "hub_model_id": None, "run_validation": False, "validation_steps": 200}
# Where this script has its own.
DEFAULTS |= {"learning_rate": 1e-5, "loss_type": "mapo", "snr_value": 0.5, "remove_ties": True, "streaming": False}
DEFAULTS |= {"label_noise_prob": 0.0, "max_bad_rows": 0.01, "logging_steps": 10, "caption_column": "caption"}
DEFAULTS |= {"image_0_column": "jpg_0", "image_1_column": "jpg_1", "label_0_column": "label_0"}
DEFAULTS |= {"label_1_column": "label_1", "chosen_column": None, "rejected_column": None}

COUNTS = ["rank", "lora_rank", "shuffle_shards", "max_train_samples", "resolution", "vae_encode_batch_size"]
COUNTS += ["train_batch_size", "num_train_epochs", "max_train_steps", "gradient_accumulation_steps", "lr_num_cycles"]
COUNTS += ["max_bad_steps", "checkpointing_steps", "checkpoints_total_limit", "logging_steps", "validation_steps"]
COUNTS += ["num_inference_steps", "num_validation_pairs"]
POSITIVE = ["learning_rate", "lr_power", "adam_epsilon", "snr_value", "text_encoder_lr"]
# Kind of number: its flags, values out of range, and the values at the ends of the range.
NUMBERS = {
    "count": (COUNTS, ["0", "-1", "1.5", "1e3", "nan", "inf", "many", ""], []),
    "count or zero": (["dataloader_num_workers", "lr_warmup_steps", "seed"], ["-1", "0.5", "nan", "inf", "x"], ["0"]),
    "share": (["label_noise_prob", "max_bad_rows"], ["-0.1", "1.1", "nan", "inf", "1%"], ["0", "1"]),
    "share below one": (["adam_beta1", "adam_beta2"], ["-0.1", "1", "1.1", "nan", "inf"], ["0", "0.9999"]),
    "not negative": (["adam_weight_decay", "guidance_scale"], ["-1e-9", "nan", "inf", "x"], ["0"]),
    "positive": (POSITIVE, ["0", "-1e-9", "nan", "inf", "x"], ["1e-30"]),
    "positive, with --rank": (["lora_alpha"], ["0", "-1e-9", "nan", "inf", "x"], []),
    "not negative, or infinite": (["max_grad_norm"], ["-1e-9", "nan", "-inf", "x"], ["0", "inf"]),
    "positive or infinite": (["beta_mapo"], ["0", "-1", "nan", "-inf", "x"], ["1e-3", "inf"]),
}

# Wrong words and the flags that the sentence must name.
CONTRADICTIONS = [
    ("--resolution 65", ["--resolution"]),
    ("--cache_latents --random_crop", ["--cache_latents", "--random_crop"]),
    ("--full_bf16", ["--full_bf16", "--use_8bit_adam", "--mixed_precision"]),
    ("--full_bf16 --use_8bit_adam --mixed_precision bf16 --rank 4", ["--full_bf16", "--rank"]),
    ("--chosen_column a", ["--chosen_column", "--rejected_column"]),
    ("--loss_type mapo_v1 --beta_mapo inf", ["--beta_mapo", "--loss_type"]),
    ("--report_to all --hub_token secret", ["--report_to", "--hub_token"]),
    # The schedule's own limit, of which it would tell only when the models are loaded.
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
]
ALLOWED = [
    "--streaming",
    "--streaming --num_train_epochs 2 --num_validation_pairs 4 --max_train_samples 8",
    "--chosen_column a --rejected_column b",
    "--full_bf16 --use_8bit_adam --mixed_precision bf16",
    "--report_to tensorboard --hub_token secret",
    "--lr_scheduler polynomial --max_train_steps 500 --lr_warmup_steps 500",
]

# Words from elsewhere, and what the README says to write.
FOREIGN = {"--sft_training": "--beta_mapo inf", "--validation_prompt": "--validation_prompts"}
FOREIGN |= {"--train_unet": "leave it out", "--remove_ties True": "take no value"}
# Words from elsewhere that ask for what is done anyway.
IGNORED = "--center_crop --random_flip --mapo_training --enable_xformers_memory_efficient_attention --local_rank 3"

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

# Packages that a full fine-tune without trackers must do without, and the module that hides them. It also hides what
# Windows does not have, and starts processes as Windows and macOS do.
HIDDEN = ("wandb", "bitsandbytes", "peft", "deepspeed", "tensorboard")
HIDING_MODULE = f"""
import multiprocessing
import signal
import sys
from importlib.machinery import PathFinder

import psutil  # its Linux form needs `resource`

del signal.SIGUSR1
sys.modules["resource"] = None
multiprocessing.set_start_method("spawn")


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


@pytest.fixture
def no_weights(script, monkeypatch):
    """From here on no weights can be loaded."""

    def refuse(*_, **__):
        raise AssertionError("weights were about to be loaded")

    for part in (script.StableDiffusionXLPipeline, script.AutoencoderKL, script.UNet2DConditionModel):
        monkeypatch.setattr(part, "from_pretrained", refuse)


@pytest.fixture
def parser(script, monkeypatch):
    """The parser that `parse_args` makes."""
    parsers, parse_known_args = [], argparse.ArgumentParser.parse_known_args

    def kept(self, *words):
        parsers.append(self)
        return parse_known_args(self, *words)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", kept)
    parse(script)
    return parsers[0]


# Right uses ---------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_diffusers(script):
    args = vars(parse(script))
    found = {name: (args[name], type(args[name])) for name in DEFAULTS}
    assert found == {name: (value, type(value)) for name, value in DEFAULTS.items()}


def test_help_is_grouped_and_shows_defaults(script, parser, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    assert stop.value.code == 0
    sections = re.split(r"^(\w+):$", capsys.readouterr().out, flags=re.MULTILINE)
    groups = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(groups) == ["options", "model", "pairs", "objective", "training", "optimizer", "output", "validation"]
    assert re.findall(r"^  (-\S+)", groups.pop("options"), flags=re.MULTILINE) == ["-h,"]
    assert "--rank" in groups["model"] and "--lora_rank" in groups["model"]
    assert "5e-4" in groups["optimizer"]
    text = " ".join(" ".join(groups.values()).split())
    for action in parser._actions:
        assert action.dest == "help" or action.help, action.option_strings
        if action.type is not None and action.default is not None:
            assert re.search(rf"{action.option_strings[0]}\b.*? \(default: {action.default}\)", text), action.dest


def test_ranks_betas_and_ties(script):
    assert parse(script, "--rank 8").rank == parse(script, "--lora_rank 8").rank == 8
    assert parse(script).remove_ties and not parse(script, "--remove_ties --no-remove_ties").remove_ties
    betas = {"--loss_type mapo": 8.0, "--loss_type mapo_v1": 0.1, "--beta_mapo 64": 64.0, "--beta_mapo inf": math.inf}
    betas["--beta_mapo 0.005 --loss_type mapo_v1"] = 0.005
    assert {words: parse(script, words).beta_mapo for words in betas} == betas


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_of_other_scripts_parse_as_they_stand(script, words):
    args = script.parse_args(words.split())
    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert args.pretrained_vae_model_name_or_path == "madebyollin/sdxl-vae-fp16-fix"
    assert (args.train_batch_size, args.gradient_accumulation_steps, args.max_train_steps) == (8, 2, 2000)
    assert (args.mixed_precision, args.learning_rate, args.lr_warmup_steps, args.seed) == ("fp16", 1e-5, 0, 0)
    assert args.use_8bit_adam and args.gradient_checkpointing
    assert args.rank == (8 if "rank" in words else None)


def test_needs_no_optional_package_and_nothing_that_windows_lacks(flags, tmp_path):
    """A full fine-tune through the real launcher where these cannot be imported, with a worker that is spawned."""
    module = tmp_path / "hiding" / "sitecustomize.py"
    module.parent.mkdir()
    module.write_text(HIDING_MODULE)
    flags |= {"rank": None, "max_train_steps": 1, "report_to": "none", "dataloader_num_workers": 1}
    result = launch(flags, env={"PYTHONPATH": str(module.parent)})
    assert result.returncode == 0, result.stderr
    assert (flags["output_dir"] / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    asked = set(Path(f"{module}.asked").read_text().split())
    assert {"wandb", "bitsandbytes", "peft", "deepspeed"} <= asked


# Wrong command lines ------------------------------------------------------------------------------------------------


def test_required_flags(script, capsys):
    for missing in (REQUIRED[:2], REQUIRED[2:]):
        with pytest.raises(SystemExit):
            script.parse_args([word for word in REQUIRED if word not in missing])
        assert missing[0] in capsys.readouterr().err.splitlines()[-1]


def test_contradictions_and_no_more_are_refused(script, capsys):
    for words, named in CONTRADICTIONS:
        sentence = refusal(script, capsys, words.split())
        assert all(flag in sentence for flag in named), sentence
    for words in ALLOWED:
        parse(script, words)


def test_single_file_is_refused_with_the_command_that_converts_it(script, capsys):
    sentence = refusal(script, capsys, ["--pretrained_model_name_or_path", "some/model.safetensors"])
    assert "python convert_sdxl.py single_file some/model.safetensors FOLDER" in sentence


@pytest.mark.parametrize("words", ["--output_dir=", "--logging_dir=/logs", "--logging_dir=.", "--logging_dir=../logs"])
def test_folders_that_would_scatter_files_are_refused(script, capsys, words):
    assert words.partition("=")[0] in refusal(script, capsys, [words])


def test_home_folder_is_expanded_in_paths(script, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = parse(script, "--output_dir ~/mapo --cache_dir=~/cache --dataset_name ~/pairs")
    assert (args.output_dir, args.cache_dir, args.dataset_name) == (
        "/home/me/mapo",
        "/home/me/cache",
        "/home/me/pairs",
    )


def test_temporary_folder_that_is_too_long_for_workers_is_refused(script, capsys, monkeypatch):
    """They would wait for each other for ever."""
    monkeypatch.setattr(tempfile, "tempdir", "/" + 140 * "t")
    parse(script)
    assert "TMPDIR" in refusal(script, capsys, ["--dataloader_num_workers", "2"])


def test_numbers_out_of_range(script, capsys, parser):
    typed = set()
    for action in parser._actions:
        if action.type not in (None, script.PATH):
            typed.update(action.option_strings)
    assert typed == {f"--{name}" for names, _, _ in NUMBERS.values() for name in names}
    for names, wrong, ends in NUMBERS.values():
        for name in names:
            for value in wrong:
                sentence = refusal(script, capsys, [f"--{name}={value}"])
                assert f"--{name}" in sentence
                assert f"{value} is not " in sentence or f"{value!r} is not " in sentence
            for value in ends:
                assert getattr(parse(script, f"--{name} {value}"), name) == float(value)


def test_unknown_words(script, capsys):
    """Abbreviations are unknown too: a flag added later would change what they mean."""
    for words in ("--no_such_flag", "--no_such_flag=1", "--resume latest", "stray"):
        sentence = refusal(script, capsys, words.split())
        assert sentence.startswith("unrecognized arguments: ") and re.split("[ =]", words)[0] in sentence


def test_all_unknown_flags_are_named_at_once(script, capsys):
    sentence = refusal(script, capsys, "--no_such_flag --sft_training --another 3 --validation_prompt=x".split())
    assert all(name in sentence for name in ("--no_such_flag", "--sft_training", "--another", "--validation_prompt"))


def test_readme_says_what_to_write_in_place_of_flags_of_other_scripts(script, capsys, parser):
    """They are refused here, and all other flags of the table exist."""
    table = (ROOT / "README.md").read_text().partition("| there | here |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = dict(re.fullmatch(r"\| (.*) \| (.*) \|", line).groups() for line in table.splitlines())
    known = {option for action in parser._actions for option in action.option_strings}
    for words, advice in FOREIGN.items():
        assert advice in rows.pop(f"`{words}`").replace("`", "")
        assert refusal(script, capsys, words.split()) == f"unrecognized arguments: {words.split()[-1]}"
    ((ignored, advice),) = rows.items()
    assert re.findall("--\\w+", ignored) == re.findall("--\\w+", IGNORED) and "no effect" in advice
    assert known.issuperset(set(re.findall(r"--[\w-]+", table)) - set(FOREIGN))


def test_harmless_flags_of_other_scripts_change_nothing(script):
    assert parse(script, IGNORED) == parse(script, "--local_rank=3") == parse(script)


def test_missing_packages(script, capsys, monkeypatch):
    needed = {"--use_8bit_adam": "bitsandbytes", "--rank 4": "peft", "--report_to wandb": "wandb"}
    for words, package in {**needed, "--report_to tensorboard": "tensorboard"}.items():
        parse(script, words)
        with monkeypatch.context() as patch:
            patch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == package else True)
            sentence = refusal(script, capsys, words.split())
            parse(script, "--report_to none")
        assert words.split()[0] in sentence and f"pip install {package}" in sentence


# Wrong files --------------------------------------------------------------------------------------------------------

COLUMNS = {"caption": ["a", "b"], "jpg_0": [b"", b""], "jpg_1": [b"", b""], "label_0": [0, 1], "label_1": [1, 0]}
ORDERED = {"chosen_column": "jpg_0", "rejected_column": "jpg_1"}
# Each column flag and a column of another type.
WRONG_TYPES = {"caption_column": "jpg_0", "image_0_column": "label_0", "image_1_column": "label_1"}
WRONG_TYPES |= {"label_0_column": "caption", "label_1_column": "jpg_0", "rejected_column": "label_1"}


def write_table(folder, columns):
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "train.parquet")
    return folder


def sentence_for_type(flag):
    """What is said about a column of the wrong type: images are read with the first pair, the others before it."""
    if flag.startswith("label"):
        return "must contain numbers"
    return "must contain text" if flag.startswith("caption") else "image"


@pytest.mark.parametrize("streaming", [None, True], ids=["map-style", "streaming"])
def test_missing_columns_and_columns_of_the_wrong_type(script, flags, no_weights, tmp_path, streaming):
    flags["streaming"] = streaming
    for flag, column in WRONG_TYPES.items():
        named = {**flags, **(ORDERED if flag in ORDERED else {})}
        sentence = complaint(script, named | {flag: "nothing"})
        assert sentence.startswith(f"--{flag}: ") and "no column 'nothing' (columns: ['caption', 'jpg_0'" in sentence
        assert sentence_for_type(flag) in complaint(script, named | {flag: column})
    strings = complaint(script, flags | {"image_0_column": "caption"})
    assert strings.startswith("--image_0_column: column 'caption' contains strings")
    nested = {"image_0_column": [{"bytes": b"a"}, {"bytes": b"b"}], "label_0_column": [[1], [0]]}
    for flag, values in nested.items():
        folder = write_table(tmp_path / flag, COLUMNS | {"nested": values})
        sentence = complaint(script, flags | {"dataset_name": folder, flag: "nested"})
        assert sentence_for_type(flag) in sentence


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"dataset_split_name": "nothing"}, ["--dataset_split_name", "'nothing'", "train"]),
        ({"validation_split": "nothing"}, ["--validation_split", "'nothing'", "train"]),
        ({"dataset_name": "/no/such/folder"}, ["--dataset_name /no/such/folder"]),
        ({"dataset_name": "no/such"}, ["--dataset_name no/such"]),
        ({"dataset_config_name": "nothing"}, ["--dataset_name"]),
        ({"num_validation_pairs": 48}, ["--dataset_name", "48 held out"]),
        # accelerate would neither cast nor scale the loss.
        ({"mixed_precision": "fp16"}, ["--mixed_precision fp16"]),
        # There is no network here.
        ({"push_to_hub": True, "hub_token": "hf_secret"}, ["--push_to_hub", "offline"]),
        ({"push_to_hub": True, "hub_model_id": "one/two/three"}, ["--push_to_hub", "one/two/three"]),
        ({"resume_from_checkpoint": "checkpoint-9"}, ["--resume_from_checkpoint", "checkpoint-9"]),
        ({"resume_from_checkpoint": "logs"}, ["--resume_from_checkpoint", "logs"]),
    ],
    ids=str,
)
def test_one_sentence_before_weights_are_loaded(script, flags, no_weights, wrong, words):
    sentence = complaint(script, flags | wrong)
    assert all(word in sentence for word in words), sentence
    assert "secret" not in sentence


def test_apple_gpus_are_refused(script, flags, no_weights, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "mps")
    assert re.search("Apple .*float64.*cpu.yaml", complaint(script, flags))


@pytest.mark.parametrize("below", ["", "below"])
def test_output_folder_that_cannot_be(script, flags, no_weights, tmp_path, below):
    (tmp_path / "file").write_text("kept")
    sentence = complaint(script, flags | {"output_dir": tmp_path / "file" / below})
    assert sentence.startswith("--output_dir") and str(tmp_path / "file") in sentence
    assert (tmp_path / "file").read_text() == "kept"


def test_cache_folder_that_cannot_be_written_is_named(script, flags, no_weights, tmp_path):
    (tmp_path / "file").write_text("kept")
    assert str(tmp_path / "file") in complaint(script, flags | {"cache_dir": tmp_path / "file" / "cache"})


@pytest.mark.parametrize("streaming", [None, True], ids=["map-style", "streaming"])
def test_data_set_without_pairs(script, flags, no_weights, tmp_path, streaming):
    flags["streaming"] = streaming
    ties = write_table(tmp_path / "ties", COLUMNS | {"label_1": [0, 1]})
    rows = write_table(tmp_path / "rows", dict(zip(COLUMNS, pa.table(COLUMNS).slice(0, 0).columns)))
    (tmp_path / "empty").mkdir()
    for folder in (ties, rows, tmp_path / "empty"):
        assert complaint(script, flags | {"dataset_name": folder}).startswith("--dataset_name")


def test_checkpoint_of_another_run(script, flags, request):
    """Flags that a checkpoint fixes; the seed is settled by it."""
    run(script, flags | {"max_train_steps": 1, "checkpointing_steps": 1})
    request.getfixturevalue("no_weights")
    others = [("rank", 8, 4), ("rank", None, 4), ("seed", 1, 0), ("use_8bit_adam", True, False)]
    for name, value, written in [*others, ("streaming", True, False), ("shuffle_shards", 2, 4)]:
        for checkpoint in ("latest", "checkpoint-1"):
            sentence = complaint(script, flags | {name: value, "resume_from_checkpoint": checkpoint})
            assert sentence.startswith("--resume_from_checkpoint"), sentence
            assert f"{name} is {value}, but {written} in " in sentence, sentence


@pytest.mark.parametrize("flag", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"])
@pytest.mark.parametrize("model", ["/no/such/folder", "no/such", "empty"])
def test_missing_model(script, flags, tmp_path, monkeypatch, flag, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert f"--{flag} {model} cannot be loaded" in complaint(script, flags | {flag: model})


# Bases of other kinds: how their configs differ from SDXL's (... is a field they lack), and a word of the sentence.
UNET, VAE = "unet/config.json", "vae/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
OTHER_BASES = {
    "no sizes": ({UNET: {"addition_embed_type": None}}, "UNet"),
    "inpainting": ({UNET: {"in_channels": 9}}, "UNet"),
    "learned variance": ({UNET: {"out_channels": 8}}, "UNet"),
    "other latents": ({VAE: {"latent_channels": 16}}, "UNet"),
    "other text encoders": ({UNET: {"cross_attention_dim": 2048}}, "text encoders"),
    "EDM": ({SCHEDULER: {"_class_name": "EDMEulerScheduler", "beta_start": ..., "sigma_data": 0.5}}, "EDM"),
    "continuous": ({SCHEDULER: {"timestep_type": "continuous", "prediction_type": "v_prediction"}}, "EDM"),
    "flow": ({SCHEDULER: {"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_start": ...}}, "flow"),
    "flow sigmas": ({SCHEDULER: {"use_flow_sigmas": True}}, "flow"),
    "sample": ({SCHEDULER: {"prediction_type": "sample"}}, "neither epsilon nor v_prediction"),
}


def copy_configs(folder, copy, changes):
    """A copy of a model's folder with other configs and without weights."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    for file, fields in changes.items():
        fields = {**json.loads((copy / file).read_text()), **fields}
        (copy / file).write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
    return copy


def test_vae_whose_config_leaves_defaults_out_is_the_same(script, flags, world, tmp_path):
    folder = copy_configs(world / "pipeline" / "vae", tmp_path / "vae", {"config.json": {"latent_channels": ...}})
    flags.update(pretrained_vae_model_name_or_path=folder)
    (channels, *_), _ = script.load_configs(script.parse_args(command_line(flags)), None)
    assert channels == 4


@pytest.mark.parametrize("changes", [{"scaling_factor": 0.18215}, {"latent_channels": 16}], ids=str)
def test_vae_with_other_latents_is_refused(script, flags, world, no_weights, tmp_path, changes):
    folder = copy_configs(world / "pipeline" / "vae", tmp_path / "vae", {"config.json": changes})

    sentence = complaint(script, flags | {"pretrained_vae_model_name_or_path": folder})

    assert f"{folder}: its {next(iter(changes))} is not that of" in sentence


@pytest.mark.parametrize(("changes", "word"), OTHER_BASES.values(), ids=OTHER_BASES)
def test_bases_of_other_kinds_by_their_configs_alone(script, flags, world, no_weights, tmp_path, changes, word):
    folder = copy_configs(world / "pipeline", tmp_path / "other", changes)
    sentence = complaint(script, flags | {"pretrained_model_name_or_path": folder})
    start, _, reason = sentence.partition(": ")
    assert start == f"--pretrained_model_name_or_path {folder} is not an SDXL base model" and word in reason, sentence


@pytest.mark.parametrize("lacking", ["unet", "text_encoder", "text_encoder_2", "tokenizer"])
def test_base_without_a_part_is_refused_before_weights_are_loaded(script, flags, world, no_weights, tmp_path, lacking):
    """As SD 3, SDXL's refiner, SD 1.5, and a download that was not completed."""
    folder = copy_configs(world / "pipeline", tmp_path / "other", {})
    shutil.rmtree(folder / lacking)

    sentence = complaint(script, flags | {"pretrained_model_name_or_path": folder})

    assert sentence.startswith(f"--pretrained_model_name_or_path {folder}")
    assert lacking in sentence or "config.json" in sentence


def test_tokenizer_without_its_vocabulary_is_refused(script, flags, world, no_weights, tmp_path):
    """transformers makes one that turns all captions into the same tokens."""
    folder = copy_configs(world / "pipeline", tmp_path / "other", {})
    for path in (folder / "tokenizer_2").iterdir():
        if path.name not in ("tokenizer_config.json", "special_tokens_map.json"):
            path.unlink()

    sentence = complaint(script, flags | {"pretrained_model_name_or_path": folder})

    assert sentence.startswith(f"--pretrained_model_name_or_path {folder}: tokenizer_2 has ")


def test_vae_of_another_kind_is_not_blamed_on_the_base(script, flags, world, no_weights, tmp_path):
    folder = copy_configs(world / "pipeline" / "vae", tmp_path / "vae", {"config.json": {"scaling_factor": 0.18215}})
    sentence = complaint(script, flags | {"pretrained_vae_model_name_or_path": folder})
    assert sentence.startswith(f"--pretrained_vae_model_name_or_path {folder}") and "latents" in sentence, sentence


def test_truncated_weights(script, flags, world, tmp_path):
    for part in ("vae", "unet", "text_encoder_2"):
        folder = shutil.copytree(world / "pipeline", tmp_path / part)
        weights = next((folder / part).glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:1000])
        named = {"pretrained_model_name_or_path": folder}
        assert f"--pretrained_model_name_or_path {folder} cannot be" in complaint(script, flags | named)


# Warnings before weights are loaded ---------------------------------------------------------------------------------


@pytest.fixture
def warnings(script, flags, monkeypatch, caplog):
    """Gives what a run with these changes of the flags says at level WARNING, up to the loading of weights."""

    def stop(*_):
        raise script.TrainingError("stopped here")

    def warned(**changes):
        caplog.clear()
        assert complaint(script, flags | changes) == "stopped here"
        return [record.message for record in caplog.records if record.levelno == logging.WARNING]

    monkeypatch.setattr(script, "load_pipeline", stop)
    return warned


def test_warmup_longer_than_the_run_is_reported_with_the_share_that_is_reached(warnings):
    (warning,) = warnings(lr_scheduler="cosine", max_train_steps=50, lr_warmup_steps=200)
    assert all(words in warning for words in ("--lr_warmup_steps 200", "50 steps", "25%"))
    assert not warnings(lr_scheduler="cosine", max_train_steps=200, lr_warmup_steps=200)
    # The default, which such a schedule does not use.
    assert not warnings(lr_scheduler="constant", max_train_steps=50, lr_warmup_steps=500)


def test_beta_of_the_first_release_under_the_published_objective_is_reported(warnings):
    (warning,) = warnings(beta_mapo=0.1)
    assert "--beta_mapo 0.1" in warning and "mapo_v1" in warning
    assert not warnings(beta_mapo=0.1, loss_type="mapo_v1") and not warnings(beta_mapo=1)


def test_only_the_scripts_own_logger_is_at_info(script, flags, monkeypatch, request):
    """httpx would tell of each request to the hub."""
    request.addfinalizer(lambda level=logging.root.level: logging.root.setLevel(level))
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's, beside which basicConfig does nothing
    complaint(script, flags | {"caption_column": "nothing"})
    levels = {name: logging.getLogger(name).getEffectiveLevel() for name in (script.__name__, "httpx", "httpx2")}
    assert levels == {script.__name__: logging.INFO, "httpx": logging.WARNING, "httpx2": logging.WARNING}


# What a user sees ---------------------------------------------------------------------------------------------------


def test_users_see_one_sentence(flags):
    """The launcher adds a traceback of its own, but none goes through this script."""
    result = launch(flags | {"caption_column": "nothing"})
    assert result.returncode != 0
    ours, *launchers = result.stderr.split("Traceback (most recent call last)")
    assert len(launchers) == 1
    assert f'{SCRIPT.name}", line' not in result.stderr
    errors = [line for line in ours.splitlines() if line.startswith("error: ")]
    assert errors == ours.splitlines()[-1:]
    assert "--caption_column: " in errors[0] and "no column 'nothing'" in errors[0]


# A flag exists only if a test exercises it --------------------------------------------------------------------------


def test_every_flag_is_exercised(parser):
    """The tables of this file do not count: they would name every flag."""
    here = {"--help", "-h", "--lora_rank", *IGNORED.split()}
    files = [file for file in (ROOT / "tests").rglob("*.py") if file != Path(__file__)]
    text = "\n".join(file.read_text() for file in files)
    names = {option for action in parser._actions for option in action.option_strings} - here
    unused = {name for name in names if not re.search(rf'["\']{name[2:]}["\']|{name}\b|\b{name[2:]}=', text)}
    assert not unused
