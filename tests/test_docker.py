"""The Dockerfiles, as far as no container engine is needed: what they copy builds, and what they install is what the project pins."""

from __future__ import annotations

import re
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.test_build import ROOT, hook, pins

FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
KNOWN = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
PROJECT = (ROOT / "pyproject.toml").read_text()


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, with continued lines joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], re.sub(r"\s+", " ", line.split(maxsplit=1)[1])) for line in text.splitlines() if line.strip()]


def commands(path: Path) -> list[str]:
    """The shell commands of a Dockerfile."""
    return [command.strip() for name, words in instructions(path) if name == "RUN" for command in words.split("&&")]


def copied(path: Path) -> list[str]:
    """What is copied from the context."""
    return [word for name, words in instructions(path) if name == "COPY" and "--from" not in words for word in words.split()[:-1]]


@pytest.fixture(params=FILES, ids=lambda path: path.suffix[1:])
def dockerfile(request) -> Path:
    return request.param


def test_there_is_one_for_gpus_and_one_for_cpus():
    assert [path.name for path in FILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]


def test_every_instruction_is_known_and_the_image_runs_the_command_as_an_ordinary_user(dockerfile):
    found = instructions(dockerfile)
    assert {name for name, _ in found} <= KNOWN
    last = {name: words for name, words in found if name in ("USER", "ENTRYPOINT", "CMD", "WORKDIR")}
    assert last["ENTRYPOINT"] == '["megatron-patch"]' and last["CMD"] == '["--help"]' and 'megatron-patch = "' in PROJECT
    assert f"useradd --create-home --uid 2000 {last['USER']}" in commands(dockerfile)


def test_bases_have_a_version_of_python_and_of_cuda_that_the_project_allows(dockerfile):
    arguments = dict(words.split("=", 1) for name, words in instructions(dockerfile) if name == "ARG")
    bases = [
        re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], words.split()[0])
        for name, words in instructions(dockerfile)
        if name == "FROM"
    ]
    assert len(bases) == 2 and all(":" in base and not base.endswith(":latest") for base in bases)
    distribution = {"24.04": "3.12", "22.04": "3.10"}
    python = arguments.get("PYTHON") or distribution[arguments["UBUNTU"]]
    assert SpecifierSet(re.search(r'requires-python = "(.*?)"', PROJECT)[1]).contains(python)
    if "CUDA" in arguments:
        assert arguments["CUDA"].partition(".")[0] == pins(python)["nvidia-cuda-cuobjdump"].partition(".")[0]
        assert (
            arguments["MEGATRON_PATCH_CUDA_ARCHS"].strip('"')
            == re.search(r'^ARCHITECTURES = "(.*)"', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
        )


def test_pip_installs_torch_first_and_everything_under_the_constraints(dockerfile):
    pip = [command for command in commands(dockerfile) if "pip install" in command]
    assert all(re.search(r"pip install -c constraints\.txt ", command) for command in pip)
    assert [command.split()[-1] for command in pip[:3]] == ["wheel", "torch", "deepspeed"]
    packages = [word for command in pip for word in shlex.split(command.partition("pip install")[2]) if re.fullmatch(r"[a-z]+", word)]
    assert {"torch", "deepspeed"} <= set(packages) <= set(pins("3.12"))
    assert not re.search(r"[\w\]]==\d", dockerfile.read_text()), "versions are in constraints.txt alone"
    extras = re.search(r"\.\[([\w,]+)\]", pip[-1])[1].split(",")
    assert "train" in extras and all(re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE) for extra in extras)


def test_nothing_is_left_of_what_only_the_build_needs(dockerfile):
    for name, words in instructions(dockerfile):
        if name == "RUN" and "apt-get" in words:
            assert "--no-install-recommends" in words and "rm -rf /var/lib/apt/lists/*" in words
    assert any(name == "ENV" and "PIP_NO_CACHE_DIR=1" in words for name, words in instructions(dockerfile))
    assert any(words == "--from=build /opt/megatron_patch /opt/megatron_patch" for _, words in instructions(dockerfile))


def test_what_is_copied_reaches_the_engine(dockerfile):
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*" and all((ROOT / name).exists() for name in copied(dockerfile))
    assert [f"!{name.rstrip('/')}" for name in copied(dockerfile)] == [line for line in ignored if line.startswith("!")]


def test_what_is_copied_builds_a_complete_wheel(tmp_path):
    assert copied(FILES[0]) == copied(FILES[1])
    for name in copied(FILES[0]):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, tmp_path)
    with zipfile.ZipFile(hook(tmp_path, "build_wheel", CXX="no-such-compiler", MEGATRON_PATCH_CUDA="0")) as archive:
        names = set(archive.namelist())
    assert {"megatron_patch/share/constraints.txt", "megatron_patch/reporting/report.js", "megatron_patch/cli/program.py"} <= names
