"""
CPU processes in place of GPUs, with faults installed in them where a test wants some.

`cpu_cluster.py train_...py --flags` runs a script as one process of a GPU launch config: DDP, DeepSpeed and FSDP work
over gloo as they do over NCCL. `run_ranks` forks the processes from one that has imported the libraries already, which
saves most of a short run's time.
"""

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


# Seconds after which a run is taken to hang.
TIMEOUT = 900
# Seconds after which a rank is taken to wait for another one elsewhere.
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
    """In the given calls of a place, counted from 1, `action` is called with the call that it replaces."""

    place: str
    calls: tuple[int, ...]
    action: Callable


# The owner and the name of a function that the script calls there, and whether that is with gradients (or either).
PLACES = {
    "step": (torch.nn.functional, "mse_loss", {True}),
    "evaluation": (torch.nn.functional, "mse_loss", {False}),
    "drawing": (StableDiffusionXLPipeline, "__call__", {True, False}),
    "checkpoint": (Accelerator, "save_state", {True, False}),
    "replace": (os, "replace", {True, False}),
    "rmdir": (os, "rmdir", {True, False}),
    "log": (Accelerator, "log", {True, False}),
    "picture": (TensorBoardTracker, "log_images", {True, False}),
    "end": (TensorBoardTracker, "finish", {True, False}),
    "source": (pq.ParquetFile, "read_row_group", {True, False}),
    "held out": (pq.ParquetFile, "read_row_group", {False}),
    "lora": (StableDiffusionXLPipeline, "save_lora_weights", {True, False}),
    "weights": (Accelerator, "get_state_dict", {True, False}),
    "clip": (Accelerator, "clip_grad_norm_", {True, False}),
    "no_sync": (torch.nn.parallel.DistributedDataParallel, "no_sync", {True, False}),
    "encode": (AutoencoderKL, "encode", {True, False}),
    "lock": (filelock.FileLock, "acquire", {True, False}),
    "prepare": (datasets.arrow_writer.ArrowWriter, "finalize", {True, False}),
    "file": (safetensors.torch, "save_file", {True, False}),
    "listing": (Path, "glob", {True, False}),
    "reading": (Path, "read_text", {True, False}),
    "repository": (huggingface_hub, "create_repo", {True, False}),
    "upload": (huggingface_hub, "upload_folder", {True, False}),
}
EVERY_CALL = range(1, 10**6)


def install(fault, patch=setattr):
    owner, name, gradients = PLACES[fault.place]
    original, count = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def hook(*args, **kwargs):
        call = functools.partial(original, *args, **kwargs)
        if torch.is_grad_enabled() in gradients and next(count) in fault.calls:
            return fault.action(call)
        return call()

    patch(owner, name, hook)


def signalled(number, call):
    os.kill(os.getpid(), number)
    return call()


def signalled_behind(number, call):
    result = call()
    os.kill(os.getpid(), number)
    return result


def killed(call):
    os.kill(os.getpid(), signal.SIGKILL)


def waiting_for_a_signal(file, call):
    """Write `file`, and wait until the run has got a signal."""
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
    """Write `file`, and go on at the next signal that does not end the process."""
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
    """No file may grow beyond `size` bytes."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        return call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def shrink_disk(folder, room, call):
    """Leave `room` bytes on a file system of its own; None makes it read-only."""
    remount(folder, f"rw,size={shutil.disk_usage(folder).used + room}" if room is not None else "ro")
    return call()


def wandb_killed(call):
    """wandb's service is a process of its own."""
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
    """A listing of checkpoints that is empty."""
    return iter(()) if call.args[1].startswith("checkpoint-") else call()


def no_state_file(call):
    if call.args[0].name == "mapo_state.json":
        raise FileNotFoundError(call.args[0])
    return call()


def raising(error, call):
    raise copy.copy(error)  # which holds on to no frames


def noting(file, call):
    with file.open("a") as lines:
        print(torch.distributed.is_initialized(), file=lines)
    return call()


def noting_alone(file, call):
    """As `noting`, in place of the call."""
    noting(file, lambda: None)


def created(call):
    return huggingface_hub.RepoUrl("https://huggingface.co/someone/mapo")


def noting_lock(folder, call):
    """Write that this rank is about to ask for a lock."""
    (folder / f"{os.environ['RANK']} {Path(call.args[0].lock_file).name}").touch()
    return call()


def waiting_for_the_ranks(folder, lock, size, call):
    """Wait until all ranks have asked for the lock that is held here."""
    deadline = time.monotonic() + PATIENCE
    while len(list(folder.glob(f"* *{lock}"))) < size:
        if time.monotonic() > deadline:
            raise TimeoutError("another rank does not wait at the lock")
        time.sleep(0.01)
    return call()


def noting_gradients(folder, call):
    """Write what this process holds of the gradients that a step is made of."""
    accelerator, parameters, *rest = call.args
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
    torch.save([gradient.flatten() for gradient in gradients], folder / f"gradients-{os.environ['RANK']}.pt")
    return call.func(accelerator, parameters, *rest)


def noting_weights(folder, call):
    """Write what this process holds of the trained weights, flat, before they are gathered into a checkpoint."""
    unet = call.args[1] if len(call.args) > 1 else call.args[0]
    held = {}
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            # A shard of FSDP's or of ZeRO-3's, or all of the parameter.
            shard = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            shard = getattr(parameter, "ds_tensor", shard)
            held[name.removeprefix("module.")] = shard.detach().flatten().cpu().clone()
    torch.save(held, folder / f"held-{os.environ['RANK']}.pt")
    gathered = call()
    if os.environ["RANK"] == "0":
        torch.save({name: weight.detach().cpu().clone() for name, weight in gathered.items()}, folder / "gathered.pt")
    return gathered


# Forked processes ---------------------------------------------------------------------------------------------------
def free_port():
    """
    A port that nobody listens on, below those that systems give to connections: a launcher takes it seconds later, and
    a connection of another test must not have it then.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("", port))
            return port


def run_script(words):
    """The script as it runs from the command line; should it hang, it prints where before it is killed."""
    faulthandler.dump_traceback_later(TIMEOUT - PATIENCE, exit=True, file=2)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        # DeepSpeed would first compile kernels that reduce in shared memory, for minutes; gloo does as well.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    sys.argv = list(map(str, words))
    runpy.run_path(sys.argv[0], run_name="__main__")
    faulthandler.cancel_dump_traceback_later()


def work(environment, words, faults, log):
    """One rank: the script as it runs from the command line."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    for fault in faults:
        install(fault)
    run_script(words)


def run_ranks(words, faults=None, size=2, env=None):
    """
    Run a script (`words` is its path and flags) on `size` ranks, to their ends.

    Args:
        faults: a list of faults for each rank that has any.

    Returns:
        The ranks' exit codes, and what they printed.
    """
    folder = Path(tempfile.mkdtemp())
    environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **(env or {})}
    logs, ranks = [folder / f"rank-{rank}.log" for rank in range(size)], []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}
        arguments = {**environment, **place}, words, (faults or {}).get(rank, []), logs[rank]
        ranks.append(FORKS.Process(target=work, args=arguments))
        ranks[-1].start()
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
    """The words that run a script through this file, with a list of faults for each rank that has any."""
    return [__file__, "--faults", pickle.dumps(faults).hex()] if faults else [__file__]


def gloo_backend(self, *args, **kwargs):
    if "LOCAL_RANK" not in os.environ:
        return None, DistributedType.NO
    sharded = {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"} & set(os.environ)
    return "gloo", DistributedType.MULTI_GPU if sharded else DistributedType.MULTI_CPU


def main():
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = gloo_backend
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "--faults":
        for fault in pickle.loads(bytes.fromhex(sys.argv[1])).get(int(os.environ.get("RANK", 0)), []):
            install(fault)
        sys.argv = sys.argv[2:]
    run_script(sys.argv)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    main()
