"""A program under `accelerate launch`."""

import os
import subprocess
import sys
from pathlib import Path


def launched(program: str, folder: Path, *arguments: Path, timeout: float = 300, **environment: str) -> str:
    """What two processes of a program say.

    `--cpu` would start one process, or need MPI; this starts two, and the environment keeps them on the CPU.
    """
    (folder / "program.py").write_text(program)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", folder / "program.py"]
    done = subprocess.run(
        [sys.executable, *launch, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
