"""dit_tiny.py: pictures are read back without error, and measures agree with closed forms."""

import argparse
import json
import math
import sys
from unittest import mock

import diffusers
import pytest
import torch
from networks import saved_weights

import dit_tiny
import sid_fm


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes():
    return dit_tiny.sample_scenes(1000, rng())


@pytest.fixture(scope="module")
def pictures(scenes):
    return dit_tiny.render(scenes)


def test_every_picture_of_the_data_is_read_as_its_caption(scenes, pictures):
    right = dit_tiny.accuracy(dit_tiny.read_objects(pictures), scenes)
    assert all(value.nanmean() == 1 for value in right.values())
    assert 0 < right["relation"].isnan().float().mean() < 1


def test_the_autoencoder_keeps_what_is_read(scenes, pictures):
    latents = dit_tiny.encode_pictures(pictures)
    assert latents.shape[1:] == dit_tiny.LATENT
    decoded = dit_tiny.decode_latents(latents)
    assert dit_tiny.accuracy(dit_tiny.read_objects(decoded), scenes)["all"].mean() > 0.99
    torch.testing.assert_close(dit_tiny.encode_pictures(decoded), latents, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        latents.movedim(1, -1).flatten(0, 2).T.cov(), torch.eye(dit_tiny.CHANNELS), atol=0.1, rtol=0
    )


def test_a_wrong_picture_fails_in_the_category_that_is_wrong(scenes, pictures):
    def score(**change):
        changed = dit_tiny.render(scenes._replace(**change))
        return {k: v.nanmean() for k, v in dit_tiny.accuracy(dit_tiny.read_objects(changed), scenes).items()}

    other = score(shape=(scenes.shape + 1) % 3)
    assert other["object"] < 0.2 and other["all"] == 0 and other["colour"] == other["count"] == other["relation"] == 1
    other = score(colour=(scenes.colour + 1) % 3)
    assert other["all"] == 0 and other["object"] == other["count"] == 1
    other = score(count=torch.ones_like(scenes.count))  # the second of two left out
    assert other["count"] == other["all"] == (scenes.count == 1).float().mean()
    other = score(centre=scenes.centre.flip(1))
    assert other["relation"] == 0 and other["count"] > 0.5
    noise = dit_tiny.accuracy(
        dit_tiny.read_objects(torch.randn(100, 3, dit_tiny.SIZE, dit_tiny.SIZE, generator=rng())),
        dit_tiny.Scenes(*(x[:100] for x in scenes)),
    )
    assert noise["all"].sum() == 0
    blank = dit_tiny.read_objects(dit_tiny.PALETTE[0][:, None, None].expand(3, 3, dit_tiny.SIZE, dit_tiny.SIZE))
    assert len(blank.picture) == 0


def test_captions_say_what_pictures_show():
    scenes = dit_tiny.Scenes(
        count=torch.tensor([1, 2, 2]),
        relation=torch.tensor([-1, -1, 1]),
        colour=torch.tensor([[0, 1], [1, 1], [2, 0]]),
        shape=torch.tensor([[0, 0], [1, 1], [2, 1]]),
        radius=torch.full((3, 2), 4.0),
        centre=torch.tensor([[[6.0, 6.0], [6.0, 6.0]], [[6.0, 6.0], [18.0, 6.0]], [[18.0, 6.0], [6.0, 18.0]]]),
    )
    texts = ["red circle", "two green squares", "blue triangle above red square"]
    assert dit_tiny.write_captions(scenes) == texts
    assert dit_tiny.accuracy(dit_tiny.read_objects(dit_tiny.render(scenes)), scenes)["all"].tolist() == [1, 1, 1]
    cond = dit_tiny.encode_text([*texts, ""])
    assert cond["mask"].sum(1).tolist() == [2, 3, 5, 1]
    assert len({tuple(row) for row in cond["pooled"].tolist()}) == 4


def test_every_caption_has_its_own_encoding():
    texts = sorted(set(dit_tiny.write_captions(dit_tiny.sample_scenes(20_000, rng()))))
    assert len(texts) == 9 + 9 + 2 * 6 * 9  # one object, two alike, a relation
    assert len({tuple(row) for row in dit_tiny.encode_text(texts)["pooled"].tolist()}) == len(texts)


def test_sizes_and_centres_are_read_to_a_fraction_of_a_pixel(scenes, pictures):
    found = dit_tiny.read_objects(pictures)
    one = (scenes.count == 1)[found.picture]
    radius, centre = (x[:, 0][found.picture] for x in (scenes.radius, scenes.centre))
    # At corners and slanted edges the coverage is wrong by a fifth of a pixel at most.
    assert (found.radius - radius)[one].abs().max() < 0.2 and (found.centre - centre)[one].abs().max() < 0.2
    assert (found.centre - centre)[one].square().mean().sqrt() < 0.03


def test_diversity_is_the_entropy(scenes, pictures):
    bins = dit_tiny.size_and_position(dit_tiny.read_objects(pictures), scenes)
    one = scenes.count == 1
    assert torch.equal(bins[:, 0] >= 0, one)
    middle = sum(dit_tiny.RADII) / 2
    true = torch.cat([scenes.radius[:, :1] - middle, scenes.centre[:, 0] - 12], 1)
    wrong = (bins != (true > 0)) & one[:, None]
    # What is read wrong is almost in the middle.
    assert wrong[one].float().mean() < 0.03 and true[wrong].abs().max() < 0.15
    scenes = dit_tiny.sample_scenes(40_000, rng())
    caption, one = scenes.colour[:, 0] * 3 + scenes.shape[:, 0], scenes.count[:, None] == 1
    every = torch.where(one, torch.cat([scenes.radius[:, :1] > middle, scenes.centre[:, 0] > 12], 1).long(), -1)
    # Each of 27 entropies, from n = 1778 samples, is log 2 - chi^2 / 2n, corrected on average. Its
    # standard error is 1 / (sqrt(2) n) nats; that of their means is smaller.
    assert dit_tiny.diversity(every, caption) == pytest.approx(3, abs=0.005)
    odds = torch.tensor([0.5, 0.9, 0.99])
    uneven = torch.where(one, (torch.rand(40_000, 3, generator=rng()) < odds).long(), -1)
    exact = sum(-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in odds.tolist())
    # Here the error is |log(p / (1 - p))| sqrt(p (1 - p) / 9n), 0.0075 bits, 0.0052 bits.
    assert dit_tiny.diversity(uneven, caption) == pytest.approx(exact, abs=4 * 0.0092)
    collapsed = torch.where(one, torch.tensor([1, 0, 1]), -1)
    assert dit_tiny.diversity(collapsed, caption) == 0


def test_the_frechet_distance_is_the_closed_form():
    x = torch.randn(500, 64, generator=rng(), dtype=torch.float64)
    mean, covariance = x.mean(0), x.T.cov()
    assert dit_tiny.frechet_distance(x, mean, covariance) == pytest.approx(0, abs=1e-9)
    # of a shift by d, |d|^2; of a scaling by c, (c - 1)^2 tr C
    assert dit_tiny.frechet_distance(x + 0.5, mean, covariance) == pytest.approx(64 * 0.25, rel=1e-9)
    assert dit_tiny.frechet_distance(3 * (x - mean) + mean, mean, covariance) == pytest.approx(
        4 * float(covariance.trace())
    )


def test_measurements_and_their_intervals():
    """A sampler that returns data, about one picture in seven with wrong colours."""
    measure = dit_tiny.PictureMeasure(2000, seed=0)
    wrong = torch.rand(2000, generator=rng()) < 1 / 7
    colour = torch.where(wrong[:, None], (measure.scenes.colour + 1) % 3, measure.scenes.colour)
    latents = dit_tiny.encode_pictures(dit_tiny.render(measure.scenes._replace(colour=colour)))
    rows = iter(latents.split(250))
    pictures, scores = measure.sample(lambda z, cond: next(rows), 2000, mock.MagicMock())
    torch.testing.assert_close(pictures, dit_tiny.decode_latents(latents))
    value, half = scores["all"]
    assert value == pytest.approx(1 - float(wrong.float().mean()), abs=0.01)
    # The jackknife of 20 groups knows a standard error to 1 / sqrt(2 x 19) = 16% of it.
    assert half == pytest.approx(1.96 * math.sqrt(value * (1 - value) / 2000), rel=5 * 0.16)
    distance, half = scores["frechet"]
    assert distance < 0.02 and half < 0.01 and scores["diversity"][0] == pytest.approx(3, abs=0.1)


def test_the_captions_of_a_batch_describe_its_data():
    """Those that come with the pictures; the others are of other scenes."""
    cond, (real, real_cond) = next(dit_tiny.caption_batches(seed=3, device="cpu", data=True))
    generator = rng(3)
    scenes, shown = (dit_tiny.sample_scenes(dit_tiny.BATCH_SIZE, generator) for _ in range(2))
    assert torch.equal(cond["text"], dit_tiny.encode_text(dit_tiny.write_captions(scenes))["text"])
    assert torch.equal(real_cond["text"], dit_tiny.encode_text(dit_tiny.write_captions(shown))["text"])
    found = dit_tiny.read_objects(dit_tiny.decode_latents(real))
    right, wrong = (dit_tiny.accuracy(found, some)["all"].mean() for some in (shown, scenes))
    assert right > 0.95 and wrong < 0.2
    cond_alone, none = next(dit_tiny.caption_batches(seed=3, device="cpu"))
    assert none is None and torch.equal(cond_alone["text"], cond["text"])


@pytest.mark.parametrize("arch", dit_tiny.NETWORKS)
def test_networks_open_in_diffusers(arch, tmp_path):
    net, (kind, config) = dit_tiny.tiny_network(arch, 0), dit_tiny.NETWORKS[arch]
    x, t = torch.randn(2, *dit_tiny.LATENT, generator=rng()), torch.rand(2, generator=rng())
    cond = dit_tiny.encode_text(["red circle", "two blue squares"])
    assert net(x, t, cond).abs().max() == 0
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=rng())
    sid_fm.save_student(net, None, tmp_path / "net")
    oracle = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path / "net")
    ours = sid_fm.load_network(tmp_path / "net", kind, "cpu", torch.float32)
    assert sum(p.numel() for p in oracle.parameters()) == sum(p.numel() for p in ours.parameters())
    v = ours(x, t, cond)
    assert torch.equal(v, net(x, t, cond))
    if arch == "mmdit":
        expected = oracle(x, cond["text"], cond["pooled"], 1000 * t).sample
    elif arch == "sana":
        expected = oracle(x, cond["text"], 1000 * t, encoder_attention_mask=cond["mask"]).sample
    else:
        return  # diffusers' network takes packed tokens: tests/test_backbones.py compares it
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-4)


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["dit_tiny.py", *map(str, args)])
    dit_tiny.main()


def random_teacher():
    net = dit_tiny.tiny_network("mmdit", 0)
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.05, generator=rng())
    return net.requires_grad_(False)


SETTINGS = {"loss": "sid", "alpha": 1.0, "weight": "1-t", "noise": "fresh", "guidance": 1.0, "device": "cpu"}
SETTINGS |= {"sid_scale": 100.0, "discriminator_scale": 1.0}


def students(teacher, monkeypatch, **settings):
    monkeypatch.setattr(dit_tiny, "BATCH_SIZE", 4)
    return dit_tiny.tiny_students(
        argparse.Namespace(**SETTINGS | {"steps": 2, "seed": 0, "iters": 6} | settings), teacher
    )


def test_adapters_learn_on_a_frozen_teacher(monkeypatch):
    """Only adapters move, data-free and data-aided. Plain weights have the adapters merged."""
    teacher = random_teacher()
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    for result in (runs := students(teacher, monkeypatch, lora=3)):
        own = dict(result.student.named_parameters())
        assert all(torch.equal(own[key], before[key]) for key in before if key in own)
        weights, adapters = saved_weights(result.student)
        moved = {key for key, x in weights.items() if not torch.equal(x, before[key])}
        adapted = {f"{key.split('.', 1)[1].rpartition('.lora_')[0]}.weight" for key in adapters}
        # No image token attends to the last block's text queries, so these have no effect.
        assert weights.keys() == before.keys() and adapted - moved == {"transformer_blocks.3.attn.add_q_proj.weight"}
        assert moved < adapted
    free, aided = (saved_weights(result.student)[1] for result in runs[:2])
    assert any(not torch.equal(x, aided[key]) for key, x in free.items())
    assert "discriminator" in runs[1].log and "discriminator" not in runs[0].log


@pytest.mark.parametrize("lora", [None, 2])
def test_the_seed_fixes_the_students(lora, monkeypatch):
    """The two jobs run at the same time, and other random numbers are sampled meanwhile."""
    teacher, results = random_teacher(), []
    for _ in range(2):
        torch.rand(7)
        results.append([result.student.state_dict() for result in students(teacher, monkeypatch, lora=lora)])
    assert any("lora_A" in key for key in results[0][0]) == bool(lora)
    for first, second in zip(*results, strict=True):
        assert all(torch.equal(x, second[key]) for key, x in first.items())


def test_the_data_aided_student_waits(monkeypatch):
    """A tenth of its phase: with 4 iterations of 4 pictures the first one moves nothing."""
    steps = []
    take_step = sid_fm.take_step
    monkeypatch.setattr(sid_fm, "take_step", lambda optimizer: steps.append(optimizer) or take_step(optimizer))
    monkeypatch.setattr(
        dit_tiny, "run_jobs", lambda jobs: {name: job(mock.MagicMock()) for name, (_, job) in jobs.items()}
    )
    _, aided, _ = students(random_teacher(), monkeypatch, lora=None, iters=12)
    # 8 data-free, 4 data-aided and 12 one-step iterations move two networks, except one that waits.
    assert len(steps) == 2 * (8 + 4 + 12) - 1 and len(aided.log["fisher"]) == 4


def test_the_scales_are_those_of_the_data_aided_student(monkeypatch):
    seen, distill = [], sid_fm.distill

    def watched(*args, **options):
        seen.append((options.get("sid_scale"), options.get("discriminator_scale"), next(args[4])[1] is not None))
        return distill(*args, **options)

    monkeypatch.setattr(sid_fm, "distill", watched)
    students(random_teacher(), monkeypatch, lora=None, iters=3, sid_scale=0.5, discriminator_scale=20.0)
    assert sorted(seen, key=str) == [(0.5, 20.0, True), (None, None, False), (None, None, False)]


@pytest.mark.slow
def test_the_whole_of_it_in_miniature(monkeypatch, tmp_path, capsys):
    arguments = ("--teacher-iters", 300, "--iters", 60, "--samples", 200, "--out", tmp_path)
    main(monkeypatch, *arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    table = results["table"]
    assert table["data"]["all"][0] == 1
    assert results["discriminator"] == pytest.approx(math.log(2), abs=0.1)
    for student in ("SiD one-step, 1 step", "SiD 4-step, 4 steps"):
        assert table[student]["all"][0] - table[student]["all"][1] > table["teacher, 1 step"]["all"][0]
        assert table[student]["frechet"][0] < table["teacher, 1 step"]["frechet"][0]
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    for name in ("teacher", "sid-4-step", "sid-one-step", "sid-4-step-data-aided"):
        diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / name)
    before = (tmp_path / "teacher" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    settings = {"arch": "mmdit", "teacher_iters": 300, "seed": 0, "device": "cpu", "out": tmp_path}
    dit_tiny.load_or_train_teacher(argparse.Namespace(**settings))
    assert (tmp_path / "teacher" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    assert "the one in" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--out", tmp_path / "out", "--device", "cuda")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "--device cpu" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [("--arch", "unet"), ("--steps", "0"), ("--samples", "1"), ("--lora", "1000")])
def test_bad_input_is_one_line(wrong, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--out", tmp_path / "out", *wrong)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_student_that_diverges_is_one_line(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--alpha", "1e30", "--teacher-iters", 3, "--iters", 6, "--samples", 100, "--out", tmp_path)
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "diverged" in message and "alpha 1e+30" in message


def test_what_guidance_does_in_each_place_is_a_run_of_its_own(monkeypatch, tmp_path, capsys):
    """Six triples by three seeds; the table has each one's median and range, and says of a student
    that diverged that it has no number."""
    seen, teacher = [], random_teacher()

    def distilled(net, student, fake, rates, batches, shape, iters, seed, bar, **options):
        assert net is teacher and student is not fake and options["steps"] == 1 and iters == 2
        seen.append((options["guidance"], seed))
        if options["guidance"] == (0, 0, 1):
            raise FloatingPointError("a student diverged")
        return argparse.Namespace(student=student)

    monkeypatch.setattr(dit_tiny, "load_or_train_teacher", lambda args: teacher)
    monkeypatch.setattr(dit_tiny, "distill_student", distilled)
    main(monkeypatch, "--places", "--guidance", 3, "--iters", 2, "--samples", 100, "--seed", 5, "--out", tmp_path)
    triples = [(1, 1, 1), (3, 3, 3), (1, 1, 3), (1, 3, 3), (0, 0, 1), (-1, -1, 1)]
    assert sorted(seen) == sorted((three, seed) for three in triples for seed in (5, 6, 7))
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("guidance ")) + 1
    rows = lines[start : start + 6]
    assert [row.count("nan") for row in rows] == [0] * 4 + [9, 0]
    assert [line.split()[1] for line in lines[start + 6 : start + 10]] == ["1", "1.5", "2.5", "4.5"]
    assert (tmp_path / "guidance.png").read_bytes().startswith(b"\x89PNG")
    notes = json.loads((tmp_path / "places.json").read_text())["results"]
    middle = sorted(notes[f"nowhere, seed {seed}"][1] for seed in (5, 6, 7))[1]
    assert f"{middle:.3f} (" in rows[1] and rows[2].split("  ")[0] == "teacher alone"
