"""dit_tiny.py: pictures are read back without error, measures against closed forms, and the whole of it in miniature."""

import contextlib
import errno
import json
import math
import sys
from pathlib import Path
from unittest import mock

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dit_tiny
import sid_fm

CLASSES = {name: sid_fm.PIPELINES[pipeline].backbone_class for name, pipeline in dit_tiny.NETWORKS.items()}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def scenes():
    return dit_tiny.draw_scenes(2000, rng())


@pytest.fixture(scope="module")
def pictures(scenes):
    return dit_tiny.render(scenes)


def test_every_picture_of_the_data_is_read_as_its_caption(scenes, pictures):
    right = dit_tiny.accuracy(dit_tiny.read_objects(pictures), scenes)
    assert all(value.nanmean() == 1 for value in right.values())
    assert 0 < right["relation"].isnan().float().mean() < 1


def test_larger_pictures_show_the_same_scenes(scenes):
    some = dit_tiny.Scenes(*(x[:300] for x in scenes))
    pictures = dit_tiny.render(some, 64)
    assert pictures.shape == (300, 3, 64, 64)
    found = dit_tiny.read_objects(pictures)
    assert dit_tiny.accuracy(found, some)["all"].mean() == 1
    one = (some.count == 1)[found.picture]
    # As below, by the size of a pixel: 24 / 64 of the scene's unit
    assert (found.radius - some.radius[:, 0][found.picture])[one].abs().max() < 0.15 * 24 / 64
    assert (found.centre - some.centre[:, 0][found.picture])[one].abs().max() < 0.15 * 24 / 64
    small = dit_tiny.render(some)
    # 8 x 8 pixels of the one and 3 x 3 of the other stand for the same place. Of an edge's pixels, 8 of 64 and 3 of 9, the
    # cover is off by an eighth at most, and the contrast is 1.8 at most.
    shown, large = (torch.nn.functional.adaptive_avg_pool2d(x, 8) for x in (small, pictures))
    assert (shown - large).abs().max() < 1.8 / 8 * (8 / 64 + 3 / 9)


@pytest.mark.parametrize("size", [24, 64])
def test_the_autoencoder_keeps_what_is_read(size, scenes):
    scenes = dit_tiny.Scenes(*(x[:400] for x in scenes))
    pictures = dit_tiny.render(scenes, size)
    autoencoder = dit_tiny.Autoencoder(size)
    latents = autoencoder.encode(pictures)
    assert latents.shape[1:] == dit_tiny.latent_shape(size)
    right = dit_tiny.accuracy(dit_tiny.read_objects(autoencoder.decode(latents)), scenes)
    assert right["all"].mean() > 0.99
    torch.testing.assert_close(autoencoder.encode(autoencoder.decode(latents)), latents, atol=1e-4, rtol=0)


def test_a_wrong_picture_fails_in_the_category_that_is_wrong(scenes, pictures):
    def score(**change):
        drawn = dit_tiny.render(scenes._replace(**change))
        return {k: v.nanmean() for k, v in dit_tiny.accuracy(dit_tiny.read_objects(drawn), scenes).items()}

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


def test_captions_say_what_is_drawn():
    scenes = dit_tiny.Scenes(
        count=torch.tensor([1, 2, 2]),
        relation=torch.tensor([-1, -1, 1]),
        colour=torch.tensor([[0, 1], [1, 1], [2, 0]]),
        shape=torch.tensor([[0, 0], [1, 1], [2, 1]]),
        radius=torch.full((3, 2), 4.0),
        centre=torch.tensor([[[6.0, 6.0], [6.0, 6.0]], [[6.0, 6.0], [18.0, 6.0]], [[18.0, 6.0], [6.0, 18.0]]]),
    )
    texts = ["red circle", "two green squares", "blue triangle above red square"]
    assert dit_tiny.captions(scenes) == texts
    assert dit_tiny.accuracy(dit_tiny.read_objects(dit_tiny.render(scenes)), scenes)["all"].tolist() == [1, 1, 1]
    cond = dit_tiny.encode_text([*texts, ""])
    assert cond["mask"].sum(1).tolist() == [2, 3, 5, 1]
    assert len({tuple(row) for row in cond["pooled"].tolist()}) == 4


def test_every_caption_has_its_own_encoding():
    texts = sorted(set(dit_tiny.captions(dit_tiny.draw_scenes(20_000, rng()))))
    assert len(texts) == 9 + 9 + 2 * 6 * 9  # one object, two alike, two colours of two shapes in two relations
    assert len({tuple(row) for row in dit_tiny.encode_text(texts)["pooled"].tolist()}) == len(texts)


def test_sizes_and_centres_are_read_to_a_fraction_of_a_pixel(scenes, pictures):
    found = dit_tiny.read_objects(pictures)
    one = (scenes.count == 1)[found.picture]
    radius, centre = (x[:, 0][found.picture] for x in (scenes.radius, scenes.centre))
    # Coverage by distance is off at corners and slanted edges, by an eighth of a pixel at most: over a whole edge, less.
    assert (found.radius - radius)[one].abs().max() < 0.15 and (found.centre - centre)[one].abs().max() < 0.15
    assert (found.centre - centre)[one].square().mean().sqrt() < 0.03


def test_diversity_is_the_entropy(scenes, pictures):
    bins = dit_tiny.where_drawn(dit_tiny.read_objects(pictures), scenes)
    one = scenes.count == 1
    assert torch.equal(bins[:, 0] >= 0, one)
    true = torch.cat([scenes.radius[:, :1] - 4, scenes.centre[:, 0] - 12], 1)
    wrong = (bins != (true > 0)) & one[:, None]
    assert wrong[one].float().mean() < 0.03 and true[wrong].abs().max() < 0.15  # what is as good as in the middle
    scenes = dit_tiny.draw_scenes(40_000, rng())
    caption, one = scenes.colour[:, 0] * 3 + scenes.shape[:, 0], scenes.count[:, None] == 1
    every = torch.where(one, torch.cat([scenes.radius[:, :1] > 4, scenes.centre[:, 0] > 12], 1).long(), -1)
    # Each of 27 entropies, of n = 1778 draws, is log 2 - chi^2 / 2n, corrected on average: a standard error of
    # 1 / (sqrt(2) n) nats, and less in their means.
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
    assert dit_tiny.frechet(x, mean, covariance) == pytest.approx(0, abs=1e-9)
    # of a shift by d, |d|^2; of a scaling by c, (c - 1)^2 tr C
    assert dit_tiny.frechet(x + 0.5, mean, covariance) == pytest.approx(64 * 0.25, rel=1e-9)
    assert dit_tiny.frechet(3 * (x - mean) + mean, mean, covariance) == pytest.approx(4 * float(covariance.trace()))


def test_fresh_pictures_of_the_same_captions(scenes):
    fresh = dit_tiny.draw_again(scenes, rng(1))
    assert dit_tiny.captions(fresh) == dit_tiny.captions(scenes)
    right = dit_tiny.accuracy(dit_tiny.read_objects(dit_tiny.render(fresh)), scenes)
    assert all(value.nanmean() == 1 for value in right.values())
    assert (fresh.centre != scenes.centre).all() and (fresh.radius != scenes.radius).all()


@pytest.mark.parametrize("arch", dit_tiny.NETWORKS)
def test_networks_open_in_diffusers(arch, tmp_path):
    net = dit_tiny.build(arch, 0)
    x, cond = torch.randn(2, *dit_tiny.latent_shape()), dit_tiny.encode_text(["red circle", ""])
    assert net(x, torch.rand(2), cond).abs().max() == 0
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    sid_fm.save_student(net, None, tmp_path / "net")
    oracle = getattr(diffusers, CLASSES[arch]).from_pretrained(tmp_path / "net")
    ours = dit_tiny.open_network(arch, tmp_path / "net")
    assert sum(p.numel() for p in oracle.parameters()) == sum(p.numel() for p in ours.parameters())
    x, t, cond = (
        torch.randn(2, *dit_tiny.latent_shape()),
        torch.rand(2),
        dit_tiny.encode_text(["red circle", "two blue squares"]),
    )
    assert torch.equal(ours(x, t, cond), net(x, t, cond))
    if arch == "mmdit":
        theirs = oracle(x, cond["text"], cond["pooled"], 1000 * t).sample
        torch.testing.assert_close(ours(x, t, cond), theirs, rtol=1e-4, atol=1e-4)


def main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["dit_tiny.py", *map(str, args)])
    dit_tiny.main()


def test_adapters_learn_on_a_frozen_teacher():
    """Data-free, then data-aided from there: only adapters move, and the plain weights of the student are the merged."""
    teacher = dit_tiny.build("mmdit", seed=0)
    for weight in teacher.parameters():
        torch.nn.init.normal_(weight, std=0.05, generator=rng())
    settings = {"loss": "sid", "alpha": 1.0, "weight": "1-t", "noise": "fresh", "guidance": 1.0, "steps": 2, "lora": 3}
    runs = [None]
    for start in ("data-free", "data-aided"):
        runs.append(dit_tiny.distil(teacher, dit_tiny.Autoencoder(), 6, 0, lambda x: None, start=runs[-1], **settings))
    before, students = teacher.state_dict(), [run.student for run in runs[1:]]
    for student in students:
        own = dict(student.named_parameters())
        assert all(torch.equal(own[key], x) for key, x in teacher.named_parameters() if key in own)
        weights, adapters = sid_fm.plain_weights(student)
        moved = {key for key, x in weights.items() if not torch.equal(x, before[key])}
        adapted = {f"{key.split('.', 1)[1].rpartition('.lora_')[0]}.weight" for key in adapters}
        # The last block's text tokens ask nobody: what their queries are has no effect.
        assert weights.keys() == before.keys() and adapted - moved == {"transformer_blocks.3.attn.add_q_proj.weight"}
        assert moved < adapted
    first, second = (sid_fm.plain_weights(student)[1] for student in students)
    assert any(not torch.equal(x, second[key]) for key, x in first.items())


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
    for name in ("samples.png", "convergence.png", "guidance.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    for name in ("teacher", "sid-4-step", "sid-one-step", "sid-4-step-data-aided"):
        diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / name)
    before = (tmp_path / "teacher" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    dit_tiny.prepare_teacher(dit_tiny.parse(), dit_tiny.Autoencoder())
    assert (tmp_path / "teacher" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    assert "the one in" in capsys.readouterr().out


@pytest.mark.parametrize("arch", dit_tiny.NETWORKS)
def test_the_larger_preset_trains_and_is_distilled(arch):
    """Its pictures, its depth and its kind of head, in a narrow network and for a moment."""
    preset, autoencoder = dit_tiny.PRESETS["gpu"]._replace(heads=1, batch=4), dit_tiny.Autoencoder(64)
    net, losses = dit_tiny.build(arch, 0, preset), []
    assert net.config["num_layers"] + net.config.get("num_single_layers", 0) == 8
    with dit_tiny.workers("teacher", 2) as (submit, _):
        teacher = dit_tiny.train_teacher(net, autoencoder, preset, 2, 0, submit, losses.append)
    # The output starts at zero, and the loss a number at |e - x_0|^2: 2 where latents have unit variance.
    assert len(losses) == 2 and 1 < losses[0] < 3
    settings = {"loss": "sid", "alpha": 1.0, "weight": "1-t", "noise": "fresh", "guidance": 1.0, "steps": 2}
    run = dit_tiny.distil(teacher, autoencoder, 2, 0, lambda x: None, preset=preset, **settings)
    z, cond = (
        torch.randn(2, *dit_tiny.latent_shape(64), generator=rng()),
        dit_tiny.encode_text(["red circle", "two blue squares"]),
    )
    pictures = autoencoder.decode(sid_fm.generate(run.student, z, cond, steps=2, rng=rng()))
    assert pictures.shape == (2, 3, 64, 64) and pictures.isfinite().all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("options", [("--preset", "gpu"), ("--device", "cuda")])
def test_a_machine_without_a_gpu_is_one_line(options, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--out", tmp_path / "out", *options)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "--device cpu" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [("--arch", "unet"), ("--steps", "0"), ("--samples", "1"), ("--lora", "1000")])
def test_bad_input_is_one_line(wrong, monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, "--out", tmp_path / "out", *wrong)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and not Path(tmp_path / "out").exists()


def random_network():
    net = dit_tiny.build("mmdit", 0)
    with torch.no_grad():
        for w in net.parameters():
            w.copy_(0.1 * torch.randn(w.shape, generator=rng(w.numel())))
    return net


def test_the_seed_fixes_adapters_whatever_else_is_drawn():
    net, preset, students = random_network(), dit_tiny.LAPTOP._replace(batch=4), []
    for _ in range(2):
        torch.rand(7)
        ended = dit_tiny.distil(net, dit_tiny.Autoencoder(), 3, 0, lambda _: None, lora=2, preset=preset, steps=2)
        students.append(ended.student.state_dict())
    assert any("lora_A" in key for key in students[0])
    assert all(torch.equal(x, students[1][key]) for key, x in students[0].items())


class FakeGraph(TorchDispatchMode):
    """What CUDA's graphs do, on a CPU: the operations of a recording run again on the same tensors, and no line of Python
    between them. The recording itself counts as the first run."""

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert torch.Tag.data_dependent_output not in function.tags, f"{function}: the host reads a value"
        outputs = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, outputs))
        return outputs

    def register_generator_state(self, generator):
        pass

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, outputs in self.operations if self.replays > 1 else ():
            for old, new in zip(tree_leaves(outputs), tree_leaves(function(*args, **kwargs)), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def trained(device, monkeypatch, recorded, data):
    """The weights that a teacher, or a student, has after some iterations, and what was said on the way."""
    if not recorded:
        monkeypatch.setattr(dit_tiny, "Recorded", lambda iteration, rng: lambda kind, *inputs: iteration(*inputs))
    preset = dit_tiny.LAPTOP._replace(batch=4)
    autoencoder, net, said = dit_tiny.Autoencoder(device=device), random_network().to(device), []
    if data is None:
        net = dit_tiny.train_teacher(net, autoencoder, preset, 6, 0, lambda f, *args: f(*args), said.append)
        return [*net.parameters()], said
    options = {"steps": 2, "guidance": 1.5, "preset": preset}
    ended = dit_tiny.distil(net, autoencoder, 9, 0, said.append, **options)
    if data:
        ended = dit_tiny.distil(net, autoencoder, 40, 0, said.append, start=ended, **options)
    return [*ended.student.parameters(), *ended.fake.parameters()], said


@pytest.mark.parametrize("data", [None, False, True], ids=["teacher", "data-free", "data-aided"])
def test_what_is_recorded_follows_from_its_kind(data, monkeypatch):
    """On a CPU that takes itself for a GPU: to the bit."""
    graphs = []

    @contextlib.contextmanager
    def record(graph, pool, stream):
        graphs.append(graph)
        with graph:
            yield

    def adam(weights, rate, betas):
        return torch.optim.Adam(weights, lr=torch.tensor(rate), betas=betas, fused=True)

    monkeypatch.setattr(torch, "cuda", mock.MagicMock(CUDAGraph=FakeGraph, graph=record, is_available=bool))
    monkeypatch.setattr(dit_tiny, "on_device", lambda x, _: x)
    monkeypatch.setattr(dit_tiny, "adam", adam)
    got, said = trained("cpu:0", monkeypatch, True, data)
    # Of each k one data-free; data-aided one while the student waits (of k = 2 once, which is not recorded), follows
    # L_alpha alone, and follows both losses
    assert len(graphs) == {None: 1, False: 2, True: 7}[data] and all(graph.replays for graph in graphs)
    expected, said_then = trained("cpu:0", monkeypatch, False, data)
    assert all(torch.equal(a, b) for a, b in zip([*got, *said], [*expected, *said_then], strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("data", [None, False, True], ids=["teacher", "data-free", "data-aided"])
def test_recorded_iterations_are_the_iterations(data, monkeypatch):
    got, said = trained("cuda", monkeypatch, True, data)
    expected, said_then = trained("cuda", monkeypatch, False, data)
    # An iteration moves weights by about their rate, 3e-4 to 5e-3 (data-aided students 1e-4): other noise or another rate
    # would show in one. Libraries may choose other kernels for a recording, which round differently.
    for a, b in zip([*got, *said], [*expected, *said_then], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_full_disk_is_one_line(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "argv", ["dit_tiny.py", "--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(dit_tiny, "run", full)
    with pytest.raises(SystemExit) as error:
        dit_tiny.main()
    assert error.value.code == 1 and "the disk is full" in capsys.readouterr().err
