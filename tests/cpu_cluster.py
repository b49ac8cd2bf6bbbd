"""
CPU processes instead of GPUs, with faults injected where a test asks for them.

`cpu_cluster.py FAULTS train_...py --flags` (see `with_faults`) runs a script as one process of a GPU launch config:
DDP, DeepSpeed and FSDP work over gloo as they do over NCCL. `run_ranks` forks the processes from one that has already
imported the libraries, which saves most of a short run's time.
"""

import atexit
import contextlib
import copy
import faulthandler
import functools
import importlib
import itertools
import multiprocessing
import os
import pickle
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import filelock
import huggingface_hub
import psutil
import pyarrow.parquet as pq
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import DistributedType
from diffusers import AutoencoderKL, StableDiffusionXLPipeline


# Seconds after which a run is considered to hang.
TIMEOUT = 900
# Seconds that a rank waits for the others.
PATIENCE = 30
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "cpu_cluster",
        "bitsandbytes",
        "datasets",
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
        "peft",
        "torch.utils.tensorboard",
    ]
)


# Faults -------------------------------------------------------------------------------------------------------------
class Fault(NamedTuple):
    """At the given calls of a place, counted from 1, `action(call)` runs instead of the original `call()`."""

    place: str
    calls: tuple[int, ...]
    action: Callable


# Functions that the script calls: owner and name.
PLACES = {
    "step": (torch.nn.functional, "mse_loss"),
    "evaluation": (torch.nn.functional, "mse_loss"),
    "generation": (StableDiffusionXLPipeline, "__call__"),
    "checkpoint": (Accelerator, "save_state"),
    "replace": (os, "replace"),
    "rmdir": (os, "rmdir"),
    "log": (Accelerator, "log"),
    "log images": (TensorBoardTracker, "log_images"),
    "tracker end": (TensorBoardTracker, "finish"),
    "source": (pq.ParquetFile, "read_row_group"),
    "held out": (pq.ParquetFile, "read_row_group"),
    "labels": (pq.ParquetFile, "read"),
    "lora": (StableDiffusionXLPipeline, "save_lora_weights"),
    "weights": (Accelerator, "get_state_dict"),
    "clip": (Accelerator, "clip_grad_norm_"),
    "no_sync": (torch.nn.parallel.DistributedDataParallel, "no_sync"),
    "encode": (AutoencoderKL, "encode"),
    "lock": (filelock.FileLock, "acquire"),
    "prepare": (datasets.arrow_writer.ArrowWriter, "finalize"),
    "file": (safetensors.torch, "save_file"),
    "listing": (Path, "glob"),
    "existence": (Path, "exists"),
    "reading": (Path, "read_text"),
    "repository": (huggingface_hub, "create_repo"),
    "upload": (huggingface_hub, "upload_folder"),
}
# Places at which only calls with, or only calls without gradients count.
WITH_GRADIENTS = {"step": True, "evaluation": False, "held out": False}
EVERY_CALL = range(1, 10**6)


def install(fault, patch=setattr):
    owner, name = PLACES[fault.place]
    original = getattr(owner, name)
    count = itertools.count(1)

    @functools.wraps(original)
    def hook(*args, **kwargs):
        call = functools.partial(original, *args, **kwargs)
        with_gradients = torch.is_grad_enabled()
        if WITH_GRADIENTS.get(fault.place, with_gradients) != with_gradients:
            return call()
        if next(count) in fault.calls:
            return fault.action(call)
        return call()

    patch(owner, name, hook)


def signalled(number, call):
    os.kill(os.getpid(), number)
    return call()


def signalled_after(number, call):
    result = call()
    os.kill(os.getpid(), number)
    return result


def killed(call):
    os.kill(os.getpid(), signal.SIGKILL)


def waiting_for_a_signal(file, call):
    """Write `file`, and wait until the run has received a signal."""
    received = []

    def receive(handler, number, frame):
        handler(number, frame)
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, functools.partial(receive, signal.getsignal(number)))
    file.touch()
    while not received:
        time.sleep(0.01)
    return call()


def waiting_for_the_end(file, call):
    """Write `file`, and continue at the next signal that does not end the process."""
    file.touch()
    signal.pause()
    return call()


def not_finite(kind, call):
    errors = call()
    if kind == "gradient":
        errors.register_hook(lambda gradient: gradient * torch.inf)
        return errors
    return errors * torch.nan


def full_disk(size, call):
    """During the call, no file may grow beyond `size` bytes."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard_limit))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard_limit, hard_limit))


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def shrink_disk(folder, room, call):
    """Leave `room` bytes on a separate file system; None makes it read-only."""
    if room is None:
        remount(folder, "ro")
    else:
        remount(folder, f"rw,size={shutil.disk_usage(folder).used + room}")
    return call()


def wandb_killed(call):
    """Kill wandb's service, which is a separate process."""
    for child in psutil.Process().children(recursive=True):
        if "wandb" in " ".join(child.cmdline()):
            child.kill()
    return call()


def workers_killed(call):
    """Kill the worker processes of a data loader, as the system does when memory runs out."""
    for child in multiprocessing.active_children():
        child.kill()
    return call()


def nothing_listed(call):
    """List no checkpoints."""
    _, pattern = call.args
    if pattern.startswith("checkpoint-"):
        return iter(())
    return call()


def no_state_file(call):
    if call.args[0].name == "mapo_state.json":
        raise FileNotFoundError(call.args[0])
    return call()


def raising(error, call):
    raise copy.copy(error)  # the copy references no frames


def noting_process_group(file, call):
    """Append to `file` whether a process group exists."""
    with file.open("a") as lines:
        print(torch.distributed.is_initialized(), file=lines)
    return call()


def created(call):
    """Pretend that a repository was created."""
    return huggingface_hub.RepoUrl("https://huggingface.co/someone/mapo")


def wait_until(condition, seconds):
    """Whether a condition is met within this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def noting_lock(folder, call):
    """Write a file that says that this rank is about to acquire a lock."""
    lock = call.args[0]
    (folder / f"{os.environ['RANK']} {Path(lock.lock_file).name}").touch()
    return call()


def waiting_for_the_ranks(folder, lock, size, call):
    """Wait until all ranks have asked for the lock that this rank owns."""
    assert wait_until(lambda: len(list(folder.glob(f"* *{lock}"))) == size, PATIENCE)
    return call()


def noting_path(folder, call):
    """Append to a file of this rank the path that is written."""
    with (folder / f"paths-{os.environ['RANK']}").open("a") as lines:
        print(call.args[1], file=lines)
    return call()


def waiting_for_a_cache(folder, call):
    """Ask for a file in a cache of latents after another rank has written one."""
    if "mapo_latents" in str(call.args[0]):
        wait_until(lambda: any(folder.glob("mapo_latents/*/*/[!.]*")), 5)
    return call()


def local_part(tensor):
    """This process's shard of a tensor that FSDP or ZeRO-3 has sharded, or the full tensor."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    if hasattr(tensor, "to_local"):
        return tensor.to_local()
    return tensor


def noting_gradients(folder, call):
    """Save this process's part of the accumulated gradients, flattened."""
    accelerator, parameters, *rest = call.args
    parameters = list(parameters)
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None:
            gradients.append(local_part(parameter.grad).flatten())
    torch.save(gradients, folder / f"gradients-{os.environ['RANK']}.pt")
    return call.func(accelerator, parameters, *rest)


def noting_weights(folder, call):
    """Save this process's part of the trained weights, flattened, and on rank 0 the gathered weights."""
    unet = call.args[1] if len(call.args) > 1 else call.args[0]
    shards = {}
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            shards[name.removeprefix("module.")] = local_part(parameter).detach().flatten().cpu().clone()
    torch.save(shards, folder / f"shards-{os.environ['RANK']}.pt")

    gathered = call()
    if os.environ["RANK"] == "0":
        copies = {name: weight.detach().cpu().clone() for name, weight in gathered.items()}
        torch.save(copies, folder / "gathered.pt")
    return gathered


# Environment variables for GPU launch configs.
DEEPSPEED = {
    "ACCELERATE_USE_CPU": "false",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
SHARDED = {
    "zero2": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "fsdp2": {
        "ACCELERATE_USE_CPU": "false",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BasicTransformerBlock,ResnetBlock2D",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    },
}


# Forked processes ---------------------------------------------------------------------------------------------------
def free_port():
    """A port that nobody listens on."""
    while True:
        # Not an ephemeral one, which a connection of another test could take until the launcher binds it.
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("", port))
            return port


def run_script(words):
    """Run the script as from the command line. If it hangs, it prints a traceback before it is killed."""
    faulthandler.dump_traceback_later(TIMEOUT - PATIENCE, exit=True, file=2)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        # DeepSpeed would compile kernels for reductions in shared memory, which takes minutes. gloo works as well.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    sys.argv = list(map(str, words))
    runpy.run_path(sys.argv[0], run_name="__main__")
    faulthandler.cancel_dump_traceback_later()


def work(environment, words, faults, log):
    """The main function of one forked rank."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    for fault in faults:
        install(fault)
    run_script(words)


def run_ranks(words, faults=None, size=2, env=None):
    """Run a script, given with its flags, on `size` ranks. Returns their exit statuses, and what they printed."""
    folder = Path(tempfile.mkdtemp())
    logs = [folder / f"rank-{rank}.log" for rank in range(size)]
    port = free_port()

    # Start the ranks.
    ranks = []
    for rank, log in enumerate(logs):
        environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(env or {})}
        if size > 1:
            environment.update(RANK=str(rank), LOCAL_RANK=str(rank))
        process = FORKS.Process(target=work, args=(environment, words, (faults or {}).get(rank, []), log))
        process.start()
        ranks.append(process)

    # Wait for them, and kill those that hang.
    deadline = time.monotonic() + TIMEOUT
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()

    outputs = [log.read_text() for log in logs]
    shutil.rmtree(folder)
    assert not hung, f"ranks {hung} hung:\n" + "\n".join(outputs)
    return [process.exitcode for process in ranks], outputs


# Launched processes -------------------------------------------------------------------------------------------------
def with_faults(faults):
    """The words that run a script through this file. `faults` are lists of faults by rank."""
    return [__file__, pickle.dumps(faults or {}).hex()]


def gloo_backend(self, *args, **kwargs):
    """The backend and the distributed type, for accelerate."""
    if "LOCAL_RANK" not in os.environ:
        return None, DistributedType.NO
    if "ACCELERATE_USE_DEEPSPEED" in os.environ or "ACCELERATE_USE_FSDP" in os.environ:
        return "gloo", DistributedType.MULTI_GPU
    return "gloo", DistributedType.MULTI_CPU


CLEANS_UP = "The interpreter cleans up."


def main():
    atexit.register(print, CLEANS_UP)  # runs after the exit handlers of the script
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = gloo_backend
    faults = pickle.loads(bytes.fromhex(sys.argv[1]))
    for fault in faults.get(int(os.environ.get("RANK", 0)), []):
        install(fault)
    sys.argv = sys.argv[2:]
    run_script(sys.argv)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    main()
