"""The launch files of Slurm and Kubernetes, as far as they can be run without either."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from training.__main__ import _parser
from training.command_line import parse

ROOT = Path(__file__).parent.parent
MANIFESTS = ["launch/gke_jobset.yaml", "launch/gpu_jobset.yaml"]
JSON_PYTHON = f"""#!/bin/bash
{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@"
exit ${{STATUS:-0}}
"""


@pytest.fixture
def tools(tmp_path):
    """A folder for PATH with a `python` that says its arguments, and Slurm's `scontrol`."""
    scontrol = '#!/bin/bash\n[ "$1" = show ] && printf "n1\\nn2\\nn3\\n" || echo "$@"\n'
    for name, text in {"python": JSON_PYTHON, "scontrol": scontrol}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    others = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    return others | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def job_of(path: str) -> tuple[dict, dict]:
    """A JobSet and the job that it makes copies of."""
    jobset = yaml.safe_load((ROOT / path).read_text())
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return jobset, replicated


def container_of(path: str) -> dict:
    (container,) = job_of(path)[1]["template"]["spec"]["template"]["spec"]["containers"]
    return container


def says(command: list[str], environment: dict[str, str]) -> list[list[str]]:
    """The arguments of each `python` that a command runs."""
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def slurm(tools, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = tools | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]"} | settings
    command = ["bash", "launch/slurm.sbatch", "--config=configs/quickstart.py"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def test_the_batch_script_supervises_train_py_on_the_nodes_of_its_job(tools):
    subprocess.run(["bash", "-n", str(ROOT / "launch/slurm.sbatch")], check=True)
    ran = slurm(tools, SIZES="2,1", SUPERVISE="--timeout-seconds=60 --port=9000")
    (words,) = (json.loads(line) for line in ran.stdout.splitlines())
    assert words[:3] == ["-m", "training", "supervise"]
    cut = words.index("--")
    known = _parser().parse_args(words[2:cut])
    assert (known.hosts, known.sizes, known.launcher) == ("n1,n2,n3", "2,1", "srun")
    assert (known.timeout_seconds, known.port) == (60.0, 9000)
    assert words[cut + 1] == "train.py"
    assert parse(words[cut + 2 :]).config is not None


@pytest.mark.parametrize(("status", "requeue"), [(3, True), (0, False), (2, False), (1, False)])
def test_a_job_that_was_stopped_queues_itself_again_and_one_that_failed_does_not(
    tools, status, requeue
):
    ran = slurm(tools, STATUS=str(status), REQUEUE="1")
    assert ran.returncode == status
    assert ("requeue 7" in ran.stdout) == requeue
    assert "requeue" not in slurm(tools, STATUS="3").stdout


@pytest.mark.parametrize("path", MANIFESTS)
def test_the_manifest_is_a_jobset_of_jobs_that_kubernetes_takes(path):
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    jobset, replicated = job_of(path)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
    job |= {"spec": replicated["template"]["spec"]}
    validate.validate(job, "1.33", strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["imagge"] = "typo"
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.33", strict=True)


@pytest.mark.parametrize("path", MANIFESTS)
def test_a_jobset_is_started_again_as_a_whole_but_not_on_wrong_input(path):
    jobset, replicated = job_of(path)
    known = {"failurePolicy", "replicatedJobs", "network", "successPolicy", "startupPolicy"}
    assert set(jobset["spec"]) <= known
    assert set(replicated) <= {"name", "replicas", "template"}
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    job = replicated["template"]["spec"]
    assert job["backoffLimit"] == 0  # else one pod would come back alone
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert job["completions"] == job["parallelism"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"


def test_the_gpu_pods_start_train_py_as_one_job(tools):
    container, replicated = (
        container_of(MANIFESTS[1]),
        job_of(MANIFESTS[1])[1],
    )
    environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
    hosts = replicated["template"]["spec"]["completions"]
    name = job_of(MANIFESTS[1])[0]["metadata"]["name"]
    for index in range(hosts):
        index_set = environment | {"JOB_COMPLETION_INDEX": str(index)}
        health, train = says([*container["command"], *container["args"]], tools | index_set)
        checked = _parser().parse_args(health[2:])
        command = parse(train[1:])
        assert command.get("process-id") == checked.process_id == index
        assert command.get("num-processes") == checked.num_processes == hosts
        first = f"{name}-{replicated['name']}-0-0.{name}"
        assert command.get("coordinator") == f"{first}:8476"
        assert checked.coordinator == f"{first}:8477"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert command.config.mesh.fsdp == hosts * gpus


def test_the_tpu_pods_start_train_py_on_a_mesh_of_all_their_chips(tools):
    container, replicated = container_of(MANIFESTS[0]), job_of(MANIFESTS[0])[1]
    health, train = says([*container["command"], *container["args"]], tools)
    assert health == ["-m", "training", "health"]
    mesh = parse(train[1:]).config.mesh
    job = replicated["template"]["spec"]
    selector = job["template"]["spec"]["nodeSelector"]
    chips = 1
    for size in selector["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips
    assert (mesh.data, mesh.fsdp) == (replicated["replicas"], chips)


@pytest.mark.parametrize("path", MANIFESTS)
def test_a_failed_check_keeps_the_pod_from_training(path, tools):
    container = container_of(path)
    command = [*container["command"], *container["args"]]
    ran = subprocess.run(command, env=tools | {"STATUS": "2"}, capture_output=True, text=True)
    assert ran.returncode == 1
    assert len(ran.stdout.splitlines()) == 1


@pytest.mark.parametrize("path", MANIFESTS)
def test_the_probe_sees_a_heart_that_beats_one_that_has_stopped_and_one_that_is_late(
    path, tmp_path
):
    command = container_of(path)["livenessProbe"]["exec"]["command"]
    assert command == container_of(path)["startupProbe"]["exec"]["command"]
    file = tmp_path / "0.json"

    def alive() -> bool:
        environment = os.environ | {"SHEAF_HEARTBEATS": str(tmp_path)}
        return subprocess.run(command, env=environment).returncode == 0

    assert not alive()
    file.write_text(json.dumps({"beat": 1, "late": False, "step": 3}))
    assert alive()
    os.utime(file, (time.time() - 300,) * 2)
    assert not alive()
    file.write_text(json.dumps({"beat": 2, "late": True, "step": 3}))
    assert not alive()
