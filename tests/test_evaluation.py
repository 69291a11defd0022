"""Chapter 9: estimators against double sums and closed forms, CLIP against transformers, and
--evaluate as a user runs it."""

import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from pipelines import randomise, write_clip
from safetensors.torch import load_file

import sid_fm

PROMPTS = ["a red fox in the snow", "two ships on a stormy sea", "a small robot", "a bowl of ripe fruit", "a village"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# Estimators
# ----------------------------------------------------------------------------------------------------------------------


def direct(x, y, sigma):
    """The definition, a pair of different prompts at a time."""

    def mean(a, b):
        k = [
            math.exp(-float((u - v).square().sum()) / (2 * sigma**2))
            for i, row in enumerate(a)
            for j, other in enumerate(b)
            if i != j
            for u in row
            for v in other
        ]
        return sum(k) / len(k)

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_mmd_is_the_double_sum():
    x, y = normal(7, 3, 5), 1.2 * normal(7, 2, 5, seed=1) + 0.3
    for sigma in (0.7, 2.0):
        value, error = sid_fm.mmd(x, y, sigma)
        assert value == pytest.approx(direct(x, y, sigma), abs=1e-12)
        # the jackknife, of the same sums with a prompt left out
        without = [[i for i in range(7) if i != j] for j in range(7)]
        parts = [direct(x[rows], y[rows], sigma) for rows in without]
        assert error == pytest.approx((6 * np.var(parts)) ** 0.5, abs=1e-12)


def test_mmd_of_two_gaussians_and_of_two_halves():
    """E k(x, y) = (sigma^2 / v)^(d / 2) exp(-|difference of means|^2 / 2 v), v = sigma^2 + the sum
    of variances."""
    d, sigma, scale, shift = 4, 1.5, 1.3, 0.4

    def expected(variances, distance=0.0):
        v = sigma**2 + variances
        return (sigma**2 / v) ** (d / 2) * math.exp(-(distance**2) / (2 * v))

    truth = expected(2) + expected(2 * scale**2) - 2 * expected(1 + scale**2, shift * d**0.5)
    for seed in range(3):
        x, y = normal(250, 1, d, seed=seed), scale * normal(250, 1, d, seed=seed + 10) + shift
        value, error = sid_fm.mmd(x, y, sigma=sigma)
        assert abs(value - truth) < 4 * error < truth
        value, error = sid_fm.mmd(x[:125], x[125:], sigma=sigma)
        assert abs(value) < 4 * error


def test_mmd_is_unbiased_and_its_standard_error_is_right():
    """Over 300 small samples: the mean is the truth; seeds of one prompt are alike, and both sides
    share the prompts."""
    values = []
    for i in range(300):
        centre = normal(12, 1, 3, seed=i)
        x, y = (centre + 0.5 * normal(12, 4, 3, seed=1000 * k + i) + k * 0.5 for k in (1, 2))
        values.append(sid_fm.mmd(x, y, sigma=2.0))
    value, error = np.array(values).T
    v = 4 + 2 * 1.25  # each side: 1 of the prompt and 1/4 of the seed
    truth = 2 * (4 / v) ** 1.5 * (1 - math.exp(-0.75 / (2 * v)))
    spread = value.std(ddof=1)
    assert abs(value.mean() - truth) < 4 * spread / 300**0.5
    assert (error**2).mean() ** 0.5 == pytest.approx(
        spread, rel=4 / 600**0.5 + 0.15
    )  # the jackknife errs on the wide side


def test_scores_of_what_is_known():
    text = torch.eye(6)[:4]
    same = text[:, None].expand(4, 3, 6)
    found = sid_fm.scores(same, text, same)
    assert found["clip"] == (1, 0) and found["diversity"] == (0, 0) and found["cmmd"][0] == pytest.approx(0, abs=1e-12)
    apart = torch.eye(6)[torch.tensor([[0, 1, 2], [3, 4, 5], [1, 2, 3], [2, 4, 5]])]
    found = sid_fm.scores(apart, text, same)
    assert found["diversity"] == pytest.approx((2**0.5, 0), abs=1e-6)
    cosine = torch.tensor([1 / 3, 0, 1 / 3, 0])  # a third of the pictures of a prompt is its text
    assert found["clip"] == pytest.approx((float(cosine.mean()), float(cosine.std()) / 2))


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings and samples
# ----------------------------------------------------------------------------------------------------------------------


def test_clip_is_transformers(clip_folder):
    """Of unit length, the cosines that CLIPModel gives as logits; pictures one by one as
    together."""
    clip = sid_fm.CLIP(clip_folder)
    pictures = np.random.default_rng(0).integers(0, 256, (5, 50, 70, 3), dtype=np.uint8)
    x, texts = clip.embed(pictures), clip.embed(prompts=PROMPTS)
    net = transformers.CLIPModel.from_pretrained(clip_folder)
    tokens = transformers.CLIPTokenizer.from_pretrained(clip_folder)(PROMPTS, padding=True, return_tensors="pt")
    # by hand: the short side to 32, the middle, normalised
    with Image.fromarray(pictures[0]) as image:
        square = np.asarray(image.resize((44, 32), Image.BICUBIC))[:, 6:38]
    pixels = clip.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(getattr(clip.processor, name)) for name in ("image_mean", "image_std"))
    torch.testing.assert_close(pixels[0].permute(1, 2, 0), ((torch.from_numpy(square.copy()) / 255) - mean) / std)
    with torch.no_grad():
        out = net(**tokens, pixel_values=pixels)
    torch.testing.assert_close(x @ texts.T, out.logits_per_image / net.logit_scale.exp())
    torch.testing.assert_close(x.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(torch.cat([clip.embed([picture]) for picture in pictures]), x)
    assert clip.embed(prompts=["a very long prompt " * 50]).shape == (1, 24)


@pytest.mark.parametrize("kind", ["CLIP", "MetaClip2"])
def test_any_clip_that_transformers_reads(tmp_path, kind):
    """Here of the shape of ViT-g-14: towers of different widths, GELU, a projection of its own
    width, and a processor under the name that it has in older files; and one of another class."""
    vocab, like = write_clip(tmp_path, pad="!"), {"hidden_act": "gelu", "projection_dim": 12}
    text = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": vocab, "bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": 0}
    vision = {"hidden_size": 44, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14}
    config = getattr(transformers, f"{kind}Config")(text_config=text | like, vision_config=vision | like, **like)
    net = randomise(getattr(transformers, f"{kind}Model")(config), 3)
    net.save_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    options = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28, "resample": 3}
    options |= {f"do_{step}": True for step in ("resize", "center_crop", "normalize", "convert_rgb")}
    options |= {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(options))
    pictures = np.random.default_rng(0).integers(0, 256, (4, 50, 70, 3), dtype=np.uint8)
    ours = sid_fm.CLIP(tmp_path)
    images, texts = (
        getattr(transformers, f"{kind}{tower}ModelWithProjection").from_pretrained(tmp_path).eval()
        for tower in ("Vision", "Text")
    )
    tokens = transformers.CLIPTokenizer.from_pretrained(tmp_path)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        image = images(**processor(images=list(pictures), return_tensors="pt")).image_embeds
        text = texts(**tokens).text_embeds
    assert image.shape == (4, 12) and text.shape == (5, 12) and type(ours.net) is type(net)
    torch.testing.assert_close(ours.embed(pictures), image / image.norm(dim=1, keepdim=True))
    torch.testing.assert_close(ours.embed(prompts=PROMPTS), text / text.norm(dim=1, keepdim=True))


@pytest.fixture(scope="module")
def teacher(pipeline):
    return sid_fm.load_teacher(pipeline("sana"))


def evaluation_of(teacher, clip, prompts, seed=0):
    teacher.tokens, evaluation = 16, sid_fm.Evaluation(teacher, clip, prompts, 4 * len(prompts), seed)
    cond, sampler = sid_fm.encode(prompts, teacher.encode_prompts), partial(sid_fm.generate, teacher.dit, steps=1)
    evaluation.sample_reference(cond, teacher.latent_shape(32), sampler)
    return evaluation


def test_every_sampler_has_the_same_noise_and_no_other_random_number_is_taken(teacher, clip_folder):
    seen = []

    def sampler(z, cond, rng, steps):
        seen.append(z)
        return sid_fm.generate(teacher.dit, z, cond, steps, rng=rng)

    one, two = (partial(sampler, steps=steps) for steps in (1, 2))
    before = torch.random.get_rng_state()
    evaluation = evaluation_of(teacher, clip_folder, PROMPTS)
    x, shown, seconds = evaluation.sample(two, 0, "")
    other, *_ = evaluation.sample(one, 0, "")
    fewer, *_ = evaluation_of(teacher, clip_folder, PROMPTS[:3]).sample(two, 0, "")
    again, *_ = evaluation.sample(two, 1, "")
    assert torch.equal(before, torch.random.get_rng_state())
    assert x.shape == (5, sid_fm.SEEDS, 24) and len(shown) == 5 and shown[0].shape == (32, 32, 3) and seconds > 0
    assert all(torch.equal(a, b) for a, b in zip(seen[:5], seen[5:10])) and not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(fewer, x[:3])
    assert not torch.allclose(x, other) and not torch.allclose(x, again)
    # The reference is the teacher's, from other noise: of the seed that follows.
    torch.testing.assert_close(evaluation.reference, evaluation.sample(one, 1, "")[0])
    scored, *_ = evaluation(two, "")
    assert scored == sid_fm.scores(x, evaluation.clip.embed(prompts=PROMPTS), evaluation.reference)


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "instruction.txt").write_text("A photograph of ")
    return folder


@pytest.fixture
def command(pipeline, clip_folder, files):
    def command(*arguments, prompts=files / "prompts.txt"):
        fixed = (
            f"--teacher {pipeline('sana')} --prompts {prompts} --instruction {files / 'instruction.txt'} --tokens 16"
        )
        fixed += f" --resolution 32 --device cpu --clip {clip_folder}"
        return [*fixed.split(), *map(str, arguments)]

    return command


def metrics(out: Path) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())["rows"]


def test_evaluate_prints_a_table_and_plots_it(command, pipeline, tmp_path, capsys):
    student = pipeline("sana") / "transformer"
    sid_fm.main(command("--student", student, "--evaluate", "--out", tmp_path / "out"))
    rows = metrics(tmp_path / "out")
    assert [(row["model"], row["steps"]) for row in rows] == [("teacher", 20)] + [("student", n) for n in (1, 2, 4)]
    said = capsys.readouterr().out.splitlines()
    assert "20 pictures a row, 4 of a prompt" in said[0] and len(said) == 7
    for row, line in zip(rows, said[2:]):
        numbers = re.findall(r"(?:(?<!\+)-)?\d+\.\d{3,4}", line)
        shown = [f"{x:.4f}" for key in ("clip", "cmmd", "diversity") for x in row[key]] + [f"{row['seconds']:.3f}"]
        assert numbers == shown and all(row[key][1] > 0 for key in ("clip", "cmmd", "diversity"))
    assert abs(rows[0]["cmmd"][0]) < 4 * rows[0]["cmmd"][1]
    with Image.open(tmp_path / "out" / "samples.png") as image:
        assert min(image.size) > 300


def test_prompts_are_those_given_or_composed(command, pipeline, tmp_path, monkeypatch):
    """From a file, else from the grammar, of other keys than training has."""
    seen = []
    monkeypatch.setattr(sid_fm.Evaluation, "sample", lambda self, *of: seen.append(self.prompts) or 1 / 0)
    fixed = command("--student", pipeline("sana") / "transformer", "--evaluate", "--num", 12, "--out", tmp_path)
    at = fixed.index("--prompts")
    for arguments in (fixed, fixed[:at] + fixed[at + 2 :]):
        with pytest.raises(ZeroDivisionError):
            sid_fm.main(arguments)
    assert seen[0] == PROMPTS[:3] and len({*seen[1]}) == 3
    assert not {*seen[1]} & {sid_fm.compose(f"0 {place}") for place in range(1000)}


def test_a_student_s_row_is_its_own(command, pipeline, tmp_path):
    """What is measured is the student, on the noise and prompts that the teacher's row has."""
    arguments = ("--student", pipeline("sana") / "transformer", "--evaluate", "--num", 12)
    sid_fm.main(command(*arguments, "--out", tmp_path / "a"))
    sid_fm.main(command(*arguments, "--out", tmp_path / "b"))
    sid_fm.main(command(*arguments, "--out", tmp_path / "c", "--noise", "ddim"))
    a, b, c = ([{k: v for k, v in row.items() if k != "seconds"} for row in metrics(tmp_path / name)] for name in "abc")
    assert a == b
    # one step and the teacher know no such noise
    assert [x == y for x, y in zip(a, c)] == [True, True, False, False]


@pytest.mark.slow
def test_many_processes_measure_what_one_does(command, pipeline, tmp_path):
    arguments = ("--student", pipeline("sana") / "transformer", "--evaluate")
    sid_fm.main(command(*arguments, "--out", tmp_path / "one"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", "29957"]
    launch += [sid_fm.__file__, *command(*arguments, "--out", tmp_path / "two")]
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("20 pictures a row") == 1
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two")):
        for key in ("clip", "cmmd", "diversity"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6)


TRAIN = ("--iters", 6, "--batch", 2, "--accumulate", 1, "--save-every", 3, "--lr", 1e-3, "--num", 12)


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def quiet(monkeypatch):
    """Leaves out the grids of samples."""
    monkeypatch.setattr(sid_fm, "plot_images", lambda *args: None)


def test_a_run_measures_itself_and_is_the_run_that_it_would_be(command, quiet, tmp_path):
    """--evaluate-every changes no number of the run, and keeps the best student."""
    sid_fm.main(command(*TRAIN, "--out", tmp_path / "plain"))
    assert not (tmp_path / "plain" / "student-best").exists()
    sid_fm.main(command(*TRAIN, "--evaluate-every", 2, "--out", tmp_path / "measured"))
    plain, measured = log(tmp_path / "plain"), log(tmp_path / "measured")
    assert [row["iteration"] for row in measured if "scores" in row] == [1, 3, 5]
    assert [{k: v for k, v in row.items() if k != "scores"} for row in measured] == plain
    ours, theirs = (load_file(tmp_path / name / "student" / WEIGHTS) for name in ("plain", "measured"))
    assert all(torch.equal(x, theirs[key]) for key, x in ours.items())
    for row in (row["scores"] for row in measured if "scores" in row):
        assert row.keys() == {"clip", "cmmd", "diversity"}
        assert all(math.isfinite(x) for pair in row.values() for x in pair)
    with Image.open(tmp_path / "measured" / "loss.png") as image, Image.open(tmp_path / "plain" / "loss.png") as other:
        assert image.height > 1.8 * other.height
    diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "measured" / "student-best")


def test_the_best_student_is_kept_across_a_resumption(command, quiet, tmp_path, monkeypatch):
    """As one whole run: the same scores and the same best student, which is the one of the lowest
    CMMD."""
    found = iter([0.5, 0.2, 0.3, 0.5, 0.2, 0.3])
    monkeypatch.setattr(
        sid_fm, "scores", lambda *args, **kwargs: {"clip": (0, 0), "cmmd": (next(found), 0.1), "diversity": (0, 0)}
    )
    options = (*TRAIN, "--evaluate-every", 2)
    sid_fm.main(command(*options, "--out", tmp_path / "whole"))
    sid_fm.main(command(*options, "--out", tmp_path / "parts", "--iters", 4))
    best = (tmp_path / "parts" / "student-best" / WEIGHTS).read_bytes()
    sid_fm.main(command(*options, "--out", tmp_path / "parts", "--resume"))
    assert log(tmp_path / "whole") == log(tmp_path / "parts")
    for out in ("whole", "parts"):
        assert (tmp_path / out / "student-best" / WEIGHTS).read_bytes() == best
        assert (tmp_path / out / "student" / WEIGHTS).read_bytes() != best


def broken_clip(clip_folder, folder):
    shutil.copytree(clip_folder, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    "wrong",
    [
        "no student",
        "with a sample",
        "few",
        "few prompts",
        "no clip",
        "another network",
        "truncated",
    ],
)
def test_bad_input_is_one_line(command, pipeline, clip_folder, files, tmp_path, capsys, monkeypatch, wrong):
    student, prompts = ["--student", pipeline("sana") / "transformer"], files / "prompts.txt"
    (tmp_path / "two.txt").write_text("a fox\na cat\na fox\n")
    (tmp_path / "none").mkdir()
    arguments, says = {
        "no student": (["--evaluate"], "give --student FOLDER"),
        "with a sample": ([*student, "--evaluate", "--sample", "a fox"], "not allowed with"),
        "few": ([*student, "--evaluate", "--num", 8], "an evaluation needs 3 prompts or more"),
        "few prompts": ([*student, "--evaluate"], "an evaluation needs 3 prompts or more"),
        "no clip": ([*student, "--evaluate", "--clip", "nowhere/clip"], "nowhere/clip can't be had from the Hub"),
        "another network": ([*student, "--evaluate", "--clip", pipeline("sana") / "text_encoder"], "text_encoder"),
        "truncated": (
            lambda: [*student, "--evaluate", "--clip", broken_clip(clip_folder, tmp_path / "clip")],
            "it should hold what transformers calls AutoModel",
        ),
    }[wrong]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if wrong == "no clip":
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    if wrong == "few prompts":
        prompts = tmp_path / "two.txt"
    arguments = arguments() if callable(arguments) else arguments
    with pytest.raises(SystemExit) as stop:
        sid_fm.main(command(*arguments, "--out", tmp_path / "out", prompts=prompts))
    err = [line for line in re.split("[\r\n]+", capsys.readouterr().err) if line.strip() and "%|" not in line]
    err = [line for line in err if not line.endswith("GB of host memory")]
    assert stop.value.code == 2 and len(err) == 1 and says in err[0], err
    assert not [*tmp_path.rglob("metrics.json"), *tmp_path.rglob("*.part"), *tmp_path.rglob("student")]


def unreachable(*args, **kwargs):
    raise OSError("no network")
