"""Chapter 8 of sid_fm.py: adapters, precision, memory, many processes, and runs that survive."""

import copy
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from pipelines import randomise
from safetensors.torch import load_file
from torch.multiprocessing import spawn
from torch.utils._python_dispatch import TorchDispatchMode

import sid_fm

SCRIPT = Path(sid_fm.__file__)
# fmt: off
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 4}
NETWORKS = {
    "sd3": (sid_fm.SD3, HEADS | {"in_channels": 4, "num_layers": 2, "joint_attention_dim": 24, "pooled_projection_dim": 24,
                                 "pos_embed_max_size": 4}),
    "flux": (sid_fm.FLUX1, {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "num_layers": 1,
                            "num_single_layers": 2, "joint_attention_dim": 24, "pooled_projection_dim": 24,
                            "axes_dims_rope": [4, 6, 6]}),
    "sana": (sid_fm.SANA, HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
                                   "caption_channels": 24}),
}
# fmt: on


def network(name, dtype=torch.float32):
    pipeline, config = NETWORKS[name]
    family = sid_fm.PIPELINES[pipeline]
    return randomise(sid_fm.build(family.backbone, sid_fm.network_config(family, config)), seed=1).to(dtype)


def inputs(n, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    cond = {"text": torch.randn(n, 5, 24, generator=rng), "pooled": torch.randn(n, 24, generator=rng)}
    x_t, t = torch.randn(n, 4, 4, 4, generator=rng), torch.rand(n, generator=rng)
    return x_t.to(dtype), t.to(dtype), {key: x.to(dtype) for key, x in cond.items()}


def adam(net, lr=1e-3, **options):
    return sid_fm.Float32Adam(sid_fm.trainable_weights(net), lr, beta2=0.99, **options)


def run_iterations(nets, optimizers, iters, rows=4, part=slice(None), rng=None, dtype=torch.float32, **options):
    """A few iterations of guided distillation; part: which rows of each global batch are this process's."""

    def batches():
        for i in itertools.count():
            yield {key: x[part] for key, x in inputs(rows, dtype, seed=i)[2].items()}, None

    uncond = inputs(1, dtype, seed=99)[2]
    shape = (len(range(rows)[part]), 4, 4, 4)
    rng = rng or torch.Generator().manual_seed(5)
    return list(
        sid_fm.distill(
            *nets, optimizers, batches(), shape, guidance=2.0, uncond=uncond, iters=iters, rng=rng, **options
        )
    )


# ----------------------------------------------------------------------------------------------------------------------
# Adapters
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_adapters_start_at_the_teacher_and_share_its_weights(name):
    net = network(name)
    twins = [sid_fm.adapt(net, rank=3) for _ in range(2)]
    x_t, t, cond = inputs(3)
    for twin in twins:
        assert torch.equal(twin(x_t, t, cond), net(x_t, t, cond))
        own = {x.data_ptr() for x in sid_fm.trainable_weights(twin)}
        assert {x.data_ptr() for x in twin.parameters()} - own == {x.data_ptr() for x in net.parameters()}
        assert not own & {x.data_ptr() for x in net.parameters()}
    linear = [m for b in sid_fm.blocks_of(net) for m in b.modules() if type(m) is torch.nn.Linear]
    assert len(sid_fm.trainable_weights(twins[0])) == 2 * len(linear) > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_distilled_adapters_are_merged_and_open_in_diffusers(name, tmp_path):
    """Only adapters move; merged = unmerged; diffusers' own LoRA loader on the teacher gives the same network."""
    teacher = network(name)
    before = copy.deepcopy(teacher.state_dict())
    torch.manual_seed(0)
    student, fake = sid_fm.adapt(teacher, 3), sid_fm.adapt(teacher, 3)
    measured = run_iterations((teacher, student, fake), (adam(student, 1e-2), adam(fake, 1e-2)), 5)
    assert measured[-1]["fisher"] > 0
    assert all(torch.equal(x, before[key]) for key, x in teacher.state_dict().items())
    x_t, t, cond = inputs(3)
    v = student(x_t, t, cond)
    assert (v - teacher(x_t, t, cond)).abs().max() > 1e-3
    sid_fm.save_student(student, None, tmp_path / "student")
    sid_fm.save_student(teacher, None, tmp_path / "teacher")
    assert (tmp_path / "student" / "pytorch_lora_weights.safetensors").is_file()
    sid_fm.save_student(teacher, None, tmp_path / "again")
    sid_fm.save_student(student, None, tmp_path / "again")
    sid_fm.save_student(teacher, None, tmp_path / "again")
    assert not (tmp_path / "again" / "pytorch_lora_weights.safetensors").exists()  # another student's
    kind = type(teacher)
    merged = sid_fm.fill_part(*sid_fm.open_part(kind, tmp_path / "student"), "cpu", torch.float32)
    torch.testing.assert_close(merged(x_t, t, cond), v, rtol=1e-4, atol=1e-5)
    oracle = getattr(diffusers, teacher.config["_class_name"])
    theirs = oracle.from_pretrained(tmp_path / "student").state_dict()
    adapted = oracle.from_pretrained(tmp_path / "teacher")
    adapted.load_lora_adapter(
        tmp_path / "student", prefix="transformer", weight_name="pytorch_lora_weights.safetensors"
    )
    adapted.fuse_lora()
    adapted.unload_lora()
    for key, x in adapted.state_dict().items():
        torch.testing.assert_close(x, theirs[key], rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Precision and memory
# ----------------------------------------------------------------------------------------------------------------------


def test_small_updates_are_kept_where_bf16_weights_lose_them():
    """Adam at a rate of 1e-5: bf16 weights of order one stand still under torch's, and behind ours all copies move."""
    for kind in (partial(torch.optim.Adam, betas=(0.0, 0.999), fused=True), sid_fm.Float32Adam):
        net = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            net.weight.uniform_(0.5, 1)
        before = net.weight.detach().clone()
        optimizer = kind(net.parameters(), lr=1e-5)
        for i in range(20):
            y = net(torch.randn(8, 64, generator=torch.Generator().manual_seed(i)).bfloat16())
            y.float().square().sum().backward()
            sid_fm.take_step(optimizer)
        assert torch.equal(net.weight, before)  # 20 updates of 1e-5 are less than a rounding
    copied = optimizer.state[net.weight]["copy"]
    assert copied.dtype == torch.float32 and torch.equal(copied.bfloat16(), net.weight)
    assert (copied != before.float()).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_adam_is_adam_in_half_the_memory(dtype):
    nets = [network("sd3", dtype) for _ in range(2)]
    ours = sid_fm.Float32Adam(nets[0].parameters(), lr=1e-3, beta2=0.9)
    theirs = torch.optim.Adam(nets[1].parameters(), lr=1e-3, betas=(0.0, 0.9), fused=True)
    for i in range(4):
        for net, optimizer in zip(nets, (ours, theirs)):
            net(*inputs(2, dtype, seed=i)).square().sum().backward()
            sid_fm.take_step(optimizer)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-9)
    trained = [w for w, state in ours.state.items() if state["step"] > 0]
    moments = [
        sum(x.numel() for w in net.parameters() for x in optimizer.state[w].values() if x.ndim)
        for net, optimizer in zip(nets, (ours, theirs))
    ]
    assert sum(w.numel() for w in trained) * 2 == moments[1] and moments[0] == sum(w.numel() for w in ours.state)


def test_float32_adam_in_bf16_steps_as_it_does_in_float32():
    """From the same gradients, the copies behind bf16 weights take the steps that float32 weights take."""
    narrow, wide = network("sd3").bfloat16(), network("sd3").bfloat16().float()
    optimizers = [adam(net) for net in (narrow, wide)]
    for i in range(3):
        narrow(*inputs(2, seed=i)).square().sum().backward()
        for a, b in zip(narrow.parameters(), wide.parameters()):
            b.grad = None if a.grad is None else a.grad.float()
        for optimizer in optimizers:
            sid_fm.take_step(optimizer)
    for a, b in zip(narrow.parameters(), wide.parameters()):
        assert torch.equal(optimizers[0].state[a]["copy"], b) and torch.equal(a, b.bfloat16())


def test_gradients_of_many_parts_are_added_up_in_float32():
    """256 parts of a batch in bf16, against the batch as one: sums in bf16 are percents off, sums in float32 are not."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 32, generator=rng).bfloat16(), torch.randn(256, 16, generator=rng).bfloat16()
    start = torch.nn.Linear(32, 16, dtype=torch.bfloat16)

    def gradient(net, optimizer):
        for a, b in zip(x, y):
            ((net(a) + b).float().square().sum() / 256).backward()
        return optimizer.state[net.weight].get("gradient", net.weight.grad).double()

    exact = copy.deepcopy(start).double()
    ((exact(x.double()) + y.double()).square().sum() / 256).backward()
    errors = []
    for accumulate in (False, True):
        net = copy.deepcopy(start)
        found = gradient(net, sid_fm.Float32Adam(net.parameters(), lr=1e-3, accumulate=accumulate))
        errors.append(float((found - exact.weight.grad).norm() / exact.weight.grad.norm()))
        assert (net.weight.grad is None) == accumulate
    assert errors[0] > 0.01 and errors[1] < 0.005, errors


@pytest.mark.parametrize("name", NETWORKS)
def test_a_student_computes_what_its_bf16_teacher_computes(name):
    """To the bit, at the start, data-free and data-aided; and an update makes them differ."""
    teacher = network(name).bfloat16()
    student = copy.deepcopy(teacher)
    x_t, t, cond = inputs(2)
    for a, b in zip(teacher(x_t, t, cond, features=True), student(x_t, t, cond, features=True)):
        assert torch.equal(a, b) and a.dtype == torch.float32
    optimizer = adam(student)
    student(x_t, t, cond).square().sum().backward()
    sid_fm.take_step(optimizer)
    assert not torch.equal(student(x_t, t, cond), teacher(x_t, t, cond))


def evaluate(net, x, t, cond):
    """|v|^2, and the bytes that autograd holds for its gradient, weights apart."""
    tensors, weights = {}, {p.data_ptr() for p in net.parameters()}

    def keep(y):
        if y.data_ptr() not in weights:
            tensors[y.untyped_storage().data_ptr()] = y
        return y

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
        loss = net(x, t, cond).square().sum()
    return loss, sum(y.untyped_storage().nbytes() for y in tensors.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_blocks_give_the_same_gradients_from_less_memory(name):
    plain, recomputed = network(name), network(name)
    sid_fm.recompute_blocks(recomputed)
    x_t, t, cond = inputs(2)
    gradients, kept = [], []
    for net in (plain, recomputed):
        loss, size = evaluate(net, x_t.clone().requires_grad_(), t, cond)
        kept.append(size)
        loss.backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert kept[1] < kept[0] / 2
    meta, less = sid_fm.kept_by_autograd(
        *(copy.deepcopy(plain).to("meta"), x_t.to("meta"), {k: x.to("meta") for k, x in cond.items()})
    )
    assert 0.7 * kept[0] < meta < 1.5 * kept[0] and less < meta


def test_memory_counts_every_copy_and_every_token():
    outline = sid_fm.describe("sd3-medium", True)
    shape, dtype = (1, 16, 8, 8), torch.bfloat16
    one, three = (sid_fm.memory_needed(outline, shape, dtype, rank=4, world=2, copies=n) for n in (1, 3))
    weights = sum(p.numel() for p in outline.dit.parameters())
    assert three["weights"] - one["weights"] == 2 * 2 * weights / 2  # two more, of two bytes, over two processes
    few = sid_fm.memory_needed(outline, shape, dtype, rank=4, tokens=3)["activations"]
    more = sid_fm.memory_needed(outline, shape, dtype, rank=4, tokens=6)["activations"]
    assert 1.005 * few < more < 1.1 * few  # 77 tokens of CLIP, and 16 of the image, stay
    # Fused attention keeps no N x N weights: what is kept grows with the image's tokens, here 1, 1024 and 4096.
    smallest, small, large = (
        sid_fm.memory_needed(outline, (1, 16, n, n), dtype, tokens=1)["activations"] for n in (2, 64, 128)
    )
    assert (large - smallest) / (small - smallest) == pytest.approx(4095 / 1023, rel=1e-6)
    cond = sid_fm.random_conditions(outline.family, ["a fox"], torch.empty(0), tokens=3)
    assert cond["text"].shape == (1, 77 + 3, 4096) and cond["pooled"].shape == (1, 2048)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("family", NETWORKS)
def test_compiled_blocks_compute_the_same(family):
    """Outputs and every gradient, blocks recomputed or not."""
    net = network(family)
    x_t, t, cond = inputs(2)
    expected = net(x_t.requires_grad_(), t, cond)
    wanted = torch.autograd.grad(expected.square().sum(), [x_t, *net.parameters()], allow_unused=True)
    largest = max(x.abs().max() for x in wanted if x is not None)
    for recomputed in (False, True):
        twin = copy.deepcopy(net)
        if recomputed:
            sid_fm.recompute_blocks(twin)
        sid_fm.compile_blocks(twin)
        torch._dynamo.utils.counters.clear()
        v = twin(x_t, t, cond)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(v.square().sum(), [x_t, *twin.parameters()], allow_unused=True)
        for a, b in zip(found, wanted):
            assert (a is None) == (b is None)
            if b is not None:
                assert (a - b).abs().max() <= 1e-5 * largest  # keys' biases have no gradient but rounding


# ----------------------------------------------------------------------------------------------------------------------
# Updates that are not finite
# ----------------------------------------------------------------------------------------------------------------------


OURS = partial(sid_fm.Float32Adam, accumulate=True)
THEIRS = partial(torch.optim.Adam, betas=(0.5, 0.9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [OURS, partial(THEIRS, fused=True), partial(THEIRS, fused=False)])
def test_an_update_without_a_finite_gradient_is_skipped(kind, dtype):
    net = torch.nn.Linear(3, 2, dtype=dtype)
    optimizer = kind(net.parameters(), lr=0.1)
    for factor, skipped in ((1.0, 0), (float("nan"), 1), (float("inf"), 1), (1.0, 0)):
        before = copy.deepcopy((net.state_dict(), optimizer.state_dict()["state"]))
        (factor * net(torch.ones(4, 3, dtype=dtype))).sum().backward()
        assert sid_fm.take_step(optimizer) == skipped
        same = torch.equal(net.weight, before[0]["weight"])
        assert same == bool(skipped)
        if skipped:
            for i, state in optimizer.state_dict()["state"].items():
                assert all(torch.equal(x, before[1][i][key]) for key, x in state.items())


def test_a_bad_batch_is_skipped_and_training_goes_on():
    teacher = network("sd3")
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    good = (inputs(4)[2], None)
    bad = ({key: x * float("inf") for key, x in good[0].items()}, None)
    seen = []
    loop = sid_fm.distill(
        teacher, student, fake, (adam(student), adam(fake)), [good, bad, good], (4, 4, 4, 4), rng=torch.Generator()
    )
    for measured in loop:
        seen.append((float(measured["skipped"]), torch.cat([p.flatten() for p in student.parameters()]).clone()))
    assert [skipped for skipped, _ in seen] == [0, 2, 0]
    assert torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[1][1], seen[2][1])


class HostReads(TorchDispatchMode):
    """Lists the operations whose result the host waits for on a GPU: a value, or a shape that depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags:
            self.seen.append(str(function))
        return function(*args, **kwargs or {})

    def __enter__(self):
        self.seen = []
        return super().__enter__()


@pytest.mark.parametrize("data", [False, True], ids=["data-free", "data-aided"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_host_reads_nothing_in_an_iteration(name, data):
    """With Float32Adam; torch's that is not fused must know whether to step."""
    teacher = network(name)
    for kind in (adam, lambda net: torch.optim.Adam(net.parameters(), fused=False)):
        student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
        x_t, _, cond = inputs(2)
        batches = [(cond, x_t if data else None)] * 3
        options = {"guidance": 2.0, "uncond": inputs(1, seed=99)[2], "warmup": (2, 4), "rng": torch.Generator()}
        optimizers = kind(student), kind(fake)
        with HostReads() as reads:
            assert len(list(sid_fm.distill(teacher, student, fake, optimizers, batches, x_t.shape, **options))) == 3
        assert bool(reads.seen) == (kind is not adam), reads.seen


# ----------------------------------------------------------------------------------------------------------------------
# Many processes
# ----------------------------------------------------------------------------------------------------------------------


def distilled(lora, loss, shard=None, part=slice(None), rng=None):
    """Losses of 5 iterations in float64 and the student's weights after them; batches of 4 come twice an iteration."""
    teacher = network("sd3", torch.float64)
    torch.manual_seed(0)
    make = (lambda net: sid_fm.adapt(net, 3)) if lora else copy.deepcopy
    nets = [teacher, make(teacher), make(teacher)]
    if shard:
        nets = [shard(net) for net in nets]
    options = {"part": part, "rng": rng, "accumulate": 2, "dtype": torch.float64, "loss": loss}
    measured = run_iterations(nets, [adam(net) for net in nets[1:]], 5, **options)
    losses = torch.stack([torch.stack([m["fake_loss"], m["fisher"], m["loss"]]) for m in measured])
    return losses, sid_fm.plain_weights(nets[1])[0], [m["images"] for m in measured]


def one_of_two(rank, port, lora, loss, folder):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo")
    rng = sid_fm.SharedGenerator()
    rng.rank, rng.world = rank, 2
    part = slice(2 * rank, 2 * rank + 2)
    losses, weights, images = distilled(lora, loss, lambda net: sid_fm.shard(net, "cpu"), part, rng.manual_seed(5))
    torch.distributed.all_reduce(losses)
    if rank == 0:
        torch.save((losses / 2, weights, images), folder / "result.pt")
    sid_fm.leave()


@pytest.mark.parametrize(
    "lora, loss",
    [(False, "sid"), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((True, "sid"), (False, "dmd")))],
)
def test_two_processes_equal_one(lora, loss, tmp_path):
    rng = sid_fm.SharedGenerator().manual_seed(5)
    losses, weights, images = distilled(lora, loss, rng=rng)
    spawn(one_of_two, (29600 + random.randrange(300), lora, loss, tmp_path), nprocs=2)
    theirs, their_weights, their_images = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(theirs, losses, rtol=1e-9, atol=1e-9)
    assert images == their_images == [8, 16, 24, 32, 40]
    assert weights.keys() == their_weights.keys()
    for key, x in weights.items():
        torch.testing.assert_close(their_weights[key], x, rtol=0, atol=1e-7)


def test_every_item_is_taken_once_a_round_and_processes_share_a_round_without_overlap():
    one = sid_fm.taken(0, 30, 10, seed=3)
    assert all(sorted(one[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert one[:10] != one[10:20] and one != sid_fm.taken(0, 30, 10, seed=4)
    assert one == [i for place in range(0, 30, 5) for i in sid_fm.taken(place, 5, 10, seed=3)]


def test_draws_of_processes_are_rows_of_one():
    def draw(rank, world):
        rng = sid_fm.SharedGenerator()
        rng.rank, rng.world = rank, world
        rng.manual_seed(3)
        x = torch.empty(4 // world, 2)
        return torch.cat([sid_fm.noise_like(x, rng), sid_fm.sample_times(4 // world, None, rng=rng)[:, None]], 1)

    assert torch.equal(torch.cat([draw(0, 2), draw(1, 2)]), draw(0, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Runs that survive
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(pipeline, tmp_path):
    """command(out, *arguments) -> the arguments of a run of 12 iterations on a tiny SANA that saves every 4."""
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo ships\na small robot\n")
    (tmp_path / "instruction.txt").write_text("A photograph of ")

    def command(out, *arguments):
        fixed = f"--iters 12 --batch 2 --accumulate 1 --resolution 32 --save-every 4 --lr 1e-3 --tokens 16 --device cpu --out {tmp_path / out}"
        files = f"--teacher {pipeline('sana')} --prompts {tmp_path / 'prompts.txt'} --instruction {tmp_path / 'instruction.txt'}"
        return [*fixed.split(), *files.split(), *map(str, arguments)]

    return command


@pytest.fixture
def quiet(monkeypatch):
    """Leaves out the pictures."""
    monkeypatch.setattr(sid_fm, "draw_samples", lambda *args: None)
    monkeypatch.setattr(sid_fm, "draw_losses", lambda *args: None)


def assert_same_run(one, other):
    """Student, log, weights, moments and random states, bit for bit."""
    name = "diffusion_pytorch_model.safetensors"
    assert (one / "student" / name).read_bytes() == (other / "student" / name).read_bytes()
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    notes = [json.loads((out / "state" / "state.json").read_text()) for out in (one, other)]
    assert notes[0] == notes[1] and notes[0]["iteration"] == 12
    for role in ("student", "fake"):
        states = [load_file(out / "state" / "0000012" / f"0-{role}.safetensors") for out in (one, other)]
        assert states[0].keys() == states[1].keys() and any("exp_avg_sq" in key for key in states[0])
        assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())
    assert [path.name for path in (other / "state").iterdir() if path.is_dir()] == ["0000012"]


def test_adapters_train_on_one_copy_of_the_weights(command, quiet, monkeypatch):
    """Teacher, student and fake network of a run with --lora, and a run without."""
    given = []
    monkeypatch.setattr(sid_fm, "distill", lambda *args, **kwargs: given.append(args[:3]) or iter(()))
    sid_fm.main(command("adapters", "--lora", 2))
    sid_fm.main(command("full"))
    for nets, shared in zip(given, (True, False)):
        places = [{x.data_ptr() for x in net.parameters()} for net in nets]
        assert all((places[0] <= other) == shared and bool(places[0] & other) == shared for other in places[1:])


def signal_at(monkeypatch, iteration, number):
    distill = sid_fm.distill

    def loop(*args, **kwargs):
        for measured in distill(*args, **kwargs):
            if measured["iteration"] == iteration:
                os.kill(os.getpid(), number)
            yield measured

    monkeypatch.setattr(sid_fm, "distill", loop)


@pytest.mark.parametrize("lora", [(), ("--lora", 2)], ids=["full", "adapters"])
def test_a_stopped_run_resumes_to_the_same_numbers(command, quiet, monkeypatch, tmp_path, capsys, lora):
    sid_fm.main(command("whole", *lora))
    for number, at in ((signal.SIGINT, 2), (signal.SIGTERM, 9)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
            signal_at(patch, at, number)
            sid_fm.main(command("stopped", *lora, *["--resume"] * (at > 2)))
        assert error.value.code == 128 + number
        said = capsys.readouterr().err
        assert f"stopped after iteration {at + 1}, which is saved" in said and said.rstrip().endswith("--resume")
    sid_fm.main(command("stopped", *lora, "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_that_comes_twice_at_once_counts_once(monkeypatch):
    """torchrun passes on what its processes have got themselves. Two seconds later it is meant."""
    now = [100.0]
    monkeypatch.setattr(sid_fm.time, "monotonic", lambda: now[0])
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a shell's background job ignore it
    try:
        with sid_fm.signals() as stop:
            signal.raise_signal(signal.SIGINT)
            now[0] += 1.5
            signal.raise_signal(signal.SIGTERM)
            assert [number for number, _ in stop] == [signal.SIGINT, signal.SIGTERM]
            now[0] += 1.5
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_longer_run_goes_on_as_it_began(command, quiet, monkeypatch, tmp_path):
    """Composed prompts and waiting times are those of the length that was asked for first."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (90 * i, 40, 40)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    given, composed, distill, compose = [], [], sid_fm.distill, sid_fm.compose
    monkeypatch.setattr(sid_fm, "distill", lambda *args, **options: given.append(options) or distill(*args, **options))
    monkeypatch.setattr(sid_fm, "compose", lambda *args: composed.append(args) or compose(*args))
    for source in (["--data", str(folder)], []):
        for more in (["--iters", 12], ["--iters", 15, "--resume"]):
            arguments = command(f"run{len(source)}", *more)
            at = arguments.index("--prompts")
            sid_fm.main(arguments[:at] + arguments[at + 2 :] + source)
    waits = [(options["iters"], options["warmup"]) for options in given]
    assert waits[:2] == [(12, (2, 4)), (15, (2, 4))]
    assert composed == [(24, 0), (24, 0)]


def refused(capsys, arguments, status=2):
    with pytest.raises(SystemExit) as error:
        sid_fm.main(arguments)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == status
    return line


def test_resuming_what_cannot_be_resumed(command, quiet, capsys, tmp_path):
    assert "holds no state" in refused(capsys, command("none", "--resume"))
    sid_fm.main(command("run"))
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "holds the state of a run" in refused(capsys, command("run"))  # --resume forgotten: nothing of it is lost
    assert (tmp_path / "run" / "log.jsonl").read_text() == log and log
    assert "--alpha was 1.0" in refused(capsys, command("run", "--resume", "--alpha", 0.5))
    prompts = (tmp_path / "prompts.txt").read_text()
    (tmp_path / "prompts.txt").write_text(prompts + "a tall house\n")
    assert "other settings: other prompts" in refused(capsys, command("run", "--resume"))
    (tmp_path / "prompts.txt").write_text(prompts)
    notes = tmp_path / "run" / "state" / "state.json"
    notes.write_text(notes.read_text().replace('"processes": 1', '"processes": 3'))
    assert "3 processes" in refused(capsys, command("run", "--resume"))
    notes.write_text(notes.read_text().replace('"processes": 3', '"processes": 1'))
    file = tmp_path / "run" / "state" / "0000012" / "0-fake.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "can't be read" in refused(capsys, command("run", "--resume"))
    arguments = (tmp_path / "run" / "args.json").read_text()
    assert "--iters 3" in refused(capsys, command("run", "--resume", "--iters", 3))  # of twelve that it has had
    assert (tmp_path / "run" / "args.json").read_text() == arguments
    former = json.loads(notes.read_text())
    notes.write_text(json.dumps(former | {"settings": former["settings"] | {"device": "cuda"}}))
    assert "--device was cuda" in refused(capsys, command("run", "--resume"))  # whose random state is another kind
    notes.write_text("{}")
    assert "is no state of a run" in refused(capsys, command("run", "--resume"))


def test_a_full_disk_keeps_the_last_good_state(command, quiet, monkeypatch, capsys, tmp_path):
    import safetensors.torch

    sid_fm.main(command("whole"))
    save_file = safetensors.torch.save_file

    def full(tensors, file, **options):
        if "0000008" in str(file):
            Path(file).write_bytes(b"part")
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, file, **options)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        assert "disk is full" in refused(capsys, command("full"), status=1)
    assert not [*(tmp_path / "full").rglob("*.part")]
    assert json.loads((tmp_path / "full" / "state" / "state.json").read_text())["iteration"] == 4
    sid_fm.main(command("full", "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "full")


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_as_if_it_had_not_been(command, tmp_path):
    def start(out, *arguments):
        return subprocess.Popen([sys.executable, SCRIPT, *command(out, *arguments)], stderr=subprocess.DEVNULL)

    assert start("whole", "--save-every", 1).wait() == 0
    rng, kills, out = random.Random(0), 0, tmp_path / "killed"
    while kills < 20:
        state = (out / "state" / "state.json").exists()
        process = start("killed", "--save-every", 1, *["--resume"] * state)
        while not (out / "cache").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(3, 8) if kills % 2 else rng.uniform(5, 6))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert start("killed", "--save-every", 1, "--resume").wait() == 0
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
def test_torchrun_distils_saves_and_resumes(command, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port",
        "29950",
        str(SCRIPT),
    ]
    for arguments in (["--iters", 4], ["--resume"]):
        done = subprocess.run([*launch, *command("run", *arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "run"
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(12)) and rows[-1]["images"] == 48
    assert sorted(path.name for path in (out / "state" / "0000012").iterdir()) == [
        f"{rank}-{role}.safetensors" for rank in (0, 1) for role in ("fake", "student")
    ]
    student = diffusers.SanaTransformer2DModel.from_pretrained(out / "student")
    assert all(x.isfinite().all() for x in student.parameters())
    done = subprocess.run(
        [sys.executable, SCRIPT, *command("run", "--resume")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "2 processes and this one has 1" in done.stderr


SIGNALLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import sid_fm
distill = sid_fm.distill
def loop(*args, **options):
    for measured in distill(*args, **options):
        if measured["iteration"] == 2 and options["start"] == 0 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM), os.kill(os.getppid(), signal.SIGTERM)
        yield measured
sid_fm.distill = loop
sid_fm.main()
"""


@pytest.mark.slow
def test_torchrun_that_is_stopped_saves_at_once_and_resumes_to_the_same_numbers(command, tmp_path):
    """The signal reaches one process of two and torchrun, which passes it on to both, long before iteration 10."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(folder=str(SCRIPT.parent)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", "29951", "--"]

    def start(script, *arguments):
        return subprocess.run([*launch, str(script), *arguments], capture_output=True, text=True, check=False)

    stopped = start(script, *command("stopped"))
    assert "stopped after iteration 3, which is saved" in stopped.stderr and stopped.returncode, stopped.stderr[-2000:]
    assert "torchrun --nproc_per_node=2 -- sid_fm.py" in stopped.stderr
    assert json.loads((tmp_path / "stopped" / "state" / "state.json").read_text())["iteration"] == 3
    for arguments in (command("stopped", "--resume"), command("whole")):
        done = start(SCRIPT, *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("stopped", "whole")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 12
    (tmp_path / "whole" / "state" / "0000012" / "1-student.safetensors").write_bytes(b"no weights")
    bad = start(SCRIPT, *command("whole", "--resume"))  # of the second process alone
    assert bad.returncode and bad.stderr.count("can't be read") == 1 and "[rank" not in bad.stderr, bad.stderr
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes(b"no image")
    (tmp_path / "data" / "0.txt").write_text("a fox")
    arguments = command("bad", "--data", tmp_path / "data")
    at = arguments.index("--prompts")
    bad = start(SCRIPT, *arguments[:at], *arguments[at + 2 :])
    assert bad.returncode and bad.stderr.count("can't be read as an image") == 1, bad.stderr
    assert "[rank" not in bad.stderr and "SIGABRT" not in bad.stderr, bad.stderr  # no process' traceback
