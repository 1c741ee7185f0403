"""The container files: parsed, short, and of one mind with the launchers and configs that they name."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dist_qft.config.check import accumulation_steps
from dist_qft.config.load import load_config

ROOT = Path(__file__).parents[3]
FILES = sorted([*(ROOT / "docker").glob("*.yaml"), ROOT / "slurm/pyxis.sbatch", ROOT / "slurm/apptainer.sbatch"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 41


def test_kubernetes_starts_every_node_with_its_number():
    service, job = YAML(typ="safe").load_all(ROOT / "docker/kubernetes.yaml")
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    assert spec["completionMode"] == "Indexed"
    assert int(variables["NNODES"]) == spec["completions"] == spec["parallelism"]
    assert int(variables["NPROC_PER_NODE"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert variables["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    user = int(re.search(r"useradd .*--uid (\d+)", (ROOT / "docker/Dockerfile").read_text())[1])
    security = spec["template"]["spec"]["securityContext"]
    assert user == security["runAsUser"] == security["runAsGroup"] == security["fsGroup"]
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


@pytest.mark.parametrize("name", ["docker/kubernetes.yaml", "docker/skypilot.yaml"])
def test_commands_name_what_is_there(name):
    text = (ROOT / name).read_text()
    (launcher, config) = re.search(r"(launch/\S+\.sh) (configs/\S+\.yaml)", text).groups()
    assert (ROOT / launcher).is_file()
    load_config(ROOT / config)
    assert "--resume auto" in text


@pytest.mark.parametrize("name", ["docker/kubernetes.yaml", "docker/skypilot.yaml"])
def test_the_batch_divides_over_two_nodes_of_eight_gpus(name):
    text = (ROOT / name).read_text()
    config = re.search(r"configs/\S+\.yaml", text)[0]
    changes = re.findall(r"(?:train|data|sharding)\.\w+=\S+", text)
    assert accumulation_steps(load_config(ROOT / config, changes), world_size=16) == 1


def test_the_image_copies_what_the_install_reads():
    copied = " ".join(re.findall(r"^COPY (.*)", (ROOT / "docker/Dockerfile").read_text(), flags=re.M))
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        assert name in copied
        assert (ROOT / name).is_file()


@pytest.mark.parametrize("owner", ["", "ubuntu:x:1000:1000:Ubuntu:/home/ubuntu:/bin/bash"])
def test_the_images_user_is_1000_also_where_the_base_has_one(tmp_path, owner):
    """Stubs stand for the tools that change the users; useradd refuses an id that somebody has."""
    (step,) = re.findall(r"^RUN ((?:.*\\\n)*.*useradd.*)", (ROOT / "docker/Dockerfile").read_text(), flags=re.M)
    users = tmp_path / "users"
    users.write_text(f"{owner}\n" if owner else "")
    bodies = {
        "getent": 'grep ":$2:" "$USERS"',
        "userdel": 'sed -i "/^${!#}:/d" "$USERS"',
        "useradd": 'if grep -q ":1000:" "$USERS"; then exit 4; fi; echo "${!#}:x:1000:" >>"$USERS"',
        "chown": 'test "$*" = "-R user /app"',
    }
    for name, body in bodies.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    subprocess.run(["sh", "-c", step], env={"PATH": f"{tmp_path}:/usr/bin:/bin", "USERS": str(users)}, check=True)
    assert users.read_text() == "user:x:1000:\n"


def has_docker() -> bool:
    return bool(shutil.which("docker")) and not subprocess.run(["docker", "info"], capture_output=True).returncode


def test_the_image_builds():
    if not has_docker():
        pytest.skip("no Docker daemon to build the image")
    subprocess.run(["docker", "build", "-f", "docker/Dockerfile", "-t", "dist-qft:test", "."], cwd=ROOT, check=True)
