"""How fast distillation is, and what memory it takes, beside the same loop on diffusers' networks
and beside the authors' order of work.

    python tests/bench.py                                      # small networks, on the CPU
    python tests/bench.py --device cuda --speed                # SD3-Medium: training and sampling
    python tests/bench.py --device cuda --memory               # memory of runs: announced, measured
    python tests/bench.py --device cuda --teacher sd3-medium   # one teacher in more detail

On cuda the networks have their true sizes, random weights and bf16, and --speed and --memory take
some minutes each. On the CPU the same commands run on small networks. All tables are Markdown.
Three contestants take turns on the same parameters, optimizers and random numbers:

    this project     sid_fm.distill on sid_fm's networks
    diffusers        sid_fm.distill, unchanged, on diffusers' networks behind an adapter
    authors' order   a plain loop on diffusers' networks in which the conditional and the
                     unconditional pass are calls of their own, and FLUX's generation runs the
                     network twice per step

A round is one iteration of each contestant; k, the generator's steps, goes through 1 .. K from
round to round, and an iteration's time is the mean over k of medians. On a machine with other work
the median over rounds of the ratio of times counts, since contestants of one round meet the same
noise. Operations are those of matrix products, convolutions and attention, counted before anything
runs and without recomputation; "of peak" is their number a second over the measured peak of large
matrix products. The default run and --teacher exit with 1 where an iteration takes more than 1.05
times as long as the same loop on diffusers' networks; --speed and --memory where a row fails.
"""

import argparse

FAMILIES = ("sd3-medium", "flux-dev", "sana-0.6b")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, add_one = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("--device", choices=("cuda", "cpu"), default="cpu", help="(%(default)s)")
    add_one("--speed", action="store_true", help="of training and sampling: a row for each setting")
    add_one("--memory", action="store_true", help="peak of training each of a list of teachers at 512 px")
    add_one("--teacher", metavar="NAME", help="sid_fm's name of a teacher, at its true size, on cuda (sd3-medium)")
    add("--family", choices=FAMILIES, action="append", help="on the CPU (all three)")
    add("--iters", type=int, default=8, help="rounds, at least 4 (%(default)s)")
    add("--batch", type=int, help="images (4; on cuda and with --speed 1)")
    add("--size", type=int, help="of the latents, a side (16; on cuda that of 512 px)")
    add("--threads", type=int, help="of the CPU (OMP_NUM_THREADS, or torch's choice)")
    add("--compile", action="store_true", help="torch.compile all networks, by block")
    add("--budget", type=int, help=argparse.SUPPRESS)  # one row of --memory
    args = parser.parse_args()
    if args.teacher and args.device == "cpu":
        parser.error("--teacher is for --device cuda")
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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from networks import TEACHERS, network_config, random_conditions, random_network
from oracle import OnDiffusers

import sid_fm

CONTESTANTS = "this project", "diffusers", "authors' order"
BAR = 1.05  # this project's time over that of the same loop on diffusers' networks, at most
K = 4
SMALL = {  # width 256, 4 blocks
    "sd3": {"num_layers": 4, "num_attention_heads": 4, "joint_attention_dim": 256, "pooled_projection_dim": 256}
    | {"pos_embed_max_size": 32, "sample_size": 16},
    "flux": {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 4, "attention_head_dim": 64}
    | {"joint_attention_dim": 256, "pooled_projection_dim": 256, "axes_dims_rope": (16, 24, 24)},
    "sana": {"num_layers": 4, "num_attention_heads": 8, "num_cross_attention_heads": 4, "caption_channels": 256},
}
TOKENS = {"sd3": 333, "flux": 512, "sana": 300}  # of a prompt's condition; 32 on the CPU
SETTINGS = [  # of --speed: pixels, recompute, compiled, how many contestants; what compiles for minutes is last
    (1024, False, False, 3),
    (1024, True, False, 2),
    (512, False, False, 2),
    (1024, False, True, 2),
    (1024, True, True, 1),
]
BUDGETS = [("sana-0.6b", None), ("sd3-medium", None), ("sd3-medium", 64), ("sd3.5-large", 16), ("flux-dev", 64)]
COLUMNS = ["training", "s/image", "images/s", "speed / diffusers'", "peak GB", "T operations/image", "of peak"]


def convolution_backward(grad: tuple, x: tuple, weight: tuple, *rest: object, **_: object) -> int:
    """Operations of gradients of a convolution, groups considered, which torch's own count of them
    forgets."""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * (rest[-1][0] + rest[-1][1])


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
    """The data-free loop as the authors' code orders its work; arguments as in sid_fm.distill.
    Yields L_alpha."""
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
        twice = "guidance" in cond  # FLUX
        return both(student, x_t, t, cond, 1.0) if twice else student(x_t, t, cond)

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


class Case:
    """A teacher's network without its files, and inputs: at true size in bf16 on cuda, else small
    in float32."""

    def __init__(self, name: str, device: str, batch: int = 1, size: int | None = None):
        self.device, self.true, self.batch = device, device == "cuda", batch
        self.title = name if self.true else f"{name} (small)"
        pipeline, changes = TEACHERS[name]
        self.family, self.kind, *_ = sid_fm.PIPELINES[pipeline]
        self.dtype = torch.bfloat16 if self.true else torch.float32
        self.guidance, self.teacher_steps = 1.0 if self.family == "flux" else 4.5, sid_fm.NAMES[name][1]
        self.scale = 32 if self.family == "sana" else 8  # pixels of a latent, a side
        self.size = size or (512 // self.scale if self.true else 16)
        self.tokens = TOKENS[self.family] if self.true else 32
        self.config = network_config(pipeline, changes if self.true else changes | SMALL[self.family])

    def network(self) -> nn.Module:
        return random_network(self.kind, self.config, self.device, self.dtype)

    def inputs(self, device: str) -> tuple[tuple[int, ...], dict, dict]:
        """The shape of the latents, cond, uncond (one row)."""
        cond = random_conditions(self.config, [str(i) for i in range(self.batch)], self.tokens)
        uncond = random_conditions(self.config, [""], self.tokens)
        if self.family == "flux":
            cond["guidance"] = torch.full((self.batch,), 3.5)
        cond, uncond = ({key: x.to(device) for key, x in rows.items()} for rows in (cond, uncond))
        return (self.batch, 32 if self.family == "sana" else 16, self.size, self.size), cond, uncond


class Bench(Case):
    """The three contestants' networks, on the same parameters."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.args, self.counted = args, {}
        super().__init__(name, args.device, args.batch or (1 if args.device == "cuda" else 4), args.size)
        net = self.network()
        if not self.true:
            from pipelines import randomise  # takes seconds to import

            net = randomise(net, 0)
        self.nets = net, copy.deepcopy(net), copy.deepcopy(net)  # teacher, student, fake
        self.optimizers = tuple(sid_fm.Float32Adam(net.parameters(), lr=1e-6) for net in self.nets[1:])
        self.prepare()
        self.difference = self.compare()
        if args.compile:
            self.prepare(compiled=True)

    def prepare(self, recompute: bool = False, compiled: bool = False) -> None:
        """Builds this project's and diffusers' networks anew, on the parameters of self.nets.
        recompute: the blocks in the backward pass, diffusers' by its own checkpointing."""
        self.ours = tuple(
            copy.deepcopy(net, {id(x): x for x in net.state_dict(keep_vars=True).values()}) for net in self.nets
        )
        self.theirs = tuple(map(self.on_diffusers, self.nets))
        torch.backends.cuda.enable_cudnn_sdp(not recompute)  # as sid_fm.recompute_blocks does
        for ours, theirs in zip(self.ours, self.theirs) if recompute else ():
            sid_fm.recompute_blocks(ours)
            theirs.net.enable_gradient_checkpointing()
        if compiled:
            torch.compiler.reset()
            torch._dynamo.config.recompile_limit = 64  # as sid_fm.three_networks does
            for net in (*self.ours, *(adapter.net for adapter in self.theirs)):
                for block in sid_fm.blocks_of(net):
                    block.compile()

    def on_diffusers(self, net: nn.Module) -> OnDiffusers:
        """diffusers' network with the parameters of `net` themselves: two networks in the memory of
        one."""
        with torch.device("meta"):
            theirs = getattr(diffusers, self.config["_class_name"]).from_config(self.config)
        theirs.load_state_dict(net.state_dict(keep_vars=True), assign=True)
        return OnDiffusers(theirs.eval())

    @torch.no_grad()
    def compare(self) -> tuple[float, float]:
        """max |v - v_diffusers| and max |v|, in the dtype of the weights."""
        shape, cond, _ = self.inputs(self.device)
        rng = torch.Generator().manual_seed(1)
        x_t, t = torch.randn(shape, generator=rng).to(self.device), torch.rand(shape[0], generator=rng).to(self.device)
        v, v_theirs = self.ours[0](x_t, t, cond), self.theirs[0](x_t, t, cond)
        return float((v - v_theirs).abs().max()), float(v.abs().max())

    def runner(self, contestant: int, meta: bool = False) -> Callable[[int], None]:
        """run(i): an iteration of a contestant with k = 1 + i mod K. On the meta device it computes
        nothing."""
        shape, cond, uncond = self.inputs("meta" if meta else self.device)
        loop, optimizers = authors_order if contestant == 2 else sid_fm.distill, self.optimizers
        nets = self.theirs if contestant else self.ours
        if meta:
            with torch.device("meta"):
                outlines = [sid_fm.build_network(self.kind, self.config) for _ in nets]
            nets = tuple(map(self.on_diffusers, outlines) if contestant else outlines)
            optimizers = tuple(torch.optim.SGD(net.parameters()) for net in nets[1:])
        rng, seeds = torch.default_generator if meta else torch.Generator(self.device), {}
        for seed in range(100 * K):  # seeds[k]: one of which the loop makes k
            seeds.setdefault(sid_fm.sample_k(K, 0, rng.manual_seed(seed)), seed)
        settings = {"steps": K, "guidance": self.guidance, "uncond": uncond, "iters": 1}
        settings["rng"] = None if meta else rng

        def run(i: int) -> None:
            rng.manual_seed(seeds[1 + i % K])
            done = [*loop(*nets, optimizers, [(cond, None)] * 2, shape, **settings)]  # a batch for each update
            assert len(done) == 1

        return run

    def operations(self, contestant: int) -> float:
        """Floating-point operations of an iteration, mean over k, in which they are linear: of the
        first and the last. They are the same for all, but for FLUX in the authors' order."""
        contestant = 2 if contestant == 2 and self.family == "flux" else 0
        if (contestant, self.size) in self.counted:
            return self.counted[contestant, self.size]
        mapping = {torch.ops.aten.convolution_backward: convolution_backward}
        counter = FlopCounterMode(display=False, custom_mapping=mapping)
        with counter, mock.patch.object(sid_fm, "take_step", lambda optimizer: 0):
            run = self.runner(contestant, meta=True)
            run(0), run(K - 1)
        self.counted[contestant, self.size] = counter.get_total_flops() / 2
        return self.counted[contestant, self.size]

    def peak_memory(self, contestant: int) -> str:
        """GB that were allocated on a GPU."""
        if self.device == "cpu":
            return ""
        torch.cuda.reset_peak_memory_stats()
        self.runner(contestant)(-1)
        return digits(torch.cuda.max_memory_allocated() / 1e9)

    def times(self, contestants: int) -> list[tuple[float, ...]]:
        """Seconds of iterations: [round][contestant], k from round to round."""
        return interleaved([self.runner(i) for i in range(contestants)], max(K, self.args.iters), self.device)


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(runs: list[Callable], rounds: int, device: str) -> list[tuple[float, ...]]:
    """Seconds of each run(i) in rounds i that go through all of them, back and forth. Round -1
    warms up. [round][run]"""
    table = []
    for i in range(-1, rounds):
        spent = [0.0] * len(runs)
        for j in range(len(runs))[:: 1 if i % 2 else -1]:
            start = now(device)
            runs[j](i)
            spent[j] = now(device) - start
        table.append(tuple(spent))
    return table[1:]


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Operations a second of the best of several products of large square matrices."""
    best = 0.0
    for n in (4096, 8192) if device == "cuda" else (768, 1024, 1536):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        (best_time,) = min(interleaved([lambda _, a=a, b=b: a @ b], 10, device))
        best = max(best, 2 * n**3 / best_time)
    return best


def show(title: str, columns: list[str], rows: Iterable[list]) -> int:
    """A Markdown table under a title; each row is printed when it is there. Returns how many
    failed."""
    print(f"\n{title}\n")
    failed = 0
    for row in itertools.chain([columns, ["---"] * len(columns)], rows):
        print("|", " | ".join(row + [""] * (len(columns) - len(row))), "|", flush=True)
        failed += any(cell.startswith("failed") for cell in row)
    return failed


def digits(x: float) -> str:
    return f"{x:.3g}"


def training_rows(bench: Bench, times: list[tuple[float, ...]], peak: float) -> Iterator[list]:
    """The row of each contestant, as in COLUMNS. times: of bench.times."""
    for i, name in enumerate(CONTESTANTS[: len(times[0])]):
        spent = sum(median([row[i] for row in times[k::K]]) for k in range(K)) / K / bench.batch
        ratio = "1" if i == 1 else ""
        if i != 1 and len(times[0]) > 1:
            speed = sorted(row[1] / row[i] for row in times)
            ratio = f"{median(speed):.2f} ({speed[0]:.2f} to {speed[-1]:.2f})"
        operations = bench.operations(i) / bench.batch
        row = [name, digits(spent), digits(1 / spent), ratio, bench.peak_memory(i), digits(operations / 1e12)]
        yield [*row, f"{operations / peak / spent:.0%}"]


def show_sampling(bench: Bench) -> int:
    """Few steps of a student beside the teacher's many, in seconds an image."""
    shape, cond, uncond = bench.inputs(bench.device)
    z, times = torch.randn(shape, device=bench.device), torch.linspace(1, 0, bench.teacher_steps + 1)
    samplers = []
    for net, *_ in (bench.ours, bench.theirs):
        samplers.append(torch.no_grad()(lambda _, net=net: sid_fm.generate(net, z, cond, K)))
        samplers.append(lambda _, net=net: sid_fm.sample_ode(net, z, cond, uncond, times, bench.guidance))
    rounds = interleaved(samplers, 3 if bench.true else 1, bench.device)
    spent = [digits(median(column) / bench.batch) for column in zip(*rounds)]
    guided = f", guidance {bench.guidance:g}" if bench.guidance != 1 else ""
    columns = ["sampling, s/image", f"student, {K} steps", f"teacher, {bench.teacher_steps} steps{guided}"]
    rows = zip(CONTESTANTS, spent[::2], spent[1::2])
    title = f"Sampling from {bench.title}, {bench.scale * bench.size} px, batch {bench.batch}"
    return show(title, columns, map(list, rows))


def report(bench: Bench, peak: float) -> str:
    """Prints the tables of one size. Returns the line of its bar."""
    weights = sum(p.numel() for p in bench.nets[0].parameters())
    size = f"latents {bench.size} x {bench.size}, batch {bench.batch}"
    print(f"\n=== {bench.title}: {weights / 1e6:.1f} million weights, {size}")
    difference = "max |v - v_diffusers| = {:.1e}, max |v| = {:.2g}".format(*bench.difference)
    print(f"velocity in {str(bench.dtype).removeprefix('torch.')}: {difference}")
    times = bench.times(3)
    show(f"One iteration, K = {K}", COLUMNS, training_rows(bench, times, peak))
    show_sampling(bench)

    with tempfile.TemporaryDirectory() as name:
        folder, oracle = Path(name), type(bench.theirs[0].net)
        sid_fm.save_student(bench.nets[0], None, folder)
        size = (folder / "diffusion_pytorch_model.safetensors").stat().st_size
        loads = [
            lambda _: sid_fm.load_network(folder, bench.kind, bench.device, bench.dtype),
            lambda _: oracle.from_pretrained(folder, torch_dtype=bench.dtype).to(bench.device),
        ]
        spent = [median(column) for column in zip(*interleaved(loads, 3, bench.device))]
    rows = [[name, digits(x), digits(size / x / 1e9)] for name, x in zip(CONTESTANTS, spent)]
    show(f"Loading its checkpoint of {size / 2**20:.0f} MiB from the page cache", ["loading", "s", "GB/s"], rows)

    ratio = sorted(row[0] / row[1] for row in times)
    text = f"this project takes {median(ratio):.3f} ({ratio[0]:.3f} .. {ratio[-1]:.3f}) of the time of the same loop on"
    return f"{bench.title}: {text} diffusers; at most {BAR:.2f}: {'held' if median(ratio) <= BAR else 'missed'}"


def speed_rows(bench: Bench, peak: float) -> Iterator[list]:
    """The rows of each of SETTINGS, as soon as its contestants are measured. On the CPU, where
    compiling takes minutes, the cells of compiled networks stay empty."""
    for pixels, recompute, compiled, contestants in SETTINGS:
        bench.size = pixels // (8 if bench.true else 64)
        flags = " ".join(["`--compile`"] * compiled + ["`--keep-activations`"] * (not recompute))
        setting = [f"{8 * bench.size} px", flags or "default"]
        if compiled and not bench.true:
            yield from ([*setting, name] for name in CONTESTANTS[:contestants])
            continue
        try:
            bench.prepare(recompute, compiled)
            for row in training_rows(bench, bench.times(contestants), peak):
                yield [*setting, *row]
        except RuntimeError as error:  # the rows of other settings still count
            yield [*setting, f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"]


def show_speed(args: argparse.Namespace, peak: float) -> int:
    """The tables of --speed. Returns how many rows failed."""
    args.batch, args.size = args.batch or 1, SETTINGS[0][0] // (8 if args.device == "cuda" else 64)
    bench = Bench("sd3-medium", args)
    failed = show_sampling(bench)
    title = f"Training {bench.title}, batch {bench.batch}, K = {K}, guidance {bench.guidance:g}"
    return failed + show(title, ["size", "flags", *COLUMNS], speed_rows(bench, peak))


def memory_of(name: str, rank: int | None, device: str) -> tuple[float, float | None]:
    """Trains a teacher with random weights for four iterations at 512 px, batch 1, on cuda with
    blocks recomputed. Returns the bytes that a run announces before it starts, and on cuda those
    that were allocated at the peak."""
    case = Case(name, device)
    net = case.network()
    teacher = SimpleNamespace(dit=net, device=torch.device(device), dtype=case.dtype)
    announced = sum(sid_fm.training_memory(teacher, rank).values())
    student, fake = sid_fm.three_networks(teacher, net, rank, recompute=True)
    optimizers = [sid_fm.Float32Adam(sid_fm.trainable_weights(net), lr=1e-6) for net in (student, fake)]
    shape, cond, uncond = case.inputs(device)
    settings = {"guidance": case.guidance, "uncond": uncond, "iters": 4}
    settings["rng"] = torch.Generator(device).manual_seed(0)
    if case.true:
        torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
    batches = itertools.repeat((cond, None))
    measured = list(sid_fm.distill(teacher.dit, student, fake, optimizers, batches, shape, **settings))
    if skipped := sum(float(row["skipped"]) for row in measured):
        raise FloatingPointError(f"{skipped:.0f} updates of 8 had no finite gradient")
    return announced, torch.cuda.max_memory_allocated() if case.true else None


def memory_rows(device: str) -> Iterator[list]:
    """Each of BUDGETS; on cuda, where memory is measured, in a process of its own."""
    for i, (name, rank) in enumerate(BUDGETS):
        label = f"`--teacher {name}{f' --lora {rank}' if rank else ''}`"
        if device == "cpu":
            yield [label, digits(memory_of(name, rank, device)[0] / 1e9)]
            continue
        command = [sys.executable, __file__, "--device", device, "--memory", "--budget", str(i)]
        out = subprocess.run(command, capture_output=True, text=True, check=False)
        failed = [f"failed: {(out.stderr.splitlines() or [''])[-1]}"]
        yield [label, *(failed if out.returncode else out.stdout.split())]


def main(args: argparse.Namespace) -> int:
    diffusers.utils.logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.budget is not None:
        print(*(digits(size / 1e9) for size in memory_of(*BUDGETS[args.budget], args.device)))
        return 0
    cuda = args.device == "cuda"
    machine = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads, small networks"
    print(f"{machine}, torch {torch.__version__}, diffusers {diffusers.__version__}, {time.strftime('%Y-%m-%d')}")
    if args.memory:
        title = "Peak memory of training, 512 px, batch 1, blocks recomputed" if cuda else "Memory of training"
        return min(1, show(title, ["", "announced, GB", "measured, GB"], memory_rows(args.device)))
    dtype = torch.bfloat16 if cuda else torch.float32
    peak = matmul_peak(args.device, dtype)
    print(f"matrix products in {str(dtype).removeprefix('torch.')}: {digits(peak / 1e12)} T operations a second")
    if args.speed:
        return min(1, show_speed(args, peak))
    names = [args.teacher or "sd3-medium"] if cuda else args.family or FAMILIES
    lines = [report(Bench(name, args), peak) for name in names]
    print("\n" + "\n".join(lines))
    return int(any(line.endswith("missed") for line in lines))


if __name__ == "__main__":
    sys.exit(main(ARGS))
