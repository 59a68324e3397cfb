"""Holds the documents to the program: commands are resolved, parsed or looked up; flags, files, modules and links exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_patch.cli.program import find
from megatron_patch.config.megatron.page import markdown
from megatron_patch.config.parsing import parse
from megatron_patch.config.resolve import resolve
from megatron_patch.config.values import OPTION_TYPES
from megatron_patch.training.pretrain import make_engine_config
from tests.programs import run_program

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OTHERS = {
    "CONFIG=",
    "source",
    "vllm",
    "curl",
    "from",
    "model,",
    "print(",
    "srun",
    "sbatch",
    "salloc",
    "scontrol",
    "pip",
    "apt-get",
    "docker",
    "LDFLAGS=",
    "tensorboard",
    "#",
    "lm_eval",
    "squeue",
    "scancel",
}
"""First words of lines in blocks that are not commands of this project."""


def commands():
    """(document, command) of every block without a language, with continued lines joined and comments cut."""
    found = []
    for path in DOCUMENTS:
        for language, block in re.findall(r"^```([a-z]*)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines() if language in ("", "bash", "sh") else []
            found += [(path.name, re.split(r"\s{2,}#", line)[0].strip()) for line in lines if line.strip()]
    return found


COMMANDS = commands()
TRAINING = [
    (name, line)
    for name, line in COMMANDS
    if "pretrain_gpt_patch.py" in line and not line.startswith("CONFIG=") and not line.endswith("--help")
]
INSTALLED = [
    (name, line, found[1], set(re.findall(r"(?<![\w-])--[a-z][\w-]*", found[2])))
    for name, line in COMMANDS
    if (
        found := re.search(
            r"(?:^megatron-patch |^python -m megatron_patch |^(?:deepspeed|torchrun) .*megatron_patch[ .])([a-z-]+)(.*)", line
        )
    )
    and "pretrain_gpt_patch.py" not in line
]
"""(document, command, subcommand, flags) of the installed command."""
TOOLS = [(name, line) for name, line in COMMANDS if re.match(r"python (tools|examples/replicate)/\w+\.py", line)]


def without(words, flag):
    """The words without a flag and its values."""
    if flag not in words:
        return words
    start = words.index(flag)
    end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
    return words[:start] + words[end:]


@pytest.mark.parametrize(("name", "line"), TRAINING)
def test_training_commands_resolve(name, line):
    words = shlex.split(line.partition("pretrain_gpt_patch.py")[2])
    if "…" in words or "run.yaml" in words:
        # A command that shortens one written above, or uses the reader's own configuration: only its flags are looked up.
        assert {word[2:].replace("-", "_") for word in words if word.startswith("--")} <= {*OPTION_TYPES, "config"}
        return
    for flag in ("--data-path", "--dry-run", "--world-size", "--load", "--config"):
        if flag == "--config":
            words = [str(ROOT / word) if word.endswith(".yaml") else word for word in words]
        elif flag != "--world-size":
            words = without(words, flag)
    ranks = int(words[words.index("--world-size") + 1]) if "--world-size" in words else 8
    run = resolve(parse([*words, "--dry-run"]), ranks)
    make_engine_config(run)


def known_flags(*tool):
    done = run_program(*tool, "--help", cwd=ROOT)
    if "{" in done.stdout:  # sub-commands
        for sub in re.search(r"\{([\w,-]+)\}", done.stdout).group(1).split(","):
            done.stdout += run_program(*tool, sub, "--help", cwd=ROOT).stdout
    return set(re.findall(r"--[\w-]+", done.stdout))


@pytest.mark.parametrize("tool", sorted({line.split()[1] for _, line in TOOLS}))
def test_tools_know_the_flags_that_documents_give_them(tool):
    known = known_flags(tool) | ({"--" + option.replace("_", "-") for option in OPTION_TYPES} if tool == "tools/plan.py" else set())
    for name, line in TOOLS:
        if line.split()[1] == tool:
            given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", line))
            assert given <= known, f"{name}: {line}"


@pytest.mark.parametrize("subcommand", sorted({subcommand for _, _, subcommand, _ in INSTALLED}))
def test_the_installed_command_has_the_subcommands_and_flags_that_documents_give_it(subcommand):
    if subcommand in ("--help", "--version"):
        return
    assert find(subcommand).name == subcommand
    options = {f"--{option.replace('_', '-')}" for option in OPTION_TYPES} | {"--config"} if subcommand in ("pretrain", "plan") else set()
    known = options | (known_flags("-m", "megatron_patch", subcommand) if subcommand != "pretrain" else set())
    for name, line, other, flags in INSTALLED:
        assert other != subcommand or flags <= known, f"{name}: {line}"


@pytest.mark.parametrize("line", sorted({line for _, line in TOOLS if line.startswith("python tools/plan.py") and "FILE" not in line}))
def test_plans_are_made_as_written(line, tmp_path):
    words = shlex.split(line)[1:]
    words = [str(tmp_path / word) if word.endswith(".png") else word for word in words]
    done = run_program(*words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "device" in done.stdout


def test_every_command_is_one_that_is_checked():
    checked = {line for _, line in TRAINING + TOOLS} | {line for _, line, _, _ in INSTALLED}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, line in COMMANDS:
        first = line.split()[0]
        if line in checked or any(first.startswith(other) for other in OTHERS):
            continue
        if first == "make":
            assert line.split()[1] in targets, f"{name}: {line}"
            continue
        script = re.match(r"(?:\.venv/bin/)?python3? ((?:-m )?[\w./]+)", line)
        assert script, f"{name}: {line}"
        target = script.group(1).removeprefix("-m ").replace(".py", "").replace(".", "/")
        assert (ROOT / f"{target}.py").is_file() or (ROOT / target).is_dir(), f"{name}: {line}"


def test_the_list_of_megatrons_flags_is_the_programs():
    """To write it again: python tools/migrate.py --table, between the two marks."""
    text = (ROOT / "docs" / "migrating.md").read_text()
    found = re.search(r"<!-- megatron's flags -->\n(.*?)\n<!-- end of megatron's flags -->", text, re.DOTALL)
    assert found and found.group(1) == markdown()


def anchors(path):
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", path.read_text()):
            document = path.parent / target if target else path
            assert document.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(document), f"{path.name}: {target}#{anchor}"


def test_files_and_modules_that_documents_name_exist():
    for path in DOCUMENTS:
        text = path.read_text()
        for name in re.findall(r"(?<![\w/.-])(?:megatron_patch|tests|csrc|tools|benchmarks|examples)/[\w./-]*\w", text):
            assert (ROOT / name).exists() or list(ROOT.glob(f"{name}*")), f"{path.name}: {name}"
        for name in re.findall(r"python3? -m ((?:tests|megatron_patch)[\w.]*)", text):
            module = ROOT / name.replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), f"{path.name}: {name}"


def test_the_list_of_make_targets_fits_a_terminal():
    texts = re.findall(r"^([a-z]+):[^#\n]*## (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert texts and all(14 + len(text) <= 80 for _, text in texts), texts


def test_prose_is_wrapped():
    """Markdown is at most 100 characters wide outside of tables, code, images and the block that benchmarks/render_gpu.py writes."""
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tests" / "README.md"]:
        prose = re.sub(r"^```.*?^```|<!-- gpu results.*?<!-- end of gpu", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        wide = [line for line in prose.splitlines() if len(line) > 100 and not line.startswith(("|", "!"))]
        assert not wide, f"{path.name}: {wide[:3]}"
