"""Runs SiD on 2D mixtures, where every density and posterior mean is exact.

    python toy_2d.py            checks the derivation, trains and distills a teacher, plots figures
    python toy_2d.py --check    only checks the derivation: each claim against an exact value
    python toy_2d.py --sweep    measures how alpha, w(t), p(t) and the number of steps matter
    python toy_2d.py --data     shows what real data add where the teacher is wrong
    python toy_2d.py --lag      compares fake networks that keep up with the student or lag behind

Read this file beside sid_fm.py. Its chapters are: exact mixtures; recipes; teacher and students;
the derivation, checked; measuring; figures; command line.
"""

import argparse
import contextlib
import copy
import itertools
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import sid_fm
from sid_fm import SID_LAW, T_END, add_noise, convert, generate, match_dims, noise_like, path_terms, sid_loss

# ----------------------------------------------------------------------------------------------------------------------
# Exact mixtures
# ----------------------------------------------------------------------------------------------------------------------


class Mixture:
    """Represents the density p(x_0) = sum_m w_m N(mu_m, sigma^2 I) in d dimensions.

    With one component it is also the affine generator x_g = mu + sigma z, whose psi* is the method
    posterior_mean. means: [M, d]; sigma: a number or a tensor; weights: [M], normalised here."""

    def __init__(self, means: Tensor, sigma: float | Tensor, weights: Tensor | None = None):
        self.means, self.sigma = means, sigma
        weights = torch.ones(len(means)) if weights is None else weights
        self.weights = (weights / weights.sum()).to(means)

    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """Returns n samples x_0: [n, d]."""
        means = self.means[torch.multinomial(self.weights, n, replacement=True, generator=rng)]
        return means + self.sigma * noise_like(means, rng)

    def log_components(self, x_t: Tensor, t: Tensor, path: str = "rf") -> Tensor:
        """Returns log w_m N(x_t; a mu_m, (a^2 sigma^2 + s^2) I): [B, M]. The logsumexp over m
        is log p_t."""
        a, s, _, _ = path_terms(match_dims(t, x_t), path)
        variance = (a * self.sigma) ** 2 + s**2
        squares = ((x_t[:, None] - a[..., None] * self.means) ** 2).sum(-1)
        return self.weights.log() - squares / (2 * variance) - x_t.shape[1] / 2 * (2 * math.pi * variance).log()

    def posterior_mean(self, x_t: Tensor, t: Tensor, path: str = "rf") -> Tensor:
        """Returns D(x_t, t) = E[x_0 | x_t]: [B, d]. Each component has the weight p(m | x_t)."""
        a, s, _, _ = path_terms(match_dims(t, x_t), path)
        mean = self.log_components(x_t, t, path).softmax(1) @ self.means
        return mean + a * self.sigma**2 / ((a * self.sigma) ** 2 + s**2) * (x_t - a * mean)

    def predict(self, x_t: Tensor, t: Tensor, cond: None = None, path: str = "rf", predicts: str = "v") -> Tensor:
        """Returns the output of a perfect network, by default the exact velocity. [B, d]"""
        return convert(self.posterior_mean(x_t, t, path), x_t, t, path, "x0", predicts)


ANGLE = torch.arange(8) * (2 * math.pi / 8)
RING = 2 * torch.stack([ANGLE.cos(), ANGLE.sin()], 1)
MIXTURES = {
    "ring": Mixture(RING, 0.2),
    "grid": Mixture(torch.cartesian_prod(*[torch.linspace(-2, 2, 5)] * 2), 0.1),
    "unequal": Mixture(RING, 0.2, torch.arange(1.0, 9.0)),  # masses 1 : 2 : ... : 8
}

# ----------------------------------------------------------------------------------------------------------------------
# Recipes: all losses are one loss (paper, figure 2)
# ----------------------------------------------------------------------------------------------------------------------
# |prediction error|^2 = rho(t) |D^ - x_0|^2, where D^ is the clean sample that the prediction
# implies. So recipes differ only in how they weight noise levels. All have the same minimiser.


class Recipe(NamedTuple):
    """Describes a training loss: weight(t) times the squared error of `predicts` on `path`."""

    path: str = "rf"
    predicts: str = "v"
    law: tuple[float, float] | None = None  # mean and std of log(s/a), or None for uniform times
    weight: Callable[[Tensor], Tensor] = torch.ones_like


RECIPES = {  # for data of variance 1. EDM and TrigFlow are published for 1/4, so log 2 is added
    "DDPM, noise prediction": Recipe("vp", "eps"),
    "EDM": Recipe("ve", "x0", (-1.2 + math.log(2), 1.2), lambda t: (t**2 + 1) / t**2),
    "Rectified Flow, uniform t": Recipe("rf", "v"),
    "Rectified Flow, logit-normal t (SD3)": Recipe("rf", "v", (0.0, 1.0)),
    "TrigFlow (sCM)": Recipe("trig", "v", (-1.0 + math.log(2), 1.4)),
    "SiD-DiT's fake network": Recipe("rf", "v", SID_LAW),
}


def loss_factor(t: Tensor, path: str, predicts: str) -> Tensor:
    """Returns rho(t). v: (a' - s' a / s)^2.  eps: (a / s)^2.  score: (a / s^2)^2.  x0: 1."""
    a, s, da, ds = path_terms(t, path)
    p, q = sid_fm.prediction_row(predicts, a, s, da, ds)
    return ((a * q - s * p) / s) ** 2


def weight_density(recipe: Recipe, log_snr: Tensor) -> Tensor:
    """Returns pi(lambda) = weight(t) rho(t) p(t) |dt/dlambda| / Z, for lambda = log(a^2/s^2)."""
    path, predicts, law, weight = recipe
    t = sid_fm.time_at((log_snr / 4).exp(), (-log_snr / 4).exp(), path)
    if law is None:  # p(t) is constant between the ends, and |dt/dlambda| = a s / (2 (a s' - s a'))
        a, s, da, ds = path_terms(t, path)
        inside = (t > sid_fm.T_MIN) * (t < T_END[path] - 1e-9)  # time_at clamps t to the end
        p = inside * a * s / (a * ds - s * da)
    else:  # lambda = -2 log(s/a) is normal
        p = torch.distributions.Normal(*law).log_prob(-log_snr / 2).exp()
    density = weight(t) * loss_factor(t, path, predicts) * p
    return density / torch.trapezoid(density, log_snr)


# ----------------------------------------------------------------------------------------------------------------------
# Teacher and students
# ----------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Predicts with a residual network. Fourier features of x_t help it to learn the sharp map from
    one Gaussian to eight modes. On Rectified Flow the last layer gives the velocity. On any other
    path it gives TrigFlow's velocity at equal SNR (EDM's preconditioning), and it is converted."""

    def __init__(self, path: str = "rf", predicts: str = "v"):
        super().__init__()
        self.path, self.predicts = path, predicts
        self.register_buffer("directions", 3 * torch.randn(2, 16))
        self.register_buffer("frequencies", math.pi * torch.arange(1, 5))
        self.first = nn.Linear(2 + 2 * 16 + 2 * 4, 96)
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(2))
        self.last = nn.Linear(96, 2)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict | None = None, features: bool = False):
        x, u = (x_t, t) if self.path == "rf" else sid_fm.equal_snr(x_t, t, self.path, "trig")
        time = t if self.path == "rf" else sid_fm.time_at(u.cos(), u.sin(), "rf")
        waves, phase = x @ self.directions, time[:, None] * self.frequencies
        h = self.first(torch.cat([x, waves.cos(), waves.sin(), phase.cos(), phase.sin()], 1))
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        h = nn.functional.silu(h)
        v = self.last(h) if self.path == "rf" else convert(self.last(h), x, u, "trig", "v", self.predicts)
        return (v, h) if features else v


# Each path has a recipe for its teacher. The weight 1 / a^2 on vp is not DDPM's. Generation starts
# where a is 1/152. Without this weight, the error of eps = s x + a v hardly depends on v there.
TEACHERS = {
    "rf": RECIPES["Rectified Flow, uniform t"],
    "trig": RECIPES["TrigFlow (sCM)"],
    "vp": RECIPES["DDPM, noise prediction"]._replace(weight=lambda t: 1 / path_terms(t, "vp")[0] ** 2),
    "ve": RECIPES["EDM"],
}


def cosine(optimizer: torch.optim.Optimizer, iters: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Lowers the learning rate along half a cosine, to a fiftieth of its first value."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: max(0.02, (1 + math.cos(math.pi * i / iters)) / 2))


def toy_teacher(mixture: Mixture, path: str, iters: int, seed: int, bar: tqdm) -> nn.Module:
    """Trains a teacher by flow matching on data. Returns it as a Rectified Flow network."""
    rng, (_, predicts, law, weight) = torch.Generator().manual_seed(seed), TEACHERS[path]
    torch.manual_seed(seed)  # for the network's first weights
    net = Net(path, predicts)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3, betas=(0.9, 0.99), fused=True)
    schedule = cosine(optimizer, iters)
    for _ in range(iters):
        x_0 = mixture.sample(1024, rng)
        e, t = noise_like(x_0, rng), sid_fm.sample_times(len(x_0), law, path, rng)
        pred = net(add_noise(x_0, e, t, path), t)
        loss = sid_fm.flow_matching_loss(pred, x_0, e, t, path, predicts, weight(t))
        loss.backward()
        sid_fm.take_step(optimizer)
        schedule.step()
        bar.set_postfix_str(f"loss {float(loss.detach()):.2g}", refresh=False)
        bar.update()
    return sid_fm.as_rectified_flow(net, path, predicts)


class Distilled(NamedTuple):
    """Holds the result of one distillation."""

    student: nn.Module  # it has the running mean of its weights
    fake: nn.Module
    log: dict[str, list[float]]  # name -> one number per iteration, from sid_fm.distill
    copies: dict[int, nn.Module]  # iteration i -> the student after i iterations


def distill_student(
    teacher: nn.Module,
    student: nn.Module,
    fake: nn.Module,
    rates: tuple[float, float],
    batches: Iterable[tuple],
    shape: tuple[int, ...],
    iters: int,
    seed: int,
    bar: tqdm,
    **options,
) -> Distilled:
    """Runs sid_fm.distill with these options. rates: learning rates of student and fake network.

    Adam's second beta is 0.99, not the paper's 0.999. The samples of a one-step student start
    close to one point, and its gradients soon grow a thousandfold. Raises FloatingPointError if a
    gradient is not finite."""
    trained = [(sid_fm.trainable_weights(net), rate) for net, rate in zip((student, fake), rates)]
    optimizers = [torch.optim.Adam(weights, rate, betas=(0.0, 0.99), fused=True) for weights, rate in trained]
    schedules = [cosine(optimizer, iters) for optimizer in optimizers]
    # The running mean covers about the last sixth of the iterations so far.
    average = AveragedModel(student, avg_fn=lambda mean, new, n: torch.lerp(mean, new, 6 / (n + 6)))
    rng = torch.Generator(next(student.parameters()).device).manual_seed(seed)
    log, copies, marks = defaultdict(list), {}, {*np.geomspace(1, iters, 12).astype(int).tolist()}
    loop = sid_fm.distill(teacher, student, fake, optimizers, batches, shape, iters=iters, rng=rng, **options)
    for i, measured in enumerate(loop, 1):
        for name, value in measured.items():
            log[name].append(float(value))
        if measured["skipped"]:
            settings = ", ".join(f"{key} {x}" for key, x in options.items() if isinstance(x, str | int | float))
            raise FloatingPointError(f"a student diverged at iteration {i} ({settings})")
        for schedule in schedules:
            schedule.step()
        average.update_parameters(student)
        if i in marks:
            copies[i] = copy.deepcopy(average.module)
        bar.set_postfix_str(f"Fisher estimate {log['fisher'][-1]:.2g}", refresh=False)
        bar.update()
    return Distilled(average.module, fake, dict(log), copies)


RATE = 3e-3  # the learning rate of students and fake networks


def toy_student(
    teacher: nn.Module, iters: int, seed: int, bar: tqdm, start: Distilled | None = None, data=None, **options
) -> Distilled:
    """Distills the teacher. Student and fake network start as copies of the teacher, or of the two
    in `start`. data: a Mixture of real samples for the data-aided loss, or None."""
    student, fake = map(copy.deepcopy, (start.student, start.fake) if start else (teacher, teacher))
    rng = torch.Generator().manual_seed(seed + 1)
    batches = ((None, (data.sample(1024, rng), None) if data else None) for _ in itertools.count())
    options = {"rates": (RATE, RATE), "warmup": (0, 0)} | options
    return distill_student(
        teacher, student, fake, batches=batches, shape=(1024, 2), iters=iters, seed=seed, bar=bar, **options
    )


def run_jobs(jobs: dict[str, tuple[int, Callable[[tqdm], object]]]) -> dict:
    """Runs jobs in two threads. jobs: name -> (iterations, job). Returns name -> job(bar).
    PyTorch releases Python's global lock in its kernels, so both threads compute. After Ctrl-C or
    an error in one job, other jobs stop at their next bar.update()."""
    stopped = threading.Event()

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise KeyboardInterrupt
            return super().update(n)

    def run(i: int, name: str) -> object:
        torch.set_num_threads(1)  # each thread has its own setting
        iters, job = jobs[name]
        title = f"{i} of {len(jobs)}: {name}" if len(jobs) > 1 else name
        with Bar(total=iters, desc=title, mininterval=0.5, leave=False) as bar:
            return job(bar)

    pool = ThreadPoolExecutor(2)
    futures = {pool.submit(run, i, name): name for i, name in enumerate(jobs, 1)}
    try:
        done = {futures[future]: future.result() for future in as_completed(futures)}
        return {name: done[name] for name in jobs}
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# The derivation, checked
# ----------------------------------------------------------------------------------------------------------------------
# step_n_... yields the claims of step n of the README's derivation, each with its error and its
# tolerance. Tensors are float64. The tests call these functions with other settings too.

EXACT, MEAN = 1e-9, 5.0  # tolerances: relative, for exact claims; in standard errors, for means
Claims = Iterator[tuple[str, float, float]]


def equal(claim: str, value: Tensor, expected: Tensor) -> tuple[str, float, float]:
    """Returns the claim value = expected. The error is relative to the largest expected number."""
    return claim, float((value - expected).detach().abs().max() / expected.detach().abs().max()), EXACT


def mean_is_zero(claim: str, samples: Tensor) -> tuple[str, float, float]:
    """Returns the claim that samples: [n, ...] have mean 0. The error is in standard errors."""
    standard_error = samples.std(0) / len(samples) ** 0.5
    return claim, float((samples.mean(0).abs() / standard_error).detach().max()), MEAN


# DATA has no symmetry that could hide a mistake. GENERATOR is x_g = mu + sigma z.
MEANS = torch.tensor([[1.0, 0.3], [-0.7, 0.9], [-0.2, -1.1], [0.8, -0.9], [0.1, 0.2]]).double()
DATA, GENERATOR = Mixture(MEANS, 0.3, torch.arange(1, 6)), Mixture(MEANS[:1], 0.6)


def noisy(data: Mixture, n: int, rng: torch.Generator, path: str = "rf") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns n samples x_0, e, t and x_t, at times where s/a is between 1/50 and 50."""
    t = sid_fm.time_at(torch.ones(n), (math.log(50) * (2 * torch.rand(n, generator=rng) - 1)).exp(), path)
    x_0 = data.sample(n, rng)
    e = noise_like(x_0, rng)
    return x_0, e, t, add_noise(x_0, e, t, path)


def step_2_bayes(rng: torch.Generator, path: str = "rf") -> Claims:
    _, _, t, x_t = noisy(DATA, 1, rng, path)
    x_0, (a, s, _, _) = DATA.sample(100_000, rng), path_terms(t, path)
    weight = (-((x_t - a * x_0) ** 2).sum(1) / (2 * s**2)).softmax(0)[:, None]
    errors = weight * (x_0 - DATA.posterior_mean(x_t, t, path))
    yield mean_is_zero("Bayes: D(x_t, t) is the mean of data samples weighted by N(x_t; a x_0, s^2 I)", errors)

    x_0, e, t, x_t = noisy(DATA, 1000, rng, path)
    x_t.requires_grad_()
    (slope,) = torch.autograd.grad(DATA.log_components(x_t, t, path).logsumexp(1).sum(), x_t)
    score = DATA.predict(x_t, t, None, path, "score")
    yield equal("Tweedie: the score that follows from D is the gradient of log p_t, by autograd", score, slope)

    rows = {kind: sid_fm.prediction_row(kind, *path_terms(t[:, None], path)) for kind in ("x0", "eps", "v", "score")}
    known = {kind: p * x_0 + q * e for kind, (p, q) in rows.items()}
    claim, pairs = "convert: from each of x0, eps, v and score to each", itertools.product(known, known)
    claims = [equal(claim, convert(known[src], x_t, t, path, src, dst), known[dst]) for src, dst in pairs]
    yield max(claims, key=lambda claim: claim[1])


def step_3_one_loss(rng: torch.Generator, path: str = "rf", predicts: str = "v") -> Claims:
    x_0, e, t, x_t = noisy(DATA, 1000, rng, path)
    guess = torch.randn(x_0.shape, generator=rng)  # D^
    p, q = sid_fm.prediction_row(predicts, *path_terms(t[:, None], path))
    error = convert(guess, x_t, t, path, "x0", predicts) - (p * x_0 + q * e)
    rho = error.square().sum(1) / (guess - x_0).square().sum(1)
    yield equal(f"|{predicts} error|^2 = rho(t) |D^ - x_0|^2", rho / loss_factor(t, path, predicts), torch.ones(1))


def step_4_paths(rng: torch.Generator, path: str = "trig", predicts: str = "v") -> Claims:
    _, _, t, x_t = noisy(DATA, 1000, rng)
    view = sid_fm.as_rectified_flow(partial(DATA.predict, path=path, predicts=predicts), path, predicts)
    claim = f"equal-SNR map: a network on {path}, seen through it, gives the Rectified Flow velocity"
    yield equal(claim, view(x_t, t), DATA.predict(x_t, t))


def step_6_fake_network(rng: torch.Generator) -> Claims:
    x_g, e, t, x_t = noisy(GENERATOR, 100_000, rng)
    v = GENERATOR.predict(x_t, t).requires_grad_()
    (slope,) = torch.autograd.grad(sid_fm.flow_matching_loss(v, x_g, e, t), v)
    # The loss is quadratic in v, so v minimises it if its slope along every u(x_t) is zero.
    slopes = [(len(x_t) * slope * u).sum(1) for u in (torch.ones(1), x_t, x_t.sin())]
    yield mean_is_zero("psi* minimises flow matching on samples of the generator", torch.stack(slopes, 1))


# In one dimension, quadrature computes expectations. THETA = (m, sigma) is the generator.
LINE = Mixture(torch.tensor([[-1.0], [0.4], [1.2]]).double(), 0.5, torch.arange(1, 4))
THETA, TIMES = torch.tensor([0.3, 0.3]).double(), torch.tensor([0.15, 0.35, 0.55, 0.75, 0.95]).double()


def line_losses(data: Mixture, theta: Tensor, psi: Tensor, weight: str = "1-t") -> tuple[Tensor, Tensor]:
    """Returns L1 and L2 of the generator theta, by sid_loss and Gauss-Hermite quadrature over z, e.
    The fake network is optimal for the generator psi = (m, sigma), so psi*(theta) = theta."""
    x, w = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(64))
    z, e, t = (grid.flatten() for grid in torch.meshgrid(x, x, TIMES, indexing="ij"))
    share = torch.outer(w, w).flatten().repeat_interleave(len(TIMES)) / w.sum() ** 2 * len(x) ** 2
    x_g = (theta[0] + theta[1] * z)[:, None]
    x_t = add_noise(x_g, e[:, None], t)
    f_phi, f_psi = data.posterior_mean(x_t, t), Mixture(psi[:1, None], psi[1]).posterior_mean(x_t, t)
    L2, L2_minus_L1 = (sid_loss(x_g, f_phi, f_psi, t, alpha, share * sid_fm.WEIGHTS[weight](t)) for alpha in (0, 1))
    return L2 - L2_minus_L1, L2


def gradients(data: Mixture, theta: Tensor) -> dict[str, Tensor]:
    """Returns gradients in (m, sigma): [2] each. "L1" and "L2" hold psi at psi*(theta). The part of
    L1's gradient "through psi*" is the rest. The "true" gradient, of L, is "L1" plus this rest."""
    theta, psi = theta.clone().requires_grad_(), theta.clone().requires_grad_()
    parts = [torch.autograd.grad(L, (theta, psi), retain_graph=True) for L in line_losses(data, theta, psi)]
    (L1, through), (L2, _) = parts
    return {"true": L1 + through, "L1": L1, "L2": L2, "through psi*": through}


def step_7_identity(rng: torch.Generator, data: Mixture = LINE, theta: Tensor = THETA, weight: str = "1-t") -> Claims:
    x_g, _, t, x_t = noisy(GENERATOR, 100_000, rng)
    f_phi, f_psi = DATA.posterior_mean(x_t, t), GENERATOR.posterior_mean(x_t, t)
    errors = [(u * (f_psi - x_g)).sum(1) for u in (f_phi - f_psi, x_t.sin())]
    yield mean_is_zero("score identity: E[u(x_t) . f_psi*] = E[u(x_t) . x_g]", torch.stack(errors, 1))

    L, L2 = line_losses(data, theta, theta, weight)
    yield equal("at psi* L2 is equal to L1, which is then L, the Fisher divergence", L2, L)


def step_8_alpha(rng: torch.Generator, data: Mixture = LINE, theta: Tensor = THETA) -> Claims:
    g = gradients(data, theta)
    r = g["L2"] - g["L1"]
    yield equal("alpha = 1/2 gives half of the true gradient", g["L2"] - g["L1"] / 2, g["true"] / 2)
    yield equal("alpha = 1 gives r, half of what flows through psi*(theta) in L1", r, g["through psi*"] / 2)


def step_9_guidance(rng: torch.Generator) -> Claims:
    def net(x_t: Tensor, t: Tensor, cond: dict) -> Tensor:  # it is exact for data N(0, sigma^2)
        return Mixture(torch.zeros(1, 1), cond["sigma"]).predict(x_t, t)

    x_t, t, sigma = torch.randn(9, 1, generator=rng), torch.full((9,), 0.5), torch.full((9, 1), 0.5)
    v, _ = sid_fm.guided(net, x_t, t, {"sigma": sigma}, {"sigma": 2 * sigma[:1]}, guidance=2.5)
    claim = "guided by 2.5 from N(0, 1) to N(0, 1/4), the score at t = 1/2 is that of N(0, 1/5)"
    yield equal(claim, convert(v, x_t, t, "rf", "v", "score"), -5 * x_t)


def step_10_few_steps(rng: torch.Generator, steps: int = 4, noise: str = "fresh", k: int = 4) -> Claims:
    net, z, same_rng = Net(), torch.randn(8, 2, generator=rng), torch.Generator().manual_seed(1)
    x_g = generate(net, z, None, steps, noise, stop_after=k, rng=torch.Generator().manual_seed(1))
    x_t = z
    for i in range(k):
        t, t_next = 1 - i / steps, 1 - (i + 1) / steps
        v = net(x_t.detach(), torch.full((8,), t))
        x_0 = x_t.detach() - t * v
        n = {"fresh": noise_like(z, same_rng), "fixed": z, "ddim": x_t + (1 - t) * v}[noise]
        x_t = (1 - t_next) * x_0 + t_next * n
    yield equal("generate: D at t = 1 - i/K, then noise up to the next time", x_g, x_0)
    slopes = (torch.autograd.grad(x.square().sum(), net.first.weight)[0] for x in (x_g, x_0))
    yield equal("generate: only the last step carries gradient", *slopes)


STEPS = [function for name, function in [*globals().items()] if name.startswith("step_")]


def check_all(seed: int) -> bool:
    """Prints each claim with its error and tolerance. Returns True if all claims hold."""
    print("The derivation: step, claim, error, tolerance (1e-09: relative; 5: in standard errors)\n")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # the tensors are too small for a second thread to save time
    torch.manual_seed(seed)
    verdicts = []
    for step in STEPS:
        for claim, error, tolerance in step(torch.Generator().manual_seed(seed)):
            verdicts.append(error <= tolerance)
            number, verdict = step.__name__.split("_")[1], "ok" if verdicts[-1] else "FAILED"
            print(f"{number:>2}  {claim:90} {error:7.2g} <= {tolerance:<5g} {verdict}")
    print(f"\n{sum(verdicts)} of {len(verdicts)} hold\n")
    torch.set_default_dtype(torch.float32)
    return all(verdicts)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def toy_samples(
    net: Callable, z: Tensor, steps: int, noise: str = "ddim", seed: int = 0, all_outputs: bool = False
) -> Tensor:
    """Generates samples from z: [n, 2] in `steps` steps, which are Euler's with ddim noise. With
    all_outputs, an equal share of them is taken after each step, as in distillation. -> [n, 2]"""
    rng, parts = torch.Generator().manual_seed(seed), []
    for chunk in z.split(5000):  # the activations of 5000 samples fit in the cache
        shares = enumerate(chunk.tensor_split(steps), 1) if all_outputs else [(steps, chunk)]
        parts += [generate(net, share, None, steps, noise, stop_after=k, rng=rng) for k, share in shares]
    return torch.cat(parts)


class MixtureMeasure:
    """Measures samples that are generated from z: [n, 2]. It compares them with exact projected
    quantiles of the mixture, and with samples of the exact velocity in 64 Euler steps."""

    def __init__(self, mixture: Mixture, z: Tensor, directions: int = 256):
        self.mixture, self.z = mixture, z
        angle = (torch.arange(directions) + 0.5) * (math.pi / directions)
        self.directions = torch.stack([angle.cos(), angle.sin()])
        levels = (np.arange(len(z)) + 0.5) / len(z)
        x = torch.linspace(-4, 4, 8001).double()  # this interval contains every mixture here
        self.quantiles = np.empty((directions, len(z)), np.float32)
        for row, centre in zip(self.quantiles, (mixture.means @ self.directions).double().T):
            cdf = torch.special.ndtr((x[:, None] - centre) / mixture.sigma) @ mixture.weights.double()
            row[:] = np.interp(levels, cdf.numpy(), x.numpy())
        self.exact = toy_samples(mixture.predict, z, 64)
        self.exact_w2 = self.sliced_w2(self.exact)

    def sliced_w2(self, x: Tensor) -> float:
        """Returns the root mean square difference of projected quantiles. x: [n, 2]"""
        projected = np.sort((x @ self.directions).T.contiguous().numpy(), axis=1)
        return float(np.sqrt(np.mean((projected - self.quantiles) ** 2)))

    def masses(self, x: Tensor) -> Tensor:
        """Returns the share of samples in each mode: the mean of p(m | x) over samples. [M]"""
        return self.mixture.log_components(x, torch.zeros(len(x))).softmax(1).mean(0)

    def scores(self, x: Tensor) -> dict[str, float]:
        """Returns sliced W2, its ratio to the exact velocity's, the largest relative error of a
        mode's mass, and the shares of samples within 3 and 4 sigma of a mode. x: [n, 2]"""
        w2, weights = self.sliced_w2(x), self.mixture.weights
        distance = torch.cdist(x, self.mixture.means).min(1).values / self.mixture.sigma
        return {
            "w2": w2,
            "ratio": w2 / self.exact_w2,
            "mass_error": float((self.masses(x) / weights - 1).abs().max()),
            "within_3_sigma": float((distance < 3).float().mean()),
            "within_4_sigma": float((distance < 4).float().mean()),
        }

    def progress(self, run: Distilled, cost: int = 1) -> list[tuple[float, float, float]]:
        """Returns a row for each copy of the student: iterations times `cost`, its sliced W2 in one
        step as a multiple of the exact velocity's, and the median of its last 20 Fisher estimates."""
        w2 = {i: self.sliced_w2(toy_samples(net, self.z, 1)) for i, net in run.copies.items()}
        fisher = {i: float(np.median(run.log["fisher"][max(0, i - 20) : i])) for i in w2}
        return [(cost * i, w2[i] / self.exact_w2, fisher[i]) for i in w2]


def print_scores(table: dict[str, dict]) -> None:
    """Prints sliced W2 as a multiple of the exact velocity's, and shares of samples in percent."""
    print(f"\n{'':37}sliced W2 x exact  mass error  within 3 sigma  within 4 sigma")
    for name, row in table.items():
        shares = f"{row['mass_error']:12.1%}{row['within_3_sigma']:16.2%}{row['within_4_sigma']:16.2%}"
        print(f"{name:37}{row['ratio']:17.2f}{shares}")


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------

TITLES = {"sid": "SiD", "dmd": "DMD"}  # names of the losses in tables
INK, GREY, BLUE, RED, GREEN, GOLD = "#1f2430", "#8b95a1", "#2f6fb3", "#c8453b", "#3a8f5c", "#c08a1e"


def save_figure(figure, file: Path) -> None:
    """Writes the figure as PNG, closes it, and prints the name of the file."""
    sid_fm.write(file, partial(figure.savefig, format="png"))
    sid_fm.pyplot().close(figure)
    print(f"  plotted {file}", flush=True)


def plot_densities(file: Path) -> None:
    """Plots pi(lambda) of the recipes, as the paper's figure 2 does."""
    figure, axis = sid_fm.pyplot().subplots(figsize=(8, 4.4))
    lam = torch.linspace(-30, 30, 6001).double()
    for (name, recipe), color in zip(RECIPES.items(), (GREY, GREEN, INK, BLUE, GOLD, RED)):
        axis.plot(lam, weight_density(recipe, lam), color=color, label=name, linewidth=2)
    axis.set(xlabel=r"log-SNR  $\lambda = \log(a^2/s^2)$:  noise left, data right", ylabel=r"$\pi(\lambda)$")
    axis.set(xlim=(-8, 20), ylim=(0, 0.27))
    axis.set_title("One loss, six recipes: where each puts its weight", loc="left")
    axis.text(14.2, 0.19, "uniform times end at\nt = 0.001 (vertical):\noff the scale", fontsize=9, color=INK)
    axis.legend(fontsize=9, loc="upper left")
    save_figure(figure, file)


def plot_alpha(file: Path) -> None:
    """Plots exact gradients of L_alpha in (m, sigma), and their angles to the true gradient."""
    figure, (plane, line) = sid_fm.pyplot().subplots(1, 2, figsize=(11, 4))
    g, alphas = gradients(LINE, THETA), torch.linspace(0, 1.5, 61)
    for name, vector, color in (
        (r"true gradient $dL/d\theta$", g["true"], INK),
        (r"$\nabla L_1$, the naive loss", g["L1"], RED),
        (r"$\nabla L_2$: $\alpha = 0$", g["L2"], GREY),
        (r"$\alpha = 1/2$: half of the true gradient", g["L2"] - g["L1"] / 2, BLUE),
        (r"$\alpha = 1$: $r$, the part that $\nabla L_2$ lacks", g["L2"] - g["L1"], GREEN),
    ):
        plane.plot(*[[0, x] for x in vector], "-o", markevery=[1], color=color, linewidth=2.5, label=name)
    along = g["L2"] - alphas[:, None] * g["L1"]
    plane.plot(*along.T, ":", color=INK, linewidth=1, label=r"$\nabla L_\alpha$, $\alpha$ from 0 to 1.5")
    plane.set(xlabel="d/dm", ylabel=r"d/d$\sigma$", aspect="equal", xticks=(-0.08, -0.04, 0))
    plane.set_title(r"Gradients in $(m, \sigma)$; $\nabla$ holds $\psi$", loc="left")
    plane.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1, 0.5))
    degrees = torch.cosine_similarity(torch.cat([along, g["L1"][None]]), g["true"][None]).acos().rad2deg()
    line.plot(alphas, degrees[:-1], color=INK, linewidth=2)
    line.set(xlabel=r"$\alpha$", ylabel="degrees", ylim=(0, None))
    line.set_title(rf"Angle of $\nabla L_\alpha$ to the true gradient ($\nabla L_1$: {degrees[-1]:.0f}°)", loc="left")
    for alpha, label in ((0.5, "unbiased"), (1.0, "the authors' choice")):
        line.axvline(alpha, color=GREY, linestyle=":")
        line.text(alpha + 0.02, 0.95, label, transform=line.get_xaxis_transform(), color=INK, fontsize=9)
    save_figure(figure, file)


def scatter(axis, x: Tensor, title: str, limit: float) -> None:
    axis.plot(*x[:8000].T, ".", color=BLUE, markersize=1.2, alpha=0.3)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axis.set_title(title.replace(", ", "\n"), fontsize=11)


def plot_samples(file: Path, panels: dict[str, Tensor]) -> None:
    """Plots data, teacher and students side by side."""
    figure, axes = sid_fm.pyplot().subplots(1, len(panels), figsize=(2.4 * len(panels), 3.2))
    for axis, (name, x) in zip(axes, panels.items()):
        scatter(axis, x, name, 1.15 * float(panels["data"].abs().max()))
    save_figure(figure, file)


def plot_curves(file: Path, students: dict[str, list[tuple]], xlabel: str) -> None:
    """Plots the rows of `progress` side by side. Runs whose fake network lags are dashed."""
    figure, axes = sid_fm.pyplot().subplots(1, 2, figsize=(10, 3.8))
    axes[0].set_title("sliced W2, as a multiple of the exact velocity's", loc="left")
    axes[1].set_title("Fisher estimate: what a run shows of itself", loc="left")
    for (name, rows), color in zip(students.items(), (BLUE, BLUE, RED, RED)):
        x, *curves = zip(*rows)
        for axis, y in zip(axes, curves):
            axis.plot(x, y, "--" if "lags" in name else "-", color=color, linewidth=2, label=name)
            axis.set(xscale="log", yscale="log", xlabel=xlabel)
    axes[0].legend(fontsize=9)
    save_figure(figure, file)


def plot_masses(file: Path, panels: dict[str, tuple[Tensor, Tensor]], errors: dict[str, float]) -> None:
    """Plots samples, the masses of their modes below them, and at the right the largest error of a
    mass for each pair of scales. An infinite error means that the run diverged."""
    figure = sid_fm.pyplot().figure(figsize=(12, 4.4))
    grid = figure.add_gridspec(2, len(panels) + 1, height_ratios=(2, 1), width_ratios=[1] * len(panels) + [1.7])
    for i, (name, (x, masses)) in enumerate(panels.items()):
        scatter(figure.add_subplot(grid[0, i]), x, name, 3.2)
        below = figure.add_subplot(grid[1, i])
        below.bar(range(len(masses)), (100 * masses).tolist(), color=BLUE)
        below.axhline(100 / len(masses), color=RED, linewidth=1.5, linestyle=":")
        below.set(ylim=(0, 25), xticks=[], yticks=(0, 12.5, 25) if i == 0 else [])
        below.grid(visible=False)
    figure.axes[1].set_ylabel("mass of a mode, %")
    axis, heights = figure.add_subplot(grid[:, -1]), [100 * x for x in errors.values()]
    axis.plot(range(len(errors)), heights, "o-", color=RED, linewidth=2)
    for i in np.flatnonzero(~np.isfinite(heights)):
        axis.text(i, 0.5, "diverges", rotation=90, ha="center", va="center", transform=axis.get_xaxis_transform())
    axis.set(xlim=(-0.4, len(errors) - 0.6), ylim=(0, None), xticks=range(len(errors)))
    axis.set_xticklabels([name.replace(", ", "\n") for name in errors])
    axis.set_xlabel("scales: of the SiD loss (above)\nand of the discriminator's (below)", fontsize=9)
    axis.set_title("largest error of a mass, %", loc="left", fontsize=11)
    save_figure(figure, file)


def plot_sweep(file: Path, tables: dict[str, tuple[str, dict, dict]], cells: dict[str, dict]) -> None:
    """Plots each table as a heat map of W2 ratios. A cell is red if all of its runs diverged."""
    widths = [len(columns) + 1 for _, _, columns in tables.values()]
    figure, axes = sid_fm.pyplot().subplots(1, len(tables), figsize=(13, 4), width_ratios=widths)
    colours = sid_fm.pyplot().get_cmap("viridis").with_extremes(bad=RED)
    for axis, (title, (xlabel, rows, columns)) in zip(axes, tables.items()):
        grid = [[cells[f"{row}, {column}"] for column in columns] for row in rows]
        ratios = np.array([[cell.get("ratio", np.nan) for cell in line] for line in grid])
        axis.imshow(np.log(ratios), cmap=colours, aspect="auto", vmin=math.log(1.5), vmax=math.log(20))
        for (i, j), ratio in np.ndenumerate(ratios):
            axis.text(j, i, cell_text(grid[i][j]), ha="center", va="center", color=INK if ratio >= 7 else "white")
        axis.set(xticks=range(len(columns)), yticks=range(len(rows)), yticklabels=rows)
        axis.set_xticklabels([column.replace(" ", "\n") for column in columns])
        axis.set_xlabel(xlabel)
        axis.set_title(title, loc="left")
        axis.grid(visible=False)
    save_figure(figure, file)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

TEACHER_ITERS = 6000
SEEDS = 3  # of each cell of the sweep


def plural(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def prepare_toy(args: argparse.Namespace, teaches: str | None = None) -> tuple[MixtureMeasure, nn.Module]:
    """Returns the measure of the mixture, and a teacher that learns it or the mixture `teaches`."""
    samples, iters = (10_000, TEACHER_ITERS // 4) if args.quick else (50_000, TEACHER_ITERS)
    z = torch.randn(samples, 2, generator=torch.Generator().manual_seed(args.seed + 1000))
    job = iters, partial(toy_teacher, MIXTURES[teaches or args.mixture], args.path, iters, args.seed)
    return MixtureMeasure(MIXTURES[args.mixture], z), run_jobs({"teacher": job})["teacher"]


def run_toy(args: argparse.Namespace) -> None:
    """Trains the teacher, distills the students, prints the table and plots the figures."""
    plot_densities(args.out / "densities.png")
    plot_alpha(args.out / "alpha.png")
    start = time.perf_counter()
    measure, teacher = prepare_toy(args)
    print(f"  teacher trained on the {args.path} path ({time.perf_counter() - start:.0f} s)")
    kinds = (args.loss, args.steps), (args.loss, 1), ("dmd" if args.loss == "sid" else "sid", 1)
    students = {f"{TITLES[loss]} {k}-step student": {"loss": loss, "steps": k} for loss, k in kinds}
    options = {"alpha": args.alpha, "weight": args.weight, "noise": args.noise}
    distill = partial(toy_student, teacher, args.iters, args.seed, **options)
    results = run_jobs({name: (args.iters, partial(distill, **kind)) for name, kind in students.items()})
    print(f"  students distilled, with running means of their weights ({time.perf_counter() - start:.0f} s); measuring")

    rng, z = torch.Generator().manual_seed(args.seed + 2000), measure.z
    data = torch.cat([measure.mixture.sample(len(chunk), rng) for chunk in z.split(5000)])
    samples = {"data": data, "exact velocity, 64 steps": measure.exact}
    samples |= {f"teacher, {plural(n)}": toy_samples(teacher, z, n) for n in (1, 2, 4, 8, 16, 64)}
    for name, kind in students.items():
        steps, sample = kind["steps"], partial(toy_samples, results[name].student, z, noise=args.noise, seed=args.seed)
        samples |= {f"{name}, {plural(n)}": sample(n) for n in sorted({1, 2, 3, 4, steps}) if n <= steps}
        if steps > 1:
            samples[f"{name}, all its outputs"] = sample(steps, all_outputs=True)
    table = {name: measure.scores(x) for name, x in samples.items()}
    print_scores(table)
    notes = {"args": vars(args), "seconds": time.perf_counter() - start, "table": table}
    sid_fm.write_json(args.out / "results.json", notes)

    one_step, few_step = f"{TITLES[args.loss]} 1-step student", f"{TITLES[args.loss]} {args.steps}-step student"
    shown = ["data", *(f"teacher, {plural(n)}" for n in (1, 4, 64))]
    shown += [f"{one_step}, 1 step", f"{few_step}, {plural(args.steps)}"]
    plot_samples(args.out / "samples.png", {name: samples[name] for name in shown})
    plot_curves(args.out / "convergence.png", {one_step: measure.progress(results[one_step])}, "iterations")


def cell_text(cell: dict, separator: str = "\n") -> str:
    """Returns a cell of the sweep as text: W2 ratio, share within 3 sigma, runs that diverged."""
    numbers = [f"{cell['ratio']:.1f}", f"{cell['within_3_sigma']:.0%}"] if "ratio" in cell else []
    return separator.join(numbers + [f"{cell['diverged']} of {SEEDS} div."] * bool(cell["diverged"]))


def sweep_toy(args: argparse.Namespace) -> None:
    """Distills students of three seeds for each cell of two tables. Prints and plots the medians.
    A student has diverged if it skips an update, or ends worse than its teacher's one step."""
    measure, teacher = prepare_toy(args)
    weights = {weight: {"weight": weight} for weight in ("1-t", "sid", "1/t", "1/t^2", "snr")}
    losses = {f"SiD, alpha = {alpha}": {"alpha": alpha} for alpha in (0.0, 0.5, 1.0)} | {"DMD": {"loss": "dmd"}}
    laws = {"uniform t": {"law": None}, "logit-normal t": {"law": (0.0, 1.0)}}
    steps = {plural(k): {"steps": k} for k in (1, 2, 4)}
    tables = {  # title -> label of the columns, rows, columns
        "One step: which loss?": ("w(t), with the authors' p(t)", losses, weights),
        "SiD, alpha = 1: how many steps?": ("w(t); then p(t), with w = 1-t", steps, weights | laws),
    }
    worst = measure.scores(toy_samples(teacher, measure.z, 1))["ratio"]

    def cell(bar: tqdm, steps: int = 1, **choice) -> dict:
        rows = []
        for seed in range(args.seed, args.seed + SEEDS):
            with contextlib.suppress(FloatingPointError):
                run = toy_student(teacher, args.iters, seed, bar, steps=steps, noise=args.noise, **choice)
                rows.append(measure.scores(toy_samples(run.student, measure.z, steps, args.noise, args.seed)))
        rows = [row for row in rows if row["ratio"] < worst]
        names = ("ratio", "within_3_sigma") if rows else ()
        return {name: float(np.median([row[name] for row in rows])) for name in names} | {"diverged": SEEDS - len(rows)}

    jobs = {}
    for _, rows, columns in tables.values():
        for (row, choice), (column, other) in itertools.product(rows.items(), columns.items()):
            jobs[f"{row}, {column}"] = SEEDS * args.iters, partial(cell, **choice, **other)
    cells = run_jobs(jobs)
    sid_fm.write_json(args.out / "sweep.json", {"args": vars(args), "cells": cells})
    print(f"\n{'':32}sliced W2 x exact, within 3 sigma; medians of {SEEDS} seeds, and runs that diverged")
    for name, measured in cells.items():
        print(f"{name:32}{cell_text(measured, ', ')}")
    plot_sweep(args.out / "sweep.png", tables, cells)
    print(f"\n{SEEDS * len(jobs)} students of {args.iters} iterations")


def data_toy(args: argparse.Namespace) -> None:
    """Shows what real data add. The teacher learns a ring whose modes have masses 1 : 2 : ... : 8.
    The real data have equal masses. A data-free student also learns its teacher's error."""
    measure, teacher = prepare_toy(args, teaches="unequal")
    distill = partial(toy_student, teacher, args.iters, args.seed, steps=1)
    free = run_jobs({"data-free student": (args.iters, distill)})["data-free student"]
    # These are pairs of sid_scale and discriminator_scale. With Adam only the ratio of the losses
    # matters. At (100, 1) the SiD loss is far larger than the adversarial term, and the fake
    # network's own loss is far larger than the discriminator's. At (0, 100) there is no SiD loss.
    scales = ((100, 1), (1, 100), (0.03, 100), (0, 100))
    distill = partial(distill, rates=(RATE / 3, RATE / 3), start=free, data=measure.mixture)

    def aided(bar: tqdm, sid: float, discriminator: float) -> Tensor:
        with contextlib.suppress(FloatingPointError):
            run = distill(bar, sid_scale=sid, discriminator_scale=discriminator)
            return toy_samples(run.student, measure.z, 1)
        return torch.full_like(measure.z, math.nan)

    jobs = {f"{sid:g}, {disc:g}": (args.iters, partial(aided, sid=sid, discriminator=disc)) for sid, disc in scales}
    done = run_jobs(jobs)
    samples = {"teacher, 1 step": toy_samples(teacher, measure.z, 1)}
    samples |= {"teacher, 64 steps": toy_samples(teacher, measure.z, 64)}
    samples |= {"data-free student": toy_samples(free.student, measure.z, 1)}
    samples |= {f"data-aided, scales {name}": done[name] for name in jobs}
    table = {name: measure.scores(x) for name, x in samples.items()}
    print_scores(table)
    sid_fm.write_json(args.out / "data.json", {"args": vars(args), "table": table})
    shown = {"real data": measure.exact, "teacher": samples["teacher, 64 steps"]}
    shown |= {"data-free student": samples["data-free student"]}
    shown |= {"data-aided student": samples["data-aided, scales 0.03, 100"]}
    rows = {name: table[f"data-aided, scales {name}"] for name in jobs}
    worst = table["teacher, 1 step"]["ratio"]  # a student that ends worse has diverged
    errors = {name: row["mass_error"] if row["ratio"] < worst else math.inf for name, row in rows.items()}
    plot_masses(args.out / "data.png", {name: (x, measure.masses(x)) for name, x in shown.items()}, errors)


def lag_toy(args: argparse.Namespace) -> None:
    """Distills one-step students with one or five updates of the fake network per iteration, at its
    usual learning rate or a thirtieth of it. All of them run networks about equally often."""
    measure, teacher = prepare_toy(args)

    def curves(bar: tqdm, updates: int, rate: float, iters: int, cost: int) -> list[tuple]:
        options = {"rates": (RATE, rate), "fake_updates": updates, "weight": args.weight, "steps": 1}
        return measure.progress(toy_student(teacher, iters, args.seed, bar, **options), cost)

    jobs = {}
    for updates, (rate, how) in itertools.product((1, 5), ((RATE, "keeps up"), (RATE / 30, "lags"))):
        cost = 2 * updates + 3  # networks run: 2 per update of the fake one, 3 of the student
        iters = max(1, args.iters * 5 // cost)
        job = iters, partial(curves, updates=updates, rate=rate, iters=iters, cost=cost)
        jobs[f"{updates} update{'s' * (updates > 1)}, {how}"] = job
    done = run_jobs(jobs)
    print(f"\n{'':22}sliced W2 x exact  Fisher estimate")
    for name, rows in done.items():
        print(f"{name:22}{rows[-1][1]:17.2f}{rows[-1][2]:17.2g}")
    sid_fm.write_json(args.out / "lag.json", done)
    plot_curves(args.out / "lag.png", done, "evaluations of networks")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sid_fm.fail
    add = parser.add_argument
    add("--mixture", choices=MIXTURES, default="ring", help="the data (%(default)s)")
    add("--steps", type=int, default=4, help="K of the few-step student (%(default)s)")
    add("--loss", choices=sid_fm.LOSSES, default="sid", help="the students' loss; one more student has the other")
    add("--alpha", type=float, default=1.0, help="alpha of the SiD loss (%(default)s)")
    add("--weight", choices=sid_fm.WEIGHTS, default="1-t", help="w(t) of the SiD or DMD loss (%(default)s)")
    add("--noise", choices=sid_fm.NOISES, default="fresh", help="noise between the student's steps (%(default)s)")
    add("--path", choices=T_END, default="rf", help="the path on which the teacher is trained (%(default)s)")
    add("--iters", type=int, help="distillation's iterations (2000; --quick 300, --sweep 500, --data 1100)")
    add("--seed", type=int, default=0, help="seed of all random numbers (%(default)s)")
    add("--out", type=Path, default=Path("runs/toy_2d"), help="folder of the figures (%(default)s)")
    add("--quick", action="store_true", help="a short run, 25 s")
    only = parser.add_mutually_exclusive_group().add_argument
    only("--check", action="store_true", help="only check the derivation; exit status 1 if a claim fails")
    only("--sweep", action="store_true", help="measure how sensitive the method is to its choices, 20 minutes")
    only("--data", action="store_true", help="show what real data add where the teacher is wrong, 2 minutes")
    only("--lag", action="store_true", help="compare fake networks that keep up or lag behind, 2 minutes")
    args = parser.parse_args()
    if args.data and args.mixture != "ring":
        parser.error("--data is shown on the ring: leave --mixture out")
    if args.iters is None:
        args.iters = 500 if args.sweep else 1100 if args.data else 300 if args.quick else 2000
    return args


def main() -> None:
    args = parse()
    with sid_fm.one_line_errors():
        sid_fm.check_numbers(args)
        held = args.sweep or args.lag or args.data or check_all(args.seed)
        if not args.check:
            args.out.mkdir(parents=True, exist_ok=True)
            (sweep_toy if args.sweep else data_toy if args.data else lag_toy if args.lag else run_toy)(args)
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()
