"""Scripts that start runs elsewhere, with stand-ins for the programs of the clusters."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml

SCRIPTS = Path(__file__).parent.parent / "scripts"


def program(folder, name, text):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def run(script, *args, folder, **environment):
    """The exit code and all output, with the programs of `folder` found first."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **environment}
    command = ["bash", SCRIPTS / script, *args]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_shellcheck():
    scripts = sorted(SCRIPTS.glob("*.sh"))
    assert scripts
    subprocess.run(["shellcheck", *scripts], check=True)


@pytest.mark.parametrize(
    ("code", "restarts", "goes_on"),
    ((0, "0", False), (1, "0", False), (70, "0", False), (75, "99", True), (76, "9", True), (76, "10", False)),
)
def test_slurm_goes_on_where_that_helps(tmp_path, code, restarts, goes_on):
    program(tmp_path, "srun", f'echo "srun $*"; exit {code}')
    program(tmp_path, "scontrol", 'echo "scontrol $*"')
    flags = ("--config=configs/pvt.py:small", "--workdir=a folder")
    environment = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts}
    found, output = run("slurm.sh", *flags, folder=tmp_path, **environment)
    assert found == code
    assert "python main.py --distributed --config=configs/pvt.py:small --workdir=a folder" in output
    assert ("scontrol requeue 7" in output) == goes_on


def test_tpu_vm_starts_one_run_and_stops_it(tmp_path):
    """With a worker that is this machine, and a program that writes down its arguments and waits."""
    home = tmp_path / "home"
    program(
        home / "vitpyramid" / ".venv" / "bin",
        "python",
        'printf "<%s>" "$@"; trap "echo saved; exit" TERM; sleep 60 & wait',
    )
    ssh = "compute tpus tpu-vm ssh pod --zone=here --worker=all --command="
    program(tmp_path, "gcloud", f'[[ "$*" == "{ssh}"* ]] && cd {home} && bash -c "${{8#--command=}}"')
    start = ("tpu_vm.sh", "pod", "here", "start", "--workdir=gs://a bucket", "--config.model.name=pvt_small")
    assert run(*start, folder=tmp_path)[0] == 0
    log = home / "vitpyramid" / "run.log"
    expected = "<main.py><--distributed><--workdir=gs://a bucket><--config.model.name=pvt_small>"
    wait_for(lambda: log.read_text() == expected)
    code, output = run(*start, folder=tmp_path)
    assert code == 1 and "a run is going on here" in output
    assert run("tpu_vm.sh", "pod", "here", "stop", folder=tmp_path)[0] == 0
    wait_for(lambda: log.read_text() == expected + "saved\n")
    wait_for(lambda: run(*start, folder=tmp_path)[0] == 0)
    run("tpu_vm.sh", "pod", "here", "stop", folder=tmp_path)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("args", ((), ("pod", "here"), ("pod", "here", "start"), ("pod", "here", "nonsense")))
def test_tpu_vm_says_how_it_is_used(args, tmp_path):
    code, output = run("tpu_vm.sh", *args, folder=tmp_path)
    assert code == 2 and "scripts/tpu_vm.sh NAME ZONE start FLAGS..." in output


def test_the_jobset_has_a_pod_for_each_host_of_a_slice():
    jobset = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    pods = job["template"]["spec"]
    pod = pods["template"]["spec"]
    height, width = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert pods["parallelism"] == pods["completions"] == height * width // chips
    assert pods["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # else a pod starts again by itself
