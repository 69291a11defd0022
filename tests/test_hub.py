"""Teachers and students by name: the real huggingface_hub client against a small Hub that runs
here.

The client reads its settings (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE) when it is imported, so each
session is a process.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sid_fm import NAMES, NETWORK, PIPELINE, files_to_read

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEACHER = NAMES["sd3-medium"][0]
NOT_READ = (  # what else such repositories hold
    "README.md",
    "fox.png",
    "sd3_medium.safetensors",
    "text_encoders/clip_g.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.onnx",
    "text_encoder/model.fp16.safetensors",
    "text_encoder_3/model.safetensors.index.fp16.json",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.bin",
    "vae_encoder/model.onnx",
    "safety_checker/model.safetensors",
)


LISTINGS = {  # (what is read, what else is there, only the network?)
    "a pipeline": (
        "model_index.json scheduler/scheduler_config.json text_encoder/config.json text_encoder/model.safetensors",
        """README.md fox.png config.json sd3_medium.safetensors safety_checker/model.safetensors
        text_encoder/pytorch_model.bin text_encoder/flax_model.msgpack text_encoder/model.onnx
        text_encoder/model.fp16.safetensors vae_encoder/model.safetensors vae/diffusion_pytorch_model.bin""",
        False,
    ),
    "vocabularies": (
        """model_index.json tokenizer/merges.txt tokenizer/vocab.json tokenizer_2/spiece.model
        tokenizer_3/tokenizer.json""",
        "tokenizer/custom.py tokenizer_2/vocab.bin",
        False,
    ),
    "shards, and those of a variant": (
        """model_index.json text_encoder_3/model.safetensors.index.json
        text_encoder_3/model-00001-of-00002.safetensors text_encoder_3/model-00002-of-00002.safetensors""",
        """text_encoder_3/model.safetensors.index.fp16.json
        text_encoder_3/model.fp16-00001-of-00002.safetensors text_encoder_3/model.fp16-00002-of-00002.safetensors""",
        False,
    ),
    "a part in a variant alone": (
        """model_index.json vae/diffusion_pytorch_model.fp16.safetensors
        transformer/diffusion_pytorch_model.safetensors""",
        "vae/diffusion_pytorch_model.fp16.bin transformer/diffusion_pytorch_model.fp16.safetensors",
        False,
    ),
    "a network": (
        "config.json diffusion_pytorch_model.safetensors",
        "README.md optimizer.pt diffusion_pytorch_model.bin diffusion_pytorch_model.fp16.safetensors",
        True,
    ),
    "a network in shards": (
        """config.json diffusion_pytorch_model.safetensors.index.json
        diffusion_pytorch_model-00001-of-00001.safetensors""",
        "training_args.bin diffusion_pytorch_model-00001-of-00001.bin",
        True,
    ),
    "a pipeline's network": (
        "transformer/config.json transformer/diffusion_pytorch_model.safetensors",
        """README.md vae/config.json vae/diffusion_pytorch_model.safetensors text_encoder/model.safetensors
        transformer/diffusion_pytorch_model.bin transformer/diffusion_pytorch_model.fp16.safetensors""",
        True,
    ),
}


@pytest.mark.parametrize("listing", LISTINGS)
def test_of_a_repository_each_tensor_is_read_once_and_no_pickle(listing):
    needed, others, network_only = LISTINGS[listing]
    assert sorted(files_to_read((others + " " + needed).split(), NETWORK if network_only else PIPELINE)) == sorted(
        needed.split()
    )


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories. asked: (method, path, Authorization) of each request."""

    def __init__(self, repositories: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url, self.repositories, self.asked = f"http://127.0.0.1:{self.server_port}", repositories, []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def downloads(self) -> Counter:
        "repository/file -> how many times its content was asked for."
        files = (path[1:].replace(f"/resolve/{COMMIT}", "") for how, path, _ in self.asked if how == "GET")
        return Counter(file for file in files if not file.startswith("api/"))


class Answer(BaseHTTPRequestHandler):
    """The Hub's answers. An owner called "gated", "broken" or "secret" has repositories with that
    trouble."""

    protocol_version = "HTTP/1.1"
    ASKED = re.compile(r"(/api/models)?/(?P<id>[^/]+/[^/]+)(/(?P<what>revision|tree|resolve)/[^/]+/?(?P<file>.*))?")

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, token = urllib.parse.unquote(self.path.partition("?")[0]), self.headers["Authorization"]
        self.server.asked.append((self.command, path, token))
        match = self.ASKED.fullmatch(path)
        repository, what = (match["id"], match["what"]) if match else ("", None)
        folder, owner = self.server.repositories.get(repository), repository.partition("/")[0]
        if token == "Bearer expired":
            return self.say(401, {}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if owner == "secret" and token is None:  # to strangers, there or not
            return self.say(401, {"error": "Invalid username or password."})
        if folder is None:
            return self.say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if what == "resolve" and owner == "gated":
            return self.say(403 if token else 401, {}, {"X-Error-Code": "GatedRepo"})
        if what == "resolve" and owner == "broken" and match["file"].startswith("vae"):
            return self.say(410, {"error": "gone"})
        if what == "resolve":
            return self.say(200, files[match["file"]].read_bytes(), {"ETag": f'"{digest(files[match["file"]])}"'})
        if what == "tree":
            entries = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": digest(f)} for n, f in files.items()
            ]
            return self.say(200, entries)
        siblings = [{"rfilename": n, "size": f.stat().st_size, "blobId": digest(f)} for n, f in files.items()]
        about = {"id": repository, "modelId": repository, "sha": COMMIT, "private": False, "tags": []}
        return self.say(200, {**about, "siblings": siblings})

    def say(self, status: int, content: bytes | list | dict, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(pipeline, tmp_path_factory):
    """One tiny SD3 as sd3-medium, as someone's distilled pipeline, and in trouble; and its network
    alone."""
    root = tmp_path_factory.mktemp("hub")
    whole = shutil.copytree(pipeline("sd3-medium"), root / "whole")
    alone = shutil.copytree(whole / "transformer", root / "alone")
    for file in (*(whole / name for name in NOT_READ), alone / "diffusion_pytorch_model.bin"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"not to be read")
    names = (TEACHER, "someone/pipeline", "gated/teacher", "broken/teacher")
    server = Hub({**dict.fromkeys(names, whole), "someone/network": alone})
    yield server
    server.shutdown()
    server.server_close()


PRELUDE = """
import contextlib, io, json, os, shutil
import sid_fm

def attempt(teacher):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            sid_fm.main(["--teacher", teacher, "--sample", "a fox", "--device", "cpu", "--out", "pictures/fox.png"])
        except SystemExit as stop:
            return stop.code, err.getvalue()

def same(net, other):
    theirs = other.state_dict()
    return all((value == theirs[key]).all().item() for key, value in net.state_dict().items())
"""


def session(folder: Path, code: str, **environment: str):
    """Runs code in a process of its own that can see no other cache. What it calls `answer` comes
    back."""
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()
    }
    clean |= {"HOME": str(folder), "HF_HOME": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}{code}\nprint(json.dumps(answer))"],
        env=clean | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


STUDENTS = {"someone/network": "", "someone/pipeline": "transformer/"}


@pytest.fixture(scope="module")
def first(hub, pipeline, tmp_path_factory):
    """The first session: a teacher by name, again, and students. Returns its folder, its answer and
    its downloads."""
    folder, plain = tmp_path_factory.mktemp("first"), str(pipeline("sd3-medium"))
    code = f"""
teacher, again, local = (sid_fm.load_teacher(name) for name in ("sd3-medium", "sd3-medium", {plain!r}))
answer = {{"folder": str(teacher.folder), "equal": same(teacher.dit, local.dit) and same(again.vae, local.vae)}}
answer |= {{name: same(sid_fm.load_student(name, local), local.dit) for name in {list(STUDENTS)}}}
"""
    hub.asked.clear()
    answer = session(folder, code, HF_ENDPOINT=hub.url, HF_TOKEN="sesame")
    assert {token for _, path, token in hub.asked if TEACHER in path} == {"Bearer sesame"}
    return folder, answer, hub.downloads()


def test_a_name_downloads_the_files_it_needs_and_each_once(pipeline, first):
    _, answer, downloads = first
    plain, snapshot = pipeline("sd3-medium"), Path(answer["folder"])
    needed = {file.relative_to(plain).as_posix() for file in plain.rglob("*") if file.is_file()}
    assert answer["equal"]
    assert {file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()} == needed
    theirs = {file: times for file, times in downloads.items() if file.startswith(TEACHER)}
    assert theirs.keys() <= {f"{TEACHER}/{name}" for name in needed} and set(theirs.values()) == {1}
    assert sum(file.endswith(".safetensors") for file in theirs) == 5


def test_the_cache_is_where_hf_home_says(first):
    folder, answer, _ = first
    assert Path(answer["folder"]).is_relative_to(folder / "cache" / "hub")
    assert not (folder / ".cache" / "huggingface").exists()


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "the Hub is gone"])
def test_without_a_network_the_cache_serves_as_far_as_it_is_filled(hub, first, way, tmp_path):
    folder = shutil.copytree(first[0], tmp_path / "folder", symlinks=True)
    gone = Hub({})
    gone.shutdown(), gone.server_close()
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"} if way == "HF_HUB_OFFLINE" else {"HF_ENDPOINT": gone.url}
    code = """
teacher = sid_fm.load_teacher("sd3-medium")
nothing = attempt("gated/teacher")
shutil.rmtree(teacher.folder / "vae")
answer = [str(teacher.folder.relative_to(os.getcwd())), nothing, attempt("sd3-medium")]
"""
    hub.asked.clear()
    snapshot, *errors = session(folder, code, **settings)
    assert first[0] / snapshot == Path(first[1]["folder"]) and not hub.asked
    for (status, line), said in zip(
        errors, ("gated/teacher can't be had .*check .* the network", "vae/config.json is missing")
    ):
        assert status == 2 and line.count("\n") == 1 and re.search(said, line)


@pytest.mark.parametrize("repository", STUDENTS)
def test_of_a_student_on_the_hub_its_network_alone_is_downloaded(first, repository):
    _, answer, downloads = first
    theirs = {file: times for file, times in downloads.items() if file.startswith(repository)}
    theirs.pop(f"{repository}/model_index.json", None)
    names = (STUDENTS[repository] + name for name in ("config.json", "diffusion_pytorch_model.safetensors"))
    assert answer[repository] and theirs == {f"{repository}/{name}": 1 for name in names}


TROUBLE = {  # repository, token, what the line says
    "missing": ("nobody/nothing", None, "404.*check the name"),
    "private": ("secret/teacher", None, "401.*log in .*HF_TOKEN"),
    "gated, a stranger": ("gated/teacher", None, "401.*licence .*log in"),
    "gated, not yet accepted": ("gated/teacher", "sesame", "403.*licence .*log in"),
    "token expired": ("someone/pipeline", "expired", "401.*log in .*HF_TOKEN"),
    "broken off": ("broken/teacher", None, "check .*the network"),
    "disk full": ("someone/pipeline", None, "File too large.*HF_HOME chooses another disk"),
}


@pytest.fixture(scope="module")
def troubles(hub, tmp_path_factory):
    """All troubles in one session, in TROUBLE's order. A limit of the size of files stands for a
    full disk."""
    folder = tmp_path_factory.mktemp("troubles")
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
answer = {{}}
for what, (repository, token, _) in {TROUBLE!r}.items():
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {{"HF_TOKEN": token}} if token else {{}}
    if what == "disk full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    answer[what] = attempt(repository)
"""
    return session(folder, code, HF_ENDPOINT=hub.url), folder


@pytest.mark.parametrize("what", TROUBLE)
def test_trouble_is_one_line_that_says_what_to_do(troubles, what):
    ((status, err), folder), (repository, _, message) = (troubles[0][what], troubles[1]), TROUBLE[what]
    lines = [line for line in re.split("[\r\n]+", err) if line and not re.match("(Fetching|Download)", line)]
    assert status == 2 and len(lines) == 1, lines
    assert re.search(f"{repository} can't be had from the Hub .*{message}", lines[0])
    assert not list(folder.glob("pictures/*"))
