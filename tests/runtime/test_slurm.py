"""The job scripts, with stand-ins for Slurm: who gets SIGTERM before the time limit, and what happens then."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "slurm"
ARGUMENTS = {"score": ["MODEL", "DATA", "OUT"], "eval": ["MODEL", "OUT"], "run": ["EXPERIMENT"]}

SRUN = """#!/bin/bash
# Runs the command as a step of one task. At the time limit Slurm signals the steps, never the batch script.
while [[ "$1" == --* ]]; do shift; done
echo "cpus: $SRUN_CPUS_PER_TASK" >> "$LOG"
export SLURM_STEP_NUM_TASKS=1
"$@" &
if [ "$TIME_LIMIT" = reached ]; then
    until [ -e "$LOG.ready" ]; do sleep 0.02; done
    kill -TERM $!
fi
wait $!
"""
PYTHON = """#!/bin/bash
# Saves and ends when it is asked to stop, as sparc3 does.
trap 'exit 143' TERM
echo "python $*" >> "$LOG"
touch "$LOG.ready"
for _ in 1 2 3 4 5; do sleep 0.1; done
exit "${CODE:-0}"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$LOG"
"""


@pytest.fixture
def job(tmp_path):
    """Runs a script as ``sbatch`` does; gives its exit code and the log of the stand-ins."""
    for name, text in {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def submit(script: str, **variables: str) -> tuple[int, str]:
        allocation = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_CPUS_PER_TASK": "8", "LOG": f"{tmp_path}/log"}
        env = os.environ | allocation | {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
        words = ["bash", str(SCRIPTS / f"{script}.sbatch"), *ARGUMENTS[script], "--last", "word"]
        code = subprocess.run(words, env=env, timeout=30).returncode
        return code, (tmp_path / "log").read_text()

    return submit


@pytest.mark.parametrize("script", sorted(ARGUMENTS))
def test_the_time_limit_requeues_the_job(job, script):
    code, log = job(script, TIME_LIMIT="reached")
    assert code == 143
    assert log.endswith("scontrol requeue 7\n")
    assert "cpus: 8\n" in log
    assert f"python -m sparc3_pl.cli {script} " in log
    assert "--last word\n" in log


@pytest.mark.parametrize("script", sorted(ARGUMENTS))
@pytest.mark.parametrize("code", [0, 2])
def test_an_end_of_its_own_does_not(job, script, code):
    ended, log = job(script, CODE=str(code))
    assert ended == code
    assert "scontrol" not in log
