"""SiD on 2D mixtures, where every density, score and posterior mean is exact: read beside sid_fm.py.

    python toy_2d.py            check the derivation, train a teacher, distil it, print a table, draw figures
    python toy_2d.py --check    the derivation alone, each claim of the paper against a closed form
    python toy_2d.py --sweep    how sensitive the method is to alpha, w(t), p(t) and the number of steps

Chapters: exact mixtures; teacher and students; the derivation, checked; measuring; figures; the command line.
"""

import argparse
import copy
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import sid_fm
from sid_fm import (
    SID_LAW,
    T_END,
    T_MIN,
    add_noise,
    convert,
    fail,
    finite_number,
    flow_matching_loss,
    generate,
    match_dims,
    path_terms,
    positive_integer,
    prediction_row,
    pyplot,
    sample_times,
    say_disk_full,
    sid_loss,
    time_at,
    whole_number,
    write,
    write_json,
)

# ----------------------------------------------------------------------------------------------------------------------
# Exact mixtures
# ----------------------------------------------------------------------------------------------------------------------


class Mixture:
    """p(x_0) = sum_m w_m N(mu_m, sigma^2 I), in any dimension d: diffused, it stays a mixture of Gaussians.

    With one component it is also the affine generator x_g = mu + sigma z, whose psi* is then `posterior_mean`.
    means: [M, d], sigma: a number or a tensor, weights: [M], any scale.
    """

    def __init__(self, means: Tensor, sigma: float | Tensor, weights: Tensor | None = None):
        self.means, self.sigma = means, sigma
        weights = torch.ones(len(means)) if weights is None else weights
        self.weights = (weights / weights.sum()).to(means)

    def sample(self, n: int, rng: torch.Generator | None = None) -> Tensor:
        """n draws of x_0: [n, d]."""
        means = self.means[torch.multinomial(self.weights, n, replacement=True, generator=rng)]
        return means + self.sigma * sid_fm.noise_like(means, rng)

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
        """D(x_t, t) = E[x_0 | x_t]: each component's own posterior mean, weighted by its responsibility. [B, d]"""
        a, s, _, _ = path_terms(match_dims(t, x_t), path)
        mean = self.log_components(x_t, t, path).softmax(1) @ self.means
        return mean + a * self.sigma**2 / ((a * self.sigma) ** 2 + s**2) * (x_t - a * mean)

    def predict(self, x_t: Tensor, t: Tensor, cond: None = None, path: str = "rf", predicts: str = "v") -> Tensor:
        """What a perfect network says, with a network's face: by default the exact velocity on Rectified Flow. [B, d]"""
        return convert(self.posterior_mean(x_t, t, path), x_t, t, path, "x0", predicts)


def ring(weights: Tensor | None = None) -> Mixture:
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
# Recipes: all losses are one loss
# ----------------------------------------------------------------------------------------------------------------------
# |prediction error|^2 = c(t) |D^ - x_0|^2. A recipe is a path, what is predicted, its weight w(t) and how t is sampled. So
# it is one density over log-SNR, and the minimiser is the same for all recipes.


class Recipe(NamedTuple):
    """How a network is trained: `predicts` on `path` under the squared error w(t) |error|^2, times drawn from a law.

    law = (mean, std): log(s/a) is normal, which on Rectified Flow is the logit-normal law; None: t uniform on the path.
    """

    path: str = "rf"
    predicts: str = "v"
    law: tuple[float, float] | None = None
    weight: Callable[[Tensor], Tensor] = torch.ones_like


FLOW_MATCHING = Recipe()
RECIPES = {  # for data of unit variance; EDM and TrigFlow state theirs for sigma_d = 0.5, which shifts the mean by log 2
    "DDPM, noise prediction": Recipe("vp", "eps"),
    "EDM": Recipe("ve", "x0", (-1.2 + math.log(2), 1.2), lambda t: (t**2 + 1) / t**2),
    "Rectified Flow, uniform t": Recipe("rf", "v"),
    "Rectified Flow, logit-normal t (SD3)": Recipe("rf", "v", (0.0, 1.0)),
    "TrigFlow (sCM)": Recipe("trig", "v", (-1.0 + math.log(2), 1.4)),
    "SiD-DiT's fake network": Recipe("rf", "v", SID_LAW),
}


def loss_factor(t: Tensor, path: str, predicts: str) -> Tensor:
    """c(t) in |prediction error|^2 = c(t) |D^ - x_0|^2: v (a' - s' a / s)^2, eps (a/s)^2, score (a/s^2)^2, x0 1."""
    a, s, da, ds = path_terms(t, path)
    p, q = prediction_row(predicts, a, s, da, ds)
    return ((a * q - s * p) / s) ** 2


def weight_density(recipe: Recipe, log_snr: Tensor) -> Tensor:
    """pi(lambda) = w~(t) p(t) |dt/dlambda| / Z, the density that a recipe puts on |D^ - x_0|^2 (paper, figure 2).

    w~(t) = w(t) c(t); Z makes it integrate to 1 (trapezoidal rule). lambda = -2 log(s/a). log_snr: [n] -> [n]
    """
    path, predicts, law, weight = recipe

    def unnormalised(lam: Tensor) -> Tensor:
        t = time_at((lam / 4).exp(), (-lam / 4).exp(), path)
        a, s, da, ds = path_terms(t, path)
        if law is None:  # |dt/dlambda| = a s / 2 (a s' - a' s)
            p = a * s / (2 * (a * ds - da * s)) / (T_END[path] - T_MIN)
        else:
            p = torch.distributions.Normal(*law).log_prob(-lam / 2).exp() / 2
        return weight(t) * loss_factor(t, path, predicts) * p

    if law is None:
        a, s, _, _ = path_terms(torch.tensor([T_END[path], T_MIN]).to(log_snr), path)
        low, high = (2 * (a / s).clamp(min=1e-13).log()).tolist()
    else:
        low, high = -2 * law[0] - 24 * law[1], -2 * law[0] + 24 * law[1]  # twelve standard deviations each way
    grid = torch.linspace(low, high, 20_001).to(log_snr)
    inside = (log_snr >= low) & (log_snr <= high)
    return inside * unnormalised(log_snr) / torch.trapezoid(unnormalised(grid), grid)


# ----------------------------------------------------------------------------------------------------------------------
# Teacher and students
# ----------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A small network: random Fourier features of x_t, harmonics of t, and a residual network of SiLU layers.

    The sharp one-step map (eight separate modes out of one Gaussian) is why x_t enters by Fourier features. On Rectified
    Flow the output is the velocity itself. On another path it is F in D = a x - s F, with x_t, a and s scaled to
    a^2 + s^2 = 1 (EDM's preconditioning; on TrigFlow F is the velocity), from which the network's own prediction follows.
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


# How the teacher is trained on each path, after those who use that path; but for vp's weight, which undoes the a^2 that
# noise prediction puts on F: where generation starts a is 1/152, and F would stay as good as untrained there.
TEACHERS = {
    "rf": FLOW_MATCHING,
    "trig": RECIPES["TrigFlow (sCM)"],
    "vp": RECIPES["DDPM, noise prediction"]._replace(weight=lambda t: 1 / path_terms(t, "vp")[0] ** 2),
    "ve": RECIPES["EDM"],
}
AVERAGED = 0.3  # share of the iterations, the last ones, over which the student's weights are averaged


def cosine(optimizer: torch.optim.Optimizer, iters: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate falls by a half cosine, to a fiftieth."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: max(0.02, (1 + math.cos(math.pi * i / iters)) / 2))


def train_teacher(mixture: Mixture, path: str, iters: int, seed: int, tick: Callable[..., None]) -> nn.Module:
    """Flow matching on data: the same loss that trains the fake network. Returns a Rectified Flow network."""
    rng, recipe = torch.Generator().manual_seed(seed), TEACHERS[path]
    torch.manual_seed(seed)
    net = Net(path, recipe.predicts)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3, betas=(0.9, 0.99), fused=True)
    schedule = cosine(optimizer, iters)
    for _ in range(iters):
        x_0 = mixture.sample(1024, rng)
        e, t = sid_fm.noise_like(x_0, rng), sample_times(len(x_0), recipe.law, path, rng)
        loss = flow_matching_loss(
            net(add_noise(x_0, e, t, path), t), x_0, e, t, path, recipe.predicts, recipe.weight(t)
        )
        loss.backward()
        sid_fm.take_step(optimizer)
        schedule.step()
        tick(loss.detach())
    return sid_fm.as_rectified_flow(net, path, recipe.predicts)


def distil(
    teacher: nn.Module, iters: int, seed: int, tick: Callable[[Tensor], None], **options
) -> tuple[nn.Module, list[float], dict[int, nn.Module]]:
    """One run of sid_fm.distill, with times of both losses uniform unless options say otherwise.

    Returns the averaged student, the Fisher estimate of every iteration, and copies of the student along the way. Adam's
    second beta is 0.99 here: at t = 1 a teacher predicts the mean of the data whatever z is, so a one-step student
    starts as nearly a point and its gradients grow a thousandfold at first; 0.999 lags behind them and oversteps.
    """
    teacher = copy.deepcopy(teacher)  # distill freezes its own
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    average = torch.optim.swa_utils.AveragedModel(student)
    optimizers = [torch.optim.Adam(net.parameters(), lr=3e-3, betas=(0.0, 0.99), fused=True) for net in (student, fake)]
    schedules = [cosine(optimizer, iters) for optimizer in optimizers]
    rng, batches = torch.Generator().manual_seed(seed), itertools.repeat((None, None))
    options = {"law": None, "iters": iters, "rng": rng} | options
    fisher, skipped, copies, marks = [], [], {}, set(np.geomspace(1, iters, 20).astype(int).tolist())
    for measured in sid_fm.distill(teacher, student, fake, optimizers, batches, (1024, 2), **options):
        for schedule in schedules:
            schedule.step()
        done = measured["iteration"] + 1
        if done > (1 - AVERAGED) * iters:
            average.update_parameters(student)
        if done in marks:
            copies[done] = copy.deepcopy(student)
        fisher.append(measured["fisher"])
        skipped.append(measured["skipped"])
        tick(fisher[-1])
    if torch.stack(skipped).any():
        said = ", ".join(f"{name} {options[name]}" for name in ("loss", "alpha", "weight", "steps") if name in options)
        raise FloatingPointError(f"a student diverged ({said})")
    return average.module, torch.stack(fisher).tolist(), copies


# ----------------------------------------------------------------------------------------------------------------------
# The derivation, checked (all in float64)
# ----------------------------------------------------------------------------------------------------------------------

EPS = torch.finfo(torch.float64).eps
SE = "standard errors of the Monte Carlo mean"
ROUNDING = "roundings x condition number"
QUADRATURE = "quadrature (64 against 48 nodes), rounding"
MIDDLE = torch.tensor([0.15, 0.35, 0.55, 0.75, 0.95], dtype=torch.float64)  # times at which expectations are compared


class Check(NamedTuple):
    """One claim, the measured error, and the tolerance that it must stay within (or, if `beyond`, exceed)."""

    claim: str
    error: float
    tolerance: float
    source: str
    beyond: bool = False

    @property
    def ok(self) -> bool:
        return self.error > self.tolerance if self.beyond else self.error <= self.tolerance


@contextmanager
def float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def blob() -> Mixture:
    """Five Gaussians in general position, unequal weights: data without a symmetry for a fault to hide behind."""
    means = torch.tensor([[1.0, 0.3], [-0.7, 0.9], [-0.2, -1.1], [0.8, -0.9], [0.1, 0.2]])
    return Mixture(means, 0.3, torch.arange(1, 6))


def diffused(n: int, path: str, rng: torch.Generator, low: float = 1e-3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_0, e, t, x_t of the blob, t log-uniform between `low` and the path's end (short of pure noise, where a = 0)."""
    ends = math.log(low), math.log(T_END[path] * (1 - 1e-3))
    t = (ends[0] + (ends[1] - ends[0]) * torch.rand(n, generator=rng)).exp()
    x_0 = blob().sample(n, rng)
    e = sid_fm.noise_like(x_0, rng)
    return x_0, e, t, add_noise(x_0, e, t, path)


def largest(error: Tensor, unit: Tensor | float = 1.0) -> float:
    return float((error.detach().abs() / unit).max())


def in_standard_errors(samples: Tensor, expected: Tensor | float = 0.0) -> float:
    """Largest |mean - expected| in units of its standard error. samples: [n, ...]"""
    return largest(samples.mean(0) - expected, samples.std(0) / len(samples) ** 0.5)


def check_posterior_mean(rng: torch.Generator) -> Iterator[Check]:
    errors = {"x0": [], "v": []}
    for path, ratio in itertools.product(T_END, (0.3, 1.0, 3.0)):
        t = time_at(torch.ones(1), torch.tensor([ratio]), path)
        a, s, da, ds = path_terms(t, path)
        x_t = add_noise(blob().sample(1, rng), torch.randn(1, 2, generator=rng), t, path)
        x_0 = blob().sample(100_000, rng)  # importance sampling: p(x_0 | x_t) goes as p(x_0) N(x_t; a x_0, s^2)
        weights = (-((x_t - a * x_0) ** 2).sum(1) / (2 * s**2)).softmax(0)[:, None]
        for kind, sample in (("x0", x_0), ("v", da * x_0 + ds * (x_t - a * x_0) / s)):
            mean = (weights * sample).sum(0)
            exact = convert(blob().posterior_mean(x_t, t, path), x_t, t, path, "x0", kind)
            errors[kind].append(largest(mean - exact, (weights * (sample - mean)).square().sum(0).sqrt()))
    yield Check("posterior mean of a mixture, closed form = Monte Carlo over p(x_0 | x_t)", max(errors["x0"]), 5, SE)
    yield Check("v = E[dx_t/dt | x_t], by the same Monte Carlo", max(errors["v"]), 5, SE)


def check_tweedie(rng: torch.Generator) -> Iterator[Check]:
    for path in T_END:
        _, _, t, x_t = diffused(2000, path, rng)
        x_t.requires_grad_()
        (slope,) = torch.autograd.grad(blob().log_prob(x_t, t, path).sum(), x_t)
        a, s, _, _ = path_terms(match_dims(t, x_t), path)
        D = blob().posterior_mean(x_t, t, path).detach()
        unit = EPS * ((a * D).abs() + x_t.abs()).amax(1, keepdim=True) / s**2 * (1 + x_t.abs() / s)
        error = largest(convert(D, x_t, t, path, "x0", "score") - slope, unit.detach())
        yield Check(f"Tweedie: the score from D = the autograd gradient of log p_t ({path})", error, 64, ROUNDING)


def check_convert(rng: torch.Generator) -> Iterator[Check]:
    kinds = ("x0", "eps", "v", "score")
    for path, end in T_END.items():
        times, errors = torch.logspace(-3, math.log10(end), 200).clamp(max=end), []
        for src, dst in itertools.product(kinds, kinds):
            # at a = 0 eps and the score say nothing of x_0
            t = times[:-1] if path == "rf" and not {src, dst} <= {"x0", "v"} else times
            x_t, pred = torch.randn(2, len(t), 2, generator=rng)
            zero, one = torch.zeros_like(x_t), torch.ones_like(x_t)
            there = convert(pred, x_t, t, path, src, dst)
            back = convert(there, x_t, t, path, dst, src)
            gain = convert(one, zero, t, path, dst, src).abs()
            of_x, of_x_back = (convert(zero, one, t, path, *pair).abs() for pair in ((src, dst), (dst, src)))
            terms = pred.abs() + of_x_back * x_t.abs() + gain * (there.abs() + of_x * x_t.abs())  # added and cancelled
            errors.append(largest(back - pred, EPS * terms))
        yield Check(f"convert: round trips among x0, eps, v, score, all 16 pairs ({path})", max(errors), 64, ROUNDING)
    for path in T_END:
        _, _, t, x_t = diffused(1000, path, rng, low=0.05)
        x_t.requires_grad_(), t.requires_grad_()
        score, dt = torch.autograd.grad(blob().log_prob(x_t, t, path).sum(), (x_t, t))
        v = convert(blob().posterior_mean(x_t, t, path), x_t, t, path, "x0", "v")
        divergence = sum(torch.autograd.grad(v[:, i].sum(), x_t, retain_graph=True)[0][:, i] for i in range(2))
        _, s, _, ds = path_terms(t, path)
        unit = EPS * (1 + (x_t.norm(dim=1) / s).square()) * (1 + ds.abs() + v.norm(dim=1)) * (1 / s + 1 / s**2)
        error = largest(dt + divergence + (v * score).sum(1), unit.detach())
        yield Check(f"v carries p_t: dlog p_t/dt + div v + v . score = 0 ({path})", error, 64, ROUNDING)


def check_loss_factors(rng: torch.Generator) -> Iterator[Check]:
    for kind in ("v", "eps", "score"):
        errors = []
        for path in T_END:
            x_0, e, t, x_t = diffused(2000, path, rng)
            guess = torch.randn(x_0.shape, generator=rng)
            terms = path_terms(match_dims(t, x_0), path)
            p, q = prediction_row(kind, *terms)
            root_c = loss_factor(match_dims(t, x_0), path, kind).sqrt()
            error = (convert(guess, x_t, t, path, "x0", kind) - (p * x_0 + q * e)).abs() - root_c * (guess - x_0).abs()
            a, s, _, _ = terms
            unit = root_c * (guess.abs() + x_0.abs() + (s * e / a).abs()) + (p * x_0).abs() + (q * e).abs()
            errors.append(largest(error, EPS * unit))
        yield Check(f"|{kind} error|^2 = c(t) |D^ - x_0|^2, on all four paths", max(errors), 64, ROUNDING)


def least_squares(X: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """argmin of sum w (X theta - y)^2 and its standard errors (sandwich). X: [n, p], y, w: [n]"""
    inverse = torch.linalg.inv(X.T @ (w[:, None] * X))
    theta = inverse @ (X.T @ (w * y))
    spread = (w * (y - X @ theta))[:, None] * X
    return theta, (inverse @ (spread.T @ spread) @ inverse).diagonal().sqrt()


def check_weight_density(rng: torch.Generator) -> Iterator[Check]:
    lam = torch.linspace(-25, 25, 100_001)
    whole, drawn, closed, moved, minimiser = ([] for _ in range(5))
    for recipe in RECIPES.values():
        path, predicts, law, _ = recipe
        pi = weight_density(recipe, lam)
        whole.append(abs(float(torch.trapezoid(pi, lam)) - 1) / float((lam[1] - lam[0]) * pi.max()))
        # times really drawn: where every |D^ - x_0|^2 weighs the same, pi is the law of lambda
        plain = weight_density(recipe._replace(predicts="x0", weight=torch.ones_like), lam)
        a, s, _, _ = path_terms(sample_times(100_000, law, path, rng), path)
        for power in (1, 2):
            expected = torch.trapezoid(plain * lam**power, lam)
            drawn.append(in_standard_errors((2 * (a / s).log()).clamp(-25, 25) ** power, expected))
        if law:  # w~ is (1 + r)^2 (Rectified Flow) or 1 + r^2 (EDM, TrigFlow), r = a/s log-normal: its mean is known
            cross = 2 if path == "rf" else 0
            Z = 1 + cross * math.exp(-law[0] + law[1] ** 2 / 2) + math.exp(-2 * law[0] + 2 * law[1] ** 2)
            normal = torch.distributions.Normal(*law).log_prob(-lam / 2).exp() / 2
            exact = (1 + cross * (lam / 2).exp() + lam.exp()) * normal / Z
            on_path = lam > -2 * math.log(T_END["ve"]) if path == "ve" else slice(None)
            closed.append(largest((pi - exact)[on_path], exact.max()))
        else:  # the same recipe told on TrigFlow: p(u) = p(t) |dt/du|, by autograd of the equal-SNR map
            a, s, _, _ = path_terms(torch.tensor([T_MIN, T_END[path]]), path)
            ends = time_at(a, s, "trig").log().tolist()
            u = torch.linspace(*ends, 20_001).exp().requires_grad_()
            t = time_at(u.cos(), u.sin(), path)
            (dt_du,) = torch.autograd.grad(t.sum(), u)
            u, there = u.detach(), loss_factor(t.detach(), path, predicts) * dt_du
            there = there / torch.trapezoid(there, u) * u.cos() * u.sin() / 2  # |du/dlambda| = cos u sin u / 2
            here = weight_density(recipe, 2 * (u.cos() / u.sin()).log())
            moved.append(largest((there - here)[1:-1], here.max()))
    # for data N(m, sigma^2), D = sigma^2 f_1 + m f_2 is linear in (sigma^2, m): one model that two recipes can fit
    m, sigma = 0.7, 0.5
    for name in ("EDM", "Rectified Flow, logit-normal t (SD3)"):
        path, predicts, law, weight = RECIPES[name]
        t = sample_times(100_000, law, path, rng)
        a, s, _, _ = path_terms(t, path)
        x_0, e = torch.randn(2, len(t), generator=rng)
        x_0 = m + sigma * x_0
        features = torch.stack([a * (a * x_0 + s * e), s**2], 1) / ((a * sigma) ** 2 + s**2)[:, None]
        theta, error = least_squares(features, x_0, weight(t) * loss_factor(t, path, predicts))
        minimiser.append(largest(theta - torch.tensor([sigma**2, m]), error))
    yield Check("pi(lambda) of every known recipe integrates to 1", max(whole), 1, "grid cells, where pi jumps")
    yield Check("times drawn for a recipe follow its density over log-SNR", max(drawn), 5, SE)
    tail = "EDM's tail past sigma = 80 in Z: 2.4e-5 / 6400 / 50"
    yield Check("pi(lambda) = its closed form where log(s/a) is normal", max(closed), 7.5e-11, tail)
    spacing = 74 / 20_000  # of the coarsest grid, uniform Rectified Flow's over lambda
    yield Check(
        "a recipe moved to another path is the same density", max(moved), spacing**2 / 12, "trapezoid, h^2 / 12"
    )
    yield Check(
        "the minimiser is the same: one linear model, two recipes", max(minimiser), 5, "standard errors of the fit"
    )


def check_equal_snr(rng: torch.Generator) -> Iterator[Check]:
    data = blob()
    variance = data.sigma**2 + (data.weights @ (data.means - data.weights @ data.means) ** 2).sum()
    for path, end in (("trig", 1.0), ("vp", 0.99347), ("ve", 0.98765)):
        t = torch.linspace(0.01, end, 500)
        x_t = add_noise(data.sample(500, rng), torch.randn(500, 2, generator=rng), t)
        x_u, u = sid_fm.equal_snr(x_t, t, "rf", path)
        error = data.posterior_mean(x_u, u, path) - data.posterior_mean(x_t, t)
        unit = EPS * (1 + x_t.abs() / t[:, None]).square()
        yield Check(f"equal-SNR map: D on {path} = D on Rectified Flow", largest(error, unit), 64, ROUNDING)
        nets = {kind: partial(data.predict, path=path, predicts=kind) for kind in ("x0", "eps", "v", "score")}
        views = [sid_fm.as_rectified_flow(net, path, kind) for kind, net in nets.items()]
        a, s, _, _ = path_terms(u[:, None], path)
        error = torch.stack([t[:, None] * (view(x_t, t) - data.predict(x_t, t)) for view in views])
        claim = f"a network worn through as_rectified_flow returns the velocity ({path})"
        yield Check(claim, largest(error, unit * (1 + s / a)), 64, ROUNDING)
        noise = torch.randn(500, 2, generator=rng)
        x_u, u = sid_fm.equal_snr(noise, torch.ones(500), "rf", path)
        error = data.posterior_mean(x_u, u, path) - data.posterior_mean(noise, torch.ones(500))
        a, s, _, _ = path_terms(u[:, None], path)  # to first order in a/s, D = E[x_0] + (a/s^2) Cov[x_0] x_t
        unit = 64 * EPS + 1.5 * a / s**2 * variance * x_u.norm(dim=1, keepdim=True)
        yield Check(
            f"   at pure noise, clamped to the end of {path}", largest(error, unit), 1, "1.5 (a/s^2) Var |x| there"
        )


def check_fake_network(rng: torch.Generator) -> Iterator[Check]:
    # psi* of an affine generator is D = s^2 f_1 + m . f_2, as above: a fake network whose weights are (s^2, m)
    n, s, m = 20_000, 0.6, torch.tensor([0.4, -0.3])
    x_g, e = m + s * torch.randn(n, 2, generator=rng), torch.randn(n, 2, generator=rng)
    t = sample_times(n, SID_LAW, rng=rng)
    x_t, a, b = add_noise(x_g, e, t), 1 - t[:, None], t[:, None]
    f_1, f_2 = a * x_t / ((a * s) ** 2 + b**2), b**2 / ((a * s) ** 2 + b**2)
    psi = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([psi], max_iter=50, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        v = convert(psi[0] * f_1 + psi[1:] * f_2, x_t, t, "rf", "x0", "v")
        loss = flow_matching_loss(v, x_g, e, t)
        loss.backward()
        return loss

    optimizer.step(closure)
    features = torch.stack([f_1, *(f_2 * axis for axis in torch.eye(2))], 2).flatten(0, 1)
    _, error = least_squares(features, x_g.flatten(), (1 / t**2).repeat_interleave(2))
    worst = largest(psi - torch.tensor([s**2, *m.tolist()]), error)
    yield Check("the fake network, fitted to generator samples, is psi*", worst, 5, "standard errors of the fit")


def check_score_identity(rng: torch.Generator) -> Iterator[Check]:
    generator, n, errors = Mixture(torch.tensor([[0.4, -0.3]]), 0.6), 200_000, []
    for time_ in MIDDLE:
        t, x_g = time_.expand(n), generator.sample(n, rng)
        x_t = add_noise(x_g, torch.randn(n, 2, generator=rng), t)
        psi = generator.posterior_mean(x_t, t)
        for u in (blob().posterior_mean(x_t, t) - psi, x_t.sin()):
            errors.append(in_standard_errors((u * (psi - x_g)).sum(1)))
    yield Check("score identity: E[u(x_t) . f_psi*] = E[u(x_t) . x_g]", max(errors), 5, SE)


# One dimension, where expectations are sums: data p, and the affine generator x_g = m + s z at (m, s).
ON_A_LINE: dict[str, Callable[[], tuple[Mixture, Tensor]]] = {
    "Gaussian data": lambda: (Mixture(torch.tensor([[0.8]]), 0.5), torch.tensor([-0.4, 1.1])),
    "mixture data": lambda: (
        Mixture(torch.tensor([[-1.0], [0.4], [1.2]]), 0.5, torch.arange(1, 4)),
        torch.tensor([0.3, 0.3]),
    ),
}


def exact_losses(data: Mixture, theta: Tensor, psi: Tensor, nodes: int, weight: str = "1-t") -> tuple[Tensor, Tensor]:
    """L1 and L2 of the affine generator, by Gauss-Hermite quadrature over z and e, through sid_loss itself.

    theta = (m, s) makes the samples; f_psi = E[x_g | x_t] is that of an affine generator with psi = (m, s). The loss is
    quadratic in (x_g, f_phi, f_psi), so each quadrature weight enters as its square root on all three.
    """
    x, w = (torch.from_numpy(array) for array in np.polynomial.hermite_e.hermegauss(nodes))
    z, e, t = (grid.flatten() for grid in torch.meshgrid(x, x, MIDDLE, indexing="ij"))
    root = (torch.outer(w, w) / w.sum() ** 2 * nodes**2).sqrt().flatten().repeat_interleave(len(MIDDLE))[:, None]
    x_g = (theta[0] + theta[1] * z)[:, None]
    x_t = add_noise(x_g, e[:, None], t)
    fake = Mixture(psi[:1, None], psi[1])
    terms = [root * term for term in (x_g, data.posterior_mean(x_t, t), fake.posterior_mean(x_t, t))]
    L2, L2_minus_L1 = (sid_loss(*terms, t, alpha, weight) for alpha in (0, 1))
    return L2 - L2_minus_L1, L2


def fisher_divergence(data: Mixture, theta: Tensor, weight: str) -> Tensor:
    """E_t w |f_phi - f_psi*|^2 from the two scores, D - D' = (s^2 / a) (score - score'), on a grid of x_t."""
    x = torch.linspace(-14, 14, 4001)[:, None].requires_grad_()
    total = 0
    for t in MIDDLE:
        logs = [p.log_prob(x, t.expand(len(x))) for p in (data, Mixture(theta[:1, None], theta[1]))]
        score, score_g = (torch.autograd.grad(log.sum(), x)[0][:, 0] for log in logs)
        integrand = logs[1].detach().exp() * (t**2 / (1 - t) * (score - score_g)) ** 2
        total = total + sid_fm.WEIGHTS[weight](t) * torch.trapezoid(integrand, x.detach()[:, 0]) / len(MIDDLE)
    return total


def check_three_forms(rng: torch.Generator) -> Iterator[Check]:
    for (name, make), weight in itertools.product(ON_A_LINE.items(), ("1-t", "1/t^2")):
        data, theta = make()
        fine, coarse = (torch.stack(exact_losses(data, theta, theta, nodes, weight)) for nodes in (64, 48))
        L = fisher_divergence(data, theta, weight)
        tolerance = largest(fine - coarse, L) + 64**2 * EPS
        claim = f"L1 = L2 = the Fisher divergence at psi* ({name}, w = {weight})"
        yield Check(claim, largest(fine - L, L), tolerance, QUADRATURE)
        yield Check(
            "   where L_alpha at alpha = 1 has the value 0", largest(fine[1] - fine[0], L), tolerance, QUADRATURE
        )


def check_lagging_fake(rng: torch.Generator) -> Iterator[Check]:
    """At any psi L_alpha = (L - gap) / 2 + (1/2 - alpha) L1, with gap = E[w |f_psi - f_psi*|^2]. Here f_psi knows another
    generator than theta's."""
    for name, make in ON_A_LINE.items():
        data, theta = make()
        psi = theta + torch.tensor([0.2, 0.15])
        (L1, L2), coarse = (torch.stack(exact_losses(data, theta, psi, nodes)) for nodes in (64, 48))
        L = fisher_divergence(data, theta, "1-t")
        gap = fisher_divergence(Mixture(psi[:1, None], psi[1]), theta, "1-t")
        tolerance = 1.5 * largest(torch.stack([L1, L2]) - coarse, L) + 64**2 * EPS
        claim = f"at any psi L_alpha at alpha = 1/2 is (L - gap) / 2 ({name})"
        yield Check(claim, largest(L2 - L1 / 2 - (L - gap) / 2, L), tolerance, QUADRATURE)
        yield Check(
            "   where the gap, E[w |f_psi - f_psi*|^2], is not zero", float(gap / L), tolerance, QUADRATURE, True
        )


def gradients(data: Mixture, theta: Tensor, nodes: int = 64) -> dict[str, Tensor]:
    """The gradients in (m, s) that section 3 of the paper distinguishes, at psi*(theta), exact to quadrature.

    path_i is that of L_i with psi held; "true" is the gradient D' of the divergence, psi* moving with theta; and
    "through psi*" is what of L1's gradient flows through psi*(theta) alone.
    """
    theta, psi = theta.clone().requires_grad_(), theta.clone().requires_grad_()
    parts = [torch.autograd.grad(L, (theta, psi), retain_graph=True) for L in exact_losses(data, theta, psi, nodes)]
    (path_1, through_1), (path_2, through_2) = parts
    true = {"true": path_2 + through_2, "true, from L1": path_1 + through_1}
    return true | {"path_1": path_1, "path_2": path_2, "through psi*": through_1}


def angle(u: Tensor, v: Tensor) -> float:
    """Degrees between two vectors."""
    return math.degrees(math.acos(float((u @ v / (u.norm() * v.norm())).clamp(-1, 1))))


def check_gradients(rng: torch.Generator) -> Iterator[Check]:
    for name, make in ON_A_LINE.items():
        g, coarse = (gradients(*make(), nodes) for nodes in (64, 48))
        size, naive = g["true"].norm(), g["path_1"]
        tolerance = max(largest(g[key] - coarse[key], size) for key in g) + 64**2 * EPS
        L = {alpha: g["path_2"] - alpha * naive for alpha in (0, 0.5, 1, 1.2)}
        for claim, error in (
            ("the true gradient is the same from L1 and from L2", g["true"] - g["true, from L1"]),
            ("alpha = 1/2 gives half the true gradient", L[0.5] - g["true"] / 2),
            ("alpha = 1 gives half the gradient of L1 through psi*(theta) alone", L[1] - g["through psi*"] / 2),
        ):
            yield Check(f"{claim} ({name})", float(error.norm() / size), tolerance, QUADRATURE)
        for claim, other in (("the true gradient", g["true"]), ("the gradient through psi*", g["through psi*"])):
            apart = naive - (naive @ other) / (other @ other) * other  # at the best multiple
            error = float(apart.norm() / naive.norm())
            yield Check(f"the naive L1 is no multiple of {claim} ({name})", error, tolerance, QUADRATURE, beyond=True)
        degrees = [f"{label} {angle(vector, g['true']):.1f}" for label, vector in (("L1 alone", naive), *L.items())]
        claim = f"   degrees to the true gradient: {', '.join(degrees)}"
        yield Check(claim, angle(L[1], g["true"]), 90, "alpha = 1 points downhill")


def at_rest(data: Mixture, theta: Tensor, alpha: float, nodes: int = 64) -> Tensor:
    """Where the gradient of L_alpha, psi held at psi*, is zero: Newton's method from theta. (m, s)"""

    def gradient(theta: Tensor) -> Tensor:
        g = gradients(data, theta, nodes)
        return g["path_2"] - alpha * g["path_1"]

    for _ in range(8):
        steps = 1e-4 * torch.eye(2)
        slopes = torch.stack([(gradient(theta + h) - gradient(theta - h)) / 2e-4 for h in steps], 1)
        theta = theta - torch.linalg.solve(slopes, gradient(theta))
    return theta


def check_rest(data: Mixture, theta: Tensor, claim: str) -> Check:
    """How far alpha = 1 rests from L's minimum, where alpha = 1/2 does."""
    fine, coarse = ([at_rest(data, theta, alpha, nodes) for alpha in (0.5, 1.0)] for nodes in (64, 48))
    tolerance = largest(torch.stack(fine) - torch.stack(coarse)) + 64**2 * EPS
    claim = f"{claim}: s = {float(fine[1][1]):.3f}, not {float(fine[0][1]):.3f}"
    return Check(claim, float((fine[1] - fine[0]).norm()), tolerance, QUADRATURE, beyond=True)


PLANE = np.linspace(-2.5, 2.5, 21), np.linspace(0.1, 1.6, 16)  # generators m + s z: m, s


@lru_cache
def over_generators(name: str) -> dict[str, Tensor]:
    """At each generator of PLANE, [m, s]: degrees to the true gradient of others, with psi held at psi* (nan where there is
    none); and "agreement", [m, s, 2]: alpha = 1's components times the true ones, over the true gradient's square."""
    data, rows = ON_A_LINE[name]()[0], []
    for theta in itertools.product(*PLANE):
        g = gradients(data, torch.tensor(theta), nodes=32)
        L1, L2, true = g["path_1"], g["path_2"], g["true"]
        degrees = torch.tensor([angle(u, true) for u in (L2, L2 - L1, L1)])
        rows.append(torch.cat([degrees, (L2 - L1) * true / (true @ true)]))
    table = torch.stack(rows).unflatten(0, [len(axis) for axis in PLANE])
    return dict(zip(("alpha = 0", "alpha = 1", "L1 alone"), table.movedim(2, 0))) | {"agreement": table[..., 3:]}


def check_downhill(rng: torch.Generator) -> Iterator[Check]:
    """Does c, which alpha = 1 follows, lead downhill?"""
    # For Gaussian data and a Gaussian generator it does: c in closed form has the sign of the true gradient, in m and in s.
    data, _ = ON_A_LINE["Gaussian data"]()
    mu, sigma, t, a, w = data.means[0, 0], data.sigma, MIDDLE, 1 - MIDDLE, 1 - MIDDLE
    errors, tolerances = [], []
    for m, s in ((-0.4, 1.1), (-0.4, 0.3), (1.5, 0.2), (2.0, 1.5)):
        fine, coarse = (gradients(data, torch.tensor([m, s]), nodes) for nodes in (64, 48))
        c, c_coarse = (g["path_2"] - g["path_1"] for g in (fine, coarse))
        b_phi, b_psi = (a * width**2 / ((a * width) ** 2 + t**2) for width in (sigma, s))  # df/dx_t
        c_m = -w * (mu - m) * (1 - a * b_phi) * (1 - a * b_psi)
        c_s = -w * (b_phi - b_psi) * 2 * a * s * t**2 / ((a * s) ** 2 + t**2)
        size = fine["true"].norm()
        errors.append(largest(c - torch.stack([c_m.mean(), c_s.mean()]), size))
        tolerances.append(largest(c - c_coarse, size) + 64**2 * EPS)
    yield Check("alpha = 1: c in closed form (Gaussian data)", max(errors), max(tolerances), QUADRATURE)
    agreement = over_generators("Gaussian data")["agreement"]
    claim = f"   which has the true gradient's signs in m and s, at {agreement[..., 0].numel()} generators"
    yield Check(claim, float(-agreement.min()), 64**2 * EPS, "rounding, where one vanishes")
    # Near a generator that draws the data f_phi - f_psi* is of first order in the distance, and so nabla L1 of second.
    share = []
    for distance in (1e-2, 1e-3):
        g = gradients(data, torch.tensor([mu, sigma]) + distance * torch.tensor([0.6, 0.8]))
        share.append(float(g["path_1"].norm() / g["true"].norm()))
    claim = "near the data any alpha gives half the true gradient, to first order"
    yield Check(claim, abs(share[0] / share[1] / 10 - 1), 1e-2, "the next order, the distance")
    for name in ON_A_LINE:
        degrees = over_generators(name)
        none, one, naive = (degrees[key] for key in ("alpha = 0", "alpha = 1", "L1 alone"))
        claim = f"alpha = 1 leads downhill at {one.numel()} generators: degrees at most ({name})"
        yield Check(claim, float(one.max()), 90, "downhill")
        claim = f"   alpha = 0 at most {float(none.max()):.1f}; L1 alone leads uphill at "
        yield Check(f"{claim}{float((naive > 90).double().mean()):.0%} of them", float(none.max()), 90, "downhill")
    # But L_alpha's gradient is half of L's and (1/2 - alpha) of L1's, and that vanishes only where f_phi = f_psi*.
    claim = "data that can't be drawn: alpha = 1 rests beside L's minimum"
    yield check_rest(ON_A_LINE["mixture data"]()[0], torch.tensor([0.57, 0.9]), claim)


def check_sid_loss(rng: torch.Generator) -> Iterator[Check]:
    errors = []
    for alpha, weight in itertools.product((0.0, 0.5, 1.0, 1.2), sid_fm.WEIGHTS):
        inputs = [torch.randn(7, 3, generator=rng).requires_grad_() for _ in range(3)]
        t = sample_times(7, SID_LAW, rng=rng)
        loss = sid_loss(*inputs, t, alpha, weight)
        loss.backward()
        x, phi, psi = (tensor.detach() for tensor in inputs)
        w = {
            "1-t": 1 - t,
            "(1-t)^2": (1 - t) * (1 - t),
            "1/t": 1 / t.maximum(torch.tensor(1e-5)),
            "1/t^2": 1 / (t * t).maximum(torch.tensor(1e-5)),
            "snr": (1 - t) * (1 - t) / (t * t).maximum(torch.tensor(1e-5)),
            "snr_sqrt": (1 - t) / t.maximum(torch.tensor(1e-5)),
            "sid": 3 / (x - phi).abs().sum(1).maximum(torch.tensor(3e-5)),
        }[weight][:, None] / 7
        value = (w * (phi - psi) * (phi - x)).sum() - alpha * (w * (phi - psi) ** 2).sum()
        by_hand = (
            -w * (phi - psi),
            w * (2 * phi - psi - x - 2 * alpha * (phi - psi)),
            w * (x - phi + 2 * alpha * (phi - psi)),
        )
        unit = EPS * max(1, *(float(slope.abs().max()) for slope in by_hand))
        errors += [largest(tensor.grad - slope, unit) for tensor, slope in zip(inputs, by_hand)]
        errors.append(largest(loss - value, unit))
    claim = "sid_loss = the formulas written out, 4 alphas x 7 weights, values and gradients"
    yield Check(claim, max(errors), 64, "roundings")
    net, z, t = Net(), torch.randn(16, 2, generator=rng), sample_times(16, SID_LAW, rng=rng)
    phi, psi = Net().requires_grad_(False), Net().requires_grad_(False)
    flows = []
    for cut in (False, True):  # cut: x_t without its gradient
        x_g = generate(net, z, steps=1)
        x_t = add_noise(x_g, torch.ones_like(z), t)
        x_t = x_t.detach() if cut else x_t
        d_real, d_fake = (convert(f(x_t, t), x_t, t, "rf", "v", "x0") for f in (phi, psi))
        slopes = torch.autograd.grad(sid_loss(x_g, d_real, d_fake, t), list(net.parameters()))
        flows.append(torch.cat([slope.flatten() for slope in slopes]))
    touched = sum(p.grad is not None for p in (*phi.parameters(), *psi.parameters()))
    yield Check("nothing flows into the weights of teacher and fake network", touched, 0, "count")
    share = float((flows[0] - flows[1]).norm() / flows[0].norm())
    yield Check("   something flows through their inputs", share, 0.01, "share of the gradient", beyond=True)


class Guided:
    """In the place of a Mixture, what guidance by 2.5 from N(0, 1) to N(0, 1/4) makes of their posterior means."""

    def __init__(self):
        self.parts = [Mixture(torch.zeros(1, 1), sigma) for sigma in (0.5, 1.0)]

    def net(self, x_t: Tensor, t: Tensor, cond: dict) -> Tensor:
        narrow, wide = (part.predict(x_t, t) for part in self.parts)
        return torch.where(cond["narrow"][:, None], narrow, wide)

    def posterior_mean(self, x_t: Tensor, t: Tensor) -> Tensor:
        cond, uncond = {"narrow": torch.ones(len(t), dtype=torch.bool)}, {"narrow": torch.zeros(1, dtype=torch.bool)}
        v, _ = sid_fm.guided(self.net, x_t, t, cond, uncond, guidance=2.5)
        return convert(v, x_t, t, "rf", "v", "x0")


def check_guidance(rng: torch.Generator) -> Iterator[Check]:
    """A guided score is a straight line here, -x_t / variance, but of a variance that no diffused distribution has."""
    x_t, t = torch.ones(1, 1), torch.full((1,), 0.5)
    variance = float(-1 / convert(Guided().posterior_mean(x_t, t), x_t, t, "rf", "x0", "score"))
    claim = "guided by 2.5 from N(0, 1) to N(0, 1/4), the score at t = 1/2 is that of variance 1/5"
    yield Check(claim, abs(variance - 0.2), 64 * EPS, "64 roundings")
    yield Check("   which is less than the noise has alone", variance, 0.5**2, "t^2")
    yield check_rest(Guided(), torch.tensor([0.0, 0.13]), "   so that alpha = 1 rests beside L's minimum")


def check_generate(rng: torch.Generator) -> Iterator[Check]:
    net, z, run = Net(), torch.randn(8, 2, generator=rng), []
    times, between, last, prefix = ([0.0] for _ in range(4))

    def probe(x_t: Tensor, t: Tensor, cond: dict | None = None) -> Tensor:
        run.append((x_t, t, net(x_t, t)))
        return run[-1][2]

    for noise, steps in itertools.product(sid_fm.NOISES, (1, 2, 4)):
        run.clear()
        final = generate(probe, z, steps=steps, noise=noise, rng=torch.Generator().manual_seed(1))
        fresh = torch.Generator().manual_seed(1)
        for i, (x_t, t, v) in enumerate(run):
            times.append(largest(t - (1 - i / steps)))
            x_0, after = x_t - t[:, None] * v, 1 - (i + 1) / steps
            if i + 1 < steps:
                n = sid_fm.noise_like(z, fresh) if noise == "fresh" else z
                n = x_t + (1 - t[:, None]) * v if noise == "ddim" else n
                between.append(largest(run[i + 1][0] - ((1 - after) * x_0 + after * n)))
            stopped = generate(net, z, steps=steps, noise=noise, stop_after=i + 1, rng=torch.Generator().manual_seed(1))
            prefix.append(largest(stopped - x_0))
        x_t = run[-1][0].detach()
        alone = x_t - t[:, None] * net(x_t, t)
        slopes = [torch.autograd.grad(x.square().sum(), list(net.parameters())) for x in (final, alone)]
        last += [largest(g - h) for g, h in zip(*slopes)]
    yield Check("generate: times are 1 - i/K", max(times), EPS, "1 rounding")
    yield Check("   fresh, fixed and ddim noise between steps, as written", max(between), 64 * EPS, "64 roundings")
    yield Check("   gradient through the last step only", max(last), 1e4 * EPS, "rounding of the gradient's sums")
    yield Check("   k = 1..K are the prefixes of a K-step run", max(prefix), 64 * EPS, "64 roundings")


CHECKS = {  # and the step of the README's derivation that each belongs to
    check_posterior_mean: 2,
    check_tweedie: 2,
    check_convert: 2,
    check_loss_factors: 3,
    check_weight_density: 3,
    check_equal_snr: 4,
    check_fake_network: 6,
    check_score_identity: 7,
    check_three_forms: 7,
    check_lagging_fake: 8,
    check_gradients: 8,
    check_downhill: 8,
    check_sid_loss: 8,
    check_guidance: 9,
    check_generate: 10,
}


def run_check(check: Callable[[torch.Generator], Iterator[Check]], seed: int = 0) -> list[Check]:
    """A claim and what belongs to it, in float64."""
    with float64():
        torch.manual_seed(seed)
        return list(check(torch.Generator().manual_seed(seed)))


def check_all(seed: int) -> bool:
    """Print every claim with its error, its tolerance and where that comes from; True if all hold."""
    print("The derivation (float64): step, claim, error against tolerance, and where the tolerance comes from\n")
    torch.set_num_threads(1)  # a second one takes longer to wake than all of it takes here
    start, verdicts = time.perf_counter(), []
    for check, step in CHECKS.items():
        for result in run_check(check, seed):
            claim, error, tolerance, source, beyond = result
            verdict = "ok    " if result.ok else "FAILED"
            print(f"{step:2}  {claim:84} {error:7.2g} {'> ' if beyond else '<='} {tolerance:7.2g} {verdict} {source}")
            verdicts.append(result.ok)
    print(f"\n{sum(verdicts)} of {len(verdicts)} hold ({time.perf_counter() - start:.1f} s)\n")
    return all(verdicts)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


class Measure:
    """Sliced Wasserstein-2 to the mixture's exact projected quantiles, and how its modes are covered."""

    def __init__(self, mixture: Mixture, samples: int, directions: int = 256):
        self.mixture = mixture
        angle = (torch.arange(directions) + 0.5) * (math.pi / directions)
        self.directions = torch.stack([angle.cos(), angle.sin()])
        levels = (np.arange(samples) + 0.5) / samples
        self.quantiles = np.empty((directions, samples), np.float32)
        for row, centre in zip(self.quantiles, (mixture.means @ self.directions).double().T):
            x = torch.linspace(
                float(centre.min() - 7 * mixture.sigma), float(centre.max() + 7 * mixture.sigma), 4001
            ).double()
            cdf = torch.special.ndtr((x[:, None] - centre) / mixture.sigma) @ mixture.weights.double()
            row[:] = np.interp(levels, cdf.numpy(), x.numpy())

    def sliced_w2(self, x: Tensor) -> float:
        projected = np.sort((x @ self.directions).T.contiguous().numpy(), axis=1)
        return float(np.sqrt(np.mean((projected - self.quantiles) ** 2)))

    def __call__(self, x: Tensor) -> dict[str, float]:
        """A mode's mass is the mean responsibility of its component, whose expectation under the mixture is its weight
        exactly, overlaps included; a mode is found if it has a tenth of that."""
        mass = self.mixture.log_components(x, torch.zeros(len(x))).softmax(1).mean(0) / self.mixture.weights
        distance = torch.cdist(x, self.mixture.means).min(1).values
        return {
            "w2": self.sliced_w2(x),
            "modes": int((mass > 0.1).sum()),
            "mass_error": float((mass - 1).abs().max()),
            "within_4_sigma": float((distance < 4 * self.mixture.sigma).float().mean()),
        }


@torch.no_grad()
def in_chunks(sampler: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Five thousand at a time: activations stay in the processor's cache."""
    return torch.cat([sampler(chunk) for chunk in z.split(5000)])


def euler(net: Callable, steps: int) -> Callable[[Tensor], Tensor]:
    return lambda z: sid_fm.sample_ode(net, z, times=torch.linspace(1, 0, steps + 1))


def mixture_of_steps(net: Callable, steps: int, noise: str, seed: int) -> Callable[[Tensor], Tensor]:
    """What distillation matches to the teacher: the k-th output of a K-step run, k uniform."""
    rng = torch.Generator().manual_seed(seed)

    def sampler(z: Tensor) -> Tensor:
        parts = enumerate(z.tensor_split(steps), 1)
        return torch.cat([generate(net, part, None, steps, noise, stop_after=k, rng=rng) for k, part in parts])

    return sampler


def few_step(net: Callable, steps: int, noise: str = "fresh", seed: int = 0) -> Callable[..., Tensor]:
    """A student as sampler(z, cond), cond optional."""
    return partial(sid_fm.few_step(net, steps, noise), rng=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------

TITLES = {"sid": "SiD", "dmd": "DMD"}  # of the losses
INK, GREY, BLUE, RED, GREEN, GOLD = "#1f2430", "#8b95a1", "#2f6fb3", "#c8453b", "#3a8f5c", "#c08a1e"


def save(figure, out: Path, name: str) -> None:
    write(out / name, partial(figure.savefig, format="png"))
    pyplot().close(figure)
    print(f"  drew {out / name}", flush=True)


def draw_densities(out: Path) -> None:
    """pi(lambda) of the known recipes: the paper's figure 2."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.4))
    lam = torch.linspace(-15, 20, 2000).double()
    for (name, recipe), color in zip(RECIPES.items(), (GREY, GREEN, INK, BLUE, GOLD, RED)):
        axis.plot(lam, weight_density(recipe, lam), color=color, label=name, linewidth=2)
    axis.set(
        xlabel=r"log-SNR  $\lambda = \log(a^2/s^2)$:  noise left, data right", ylabel=r"$\pi(\lambda)$", ylim=(0, 0.27)
    )
    axis.set_title("One loss, six recipes: where each puts its weight", loc="left")
    axis.text(14.2, 0.2, "uniform times: up to\nt = 0.001, off the scale", fontsize=9, color=INK)
    axis.legend(fontsize=9, loc="upper left")
    save(figure, out, "densities.png")


def draw_alpha(out: Path) -> None:
    """What alpha does, exactly, for the affine generator x_g = m + s z and mixture data in one dimension."""
    plt = pyplot()
    with float64():
        g = gradients(*ON_A_LINE["mixture data"]())
        degrees = over_generators("mixture data")
    alphas = torch.linspace(0, 1.5, 61)
    along = [g["path_2"] - alpha * g["path_1"] for alpha in alphas]
    figure, axes = plt.subplot_mosaic([["plane"] * 3 + ["line"] * 3, list("001122")], figsize=(10, 7.2))
    plane, line = axes["plane"], axes["line"]
    for name, vector, color in (
        (r"true gradient $dL/d\theta$", g["true"], INK),
        (r"$\nabla L_1$, the naive loss", g["path_1"], RED),
        (r"$\nabla L_2$: $\alpha = 0$", g["path_2"], GREY),
        (r"$\alpha = 1/2$: half of the true gradient", g["path_2"] - g["path_1"] / 2, BLUE),
        (r"$\alpha = 1$: $c$, what $\nabla L_2$ lacks", g["through psi*"] / 2, GREEN),
    ):
        plane.annotate("", vector.tolist(), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2.5})
        plane.plot([], [], color=color, linewidth=2.5, label=name)
    ends = torch.stack([torch.zeros(2), g["true"], g["path_1"], *along])
    plane.plot(*torch.stack(along).T, ":", color=INK, linewidth=1, label=r"$\nabla L_\alpha$, $\alpha$ from 0 to 1.5")
    (left, bottom), (_, top) = (ends.min(0).values - 0.008).tolist(), (ends.max(0).values + 0.008).tolist()
    # As wide as the panel is, so that angles are nearly true.
    plane.set(xlim=(left, left + 1.25 * (top - bottom)), ylim=(bottom, top), xlabel="d/dm", ylabel="d/ds")
    m, s = ON_A_LINE["mixture data"]()[1].tolist()
    plane.set_title(rf"$\nabla$: with $\psi$ held, at m = {m:g}, s = {s:g}", loc="left")
    plane.locator_params(axis="x", nbins=4)
    plane.legend(fontsize=8.5, loc="lower right")
    line.plot(alphas, [angle(vector, g["true"]) for vector in along], color=INK, linewidth=2)
    line.set(xlabel=r"$\alpha$", ylabel="degrees", ylim=(0, None))
    line.set_title(
        rf"Angle of $\nabla L_\alpha$ to the true gradient ($\nabla L_1$: {angle(g['path_1'], g['true']):.0f}°)",
        loc="left",
    )
    for alpha, label in ((0.5, "unbiased"), (1.0, "the authors' choice")):
        line.axvline(alpha, color=GREY, linestyle=":")
        line.text(alpha + 0.02, 0.95, label, transform=line.get_xaxis_transform(), color=INK, fontsize=9)
    names = {"alpha = 0": r"$\alpha = 0$: $L_2$ alone", "alpha = 1": r"$\alpha = 1$", "L1 alone": r"$L_1$ alone"}
    for panel, (key, label) in zip("012", names.items()):
        axis = axes[panel]
        image = axis.pcolormesh(*PLANE, degrees[key].T, cmap="RdBu_r", vmin=0, vmax=180, shading="nearest")
        axis.plot(m, s, "o", color=INK, markersize=5, markerfacecolor="none")
        title = f"{label}: at most {float(degrees[key].max()):.0f}° on the grid"
        axis.set(xlabel="m", ylabel="s" if panel == "0" else "")
        axis.set_title(title, fontsize=10.5)
        axis.grid(visible=False)
    bar = figure.colorbar(image, ax=[axes[panel] for panel in "012"], ticks=[0, 45, 90, 135, 180])
    bar.set_label("degrees to the true gradient")
    save(figure, out, "alpha.png")


def draw_samples(out: Path, panels: dict[str, Tensor]) -> None:
    """Data, teacher and students side by side."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(2.4 * len(panels), 2.8), sharex=True, sharey=True)
    limit = 1.15 * float(panels["data"].abs().max())
    for axis, (name, x) in zip(axes, panels.items()):
        axis.plot(*x[:8000].T, ".", color=BLUE, markersize=1.2, alpha=0.3)
        axis.set(title=name, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    save(figure, out, "samples.png")


class Decay(NamedTuple):
    formula: str
    error: float  # root mean square of log(fit / y)
    curve: np.ndarray


def fit_decay(x: np.ndarray, y: np.ndarray) -> dict[str, Decay]:
    """y = c + A x^-p and y = c + A exp(-x / tau): least squares on log(y - c), over a grid of c below min y.

    Three constants want more than three points: there is no fit to fewer.
    """
    fits = {}
    for name, u in (("power law", np.log(x)), ("exponential", x)) if len(x) > 3 else ():
        candidates = []
        for c in np.linspace(0, 0.98, 50) * y.min():
            slope, offset = np.polyfit(u, np.log(y - c), 1)
            curve = c + np.exp(offset + slope * u)
            rate = f"x^{slope:.2f}" if name == "power law" else f"exp(-x / {-1 / slope:.0f})"
            error = float(np.sqrt(np.mean(np.log(curve / y) ** 2)))
            candidates.append(Decay(f"{c:.2g} + {math.exp(offset):.2g} {rate}", error, curve))
        fits[name] = min(candidates, key=lambda fit: fit.error)
    return fits


def plot_decay(axes: np.ndarray, name: str, x: np.ndarray, y: np.ndarray, falling: int, color: str) -> None:
    """y against iterations x on log-log and on semilog axes, and both fits from the point `falling` on."""
    fits = fit_decay(x[falling:], y[falling:])
    for axis, scale, title in zip(axes, ("log", "linear"), ("log-log", "semilog")):
        axis.plot(x, y, ".", color=color, markersize=7)
        for (kind, fit), style in zip(fits.items(), ("--", "-")):
            label = f"{kind} {fit.formula}  (rms log error {fit.error:.2f})"
            axis.plot(x[falling:], fit.curve, style, color=INK, linewidth=1.3, label=label)
        axis.set(xscale=scale, yscale="log", xlabel="iterations")
        axis.set_title(f"{name}, {title}", loc="left")
    if fits:
        axes[1].legend(fontsize=8.5, loc="upper right")
        report = "; ".join(f"{kind} {fit.formula}, rms log error {fit.error:.2f}" for kind, fit in fits.items())
        print(f"    {name} after x iterations: {report}")


def draw_convergence(out: Path, fisher: list[float], w2: dict[int, float], floor: float) -> None:
    """Fisher estimate and sliced W2 of the one-step student against iterations."""
    figure, axes = pyplot().subplots(2, 2, figsize=(10, 7), sharey="row")
    blocks = np.array_split(np.array(fisher), min(60, len(fisher)))
    x, y = np.cumsum([len(block) for block in blocks]) - len(blocks[0]) / 2, np.array([*map(np.median, blocks)])
    # The Fisher estimate first rises, as the fake network learns.
    plot_decay(axes[0], "Fisher estimate L1", x, y, int(y[: len(y) // 4 + 1].argmax()), GREEN)
    for axis in axes[1]:
        axis.axhline(floor, color=GREY, linewidth=1.5, label="a fresh draw of data")
    x, y = np.array([*w2]), np.array([*w2.values()])
    plot_decay(axes[1], "sliced W2", x, y, int(y[: len(y) // 4 + 1].argmax()), BLUE)
    save(figure, out, "convergence.png")


@torch.no_grad()
def draw_flow(out: Path, teacher: nn.Module, student: nn.Module) -> None:
    """The teacher's velocity field, and the paths of the same samples in 64 steps and in one."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.7), sharex=True, sharey=True)
    points = torch.cartesian_prod(*[torch.linspace(-2.2, 2.2, 17)] * 2)
    for axis, time_ in zip(axes, (0.9, 0.4)):
        v = teacher(points, torch.full((len(points),), time_))
        axis.quiver(*points.T, *-v.T, v.norm(dim=1), cmap="viridis", angles="xy", width=0.006)
        axis.set_title(f"teacher: -v at t = {time_}")
    z = torch.randn(60, 2, generator=torch.Generator().manual_seed(1))
    path = [z]
    for pair in torch.linspace(1, 0, 65).unfold(0, 2, 1):
        path.append(sid_fm.sample_ode(teacher, path[-1], times=pair))
    paths = {
        "teacher: 64 Euler steps": torch.stack(path),
        "student: one step": torch.stack([z, generate(student, z, steps=1)]),
    }
    for axis, (title, trace) in zip(axes[2:], paths.items()):
        axis.plot(*trace.permute(2, 0, 1), color=GREY, linewidth=0.7)
        axis.plot(*trace[0].T, ".", color=RED, markersize=5, label="noise z")
        axis.plot(*trace[-1].T, ".", color=BLUE, markersize=6, label="sample")
        axis.set_title(title)
    axes[3].legend(fontsize=9, loc="lower right")
    for axis in axes:
        axis.set(aspect="equal", xlim=(-2.4, 2.4), ylim=(-2.4, 2.4), xticks=[], yticks=[])
    save(figure, out, "flow.png")


def draw_sweep(out: Path, title: str, tables: dict[str, tuple[list[str], list[str], np.ndarray]]) -> None:
    """Tables as pictures, with the numbers in them: lower (darker) is better."""
    plt = pyplot()
    widths = [len(columns) + 1 for _, columns, _ in tables.values()]
    figure, axes = plt.subplots(1, len(tables), figsize=(12, 3.6), width_ratios=widths)
    for axis, (name, (rows, columns, values)) in zip(axes, tables.items()):
        axis.imshow(np.log(values), cmap="viridis", aspect="auto", vmin=math.log(1), vmax=math.log(30))
        for (i, j), value in np.ndenumerate(values):
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < 8 else INK)
        axis.set(xticks=range(len(columns)), yticks=range(len(rows)), xticklabels=columns, yticklabels=rows)
        axis.set_title(name, loc="left")
        axis.grid(False)
    figure.suptitle(title)
    save(figure, out, "sweep.png")


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


TEACHER_ITERS = 6000


@contextmanager
def workers(
    title: str, iters: int, threads: int = 2
) -> Iterator[tuple[Callable[..., Future], Callable[[str], Callable[[Tensor], None]]]]:
    """Threads (torch lets go of Python's lock inside its kernels), one progress bar, and a clean Ctrl-C.

    Yields submit(function, *args, **kwargs) -> Future, and tick(label) -> what a training loop calls after each
    iteration with the one number that matters.
    """
    torch.set_num_threads(1)
    pool, stopped, lock = ThreadPoolExecutor(threads), threading.Event(), threading.Lock()
    bar = tqdm(total=iters, desc=title, unit="it", mininterval=0.5, smoothing=0.05, leave=False)

    def submit(function: Callable, *args, **kwargs) -> Future:
        def job():
            torch.set_num_threads(1)  # it is a setting of each thread
            return function(*args, **kwargs)

        return pool.submit(job)

    def tick(label: str) -> Callable[[Tensor], None]:
        count = itertools.count(1)

        def advance(value: Tensor) -> None:
            if stopped.is_set():
                raise KeyboardInterrupt
            with lock:
                bar.update()
                if next(count) % 100 == 0:
                    bar.set_postfix_str(f"{label} {float(value):.2g}", refresh=False)

        return advance

    try:
        yield submit, tick
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
        bar.close()


def plural(count: int) -> str:
    return f"{count} step{'s' * (count > 1)}"


def prepare(args: argparse.Namespace) -> tuple[Mixture, Tensor, Measure, nn.Module]:
    """The data, the noise z that every sampler starts from, the measure, and the teacher."""
    mixture, samples = MIXTURES[args.mixture](), 10_000 if args.quick else 50_000
    iters = TEACHER_ITERS // 4 if args.quick else TEACHER_ITERS
    z = torch.randn(samples, 2, generator=torch.Generator().manual_seed(args.seed + 1000))
    with workers("teacher", iters) as (submit, tick):
        teacher = submit(train_teacher, mixture, args.path, iters, args.seed, tick("loss"))
        measure = submit(Measure, mixture, samples)
        return mixture, z, measure.result(), teacher.result()


def run(args: argparse.Namespace) -> None:
    """Teacher, students, table, figures."""
    start = time.perf_counter()
    mixture, z, measure, teacher = prepare(args)
    print(f"  teacher trained on the {args.path} path ({time.perf_counter() - start:.0f} s)")
    data = mixture.sample(len(z), torch.Generator().manual_seed(args.seed + 2000))
    kinds = dict.fromkeys([(args.loss, args.steps), (args.loss, 1), ("dmd" if args.loss == "sid" else "sid", 1)])
    names = {(loss, steps): f"{TITLES[loss]} {steps}-step student*" for loss, steps in kinds}
    options = {"alpha": args.alpha, "weight": args.weight, "noise": args.noise}

    def row(sampler: Callable[[Tensor], Tensor]) -> tuple[Tensor, dict]:
        x = in_chunks(sampler, z)
        return x, measure(x)

    with workers("distilling", args.iters * len(kinds)) as (submit, tick):
        jobs = {}
        for loss, steps in kinds:
            choice = options | {"loss": loss, "steps": steps}
            jobs[loss, steps] = submit(distil, teacher, args.iters, args.seed, tick("Fisher estimate"), **choice)
        rows = {"data, a fresh draw": ("-", submit(lambda: (data, measure(data))))}
        rows["exact velocity, 64 Euler steps"] = 64, submit(row, euler(mixture.predict, 64))
        rows |= {f"teacher, {plural(n)}": (n, submit(row, euler(teacher, n))) for n in (1, 2, 4, 8, 16, 64)}
        for (loss, steps), name in names.items():
            student = jobs[loss, steps].result()[0]
            for n in sorted(n for n in {1, 2, 3, 4, steps} if n <= steps):
                rows[f"{name}, {plural(n)}"] = n, submit(row, few_step(student, n, args.noise, args.seed))
            if steps > 1:
                mixed = mixture_of_steps(student, steps, args.noise, args.seed)
                rows[f"{name}, all its outputs"] = f"1 to {steps}", submit(row, mixed)
        student, fisher, copies = jobs[args.loss, 1].result()
        w2 = {
            step: submit(lambda net: measure.sliced_w2(in_chunks(few_step(net, 1), z)), net)
            for step, net in copies.items()
        }
        w2 = {step: job.result() for step, job in w2.items()}
        samples = {name: job.result()[0] for name, (_, job) in rows.items()}
        table = {name: {"evaluations": n} | job.result()[1] for name, (n, job) in rows.items()}
    print(f"  {len(kinds)} students distilled ({time.perf_counter() - start:.0f} s)\n")

    print(f"{'':37}evaluations  sliced W2  x exact  modes  mass error  within 4 sigma")
    for name, (n, distance, modes, mass_error, within) in ((name, line.values()) for name, line in table.items()):
        ratio = distance / table["exact velocity, 64 Euler steps"]["w2"]
        print(f"{name:37}{n:>11}{distance:11.4f}{ratio:9.2f}{modes:7}{mass_error:12.1%}{within:16.2%}")
    print(f"* weights averaged over the last {AVERAGED:.0%} of {args.iters} iterations. {len(z)} samples a row.\n")
    results = {"args": vars(args) | {"out": str(args.out)}, "seconds": time.perf_counter() - start, "table": table}
    write_json(args.out / "results.json", results)

    panels = {"data": data} | {f"teacher, {plural(n)}": samples[f"teacher, {plural(n)}"] for n in (1, 4, 64)}
    panels |= {f"{k}-step student": samples[f"{names[args.loss, k]}, {plural(k)}"] for k in sorted({1, args.steps})}
    draw_samples(args.out, panels)
    draw_flow(args.out, teacher, student)
    draw_convergence(args.out, fisher, w2, table["data, a fresh draw"]["w2"])


def sweep(args: argparse.Namespace) -> None:
    """How sensitive the method is: alpha against w(t), p(t) against the number of steps; SiD and DMD over three seeds.

    Every number is a student's sliced W2 as a multiple of the exact velocity's at 64 Euler steps.
    """
    start = time.perf_counter()
    mixture, z, measure, teacher = prepare(args)
    reference = measure.sliced_w2(in_chunks(euler(mixture.predict, 64), z))
    alphas, steps, weights = (0.0, 0.5, 1.0, 1.2), (1, 2, 4), list(sid_fm.WEIGHTS)
    laws = {"uniform": None, "logit-normal": (0.0, 1.0), "the authors'": SID_LAW}
    losses = {f"SiD, alpha = {alpha}": {"alpha": alpha} for alpha in (0.0, 0.5, 1.0)} | {"DMD": {"loss": "dmd"}}
    runs = {("weight", alpha, weight): {"alpha": alpha, "weight": weight} for alpha in alphas for weight in weights}
    runs |= {("law", name, k): {"law": law, "steps": k} for name, law in laws.items() for k in steps}
    runs |= {("loss", name, i): loss | {"seed": args.seed + i} for name, loss in losses.items() for i in range(3)}

    def one(tick: Callable[[Tensor], None], seed: int = args.seed, steps: int = 1, **choice) -> float:
        choice = {"weight": args.weight, "noise": args.noise} | choice
        try:
            student, _, _ = distil(teacher, args.iters, seed, tick, steps=steps, **choice)
        except FloatingPointError:
            return math.inf
        return measure.sliced_w2(in_chunks(few_step(student, steps, args.noise), z)) / reference

    with workers("sweep", args.iters * len(runs)) as (submit, tick):
        jobs = {key: submit(one, tick("Fisher estimate"), **choice) for key, choice in runs.items()}
        ratio = {key: job.result() for key, job in jobs.items()}
    write_json(
        args.out / "sweep.json",
        {" ".join(map(str, key)): value if value < math.inf else None for key, value in ratio.items()},
    )

    def table(kind: str, rows: Iterable, columns: Iterable) -> tuple[list[str], list[str], np.ndarray]:
        values = [[ratio[kind, row, column] for column in columns] for row in rows]
        return [str(row) for row in rows], [str(column) for column in columns], np.array(values)

    print(f"\nOne-step students over three seeds, w = {args.weight}: sliced W2 over the exact velocity's")
    for name in losses:
        low, median, high = sorted(ratio["loss", name, i] for i in range(3))
        print(f"  {name:18} median {median:5.2f}   from {low:.2f} to {high:.2f}")
    tables = {r"$\alpha$ against w(t): one step, uniform p(t)": table("weight", alphas, weights)}
    tables[f"p(t) against steps: w = {args.weight}"] = table("law", laws, steps)
    draw_sweep(args.out, f"Sliced W2 over the exact velocity's ({args.mixture}, {args.iters} iterations)", tables)
    print(f"{len(runs)} students of {args.iters} iterations ({time.perf_counter() - start:.0f} s)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    add = parser.add_argument
    add("--mixture", choices=MIXTURES, default="ring", help="the data (%(default)s)")
    add("--steps", type=positive_integer, default=4, help="K of the few-step student (%(default)s)")
    add("--loss", choices=sid_fm.LOSSES, default="sid", help="of the students; the other one is a row for comparison")
    add("--alpha", type=finite_number, default=1.0, help="of the SiD loss (%(default)s)")
    add("--weight", choices=sid_fm.WEIGHTS, default="1/t", help="w(t) of the SiD or DMD loss (%(default)s)")
    add("--noise", choices=sid_fm.NOISES, default="fresh", help="between the student's steps (%(default)s)")
    add("--path", choices=T_END, default="rf", help="on which the teacher is trained (%(default)s)")
    add("--iters", type=positive_integer, help="of distillation (2000; with --quick 300, with --sweep 1000)")
    add("--seed", type=whole_number, default=0, help="fixes everything (%(default)s)")
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
    try:
        if args.check:
            raise SystemExit(0 if check_all(args.seed) else 1)
        sid_fm.claim(args.out)
        held = args.sweep or check_all(args.seed)
        if args.sweep:
            sweep(args)
        else:
            draw_densities(args.out)
            draw_alpha(args.out)
            run(args)
    except sid_fm.BadInput as error:
        fail(error)
    except FloatingPointError as error:
        fail(f"{error}: try other settings, or another --seed", status=1)
    except OSError as error:
        say_disk_full(error)
    except KeyboardInterrupt:
        fail("stopped" if args.check else f"stopped: what was drawn so far is in {args.out}", status=130)
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()
