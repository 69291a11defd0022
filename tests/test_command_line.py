"""Chapters 10 and 11 of sid_fm.py: whole runs from pipeline folders, pictures, and what happens
when something is wrong."""

import functools
import gc
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

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
    """Small inputs: a prompt list, an instruction, and two folders of images with captions, one
    with metadata.jsonl."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    (folder / "instruction.txt").write_text("A photograph of ")
    for kind in ("captions", "metadata"):
        (folder / kind).mkdir()
        save_images(folder / kind)
    rows = [{"file_name": f"{i}.png", "text": PROMPTS[i]} for i in range(5)]
    (folder / "metadata" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i in range(5):
        (folder / "captions" / f"{i}.txt").write_text(PROMPTS[i] + "\n")
    return folder


def save_images(folder: Path) -> None:
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
        defaults = ["--tokens", "16", "--accumulate", "1", "--device", "cpu"]
        defaults += ["--instruction", str(files / "instruction.txt")]
        if not {"--sample", "--data", "--prompts"} & set(arguments):
            defaults += ["--prompts", str(files / "prompts.txt")]
        sid_fm.main(["--teacher", str(teacher), *defaults, *arguments])

    return run


@pytest.fixture
def unplotted(monkeypatch):
    """Leaves out the pictures, which take longer than a short run. Returns what would have been
    plotted: names, titles."""
    plotted = []
    monkeypatch.setattr(sid_fm, "plot_images", lambda file, rows, prompts, title: plotted.append((file.name, title)))
    monkeypatch.setattr(sid_fm, "plot_log", lambda file, log: plotted.append((file.name, len(log))))
    return plotted


@pytest.fixture
def untrained(unplotted, monkeypatch):
    """Leaves out the training besides. Returns what the loop would have been given: networks, ...,
    and keywords."""
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
    """A finished run of 16 iterations at batch 4: its log, its pictures, and a student that
    diffusers opens."""
    log = read_log(out)
    assert [row["iteration"] for row in log] == list(range(16)) and log[-1]["images"] == 64
    assert all(math.isfinite(x) for row in log for x in row.values())
    assert all(row.keys() >= {"fisher", "fake_loss", "loss", "k"} for row in log)
    assert all(("discriminator" in row and "adversarial" in row) == data for row in log)
    assert {row["k"] for row in log} == {1, 2, 3, 4}
    pictures = [*out.glob("samples-*.png"), out / "loss.png"]
    assert (out / "samples-000016.png") in pictures
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
    """finished(family, data) -> the folder of a run of 16 iterations at batch 4."""

    @functools.cache
    def finished(family: str, data: str) -> Path:
        out = tmp_path_factory.mktemp("runs") / family
        arguments = ["--data", files / data] if data else ["--prompts", files / "prompts.txt"]
        arguments += ["--tokens", 16, "--instruction", files / "instruction.txt", "--device", "cpu"]
        arguments += ["--iters", 16, "--batch", 4, "--accumulate", 1, "--out", out]
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
@pytest.mark.parametrize("family", ["sd3.5-medium", "flux-dev", "sana-sprint"])
def test_every_family_is_distilled_without_anything_else(pipeline, files, monkeypatch, tmp_path, family):
    """Composed prompts at their full length, in two stretches, at the teacher's resolution."""
    monkeypatch.setattr(sid_fm, "STRETCH", 64)
    arguments = ["--instruction", str(files / "instruction.txt"), "--device", "cpu", "--out", str(tmp_path / "run")]
    sid_fm.main(["--teacher", str(pipeline(family)), "--iters", "16", "--batch", "4", "--accumulate", "1", *arguments])
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
    """3.5 in teacher and fake network, 1 in the student, and no classifier-free guidance unless
    asked for."""
    student = pipeline("flux-dev") / "transformer"
    run(pipeline("flux-dev"), *SHORT, "--out", tmp_path / "a")
    run(pipeline("flux-dev"), *SHORT, "--out", tmp_path / "b", "--student", student, "--guidance", 2)
    embedded = [[net.guidance for net in given[:3]] for given in untrained]
    assert embedded == [[3.5, 1.0, 3.5]] * 2 and [given[-1]["guidance"] for given in untrained] == [
        [1.0] * 3,
        [2.0] * 3,
    ]


def test_others_are_guided_classifier_free(pipeline, run, untrained, tmp_path):
    run(pipeline("sana"), *SHORT, "--out", tmp_path / "run")
    settings = untrained[0][-1]
    assert settings["guidance"] == [4.5] * 3
    bare = sid_fm.load_teacher(pipeline("sana")).encode_prompts([""], 16)
    assert all(torch.equal(settings["uncond"][key], value) for key, value in bare.items())


def test_the_settings_reach_the_loop(pipeline, run, untrained, tmp_path):
    settings = {"steps": 2, "alpha": 0.5, "weight": "1/t", "noise": "ddim", "loss": "dmd"}
    flags = [x for name, value in settings.items() for x in (f"--{name}", value)]
    run(pipeline("sana"), *SHORT, *flags, "--guidance", 3, "--lr", 2e-4, "--out", tmp_path / "run")
    settings["guidance"] = [3.0] * 3
    *_, optimizers, _, shape, given = untrained[0]
    assert settings.items() <= given.items() and given["iters"] == 3 and shape == (2, 32, 1, 1)
    for optimizer, net in zip(optimizers, untrained[0][1:3]):
        (group,) = optimizer.param_groups
        assert isinstance(optimizer, sid_fm.Float32Adam) and (group["lr"], group["beta2"]) == (2e-4, 0.999)
        assert [id(p) for p in group["params"]] == [id(p) for p in net.parameters()]
    assert settings.items() <= json.loads((tmp_path / "run" / "args.json").read_text()).items()


def signed(pixels: np.ndarray) -> torch.Tensor:
    """[H, W, 3] of bytes -> [3, H, W] in [-1, 1]"""
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("kind", ["captions", "metadata"])
def test_real_images_are_those_of_their_captions(pipeline, files, run, untrained, tmp_path, kind):
    """Each row of the fake network's batches: a sample of an image's posterior, with the condition
    of that image's caption; and other captions to generate from. The generator's batches have no
    images."""
    run(pipeline("sd3-medium"), *SHORT, "--data", files / kind, "--out", tmp_path / "run")
    teacher, batches = sid_fm.load_teacher(pipeline("sd3-medium")), untrained[0][4]
    texts = teacher.encode_prompts(PROMPTS, 16)["text"]
    images = torch.stack([signed(sid_fm.read_pixels(files / kind / f"{i}.png", 32)) for i in range(5)])
    mean, deviation = teacher.posterior(images)
    seen, others = {}, 0

    def captions(cond):
        distances = torch.cdist(cond["text"].flatten(1), texts.flatten(1))
        assert distances.min(1).values.max() < 1e-3
        return distances.argmin(1).tolist()

    for _ in range(30):
        (cond, (x_0, real_cond)), (generated, none) = next(batches), next(batches)
        assert none is None and captions(generated) and x_0.shape == (2, 16, 4, 4)
        for i, x in zip(captions(real_cond), x_0):
            seen.setdefault(i, []).append(x)
        others += captions(cond) != captions(real_cond)
    assert {*seen} == {*range(5)} and others > 15
    for i, samples in seen.items():  # each image is taken twelve times
        z = (torch.stack(samples) - mean[i]) / deviation[i]
        assert z.shape[0] == 12 and z.mean(0).abs().max() < 5.5 / 12**0.5
        assert z.std(0).square().mean() == pytest.approx(1, abs=0.1)


def test_images_are_cropped_in_the_middle(tmp_path):
    image = Image.new("RGB", (90, 30), (255, 0, 0))
    image.paste((0, 0, 255), (30, 0, 60, 30))
    image.save(tmp_path / "wide.png")
    pixels = sid_fm.read_pixels(tmp_path / "wide.png", 16)
    assert pixels.shape == (16, 16, 3) and (pixels[3:13, 3:13] == [0, 0, 255]).all()


# ----------------------------------------------------------------------------------------------------------------------
# The seed, and the stretches of prompts
# ----------------------------------------------------------------------------------------------------------------------


def test_the_seed_fixes_the_numbers(pipeline, run, unplotted, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        arguments = ("--iters", 3, "--batch", 1, "--resolution", 32, "--steps", 2)
        run(pipeline("sana"), *arguments, "--seed", seed, "--out", tmp_path / name)
    a, b, c = ((tmp_path / name / "log.jsonl").read_text() for name in "abc")
    assert a == b != c
    assert not changed(tmp_path / "a" / "student", tmp_path / "b" / "student")
    assert changed(tmp_path / "a" / "student", tmp_path / "c" / "student")


@pytest.fixture
def asked(monkeypatch):
    """The prompts that have been encoded, in a run whose stretches are of 8 iterations of 2 + 2
    prompts."""
    asked, encode = [], sid_fm.Teacher.encode_prompts
    monkeypatch.setattr(sid_fm.Teacher, "encode_prompts", lambda *args: asked.extend(args[1]) or encode(*args))
    monkeypatch.setattr(sid_fm, "STRETCH", 32)
    return asked


LONG = ("--iters", 20, "--batch", 2, "--resolution", 32)


def taken(untrained, prompts, folder):
    """The prompts of the 80 places of a run, told by their conditions."""
    teacher = sid_fm.load_teacher(folder)
    teacher.instruction = "A photograph of "
    texts = teacher.encode_prompts(prompts, 16)["text"].flatten(1)
    places = []
    for _ in range(40):  # two updates an iteration
        cond, real = next(untrained[0][4])
        rows = cond["text"].flatten(1)
        distances = torch.cdist(rows, texts, compute_mode="donot_use_mm_for_euclid_dist")
        assert real is None and distances.min(1).values.max() < 1e-3
        places += distances.argmin(1).tolist()
    return places


def test_prompts_that_fit_into_a_stretch_are_encoded_once(pipeline, run, untrained, asked, tmp_path):
    run(pipeline("sana"), *LONG, "--out", tmp_path / "run")
    asked.clear()
    places = taken(untrained, PROMPTS, pipeline("sana"))
    assert asked == PROMPTS  # by this test, and none by twenty iterations
    assert all(sorted(places[i : i + 5]) == [0, 1, 2, 3, 4] for i in range(0, 80, 5))


def test_prompts_that_do_not_fit_are_encoded_a_stretch_at_a_time(pipeline, run, untrained, asked, tmp_path):
    which = ("the", "this", "no", "which", "every", "some", "that", "one")
    prompts = [f"{word} {prompt}" for word in which for prompt in PROMPTS]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    run(pipeline("sana"), *LONG, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "run")
    assert len(asked) == 1 + 4 + 32  # the empty one, those that are shown, and the first stretch
    places = taken(untrained, prompts, pipeline("sana"))
    assert all(sorted(places[i : i + 40]) == [*range(40)] for i in (0, 40))
    assert {*map(prompts.index, asked[5:37])} == {*places[:32]}


def test_without_a_file_every_place_of_the_run_has_a_new_prompt(pipeline, files, untrained, asked, tmp_path):
    """They are the grammar's, from the seed; a later stretch goes on where the former one ended."""
    arguments = ["--instruction", files / "instruction.txt", "--device", "cpu", "--tokens", 64, *LONG, "--seed", 7]
    arguments += ["--accumulate", 1, "--out", tmp_path / "run"]
    sid_fm.main(["--teacher", str(pipeline("sana")), *map(str, arguments)])
    for _ in range(40):
        next(untrained[0][4])
    assert asked[0] == "" and asked[5:] == [sid_fm.compose(f"7 {place}") for place in range(80)]
    assert len({*asked[5:]}) > 76 and not {*asked[1:5]} & {*asked[5:]}


def test_the_text_encoders_are_gone_before_the_first_step(pipeline, run, untrained, monkeypatch, tmp_path):
    made, alive, init = [], [], sid_fm.TextEncoders.__init__

    def remember(self, *args, **kwargs):
        init(self, *args, **kwargs)
        encoders = [encoder for _, encoder in self.parts.values()]
        made.extend(map(weakref.ref, [self, *encoders, *(p for encoder in encoders for p in encoder.parameters())]))

    monkeypatch.setattr(sid_fm.TextEncoders, "__init__", remember)
    monkeypatch.setattr(sid_fm, "distill", lambda *_, **__: alive.extend(ref() for ref in made) or iter(()))
    run(pipeline("sd3-medium"), *SHORT, "--out", tmp_path / "run")
    assert len(alive) > 20 and not any(x is not None for x in alive)


# ----------------------------------------------------------------------------------------------------------------------
# Composed prompts
# ----------------------------------------------------------------------------------------------------------------------


def test_composed_prompts_are_varied_sentences():
    prompts = [sid_fm.compose(f"3 {i}") for i in range(500)]
    assert prompts == [sid_fm.compose(f"3 {i}") for i in range(500)]
    assert prompts != [sid_fm.compose(f"4 {i}") for i in range(500)]
    assert len(set(prompts)) > 450
    assert not [prompt for prompt in prompts if re.search(r"[{}|_]", prompt) or prompt != prompt.strip()]
    assert not [prompt for prompt in prompts if "  " in prompt or not 3 <= len(prompt.split()) <= 40]
    # each a demand
    kinds = ('"', "two ", " made of ", "watercolour", " next to ", " at night ", "under water")
    assert all(sum(kind in prompt for prompt in prompts) > 5 for kind in kinds)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------------------


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_the_progress_bar_changes_no_picture(pipeline, student, run, monkeypatch, tmp_path):
    """tqdm's update returns True where it redraws; as the result of a hook it would be the output."""
    for name, update in (("a", None), ("b", lambda self, n=1: True)):
        if update:
            monkeypatch.setattr(sid_fm.tqdm, "update", update)
        arguments = ["--student", student, "--sample", "a fox", "--resolution", 48, "--out", tmp_path / f"{name}.png"]
        run(pipeline("sd3-medium"), *arguments)
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()


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
    """The same weights twice: the teacher by its sampler and its number of steps, the student by
    four steps of G."""
    seen, generate, sample = [], sid_fm.generate, sid_fm.Teacher.sample

    def as_student(net, z, cond, steps=0, **options):
        if steps:  # a teacher's sampler walks its own times
            seen.append((net, steps))
        return generate(net, z, cond, steps, **options)

    def as_teacher(self, z, cond, **options):
        seen.append((self.dit, options["guidance"]))
        return sample(self, z, cond, **options)

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
    copied, forgotten, copy, forget = [], [], sid_fm.to_device, sid_fm.Teacher.forget_text
    monkeypatch.setattr(sid_fm, "to_device", lambda net, *rest: copied.append(type(net)) or copy(net, *rest))
    monkeypatch.setattr(sid_fm.Teacher, "forget_text", lambda self: forgotten.append(len(copied)) or forget(self))
    of = ["--student", student] if who == "student" else []
    arguments = ("--sample", "a fox", "--steps", 1, "--resolution", 32, "--out", tmp_path / "fox.png")
    run(pipeline("sd3-medium"), *of, *arguments)
    assert copied == [sid_fm.AutoencoderKL, sid_fm.MMDiT] and forgotten == [1] and (tmp_path / "fox.png").exists()


def test_a_prompt_with_dollars_is_no_formula(tmp_path):
    prompts = ["a price tag, was $20, 50% off, now $10", '"$5 & up", "$10 & up"']
    sid_fm.plot_images(tmp_path / "grid.png", {"student": [np.zeros((8, 8, 3), np.uint8)] * 2}, prompts)
    assert pixels(tmp_path / "grid.png").ndim == 3


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo ships\n", encoding="utf-8-sig")
    assert sid_fm.read_prompts(tmp_path / "prompts.txt") == ["a red fox", "two ships"]


def test_the_last_line_samples_from_what_was_made(pipeline, run, unplotted, capsys, monkeypatch, tmp_path):
    run(pipeline("sana"), *SHORT, "--steps", 2, "--out", tmp_path / "run")
    python, script, *command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert (python, script) == ("python", "sid_fm.py")
    monkeypatch.chdir(tmp_path)
    sid_fm.main(command)
    assert pixels(tmp_path / "sample.png").shape == (32, 32, 3)
    assert sid_fm.parse(command).steps == 2 and sid_fm.parse(command).instruction


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(run, capsys, tmp_path):
    """refused(teacher, *arguments) -> the one line on stderr, where bars and what a run takes are
    left out. Asserts the status, and that nothing is half-written."""

    def refused(teacher, *arguments, status=2, out=tmp_path / "out"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            run(teacher, *arguments, *([] if "--out" in arguments else ["--out", out]))
        err = capsys.readouterr().err
        lines = [
            line
            for line in re.split("[\r\n]+", err)
            if line.strip() and not re.search(r"%\|.*\]$|GB of host memory$", line)
        ]
        assert stop.value.code == status and len(lines) == 1, err
        assert err.endswith(f"{lines[0]}\n") and "Traceback" not in err
        if status == 2:
            new = [p.name for p in tmp_path.rglob("*") if p not in before]
            assert not {"student", "log.jsonl", "loss.png"} & set(new), new
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
    "a truncated network": (lambda f: cut(f / NETWORK), f"{NETWORK} can't be read"),
    "an empty network": (lambda f: (f / NETWORK).write_bytes(b""), f"{NETWORK} can't be read"),
    "a truncated autoencoder": (lambda f: cut(f / VAE), f"{VAE} can't be read"),
    "a truncated text encoder": (lambda f: cut(f / TEXT), "text_encoder"),
    "a wrong shape": (
        lambda f: retensor(f / NETWORK, lambda w: w.update({PROJ: w[PROJ][:-1].clone()})),
        r"transformer: the weights don't fit.* proj_out.weight: .*\[31, 48\].*\[32, 48\]",
    ),
    "a text encoder's wrong shape": (
        lambda f: retensor(f / TEXT, lambda w: w.update({NORM: w[NORM][:-1].clone()})),
        "text_encoder",
    ),
    "a missing key": (lambda f: retensor(f / NETWORK, lambda w: w.pop(PROJ)), 'Missing key.*"proj_out.weight"'),
    "an unexpected key": (
        lambda f: retensor(f / NETWORK, lambda w: w.update(x=w[PROJ].clone())),
        'Unexpected key.*"x"',
    ),
    "a renamed key": (
        lambda f: retensor(f / NETWORK, lambda w: w.update(x=w.pop(PROJ))),
        'Missing key.*"proj_out.weight".*Unexpected key.*"x"',
    ),
    "a text encoder's missing key": (lambda f: retensor(f / TEXT, lambda w: w.pop(NORM)), "text_encoder.*missing"),
    "a config of another size": (
        lambda f: edit(f / "transformer/config.json", lambda x: x.update(num_layers=4)),
        'Missing key.*"transformer_blocks.3',
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
    assert str(file) in line and ("'utf-8' codec" in line) == (kind in ("latin-1", "utf-16"))


BAD_DATA = {
    "missing": (lambda f: shutil.rmtree(f), "is no folder of images"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_bytes(b"x")), "is no folder of images"),
    "no images": (lambda f: [file.unlink() for file in f.glob("*.png")], "is no folder of images"),
    "no captions": (lambda f: [file.unlink() for file in f.glob("*.txt")], "is no folder of images with captions"),
    "a caption not in UTF-8": (
        lambda f: (f / "3.txt").write_bytes(b"\xff"),
        "3.txt can't be read .'utf-8' codec.*in UTF-8",
    ),
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
        ("sana", "--lr nan", "--lr"),
        ("sana", "--guidance inf", "--guidance"),
        ("sana", "--weight heavy", "--weight"),
        ("sana", "--noise loud", "--noise"),
        ("sana", "--dtype fp8", "--dtype"),
        ("sana", "--device tpu", "--device"),
        ("sana", "--frobnicate", "--frobnicate"),
        ("sana", "--lora 100000", "wide"),
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
    assert "the name of a .png" in refused(pipeline("sana"), "--sample", "a fox", "--out", tmp_path / "fox.jpg")


def test_a_student_of_another_kind(pipeline, refused):
    line = refused(pipeline("sana"), *SHORT, "--student", pipeline("sd3-medium"))
    assert "SD3Transformer2DModel" in line and "SanaTransformer2DModel" in line


def test_a_student_that_is_no_student(pipeline, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in refused(pipeline("sana"), *SHORT, "--student", tmp_path / "empty")


@pytest.mark.parametrize("mode", ["train", "lora", "sample", "evaluate"])
def test_a_device_that_cannot_hold_it(pipeline, student, clip_folder, refused, monkeypatch, tmp_path, mode):
    """One line with advice, before prompts are encoded or any weight is copied."""
    monkeypatch.setattr(sid_fm, "device_memory", lambda device: 1e3)
    monkeypatch.setattr(sid_fm.Teacher, "encode_prompts", lambda *args: pytest.fail("encoded prompts"))
    arguments = {
        "train": [],
        "lora": ["--lora", 2],
        "sample": ["--sample", "a fox", "--out", tmp_path / "fox.png"],
        "evaluate": ["--student", student, "--evaluate", "--num", 12, "--clip", clip_folder],
    }[mode]
    line = refused(pipeline("sd3-medium"), *SHORT, *arguments)
    assert "GB of memory" in line and "cpu has 0.0 GB" in line
    assert all(advice in line for advice in ("--dtype bf16", "--lora 16", "more processes", "a smaller teacher"))
    assert not (tmp_path / "out" / "args.json").exists()


def test_a_run_says_what_memory_it_takes(pipeline, run, untrained, monkeypatch, capsys, tmp_path):
    """By part, before prompts are encoded; what is small is not worth a line."""
    run(pipeline("sana"), *SHORT, "--out", tmp_path / "small")
    assert "GB of memory" not in capsys.readouterr().err
    parts = {"frozen weights": 4.06e9, "Adam": 16.2e9}
    monkeypatch.setattr(sid_fm, "training_memory", lambda *args: parts)
    monkeypatch.setattr(sid_fm, "device_memory", lambda device: 32e9)
    run(pipeline("sana"), *SHORT, "--out", tmp_path / "large")
    line, *_ = capsys.readouterr().err.splitlines()
    assert "takes 20.3 GB of memory (frozen weights 4.1, Adam 16.2)" in line and "cpu has 32.0 GB" in line


def break_weights(nets):
    for net in nets:
        for weight in net.parameters():
            weight.data.fill_(math.nan)


def press_ctrl_c(nets):
    raise KeyboardInterrupt


ENDINGS = {"diverged": (break_weights, 1, "--lr"), "Ctrl-C": (press_ctrl_c, 130, "saved before")}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_run_that_ends_early_keeps_the_last_student(pipeline, refused, unplotted, monkeypatch, tmp_path, ending):
    """Saved at iteration 4, it ends at 6 or where the next pictures are not finite."""
    harm, status, says = ENDINGS[ending]
    distill = sid_fm.distill

    def loop(*args, **kwargs):
        for measured in distill(*args, **kwargs):
            if measured["iteration"] == 5:
                harm(args[1:3])
            yield measured

    monkeypatch.setattr(sid_fm, "distill", loop)
    arguments = ("--iters", 20, "--batch", 2, "--resolution", 32, "--save-every", 4, "--lr", 1e-3)
    assert says in refused(pipeline("sana"), *arguments, status=status)
    out = tmp_path / "out"
    assert [name for name, _ in unplotted] == ["samples-000004.png", "loss.png"]
    assert [row["iteration"] for row in read_log(out)][:4] == [0, 1, 2, 3]
    assert changed(out / "student", pipeline("sana") / "transformer") and not list(out.glob("student.*"))
    student = diffusers.SanaTransformer2DModel.from_pretrained(out / "student")
    assert all(x.isfinite().all() for x in student.parameters())
    assert json.loads((out / "state" / "state.json").read_text())["iteration"] == 4


def test_what_is_not_finite_is_null_in_the_log(pipeline, run, unplotted, capsys, tmp_path):
    """And the bar counts the updates that were skipped."""
    run(pipeline("sana"), "--iters", 6, "--batch", 1, "--resolution", 32, "--lr", 1e30, "--out", tmp_path / "run")
    first, *_, last = read_log(tmp_path / "run")
    assert first["fake_loss"] > 0 and (last["fake_loss"], last["fisher"], last["skipped"]) == (None, None, 2)
    assert re.search(r"\d skipped", capsys.readouterr().err)


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
    assert not imported & {"transformers", "diffusers", "matplotlib", "PIL", "huggingface_hub"}
    assert all(re.search(rf"{re.escape(name)}\b", run.stdout) for name in sid_fm.NAMES)
    assert all(flag in run.stdout for flag in ("--teacher", "--student", "--sample", "--data", "--resume"))
    assert "(4)" in run.stdout and "(2000)" in run.stdout  # the defaults


def test_bad_input_ends_the_process_with_status_2(tmp_path):
    command = [sys.executable, SCRIPT, "--teacher", "sd4-medium", "--device", "cpu", "--out", "run"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1
    assert run.stderr.startswith("sid_fm.py: ") and "sd4-medium" in run.stderr
