"""What can be set here as it can in the authors' code, by the rules that it shows: guidance, rates
and scales, prompts and real samples, SANA's instruction, their students, a folder of samples."""

import json
import re
import shutil
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import sid_fm

PROMPTS = ["a red fox", "two ships", "a small robot"]  # of `settings`


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def pixels(file):
    with Image.open(file) as image:
        return np.array(image)


def alike(a, b):
    """Up to the rounding of prompts that are encoded alone or together."""
    return np.abs(a.astype(int) - b).max() <= 1


@pytest.fixture
def loops(monkeypatch):
    """What each run gives the loop, which it goes through: teacher, student, fake network,
    optimizers, batches, shape, options."""
    loops, distill = [], sid_fm.distill
    monkeypatch.setattr(
        sid_fm, "distill", lambda *args, **options: loops.append((*args, options)) or distill(*args, **options)
    )
    return loops


@pytest.fixture
def guided_by(monkeypatch):
    """The guidance of each of the teacher's own pictures: classifier-free, and of its embedding.
    The pictures are noise."""
    guided_by = []
    monkeypatch.setattr(
        sid_fm.Teacher,
        "sample",
        lambda self, z, *_, guidance=None, **__: guided_by.append((guidance, self.dit.guidance)) or z,
    )
    return guided_by


def rates(loop):
    return [optimizer.param_groups[0]["lr"] for optimizer in loop[3]]


# ----------------------------------------------------------------------------------------------------------------------
# Guidance, rates, scales, updates
# ----------------------------------------------------------------------------------------------------------------------

DEFAULTS = {"guidance": [4.5] * 3, "sid_scale": 100.0, "discriminator_scale": 1.0, "fake_updates": 1}


def test_the_settings_reach_the_loop_and_a_resumed_run_keeps_them(pipeline, run, loops, guided_by, tmp_path):
    """Those that are not said anew. The teacher's own pictures are guided as the teacher is in the
    generator's loss."""
    knobs = ["--guidance", -1, 0, 4.25, "--sid-scale", 10, "--discriminator-scale", 3, "--fake-updates", 2]
    run(pipeline("sana"), *knobs, "--fake-lr", 5e-4, "--iters", 1)
    run(pipeline("sana"), "--resume", "--iters", 2, "--lr", 2e-4, "--sid-scale", 5)
    expected = {"guidance": [-1.0, 0.0, 4.25], "sid_scale": 10.0, "discriminator_scale": 3.0, "fake_updates": 2}
    for loop, scale, lr, start in zip(loops, (10.0, 5.0), (1e-3, 2e-4), (0, 1), strict=True):
        assert (expected | {"sid_scale": scale, "start": start}).items() <= loop[-1].items()
        assert rates(loop) == [lr, 5e-4]
    run(pipeline("sana"), "--resume", "--iters", 3, "--guidance", 2)
    assert loops[2][-1]["guidance"] == json.loads((tmp_path / "out" / "args.json").read_text())["guidance"] == [2.0] * 3
    assert [guidance for guidance, _ in guided_by] == [4.25, 4.25, 2.0]


def test_without_them_a_run_is_as_the_paper_s(pipeline, run, loops, guided_by, tmp_path):
    """And the fake network's rate is the student's, also where a resumed run has another one."""
    run(pipeline("sana"), "--iters", 1)
    run(pipeline("sana"), "--resume", "--iters", 2, "--lr", 2e-4)
    assert all(DEFAULTS.items() <= loop[-1].items() for loop in loops)
    assert [rates(loop) for loop in loops] == [[1e-3, 1e-3], [2e-4, 2e-4]]
    saved = json.loads((tmp_path / "out" / "args.json").read_text())
    assert DEFAULTS.items() <= saved.items() and saved["fake_lr"] is None and guided_by[0][0] == 4.5


@pytest.mark.parametrize("mode", ["sample", "evaluate"])
def test_the_teacher_s_own_pictures_take_the_last_guidance(pipeline, clip_folder, run, guided_by, tmp_path, mode):
    arguments = {
        "sample": ["--sample", "a fox", "--out", tmp_path / "fox.png"],
        "evaluate": ["--evaluate", "--student", pipeline("sana"), "--clip", clip_folder, "--num", 12],
    }[mode]
    run(pipeline("sana"), *arguments, "--guidance", 1, 2, 3)
    assert {guidance for guidance, _ in guided_by} == {3.0}


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--guidance 1 2", "--guidance: one number, or three"),
        ("--guidance 1 2 3 4", "--guidance: one number, or three"),
        ("--guidance", "--guidance"),
        ("--guidance 1 nan 2", "--guidance nan: needs a finite number"),
        ("--embedded-guidance inf", "--embedded-guidance inf: needs a finite number"),
        ("--embedded-guidance 2", "--embedded-guidance: .* has no guidance embedding"),
        ("--fake-lr 0", "--fake-lr 0.0: needs a finite number, above 0"),
        ("--fake-lr -1", "--fake-lr -1.0: needs a finite number, above 0"),
        ("--fake-lr nan", "--fake-lr nan: needs a finite number, above 0"),
        ("--fake-updates 0", "--fake-updates 0: needs a whole number, 1 or more"),
        ("--fake-updates -1", "--fake-updates -1: needs a whole number, 1 or more"),
        ("--fake-updates 1.5", "--fake-updates"),
        ("--sid-scale nan", "--sid-scale nan: needs a finite number"),
        ("--discriminator-scale inf", "--discriminator-scale inf: needs a finite number"),
    ],
)
def test_numbers_that_cannot_be_are_one_line(pipeline, ended, tmp_path, arguments, says):
    line = ended(pipeline("sana"), *arguments.split())
    assert re.search(says, line), line
    assert not (tmp_path / "out").exists()


def test_every_update_of_the_fake_network_has_prompts_of_its_own(pipeline, run, asked, monkeypatch, tmp_path):
    """Three of them and one of the generator, in each of two iterations of 2 images."""
    updates, take_step = [], sid_fm.take_step
    monkeypatch.setattr(sid_fm, "take_step", lambda optimizer: updates.append(optimizer) or take_step(optimizer))
    run(pipeline("sana"), "--fake-updates", 3, "--iters", 2, leave_out=["--prompts"])
    assert asked[5:] == [sid_fm.compose(f"0 {place}") for place in range(2 * 4 * 2)]
    fake, student = updates[0], updates[3]
    assert updates == [fake, fake, fake, student] * 2 and fake is not student
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [2, 4]


@pytest.mark.parametrize("start", ["the teacher", "adapters", "a student"])
def test_flux_s_embedded_guidance_is_the_teacher_s_and_the_fake_network_s(
    pipeline, run, loops, guided_by, tmp_path, start
):
    """Its student's stays 1, in training and where it is loaded, and its configuration says
    nothing of it."""
    folder = pipeline("flux-dev")
    more = {"the teacher": [], "adapters": ["--lora", 2], "a student": ["--student", folder]}[start]
    run(folder, "--embedded-guidance", 2, "--iters", 1, *more)
    run(folder, "--resume", "--iters", 2)
    assert [[net.guidance for net in loop[:3]] for loop in loops] == [[2.0, 1.0, 2.0]] * 2
    assert guided_by == [(1.0, 2.0)] * 2
    ours, theirs = tmp_path / "out" / "student" / "config.json", folder / "transformer" / "config.json"
    assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
    teacher = sid_fm.load_teacher(folder)
    teacher.dit.guidance = 2.0
    assert sid_fm.load_student(tmp_path / "out" / "student", teacher).guidance == 1.0


def test_flux_samples_with_its_embedded_guidance_and_its_student_without(pipeline, run, tmp_path):
    folder, drawn = pipeline("flux-dev"), []
    student = ["--student", folder]
    for more in ([], ["3.5"], ["2"], student, [*student, "2"]):
        flags = [x for y in more for x in (["--embedded-guidance", y] if y in ("2", "3.5") else [y])]
        run(folder, "--sample", "a fox", *flags, "--out", tmp_path / "fox.png")
        drawn.append(pixels(tmp_path / "fox.png"))
    plain, same, other, ours, again = drawn
    assert np.array_equal(plain, same) and not np.array_equal(plain, other)
    assert np.array_equal(ours, again) and not np.array_equal(ours, other)


def test_the_help_has_each_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        sid_fm.parse(["--help"])
    told = [" ".join(x.split()) for x in re.split(r"\n  (?=-)", capsys.readouterr().out)]
    said = {x.split()[0]: x for x in told}
    expected = {
        "--guidance": ("or three", "4.5", "FLUX 1"),
        "--embedded-guidance": ("FLUX", "(3.5)"),
        "--fake-lr": ("of the fake network (--lr)",),
        "--fake-updates": ("(1)",),
        "--sid-scale": ("(100.0)",),
        "--discriminator-scale": ("(1.0)", "--data"),
        "--instruction": ("SANA", "(diffusers')", "none"),
        "--sample": ("@FILE",),
        "--clip": ("(openai/clip-vit-large-patch14)",),
    }
    assert stop.value.code == 0
    for flag, words in expected.items():
        assert all(word in said[flag] for word in words), said[flag]


# ----------------------------------------------------------------------------------------------------------------------
# Real samples
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd3-medium", "sana"])
def test_real_samples_are_of_the_posterior(pipeline, tmp_path, family):
    """Their mean is the mode and their spread the deviation that diffusers gives; DC-AE's is the
    mode. Each has its caption's condition; iterations fix the numbers."""
    teacher, count = sid_fm.load_teacher(pipeline(family)), 400
    teacher.instruction = ""
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    teacher.tokens, teacher.resolution = 16, 32
    inputs = sid_fm.Inputs(teacher, PROMPTS, files, 3, 1, 1, count, seed=0)
    inputs.prepare(0)
    batches, texts = inputs.batches(0, None), teacher.encode_prompts(PROMPTS, 16)["text"]
    samples = []
    for i in range(count):
        (_, (x_0, real_cond)), (_, none) = next(batches), next(batches)
        order = torch.tensor(inputs.parts(i, images=True)[0])
        assert none is None and (real_cond["text"] - texts[order]).abs().max() < 1e-4
        samples.append(x_0[order.argsort()])
    x = torch.stack(samples)  # [count, images, C, h, w]
    images = torch.stack([torch.from_numpy(pixels(file)).permute(2, 0, 1) for file in files]) / 127.5 - 1
    mode = teacher.encode(images)
    if family == "sana":
        assert (x - mode).abs().max() < 1e-4 and torch.equal(x[0], x[1])
    else:
        vae = diffusers.AutoencoderKL.from_pretrained(pipeline(family) / "vae")
        with torch.no_grad():
            posterior = vae.encode(images).latent_dist
        mean, std = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor, posterior.std
        z = (x - mean) / (std * vae.config.scaling_factor)
        torch.testing.assert_close(mode, mean, rtol=1e-4, atol=1e-4)
        assert z.mean(0).abs().max() < 5.5 / count**0.5
        assert (z.std(0) - 1).abs().max() < 5.5 / (2 * count) ** 0.5
        assert z.square().mean() == pytest.approx(1, abs=0.02)
    again = next(inputs.batches(5, None))[1][0]
    assert torch.equal(again[torch.tensor(inputs.parts(5, images=True)[0]).argsort()], x[5])


# ----------------------------------------------------------------------------------------------------------------------
# SANA's instruction
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_diffusers(monkeypatch):
    """Where there is none, SANA's own instruction is not found."""
    monkeypatch.setitem(sys.modules, "diffusers", None)


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate"])
def test_sana_is_refused_without_its_instruction(
    pipeline, clip_folder, no_diffusers, ended, monkeypatch, tmp_path, mode
):
    """Before a folder is made or any prompt is encoded."""
    monkeypatch.setattr(sid_fm, "TextEncoders", lambda *args: pytest.fail("text encoders were loaded"))
    arguments = {
        "train": [],
        "sample": ["--sample", "a fox", "--out", tmp_path / "out" / "fox.png"],
        "evaluate": ["--evaluate", "--student", pipeline("sana"), "--clip", clip_folder, "--num", 12],
    }[mode]
    line = ended(pipeline("sana"), *arguments, leave_out=["--instruction"])
    assert all(way in line for way in ("diffusers", "--instruction FILE", "--instruction none"))
    assert not (tmp_path / "out").exists()


def test_sana_in_python_is_refused_until_it_is_said(pipeline, no_diffusers):
    teacher = sid_fm.load_teacher(pipeline("sana"))
    with pytest.raises(sid_fm.BadInput, match="instruction"):
        teacher.encode_prompts(PROMPTS, 16)
    teacher.instruction = ""
    assert teacher.encode_prompts(PROMPTS, 16)["text"].shape == (3, 16, 24)


def test_others_have_no_instruction(pipeline, no_diffusers, run, tmp_path):
    run(pipeline("sd3-medium"), "--sample", "a fox", "--out", tmp_path / "fox.png", leave_out=["--instruction"])
    assert (tmp_path / "fox.png").exists()


def test_without_an_instruction_prompts_go_in_bare(pipeline, no_diffusers, run, loops, capsys, tmp_path):
    """Where that is asked for; and the command that samples from the student asks for it too."""
    run(pipeline("sana"), "--instruction", "none", "--iters", 1)
    bare = sid_fm.TextEncoders(pipeline("sana"), "sana", instruction="")(PROMPTS, 16)
    cond, _ = next(loops[0][4])
    distances = torch.cdist(cond["text"].flatten(1), bare["text"].flatten(1))
    assert (distances.min(1).values < 1e-4).all() and (distances.sort(1).values[:, 1] > 1e-2).all()
    assert "--instruction=none" in capsys.readouterr().out.splitlines()[-1]
    assert json.loads((tmp_path / "out" / "args.json").read_text())["instruction"] == "none"


@pytest.mark.parametrize(
    "instruction, says", [("none", "without the instruction"), ("a file", "after the instruction")]
)
def test_sampling_a_sana_student_says_how_its_prompts_go_in(pipeline, run, capsys, tmp_path, instruction, says):
    """In one line; of teachers and of others' students there is nothing to say."""
    said = ["--instruction", "none"] if instruction == "none" else []
    for family, student in (("sana", True), ("sana", False), ("sd3-medium", True)):
        of = ["--student", pipeline(family)] if student else []
        run(pipeline(family), *of, "--sample", "a fox", *said, "--out", tmp_path / "fox.png")
        lines = [line for line in capsys.readouterr().err.splitlines() if "instruction" in line]
        assert len(lines) == (family == "sana" and student) and all(says in line for line in lines), lines


# ----------------------------------------------------------------------------------------------------------------------
# The authors' students
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def theirs(copied, tmp_path):
    """theirs(kind, family) -> a student's folder as the authors publish it."""

    def theirs(kind, family):
        folder = copied(family)
        name = json.loads((folder / "transformer" / "config.json").read_text())["_class_name"]
        edit(folder / "transformer" / "config.json", _class_name=f"{name}WithEncoder")
        edit(folder / "model_index.json", _class_name={"sana": "SiDSanaPipeline"}.get(family, "SiDSD3Pipeline"))
        if kind == "a bare transformer":
            return shutil.move(folder / "transformer", tmp_path / "bare")
        if kind == "a transformer":  # beside nothing
            shutil.rmtree(folder / "vae"), shutil.rmtree(folder / "text_encoder")
            (folder / "model_index.json").unlink()
        return folder

    return theirs


KINDS = ["a pipeline", "a transformer", "a bare transformer"]


@pytest.mark.parametrize("family", ["sd3-medium", "sana"])
@pytest.mark.parametrize("kind", KINDS)
def test_their_students_open(pipeline, theirs, run, tmp_path, kind, family):
    """They sample as ours of the same weights, and are saved under the class of diffusers."""
    folder, drawn = theirs(kind, family), []
    for student in (folder, pipeline(family)):
        run(pipeline(family), "--student", student, "--sample", "a fox", "--out", tmp_path / "fox.png")
        drawn.append(pixels(tmp_path / "fox.png"))
    assert np.array_equal(*drawn)
    teacher = sid_fm.load_teacher(pipeline(family), mapped=True)
    sid_fm.save_student(sid_fm.load_student(folder, teacher), teacher, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config == json.loads((pipeline(family) / "transformer" / "config.json").read_text())
    getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_teacher_their_student_is_one_line_that_says_what_to_do(theirs, ended, tmp_path, kind):
    assert "--student" in ended(theirs(kind, "sd3-medium"))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# A folder of samples
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_the_lines_of_a_file_are_numbered_pictures(pipeline, run, monkeypatch, capsys, tmp_path, who):
    """Those of the same prompts given one by one, without a grid."""
    monkeypatch.setenv("HOME", str(tmp_path))
    of = ["--student", pipeline("sd3-medium")] if who == "student" else []
    run(pipeline("sd3-medium"), *of, "--sample", "@~/prompts.txt", "--out", tmp_path / "drawn")
    files = sorted((tmp_path / "drawn").iterdir())
    assert [file.name for file in files] == ["00001.png", "00002.png", "00003.png"]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    given = [x for prompt in PROMPTS for x in ("--sample", prompt)]
    run(pipeline("sd3-medium"), *of, *given, "--out", tmp_path / "given.png")
    run(pipeline("sd3-medium"), *of, "--sample", PROMPTS[0], "--out", tmp_path / "single.png")
    others = [tmp_path / "given-1.png", tmp_path / "given-2.png", tmp_path / "given-3.png"]
    drawn = [pixels(file) for file in files]
    assert all(alike(x, pixels(file)) for x, file in zip(drawn, others))
    assert alike(drawn[0], pixels(tmp_path / "single.png")) and not alike(drawn[0], drawn[1])


def test_a_folder_or_a_png_holds_the_pictures(pipeline, run, monkeypatch, tmp_path):
    """The grid beside the pictures of a .png shows the first eight."""
    monkeypatch.chdir(tmp_path)
    columns = []
    monkeypatch.setattr(sid_fm, "plot_images", lambda file, rows, prompts: columns.append(len(prompts)))
    (tmp_path / "nine.txt").write_text("\n".join(f"{i} foxes" for i in range(9)))
    for out, sample in {"one": "a fox", ".": "a fox", "grid.png": "@nine.txt"}.items():
        run(pipeline("sd3-medium"), "--steps", 1, "--sample", sample, "--out", out)
    pictures = {"one/00001.png", "00001.png", *(f"grid-{i}.png" for i in range(1, 10))}
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.png")} == pictures and columns == [8]


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_more_lines_than_a_stretch_are_encoded_a_stretch_at_a_time(pipeline, run, monkeypatch, tmp_path, who):
    """The text encoders have left whenever the network is there, and the pictures are the same."""
    of = ["--student", pipeline("sd3-medium")] if who == "student" else []
    happened, prompts = [], f"@{tmp_path / 'prompts.txt'}"
    run(pipeline("sd3-medium"), *of, "--sample", prompts, "--out", tmp_path / "whole")

    def noted(owner, name, what):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: happened.append(what(*args)) or original(*args))

    noted(sid_fm.Teacher, "encode_prompts", lambda teacher, prompts, *_: prompts)
    noted(sid_fm.Teacher, "forget_text", lambda teacher: "text leaves")
    noted(sid_fm, "to_device", lambda net, *_: f"{type(net).__name__} comes")
    noted(sid_fm.MMDiT, "to", lambda net, where: f"to {where}")
    monkeypatch.setattr(sid_fm, "STRETCH", 2)
    run(pipeline("sd3-medium"), *of, "--sample", prompts, "--out", tmp_path / "stretches")
    first = [["a red fox", "two ships"], "text leaves", "MMDiT comes"]
    second = ["to cpu", ["a small robot"], "text leaves", "MMDiT comes"]
    assert happened == ["AutoencoderKL comes", *[[""]] * (who == "teacher"), *first, *second]
    for file in (tmp_path / "whole").iterdir():
        assert alike(pixels(file), pixels(tmp_path / "stretches" / file.name))


@pytest.mark.parametrize("given", ["--out", "by default"])
def test_the_folder_s_name_may_have_a_dot(copied, run, monkeypatch, tmp_path, given):
    """As a teacher's name has, which is the default's."""
    monkeypatch.chdir(tmp_path)
    teacher = copied("sd3-medium").rename(tmp_path / "sd3.5-medium")
    out = ["--out", "drawn-0.5"] if given == "--out" else []
    sample = ["--sample", "@prompts.txt", "--sample", "a fox", *out]
    run(teacher, *sample, leave_out=["--out"])
    folder = tmp_path / (out[-1] if out else "runs/sd3.5-medium-samples")
    assert {file.name for file in folder.iterdir()} == {f"0000{i}.png" for i in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    "kind, says",
    [("a picture", "name of a .png"), ("a file", "--out"), ("missing", "nowhere.txt"), ("empty", "no prompt")],
)
def test_samples_of_a_file_that_cannot_be_are_one_line(pipeline, ended, tmp_path, kind, says):
    (tmp_path / "empty.txt").write_text("\n\n")
    file = {"missing": "nowhere.txt", "empty": "empty.txt"}.get(kind, "prompts.txt")
    out = {"a picture": "fox.jpg", "a file": "prompts.txt"}.get(kind, "drawn")
    line = ended(pipeline("sd3-medium"), "--sample", f"@{tmp_path / file}", "--out", tmp_path / out)
    assert says in line and not [*tmp_path.rglob("*.png")]
    assert not (tmp_path / "drawn").exists() and not (tmp_path / "fox.jpg").exists()
