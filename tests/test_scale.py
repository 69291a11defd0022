"""Chapter 8 of sid_fm.py: adapters, precision, memory, many processes, and runs that survive."""

import copy
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from networks import FLUX, SANA, SD3, network_config, saved_weights
from PIL import Image
from pipelines import randomise
from safetensors.torch import load_file, save_file
from torch.multiprocessing import spawn
from torch.utils._python_dispatch import TorchDispatchMode

import sid_fm

SCRIPT = Path(sid_fm.__file__)
# fmt: off
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 4}
NETWORKS = {
    "sd3": (SD3, HEADS | {"in_channels": 4, "num_layers": 2, "joint_attention_dim": 24, "pooled_projection_dim": 24,
                                 "pos_embed_max_size": 4}),
    "flux": (FLUX, {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16, "num_layers": 1,
                            "num_single_layers": 2, "joint_attention_dim": 24, "pooled_projection_dim": 24,
                            "axes_dims_rope": [4, 6, 6]}),
    "sana": (SANA, HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_cross_attention_heads": 2,
                                   "caption_channels": 24}),
}
# fmt: on


def network(name, dtype=torch.float32):
    pipeline, config = NETWORKS[name]
    kind = sid_fm.PIPELINES[pipeline][1]
    return randomise(sid_fm.build_network(kind, network_config(pipeline, config)), seed=1).to(dtype)


def inputs(n, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    cond = {"text": torch.randn(n, 5, 24, generator=rng), "pooled": torch.randn(n, 24, generator=rng)}
    x_t, t = torch.randn(n, 4, 4, 4, generator=rng), torch.rand(n, generator=rng)
    return x_t.to(dtype), t.to(dtype), {key: x.to(dtype) for key, x in cond.items()}


def adam(net, lr=1e-3, **options):
    return sid_fm.Float32Adam(sid_fm.trainable_weights(net), lr, beta2=0.99, **options)


def run_iterations(nets, optimizers, iters, rows=4, part=slice(None), rng=None, dtype=torch.float32, **options):
    """A few iterations of guided distillation; part: which rows of each global batch are this
    process's."""

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
    """Only adapters move; merged = unmerged; diffusers' own LoRA loader on the teacher gives the
    same network."""
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
    # another student's
    assert not (tmp_path / "again" / "pytorch_lora_weights.safetensors").exists()
    kind = type(teacher)
    merged = sid_fm.load_network(tmp_path / "student", kind)
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
    """Adam at a rate of 1e-5: bf16 weights of order one stand still under torch's, and behind ours
    all copies move."""
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
    """From the same gradients, the copies behind bf16 weights take the steps that float32 weights
    take."""
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
    """256 parts of a batch in bf16, against the batch as one: sums in bf16 are percents off, sums
    in float32 are not."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 32, generator=rng).bfloat16(), torch.randn(256, 16, generator=rng).bfloat16()
    start = torch.nn.Linear(32, 16, dtype=torch.bfloat16)

    def gradient(net):
        for a, b in zip(x, y):
            ((net(a) + b).float().square().sum() / 256).backward()
        return net.weight.grad

    exact = copy.deepcopy(start).double()
    ((exact(x.double()) + y.double()).square().sum() / 256).backward()
    errors = []
    for accumulate in (False, True):
        net = copy.deepcopy(start)
        sid_fm.Float32Adam(net.parameters(), lr=1e-3, accumulate=accumulate)
        found = gradient(net)
        errors.append(float((found.double() - exact.weight.grad).norm() / exact.weight.grad.norm()))
        assert found.dtype == (torch.float32 if accumulate else torch.bfloat16)
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


@pytest.mark.parametrize("lora", [None, 3], ids=["full", "adapters"])
@pytest.mark.parametrize("dtype, accumulate", [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 4)])
def test_memory_said_is_what_the_networks_and_their_optimizers_hold(lora, dtype, accumulate):
    """Every tensor behind the three networks of a run, counted once, and the gradients of one of
    them."""
    teacher = SimpleNamespace(dit=network("sd3"), device=torch.device("cpu"), dtype=dtype)
    said = sid_fm.training_memory(teacher, lora, accumulate)
    nets = sid_fm.three_networks(teacher, teacher.dit, lora)
    optimizers = [adam(net, accumulate=accumulate > 1) for net in nets]
    weights = [w for net in (teacher.dit, *nets) for w in net.parameters()]
    kept = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values() if x.ndim]
    # the copy of a float32 weight is the weight
    held = {x.data_ptr(): x.nbytes for x in (*weights, *kept)}
    x_t, t, cond = inputs(2)
    nets[0].requires_grad_(False)
    for w in sid_fm.trainable_weights(nets[0]):
        w.requires_grad_(True)
    nets[0](x_t, t, cond).square().sum().backward()
    trained = sid_fm.trainable_weights(nets[0])
    gradients = sum(w.grad.nbytes for w in trained if w.grad is not None)
    unused = sum(w.numel() for w in trained if w.grad is None)
    assert said.pop("gradients") == pytest.approx(gradients + unused * (dtype.itemsize if accumulate == 1 else 4))
    assert sum(said.values()) == sum(held.values())


def test_memory_is_shared_among_processes_and_a_start_elsewhere_is_counted(monkeypatch):
    teacher = SimpleNamespace(dit=network("sd3"), dtype=torch.bfloat16)
    one, other = (sum(sid_fm.training_memory(teacher, 3, 1, start).values()) for start in (False, True))
    weights = sum(w.numel() for w in teacher.dit.parameters())
    assert other - one == 2 * weights
    full = sum(sid_fm.training_memory(teacher, None).values())
    assert full == 24 * weights and sum(sid_fm.training_memory(teacher, None, 4).values()) == 26 * weights
    monkeypatch.setattr(sid_fm, "rank_and_world", lambda: (0, 4))
    assert sum(sid_fm.training_memory(teacher, None).values()) == full / 4


def test_every_block_is_compiled_and_may_recompile_often():
    teacher = SimpleNamespace(dit=network("sd3"), device=torch.device("cpu"), dtype=torch.float32)
    nets = sid_fm.three_networks(teacher, None, None)
    assert not any(block._compiled_call_impl for net in (teacher.dit, *nets) for block in sid_fm.blocks_of(net))
    with torch._dynamo.config.patch(recompile_limit=8):
        nets = sid_fm.three_networks(teacher, None, None, compiled=True)
        assert torch._dynamo.config.recompile_limit == 64
    assert all(block._compiled_call_impl for net in (teacher.dit, *nets) for block in sid_fm.blocks_of(net))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("family", NETWORKS)
def test_compiled_blocks_compute_the_same(family):
    """Outputs and every gradient, blocks recomputed as on a GPU, and of one family not."""
    net = network(family)
    x_t, t, cond = inputs(2)
    expected = net(x_t.requires_grad_(), t, cond)
    wanted = torch.autograd.grad(expected.square().sum(), [x_t, *net.parameters()], allow_unused=True)
    largest = max(x.abs().max() for x in wanted if x is not None)
    for recomputed in (False, True) if family == "sd3" else (True,):
        twin = copy.deepcopy(net)
        if recomputed:
            sid_fm.recompute_blocks(twin)
        for block in sid_fm.blocks_of(twin):
            block.compile()
        torch._dynamo.utils.counters.clear()
        v = twin(x_t, t, cond)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(v.square().sum(), [x_t, *twin.parameters()], allow_unused=True)
        for a, b in zip(found, wanted):
            assert (a is None) == (b is None)
            if b is not None:
                # keys' biases have no gradient but rounding
                assert (a - b).abs().max() <= 1e-5 * largest


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
    """Of the fake network's update, of the generator's, or of both: batches come to them in turn."""
    teacher = network("sd3")
    nets = [copy.deepcopy(teacher) for _ in range(2)]
    good = (inputs(4)[2], None)
    bad = ({key: x * float("inf") for key, x in good[0].items()}, None)
    batches = [good, good, bad, bad, bad, good, good, bad, good, good]
    seen = [[copy.deepcopy(net.state_dict()) for net in nets]]
    skipped = []
    optimizers = [adam(net) for net in nets]
    for measured in sid_fm.distill(teacher, *nets, optimizers, batches, (4, 4, 4, 4), rng=torch.Generator()):
        skipped.append(float(measured["skipped"]))
        seen.append([copy.deepcopy(net.state_dict()) for net in nets])
    assert skipped == [0, 2, 1, 1, 0]

    def moved(before, after):
        return any(not torch.equal(x, after[key]) for key, x in before.items())

    student, fake = ([moved(*pair) for pair in itertools.pairwise(states)] for states in zip(*seen))
    assert student == [True, False, True, False, True] and fake == [True, False, False, True, True]


class HostReads(TorchDispatchMode):
    """Lists the operations whose result the host waits for on a GPU: a value, or a shape that
    depends on values."""

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
        batches = [(cond, (x_t, cond) if data else None), (cond, None)] * 3
        options = {"guidance": 2.0, "uncond": inputs(1, seed=99)[2], "warmup": (2, 4), "rng": torch.Generator()}
        optimizers = kind(student), kind(fake)
        with HostReads() as reads:
            assert len(list(sid_fm.distill(teacher, student, fake, optimizers, batches, x_t.shape, **options))) == 3
        assert bool(reads.seen) == (kind is not adam), reads.seen


@pytest.mark.parametrize("lora, data", [(None, True), (3, False)], ids=["full, data-aided", "adapters, data-free"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_iteration_on_a_device_takes_nothing_from_the_host(name, lora, data):
    """As a GPU has it by default: bf16, recomputed blocks, several parts an update. The device is
    torch's meta: it computes nothing, and refuses tensors of the CPU as a GPU does."""
    dit = network(name).requires_grad_(False)  # as it is loaded
    teacher = SimpleNamespace(dit=dit, device=torch.device("meta"), dtype=torch.bfloat16)
    nets = (*sid_fm.three_networks(teacher, None, lora), teacher.dit)
    for net in nets:
        sid_fm.recompute_blocks(net)
    optimizers = [adam(net, accumulate=True) for net in nets[:2]]
    x_t, _, cond = inputs(2)
    cond = {key: x.to("meta", torch.bfloat16) for key, x in cond.items()}
    batches = [*[(cond, (x_t.to("meta"), cond) if data else None)] * 2, *[(cond, None)] * 2]
    options = {"guidance": 2.0, "uncond": {key: x[:1] for key, x in cond.items()}, "warmup": (0, 0), "accumulate": 2}
    loop = sid_fm.distill(teacher.dit, *nets[:2], optimizers, batches, x_t.shape, rng=torch.Generator(), **options)
    for measured in loop:
        assert {x.device.type for x in measured.values() if isinstance(x, torch.Tensor)} == {"meta"}
    assert measured["iteration"] == 0
    kept = [x for net, optimizer in zip(nets, optimizers) for x in sid_fm.state_of(net, optimizer).values()]
    assert {x.device.type for x in kept} == {"meta"} and {x.dtype for x in kept} == {torch.bfloat16, torch.float32}


# ----------------------------------------------------------------------------------------------------------------------
# Many processes
# ----------------------------------------------------------------------------------------------------------------------


def distilled(lora, loss, shard=None, part=slice(None), rng=None):
    """Losses of 5 iterations in float64 and the student's weights after them; batches of 4 come
    twice an iteration."""
    teacher = network("sd3", torch.float64)
    torch.manual_seed(0)
    make = (lambda net: sid_fm.adapt(net, 3)) if lora else copy.deepcopy
    nets = [teacher, make(teacher), make(teacher)]
    if shard:
        nets = [shard(net) for net in nets]
    options = {"part": part, "rng": rng, "accumulate": 2, "dtype": torch.float64, "loss": loss}
    measured = run_iterations(nets, [adam(net) for net in nets[1:]], 5, **options)
    losses = torch.stack([torch.stack([m["fake_loss"], m["fisher"], m["loss"]]) for m in measured])
    return losses, saved_weights(nets[1])[0], [m["images"] for m in measured]


def one_of_two(rank, port, lora, loss, folder):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo")
    rng = sid_fm.SharedGenerator()
    part = slice(2 * rank, 2 * rank + 2)
    shard = partial(sid_fm.shard, device="cpu", dtype=torch.float64)
    losses, weights, images = distilled(lora, loss, shard, part, rng.manual_seed(5))
    torch.distributed.all_reduce(losses)
    if rank == 0:
        torch.save((losses / 2, weights, images), folder / "result.pt")
    torch.distributed.barrier()  # torch's thread may still hold `losses`, and abort as Python ends
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "lora, loss",
    [(False, "sid"), pytest.param(True, "dmd", marks=pytest.mark.slow)],
)
def test_two_processes_equal_one(lora, loss, tmp_path):
    rng = sid_fm.SharedGenerator().manual_seed(5)
    losses, weights, images = distilled(lora, loss, rng=rng)
    spawn(one_of_two, (29600 + random.randrange(300), lora, loss, tmp_path), nprocs=2)
    theirs, their_weights, their_images = torch.load(tmp_path / "result.pt", weights_only=True)
    assert images == their_images == [8, 16, 24, 32, 40]
    torch.testing.assert_close(theirs, losses, rtol=1e-9, atol=1e-9)
    assert weights.keys() == their_weights.keys()
    for key, x in weights.items():
        torch.testing.assert_close(their_weights[key], x, rtol=0, atol=1e-7)


def inputs_of(monkeypatch, rank, world, prompts, images=(), stretch=8, seed=3, fake_updates=1):
    """The inputs of process `rank` of a run with 2 batches of 12 / world prompts an update."""
    monkeypatch.setattr(sid_fm, "STRETCH", stretch)
    monkeypatch.setattr(sid_fm, "rank_and_world", lambda: (rank, world))
    return sid_fm.Inputs(None, prompts, images, 12 // world, 2, fake_updates, 100, seed)


@pytest.mark.parametrize("fake_updates", [1, 4])
def test_every_prompt_is_taken_once_an_epoch_and_processes_share_an_epoch_without_overlap(monkeypatch, fake_updates):
    """The fake network's batches of images have an order of their own, and so other captions."""
    prompts = [f"prompt {i}" for i in range(60)]
    updates, settings = fake_updates + 1, {"images": [*prompts], "fake_updates": fake_updates}

    def parts(rank, world, images=False, **more):
        run = inputs_of(monkeypatch, rank, world, prompts, **settings | more)
        each = [run.parts(iteration, images) for iteration in range(5)]
        assert [len(some) for some in each] == [2 * (fake_updates if images else updates)] * 5
        return [part for some in each for part in some]

    orders = []
    for images in (False, True):
        one = parts(0, 1, images)
        taken = [i for part in one for i in part]
        assert all(sorted(taken[i : i + 60]) == list(range(60)) for i in range(0, len(taken), 60))
        assert len(taken) >= 120 and taken[:60] != taken[60:120]
        assert parts(0, 1, images, seed=4) != one
        for rank in range(3):  # a third of each batch
            assert parts(rank, 3, images) == [part[4 * rank : 4 * rank + 4] for part in one]
        orders.append(taken)
    assert orders[0][:60] != orders[1][:60]


@pytest.mark.parametrize(
    "fake_updates, stretch, iterations",
    [(1, 8, 8), (1, 480, 10), (1, 481, 11), (5, 8, 8), (5, 1440, 10), (5, 1441, 11)],
)
def test_a_stretch_is_so_many_prompts_or_eight_iterations(monkeypatch, fake_updates, stretch, iterations):
    """And no more prompts than that are encoded once."""
    prompts = 12 * 2 * (fake_updates + 1)  # of an iteration
    options = {"stretch": stretch, "fake_updates": fake_updates}
    assert inputs_of(monkeypatch, 0, 1, [], **options).length == iterations
    for count, once in ((prompts * iterations, True), (prompts * iterations + 1, False), (0, False)):
        assert inputs_of(monkeypatch, 0, 1, ["a fox"] * count, **options).once == once


def test_numbers_of_processes_are_rows_of_one(monkeypatch):
    def sampled(rank, world):
        monkeypatch.setattr(sid_fm, "rank_and_world", lambda: (rank, world))
        rng = sid_fm.SharedGenerator().manual_seed(3)
        x = torch.empty(4 // world, 2)
        return torch.cat([sid_fm.noise_like(x, rng), sid_fm.sample_times(4 // world, None, rng=rng)[:, None]], 1)

    assert torch.equal(torch.cat([sampled(0, 2), sampled(1, 2)]), sampled(0, 1))


def over_stretches(arguments, batch, rank=0, world=1):
    """A whole run in float64, in stretches of 8 iterations, as process `rank` under torchrun."""
    load, prepare, begun = sid_fm.load_teacher, sid_fm.Inputs.prepare, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sid_fm, "load_teacher", lambda name, device, dtype, **how: load(name, device, torch.float64, **how)
        )
        patch.setattr(sid_fm.Inputs, "prepare", lambda self, *args: begun.append(args[0]) or prepare(self, *args))
        patch.setattr(sid_fm, "STRETCH", 16 * batch)  # two updates
        for name in ("plot_images", "plot_log"):
            patch.setattr(sid_fm, name, lambda *args: None)
        if world > 1:
            settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "TORCHELASTIC_RUN_ID": "test"}
            for name, value in settings.items():
                patch.setenv(name, str(value))
        sid_fm.main([*arguments, "--batch", str(batch)])
    assert begun == [0, 8, 16]


def one_of_two_over_stretches(rank, port, arguments):
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    over_stretches(arguments, 1, rank, 2)


@pytest.mark.slow
def test_two_processes_equal_one_over_stretches(command, sources, tmp_path):
    """With data: each process encodes its own share of captions and images, at each of three
    stretches."""
    run = partial(command, source=sources["data"])
    over_stretches(run("one", "--iters", 18), 2)
    spawn(one_of_two_over_stretches, (29500 + random.randrange(90), run("two", "--iters", 18)), nprocs=2)
    results = []
    for out in (tmp_path / "one", tmp_path / "two"):
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert len(rows) == 18 and rows[-1]["images"] == 36
        numbers = torch.tensor([[row[name] for name in ("fake_loss", "fisher", "loss")] for row in rows])
        results.append((numbers, load_file(out / "student" / "diffusion_pytorch_model.safetensors")))
    (numbers, weights), (theirs, their_weights) = results
    torch.testing.assert_close(theirs, numbers, rtol=1e-5, atol=1e-5)  # logs are in float32
    assert {x.dtype for x in weights.values()} == {torch.float64}
    for key, x in weights.items():
        torch.testing.assert_close(their_weights[key], x, rtol=0, atol=1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# Runs that survive
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(pipeline, tmp_path):
    """command(out, *arguments) -> the arguments of a run of 12 iterations on a tiny SANA that saves
    every 4. source: of its prompts, by default a file of 3; a resumed run has the one that it
    had."""
    (tmp_path / "prompts.txt").write_text("a red fox\ntwo ships\na small robot\n")
    (tmp_path / "instruction.txt").write_text("A photograph of ")

    def command(out, *arguments, source=("--prompts", tmp_path / "prompts.txt")):
        fixed = "--iters 12 --batch 2 --accumulate 1 --resolution 32 --save-every 4 --lr 1e-3 --tokens 16 --device cpu"
        files = f"--teacher {pipeline('sana')} --instruction {tmp_path / 'instruction.txt'} --out {tmp_path / out}"
        source = () if "--resume" in arguments else source
        return [*fixed.split(), *files.split(), *map(str, (*source, *arguments))]

    return command


@pytest.fixture
def quiet(monkeypatch):
    """Leaves out the pictures."""
    monkeypatch.setattr(sid_fm, "plot_images", lambda *args: None)
    monkeypatch.setattr(sid_fm, "plot_log", lambda *args: None)


@pytest.fixture
def sources(tmp_path):
    """Files of 40 prompts, and of 40 images with captions: more than the 32 of a stretch of 8
    iterations."""
    (tmp_path / "many.txt").write_text("".join(f"{i} ships\n" for i in range(40)))
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.fromarray(np.full((32, 32, 3), (6 * i, 40, 250 - 6 * i), np.uint8)).save(tmp_path / f"images/{i}.png")
        (tmp_path / f"images/{i}.txt").write_text(f"picture {i}")
    return {"prompts": ("--prompts", tmp_path / "many.txt"), "data": ("--data", tmp_path / "images"), "composed": ()}


def assert_same_run(one, other, iterations=12):
    """Student, log, weights, moments and random states, bit for bit."""
    name = "diffusion_pytorch_model.safetensors"
    assert (one / "student" / name).read_bytes() == (other / "student" / name).read_bytes()
    assert (one / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    notes = [json.loads((out / "state" / "state.json").read_text()) for out in (one, other)]
    assert notes[0] == notes[1] and notes[0]["iteration"] == iterations
    for role in ("student", "fake"):
        states = [load_file(out / "state" / f"{iterations:07d}" / f"0-{role}.safetensors") for out in (one, other)]
        assert states[0].keys() == states[1].keys() and any("exp_avg_sq" in key for key in states[0])
        assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())
    assert [path.name for path in (other / "state").iterdir() if path.is_dir()] == [f"{iterations:07d}"]


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


GPU = ("--dtype", "bf16", "--accumulate", 2)  # as a run on a GPU has it by default


@pytest.mark.parametrize(
    "how", [(), ("--lora", 2), GPU, (*GPU, "--lora", 2)], ids=["full", "adapters", "bf16", "bf16 adapters"]
)
def test_a_stopped_run_resumes_to_the_same_numbers(command, quiet, monkeypatch, tmp_path, capsys, how):
    sid_fm.main(command("whole", *how))
    for number, at in ((signal.SIGINT, 2), (signal.SIGTERM, 9)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
            signal_at(patch, at, number)
            sid_fm.main(command("stopped", *how, *["--resume"] * (at > 2)))
        assert error.value.code == 128 + number
        said = capsys.readouterr().err
        assert f"stopped after iteration {at + 1}, which is saved" in said
        assert f"--resume --out {tmp_path / 'stopped'}" in said
    sid_fm.main(command("stopped", *how, "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    fisher = [json.loads(line)["fisher"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert min(fisher) > 0 and len({*fisher}) == 12


@pytest.mark.parametrize("kind", ["prompts", "data", "composed"])
def test_a_run_over_stretches_stops_in_one_and_resumes_to_the_same_numbers(
    command, sources, quiet, monkeypatch, tmp_path, kind
):
    """Three stretches of 8 iterations. At a later one the networks leave the device while prompts
    are encoded."""
    monkeypatch.setattr(sid_fm, "STRETCH", 32)
    happened, move, prepare = [], sid_fm.move, sid_fm.Inputs.prepare

    def moved(nets, optimizers, where):
        assert len({*nets}) == 3 and len(optimizers) == 2
        happened.append(f"to {where}")
        move(nets, optimizers, where)

    monkeypatch.setattr(sid_fm, "move", moved)
    monkeypatch.setattr(sid_fm.Inputs, "prepare", lambda self, *args: happened.append(args[0]) or prepare(self, *args))
    run = partial(command, source=sources[kind])
    sid_fm.main(run("whole", "--iters", 20))
    assert happened == [0, "to cpu", 8, "to cpu", "to cpu", 16, "to cpu"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        signal_at(patch, 11, signal.SIGINT)
        sid_fm.main(run("stopped", "--iters", 20))
    happened.clear()
    sid_fm.main(run("stopped", "--iters", 20, "--resume"))
    assert happened == [12, "to cpu", 16, "to cpu"]  # the present stretch again, and the last one
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 20)


def test_networks_and_what_optimizers_keep_leave_the_device():
    nets = [network("sd3").bfloat16() for _ in range(2)]
    optimizers = [adam(net) for net in nets]
    before = [optimizer.param_groups[0]["params"] for optimizer in optimizers]
    sid_fm.move(nets, optimizers, "meta")  # a device that a machine without a GPU has
    kept = [x for optimizer in optimizers for state in optimizer.state.values() for x in state.values()]
    weights = [w for net in nets for w in net.parameters()]
    assert len(kept) == 3 * len(weights) and {x.device.type for x in (*weights, *kept)} == {"meta"}
    nets, optimizers = [network("sd3")], [adam(network("sd3"))]
    weights = [*nets[0].parameters()]
    sid_fm.move(nets, optimizers, "cpu")
    # an optimizer goes on with its weights
    assert all(a is b for a, b in zip(nets[0].parameters(), weights))
    assert len(before[0]) == len(weights)


@pytest.fixture
def interruptible():
    """Ctrl-C as a terminal sends it: children of a shell's background job ignore it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_the_first_signal_is_noted_and_the_second_ends_the_process(interruptible):
    with sid_fm.signals() as caught:
        signal.raise_signal(signal.SIGTERM)
        assert caught == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_under_torchrun_a_signal_may_come_twice(interruptible, monkeypatch):
    """It passes on what its processes have got themselves."""
    monkeypatch.setattr(sid_fm, "rank_and_world", lambda: (0, 2))
    with sid_fm.signals() as caught:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert caught[0] == signal.SIGINT


def test_a_resumed_run_keeps_its_settings_but_those_that_are_said(command, sources, quiet, monkeypatch, tmp_path):
    """Waiting times are those of the length that was asked for first."""
    given, distill = [], sid_fm.distill
    monkeypatch.setattr(sid_fm, "distill", lambda *args, **options: given.append(options) or distill(*args, **options))
    arguments = command("run", "--alpha", 0.5, "--steps", 2, source=sources["data"])
    sid_fm.main(arguments)
    out, teacher = ["--out", str(tmp_path / "run")], arguments[arguments.index("--teacher") :][:2]
    sid_fm.main([*teacher, *out, "--resume", "--alpha", "0.75", "--iters", "15"])
    first, then = given
    assert (first["start"], first["iters"], first["alpha"]) == (0, 12, 0.5)
    assert (then["start"], then["iters"], then["alpha"]) == (12, 15, 0.75)
    assert first["warmup"] == (2, 4) and tuple(then["warmup"]) == (2, 4) and first["steps"] == then["steps"] == 2
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(15)) and rows[-1]["images"] == 30
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (saved["alpha"], saved["iters"], saved["steps"], saved["data"]) == (0.75, 15, 2, str(tmp_path / "images"))
    assert (tmp_path / "run" / "state" / "0000015").is_dir()


def refused(capsys, arguments, status=2):
    with pytest.raises(SystemExit) as error:
        sid_fm.main(arguments)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.value.code == status
    return line


def test_resuming_what_cannot_be_resumed(command, quiet, capsys, tmp_path):
    sid_fm.main(command("run"))
    out = tmp_path / "run"
    before = {file: file.read_bytes() for file in (out / "log.jsonl", out / "args.json")}
    notes, state = out / "state" / "state.json", out / "state" / "0000012"
    former = notes.read_text()

    def refused_and_unchanged(*arguments):
        line = refused(capsys, command("run", *arguments))
        assert {file: file.read_bytes() for file in before} == before
        return line

    assert "holds a run: --resume" in refused_and_unchanged()  # --resume forgotten: nothing of it is lost
    # of twelve that it has had
    assert "--iters 3: the run in" in refused_and_unchanged("--resume", "--iters", 3)
    assert "had another --lora (None, not 2)" in refused_and_unchanged("--resume", "--lora", 2)
    notes.write_text(former.replace('"number of processes": 1', '"number of processes": 3'))
    assert "had another number of processes (3, not 1)" in refused_and_unchanged("--resume")
    notes.write_text(json.dumps(json.loads(former) | {"teacher": 1}))
    assert "had another teacher (" in refused_and_unchanged("--resume")
    notes.write_text(former)
    file = state / "0-fake.safetensors"
    weights = load_file(file)
    save_file(weights | {":random": weights[":random"][:16].clone()}, file)
    assert "another network or device" in refused_and_unchanged("--resume")  # a GPU's has 16 bytes
    save_file(weights | {"proj_out.bias": weights["proj_out.bias"][:1].clone()}, file)
    assert "another network or device" in refused_and_unchanged("--resume")
    file.write_bytes(file.read_bytes()[:1000])
    assert "can't be read" in refused_and_unchanged("--resume")
    notes.write_text("{}")
    assert "is no state of a run" in refused_and_unchanged("--resume")


def test_a_second_run_in_the_folder_of_one_that_has_saved_nothing_yet(command, quiet, monkeypatch, capsys, tmp_path):
    """Refused in one line while the first one runs. Where that ends without a state, --resume
    starts it anew."""
    starts, distill = [], sid_fm.distill

    def loop(*args, **options):
        starts.append(options["start"])
        if len(starts) == 1:
            line = refused(capsys, command("run"))
            assert f"{tmp_path / 'run'} holds a run" in line and not (tmp_path / "run" / "state").exists()
            raise KeyboardInterrupt
        yield from distill(*args, **options)

    monkeypatch.setattr(sid_fm, "distill", loop)
    assert "stopped" in refused(capsys, command("run"), status=130) and starts == [0]
    sid_fm.main(command("run", "--resume"))
    sid_fm.main(command("whole"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


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
        line = refused(capsys, command("full"), status=1)
    assert "No space left on device" in line and "what was saved before is whole" in line
    assert not [*(tmp_path / "full").rglob("*.part")]
    assert json.loads((tmp_path / "full" / "state" / "state.json").read_text())["iteration"] == 4
    sid_fm.main(command("full", "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "full")


def first_iteration(arguments, monkeypatch):
    """Seconds from a command to the end of its first iteration; the run ends there."""
    distill, start = sid_fm.distill, time.perf_counter()

    class Ended(Exception):
        pass

    def loop(*args, **options):
        next(distill(*args, **options))
        raise Ended
        yield

    with monkeypatch.context() as patch, pytest.raises(Ended):
        patch.setattr(sid_fm, "distill", loop)
        sid_fm.main(arguments)
    return time.perf_counter() - start


def test_a_million_prompts_start_as_fast_as_ten(command, quiet, monkeypatch, tmp_path):
    """And nothing of them is on the disk."""
    for name, lines in (("ten", 10), ("million", 1_000_000)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{i} ships on a stormy sea\n" for i in range(lines)))
    runs = [
        command(name, source=("--prompts", tmp_path / f"{name}.txt")) for name in ("ten", "ten-again", "million")[::2]
    ]
    first_iteration(command("imports"), monkeypatch)
    ten, million = (first_iteration(run, monkeypatch) for run in runs)
    assert million < ten + 5, (ten, million)
    kept = [f for f in (tmp_path / "million").rglob("*") if f.is_file() and not {"state", "student"} & set(f.parts)]
    assert kept and sum(file.stat().st_size for file in kept) < 5e6


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_as_if_it_had_not_been(command, monkeypatch, tmp_path):
    """Each time at a random moment of its first seconds; the processes are forks of one that has
    imported all."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sid_fm", "transformers", "matplotlib.pyplot"])

    def start(out, *arguments):
        process = context.Process(target=sid_fm.main, args=(command(out, "--save-every", 1, *arguments),))
        process.start()
        return process

    whole = start("whole")
    whole.join()
    assert whole.exitcode == 0
    rng, out, killed = random.Random(0), tmp_path / "killed", 0
    for _ in range(20):
        process = start("killed", *["--resume"] * (out / "args.json").exists())
        process.join(rng.uniform(0.5, 2))
        killed += process.is_alive()
        process.kill()
        process.join()
    last = start("killed", "--resume")
    last.join()
    assert last.exitcode == 0 and killed > 5
    assert_same_run(tmp_path / "whole", out)


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
def test_torchrun_saves_at_once_when_stopped_and_resumes_to_the_same_numbers(command, tmp_path):
    """The signal reaches one process of two and torchrun, which passes it on to both, long before
    iteration 10."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED.format(folder=str(SCRIPT.parent)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", "29951", "--"]

    def start(script, *arguments):
        return subprocess.run([*launch, str(script), *arguments], capture_output=True, text=True, check=False)

    stopped = start(script, *command("stopped"))
    assert "stopped after iteration 3, which is saved" in stopped.stderr and stopped.returncode, stopped.stderr[-2000:]
    assert json.loads((tmp_path / "stopped" / "state" / "state.json").read_text())["iteration"] == 3
    for arguments in (command("stopped", "--resume"), command("whole")):
        done = start(SCRIPT, *arguments)
        assert done.returncode == 0, done.stderr[-2000:]
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("stopped", "whole")]
    rows = [json.loads(line) for line in logs[0].splitlines()]
    assert logs[0] == logs[1] and [row["iteration"] for row in rows] == list(range(12)) and rows[-1]["images"] == 48
    students = [tmp_path / name / "student" / "diffusion_pytorch_model.safetensors" for name in ("stopped", "whole")]
    assert students[0].read_bytes() == students[1].read_bytes()
    student = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "whole" / "student")
    assert all(x.isfinite().all() for x in student.parameters())
    state = tmp_path / "whole" / "state" / "0000012"
    assert sorted(path.name for path in state.iterdir()) == [
        f"{rank}-{role}.safetensors" for rank in (0, 1) for role in ("fake", "student")
    ]
    (state / "1-student.safetensors").write_bytes(b"no weights")
    bad = start(SCRIPT, *command("whole", "--resume"))  # bad for the second process alone
    assert bad.returncode and bad.stderr.count("can't be read") == 1, bad.stderr
