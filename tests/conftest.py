"""Makes `pytest` find sid_fm.py and toy_2d.py, which stand beside this folder, builds each tiny
pipeline once, and has what short runs on them need."""

import os
import re
import shutil
import sys
from pathlib import Path

# Here and in the processes that tests start: on tensors this small, threads that wait for each
# other cost more than they give, ten times more where the machine has other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]


def pytest_configure(config):
    config.addinivalue_line("markers", 'slow: runs in CI with the rest; `pytest -m "not slow"` leaves it out')


def pytest_addoption(parser):
    group = parser.getgroup("tests/test_real.py: a teacher's real files against diffusers")
    group.addoption("--teacher", metavar="NAME", help="a name of sid_fm.NAMES, or the folder of a pipeline")
    group.addoption("--oracle", metavar="FOLDER", help="what diffusers reads; default: the teacher's files")
    group.addoption("--student", metavar="HUB_ID", help="a student too, by its repository or folder")
    parts = ["files", "text", "velocity", "vae", "sampler"]
    group.addoption("--part", choices=parts, help="this part alone; default: all")
    group.addoption("--device", choices=["cpu", "cuda"], help="default: cpu, or cuda if memory is not enough")
    group.addoption("--out", metavar="FILE.png", help="the picture; default: runs/real-NAME.png")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """pipeline(family) -> the folder of that family's tiny pipeline (tests/pipelines.py). To be
    read, not changed."""
    from pipelines import build

    root, built = tmp_path_factory.mktemp("pipelines"), {}

    def folder(family: str, **options) -> Path:
        key = family + "".join(options)
        if key not in built:
            built[key] = build(family, root / key, **options)
        return built[key]

    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """The folder of a tiny CLIP (tests/pipelines.py). To be read, not changed."""
    from pipelines import clip_model

    return clip_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def copied(pipeline, tmp_path):
    """copied(family) -> a copy of its tiny pipeline, to be changed."""
    return lambda family="sana", **options: Path(shutil.copytree(pipeline(family, **options), tmp_path / family))


@pytest.fixture
def settings(tmp_path):
    """settings(teacher, *arguments) -> the arguments of a run of three iterations on three prompts,
    in the folder "out", unless others are given. leave_out: flags of these that are not given."""
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo ships\na small robot\n")
    (tmp_path / "instruction.txt").write_text("A photograph of ")

    def settings(teacher, *arguments, leave_out=()):
        fixed = "--iters 3 --batch 2 --accumulate 1 --resolution 32 --steps 2 --tokens 16 --lr 1e-3 --device cpu"
        files = {"--teacher": teacher, "--instruction": tmp_path / "instruction.txt", "--out": tmp_path / "out"}
        if not {"--sample", "--data", "--prompts", "--resume"} & {*arguments}:
            files["--prompts"] = tmp_path / "prompts.txt"
        files = [x for flag, file in files.items() if flag not in leave_out for x in (flag, file)]
        return [*fixed.split(), *map(str, (*files, *arguments))]

    return settings


@pytest.fixture
def run(settings, monkeypatch):
    """The same, run in this process without its figures."""
    import sid_fm

    monkeypatch.setattr(sid_fm, "plot_images", lambda *args: None)
    monkeypatch.setattr(sid_fm, "plot_log", lambda *args: None)
    return lambda *arguments, **options: sid_fm.main(settings(*arguments, **options))


@pytest.fixture
def ended(run, capsys):
    """ended(teacher, *arguments, status=2) -> the line in which a run says why it ends: the last
    one on standard error, after one that says what it began with at most. status: None for any
    but 0."""

    def ended(*arguments, status=2, **options):
        with pytest.raises(SystemExit) as stop:
            run(*arguments, **options)
        err = capsys.readouterr().err
        lines = [line for line in re.split("[\r\n]+", err) if line.strip() and not re.search(r"%\|.*\]$", line)]
        line, program = lines[-1], f"{Path(sys.argv[0]).name}: "
        assert "Traceback" not in err and line.startswith(program), err
        assert sum(line.startswith(program) for line in lines) == 1 and len(lines) <= 2, err
        assert stop.value.code == status or (status is None and stop.value.code), line
        return line.removeprefix(program)

    return ended


@pytest.fixture
def asked(monkeypatch):
    """The prompts that are encoded."""
    import sid_fm

    asked, encode = [], sid_fm.Teacher.encode_prompts
    monkeypatch.setattr(sid_fm.Teacher, "encode_prompts", lambda *args: asked.extend(args[1]) or encode(*args))
    return asked
