"""How fast distillation is, beside the same loop on diffusers' networks and beside the authors' order of work.

    python tests/bench.py                                          # small networks, on the CPU
    python tests/bench.py --device cuda --teacher sd3-medium       # true sizes, random weights, in bf16
    python tests/bench.py --device cuda --memory                   # memory of whole runs, beside what they announce

Three contestants take turns on the same parameters and the same random numbers:

    this project     sid_fm.distill on sid_fm's networks
    diffusers        sid_fm.distill, unchanged, on diffusers' networks behind an adapter of 20 lines
    authors' order   a plain loop on diffusers' networks in which the conditional and the unconditional pass are calls of
                     their own, and FLUX's generation runs the network twice per step

A round is one iteration of each contestant; k, the generator's steps, goes through 1 .. K from round to round, and an
iteration's time is the mean over k of medians. What counts on a machine with other work is the median over rounds of
the ratio of times, since contestants of one round meet the same noise. Operations are those of
matrix products, convolutions and attention, counted before anything runs; the floor is the time that they take at the
measured peak of large matrix products. Exits with 1 where a bar is missed: 1.1 times as fast as the same loop on diffusers, on a GPU 1.25 times.
"""

import argparse

FAMILIES = ("sd3-medium", "flux-dev", "sana-0.6b")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cpu", help="(%(default)s)")
    add("--teacher", metavar="NAME", help="sid_fm's name of a teacher, at its true size, on cuda (sd3-medium)")
    add("--layers", type=int, help="shorten it to so many blocks of each kind, where memory can't hold it")
    add("--family", choices=FAMILIES, action="append", help="on the CPU (all three)")
    add("--iters", type=int, default=16, help="rounds (%(default)s)")
    add("--batch", type=int, help="images (4; with --teacher 1)")
    add("--size", type=int, help="of the latents, a side (16; with --teacher 64)")
    add("--steps", type=int, default=4, help="K (%(default)s)")
    add("--threads", type=int, help="of the CPU (OMP_NUM_THREADS, or torch's choice)")
    add("--compile", action="store_true", help="torch.compile all networks, by block")
    add("--memory", action="store_true", help="on cuda: peak memory of training each of a list of teachers at 512 px")
    add("--probe", type=int, help=argparse.SUPPRESS)  # in a process of its own: a contestant's peak memory
    args = parser.parse_args()
    if (args.teacher or args.memory) and args.device == "cpu":
        parser.error("--teacher and --memory are for --device cuda")
    return args


if __name__ == "__main__":
    ARGS = parse()  # before the imports, which take seconds

import copy
import itertools
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from pipelines import randomise

import sid_fm

CONTESTANTS = "this project", "diffusers", "authors' order"
BARS = {"cuda": 1.0, "cpu": 1.05}  # this project's time over that of the same loop on diffusers, at most
SMALL = {  # width 256, 4 blocks
    "sd3": {"num_layers": 4, "num_attention_heads": 4, "joint_attention_dim": 256, "pooled_projection_dim": 256}
    | {"pos_embed_max_size": 32, "sample_size": 16},
    "flux": {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 4, "attention_head_dim": 64}
    | {"joint_attention_dim": 256, "pooled_projection_dim": 256, "axes_dims_rope": (16, 24, 24)},
    "sana": {"num_layers": 4, "num_attention_heads": 8, "num_cross_attention_heads": 4, "caption_channels": 256},
}
SMALL_CONDITIONS = {"text": (32, 256), "pooled": (256,), "mask": (32,)}


def convolution_backward(grad: tuple, x: tuple, weight: tuple, *rest: object, **_: object) -> int:
    """Operations of gradients of a convolution, groups considered, which torch's own count of them forgets."""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (rest[-1][0] + rest[-1][1])


class OnDiffusers(nn.Module):
    """A network of diffusers with our face, v = net(x_t, t, cond): what its pipeline does around it."""

    def __init__(self, net: nn.Module, kind: str):
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x_t: Tensor, t: Tensor, cond: dict, features: bool = False):
        seen = []
        if features:
            hook = self.net.proj_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        x, text = (y.to(self.net.proj_out.weight.dtype) for y in (x_t, cond["text"]))
        if self.kind == "sd3":
            v = self.net(x, text, cond["pooled"].to(x), 1000 * t, return_dict=False)[0]
        elif self.kind == "sana":
            v = self.net(x, text, 1000 * t, encoder_attention_mask=cond["mask"], return_dict=False)[0]
        else:
            b, c, h, w = x.shape
            pipeline = diffusers.FluxPipeline
            ids = pipeline._prepare_latent_image_ids(b, h // 2, w // 2, x.device, x.dtype)
            packed, text_ids = pipeline._pack_latents(x, b, c, h, w), x.new_zeros(text.shape[1], 3)
            inputs = (packed, text, cond["pooled"].to(x), t, ids, text_ids, cond["guidance"])
            v = pipeline._unpack_latents(self.net(*inputs, return_dict=False)[0], 8 * h, 8 * w, 8)
        v = v.to(x_t.dtype)
        if not features:
            return v
        hook.remove()
        return v, seen[0].float().mean(1)


def authors_order(
    teacher: nn.Module,
    student: nn.Module,
    fake: nn.Module,
    optimizers: tuple,
    batches: Iterator,
    shape: tuple[int, ...],
    *,
    steps: int,
    guidance: float,
    uncond: dict,
    iters: int,
    rng: torch.Generator | None,
) -> Iterator[Tensor]:
    """The data-free loop as the authors' code orders its work; arguments as in sid_fm.distill. Yields L_alpha."""
    student_optimizer, fake_optimizer = optimizers
    for net in (teacher, student, fake):
        net.requires_grad_(False)
    sid_fm.set_trainable(student_optimizer, True)
    weights = next(student.parameters())
    like = torch.empty(shape, device=weights.device)

    def both(net: nn.Module, x_t: Tensor, t: Tensor, cond: dict, scale: float) -> Tensor:
        empty = cond | {key: value.expand_as(cond[key]) for key, value in uncond.items()}
        v_cond, v_uncond = net(x_t, t, cond), net(x_t, t, empty)
        return v_uncond + scale * (v_cond - v_uncond)

    def velocity(net: nn.Module, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        return net(x_t, t, cond) if guidance == 1 else both(net, x_t, t, cond, guidance)

    def generator(x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        return both(student, x_t, t, cond, 1.0) if "guidance" in cond else student(x_t, t, cond)  # FLUX: twice

    def generate_and_noise(cond: dict, k: int) -> tuple[Tensor, ...]:
        x_g = sid_fm.generate(generator, sid_fm.noise_like(like, rng), cond, steps, stop_after=k, rng=rng)
        e, t = sid_fm.noise_like(like, rng), sid_fm.sample_times(shape[0], sid_fm.SID_LAW, rng=rng).to(like)
        return x_g, e, t, sid_fm.add_noise(x_g, e, t)

    for iteration, (cond, _) in zip(range(iters), batches):
        k = sid_fm.sample_k(steps, iteration, rng)
        sid_fm.set_trainable(fake_optimizer, True)
        with torch.no_grad():
            x_g, e, t, x_t = generate_and_noise(cond, k)
        sid_fm.flow_matching_loss(velocity(fake, x_t, t, cond), x_g, e, t).backward()
        sid_fm.take_step(fake_optimizer)
        sid_fm.set_trainable(fake_optimizer, False)
        x_g, e, t, x_t = generate_and_noise(cond, k)
        v_fake, v_real = velocity(fake, x_t, t, cond), velocity(teacher, x_t, t, cond)
        d_real, d_fake = (sid_fm.convert(v, x_t, t, "rf", "v", "x0") for v in (v_real, v_fake))
        loss = sid_fm.sid_loss(x_g, d_real, d_fake, t)
        (100 * loss).backward()
        sid_fm.take_step(student_optimizer)
        yield loss.detach()


class Bench:
    """The three contestants' networks at one size, on the same parameters, and what they are fed."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args, self.device = name, args, args.device
        published = sid_fm.NAMES[name]
        self.family, network = sid_fm.PIPELINES[published.pipeline], dict(published.network)
        kind, true = self.family.kind, args.device == "cuda"
        self.dtype = torch.bfloat16 if true else torch.float32
        self.guidance, self.teacher_steps = 1.0 if kind == "flux" else 4.5, published.steps
        self.batch, self.size = args.batch or (1 if true else 4), args.size or (64 if true else 16)
        if not true:
            network |= SMALL[kind]
            shapes = {key: SMALL_CONDITIONS[key] for key in self.family.conditions}
            self.family = self.family._replace(conditions=shapes)
        if args.layers:
            network |= {"num_layers": args.layers, **({"num_single_layers": args.layers} if kind == "flux" else {})}
        self.config = sid_fm.network_config(self.family, network)
        net = sid_fm.random_part(self.family.backbone, self.config, self.device, self.dtype)
        net = net if true else randomise(net, 0)
        self.ours = net, copy.deepcopy(net), copy.deepcopy(net)  # teacher, student, fake
        self.difference = self.compare()
        self.theirs = tuple(map(self.on_diffusers, self.ours))
        self.optimizers = self.adam(self.ours)
        if args.compile:
            for net in (*self.ours, *(adapter.net for adapter in self.theirs)):
                sid_fm.compile_blocks(net)

    @property
    def oracle(self) -> type[nn.Module]:
        return getattr(diffusers, self.family.backbone_class)

    def on_diffusers(self, net: nn.Module) -> OnDiffusers:
        """diffusers' network, its parameters those of `net` itself: two networks in the memory of one."""
        with torch.device("meta"):
            theirs = self.oracle.from_config(self.config)
        theirs.load_state_dict(net.state_dict(keep_vars=True), assign=True)
        return OnDiffusers(theirs.eval(), self.family.kind)

    def outline(self, contestant: int) -> nn.Module:
        """A contestant's network on the meta device."""
        with torch.device("meta"):
            net = sid_fm.build(self.family.backbone, self.config)
        return self.on_diffusers(net) if contestant else net

    def adam(self, nets: tuple[nn.Module, ...]) -> tuple:
        """The student's and the fake network's, as the command line sets them."""
        return tuple(sid_fm.Float32Adam(net.parameters(), lr=1e-6) for net in nets[1:])

    def inputs(self, batch: int, size: int, device: str) -> tuple[tuple[int, ...], dict, dict]:
        """shape of the latents, cond, uncond (one row)."""
        like = torch.empty(0, dtype=self.dtype, device="cpu")
        cond = sid_fm.random_conditions(self.family, [str(i) for i in range(batch)], like)
        uncond = sid_fm.random_conditions(self.family, [""], like)
        if self.family.kind == "flux":
            cond["guidance"] = torch.full((batch,), 3.5)
        cond, uncond = ({key: x.to(device) for key, x in rows.items()} for rows in (cond, uncond))
        return (batch, 32 if self.family.kind == "sana" else 16, size, size), cond, uncond

    @torch.no_grad()
    def compare(self) -> tuple[float, float]:
        """max |v - v_diffusers| and max |v|, in float32."""
        net = self.ours[0] if self.dtype == torch.float32 else copy.deepcopy(self.ours[0]).float()
        shape, cond, _ = self.inputs(self.batch, self.size, self.device)
        rng = torch.Generator().manual_seed(1)
        x_t, t = torch.randn(shape, generator=rng).to(self.device), torch.rand(shape[0], generator=rng).to(self.device)
        v, v_theirs = net(x_t, t, cond), self.on_diffusers(net)(x_t, t, cond)
        return float((v - v_theirs).abs().max()), float(v.abs().max())

    def runner(self, contestant: int, batch: int, size: int, steps: int, device: str = "") -> Callable[[int], None]:
        """run(i): an iteration of a contestant with k = 1 + i mod K. On the meta device it computes nothing."""
        meta, device = device == "meta", device or self.device
        shape, cond, uncond = self.inputs(batch, size, device)
        loop, optimizers = authors_order if contestant == 2 else sid_fm.distill, self.optimizers
        nets = self.theirs if contestant else self.ours
        if meta:
            nets = tuple(self.outline(contestant) for _ in nets)
            optimizers = tuple(torch.optim.SGD(net.parameters()) for net in nets[1:])
        rng, seeds = torch.default_generator if meta else torch.Generator(device), {}
        for seed in range(100 * steps):  # seeds[k]: one with which the loop draws k
            seeds.setdefault(sid_fm.sample_k(steps, 0, rng.manual_seed(seed)), seed)
        settings = {"steps": steps, "guidance": self.guidance, "uncond": uncond, "iters": 1}
        settings["rng"] = None if meta else rng

        def run(i: int) -> None:
            rng.manual_seed(seeds[1 + i % steps])
            for _ in loop(*nets, optimizers, [(cond, None)], shape, **settings):
                pass

        return run

    def operations(self, contestant: int, batch: int, size: int, steps: int) -> float:
        """Floating-point operations of an iteration, mean over k, in which they are linear: of the first and the last."""
        mapping = {torch.ops.aten.convolution_backward: convolution_backward}

        counter = FlopCounterMode(display=False, custom_mapping=mapping)
        with counter, mock.patch.object(sid_fm, "take_step", lambda optimizer: 0):
            run = self.runner(contestant, batch, size, steps, "meta")
            run(0), run(steps - 1)
        return counter.get_total_flops() / 2

    def peak_memory(self, contestant: int) -> float | None:
        """Bytes. On a GPU all that was allocated; on Linux's CPU the growth of the resident set in a fresh process."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.runner(contestant, self.batch, self.size, self.args.steps)(-1)
            return torch.cuda.max_memory_allocated()
        if not Path("/proc/self/clear_refs").exists():
            return None
        command = [sys.executable, __file__, "--family", self.name, "--probe", str(contestant)]
        command += ["--threads", str(torch.get_num_threads()), "--steps", str(self.args.steps)]
        command += ["--batch", str(self.batch), "--size", str(self.size), *["--compile"] * self.args.compile]
        command += ["--layers", str(self.args.layers)] if self.args.layers else []
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        return float(out.stdout) if out.returncode == 0 else None

    def split(self, run: Callable[[int], None]) -> dict[str, float]:
        """Seconds of an iteration that go to generation (of both updates, forward), and to each update's rest."""
        laps, after = {"generation": 0.0, "fake update": 0.0, "generator update": 0.0}, itertools.cycle((1, 2))
        generate, take_step, last = sid_fm.generate, sid_fm.take_step, [now(self.device)]

        def lap(name: str) -> None:
            laps[name] += now(self.device) - last[0]
            last[0] = now(self.device)

        def timed_generate(*inputs: object, **options: object) -> Tensor:
            x_g = generate(*inputs, **options)
            lap("generation")
            return x_g

        def timed_step(optimizer: torch.optim.Optimizer) -> Tensor:
            skipped = take_step(optimizer)
            lap(list(laps)[next(after)])
            return skipped

        with mock.patch.object(sid_fm, "generate", timed_generate), mock.patch.object(sid_fm, "take_step", timed_step):
            for i in range(self.args.steps):
                run(i)
        return {name: spent / self.args.steps for name, spent in laps.items()}


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(runs: list[Callable], rounds: int, device: str) -> list[tuple[float, ...]]:
    """Seconds of each run(i) in rounds i that go through all of them, back and forth. Round -1 warms up. [round][run]"""
    table = []
    for i in range(-1, rounds):
        spent = [0.0] * len(runs)
        for j in range(len(runs))[:: 1 if i % 2 else -1]:
            start = now(device)
            runs[j](i)
            spent[j] = now(device) - start
        table.append(tuple(spent))
    return table[1:]


def mean_over_k(spent: list[float], steps: int) -> float:
    """Seconds of an iteration from those of rounds 0, 1, ...: the mean over k of medians."""
    return sum(median(spent[k::steps]) for k in range(steps)) / steps


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Operations a second of the best of several products of large square matrices."""
    best = 0.0
    for n in (4096, 8192) if device == "cuda" else (768, 1024, 1536):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        (best_time,) = min(interleaved([lambda _, a=a, b=b: a @ b], 10, device))
        best = max(best, 2 * n**3 / best_time)
    return best


def show(title: str, columns: list[str], rows: list[list]) -> None:
    """A table, under a title."""
    cells = [columns, *([str(x) for x in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:]))]))


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def report(bench: Bench, peak: float) -> str:
    """Prints the tables of one size. Returns the line of its bar."""
    args, device, K = bench.args, bench.device, bench.args.steps
    where = f"{bench.name}{'' if device == 'cuda' else ' (small)'}"
    here = bench.batch, bench.size, K
    operations = [bench.operations(i, *here) for i in range(3)]
    runs = [bench.runner(i, *here) for i in range(3)]
    times = interleaved(runs, max(K, args.iters), device)
    rows, ratios = [], []
    for i, name in enumerate(CONTESTANTS):
        spent, memory = mean_over_k([row[i] for row in times], K), bench.peak_memory(i)
        ratio = sorted(row[i] / row[0] for row in times)
        ratios.append(ratio)
        rows.append([name, ms(spent), f"{bench.batch / spent:.2f}", "" if memory is None else f"{memory / 2**20:.0f}"])
        rows[-1] += [f"{operations[i] / 1e9:.4g}", ms(operations[i] / peak), f"{operations[i] / peak / spent:.0%}"]
        rows[-1].append(f"{median(ratio):.3f} ({ratio[0]:.3f} .. {ratio[-1]:.3f})")
    weights = sum(p.numel() for p in bench.ours[0].parameters())
    print(
        f"\n=== {where}: {weights / 1e6:.1f} million weights, latents {bench.size} x {bench.size}, batch {bench.batch}"
    )
    print("velocity, in float32: max |v - v_diffusers| = {:.1e}, max |v| = {:.2g}".format(*bench.difference))
    columns = [
        "iteration",
        "ms",
        "images/s",
        "peak MiB",
        "G operations",
        "floor ms",
        "of peak",
        "time / this project's",
    ]
    show(f"One iteration, K = {K}", columns, rows)

    parts = [bench.split(run) for run in runs]
    rows = [
        [name, *(f"{ms(x)} ({x / sum(p.values()):.0%})" for x in p.values())] for name, p in zip(CONTESTANTS, parts)
    ]
    show("Where it goes, ms", ["", *parts[0]], rows)

    shape, cond, uncond = bench.inputs(bench.batch, bench.size, device)
    z, rows, labels = torch.randn(shape, device=device), [], ("this project", "diffusers")
    schedule, draws = torch.linspace(1, 0, bench.teacher_steps + 1), []
    for net, *_ in (bench.ours, bench.theirs):
        draws.append(torch.no_grad()(lambda _, net=net: sid_fm.generate(net, z, cond, K)))
        draws.append(lambda _, net=net: sid_fm.sample_ode(net, z, cond, uncond, schedule, bench.guidance))
    spent = [median(column) for column in zip(*interleaved(draws, 1, device))]
    for name, few, many in zip(labels, spent[::2], spent[1::2]):
        rows.append([name, ms(few), ms(many), f"{many / few:.1f}"])
    guided = f", guidance {bench.guidance:g}" if bench.guidance != 1 else ""
    columns = ["sampling", f"student, {K} steps", f"teacher, {bench.teacher_steps} steps{guided}", "ratio"]
    show(f"{bench.batch} images, ms", columns, rows)

    with tempfile.TemporaryDirectory() as folder:
        bench.theirs[0].net.save_pretrained(folder)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        loads = [
            lambda _: sid_fm.fill_part(*sid_fm.open_part(bench.family.backbone, Path(folder)), device, bench.dtype),
            lambda _: bench.oracle.from_pretrained(folder, torch_dtype=bench.dtype).to(device),
        ]
        spent = [median(column) for column in zip(*interleaved(loads, 3, device))]
    rows = [[name, ms(x), f"{size / x / 1e9:.2f}"] for name, x in zip(labels, spent)]
    show(f"Loading its checkpoint of {size / 2**20:.0f} MiB from the page cache", ["", "ms", "GB/s"], rows)

    b, s = bench.batch, bench.size
    settings = [here, (b, s // 2, K), (max(1, b // 2), s, K), (b, s, 1), (b, s, 2)]
    rows = []
    for setting in dict.fromkeys(settings):
        count, n = bench.operations(0, *setting), setting[2]
        spent = ms(mean_over_k([x for (x,) in interleaved([bench.runner(0, *setting)], n, device)], n))
        rows.append([f"{setting[1]} x {setting[1]}", setting[0], n, spent, ms(count / peak), f"{count / 1e9:.4g}"])
    show(
        "This project's iteration at other settings", ["latents", "batch", "K", "ms", "floor ms", "G operations"], rows
    )

    slower = sorted(1 / x for x in ratios[1])
    verdict = "held" if median(slower) <= BARS[device] else "missed"
    spread = f"{slower[0]:.3f} .. {slower[-1]:.3f}"
    text = f"this project takes {median(slower):.3f} ({spread}) of the time of the same loop on diffusers"
    return f"{where}: {text}; at most {BARS[device]:.2f}: {verdict}"


BUDGETS = [("sana-0.6b", None), ("sd3-medium", None), ("sd3-medium", 64), ("sd3.5-large", 16), ("flux-dev", 64)]


def memory_of(name: str, rank: int | None, device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Trains a teacher at its true size with random weights for four iterations at 512 px, batch 1, blocks recomputed.
    Returns the bytes that a run announces before it starts, and those that were allocated at the peak."""
    outline = sid_fm.describe(name, random_weights=True)
    guidance = 1.0 if outline.dit.config.get("guidance_embeds") else 4.5
    shape = (1, *outline.latent_shape(512))
    parts = sid_fm.memory_needed(outline, shape, dtype, rank or 0, guidance)
    teacher = sid_fm.load_teacher(name, device, dtype, random_weights=True)
    teacher.vae.to("cpu")  # as while a run trains
    student, fake = sid_fm.three_networks(teacher, teacher.dit, rank, device, recompute=True)
    optimizers = [sid_fm.Float32Adam(sid_fm.trainable_weights(net), lr=1e-6) for net in (student, fake)]
    cond, uncond = teacher.encode_prompts(["a red fox"]), teacher.encode_prompts([""])
    settings = {"guidance": guidance, "uncond": uncond, "iters": 4, "rng": torch.Generator(device).manual_seed(0)}
    torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
    batches = itertools.repeat((cond, None))
    skipped = sum(
        m["skipped"] for m in sid_fm.distill(teacher.dit, student, fake, optimizers, batches, shape, **settings)
    )
    if skipped:
        raise FloatingPointError(f"{skipped:.0f} updates of 8 had no finite gradient")
    return sum(size for part, size in parts.items() if part != "activations"), torch.cuda.max_memory_allocated()


def memory_table() -> int:
    """Each of BUDGETS in a process of its own. Returns how many failed."""
    print(f"Peak memory of training, GB\n  {'':26}{'announced':>12}{'measured':>12}", flush=True)
    failed = 0
    for i, (name, rank) in enumerate(BUDGETS):
        command = [sys.executable, __file__, "--device", "cuda", "--memory", "--probe", str(i)]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        failed += out.returncode != 0
        said = out.stdout if out.returncode == 0 else "  failed: " + (out.stderr.splitlines() or [""])[-1]
        print(f"  {name + (f' --lora {rank}' if rank else ', in full'):26}{said.rstrip()}", flush=True)
    return failed


def probe(bench_of: Callable[[], Bench], contestant: int) -> None:
    """Prints by how many bytes the resident set of this process grows at its peak, networks and all."""

    def status(key: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    bench = bench_of()
    run = bench.runner(contestant, bench.batch, bench.size, bench.args.steps)
    run(-1), run(-1)
    print(status("VmHWM") - before)


def main(args: argparse.Namespace) -> int:
    diffusers.utils.logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    names = [args.teacher or "sd3-medium"] if args.device == "cuda" else args.family or FAMILIES
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    if args.memory and args.probe is None:
        return min(1, memory_table())
    if args.memory:
        needed, peak = memory_of(*BUDGETS[args.probe], args.device, dtype)
        print(f"{needed / 1e9:12.1f}{peak / 1e9:12.1f}")
        return 0
    if args.probe is not None:
        probe(lambda: Bench(names[0], args), args.probe)
        return 0
    peak = matmul_peak(args.device, dtype)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, diffusers {diffusers.__version__}", end="")
    print(f"; matrix products in {str(dtype).removeprefix('torch.')} at {peak / 1e9:.0f} G operations/s")
    lines = [report(Bench(name, args), peak) for name in names]
    print("\n" + "\n".join(lines))
    return int(any(line.endswith("missed") for line in lines))


if __name__ == "__main__":
    sys.exit(main(ARGS))
