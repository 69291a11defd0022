"""Chapter 10 of sid_fm.py: whole runs from pipeline folders, pictures, and what happens when something is wrong."""

import functools
import gc
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import FAMILIES
from safetensors.torch import load_file, save_file

import sid_fm

SCRIPT = Path(sid_fm.__file__)
WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPTS = ["A red fox in the snow", "two ships on a stormy sea", "a small robot", "a bowl of ripe fruit", "a village"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small inputs: a prompt list, an instruction, and two folders of images with captions, one with metadata.jsonl."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    (folder / "instruction.txt").write_text("A photograph of ")
    for kind in ("captions", "metadata"):
        (folder / kind).mkdir()
        draw_images(folder / kind)
    rows = [{"file_name": f"{i}.png", "text": PROMPTS[i]} for i in range(5)]
    (folder / "metadata" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(5):
        (folder / "captions" / f"{i}.txt").write_text(PROMPTS[i] + "\n")
    return folder


def draw_images(folder: Path) -> None:
    """Coloured noise of several shapes and modes."""
    rng = np.random.default_rng(0)
    for i, (size, mode) in enumerate(
        [((40, 30), "RGB"), ((30, 70), "RGBA"), ((20, 20), "L"), ((64, 64), "P"), ((9, 99), "RGB")]
    ):
        pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i}.png")


@pytest.fixture
def run(files):
    """run(teacher, *arguments): the command line in this process, short prompts by default."""

    def run(teacher, *arguments):
        arguments = list(map(str, arguments))
        defaults = [
            "--tokens",
            "16",
            "--accumulate",
            "1",
            "--instruction",
            str(files / "instruction.txt"),
            "--device",
            "cpu",
        ]
        if not {"--sample", "--data", "--prompts"} & set(arguments):
            defaults += ["--prompts", str(files / "prompts.txt")]
        sid_fm.main(["--teacher", str(teacher), *defaults, *arguments])

    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves out the pictures, which take longer than a short run. Returns what would have been drawn: names, titles."""
    drawn = []
    monkeypatch.setattr(sid_fm, "draw_samples", lambda file, rows, prompts, title: drawn.append((file.name, title)))
    monkeypatch.setattr(sid_fm, "draw_losses", lambda file, log: drawn.append((file.name, len(log))))
    return drawn


@pytest.fixture
def untrained(undrawn, monkeypatch):
    """Leaves out the training besides. Returns what the loop would have been given: networks, ..., and keywords."""
    given = []
    monkeypatch.setattr(sid_fm, "distill", lambda *args, **kwargs: given.append((*args, kwargs)) or iter(()))
    monkeypatch.setattr(sid_fm.Teacher, "sample", lambda self, z, *args, **kwargs: z)
    return given


SHORT = ("--iters", 3, "--batch", 2, "--resolution", 32)


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def changed(folder: Path, other: Path) -> list[str]:
    """The names of the tensors in which two networks' folders differ."""
    ours, theirs = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    assert ours.keys() == theirs.keys()
    return [key for key in ours if not torch.equal(ours[key], theirs[key])]


def assert_whole(out: Path, teacher: Path, data: bool) -> None:
    """A finished run of 30 iterations at batch 4: its log, its pictures, and a student that diffusers opens."""
    log = read_log(out)
    assert [row["iteration"] for row in log] == list(range(30)) and log[-1]["images"] == 120
    assert all(math.isfinite(x) for row in log for x in row.values())
    assert all(row.keys() >= {"fisher", "fake_loss", "loss", "k"} for row in log)
    assert all(("discriminator" in row and "adversarial" in row) == data for row in log)
    assert {row["k"] for row in log} == {1, 2, 3, 4}
    pictures = [*out.glob("samples-*.png"), out / "loss.png"]
    assert (out / "samples-000030.png") in pictures
    for file in pictures:
        with Image.open(file) as image:
            assert np.asarray(image.convert("L")).std() > 5 and min(image.size) > 100
    kind = json.loads((teacher / "transformer" / "config.json").read_text())["_class_name"]
    student = getattr(diffusers, kind).from_pretrained(out / "student").state_dict()
    assert all(torch.isfinite(p).all() for p in student.values())
    assert len(changed(out / "student", teacher / "transformer")) > 0.8 * len(student)
    assert not [*out.rglob("*.part"), *out.glob("student.*")]


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(pipeline, files, tmp_path_factory):
    """finished(family, data) -> the folder of a run of 30 iterations at batch 4."""

    @functools.cache
    def finished(family: str, data: str) -> Path:
        out = tmp_path_factory.mktemp("runs") / family
        arguments = ["--data", files / data] if data else ["--prompts", files / "prompts.txt"]
        arguments += ["--tokens", 16, "--instruction", files / "instruction.txt", "--device", "cpu"]
        arguments += ["--iters", 30, "--batch", 4, "--accumulate", 1, "--out", out]
        sid_fm.main(["--teacher", str(pipeline(family)), *map(str, arguments)])
        return out

    return finished


@pytest.fixture(scope="module")
def student(finished):
    """A trained SD3's folder."""
    return finished("sd3-medium", "") / "student"


DATA = dict.fromkeys(FAMILIES, "captions") | {"flux-dev": "metadata"}


@pytest.mark.parametrize("family, data", [("sd3-medium", ""), ("sana", "captions")])
def test_a_family_is_distilled_end_to_end(pipeline, finished, family, data):
    assert_whole(finished(family, data), pipeline(family), data=bool(data))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_distilled_with_data(pipeline, finished, family):
    assert_whole(finished(family, DATA[family]), pipeline(family), data=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_distilled_without_anything_else(pipeline, files, tmp_path, family):
    """Composed prompts at their full length, at the teacher's resolution."""
    arguments = ["--instruction", str(files / "instruction.txt"), "--device", "cpu", "--out", str(tmp_path / "run")]
    sid_fm.main(["--teacher", str(pipeline(family)), "--iters", "30", "--batch", "4", "--accumulate", "1", *arguments])
    assert_whole(tmp_path / "run", pipeline(family), data=False)


def test_a_student_trains_on(pipeline, student, run, untrained, tmp_path):
    """--student is where training starts; the fake network starts at the teacher."""
    run(pipeline("sd3-medium"), "--student", student, *SHORT, "--out", tmp_path / "run")
    old, new = load_file(pipeline("sd3-medium") / "transformer" / WEIGHTS), load_file(student / WEIGHTS)
    nets = untrained[0][:3]  # teacher, student, fake
    for net, expected in zip(nets, (old, new, old)):
        assert all(torch.equal(value, expected[key]) for key, value in net.state_dict().items())
    assert len({next(net.parameters()).data_ptr() for net in nets}) == 3


def test_three_networks_are_all_that_a_run_keeps(pipeline, student, run, untrained, monkeypatch, tmp_path):
    """Where training starts from a student too."""

    def networks():
        gc.collect()
        return sum(type(x) is sid_fm.MMDiT for x in gc.get_objects())

    before, alive = networks(), []
    monkeypatch.setattr(sid_fm, "distill", lambda *_, **__: alive.append(networks() - before) or iter(()))
    run(pipeline("sd3-medium"), "--student", student, *SHORT, "--out", tmp_path / "run")
    assert alive == [3]


def test_flux_is_guided_by_its_embedding(pipeline, run, untrained, tmp_path):
    """3.5 in teacher and fake network, 1 in the student, and no classifier-free guidance unless asked for."""
    student = pipeline("flux-dev") / "transformer"
    run(pipeline("flux-dev"), *SHORT, "--out", tmp_path / "a")
    run(pipeline("flux-dev"), *SHORT, "--out", tmp_path / "b", "--student", student, "--guidance", 2)
    embedded = [[net.guidance for net in given[:3]] for given in untrained]
    assert embedded == [[3.5, 1.0, 3.5]] * 2 and [given[-1]["guidance"] for given in untrained] == [1.0, 2.0]


def test_others_are_guided_classifier_free(pipeline, run, untrained, tmp_path):
    run(pipeline("sana"), *SHORT, "--out", tmp_path / "run")
    settings = untrained[0][-1]
    assert settings["guidance"] == 4.5
    bare = sid_fm.load_teacher(pipeline("sana")).encode_prompts([""], 16)
    assert all(torch.equal(settings["uncond"][key], value) for key, value in bare.items())


def test_the_settings_reach_the_loop(pipeline, run, untrained, tmp_path):
    settings = {"steps": 2, "alpha": 0.5, "guidance": 3.0, "weight": "1/t", "noise": "ddim", "loss": "dmd"}
    flags = [x for name, value in settings.items() for x in (f"--{name}", value)]
    run(pipeline("sana"), *SHORT, *flags, "--lr", 2e-4, "--out", tmp_path / "run")
    *_, optimizers, _, shape, given = untrained[0]
    assert settings.items() <= given.items() and given["iters"] == 3 and shape == (2, 32, 1, 1)
    for optimizer, net in zip(optimizers, untrained[0][1:3]):
        (group,) = optimizer.param_groups
        assert group["lr"] == 2e-4 and group["betas"] == (0, 0.999)
        assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]
    assert settings.items() <= json.loads((tmp_path / "run" / "args.json").read_text()).items()


@pytest.mark.parametrize("kind", ["captions", "metadata"])
def test_real_images_are_those_of_their_captions(pipeline, files, run, untrained, tmp_path, kind):
    """Each row of a data-aided batch: the latent of an image, with the condition of that image's caption."""
    run(pipeline("sd3-medium"), *SHORT, "--data", files / kind, "--out", tmp_path / "run")
    teacher, batches = sid_fm.load_teacher(pipeline("sd3-medium")), untrained[0][4]
    texts = teacher.encode_prompts(PROMPTS, 16)["text"]
    latents = [teacher.encode(sid_fm.read_image(files / kind / f"{i}.png", 32)[None])[0] for i in range(5)]
    seen = set()
    for _ in range(10):
        cond, real = next(batches)
        for text, x_0 in zip(cond["text"], real):
            i = min(range(5), key=lambda i: (texts[i] - text).abs().max().item())
            assert torch.allclose(texts[i], text, atol=1e-5) and torch.allclose(latents[i], x_0, atol=1e-4)
            seen.add(i)
    assert seen == set(range(5))


def test_images_are_cropped_in_the_middle(tmp_path):
    image = Image.new("RGB", (90, 30), (255, 0, 0))
    image.paste((0, 0, 255), (30, 0, 60, 30))
    image.save(tmp_path / "wide.png")
    pixels = sid_fm.read_image(tmp_path / "wide.png", 16)
    assert pixels.shape == (3, 16, 16) and torch.equal(
        pixels[:, 3:13, 3:13], torch.tensor([-1.0, -1, 1])[:, None, None].expand(3, 10, 10)
    )


# ----------------------------------------------------------------------------------------------------------------------
# The seed, and the caches
# ----------------------------------------------------------------------------------------------------------------------


def test_the_seed_fixes_the_numbers(pipeline, run, undrawn, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        arguments = ("--iters", 3, "--batch", 1, "--resolution", 32, "--steps", 2)
        run(pipeline("sana"), *arguments, "--seed", seed, "--out", tmp_path / name)
    a, b, c = ((tmp_path / name / "log.jsonl").read_text() for name in "abc")
    assert a == b != c
    assert not changed(tmp_path / "a" / "student", tmp_path / "b" / "student")
    assert changed(tmp_path / "a" / "student", tmp_path / "c" / "student")


def times(out: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in (out / "cache").rglob("*.safetensors")}


def test_prompts_and_images_are_encoded_once(pipeline, files, run, untrained, monkeypatch, tmp_path):
    arguments = (pipeline("sana"), *SHORT, "--data", files / "captions", "--out", tmp_path)
    run(*arguments)
    first = times(tmp_path)
    assert {file.parent.name.split("-")[0] for file in first} == {"prompts", "images"}
    with monkeypatch.context() as patch:
        patch.delattr(sid_fm.Teacher, "encode_prompts"), patch.delattr(sid_fm.Teacher, "encode")
        run(*arguments)
    assert times(tmp_path) == first
    batches = [next(given[4]) for given in untrained]
    assert torch.equal(batches[0][1], batches[1][1]) and torch.equal(batches[0][0]["text"], batches[1][0]["text"])


@pytest.mark.parametrize("change", ["prompts", "tokens", "instruction", "dtype", "teacher"])
def test_what_conditions_depend_on_is_in_the_caches_key(pipeline, run, untrained, tmp_path, change):
    run(pipeline("sana"), *SHORT, "--out", tmp_path)
    first = times(tmp_path)
    (tmp_path / "other.txt").write_text("\n".join([*PROMPTS[:-1], "a city"]))
    teacher = shutil.copytree(pipeline("sana"), tmp_path / "teacher") if change == "teacher" else pipeline("sana")
    other = {"prompts": tmp_path / "other.txt", "tokens": 17, "instruction": tmp_path / "other.txt", "dtype": "bf16"}
    run(teacher, *SHORT, "--out", tmp_path, *([f"--{change}", other[change]] if change in other else []))
    then = times(tmp_path)
    assert then.items() >= first.items()
    assert len(then) - len(first) == (1 if change == "prompts" else len(first))


@pytest.mark.parametrize("change", ["resolution", "image"])
def test_what_latents_depend_on_is_in_the_caches_key(pipeline, files, run, untrained, tmp_path, change):
    folder = shutil.copytree(files / "captions", tmp_path / "data")
    run(pipeline("sana"), *SHORT, "--data", folder, "--out", tmp_path)
    first = times(tmp_path)
    if change == "image":
        shutil.copyfile(folder / "1.png", folder / "0.png")
        os.utime(folder / "0.png", (1, 1))
    run(pipeline("sana"), *SHORT, "--data", folder, "--out", tmp_path, *["--resolution", 64] * (change == "resolution"))
    then = times(tmp_path)
    assert then.items() >= first.items() and len(then) - len(first) == (1 if change == "image" else 5)


def test_a_killed_encoding_goes_on_where_it_was(pipeline, run, untrained, monkeypatch, tmp_path):
    monkeypatch.setattr(sid_fm, "BATCH", 2)
    encode, asked = sid_fm.Teacher.encode_prompts, []

    def dies(self, prompts, *args):
        asked.extend(prompts)
        if len(asked) > 2:
            raise KeyboardInterrupt
        return encode(self, prompts, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sid_fm.Teacher, "encode_prompts", dies)
        run(pipeline("sana"), *SHORT, "--out", tmp_path / "killed")
    survived = times(tmp_path / "killed")
    assert asked == ["", *PROMPTS[:3]] and len(survived) == 2
    asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(sid_fm.Teacher, "encode_prompts", lambda *args: asked.extend(args[1]) or encode(*args))
        run(pipeline("sana"), *SHORT, "--out", tmp_path / "killed")
    assert asked == PROMPTS[1:] and times(tmp_path / "killed").items() >= survived.items()
    run(pipeline("sana"), *SHORT, "--out", tmp_path / "whole")
    killed, whole = (sorted(times(tmp_path / name)) for name in ("killed", "whole"))
    assert [file.name for file in killed] == [file.name for file in whole]
    assert len(whole) == 1 + len(PROMPTS)
    assert [file.read_bytes() for file in killed] == [file.read_bytes() for file in whole]


def test_the_cache_holds_what_the_encoders_say(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(sid_fm, "BATCH", 3)
    teacher = sid_fm.load_teacher(pipeline("flux-dev"))
    cache = sid_fm.Cache(tmp_path, PROMPTS, lambda some: teacher.encode_prompts(some, 16), ["key"])
    picks = [PROMPTS[i] for i in (4, 0, 0, 3)]
    expected = teacher.encode_prompts(picks, 16)
    for name, rows in cache[picks].items():
        assert torch.allclose(rows, expected[name], atol=1e-6)


def test_the_text_encoders_are_gone_before_the_first_step(pipeline, run, untrained, monkeypatch, tmp_path):
    made, alive, init = [], [], sid_fm.TextEncoders.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        parameters = [p for encoder in self.encoders.values() for p in encoder.parameters()]
        made.extend(map(weakref.ref, [self, *self.encoders.values(), *parameters]))

    monkeypatch.setattr(sid_fm.TextEncoders, "__init__", remember)
    monkeypatch.setattr(sid_fm, "distill", lambda *_, **__: alive.extend(ref() for ref in made) or iter(()))
    run(pipeline("sd3-medium"), *SHORT, "--out", tmp_path / "run")
    assert len(alive) > 20 and not any(x is not None for x in alive)


# ----------------------------------------------------------------------------------------------------------------------
# Composed prompts
# ----------------------------------------------------------------------------------------------------------------------


def test_composed_prompts_are_varied_sentences():
    prompts = sid_fm.compose(500, seed=3)
    assert prompts == sid_fm.compose(500, seed=3) and prompts != sid_fm.compose(500, seed=4)
    assert sid_fm.compose(20, seed=3) == prompts[:20]
    assert len(prompts) == 500 and len(set(prompts)) > 450
    assert not [prompt for prompt in prompts if re.search(r"[{}|_]", prompt) or prompt != prompt.strip()]
    assert not [prompt for prompt in prompts if "  " in prompt or not 3 <= len(prompt.split()) <= 40]
    kinds = ('"', "two ", " made of ", "watercolour", " next to ", " at night ", "under water")  # each a demand
    assert all(sum(kind in prompt for prompt in prompts) > 5 for kind in kinds)


def test_without_a_prompt_file_prompts_are_composed_from_the_seed(pipeline, files, untrained, monkeypatch, tmp_path):
    asked, encode = [], sid_fm.Teacher.encode_prompts
    monkeypatch.setattr(sid_fm.Teacher, "encode_prompts", lambda *args: asked.extend(args[1]) or encode(*args))
    arguments = ["--instruction", files / "instruction.txt", "--device", "cpu", "--tokens", 16, *SHORT, "--seed", 7]
    sid_fm.main(["--teacher", str(pipeline("sana")), *map(str, arguments), "--out", str(tmp_path / "run")])
    assert asked == ["", *sid_fm.compose(3 * 2 * 4, 7)]  # iterations, images of a batch, batches of an iteration


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_several_prompts_make_a_grid_and_each_image(pipeline, student, run, capsys, tmp_path, who):
    flags = ["--student", student] if who == "student" else []
    prompts = [x for prompt in PROMPTS[:3] for x in ("--sample", prompt)]
    run(pipeline("sd3-medium"), *prompts, *flags, "--resolution", 48, "--steps", 3, "--out", tmp_path / "fox.png")
    names = ["fox-1.png", "fox-2.png", "fox-3.png", "fox.png"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    images = [pixels(tmp_path / name) for name in names]
    assert all(image.shape == (48, 48, 3) and image.std() > 1 for image in images[:3])
    assert images[3].shape[1] > 3 * 48 and not np.array_equal(images[0], images[1])
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == names


def test_one_prompt_makes_one_image_that_the_seed_fixes(pipeline, student, run, tmp_path):
    shared = (pipeline("sd3-medium"), "--sample", PROMPTS[0], "--steps", 2, "--resolution", 32)
    flags = ("--student", student)
    for name, *arguments in [("a",), ("b",), ("seed", "--seed", 1), ("student", *flags), ("again", *flags)]:
        run(*shared, *arguments, "--out", tmp_path / f"{name}.png")
    a, b, seed, ours, again = (pixels(tmp_path / f"{n}.png") for n in ("a", "b", "seed", "student", "again"))
    assert len(list(tmp_path.iterdir())) == 5 and a.shape == (32, 32, 3)
    assert np.array_equal(a, b) and np.array_equal(ours, again)
    assert not np.array_equal(a, seed) and not np.array_equal(a, ours)


@pytest.mark.parametrize("family, size", [("flux-dev", 64), ("sana-sprint", 128)])
def test_teacher_and_student_sample_in_their_own_ways(pipeline, run, monkeypatch, tmp_path, family, size):
    """The same weights twice: the teacher by its sampler and its number of steps, the student by four steps of G."""
    seen, generate, sample = [], sid_fm.generate, sid_fm.Teacher.sample

    def as_student(net, z, cond, steps, *args, **kwargs):
        seen.append((net, steps))
        return generate(net, z, cond, steps, *args, **kwargs)

    def as_teacher(self, z, cond, uncond, steps, guidance, *args):
        seen.append((self.dit, guidance))
        return sample(self, z, cond, uncond, steps, guidance, *args)

    monkeypatch.setattr(sid_fm, "generate", as_student)
    monkeypatch.setattr(sid_fm.Teacher, "sample", as_teacher)
    for name, flags in {"teacher": [], "student": ["--student", pipeline(family) / "transformer"]}.items():
        run(pipeline(family), "--sample", PROMPTS[0], *flags, "--out", tmp_path / f"{name}.png")
    (teacher, guidance), (student, steps) = seen
    images = [pixels(tmp_path / f"{name}.png") for name in ("teacher", "student")]
    assert steps == 4 and all(image.shape == (size, size, 3) for image in images) and not np.array_equal(*images)
    if family == "flux-dev":
        assert (teacher.guidance, guidance, student.guidance) == (3.5, 1.0, 1.0)
    else:
        assert guidance == 4.5


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_to_sample_one_network_is_loaded_when_the_text_encoders_have_left(
    pipeline, student, run, monkeypatch, tmp_path, who
):
    """So that a student can be sampled where it could be trained."""
    filled, forgotten, fill, forget = [], [], sid_fm.fill_part, sid_fm.Teacher.forget_text
    monkeypatch.setattr(sid_fm, "fill_part", lambda net, *rest: filled.append(type(net)) or fill(net, *rest))
    monkeypatch.setattr(sid_fm.Teacher, "forget_text", lambda self: forgotten.append(len(filled)) or forget(self))
    of = ["--student", student] if who == "student" else []
    arguments = ("--sample", "a fox", "--steps", 1, "--resolution", 32, "--out", tmp_path / "fox.png")
    run(pipeline("sd3-medium"), *of, *arguments)
    assert filled == [sid_fm.AutoencoderKL, sid_fm.MMDiT] and forgotten == [1] and (tmp_path / "fox.png").exists()


def test_a_prompt_with_dollars_is_no_formula(tmp_path):
    prompts = ["a price tag, was $20, 50% off, now $10", '"$5 & up", "$10 & up"']
    sid_fm.draw_samples(tmp_path / "grid.png", {"student": [np.zeros((8, 8, 3), np.uint8)] * 2}, prompts)
    assert pixels(tmp_path / "grid.png").ndim == 3


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo ships\n", encoding="utf-8-sig")
    assert sid_fm.read_inputs(SimpleNamespace(prompts=tmp_path / "prompts.txt", data=None))[0] == [
        "a red fox",
        "two ships",
    ]


def test_the_last_line_samples_from_what_was_made(pipeline, run, undrawn, capsys, monkeypatch, tmp_path):
    run(pipeline("sana"), *SHORT, "--steps", 2, "--out", tmp_path / "run")
    python, script, *command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert (python, script) == ("python", "sid_fm.py")
    monkeypatch.chdir(tmp_path)
    sid_fm.main(command)
    assert pixels(tmp_path / "sample.png").shape == (32, 32, 3)
    assert sid_fm.parse(command).steps == 2 and sid_fm.parse(command).instruction


# ----------------------------------------------------------------------------------------------------------------------
# Random weights
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_flux(monkeypatch):
    """A name whose true size is small, and no way to the Hub."""
    network = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    network |= {"axes_dims_rope": [4, 6, 6], "guidance_embeds": True}
    family = sid_fm.PIPELINES["FluxPipeline"]
    latent = family.latent | {"block_out_channels": [8, 16, 24, 24], "norm_num_groups": 4}
    monkeypatch.setitem(sid_fm.PIPELINES, "FluxPipeline", family._replace(latent=latent))
    monkeypatch.setitem(sid_fm.NAMES, "small-flux", sid_fm.Published("no/where", "FluxPipeline", 3, network))
    monkeypatch.setattr(sid_fm, "fetch", lambda *args: pytest.fail("asked the Hub"))
    return "small-flux"


def test_random_weights_train_and_say_so(small_flux, run, undrawn, tmp_path):
    run(small_flux, "--random-weights", "--iters", 2, "--batch", 1, "--resolution", 32, "--out", tmp_path / "run")
    assert len(read_log(tmp_path / "run")) == 2
    assert [("random weights" in title) for name, title in undrawn if name.startswith("samples")] == [True]


def test_random_weights_are_the_same_in_every_run(small_flux):
    """So that --seed fixes everything, and a student meets the autoencoder that it was shown with."""
    a, b = (sid_fm.load_teacher(small_flux, random_weights=True) for _ in range(2))
    for net, other in ((a.dit, b.dit), (a.vae, b.vae)):
        theirs = other.state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in net.state_dict().items())
        assert all(torch.isfinite(value).all() for value in theirs.values())
    assert torch.equal(a.encode_prompts(["a fox"])["text"], b.encode_prompts(["a fox"])["text"])
    assert not torch.equal(a.encode_prompts(["a fox"])["text"], a.encode_prompts(["a cat"])["text"])


def test_pictures_of_random_weights_say_so(small_flux, run, monkeypatch, tmp_path):
    drawn, to_pixels = [], sid_fm.to_pixels
    monkeypatch.setattr(sid_fm, "to_pixels", lambda images: drawn.append(to_pixels(images)) or drawn[-1])
    run(small_flux, "--random-weights", "--sample", "a fox", "--resolution", 128, "--out", tmp_path / "fox.png")
    difference = (pixels(tmp_path / "fox.png") != drawn[0][0]).any(-1)
    assert difference[:20].sum() > 100 and not difference[40:].any()


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(run, capsys, tmp_path):
    """refused(teacher, *arguments) -> the one line on stderr. Asserts the status, and that nothing is half-written."""

    def refused(teacher, *arguments, status=2, out=tmp_path / "out"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            run(teacher, *arguments, *([] if "--out" in arguments else ["--out", out]))
        err = capsys.readouterr().err
        lines = [line for line in re.split("[\r\n]+", err) if line and not re.match(r"\S.*: +\d+%\|.*\]$", line)]
        assert stop.value.code == status and len(lines) == 1, err
        assert err.endswith(f"{lines[0]}\n") and "Traceback" not in err
        if status == 2:
            new = [p.name for p in tmp_path.rglob("*") if p not in before]
            assert not {"student", "log.jsonl", "args.json", "loss.png"} & set(new), new
            assert not [name for name in new if name.endswith((".part", ".new", ".old", ".png"))], new
        return lines[0]

    return refused


@pytest.fixture
def broken(pipeline, tmp_path):
    """broken(family) -> a copy of its folder, to be damaged."""
    return lambda family="sana": shutil.copytree(pipeline(family), tmp_path / "broken")


def test_an_unknown_name(refused):
    line = refused("sd4-medium")
    assert "sd4-medium" in line and all(name in line for name in sid_fm.NAMES)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def retensor(file: Path, change) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


NETWORK, VAE, TEXT = f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"
PROJ, NORM = "proj_out.weight", "layers.0.self_attn.q_proj.weight"
DAMAGES = {
    "no model_index.json": (lambda f: (f / "model_index.json").unlink(), "model_index.json is missing"),
    "an index that is no JSON": (lambda f: cut(f / "model_index.json"), "model_index.json .*JSON"),
    "an index that is no object": (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json .*JSON"),
    "another pipeline": (
        lambda f: edit(f / "model_index.json", lambda x: x.update(_class_name="PixArtSigmaPipeline")),
        "PixArtSigmaPipeline.*StableDiffusion3Pipeline",
    ),
    "no transformer": (lambda f: shutil.rmtree(f / "transformer"), "transformer"),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
    "no vocabulary": (lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler"),
    "no config": (lambda f: (f / "transformer/config.json").unlink(), "transformer/config.json is missing"),
    "no text encoder's config": (lambda f: (f / "text_encoder/config.json").unlink(), "text_encoder/config.json"),
    "no weights": (lambda f: (f / NETWORK).unlink(), f"transformer holds no {WEIGHTS}"),
    "no text encoder's weights": (lambda f: (f / TEXT).unlink(), "text_encoder"),
    "pickles alone": (lambda f: (f / VAE).rename(f / "vae/diffusion_pytorch_model.bin"), "safetensors only"),
    "a truncated network": (lambda f: cut(f / NETWORK), f"{NETWORK} is truncated"),
    "an empty network": (lambda f: (f / NETWORK).write_bytes(b""), f"{NETWORK} is truncated"),
    "a truncated autoencoder": (lambda f: cut(f / VAE), f"{VAE} is truncated"),
    "a truncated text encoder": (lambda f: cut(f / TEXT), "text_encoder"),
    "a wrong shape": (
        lambda f: retensor(f / NETWORK, lambda w: w.update({PROJ: w[PROJ][:-1].clone()})),
        r"transformer: proj_out.weight has shape \[31, 48\].*\[32, 48\]",
    ),
    "a text encoder's wrong shape": (
        lambda f: retensor(f / TEXT, lambda w: w.update({NORM: w[NORM][:-1].clone()})),
        "text_encoder",
    ),
    "a missing key": (lambda f: retensor(f / NETWORK, lambda w: w.pop(PROJ)), "missing proj_out.weight"),
    "an unexpected key": (lambda f: retensor(f / NETWORK, lambda w: w.update(x=w[PROJ].clone())), "unexpected x"),
    "a renamed key": (
        lambda f: retensor(f / NETWORK, lambda w: w.update(x=w.pop(PROJ))),
        "missing proj_out.weight.*unexpected x",
    ),
    "a text encoder's missing key": (lambda f: retensor(f / TEXT, lambda w: w.pop(NORM)), "text_encoder.*missing"),
    "a config of another size": (
        lambda f: edit(f / "transformer/config.json", lambda x: x.update(num_layers=4)),
        "missing transformer_blocks.3",
    ),
    "a config that asks for more": (
        lambda f: edit(f / "transformer/config.json", lambda x: x.update(patch_size=2)),
        "patch_embed.proj.weight|patch_size",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pipeline(broken, refused, damage):
    harm, says = DAMAGES[damage]
    folder = broken()
    harm(folder)
    line = refused(folder, *SHORT)
    assert re.search(says, line), line


def test_a_missing_shard(broken, refused):
    folder = broken() / "transformer"
    weights = load_file(folder / WEIGHTS)
    shard = WEIGHTS.replace(".s", "-00001-of-00002.s")
    save_file({key: value for key, value in weights.items() if key != PROJ}, folder / shard)
    shards = dict.fromkeys(weights, shard) | {PROJ: WEIGHTS.replace(".s", "-00002-of-00002.s")}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / WEIGHTS).unlink()
    assert shards[PROJ] in refused(folder.parent, *SHORT)


BAD_PROMPTS = {
    "empty": b"",
    "blank": b"\n  \n",
    "latin-1": "ein Füchslein".encode("latin-1"),
    "utf-16": "fox".encode("utf-16"),
}


@pytest.mark.parametrize(
    "flag, kind",
    [("--prompts", kind) for kind in (*BAD_PROMPTS, "missing", "a folder")]
    + [("--instruction", kind) for kind in ("latin-1", "missing", "a folder")],
)
def test_a_bad_text_file(pipeline, refused, tmp_path, flag, kind):
    file = tmp_path / "prompts.txt"
    if kind == "a folder":
        file.mkdir()
    elif kind != "missing":
        file.write_bytes(BAD_PROMPTS[kind])
    line = refused(pipeline("sana"), *SHORT, flag, file)
    assert str(file) in line and ("UTF-8" in line) == (kind in ("latin-1", "utf-16"))


BAD_DATA = {
    "missing": (lambda f: shutil.rmtree(f), "is not a folder"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_bytes(b"x")), "is not a folder"),
    "no images": (lambda f: [file.unlink() for file in f.glob("*.png")], "holds no images"),
    "no captions": (lambda f: [file.unlink() for file in f.glob("*.txt")], "0.png has no caption"),
    "one caption missing": (lambda f: (f / "3.txt").unlink(), "3.png has no caption"),
    "a caption not in UTF-8": (lambda f: (f / "3.txt").write_bytes(b"\xff"), "3.txt is not UTF-8"),
    "a truncated image": (lambda f: cut(f / "3.png"), "3.png can't be read"),
    "no image at all": (lambda f: (f / "3.png").write_text("fox"), "3.png can't be read"),
    "metadata not JSON": (lambda f: (f / "metadata.jsonl").write_text("fox"), "metadata.jsonl, line 1"),
    "metadata without text": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png"}'),
        "metadata.jsonl, line 2",
    ),
    "metadata of nothing": (
        lambda f: (f / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "a"}'),
        "9.png.*is missing",
    ),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data(pipeline, files, refused, tmp_path, kind):
    harm, says = BAD_DATA[kind]
    folder = shutil.copytree(files / "captions", tmp_path / "data")
    harm(folder)
    line = refused(pipeline("sana"), *SHORT, "--data", folder)
    assert re.search(says, line), line


@pytest.mark.parametrize(
    "family, arguments, says",
    [
        ("sana", "--resolution 48", "multiples of 32"),
        ("sana", "--resolution 16", "multiples of 32"),
        ("sd3-medium", "--resolution 40", "multiples of 16"),
        ("sd3-medium", "--resolution 208", "up to 192"),
        ("sana", "--steps 0", "--steps"),
        ("sana", "--steps 1.5", "--steps"),
        ("sana", "--batch 0", "--batch"),
        ("sana", "--iters -1", "--iters"),
        ("sana", "--tokens 0", "--tokens"),
        ("sana", "--save-every 0", "--save-every"),
        ("sana", "--seed -1", "--seed"),
        ("sana", "--lr 0", "--lr"),
        ("sana", "--lr -1", "--lr"),
        ("sana", "--lr nan", "--lr"),
        ("sana", "--guidance inf", "--guidance"),
        ("sana", "--weight heavy", "--weight"),
        ("sana", "--noise loud", "--noise"),
        ("sana", "--dtype fp8", "--dtype"),
        ("sana", "--device tpu", "--device"),
        ("sana", "--frobnicate", "--frobnicate"),
        ("sana", "--lora 100000", "wide"),
        ("sana", "--random-weights", "random weights need one of the names"),
        ("sana", "--student nowhere", "nowhere"),
    ],
)
def test_bad_arguments(pipeline, refused, family, arguments, says):
    assert says in refused(pipeline(family), *SHORT, *arguments.split())


def test_no_teacher(capsys):
    with pytest.raises(SystemExit) as stop:
        sid_fm.main([])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(pipeline, refused):
    assert "--device cpu" in refused(pipeline("sana"), *SHORT, "--device", "cuda")


@pytest.mark.parametrize("mode", [(), ("--sample", "a fox")], ids=["train", "sample"])
def test_an_out_that_cannot_be_written(pipeline, refused, tmp_path, mode):
    (tmp_path / "file").write_text("")
    assert "--out" in refused(pipeline("sana"), *SHORT, *mode, "--out", tmp_path / "file" / "x.png")


def test_an_out_that_is_something_else(pipeline, refused, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert "file" in refused(pipeline("sana"), *SHORT, "--out", tmp_path / "file")
    assert "folder.png" in refused(pipeline("sana"), "--sample", "a fox", "--out", tmp_path / "folder.png")
    assert "name of a picture" in refused(pipeline("sana"), "--sample", "a fox", "--out", ".")


@pytest.mark.parametrize("script", ["sid_fm", "toy_2d", "dit_tiny"])
def test_another_run_in_the_same_folder(pipeline, tmp_path, script):
    """A folder is one process's until that ends."""
    hold = f"import sys, pathlib, sid_fm; sid_fm.claim(pathlib.Path({str(tmp_path)!r})); print(1, flush=True); input()"
    arguments = ["--teacher", pipeline("sana"), *map(str, SHORT)] if script == "sid_fm" else ["--quick"]
    source = Path(sid_fm.__file__).parent
    with subprocess.Popen(
        [sys.executable, "-c", hold], cwd=source, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        first.stdout.readline()
        command = [sys.executable, source / f"{script}.py", *arguments, "--out", tmp_path]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        first.communicate(b"\n")
    assert second.returncode == 2 and not second.stdout
    assert re.fullmatch(rf"{script}.py: another run is writing to .*: choose another --out\n", second.stderr)
    assert not [*tmp_path.iterdir()]
    sid_fm.claim(tmp_path), sid_fm.claim(tmp_path)  # it is free again


def test_an_argument_that_is_no_text(pipeline, refused):
    """A byte that is not UTF-8, as Python hands it on."""
    assert "not UTF-8" in refused(pipeline("sana"), "--sample", "a \udcff fox")


def test_a_damaged_cache(pipeline, run, untrained, refused, tmp_path):
    run(pipeline("sana"), *SHORT, "--out", tmp_path)
    for file in times(tmp_path):
        file.write_bytes(b"")
    assert "is damaged" in refused(pipeline("sana"), *SHORT, "--out", tmp_path)


def test_what_else_lies_in_the_teachers_folder_is_not_in_the_caches_key(pipeline, run, untrained, tmp_path):
    teacher = shutil.copytree(pipeline("sana"), tmp_path / "teacher")
    run(teacher, *SHORT, "--out", teacher / "run")
    first = times(teacher / "run")
    (teacher / "transformer" / "diffusion_pytorch_model.fp16.safetensors").symlink_to("nowhere")
    run(teacher, *SHORT, "--out", teacher / "run")
    assert first and times(teacher / "run") == first


def test_a_student_of_another_kind(pipeline, refused):
    line = refused(pipeline("sana"), *SHORT, "--student", pipeline("sd3-medium"))
    assert "SD3Transformer2DModel" in line and "SanaTransformer2DModel" in line


def test_a_student_that_is_no_student(pipeline, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refused(pipeline("sana"), *SHORT, "--student", tmp_path / "empty")


def test_a_disk_too_small_for_the_cache(pipeline, refused, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert "make room" in refused(pipeline("sana"), *SHORT)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_cpu_that_cannot_hold_the_teacher(refused, run, monkeypatch, capsys, tmp_path):
    """Said before anything is downloaded or loaded."""
    monkeypatch.setattr(sid_fm, "fetch", lambda *args: pytest.fail("asked the Hub"))
    memory = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}
    monkeypatch.setattr(os, "sysconf", memory.__getitem__)
    line = refused("sd3-medium", "--batch", 4)
    assert "2.03 billion" in line and "gradients 8.1, optimiser 16.2" in line and "has 4.3 GB" in line
    assert "--dtype bf16, --batch 1 --accumulate 4, --lora 16" in line
    assert "smaller teacher" in refused("flux-dev", "--sample", "a fox", "--dtype", "bf16", "--out", tmp_path / "x.png")


def test_a_run_says_what_memory_it_takes_and_recomputes_blocks_if_it_must(
    untrained, run, monkeypatch, capsys, tmp_path
):
    """By part, before anything is loaded; activations are kept where they fit."""

    class Stop(Exception):
        pass

    def stop(*args, **options):
        raise Stop

    monkeypatch.setattr(sid_fm, "load_teacher", stop)
    for gigabytes, ending in ((1000, r"activations \d\d\.\d\)"), (60, r"activations \d\.\d, blocks recomputed\)")):
        monkeypatch.setattr(sid_fm, "device_memory", lambda device, size=gigabytes: size * 1e9)
        with pytest.raises(Stop):
            run("sd3-medium", "--random-weights", "--batch", 2, "--dtype", "bf16", "--resolution", 512, "--tokens", 256)
        line = capsys.readouterr().err
        assert "weights 20.3, gradients 8.1, optimiser 16.2" in line and re.search(ending, line)
    monkeypatch.setattr(sid_fm, "device_memory", lambda device: 5e9)  # of a student its network is all there is
    with pytest.raises(Stop):
        run("sd3-medium", "--student", "a", "--sample", "a fox", "--dtype", "bf16", "--out", tmp_path / "fox.png")
    assert "weights 4.1" in capsys.readouterr().err


@pytest.fixture
def interrupted(monkeypatch):
    """interrupted(after, what): the loop yields `after` measurements, then raises `what` or changes each by it."""

    def interrupted(after, what):
        distill = sid_fm.distill

        def loop(*args, **kwargs):
            for measured in distill(*args, **kwargs):
                if measured["iteration"] >= after:
                    if isinstance(what, dict):
                        measured |= what
                    else:
                        raise what
                yield measured

        monkeypatch.setattr(sid_fm, "distill", loop)

    return interrupted


ENDINGS = {
    "diverged": ({"skipped": torch.tensor(1.0), "fisher": torch.tensor(math.nan)}, 1, "--lr"),
    "Ctrl-C": (KeyboardInterrupt(), 130, "saved before"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_that_ends_early_keeps_the_last_student(pipeline, refused, undrawn, interrupted, tmp_path, ending):
    what, status, says = ENDINGS[ending]
    interrupted(5, what)
    arguments = ("--iters", 20, "--batch", 2, "--resolution", 32, "--save-every", 4, "--lr", 1e-3)
    assert says in refused(pipeline("sana"), *arguments, status=status)
    out = tmp_path / "out"
    if ending == "diverged":  # at the sixteenth iteration the log is read
        assert [name for name, _ in undrawn] == [x for i in (4, 8, 12) for x in (f"samples-{i:06d}.png", "loss.png")]
        assert [row["fisher"] is None for row in read_log(out)] == [False] * 5 + [True] * 11
    else:
        assert [name for name, _ in undrawn] == ["samples-000004.png", "loss.png"]
        assert [row["iteration"] for row in read_log(out)] == [0, 1, 2, 3]
    assert changed(out / "student", pipeline("sana") / "transformer") and not list(out.glob("student.*"))
    diffusers.SanaTransformer2DModel.from_pretrained(out / "student")


def test_an_absurd_rate_diverges(pipeline, refused, undrawn):
    assert "diverged" in refused(
        pipeline("sana"), "--iters", 30, "--batch", 1, "--resolution", 32, "--lr", 1e30, status=1
    )


def test_ctrl_c_while_prompts_are_encoded(pipeline, refused, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sid_fm.Teacher, "encode_prompts", stop)
    refused(pipeline("sana"), *SHORT, status=130)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def dies(file):
        file.write_text("ha")
        raise KeyboardInterrupt

    for before in ([], ["whole"]):
        with pytest.raises(KeyboardInterrupt):
            sid_fm.write(tmp_path / "file.json", dies)
        assert [file.read_text() for file in tmp_path.glob("file*")] == before
        sid_fm.write(tmp_path / "file.json", lambda file: file.write_text("whole"))
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_a_student_is_saved_whole_or_not_at_all(pipeline, monkeypatch, tmp_path):
    """Killed while it writes, the student that was there stays."""
    import safetensors.torch

    teacher = sid_fm.load_teacher(pipeline("sana"))
    sid_fm.save_student(teacher.dit, teacher, tmp_path / "student")
    before = {file.name: file.read_bytes() for file in (tmp_path / "student").iterdir()}

    def dies(weights, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(safetensors.torch, "save_file", dies)
        sid_fm.save_student(teacher.dit, teacher, tmp_path / "student")
    assert {file.name: file.read_bytes() for file in (tmp_path / "student").iterdir()} == before
    sid_fm.save_student(teacher.dit, teacher, tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


# ----------------------------------------------------------------------------------------------------------------------
# As a process
# ----------------------------------------------------------------------------------------------------------------------


def test_help_is_quick(tmp_path):
    """It names the teachers, and imports nothing heavier than torch."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPT, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    imported = set(re.findall(r"\| +(\w+)$", run.stderr, re.MULTILINE))
    assert run.returncode == 0 and "torch" in imported
    assert not imported & {"transformers", "diffusers", "matplotlib", "PIL", "huggingface_hub", "safetensors"}
    assert all(re.search(rf"{re.escape(name)}\b", run.stdout) for name in sid_fm.NAMES)
    assert all(flag in run.stdout for flag in ("--teacher", "--student", "--sample", "--data", "--random-weights"))
    assert "(4)" in run.stdout and "(2000)" in run.stdout  # the defaults


def test_bad_input_ends_the_process_with_status_2(tmp_path):
    command = [sys.executable, SCRIPT, "--teacher", "sd4-medium", "--device", "cpu", "--out", "run"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert run.stderr.startswith("sid_fm.py: ") and "sd4-medium" in run.stderr
