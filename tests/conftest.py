"""What the tests share: the small world, built once per session, and ways to run the script on it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from functools import partial, partialmethod, wraps
from pathlib import Path


# Before torch and the Hugging Face libraries are imported.
os.environ.update(
    {
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
    }
)

import pytest  # noqa: E402


pytest.register_assert_rewrite("runs")

import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from cpu_cluster import run_ranks  # noqa: E402
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: E402
from peft import LoraConfig  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402
from small_world import build_pipeline, draw_pairs  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_diffusion_mapo_sdxl.py"

# Parameters of a test that run only with `-m matrix`.
matrix = partial(pytest.param, marks=pytest.mark.matrix)

torch.set_num_threads(1)
# Shells let jobs in the background ignore Ctrl-C, which processes inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Run the longest tests first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_launch_configs", "test_learning"))


def load_script(path=SCRIPT):
    """Import a script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def save_lora(folder):
    """Write to `folder / "lora"` a LoRA of rank 2 that changes the images of `folder / "pipeline"`."""
    unet = UNet2DConditionModel.from_pretrained(folder / "pipeline", subfolder="unet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    StableDiffusionXLPipeline.save_lora_weights(folder / "lora", unet_lora_layers=get_peft_model_state_dict(unet))


@pytest.fixture(scope="session")
def script():
    """The script as a module. Its logger needs accelerate's state."""
    PartialState()
    return sys.modules.get(SCRIPT.stem) or load_script()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with `pipeline` and `pairs` (48 drawn pairs in three shards)."""
    folder = tmp_path_factory.mktemp("world")
    build_pipeline(folder / "pipeline")
    draw_pairs(folder / "pairs")
    return folder


def short_run(world, output_dir):
    """Flags of a short run: LoRA on the small world, every step logged."""
    return {
        "pretrained_model_name_or_path": world / "pipeline",
        "dataset_name": world / "pairs",
        "cache_dir": world / "cache",
        "output_dir": output_dir,
        "resolution": 64,
        "rank": 4,
        "learning_rate": 1e-3,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "logging_steps": 1,
        "seed": 0,
    }


@pytest.fixture
def flags(world, tmp_path):
    """Flags of a short run that writes to `tmp_path / "out"`."""
    return short_run(world, tmp_path / "out")


Call = namedtuple("Call", ["args", "kwargs", "result"])


@pytest.fixture
def record_calls(monkeypatch):
    """`record_calls(owner, name)` is the list of the calls of a function or method from then on."""

    def record_calls(owner, name):
        original = getattr(owner, name)
        calls = []

        @wraps(original)
        def recorded(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append(Call(args, kwargs, result))
            return result

        monkeypatch.setattr(owner, name, recorded)
        return calls

    return record_calls


@pytest.fixture
def loaded(record_calls, script):
    """The calls of `load_pipeline`, whose results are the pipelines."""
    return record_calls(script, "load_pipeline")


@pytest.fixture(scope="session")
def uninterrupted(script, world, tmp_path_factory):
    """Output folder of an undisturbed run with the given flags, which is made once per session."""
    folders = {}

    def run_once(flags, size=1):
        flags = dict(flags)
        flags.pop("output_dir")
        flags.pop("resume_from_checkpoint", None)
        key = json.dumps([size, flags], default=str, sort_keys=True)
        if key not in folders:
            folder = tmp_path_factory.mktemp("uninterrupted") / "out"
            flags["output_dir"] = folder
            if size == 1:
                run(script, flags)
            else:
                result = fork(flags, size)
                assert result.returncode == 0, result.stderr
            folders[key] = folder
        return folders[key]

    return run_once


Graph = namedtuple("Graph", ["for_training", "has_open_shapes"])


@pytest.fixture
def compiled_graphs(monkeypatch):
    """The graphs of compiled blocks. The compiler only traces them; reaching the recompile limit is an error."""
    graphs = []

    def trace(graph, inputs):
        has_open_shapes = any(isinstance(value, torch.SymInt) for value in inputs)
        graphs.append(Graph(torch.is_grad_enabled(), has_open_shapes))
        return graph.forward

    compile_blocks = UNet2DConditionModel.compile_repeated_blocks
    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", partialmethod(compile_blocks, backend=trace))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield graphs
    torch._logging.set_logs()
    torch._dynamo.reset()


def command_line(flags):
    """`{"name": value}` as a command line: True is a bare switch, None is left out, lists are spread."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}", str(value)]
    return words


def run_words(script, words):
    """Call the script's `main` in this process, with accelerate's state reset, and return the output folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in getattr(script, "STOP_SIGNALS", ())}
    try:
        args = script.parse_args(words)
        status = script.main(args)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if status:
        raise SystemExit(status)
    return Path(args.output_dir)


def run(script, flags):
    """Run the script in this process, and return the output folder."""
    return run_words(script, command_line(flags))


def launch(flags, processes=1, env=None, timeout=900, wrapper=()):
    """Run the script with its real launcher. Returns the CompletedProcess; the timeout only guards against hangs."""
    if processes == 1:
        launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, wrapper), str(SCRIPT), *command_line(flags)],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def fork(flags, processes=1, env=None, wrapper=()):
    """Like `launch`, but without a launcher: the processes are forked from one that has imported the libraries."""
    statuses, outputs = run_ranks([*wrapper, SCRIPT, *command_line(flags)], size=processes, env=env)
    failures = [status for status in statuses if status != 0]
    return subprocess.CompletedProcess((), failures[0] if failures else 0, stderr="\n".join(outputs))


def scalars(output_dir):
    """What was logged to TensorBoard: {name: {step: value}}."""
    logged = {}
    for file in sorted(Path(output_dir).glob("logs/**/events*")):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            logged.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return logged
