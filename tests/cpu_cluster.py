"""
Run a script as one process of a GPU launch config, on CPU over gloo: `cpu_cluster.py train_...py --flags`.

What DDP, DeepSpeed and FSDP do on GPUs over NCCL they do here on CPU processes; only the backend is another.
"""

import os
import runpy
import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType


os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"


def gloo_backend(self, *args, **kwargs):
    if "LOCAL_RANK" not in os.environ:
        return None, DistributedType.NO
    sharded = {"ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"} & set(os.environ)
    return "gloo", DistributedType.MULTI_GPU if sharded else DistributedType.MULTI_CPU


def main():
    PartialState._prepare_backend = gloo_backend
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
