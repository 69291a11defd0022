"""What the README says is there: names, commands, flags, figures, quoted lines; and what it marks as quick runs."""

import argparse
import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from networks import TEACHERS, network_config

import dit_tiny
import sid_fm
import toy_2d

ROOT = Path(sid_fm.__file__).parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"sid_fm.py": sid_fm, "toy_2d.py": toy_2d, "dit_tiny.py": dit_tiny}
FENCED = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))
LINES = [*CODE, *(line for kind, block in FENCED if not kind for line in block.splitlines())]
COMMANDS = [command.strip() for line in LINES for command in line.split("  #")[0].split(" && ")]
COMMANDS = [command for command in COMMANDS if re.match(r"(python|pytest|torchrun|pip) ", command)]


def names_of(module) -> set[str]:
    """Everything that a module defines, at any depth, and the arguments of its functions."""
    nodes = [*ast.walk(ast.parse(Path(module.__file__).read_text()))]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return defined | {name for name in vars(module) if not name.startswith("__")}


NAMES = {name: names_of(module) for name, module in SCRIPTS.items()}


def test_every_name_exists():
    """sid_fm.x anywhere, x.y() of a class, and every word in backticks that looks like a function or class of ours."""
    for name in set(re.findall(r"\bsid_fm\.(\w+)", TEXT)) - {"py"}:
        assert name in NAMES["sid_fm.py"], name
    everything = set.union(*NAMES.values())
    for word in CODE:
        if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+|[A-Z]\w*[a-z]\w*|[A-Z]{3,}", word) and word not in {
            "HF_HOME",
            "HF_TOKEN",
        }:
            assert (
                word in everything or word.startswith(("HF_", "from_pretrained", "load_lora")) or word == "file_name"
            ), word
    for owner, attribute in re.findall(r"`([A-Z]\w+)\.(\w+)`", TEXT):
        net = getattr(sid_fm, owner)
        source = ast.get_source_segment(Path(sid_fm.__file__).read_text(), node_of(owner))
        assert hasattr(net, attribute) or f"self.{attribute}" in source, (owner, attribute)


def node_of(name: str) -> ast.AST:
    tree = ast.parse(Path(sid_fm.__file__).read_text())
    return next(node for node in tree.body if getattr(node, "name", None) == name)


def parse(script: str, words: list[str], monkeypatch) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", [script, *words])
    return SCRIPTS[script].parse()


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_is_understood(command, monkeypatch):
    program, *words = shlex.split(command.replace(" ...", ""))
    if program == "pip":
        assert (ROOT / words[-1]).is_file()
        return
    if program == "torchrun":
        assert re.fullmatch(r"--nproc_per_node=\d+", words.pop(0))
    if program == "pytest":
        files = [word for word in words if word.endswith(".py")]
        assert all((ROOT / file).is_file() for file in files)
        return
    script, *words = words
    assert (ROOT / script).is_file()
    if script in SCRIPTS:
        parse(script, words, monkeypatch)


@pytest.mark.parametrize("command", [c for c in sorted(set(COMMANDS)) if c.startswith("pytest") and " -k " in c])
def test_tests_that_are_named_are_there(command):
    *files, _, names = shlex.split(command)[1:]
    text = "".join((ROOT / file).read_text() for file in files)
    for name in names.split(" or "):
        assert re.search(rf"^def test_\w*{name}", text, re.MULTILINE), name


def test_every_flag_exists(monkeypatch, capsys):
    flags = set()
    for script in SCRIPTS:
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:
            parse(script, ["--help"], monkeypatch)
        flags |= set(re.findall(r"--[a-z][\w-]*", out.getvalue()))
    command = [sys.executable, ROOT / "tests" / "bench.py", "--help"]
    bench = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    flags |= set(re.findall(r"--[a-z][\w-]*", bench.split("options:")[1]))
    flags |= set(re.findall(r'addoption\("(--\w+)"', (ROOT / "tests" / "conftest.py").read_text()))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) - {"--nproc_per_node"}
    assert mentioned and mentioned <= flags, mentioned - flags


def test_figures_are_there_and_all_are_shown():
    shown = set(re.findall(r"!\[[^\]]+\]\((\.github/figures/[^)]+)\)", TEXT))
    there = {str(path.relative_to(ROOT)) for path in (ROOT / ".github" / "figures").iterdir()}
    assert shown == there
    assert sum((ROOT / path).stat().st_size for path in there) < 1.2e6
    captions = re.findall(r"!\[[^\]]+\]\([^)]+\)\n\n\*\(`(python [^`]+)`[^)]*\)\*\n", TEXT)  # the command under each
    assert len(captions) == len(there)
    assert set(captions) <= set(COMMANDS)


def test_links_within_the_page_lead_somewhere():
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_the_lines_of_distill_are_its_lines():
    source = ast.get_source_segment(Path(sid_fm.__file__).read_text(), node_of("distill"))
    rows = re.findall(r"^\| [A-J] \| .* \| `(.+)` \|$", TEXT, re.MULTILINE)
    assert len(rows) == 10
    assert not [row for row in rows if row not in source]


def test_the_loop_in_the_readme_runs(capsys):
    (block,) = [block for kind, block in FENCED if kind == "python" and "sid_fm.distill" in block]
    net = toy_2d.Net()
    block = block.replace("teacher = ...", "teacher = net").replace("iters=1000", "iters=2")
    exec("import copy, itertools, torch, sid_fm\n" + block, {"net": net})  # noqa: S102 (the README is ours)
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_sampling_in_the_readme_runs(pipeline, monkeypatch, tmp_path):
    """On a small SANA in the place of the real one, on the CPU."""
    (block,) = [block for kind, block in FENCED if kind == "python" and "load_teacher" in block]
    block = block.replace('"sana-0.6b", device="cuda", dtype=torch.bfloat16', repr(str(pipeline("sana"))))
    block = block.replace('device="cuda"', 'device="cpu"').replace("512", "64")
    block = block.replace('"runs/sana-0.6b/student"', repr(str(pipeline("sana") / "transformer")))
    here: dict = {}
    with torch.no_grad():
        exec("import torch, sid_fm\n" + block, here)  # noqa: S102 (the README is ours)
    assert here["images"].shape == (1, 3, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [line for line in COMMANDS if "--check" in line or line.endswith("toy_2d.py --quick")]
)
def test_what_is_quick_runs(command, tmp_path):
    _, script, *words = shlex.split(command)
    run = subprocess.run([sys.executable, ROOT / script, *words], cwd=tmp_path, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 360 and len(TEXT.encode()) <= 30 * 1024


def test_the_memory_of_training_is_what_a_run_announces():
    """The table of teachers: weights in billions, and GB in full and with --lora 16, by default."""
    rows = re.findall(r"^\| (`[\w.-]+`(?:, `[\w.-]+`)*) \| ([\d.]+) B \| (\d+) \| (\d+) \|", TEXT, re.MULTILINE)
    said = {name: map(float, numbers) for names, *numbers in rows for name in re.findall(r"[\w.-]+", names)}
    assert said.keys() == TEACHERS.keys() == sid_fm.NAMES.keys()
    for name, (weights, *memory) in said.items():
        pipeline, changes = TEACHERS[name]
        with torch.device("meta"):
            net = sid_fm.build_network(sid_fm.PIPELINES[pipeline][1], network_config(pipeline, changes))
        teacher = SimpleNamespace(dit=net, dtype=torch.bfloat16)
        assert abs(sum(w.numel() for w in net.parameters()) / 1e9 - weights) < 0.01
        for rank, gigabytes in zip((None, 16), memory, strict=True):
            assert abs(sum(sid_fm.training_memory(teacher, rank, 4).values()) / 1e9 - gigabytes) < 0.51, (name, rank)
