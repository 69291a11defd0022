"""SiD on 2D mixtures, where every density, score and posterior mean is exact. Read it beside sid_fm.py.

    python toy_2d.py            check the derivation, train a teacher, distill it, print a table, plot figures
    python toy_2d.py --check    the derivation alone: each claim of the paper against an exact value
    python toy_2d.py --sweep    how sensitive the method is to alpha, w(t), p(t) and the number of steps

Chapters: exact mixtures; recipes; teacher and students; the derivation, checked; measuring; figures; command line.
"""

import argparse
import copy
import itertools
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
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
from sid_fm import (
    SID_LAW,
    T_END,
    T_MIN,
    add_noise,
    convert,
    flow_matching_loss,
    generate,
    match_dims,
    noise_like,
    path_terms,
    prediction_row,
    sample_times,
    sid_loss,
    time_at,
)

# ----------------------------------------------------------------------------------------------------------------------
# Exact mixtures
# ----------------------------------------------------------------------------------------------------------------------


class Mixture:
    """p(x_0) = sum_m w_m N(mu_m, sigma^2 I) in d dimensions. With noise added it is a mixture of Gaussians again.

    With one component it is also the affine generator x_g = mu + sigma z, whose psi* is then `posterior_mean`.
    means: [M, d], sigma: a number or a tensor, weights: [M], normalised here.
    """

    def __init__(self, means: Tensor, sigma: float | Tensor, weights: Tensor | None = None):
        self.means, self.sigma = means, sigma
        weights = torch.ones(len(means)) if weights is None else weights
        self.weights = (weights / weights.sum()).to(means)

    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """n samples x_0: [n, d]."""
        means = self.means[torch.multinomial(self.weights, n, replacement=True, generator=rng)]
        return means + self.sigma * noise_like(means, rng)

    def log_components(self, x_t: Tensor, t: Tensor, path: str = "rf") -> Tensor:
        """log w_m N(x_t; a mu_m, (a^2 sigma^2 + s^2) I): [B, M]."""
        a, s, _, _ = path_terms(match_dims(t, x_t), path)
        variance = (a * self.sigma) ** 2 + s**2
        squares = ((x_t[:, None] - a[..., None] * self.means) ** 2).sum(-1)
        return self.weights.log() - squares / (2 * variance) - x_t.shape[1] / 2 * (2 * math.pi * variance).log()

    def log_prob(self, x_t: Tensor, t: Tensor, path: str = "rf") -> Tensor:
        """log p_t(x_t): [B]."""
        return self.log_components(x_t, t, path).logsumexp(1)

    def posterior_mean(self, x_t: Tensor, t: Tensor, path: str = "rf") -> Tensor:
        """D(x_t, t) = E[x_0 | x_t]: the components' posterior means, weighted by their responsibilities. [B, d]"""
        a, s, _, _ = path_terms(match_dims(t, x_t), path)
        mean = self.log_components(x_t, t, path).softmax(1) @ self.means
        return mean + a * self.sigma**2 / ((a * self.sigma) ** 2 + s**2) * (x_t - a * mean)

    def predict(self, x_t: Tensor, t: Tensor, cond: None = None, path: str = "rf", predicts: str = "v") -> Tensor:
        """The output of a perfect network, called as a network is: by default the exact velocity. [B, d]"""
        return convert(self.posterior_mean(x_t, t, path), x_t, t, path, "x0", predicts)


def ring(weights: Tensor | None = None) -> Mixture:
    """Eight Gaussians on the unit circle."""
    angle = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(torch.stack([angle.cos(), angle.sin()], 1), 0.1, weights)


def spirals() -> Mixture:
    """Two arms of 60 small Gaussians each."""
    arm = torch.linspace(0, 1, 60).sqrt()
    angle, radius = 3 * math.pi * arm, 0.15 + 0.95 * arm
    arm = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return Mixture(torch.cat([arm, -arm]), 0.04)


MIXTURES: dict[str, Callable[[], Mixture]] = {
    "ring": ring,
    "grid": lambda: Mixture(torch.cartesian_prod(*[torch.linspace(-1, 1, 5)] * 2), 0.05),
    "unequal": lambda: ring(torch.arange(1.0, 9.0)),
    "spirals": spirals,
}

# ----------------------------------------------------------------------------------------------------------------------
# Recipes: all losses are one loss (paper, figure 2)
# ----------------------------------------------------------------------------------------------------------------------
# Every prediction error is a multiple of one error: |prediction error|^2 = c(t) |D^ - x_0|^2, where D^ is the posterior
# mean that the prediction implies. So recipes differ only in how they weigh noise levels, and all have one minimiser.


class Recipe(NamedTuple):
    """A way to train a network: it predicts `predicts` on `path`, under the squared error times weight(t).

    law: of the times t, as in sid_fm.sample_times: (mean, std) of log(s/a), which is normal, or None for uniform times.
    """

    path: str = "rf"
    predicts: str = "v"
    law: tuple[float, float] | None = None
    weight: Callable[[Tensor], Tensor] = torch.ones_like


RECIPES = {  # for data of variance 1. EDM and TrigFlow are published for a standard deviation of 0.5: hence log 2
    "DDPM, noise prediction": Recipe("vp", "eps"),
    "EDM": Recipe("ve", "x0", (-1.2 + math.log(2), 1.2), lambda t: (t**2 + 1) / t**2),
    "Rectified Flow, uniform t": Recipe("rf", "v"),
    "Rectified Flow, logit-normal t (SD3)": Recipe("rf", "v", (0.0, 1.0)),
    "TrigFlow (sCM)": Recipe("trig", "v", (-1.0 + math.log(2), 1.4)),
    "SiD-DiT's fake network": Recipe("rf", "v", SID_LAW),
}


def loss_factor(t: Tensor, path: str, predicts: str) -> Tensor:
    """c(t): (a' - s' a / s)^2 for v, (a / s)^2 for eps, (a / s^2)^2 for the score, 1 for x0. [B] -> [B]"""
    a, s, da, ds = path_terms(t, path)
    p, q = prediction_row(predicts, a, s, da, ds)
    return ((a * q - s * p) / s) ** 2


def weight_density(recipe: Recipe, log_snr: Tensor) -> Tensor:
    """A recipe as a density over lambda = log(a^2/s^2): pi is proportional to weight(t) c(t) p(t) |dt/dlambda|.

    log_snr: a grid [n] that is wide enough for pi to integrate to 1 over it -> [n]
    """
    path, predicts, law, weight = recipe
    t = time_at((log_snr / 4).exp(), (-log_snr / 4).exp(), path)
    if law is None:  # p(t) is constant between the ends of the path, and |dt/dlambda| = a s / (2 (a s' - s a'))
        a, s, da, ds = path_terms(t, path)
        a_end, s_end, _, _ = path_terms(torch.tensor([T_END[path], T_MIN]).to(log_snr), path)
        low, high = 2 * (a_end / s_end).clamp(min=0).log()
        p = (low < log_snr) * (log_snr < high) * a * s / (a * ds - s * da)
    else:  # lambda = -2 log(s/a) is normal
        p = torch.distributions.Normal(*law).log_prob(-log_snr / 2).exp()
    pi = weight(t) * loss_factor(t, path, predicts) * p
    return pi / torch.trapezoid(pi, log_snr)


# ----------------------------------------------------------------------------------------------------------------------
# Teacher and students
# ----------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A small network: random Fourier features of x_t, harmonics of t, and a residual network of SiLU layers.

    Fourier features of x_t let it learn the sharp one-step map from one Gaussian to eight separate modes. On Rectified
    Flow its output is the velocity. On another path the output is F in D = a x - s F, where x_t, a and s are scaled to
    a^2 + s^2 = 1 (EDM's preconditioning; on TrigFlow F is the velocity). The prediction is computed from F.
    """

    def __init__(self, path: str = "rf", predicts: str = "v"):
        super().__init__()
        self.path, self.predicts = path, predicts
        self.register_buffer("directions", 3 * torch.randn(2, 16))
        self.register_buffer("frequencies", math.pi * torch.arange(1, 5))
        self.first = nn.Linear(2 + 2 * 16 + 2 * 4, 96)
        self.layers = nn.ModuleList(nn.Linear(96, 96) for _ in range(2))
        self.last = nn.Linear(96, 2)

    def output(self, x: Tensor, t: Tensor) -> Tensor:
        waves, phase = x @ self.directions, t[:, None] * self.frequencies
        h = self.first(torch.cat([x, waves.cos(), waves.sin(), phase.cos(), phase.sin()], 1))
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        return self.last(nn.functional.silu(h))

    def forward(self, x_t: Tensor, t: Tensor, cond: dict | None = None) -> Tensor:
        if self.path == "rf":
            return self.output(x_t, t)
        a, s, _, _ = path_terms(match_dims(t, x_t), self.path)
        scale = torch.hypot(a, s)
        x, a, s = x_t / scale, a / scale, s / scale
        F = self.output(x, (s / (a + s)).flatten())
        return {"x0": a * x - s * F, "eps": s * x + a * F, "v": F}[self.predicts]


# The teacher's recipe on each path is the published one. Only on vp the weight 1 / a^2 is added, because the noise
# prediction s x + a F hardly depends on F at the times where generation starts: a is 1/152 there.
TEACHERS = {
    "rf": RECIPES["Rectified Flow, uniform t"],
    "trig": RECIPES["TrigFlow (sCM)"],
    "vp": RECIPES["DDPM, noise prediction"]._replace(weight=lambda t: 1 / path_terms(t, "vp")[0] ** 2),
    "ve": RECIPES["EDM"],
}


def cosine(optimizer: torch.optim.Optimizer, iters: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate falls along half a cosine, to a fiftieth of its first value."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: max(0.02, (1 + math.cos(math.pi * i / iters)) / 2))


def run_jobs(jobs: dict[str, tuple[int, Callable[[tqdm], object]]], threads: int = 2) -> dict:
    """Runs jobs in two threads and returns name -> result. jobs: name -> (iterations, job).

    Each job is called as job(bar) and updates its own progress bar. Torch lets go of Python's lock
    inside its kernels, so both threads compute. After Ctrl-C, or an error in one job, the others
    end at their next bar.update().
    """
    stopped = threading.Event()

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise KeyboardInterrupt
            return super().update(n)

    def run(i: int, name: str) -> object:
        torch.set_num_threads(1)  # each thread has its own setting
        total, job = jobs[name]
        title = f"{i} of {len(jobs)}: {name}" if len(jobs) > 1 else name
        with Bar(total=total, desc=title, mininterval=0.5, leave=False) as bar:
            return job(bar)

    with ThreadPoolExecutor(threads) as pool:
        futures = {name: pool.submit(run, i, name) for i, name in enumerate(jobs, 1)}
        try:
            for future in as_completed(futures.values()):
                future.result()  # raises the error of the first job that failed
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {name: future.result() for name, future in futures.items()}


class Distilled(NamedTuple):
    """The result of one run of distillation."""

    student: nn.Module  # with the running mean of its weights
    fake: nn.Module
    log: dict[str, list[float]]  # name -> one number an iteration: all that sid_fm.distill yields as tensors
    copies: dict[int, nn.Module]  # iterations -> the student (with the running mean) after so many


def distill_student(
    teacher: nn.Module,
    student: nn.Module,
    fake: nn.Module,
    rates: tuple[float, float],
    batches: Iterable[tuple[dict | None, Tensor | None]],
    shape: tuple[int, ...],
    iters: int,
    seed: int,
    bar: tqdm,
    **options,
) -> Distilled:
    """Runs sid_fm.distill with these options. rates: learning rates of student and fake network.

    Adam's second beta is 0.99, where the paper has 0.999. At t = 1 a teacher predicts the mean of the
    data whatever z is, so a one-step student starts as nearly a point. Its gradients soon grow a
    thousandfold, and a slower mean of their squares would lag behind. Raises FloatingPointError if a
    gradient is not finite.
    """
    trained = [(sid_fm.trainable_weights(net), rate) for net, rate in zip((student, fake), rates)]
    optimizers = [torch.optim.Adam(weights, rate, betas=(0.0, 0.99), fused=True) for weights, rate in trained]
    schedules = [cosine(optimizer, iters) for optimizer in optimizers]
    # The running mean reaches back over about the last sixth of the iterations so far.
    average = AveragedModel(student, avg_fn=lambda mean, new, n: torch.lerp(mean, new, 6 / (n + 6)))
    rng = torch.Generator(next(student.parameters()).device).manual_seed(seed)
    log, copies, marks = defaultdict(list), {}, {*np.geomspace(1, iters, 12).astype(int).tolist()}
    loop = sid_fm.distill(teacher, student, fake, optimizers, batches, shape, iters=iters, rng=rng, **options)
    for i, measured in enumerate(loop, 1):
        for name, value in measured.items():
            if isinstance(value, Tensor):
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


def toy_teacher(mixture: Mixture, path: str, iters: int, seed: int, bar: tqdm) -> nn.Module:
    """Trains a network on data by flow matching, with the loss that trains the fake network too.

    Returns it as a Rectified Flow network.
    """
    rng, recipe = torch.Generator().manual_seed(seed), TEACHERS[path]
    torch.manual_seed(seed)  # of the network's first weights
    net = Net(path, recipe.predicts)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3, betas=(0.9, 0.99), fused=True)
    schedule = cosine(optimizer, iters)
    for _ in range(iters):
        x_0 = mixture.sample(1024, rng)
        e, t = noise_like(x_0, rng), sample_times(len(x_0), recipe.law, path, rng)
        pred = net(add_noise(x_0, e, t, path), t)
        loss = flow_matching_loss(pred, x_0, e, t, path, recipe.predicts, recipe.weight(t))
        loss.backward()
        sid_fm.take_step(optimizer)
        schedule.step()
        bar.set_postfix_str(f"loss {float(loss):.2g}", refresh=False)
        bar.update()
    return sid_fm.as_rectified_flow(net, path, recipe.predicts)


def toy_student(teacher: nn.Module, iters: int, seed: int, bar: tqdm, **options) -> Distilled:
    """Distills the teacher. The times of both losses are uniform unless options say otherwise."""
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    batches, options = itertools.repeat((None, None)), {"law": None} | options
    return distill_student(teacher, student, fake, (3e-3, 3e-3), batches, (1024, 2), iters, seed, bar, **options)


# ----------------------------------------------------------------------------------------------------------------------
# The derivation, checked
# ----------------------------------------------------------------------------------------------------------------------
# Each check compares one claim of the paper with a case that is known exactly, in float64. Its other arguments widen it:
# tests/test_toy_2d.py goes through all paths, predictions, weights, noises and numbers of steps.

TOLERANCES = {"relative": 1e-9, "standard errors": 5.0}  # for an exact claim, and for a mean of random samples


class Check(NamedTuple):
    """A claim, the error that was measured, and the unit of the error: a key of TOLERANCES."""

    claim: str
    error: float
    unit: str

    @property
    def ok(self) -> bool:
        return self.error <= TOLERANCES[self.unit]


def equal(claim: str, value: Tensor, expected: Tensor) -> Check:
    """The claim is that two tensors are equal. The error is relative to the largest expected number."""
    return Check(claim, float((value - expected).detach().abs().max() / expected.detach().abs().max()), "relative")


def mean_is_zero(claim: str, samples: Tensor) -> Check:
    """The claim is that random samples have the mean 0. samples: [n, ...]"""
    error = samples.mean(0).abs() / (samples.std(0) / len(samples) ** 0.5)
    return Check(claim, float(error.detach().max()), "standard errors")


BLOB_MEANS = torch.tensor([[1.0, 0.3], [-0.7, 0.9], [-0.2, -1.1], [0.8, -0.9], [0.1, 0.2]]).double()
BLOB = Mixture(BLOB_MEANS, 0.3, torch.arange(1, 6))  # data without a symmetry that could hide a mistake
GENERATOR = Mixture(torch.tensor([[0.4, -0.3]]).double(), 0.6)  # x_g = mu + sigma z


def noisy(data: Mixture, n: int, rng: torch.Generator, path: str = "rf") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n samples x_0, e, t and x_t, at times where s/a is between 1/50 and 50."""
    t = time_at(torch.ones(n), (math.log(50) * (2 * torch.rand(n, generator=rng) - 1)).exp(), path)
    x_0 = data.sample(n, rng)
    e = noise_like(x_0, rng)
    return x_0, e, t, add_noise(x_0, e, t, path)


def check_posterior_mean(rng: torch.Generator, path: str = "rf", predicts: str = "x0", ratio: float = 1.0) -> Check:
    t = time_at(torch.ones(1), torch.tensor([ratio]), path)  # where s/a is `ratio`
    a, s, da, ds = path_terms(t, path)
    x_t = add_noise(BLOB.sample(1, rng), torch.randn(1, 2, generator=rng), t, path)
    x_0 = BLOB.sample(100_000, rng)
    e = (x_t - a * x_0) / s
    weight = (-e.square().sum(1) / 2).softmax(0)[:, None]  # Bayes: N(x_t; a x_0, s^2 I), up to a factor
    p, q = prediction_row(predicts, a, s, da, ds)
    errors = weight * (p * x_0 + q * e - BLOB.predict(x_t, t, None, path, predicts))
    return mean_is_zero(f"Bayes: the mean of {predicts} given x_t is the closed form's, by weighted samples", errors)


def check_tweedie(rng: torch.Generator, path: str = "rf") -> Check:
    _, _, t, x_t = noisy(BLOB, 1000, rng, path)
    x_t.requires_grad_()
    (slope,) = torch.autograd.grad(BLOB.log_prob(x_t, t, path).sum(), x_t)
    claim = "Tweedie: the score that D gives is the gradient of log p_t, by autograd"
    return equal(claim, BLOB.predict(x_t, t, None, path, "score"), slope)


def check_convert(rng: torch.Generator, path: str = "rf") -> Check:
    x_0, e, t, x_t = noisy(BLOB, 1000, rng, path)
    rows = {kind: prediction_row(kind, *path_terms(t[:, None], path)) for kind in ("x0", "eps", "v", "score")}
    known = {kind: p * x_0 + q * e for kind, (p, q) in rows.items()}
    claim = "convert: from each of x0, eps, v and score to each other"
    pairs = itertools.product(known, known)
    checks = [equal(claim, convert(known[i], x_t, t, path, i, j), known[j]) for i, j in pairs]
    return max(checks, key=lambda check: check.error)


def check_loss_factor(rng: torch.Generator, path: str = "rf", kind: str = "v") -> Check:
    x_0, e, t, x_t = noisy(BLOB, 1000, rng, path)
    guess = torch.randn(x_0.shape, generator=rng)  # D^
    p, q = prediction_row(kind, *path_terms(t[:, None], path))
    error = convert(guess, x_t, t, path, "x0", kind) - (p * x_0 + q * e)
    ratio = error.square().sum(1) / (loss_factor(t, path, kind) * (guess - x_0).square().sum(1))
    return equal(f"all losses are one: |{kind} error|^2 = c(t) |D^ - x_0|^2", ratio, torch.ones(1))


def check_weight_density(rng: torch.Generator) -> Check:
    (m, s), lam = SID_LAW, torch.linspace(-40, 40, 20_001)
    normal = torch.distributions.Normal(-2 * m, 2 * s).log_prob(lam).exp()
    # c = 1/t^2 = (1 + a/s)^2, and a/s = exp(lambda / 2) is log-normal, so that the mean of c is known.
    mean_c = 1 + 2 * math.exp(-m + s**2 / 2) + math.exp(-2 * m + 2 * s**2)
    pi = weight_density(RECIPES["SiD-DiT's fake network"], lam)
    claim = "pi(lambda) of the fake network's recipe is (1 + a/s)^2 times a normal density"
    return equal(claim, pi, (1 + (lam / 2).exp()) ** 2 * normal / mean_c)


def check_equal_snr(rng: torch.Generator, path: str = "trig", predicts: str = "v") -> Check:
    _, _, t, x_t = noisy(BLOB, 1000, rng)
    view = sid_fm.as_rectified_flow(partial(BLOB.predict, path=path, predicts=predicts), path, predicts)
    claim = f"equal-SNR map: a network on {path} seen through it is the Rectified Flow velocity"
    return equal(claim, view(x_t, t), BLOB.predict(x_t, t))


def check_fake_network(rng: torch.Generator) -> Check:
    x_g, e, t, x_t = noisy(GENERATOR, 100_000, rng)
    v = GENERATOR.predict(x_t, t).requires_grad_()
    (slope,) = torch.autograd.grad(flow_matching_loss(v, x_g, e, t), v)
    # The loss is quadratic in v. So v is its minimum if it has no slope in any direction u(x_t) that a network can move.
    directions = torch.stack([torch.ones_like(x_t), x_t, x_t.sin()], 2)
    claim = "the fake network: psi* minimises flow matching on samples of the generator"
    return mean_is_zero(claim, len(x_t) * slope[..., None] * directions)


def check_score_identity(rng: torch.Generator) -> Check:
    x_g, _, t, x_t = noisy(GENERATOR, 100_000, rng)
    f_phi, f_psi = BLOB.posterior_mean(x_t, t), GENERATOR.posterior_mean(x_t, t)
    errors = [(u * (f_psi - x_g)).sum(1) for u in (f_phi - f_psi, x_t.sin())]
    return mean_is_zero("score identity: E[u(x_t) . f_psi*] = E[u(x_t) . x_g]", torch.stack(errors, 1))


# In one dimension expectations can be computed as sums: here are data, and the generator x_g = m + s z at theta = (m, s).
LINE = Mixture(torch.tensor([[-1.0], [0.4], [1.2]]).double(), 0.5, torch.arange(1, 4))
THETA = torch.tensor([0.3, 0.3]).double()
TIMES = torch.tensor([0.15, 0.35, 0.55, 0.75, 0.95]).double()  # t is one of these


def line_losses(data: Mixture, theta: Tensor, psi: Tensor, weight: str = "1-t") -> tuple[Tensor, Tensor]:
    """L1 and L2 by Gauss-Hermite quadrature over z and e, computed by sid_loss.

    theta = (m, s) makes the samples. The fake network is the optimum for the generator with the parameters psi.
    """
    x, w = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(64))
    z, e, t = (grid.flatten() for grid in torch.meshgrid(x, x, TIMES, indexing="ij"))
    node = torch.outer(w, w).flatten().repeat_interleave(len(TIMES)) * 64**2 / (2 * math.pi)
    x_g = (theta[0] + theta[1] * z)[:, None]
    x_t = add_noise(x_g, e[:, None], t)
    f_phi, f_psi = data.posterior_mean(x_t, t), Mixture(psi[:1, None], psi[1]).posterior_mean(x_t, t)
    L2, L2_minus_L1 = (sid_loss(x_g, f_phi, f_psi, t, alpha, node * sid_fm.WEIGHTS[weight](t)) for alpha in (0, 1))
    return L2 - L2_minus_L1, L2


def fisher_divergence(data: Mixture, theta: Tensor, weight: str = "1-t") -> Tensor:
    """L = E[w |f_phi - f_psi*|^2] from the scores: D - D' = (t^2 / (1 - t)) (score - score'), on a grid of x_t."""
    x = torch.linspace(-14, 14, 4001).double()[:, None].requires_grad_()
    total = 0
    for t in TIMES:
        logs = [p.log_prob(x, t.expand(len(x))) for p in (data, Mixture(theta[:1, None], theta[1]))]
        score, score_g = (torch.autograd.grad(log.sum(), x)[0][:, 0] for log in logs)
        integrand = logs[1].detach().exp() * (t**2 / (1 - t) * (score - score_g)) ** 2
        total = total + sid_fm.WEIGHTS[weight](t) * torch.trapezoid(integrand, x.detach()[:, 0]) / len(TIMES)
    return total


def gradients(data: Mixture, theta: Tensor) -> dict[str, Tensor]:
    """The gradients in (m, s) that section 3 of the paper tells apart, at psi*(theta).

    "L1" and "L2" hold psi fixed. "true" is the gradient of the divergence, where psi* moves with theta. "through psi*" is
    the part of it that flows through psi* alone, in L1.
    """
    theta, psi = theta.clone().requires_grad_(), theta.clone().requires_grad_()
    parts = [torch.autograd.grad(L, (theta, psi), retain_graph=True) for L in line_losses(data, theta, psi)]
    (L1, through), (L2, _) = parts
    return {"true": L1 + through, "L1": L1, "L2": L2, "through psi*": through}


def angle(u: Tensor, v: Tensor) -> float:
    """Degrees between two vectors."""
    return math.degrees(math.acos(float((u @ v / (u.norm() * v.norm())).clamp(-1, 1))))


def check_three_forms(rng: torch.Generator, data: Mixture = LINE, theta: Tensor = THETA, weight: str = "1-t") -> Check:
    L = fisher_divergence(data, theta, weight)
    return equal("at psi* L1 = L2 = L, the Fisher divergence", torch.stack(line_losses(data, theta, theta, weight)), L)


def check_lagging_fake(rng: torch.Generator, data: Mixture = LINE, theta: Tensor = THETA, alpha: float = 0.5) -> Check:
    psi = theta + torch.tensor([0.2, 0.15])  # the optimum for another generator
    L1, L2 = line_losses(data, theta, psi)
    gap = fisher_divergence(Mixture(psi[:1, None], psi[1]), theta)  # E[w |f_psi - f_psi*|^2]
    expected = (fisher_divergence(data, theta) - gap) / 2 + (0.5 - alpha) * L1
    return equal(f"at any psi L_alpha at alpha = {alpha} is (L - gap) / 2", L2 - alpha * L1, expected)


def check_alpha_half(rng: torch.Generator, data: Mixture = LINE, theta: Tensor = THETA) -> Check:
    g = gradients(data, theta)
    return equal("alpha = 1/2 gives half of the true gradient", g["L2"] - g["L1"] / 2, g["true"] / 2)


def check_alpha_one(rng: torch.Generator, data: Mixture = LINE, theta: Tensor = THETA) -> Check:
    g = gradients(data, theta)
    claim = "alpha = 1 gives the part of the gradient that flows through psi*(theta)"
    return equal(claim, g["L2"] - g["L1"], g["through psi*"] / 2)


def check_downhill(rng: torch.Generator, data: Mixture = LINE, theta: Tensor = THETA) -> Check:
    g = gradients(data, theta)
    degrees = angle(g["L2"] - g["L1"], g["true"])
    claim = f"alpha = 1 points downhill: {degrees:.1f} degrees from the true gradient"
    return Check(claim, max(0.0, degrees / 90 - 1), "relative")


def check_sid_loss(rng: torch.Generator, alpha: float = 1.0) -> Check:
    x_g, f_phi, f_psi = (torch.randn(7, 3, generator=rng).requires_grad_() for _ in range(3))
    t = sample_times(7, SID_LAW, rng=rng)
    loss = sid_loss(x_g, f_phi, f_psi, t, alpha, "1-t")
    value = torch.stack([loss.expand(7, 3), *torch.autograd.grad(loss, (x_g, f_phi, f_psi))])
    w, difference = (1 - t)[:, None] / 7, f_phi - f_psi
    by_hand = [
        (w * difference * (f_phi - x_g - alpha * difference)).sum().expand(7, 3),
        -w * difference,
        w * (f_phi - x_g + (1 - 2 * alpha) * difference),
        w * (x_g - f_phi + 2 * alpha * difference),
    ]
    return equal("sid_loss and its gradients are the formulas, written out", value, torch.stack(by_hand))


def check_held_weights(rng: torch.Generator) -> Check:
    teacher, touched = Net(), []
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3) for net in (student, fake)]
    held = [*teacher.parameters(), *fake.parameters()]
    optimizers[0].register_step_pre_hook(lambda *_: touched.append(sum(w.grad is not None for w in held)))
    next(sid_fm.distill(teacher, student, fake, optimizers, [(None, None)], (8, 2), rng=rng))
    return Check("no gradient of it reaches the weights of the teacher or of the fake network", touched[0], "relative")


def check_guidance(rng: torch.Generator) -> Check:
    narrow, wide = (Mixture(torch.zeros(1, 1), sigma) for sigma in (0.5, 1.0))

    def net(x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        return torch.where(cond["narrow"][:, None], narrow.predict(x_t, t), wide.predict(x_t, t))

    x_t, t, yes = torch.randn(9, 1, generator=rng), torch.full((9,), 0.5), torch.ones(9, dtype=torch.bool)
    v, _ = sid_fm.guided(net, x_t, t, {"narrow": yes}, {"narrow": ~yes[:1]}, guidance=2.5)
    claim = "guided by 2.5 from N(0, 1) to N(0, 1/4) the score at t = 1/2 is that of a variance of 1/5"
    return equal(claim, convert(v, x_t, t, "rf", "v", "score"), -5 * x_t)


def check_generate(rng: torch.Generator, steps: int = 4, noise: str = "fresh", stop_after: int | None = None) -> Check:
    net, z, last = Net(), torch.randn(8, 2, generator=rng), stop_after or steps
    x_g = generate(net, z, None, steps, noise, stop_after, rng=torch.Generator().manual_seed(1))
    x_t, same_rng = z, torch.Generator().manual_seed(1)
    for i in range(last):
        t, t_next = 1 - i / steps, 1 - (i + 1) / steps
        v = net(x_t.detach(), torch.full((8,), t))  # only the last step carries gradient
        x_0 = x_t.detach() - t * v
        n = {"fresh": noise_like(z, same_rng), "fixed": z, "ddim": x_t + (1 - t) * v}[noise]
        x_t = (1 - t_next) * x_0 + t_next * n
    parts = []
    for x in (x_g, x_0):
        slopes = torch.autograd.grad(x.square().sum(), [*net.parameters()])
        parts.append(torch.cat([x.flatten(), *(slope.flatten() for slope in slopes)]))
    return equal("generate: its steps written out, with gradient through the last step only", *parts)


CHECKS = {  # and the step of the README's derivation that each belongs to
    check_posterior_mean: 2,
    check_tweedie: 2,
    check_convert: 2,
    check_loss_factor: 3,
    check_weight_density: 3,
    check_equal_snr: 4,
    check_fake_network: 6,
    check_score_identity: 7,
    check_three_forms: 7,
    check_sid_loss: 8,
    check_held_weights: 8,
    check_alpha_half: 8,
    check_alpha_one: 8,
    check_downhill: 8,
    check_lagging_fake: 8,
    check_guidance: 9,
    check_generate: 10,
}


def run_check(check: Callable[..., Check], seed: int = 0, **options) -> Check:
    """Runs one check in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(seed)
        return check(torch.Generator().manual_seed(seed), **options)
    finally:
        torch.set_default_dtype(torch.float32)


def check_all(seed: int) -> bool:
    """Prints each claim with its error and tolerance. Returns True if all claims hold."""
    print("The derivation, in float64: step, claim, error, tolerance\n")
    torch.set_num_threads(1)  # tensors are so small that a second thread costs more than it gives
    start, checks = time.perf_counter(), []
    for function, step in CHECKS.items():
        check = run_check(function, seed)
        checks.append(check)
        verdict = "ok" if check.ok else "FAILED"
        print(f"{step:2}  {check.claim:90} {check.error:7.2g} <= {TOLERANCES[check.unit]:g} {check.unit:15} {verdict}")
    held = sum(check.ok for check in checks)
    print(f"\n{held} of {len(checks)} hold ({time.perf_counter() - start:.1f} s)\n")
    return held == len(checks)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------

CHUNK = 5000  # samples that are generated at once: their activations stay in the processor's cache


class MixtureMeasure:
    """Sliced Wasserstein-2 distance to the mixture's exact projected quantiles, and how well its modes are covered."""

    def __init__(self, mixture: Mixture, samples: int, directions: int = 256):
        self.mixture = mixture
        angle = (torch.arange(directions) + 0.5) * (math.pi / directions)
        self.directions = torch.stack([angle.cos(), angle.sin()])
        levels = (np.arange(samples) + 0.5) / samples
        self.quantiles = np.empty((directions, samples), np.float32)
        for row, centre in zip(self.quantiles, (mixture.means @ self.directions).double().T):
            margin = 7 * mixture.sigma
            x = torch.linspace(float(centre.min()) - margin, float(centre.max()) + margin, 4001).double()
            cdf = torch.special.ndtr((x[:, None] - centre) / mixture.sigma) @ mixture.weights.double()
            row[:] = np.interp(levels, cdf.numpy(), x.numpy())

    def sliced_w2(self, x: Tensor) -> float:
        projected = np.sort((x @ self.directions).T.contiguous().numpy(), axis=1)
        return float(np.sqrt(np.mean((projected - self.quantiles) ** 2)))

    def __call__(self, x: Tensor) -> dict[str, float]:
        """A mode's mass is the mean responsibility of its component, relative to the component's weight, which is its exact
        expectation. A mode counts as found if its mass is above a tenth."""
        mass = self.mixture.log_components(x, torch.zeros(len(x))).softmax(1).mean(0) / self.mixture.weights
        distance = torch.cdist(x, self.mixture.means).min(1).values
        return {
            "w2": self.sliced_w2(x),
            "modes": int((mass > 0.1).sum()),
            "mass_error": float((mass - 1).abs().max()),
            "within_4_sigma": float((distance < 4 * self.mixture.sigma).float().mean()),
        }


def euler(net: Callable, steps: int) -> Callable[[Tensor], Tensor]:
    """The sampler of a teacher or of an exact velocity."""
    return partial(sid_fm.sample_ode, net, times=torch.linspace(1, 0, steps + 1))


def few_steps(net: Callable, steps: int, noise: str, seed: int) -> Callable[[Tensor], Tensor]:
    """The sampler of a student."""
    return partial(generate, net, steps=steps, noise=noise, rng=torch.Generator().manual_seed(seed))


def all_outputs(net: Callable, steps: int, noise: str, seed: int) -> Callable[[Tensor], Tensor]:
    """The mixture that distillation matches to the teacher: the k-th output of a run of `steps` steps, k uniform."""
    sampler = few_steps(net, steps, noise, seed)
    return lambda z: torch.cat([sampler(part, stop_after=k) for k, part in enumerate(z.tensor_split(steps), 1)])


@torch.no_grad()
def sample_and_measure(
    sampler: Callable[[Tensor], Tensor], z: Tensor, measure: MixtureMeasure, bar: tqdm
) -> tuple[Tensor, dict[str, float]]:
    """Returns the samples that the sampler makes of the noise z, and their measures."""
    parts = []
    for part in z.split(CHUNK):
        parts.append(sampler(part))
        bar.update()
    x = torch.cat(parts)
    return x, measure(x)


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------

TITLES = {"sid": "SiD", "dmd": "DMD"}  # of the losses
INK, GREY, BLUE, RED, GREEN, GOLD = "#1f2430", "#8b95a1", "#2f6fb3", "#c8453b", "#3a8f5c", "#c08a1e"


def save_figure(figure, file: Path) -> None:
    """Writes the figure as PNG, and says so."""
    sid_fm.write(file, partial(figure.savefig, format="png"))
    sid_fm.pyplot().close(figure)
    print(f"  plotted {file}", flush=True)


def plot_densities(file: Path) -> None:
    """Plots pi(lambda) of the recipes: the paper's figure 2."""
    figure, axis = sid_fm.pyplot().subplots(figsize=(8, 4.4))
    lam = torch.linspace(-30, 30, 6001).double()
    for (name, recipe), color in zip(RECIPES.items(), (GREY, GREEN, INK, BLUE, GOLD, RED)):
        axis.plot(lam, weight_density(recipe, lam), color=color, label=name, linewidth=2)
    axis.set(xlabel=r"log-SNR  $\lambda = \log(a^2/s^2)$:  noise left, data right", ylabel=r"$\pi(\lambda)$")
    axis.set(xlim=(-15, 20), ylim=(0, 0.27))
    axis.set_title("One loss, six recipes: where each puts its weight", loc="left")
    axis.text(14.2, 0.2, "uniform times: up to\nt = 0.001, off the scale", fontsize=9, color=INK)
    axis.legend(fontsize=9, loc="upper left")
    save_figure(figure, file)


def plot_alpha(file: Path) -> None:
    """Plots what alpha does to the gradient, exactly, for the generator x_g = m + s z and mixture data on a line."""
    g = gradients(LINE, THETA)
    alphas = torch.linspace(0, 1.5, 61)
    along = [g["L2"] - alpha * g["L1"] for alpha in alphas]
    figure, (plane, line) = sid_fm.pyplot().subplots(1, 2, figsize=(10, 4))
    for name, vector, color in (
        (r"true gradient $dL/d\theta$", g["true"], INK),
        (r"$\nabla L_1$, the naive loss", g["L1"], RED),
        (r"$\nabla L_2$: $\alpha = 0$", g["L2"], GREY),
        (r"$\alpha = 1/2$: half of the true gradient", g["L2"] - g["L1"] / 2, BLUE),
        (r"$\alpha = 1$: $c$, the part that $\nabla L_2$ lacks", g["L2"] - g["L1"], GREEN),
    ):
        plane.annotate("", vector.tolist(), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2.5})
        plane.plot([], [], color=color, linewidth=2.5, label=name)
    plane.plot(*torch.stack(along).T, ":", color=INK, linewidth=1, label=r"$\nabla L_\alpha$, $\alpha$ from 0 to 1.5")
    ends = torch.stack([torch.zeros(2), g["true"], g["L1"], *along])
    (left, bottom), (_, top) = (ends.min(0).values - 0.008).tolist(), (ends.max(0).values + 0.008).tolist()
    # The panel is 1.25 times as wide as high: with these limits angles look as large as they are.
    plane.set(xlim=(left, left + 1.25 * (top - bottom)), ylim=(bottom, top), xlabel="d/dm", ylabel="d/ds")
    plane.set_title(rf"Gradients at m = {THETA[0]:g}, s = {THETA[1]:g} ($\nabla$: $\psi$ is held)", loc="left")
    plane.locator_params(axis="x", nbins=4)
    plane.legend(fontsize=8.5, loc="lower right")
    line.plot(alphas, [angle(vector, g["true"]) for vector in along], color=INK, linewidth=2)
    line.set(xlabel=r"$\alpha$", ylabel="degrees", ylim=(0, None))
    naive = angle(g["L1"], g["true"])
    line.set_title(rf"Angle of $\nabla L_\alpha$ to the true gradient ($\nabla L_1$: {naive:.0f}°)", loc="left")
    for alpha, label in ((0.5, "unbiased"), (1.0, "the authors' choice")):
        line.axvline(alpha, color=GREY, linestyle=":")
        line.text(alpha + 0.02, 0.95, label, transform=line.get_xaxis_transform(), color=INK, fontsize=9)
    save_figure(figure, file)


def plot_samples(file: Path, panels: dict[str, Tensor]) -> None:
    """Plots data, teacher and students side by side."""
    figure, axes = sid_fm.pyplot().subplots(1, len(panels), figsize=(2.4 * len(panels), 2.8), sharex=True, sharey=True)
    limit = 1.15 * float(panels["data"].abs().max())
    for axis, (name, x) in zip(axes, panels.items()):
        axis.plot(*x[:8000].T, ".", color=BLUE, markersize=1.2, alpha=0.3)
        axis.set(title=name, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    save_figure(figure, file)


def plot_convergence(file: Path, fisher: list[float], w2: dict[int, float], floor: float) -> None:
    """Plots the one-step student's progress on a log scale, where an exponential decay is a straight line."""
    figure, (left, right) = sid_fm.pyplot().subplots(1, 2, figsize=(10, 3.6))
    blocks = np.array_split(np.array(fisher), min(60, len(fisher)))
    left.plot(np.cumsum([len(block) for block in blocks]), [np.median(block) for block in blocks], color=GREEN)
    left.set_title("Fisher estimate $L_1$, medians of blocks", loc="left")
    right.plot([*w2], [*w2.values()], "o-", color=BLUE, label="one-step student")
    right.axhline(floor, color=GREY, linewidth=1.5, label="fresh samples of the data")
    right.set_title("sliced W2", loc="left")
    right.legend(fontsize=9)
    for axis in (left, right):
        axis.set(yscale="log", xlabel="iterations")
    save_figure(figure, file)


def plot_sweep(file: Path, title: str, tables: dict[str, tuple[Iterable, Iterable, np.ndarray]]) -> None:
    """Plots tables (rows, columns, values) as images with the numbers in them. Lower, which is darker, is better."""
    widths = [len([*columns]) + 1 for _, columns, _ in tables.values()]
    figure, axes = sid_fm.pyplot().subplots(1, len(tables), figsize=(12, 3.6), width_ratios=widths)
    for axis, (name, (rows, columns, values)) in zip(axes, tables.items()):
        axis.imshow(np.log(values), cmap="viridis", aspect="auto", vmin=math.log(1), vmax=math.log(30))
        for (i, j), value in np.ndenumerate(values):
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < 8 else INK)
        axis.set_xticks(range(values.shape[1]), columns)
        axis.set_yticks(range(values.shape[0]), rows)
        axis.set_title(name, loc="left")
        axis.grid(visible=False)
    figure.suptitle(title)
    save_figure(figure, file)


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

TEACHER_ITERS = 6000


def plural(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def prepare_toy(args: argparse.Namespace) -> tuple[Tensor, MixtureMeasure, nn.Module]:
    """The noise z that every sampler starts from, the measure of the mixture, and the teacher."""
    mixture, samples = MIXTURES[args.mixture](), 10_000 if args.quick else 50_000
    iters = TEACHER_ITERS // 4 if args.quick else TEACHER_ITERS
    z = torch.randn(samples, 2, generator=torch.Generator().manual_seed(args.seed + 1000))
    job = iters, partial(toy_teacher, mixture, args.path, iters, args.seed)
    return z, MixtureMeasure(mixture, samples), run_jobs({"teacher": job})["teacher"]


def measuring_jobs(samplers: dict[str, Callable], z: Tensor, measure: MixtureMeasure) -> dict[str, tuple]:
    """Jobs for run_jobs that give the samples of each sampler, and their measures."""
    count = len(z) // CHUNK
    return {name: (count, partial(sample_and_measure, sampler, z, measure)) for name, sampler in samplers.items()}


def run_toy(args: argparse.Namespace) -> None:
    """Trains the teacher, distills the students, prints the table and plots the figures."""
    start = time.perf_counter()
    z, measure, teacher = prepare_toy(args)
    print(f"  teacher trained on the {args.path} path ({time.perf_counter() - start:.0f} s)")
    kinds = {(args.loss, args.steps): None, (args.loss, 1): None, ("dmd" if args.loss == "sid" else "sid", 1): None}
    names = {(loss, k): f"{TITLES[loss]} {k}-step student" for loss, k in kinds}
    options = {"alpha": args.alpha, "weight": args.weight, "noise": args.noise}
    distill = partial(toy_student, teacher, args.iters, args.seed, **options)
    jobs = {name: (args.iters, partial(distill, loss=loss, steps=k)) for (loss, k), name in names.items()}
    data_rng = torch.Generator().manual_seed(args.seed + 2000)
    samplers = {
        "data": lambda z: measure.mixture.sample(len(z), data_rng),
        "exact velocity, 64 steps": euler(measure.mixture.predict, 64),
    }
    samplers |= {f"teacher, {plural(n)}": euler(teacher, n) for n in (1, 2, 4, 8, 16, 64)}
    results = run_jobs(jobs | measuring_jobs(samplers, z, measure))
    print(f"  {len(jobs)} students distilled ({time.perf_counter() - start:.0f} s)")

    of_students = {}
    for (_, steps), name in names.items():
        net = results[name].student
        for n in sorted(n for n in {1, 2, 3, 4, steps} if n <= steps):
            of_students[f"{name}, {plural(n)}"] = few_steps(net, n, args.noise, args.seed)
        if steps > 1:
            of_students[f"{name}, all its outputs"] = all_outputs(net, steps, args.noise, args.seed)
    one_step = results[names[args.loss, 1]]
    along = {f"after {i} iterations": few_steps(net, 1, args.noise, args.seed) for i, net in one_step.copies.items()}
    results |= run_jobs(measuring_jobs(of_students | along, z, measure))

    table = {name: results[name][1] for name in samplers | of_students}
    print_table(table, len(z))
    settings = {"args": vars(args), "seconds": time.perf_counter() - start}
    sid_fm.write_json(args.out / "results.json", settings | {"table": table})
    shown = ["data", *(f"teacher, {plural(n)}" for n in (1, 4, 64))]
    shown += [f"{names[args.loss, k]}, {plural(k)}" for k in sorted({1, args.steps})]
    plot_samples(args.out / "samples.png", {name: results[name][0] for name in shown})
    w2 = dict(zip(one_step.copies, (results[name][1]["w2"] for name in along)))
    plot_convergence(args.out / "convergence.png", one_step.log["fisher"], w2, table["data"]["w2"])


def print_table(table: dict[str, dict[str, float]], samples: int) -> None:
    print(f"\n{'':37}sliced W2  x exact  modes  mass error  within 4 sigma")
    for name, (w2, modes, mass_error, within) in ((name, scores.values()) for name, scores in table.items()):
        ratio = w2 / table["exact velocity, 64 steps"]["w2"]
        print(f"{name:37}{w2:9.4f}{ratio:9.2f}{modes:7}{mass_error:12.1%}{within:16.2%}")
    print(f"{samples} samples a row. Students have the running mean of their weights.\n")


def sweep_toy(args: argparse.Namespace) -> None:
    """Measures how sensitive the method is: alpha against w(t), p(t) against the number of steps, SiD and DMD over seeds.

    Every number is a student's sliced W2 as a multiple of the exact velocity's at 64 Euler steps.
    """
    start = time.perf_counter()
    z, measure, teacher = prepare_toy(args)
    alphas, steps, weights, chunks = (0.0, 0.5, 1.0, 1.2), (1, 2, 4), list(sid_fm.WEIGHTS), len(z) // CHUNK
    laws = {"uniform": None, "logit-normal": (0.0, 1.0), "the authors'": SID_LAW}
    losses = {f"SiD, alpha = {alpha}": {"alpha": alpha} for alpha in (0.0, 0.5, 1.0)} | {"DMD": {"loss": "dmd"}}
    runs = {("weight", alpha, weight): {"alpha": alpha, "weight": weight} for alpha in alphas for weight in weights}
    runs |= {("law", name, k): {"law": law, "steps": k} for name, law in laws.items() for k in steps}
    runs |= {("loss", name, i): loss | {"seed": args.seed + i} for name, loss in losses.items() for i in range(3)}

    def w2_of_student(bar: tqdm, seed: int = args.seed, steps: int = 1, **choice) -> float:
        options = {"weight": args.weight, "noise": args.noise, "steps": steps} | choice
        try:
            student = toy_student(teacher, args.iters, seed, bar, **options).student
        except FloatingPointError:
            return math.inf
        return sample_and_measure(few_steps(student, steps, args.noise, args.seed), z, measure, bar)[1]["w2"]

    jobs = {" ".join(map(str, key)): (args.iters + chunks, partial(w2_of_student, **run)) for key, run in runs.items()}
    jobs |= measuring_jobs({"exact velocity": euler(measure.mixture.predict, 64)}, z, measure)
    results = run_jobs(jobs)
    ratio = {key: results[" ".join(map(str, key))] / results["exact velocity"][1]["w2"] for key in runs}
    as_json = {" ".join(map(str, key)): value if value < math.inf else None for key, value in ratio.items()}
    sid_fm.write_json(args.out / "sweep.json", as_json)

    print(f"\nOne-step students over three seeds, w = {args.weight}: sliced W2 over the exact velocity's")
    for name in losses:
        low, median, high = sorted(ratio["loss", name, i] for i in range(3))
        print(f"  {name:18} median {median:5.2f}   from {low:.2f} to {high:.2f}")
    by_weight = np.array([[ratio["weight", alpha, weight] for weight in weights] for alpha in alphas])
    by_law = np.array([[ratio["law", law, k] for k in steps] for law in laws])
    tables = {
        r"$\alpha$ against w(t): one step, uniform p(t)": (alphas, weights, by_weight),
        f"p(t) against steps: w = {args.weight}": (laws, steps, by_law),
    }
    title = f"Sliced W2 over the exact velocity's ({args.mixture}, {args.iters} iterations)"
    plot_sweep(args.out / "sweep.png", title, tables)
    print(f"{len(runs)} students of {args.iters} iterations ({time.perf_counter() - start:.0f} s)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sid_fm.fail
    add = parser.add_argument
    positive, number, seed = sid_fm.positive_integer, sid_fm.finite_number, sid_fm.whole_number
    add("--mixture", choices=MIXTURES, default="ring", help="the data (%(default)s)")
    add("--steps", type=positive, default=4, help="K of the few-step student (%(default)s)")
    add("--loss", choices=sid_fm.LOSSES, default="sid", help="of the students; one more student has the other loss")
    add("--alpha", type=number, default=1.0, help="of the SiD loss (%(default)s)")
    add("--weight", choices=sid_fm.WEIGHTS, default="1/t", help="w(t) of the SiD or DMD loss (%(default)s)")
    add("--noise", choices=sid_fm.NOISES, default="fresh", help="between the student's steps (%(default)s)")
    add("--path", choices=T_END, default="rf", help="on which the teacher is trained (%(default)s)")
    add("--iters", type=positive, help="of distillation (2000; with --quick 300, with --sweep 1000)")
    add("--seed", type=seed, default=0, help="of all random numbers (%(default)s)")
    add("--out", type=Path, default=Path("runs/toy_2d"), help="folder of the figures (%(default)s)")
    add("--quick", action="store_true", help="a short run, 25 s")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="the derivation alone; exit status 1 if a claim fails")
    only.add_argument("--sweep", action="store_true", help="how sensitive the method is to its choices, 13 minutes")
    args = parser.parse_args()
    args.iters = args.iters or (1000 if args.sweep else 300 if args.quick else 2000)
    return args


def main() -> None:
    args = parse()
    with sid_fm.one_line_errors():
        held = args.sweep or check_all(args.seed)
        if not args.check:
            args.out.mkdir(parents=True, exist_ok=True)
        if args.sweep:
            sweep_toy(args)
        elif not args.check:
            plot_densities(args.out / "densities.png")
            plot_alpha(args.out / "alpha.png")
            run_toy(args)
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()
