"""The files for Slurm and Kubernetes: the script runs, with a stand-in for Slurm; the job is well-formed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import test_docs
import yaml
from cli_cases import write
from conftest import noise

RECIPES = Path(__file__).parents[1] / "recipes" / "cluster"
SRUN = """#!/bin/bash
echo "$@" >> "$SLURM_LOG"
while [[ $1 == -* ]]; do shift; done
[[ $1 == hostname ]] && echo 127.0.0.1 && exit
exec "$@"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="the script needs bash")
@pytest.mark.slow
def test_the_slurm_script_separates_songs_and_ends_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the cluster needs Ray")
    write(tmp_path / "music" / "a.wav", noise(20_000))
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/bash\necho node1\nseq 100000\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_LOG": str(tmp_path / "log"),
    }
    done = subprocess.run(
        ["bash", RECIPES / "slurm.sh", "music", "-o", "out", "-e", "mini"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, **slurm, "PATH": path, "RAY_PORT": str(port), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "music/a.wav → out/a (bass, drums, other, vocals)" in done.stdout
    started = [line for line in (tmp_path / "log").read_text().splitlines() if "ray start" in line]
    assert ["--nodelist=node1" in line for line in started] == [True, False]
    assert "--nodes=1 --ntasks=1 --exclude=node1" in started[1]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 5)


def test_the_job_for_kubernetes_has_a_command_that_exists_and_sees_the_disk() -> None:
    job = yaml.safe_load((RECIPES / "rayjob.yaml").read_text("utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    command = job["spec"]["entrypoint"].split()
    test_docs.check(command, complete=False)
    assert command[-2:] == ["--cluster", "auto"]
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (mount,) = container["volumeMounts"]
        assert mount["name"] in {volume["name"] for volume in pod["volumes"]}
        assert all(path.startswith(mount["mountPath"]) for path in (command[2], command[4]))
    assert cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"][
        "nvidia.com/gpu"
    ]
