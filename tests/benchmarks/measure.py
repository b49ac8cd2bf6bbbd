"""Run a command and print what it took: `python tests/benchmarks/measure.py accelerate launch ...`."""

import resource
import subprocess
import sys
import time


if __name__ == "__main__":
    start = time.perf_counter()
    code = subprocess.run(sys.argv[1:]).returncode
    seconds = time.perf_counter() - start
    # The largest process of the tree, imports included.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"exit code {code}, wall time {seconds:.1f} s, peak memory {peak:.2f} GiB")
    sys.exit(code)
