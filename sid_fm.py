"""This file implements score distillation of flow-matching models (SiD-DiT, arXiv 2509.25127).

     1. Paths         one view of diffusion and flow matching: Bayes' rule  (paper, section 2)
     2. Losses        the SiD loss, DMD for comparison, the adversarial pair       (section 3)
     3. Loop          few-step generation, and the training loop of every script   (section 3)

These three chapters are the paper. The others apply it to the teachers of its experiments:

     4. Backbones     MMDiT (SD3, SD3.5), FLUX, SANA's linear DiT, in plain PyTorch
     5. Autoencoders  KL (SD3, FLUX) and DC-AE (SANA)
     6. Files, text   reading and writing safely, the Hub, prompts to conditions
     7. Teachers      their names, loading them and their students
     8. Scale         the optimizer, adapters, many processes, state to resume from, memory
     9. Evaluation    CLIP score, maximum mean discrepancy, diversity
    10. Inputs        prompts and pictures, encoded as a run needs them; figures
    11. Command line  python sid_fm.py --teacher sd3-medium

The notation is the paper's. x_0 is clean data, e ~ N(0, I) is noise, and x_t = a(t) x_0 + s(t) e
is the noisy sample. D(x_t, t) = E[x_0 | x_t] is the posterior mean. f_phi is the teacher's D, f_psi
is the fake network's D, and x_g = G_theta(z) is the generator's output.

Every network has one interface, v = net(x_t, t, cond), where v is the velocity on the Rectified
Flow path. x_t, v: [B, ...]; t: [B], in [0, 1]; cond: a dict of tensors (batch first), or None.
"""

import argparse
import contextlib
import copy
import gc
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# 1. Paths: Gaussian diffusion and flow matching are one model (paper, section 2)
# ----------------------------------------------------------------------------------------------------------------------
# Two facts are enough: x_t is Gaussian given x_0, and a conditional expectation minimises a squared
# error. No ODE or SDE is needed. It follows that every quantity that a network may predict is a
# linear function of x_t and D(x_t, t).

Cond = dict[str, Tensor] | None  # what a network is conditioned on: tensors, batch first
T_END = {"rf": 1.0, "trig": math.pi / 2, "vp": 1.0, "ve": 80.0}  # vp and ve end before pure noise
VP_BETA_MIN, VP_BETA_SLOPE = 0.1, 19.9  # the score SDE's beta(t), from 0.1 to 20


def check_choice(what: str, name: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless `name` is one of `choices`. `what` names it in the message."""
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(choices)}")


def match_dims(t: Tensor, x: Tensor) -> Tensor:
    """Reshapes t: [B] to [B, 1, ...], so that it broadcasts over x: [B, ...]."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def path_terms(t: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns a(t), s(t) of x_t = a(t) x_0 + s(t) e, and the derivatives a', s', in the shape of t.
    Raises ValueError for an unknown path."""
    check_choice("path", path, T_END)
    if path == "rf":  # Rectified Flow
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "trig":  # TrigFlow
        return t.cos(), t.sin(), -t.sin(), t.cos()
    if path == "vp":  # variance preserving: a = exp(-B / 2), s^2 = 1 - a^2, and B' = beta
        beta, B = VP_BETA_MIN + VP_BETA_SLOPE * t, VP_BETA_MIN * t + VP_BETA_SLOPE * t**2 / 2
        a, s = (-B / 2).exp(), (-torch.expm1(-B)).sqrt()
        return a, s, -beta * a / 2, beta * a**2 / (2 * s)
    # "ve", variance exploding, as in EDM: t is the noise level sigma
    return torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t)


def time_at(a: Tensor, s: Tensor, path: str) -> Tensor:
    """Returns the t where a(t) / s(t) = a / s. On vp and ve it is clamped to the path's end."""
    check_choice("path", path, T_END)
    if path == "rf":
        return s / (a + s)
    if path == "trig":
        return torch.atan2(s, a)
    if path == "vp":  # invert B(t), which is quadratic
        B = torch.log1p((s / a) ** 2).clamp(max=VP_BETA_MIN + VP_BETA_SLOPE / 2)
        return 2 * B / (VP_BETA_MIN + (VP_BETA_MIN**2 + 2 * VP_BETA_SLOPE * B).sqrt())
    return (s / a).clamp(max=T_END["ve"])


def add_noise(x_0: Tensor, e: Tensor, t: Tensor, path: str = "rf") -> Tensor:
    """Returns x_t = a(t) x_0 + s(t) e. x_0, e: [B, ...], t: [B]."""
    a, s, _, _ = path_terms(match_dims(t, x_0), path)
    return a * x_0 + s * e


def prediction_row(kind: str, a: Tensor, s: Tensor, da: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
    """Returns p and q of a network of this kind, which predicts E[p x_0 + q e | x_t].

    x0: (1, 0).  eps: (0, 1).  v = E[dx_t/dt | x_t]: (a', s').  score = grad log p_t = -E[e | x_t] /
    s (Tweedie's formula): (0, -1/s)."""
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    rows = {"x0": (one, zero), "eps": (zero, one), "v": (da, ds), "score": (zero, -1 / s)}
    check_choice("prediction", kind, rows)
    return rows[kind]


def convert(pred: Tensor, x_t: Tensor, t: Tensor, path: str, src: str, dst: str) -> Tensor:
    """Turns one prediction into another at the same x_t. src, dst: "x0", "eps", "v", "score".

    In conditional expectation, pred = p x_0 + q e and x_t = a x_0 + s e. Cramer's rule solves for
    x_0 and e. Inserted into dst = p_dst x_0 + q_dst e, they give
        dst = [(p_dst q - q_dst p) x_t + (a q_dst - s p_dst) pred] / (a q - s p)
    With D = E[x_0 | x_t]: E[e | x_t] = (x_t - a D) / s, score = (a D - x_t) / s^2, and v = a' D +
    s' E[e | x_t]. On Rectified Flow D = x_t - t v, on TrigFlow D = cos(t) x_t - sin(t) v.

    pred, x_t: [B, ...], t: [B]. Where a = 0, eps and score do not determine D. Where s = 0, x0 does
    not determine E[e | x_t]. The result there is NaN, infinite or inexact. Raises ValueError for an
    unknown path or prediction."""
    a, s, da, ds = path_terms(match_dims(t, x_t), path)
    p, q = prediction_row(src, a, s, da, ds)
    p_dst, q_dst = prediction_row(dst, a, s, da, ds)
    if src == dst:
        return pred
    determinant = a * q - s * p
    return (p_dst * q - q_dst * p) / determinant * x_t + (a * q_dst - s * p_dst) / determinant * pred


def equal_snr(x_t: Tensor, t: Tensor, src: str, dst: str) -> tuple[Tensor, Tensor]:
    """Maps (x_t, t) to (X_u, u) on path dst, where a(t)/s(t) = A(u)/S(u) and X_u = (S/s) x_t. At
    equal signal-to-noise ratio the variables of two paths differ by a scale only. D is the same.

    x_t: [B, ...]; t: [B], above 0. A, S are dst's a, s. The factor is S/s because A/a is 0/0 at
    pure noise, where generation starts. The paths vp and ve end at Rectified Flow t = 0.99347 and
    0.98765. Later times are clamped to these ends, and D is then approximate."""
    a, s, _, _ = path_terms(t, src)
    u = time_at(a, s, dst)
    _, S, _, _ = path_terms(u, dst)
    return match_dims(S / s, x_t) * x_t, u


class RectifiedFlowView(nn.Module):
    """Wraps a network that predicts `predicts` on `path` as a Rectified Flow network."""

    def __init__(self, net: nn.Module, path: str, predicts: str):
        super().__init__()
        self.net, self.path, self.predicts = net, path, predicts

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond = None, features: bool = False):
        x_u, u = equal_snr(x_t, t, "rf", self.path)
        pred, hidden = self.net(x_u, u, cond, features=True) if features else (self.net(x_u, u, cond), None)
        x_0 = convert(pred, x_u, u, self.path, self.predicts, "x0")
        v = convert(x_0, x_t, t, "rf", "x0", "v")
        return (v, hidden) if features else v


def as_rectified_flow(net: nn.Module, path: str, predicts: str = "v") -> nn.Module:
    """Turns a network trained on any path into a Rectified Flow network by the equal-SNR map, which
    shares its weights. No teacher of the paper needs this: a SANA-Sprint teacher is a Rectified
    Flow network, which only its pipeline calls through TrigFlow."""
    return net if (path, predicts) == ("rf", "v") else RectifiedFlowView(net, path, predicts)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Losses: score identity distillation (paper, section 3)
# ----------------------------------------------------------------------------------------------------------------------
# f_psi* = E[x_g | x_t] is the optimal fake network for the current generator. We want to minimise
# the Fisher divergence in D-space, L = E[w |f_phi - f_psi*|^2]. By the score identity, for any u,
# E[u(x_t)^T f_psi*] = E[u(x_t)^T x_g]. With u = w (f_phi - f_psi*) it turns L into L2 below.


def guided(
    net: Callable, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, guidance: float, features: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Applies classifier-free guidance, v = v_uncond + guidance (v_cond - v_uncond), in one batched
    call. D = x_t - t v is linear in v, so D is guided in the same way.

    Returns v: [B, ...] and, with features=True, the pooled hidden states [B, channels] of the
    conditional half, else None. uncond may have one row for the whole batch. A key that it lacks is
    taken from cond. Raises ValueError if guidance is not 1 and cond or uncond is None."""
    if guidance != 1:
        if cond is None or uncond is None:
            raise ValueError(f"guidance {guidance} needs cond and uncond")
        x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
        cond = {key: torch.cat([x, uncond.get(key, x).expand_as(x)]) for key, x in cond.items()}
    v, hidden = net(x_t, t, cond, features=True) if features else (net(x_t, t, cond), None)
    if guidance == 1:
        return v, hidden
    v_cond, v_uncond = v.chunk(2)
    return v_uncond + guidance * (v_cond - v_uncond), hidden if hidden is None else hidden.chunk(2)[0]


def weighted_mean(per_element: Tensor, w: Tensor) -> Tensor:
    """Sums over dimensions, weights by w: [B], and averages over the batch. [B, ...] -> scalar"""
    return (w * per_element.flatten(1).sum(1)).mean()


def flow_matching_loss(
    pred: Tensor, x_0: Tensor, e: Tensor, t: Tensor, path: str = "rf", predicts: str = "v", w: Tensor | None = None
) -> Tensor:
    """Returns w(t) |pred - target|^2, by default |v - (e - x_0)|^2: conditional flow matching.

    It trains a teacher if x_0 is data, and the fake network if x_0 is generated. pred is made at
    x_t = add_noise(x_0, e, t, path). pred, x_0, e: [B, ...]; t, w: [B] -> scalar"""
    p, q = prediction_row(predicts, *path_terms(match_dims(t, x_0), path))
    return weighted_mean((pred - (p * x_0 + q * e)).square(), torch.ones_like(t) if w is None else w)


# The weights w(t) of the generator's loss. Denominators are clipped at 1e-5. Because D = x_t - t v,
# the weight 1/t^2 turns the loss between posterior means into one between velocities.
WEIGHTS = {
    "1-t": lambda t: 1 - t,
    "(1-t)^2": lambda t: (1 - t) ** 2,
    "1/t": lambda t: 1 / t.clamp(min=1e-5),
    "1/t^2": lambda t: 1 / t.square().clamp(min=1e-5),
    "snr": lambda t: (1 - t) ** 2 / t.square().clamp(min=1e-5),
    "snr_sqrt": lambda t: (1 - t) / t.clamp(min=1e-5),
    "sid": None,  # 1 / mean |x_g - f_phi|: it depends on x_g, so the score identity does not hold
}


def loss_weight(weight: str | Tensor, t: Tensor, x_g: Tensor, d_real: Tensor) -> Tensor:
    """Returns w(t): [B], without gradient. weight: a key of WEIGHTS, or w itself. Raises ValueError
    for another name."""
    if isinstance(weight, Tensor):
        return weight
    check_choice("weight", weight, WEIGHTS)
    if weight == "sid":
        return 1 / (x_g - d_real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return WEIGHTS[weight](t)


def sid_loss(
    x_g: Tensor, d_real: Tensor, d_fake: Tensor, t: Tensor, alpha: float = 1.0, weight: str | Tensor = "1-t"
) -> Tensor:
    """Returns the generator's loss, L_alpha = L2 - alpha L1 (paper, section 3):

        L1 = E[w |f_phi - f_psi|^2],    L2 = E[w (f_phi - f_psi)^T (f_phi - x_g)]

    Let grad be the derivative with psi held fixed, and d/dtheta the whole derivative. At psi = psi*

        dL/dtheta = grad L1 + 2r = grad L2 + r, grad L_alpha = (dL/dtheta)/2 + (1/2 - alpha) grad L1

    where r is the part of L2's derivative that flows through psi*(theta). So alpha = 1/2 gives half
    of dL/dtheta, and alpha = 1 gives r. At psi* also L1 = L2 = L, so at alpha = 1 the loss, which
    is E[w (f_phi - f_psi)^T (f_psi - x_g)], hovers around zero. Watch L1 for convergence.

    d_real = f_phi(x_t, t) and d_fake = f_psi(x_t, t) are the two networks' D (guided, if guidance
    is used) at x_t = add_noise(x_g, e, t). Do not detach them: the gradient reaches the generator
    through x_g and through the inputs of both networks. x_g, d_real, d_fake: [B, ...]; t: [B];
    weight: a key of WEIGHTS, or w: [B] -> scalar"""
    w = loss_weight(weight, t, x_g, d_real)
    difference = d_real - d_fake
    return weighted_mean(difference * ((d_real - x_g) - alpha * difference), w)


def dmd_loss(x_g: Tensor, d_real: Tensor, d_fake: Tensor, t: Tensor, weight: str | Tensor = "1-t") -> Tensor:
    """Returns the loss of distribution matching distillation, for comparison. Its gradient with
    respect to each x_g is w (f_psi - f_phi) / B. No gradient flows through the networks. The
    arguments are those of sid_loss."""
    w = loss_weight(weight, t, x_g, d_real)
    return weighted_mean((d_fake - d_real).detach() * x_g, w)


# The adversarial pair of the data-aided loss. The fake network is also the discriminator: the
# logits are its last hidden states, averaged over image tokens, one logit per channel.


def cross_entropy(features: Tensor, real: bool) -> Tensor:
    """Returns the mean binary cross-entropy of logits clamped to +-10. [B, channels] -> [B]"""
    logits = features.clamp(-10, 10)
    return F.softplus(-logits if real else logits).mean(1)


def discriminator_loss(features_real: Tensor, features_fake: Tensor, size: int) -> Tensor:
    """Returns (real + fake) / 2 times the sample size C H W, because other losses sum over it."""
    return size * (cross_entropy(features_real, True).mean() + cross_entropy(features_fake, False).mean()) / 2


def adversarial_loss(features_fake: Tensor, size: int, w: Tensor) -> Tensor:
    """Returns the loss of generated samples, judged as real, times w(t): [B] and C H W."""
    return size * (w * cross_entropy(features_fake, True)).mean()


# ----------------------------------------------------------------------------------------------------------------------
# 3. Few-step generation and the training loop (paper, section 3)
# ----------------------------------------------------------------------------------------------------------------------

NOISES = ("fresh", "fixed", "ddim")
LOSSES = ("sid", "dmd")
SID_LAW = (math.log(2), 1.6)  # the authors' times: t = sigmoid(n), n ~ N(log 2, 1.6^2)
T_MIN = 1e-3  # uniform times start here: near 0 the integral of 1/t^2, a velocity loss's weight, diverges


def rank_and_world() -> tuple[int, int]:
    """Returns this process's rank and the number of processes."""
    import torch.distributed as dist

    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


class SharedGenerator(torch.Generator):
    """Marks a generator whose seed all processes share. Each samples the whole batch and keeps its
    own rows. So all together use the same numbers as one process would."""


def random_rows(draw: Callable, shape: tuple[int, ...], rng: torch.Generator | None, **options) -> Tensor:
    """Returns this process's rows of random numbers of a shape. draw: torch.rand or torch.randn."""
    rank, world = rank_and_world() if isinstance(rng, SharedGenerator) else (0, 1)
    return draw(world * shape[0], *shape[1:], generator=rng, **options)[rank * shape[0] : (rank + 1) * shape[0]]


def noise_like(x: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """Samples e ~ N(0, I) on rng's device: a CPU generator gives all devices the same numbers."""
    return random_rows(torch.randn, x.shape, rng, device=rng.device if rng else x.device, dtype=x.dtype).to(x.device)


def sample_times(n: int, law: tuple | None, path: str = "rf", rng: torch.Generator | None = None) -> Tensor:
    """Samples n times on `path`, by log(s/a) ~ N(law[0], law[1]^2). On Rectified Flow this is the
    logit-normal law. If law is None, times are uniform between T_MIN and the path's end. -> [n]"""
    device = rng.device if rng else None
    if law is None:
        return T_MIN + (T_END[path] - T_MIN) * random_rows(torch.rand, (n,), rng, device=device)
    ratio = (law[0] + law[1] * random_rows(torch.randn, (n,), rng, device=device)).exp()
    return time_at(torch.ones_like(ratio), ratio, path)


def sample_k(steps: int, iteration: int, rng: torch.Generator | None = None) -> int:
    """Samples k ~ U{1 .. steps}. Iteration and seed fix k, so all processes have the same."""
    return random.Random(f"{rng.initial_seed() if rng else torch.initial_seed()} {iteration}").randint(1, steps)


def generate(
    net: Callable,
    z: Tensor,
    cond: Cond = None,
    steps: int = 4,
    noise: str = "fresh",
    stop_after: int | None = None,
    times: Tensor | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """Generates x_g = G(z) in K = steps network calls. `stop_after=k` returns step k's output.

    For i = 0 .. K - 1: D = x_t - t v at t_i = 1 - i/K (a posterior mean for a teacher, a sample for
    a student). Noise n takes D to the next time: x = (1 - t_{i+1}) D + t_{i+1} n. n is `fresh`,
    `fixed` (z again) or `ddim` (the E[e | x_t] that v implies). Only the last step carries
    gradient. times: t_0 > ... > t_K = 0, in place of `steps`. Raises ValueError for an unknown
    noise, and unless 1 <= stop_after <= steps. z: [B, ...] -> [B, ...]"""
    steps = steps if times is None else len(times) - 1
    last = steps if stop_after is None else stop_after
    if not 1 <= last <= steps:
        raise ValueError(f"generate needs 1 <= stop_after <= steps: stop_after is {last}, steps {steps}")
    check_choice("noise", noise, NOISES)
    times = [1 - i / steps for i in range(steps + 1)] if times is None else times.tolist()
    x_t = z
    for i in range(last):
        t, t_next = times[i], times[i + 1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == last - 1):
            v = net(x_t, z.new_full((len(z),), t), cond)
            x_0 = x_t - t * v
        if i < last - 1:
            if noise == "ddim":
                n = x_t + (1 - t) * v
            else:
                n = z if noise == "fixed" else noise_like(z, rng)
            x_t = (1 - t_next) * x_0 + t_next * n
    return x_0


@torch.no_grad()
def sample_ode(
    net: Callable, z: Tensor, cond: Cond = None, uncond: Cond = None, times: Tensor | None = None, guidance: float = 1.0
) -> Tensor:
    """Solves dx/dt = v by Euler's method along descending times that end in 0, by default in 28
    steps. (Teacher.times returns a teacher's own times.) This is `generate` with ddim noise:

        (1 - t') (x_t - t v) + t' (x_t + (1 - t) v) = x_t + (t' - t) v

    z: [B, ...] -> x_0: [B, ...]. uncond, guidance and errors are those of `guided`."""
    times = torch.linspace(1, 0, 29) if times is None else times
    return generate(lambda *of: guided(net, *of, uncond, guidance)[0], z, cond, noise="ddim", times=times)


def set_trainable(optimizer: torch.optim.Optimizer, flag: bool) -> None:
    """Sets whether the weights that `optimizer` updates take gradients."""
    for weight in (w for group in optimizer.param_groups for w in group["params"]):
        weight.requires_grad_(flag)


def backward(loss: Tensor, net: nn.Module, last: bool) -> None:
    """Runs loss.backward(). Processes that share `net` exchange gradients at the last part only."""
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(last)
    loss.backward()


def take_step(optimizer: torch.optim.Optimizer) -> Tensor:
    """Takes one optimizer step, or skips it if the gradient is not finite, and clears the
    gradients. Returns 1 if it was skipped, else 0, as a tensor on the device. Fused optimizers read
    it there. Others make the host wait."""
    gradients = [w.grad for group in optimizer.param_groups for w in group["params"] if w.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # over all shards
    skipped = (~norm.isfinite()).float()
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skipped
        optimizer.step()
    elif not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return skipped


def distill(
    teacher: nn.Module,
    student: nn.Module,
    fake: nn.Module,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    batches: Iterable[tuple[dict | None, tuple[Tensor, dict | None] | None]],
    shape: tuple[int, ...],
    *,
    # the method
    steps: int = 4,
    times: Tensor | None = None,
    loss: str = "sid",
    alpha: float = 1.0,
    weight: str = "1-t",
    noise: str = "fresh",
    guidance: float | Sequence[float] = 1.0,
    uncond: Cond = None,
    law: tuple[float, float] | None = SID_LAW,
    sid_scale: float = 100.0,
    # the schedule
    start: int = 0,
    iters: int = 1000,
    accumulate: int = 1,
    fake_updates: int = 1,
    rng: torch.Generator | None = None,
    # data-aided
    discriminator_scale: float = 1.0,
    warmup: tuple[int, int] = (20_000, 40_000),
) -> Iterator[dict]:
    """Runs the training loop, which distills `teacher` into `student`. The caller passes student
    and fake network as copies of the teacher (data-aided: the student as a data-free run left it).

    An iteration makes `fake_updates` updates of the fake network and one of the generator. Each
    update follows the mean loss of `accumulate` new batches. Iterations are counted from `start` to
    `iters` - 1. The loop also ends when `batches` does.

    optimizers: the student's and the fake network's. All weights that neither holds are frozen.
    batches: yields (cond, real). cond is a dict of tensors or None. real is None or, data-aided, a
        pair of clean samples x_0 and their own cond.
    shape: the shape (B, ...) of a batch. times: generation times that replace `steps`.
    law: the law of the times of both losses, as in sample_times.
    guidance: one number, or three: in the fake network's training and, in the generator's loss, of
        the fake network and of the teacher. The generator runs without guidance.
    sid_scale: multiplies the generator's SiD or DMD loss. It keeps the gradient above Adam's eps,
        and weights the loss against the adversarial term.
    discriminator_scale: weights the discriminator's loss against the fake network's own loss.
    rng: the source of all noise and times. Its seed fixes k.
    warmup: the data-aided generator waits for warmup[0] images, then sees L_alpha alone until
        warmup[1].

    Yields a dict after each iteration. Tensors on the device: loss (L_alpha or DMD's), fisher (L1),
    fake_loss, skipped (the number of skipped updates) and, data-aided, discriminator (a mean per
    logit: log 2 is chance) and adversarial (times C H W). Numbers: iteration, images (generated so
    far for the generator's updates, by all processes) and k. Watch fisher: it estimates the Fisher
    divergence once the fake network keeps up. It starts at 0, where the fake network equals the
    teacher. With fused optimizers the host never waits for the device. Raises ValueError for an
    unknown loss, weight or noise."""
    for what, name, choices in (("loss", loss, LOSSES), ("weight", weight, WEIGHTS), ("noise", noise, NOISES)):
        check_choice(what, name, choices)
    in_training, of_fake, of_teacher = guidance if isinstance(guidance, Sequence) else [guidance] * 3
    student_optimizer, fake_optimizer = optimizers
    for net in (teacher, student, fake):
        net.requires_grad_(False)
    set_trainable(student_optimizer, True)
    weights = next(student.parameters())
    template = torch.empty(shape, device=weights.device, dtype=torch.promote_types(weights.dtype, torch.float32))
    size = template[0].numel()  # C H W
    per_iteration = shape[0] * accumulate * rank_and_world()[1]  # images, of all processes
    steps, times = (steps, None) if times is None else (len(times) - 1, times.cpu())
    sample, batches = partial(generate, student, steps=steps, noise=noise, times=times, rng=rng), iter(batches)

    for iteration in range(start, iters):
        parts = list(itertools.islice(batches, (fake_updates + 1) * accumulate))
        if len(parts) < (fake_updates + 1) * accumulate:
            return
        *fake_parts, student_parts = (parts[i : i + accumulate] for i in range(0, len(parts), accumulate))
        # x_g is output k of K steps. k is uniform: the mixture of outputs is matched to the teacher.
        k = sample_k(steps, iteration, rng)
        measured: dict = defaultdict(list)  # by each part
        skipped, aided = 0.0, parts[0][1] is not None

        # 1. The fake network learns the generator's distribution by flow matching on its samples.
        #    Its guided output is trained, because the generator's loss compares guided outputs.
        set_trainable(fake_optimizer, True)
        for some in fake_parts:
            for i, (cond, real) in enumerate(some, 1):
                with torch.no_grad():
                    x_g = sample(noise_like(template, rng), cond, stop_after=k)
                e, t = noise_like(template, rng), sample_times(shape[0], law, rng=rng).to(template)
                x_t = add_noise(x_g, e, t)
                v, hidden = guided(fake, x_t, t, cond, uncond, in_training, features=aided)
                fake_loss = flow_matching_loss(v, x_g, e, t)
                measured["fake_loss"].append(fake_loss.detach())
                if aided:  # it also learns to tell generated samples from real ones
                    x_0, real_cond = real  # the same noise and times lower the variance
                    _, hidden_real = fake(add_noise(x_0, e, t), t, real_cond, features=True)
                    discriminator = discriminator_loss(hidden_real, hidden, size)
                    measured["discriminator"].append(discriminator.detach() / size)
                    fake_loss = fake_loss + discriminator_scale * discriminator
                backward(fake_loss / accumulate, fake, last=i == accumulate)
            skipped = skipped + take_step(fake_optimizer)
        set_trainable(fake_optimizer, False)

        # 2. The generator follows L_alpha. psi and phi are constants: the gradient flows through
        #    x_g and through x_t, the input of both networks.
        seen = iteration * per_iteration
        waits = aided and seen < warmup[0]
        for i, (cond, _) in enumerate(student_parts, 1):
            x_g = sample(noise_like(template, rng), cond, stop_after=k)
            e, t = noise_like(template, rng), sample_times(shape[0], law, rng=rng).to(template)
            x_t = add_noise(x_g, e, t)
            v_real, _ = guided(teacher, x_t, t, cond, uncond, of_teacher)
            v_fake, hidden = guided(fake, x_t, t, cond, uncond, of_fake, features=aided)
            d_real, d_fake = (x_t - match_dims(t, x_t) * v for v in (v_real, v_fake))  # f_phi, f_psi
            w = loss_weight(weight, t, x_g, d_real)
            if loss == "sid":
                student_loss = sid_loss(x_g, d_real, d_fake, t, alpha, w)
            else:
                student_loss = dmd_loss(x_g, d_real, d_fake, t, w)
            measured["loss"].append(student_loss.detach())
            measured["fisher"].append(weighted_mean((d_real - d_fake).detach().square(), w))
            student_loss = sid_scale * student_loss
            if aided:  # always weighted by 1 - t: f_phi - f_psi has a factor t, this term has none
                adversarial = adversarial_loss(hidden, size, 1 - t)
                measured["adversarial"].append(adversarial.detach())
                student_loss = (student_loss + adversarial) / 2 if seen >= warmup[1] else student_loss
            if not waits:
                backward(student_loss / accumulate, student, last=i == accumulate)
        skipped = skipped if waits else skipped + take_step(student_optimizer)
        means = {name: torch.stack(values).mean() for name, values in measured.items()}
        yield {"iteration": iteration, "images": seen + per_iteration, "k": k, **means, "skipped": skipped}


# ----------------------------------------------------------------------------------------------------------------------
# 4. Backbones: SD3 and SD3.5's MMDiT, SANA's linear DiT, FLUX
# ----------------------------------------------------------------------------------------------------------------------
# Constructors take the keys of a checkpoint's config.json. Modules are named like its tensors, so
# that load_state_dict loads it. A key with one value in all checkpoints is not an option: it is in
# FIXED, which the loader compares. A network has one dtype. As in the original networks, time
# embeddings, norm statistics, rotations and linear attention are always computed in float32.


def widen(x: Tensor) -> Tensor:
    """Casts to float32, the dtype of latents, features and images. A wider dtype stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoidal(t: Tensor) -> Tensor:
    """Returns float32 cos and sin of t at 128 frequencies, from 1 to 1e-4. [B] -> [B, 256]"""
    rates = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Applies adaptive layer norm, LN(x) (1 + scale) + shift. x: [B, N, D]; others: [B, 1, D]"""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class RMSNorm(nn.Module):
    """Computes x / sqrt(mean x^2 + eps) * weight (+ bias) over the last dimension. The mean is in
    float32."""

    def __init__(self, dim: int, eps: float = 1e-6, bias: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        unit = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        y = (x * unit).to(x.dtype) * self.weight
        return y if self.bias is None else y + self.bias


class PatchEmbed(nn.Module):
    """Turns latents into tokens, [B, C, h, w] -> [B, (h / p) (w / p), D]. If max_size is given,
    adds a table of max_size x max_size positions, which span 0 .. base_size a side. Larger latents
    raise ValueError."""

    def __init__(self, channels: int, dim: int, patch_size: int, max_size: int = 0, base_size: int = 0):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.max_size = max_size
        if max_size:  # half of the channels encode the column, half the row, by sin and cos
            omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
            angles = torch.arange(max_size, dtype=torch.float64)[:, None] * base_size / max_size * omega
            one = torch.cat([angles.sin(), angles.cos()], dim=-1).float()  # [max_size, D / 2]
            table = torch.cat([one[None].expand(max_size, -1, -1), one[:, None].expand(-1, max_size, -1)], dim=-1)
            self.register_buffer("pos_embed", table.reshape(1, max_size**2, dim))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x)
        rows, columns = tokens.shape[-2:]
        tokens = tokens.flatten(2).transpose(1, 2).contiguous()  # contiguous here, once, not in every block
        if not self.max_size:
            return tokens
        n, top, left = self.max_size, (self.max_size - rows) // 2, (self.max_size - columns) // 2
        if min(top, left) < 0:
            raise ValueError(f"{rows} x {columns} patches: the table of positions has {n} x {n}")
        table = self.pos_embed.unflatten(1, (n, n))[:, top : top + rows, left : left + columns]
        return tokens + table.flatten(1, 2)


class Chain(nn.Sequential):
    """Runs modules in the order given, under the names given."""

    def __init__(self, **steps: nn.Module):
        super().__init__(OrderedDict(steps))


def embedder(dim_in: int, dim: int, activation: nn.Module | None = None) -> Chain:
    """Builds linear, activation, linear, to embed time, guidance, pooled text or captions."""
    return Chain(linear_1=nn.Linear(dim_in, dim), act=activation or nn.SiLU(), linear_2=nn.Linear(dim, dim))


class Conditioning(nn.Module):
    """Sums the embeddings of time, guidance and pooled text, if the network has them. -> [B, D]"""

    def __init__(self, dim: int, pooled_dim: int = 0, guidance: bool = False):
        super().__init__()
        self.timestep_embedder = embedder(256, dim)
        self.guidance_embedder = embedder(256, dim) if guidance else None
        self.text_embedder = embedder(pooled_dim, dim) if pooled_dim else None

    def forward(self, t: Tensor, guidance: Tensor | None, pooled: Tensor | None, dtype: torch.dtype) -> Tensor:
        c = self.timestep_embedder(sinusoidal(t).to(dtype))
        if self.guidance_embedder is not None:
            c = c + self.guidance_embedder(sinusoidal(guidance).to(dtype))
        return c if self.text_embedder is None else c + self.text_embedder(pooled.to(dtype))


class Modulation(nn.Module):
    """Maps c to n shifts, scales and gates. [B, D] -> n tensors [B, 1, D]"""

    def __init__(self, dim: int, n: int):
        super().__init__()
        self.n, self.linear = n, nn.Linear(dim, n * dim)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c))[:, None].chunk(self.n, dim=-1)


def feed_forward(dim: int) -> Chain:
    wide = Chain(proj=nn.Linear(dim, 4 * dim), act=nn.GELU("tanh"))
    return Chain(net=nn.Sequential(wide, nn.Identity(), nn.Linear(4 * dim, dim)))


Norm, Rope = Callable[[int], nn.Module], tuple[Tensor, Tensor]


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Applies rotary embedding: it rotates pairs of neighbouring channels. x: [B, N, H, d]"""
    cos, sin = rope
    neighbour = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x.float() * cos + neighbour.float() * sin).to(x.dtype)


class JointAttention(nn.Module):
    """Computes attention among image tokens or, with context=True, jointly among text and image
    tokens. Text tokens come first. They have their own projections and q/k-norms."""

    def __init__(self, dim: int, heads: int, norm: Norm, out: bool = True, context: bool = False, last: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)]) if out else None
        self.norm_q, self.norm_k = norm(dim // heads), norm(dim // heads)
        if context:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.to_add_out = None if last else nn.Linear(dim, dim)
            self.norm_added_q, self.norm_added_k = norm(dim // heads), norm(dim // heads)

    def forward(self, x: Tensor, text: Tensor | None = None, rope: Rope | None = None) -> tuple[Tensor, Tensor | None]:
        """Returns x: [B, N, D], text: [B, L, D] after attention; None for text without output."""
        q, k, v = (to(x).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v))  # [B, N, H, d]
        q, k = self.norm_q(q), self.norm_k(k)
        if text is not None:
            added = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
            q_text, k_text, v_text = (to(text).unflatten(-1, (self.heads, -1)) for to in added)
            q = torch.cat([self.norm_added_q(q_text), q], dim=1)
            k = torch.cat([self.norm_added_k(k_text), k], dim=1)
            v = torch.cat([v_text, v], dim=1)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2).flatten(2)
        y_text = None
        if text is not None:
            y_text, y = y.split([text.shape[1], x.shape[1]], dim=1)
            y_text = None if self.to_add_out is None else self.to_add_out(y_text)
        return y if self.to_out is None else self.to_out[0](y), y_text


class JointBlock(nn.Module):
    """Implements MMDiT's block and FLUX's double-stream block: image and text tokens meet in
    attention only. dual adds a second attention among image tokens (SD3.5-Medium). last drops the
    text output."""

    def __init__(self, dim: int, heads: int, norm: Norm, dual: bool = False, last: bool = False):
        super().__init__()
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(dim, heads, norm, context=True, last=last)
        self.attn2 = JointAttention(dim, heads, norm) if dual else None
        self.ff = feed_forward(dim)
        self.ff_context = None if last else feed_forward(dim)

    def forward(self, x: Tensor, text: Tensor, c: Tensor, rope: Rope | None = None) -> tuple[Tensor, Tensor | None]:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = self.norm1(c)
        if self.ff_context is None:
            scale_text, shift_text = self.norm1_context(c)
        else:
            shift_text, scale_text, *rest = self.norm1_context(c)
        y, y_text = self.attn(modulate(x, shift, scale), modulate(text, shift_text, scale_text), rope)
        y = torch.addcmul(x, gate, y)
        if self.attn2 is not None:
            shift, scale, gate = second
            y = torch.addcmul(y, gate, self.attn2(modulate(x, shift, scale))[0])
        y = torch.addcmul(y, gate_mlp, self.ff(modulate(y, shift_mlp, scale_mlp)))
        if self.ff_context is None:
            return y, None
        gate, shift, scale, gate_mlp = rest
        text = torch.addcmul(text, gate, y_text)
        return y, torch.addcmul(text, gate_mlp, self.ff_context(modulate(text, shift, scale)))


class Backbone(nn.Module):
    """Defines what backbones share. guidance: the embedded scale if cond["guidance"] is absent."""

    FIXED: ClassVar = {}
    guidance = student_guidance = 1.0

    def velocity(self, tokens: Tensor, x_t: Tensor, features: bool) -> Tensor | tuple[Tensor, Tensor]:
        """Projects the last hidden states (after the final norm) to v. With features=True, also
        returns their mean over tokens. tokens: [B, N, D] -> v in the shape of x_t, hidden [B, D]"""
        p = self.patch_size  # a token's channels are ordered (row in patch, column in patch, C)
        rows = x_t.shape[-2] // p
        grid = self.proj_out(tokens).unflatten(2, (p, p, -1)).unflatten(1, (rows, -1))  # [B, h/p, w/p, p, p, C]
        v = grid.permute(0, 5, 1, 3, 2, 4).reshape(len(x_t), -1, *x_t.shape[-2:]).to(x_t.dtype)
        return (v, widen(tokens).mean(1)) if features else v


class MMDiT(Backbone):
    """Implements Stable Diffusion 3 and 3.5 (arXiv 2403.03206). cond holds text
    [B, L, joint_attention_dim] and pooled [B, pooled_projection_dim].

    Raises ValueError for latents larger than the table of positions."""

    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 24,
        num_attention_heads: int = 24,
        attention_head_dim: int = 64,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 2048,
        pos_embed_max_size: int = 192,
        sample_size: int = 128,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
    ):
        super().__init__()
        dim, norm = num_attention_heads * attention_head_dim, RMSNorm if qk_norm else nn.Identity
        self.patch_size, self.max_size = patch_size, pos_embed_max_size
        self.pos_embed = PatchEmbed(in_channels, dim, patch_size, pos_embed_max_size, sample_size // patch_size)
        self.time_text_embed = Conditioning(dim, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(dim, num_attention_heads, norm, i in dual_attention_layers, i == num_layers - 1)
            for i in range(num_layers)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, patch_size**2 * in_channels)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict, features: bool = False):
        dtype = self.proj_out.weight.dtype
        x = self.pos_embed(x_t.to(dtype))
        text = self.context_embedder(cond["text"].to(dtype))
        c = self.time_text_embed(1000 * t, None, cond["pooled"], dtype)
        for block in self.transformer_blocks:
            x, text = block(x, text, c)
        scale, shift = self.norm_out(c)
        return self.velocity(modulate(x, shift, scale), x_t, features)


flux_norm = partial(nn.RMSNorm, eps=1e-6)  # unlike the RMSNorm above, it rounds only once


class SingleBlock(nn.Module):
    """Runs FLUX's single-stream block: parallel attention and MLP, on text and image tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.attn = JointAttention(dim, heads, flux_norm, out=False)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(self, x: Tensor, c: Tensor, rope: Rope) -> Tensor:
        shift, scale, gate = self.norm(c)
        y = modulate(x, shift, scale)
        mlp = F.gelu(self.proj_mlp(y), approximate="tanh")
        return torch.addcmul(x, gate, self.proj_out(torch.cat([self.attn(y, rope=rope)[0], mlp], dim=-1)))


def rope_table(rows: int, columns: int, text: int, axes: tuple[int, ...], device: torch.device) -> Rope:
    """Returns the cos of the rotations, and the sin with its sign on each channel's neighbour.
    Image tokens are at (0, row, column), text tokens at the origin. Both: [text + N, 1, d]"""
    exact = torch.float32 if device.type == "mps" else torch.float64
    row, column = torch.meshgrid(*(torch.arange(n, device=device, dtype=exact) for n in (rows, columns)), indexing="ij")
    positions = F.pad(torch.stack([torch.zeros_like(row), row, column]).flatten(1), (text, 0))  # [3, text + N]
    rates = (10000.0 ** (-torch.arange(0, d, 2, device=device, dtype=exact) / d) for d in axes)
    angles = torch.cat([p[:, None, None] * rate for p, rate in zip(positions, rates)], dim=-1)
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)


class FLUX(Backbone):
    """Implements FLUX.1: double-stream blocks, then single-stream blocks, with rotary positions.

    cond holds text [B, L, joint_attention_dim], pooled [B, pooled_projection_dim] and, optionally,
    guidance [B]. The network packs latents 2 x 2 into tokens."""

    FIXED: ClassVar = {"patch_size": 1}  # counted in packed latents
    patch_size = 2
    guidance = 3.5

    def __init__(
        self,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
    ):
        super().__init__()
        heads, dim = num_attention_heads, num_attention_heads * attention_head_dim
        self.axes = tuple(axes_dims_rope)
        self.x_embedder = nn.Linear(in_channels, dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.time_text_embed = Conditioning(dim, pooled_projection_dim, guidance_embeds)
        self.transformer_blocks = nn.ModuleList(JointBlock(dim, heads, flux_norm) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(dim, heads) for _ in range(num_single_layers))
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, in_channels)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict, features: bool = False):
        dtype = self.proj_out.weight.dtype
        packed = F.pixel_unshuffle(x_t.to(dtype), 2)  # [B, 4 C, h / 2, w / 2]
        x, text = self.x_embedder(packed.flatten(2).transpose(1, 2)), self.context_embedder(cond["text"].to(dtype))
        guidance = cond.get("guidance", torch.full_like(t, self.guidance))
        c = self.time_text_embed(1000 * t, 1000 * guidance, cond["pooled"], dtype)
        rope = rope_table(*packed.shape[-2:], text.shape[1], self.axes, x.device)
        for block in self.transformer_blocks:
            x, text = block(x, text, c, rope)
        x = torch.cat([text, x], dim=1)
        for block in self.single_transformer_blocks:
            x = block(x, c, rope)
        scale, shift = self.norm_out(c)
        x = modulate(x[:, text.shape[1] :], shift, scale)
        v = F.pixel_shuffle(self.proj_out(x).transpose(1, 2).unflatten(2, packed.shape[-2:]), 2).to(x_t.dtype)
        return (v, widen(x).mean(1)) if features else v


class SanaAttention(nn.Module):
    """Computes SANA's linear attention among image tokens (ReLU kernel), or softmax attention from
    image to text tokens. Sprint's q/k-norm spans all heads."""

    def __init__(self, dim: int, heads: int, qk_norm: bool, bias: bool):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(dim, eps=1e-5) if qk_norm else nn.Identity() for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Maps x: [B, N, D] to [B, N, D]. text: [B, L, D], mask: [B, 1, 1, L], true on text."""
        source = x if text is None else text
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(source)), self.to_v(source)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B, H, N, d]
        if text is None:
            y = linear_attention(*(y.transpose(2, 3) for y in (q, k, v))).transpose(2, 3)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Computes y_i = sum_j (relu q_i . relu k_j) v_j / sum_j (relu q_i . relu k_j). Sums over j
    come first: this takes N d^2 operations instead of N^2 d. A row of ones appended to v yields the
    denominator. All tensors are [B, H, d, N], tokens last."""
    dtype = v.dtype
    q, k, v = F.relu(q).float(), F.relu(k).float(), F.pad(v.float(), (0, 0, 0, 1), value=1.0)
    y, norm = ((v @ k.transpose(2, 3)) @ q).split([v.shape[2] - 1, 1], dim=2)
    return (y / (norm + 1e-15)).to(dtype)


class MixFFN(nn.Module):
    """Runs a gated convolutional MLP: 1 x 1, 3 x 3 depthwise, SiLU gate, 1 x 1. [B, D, h, w]. In
    the autoencoder, which has a norm, x is added to the result."""

    def __init__(self, dim: int, hidden: int, norm: nn.Module | None = None):
        super().__init__()
        self.conv_inverted = nn.Conv2d(dim, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, dim, 1, bias=False)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        y = self.conv_point(y * F.silu(gate))
        return y if self.norm is None else x + self.norm(y)


class SanaBlock(nn.Module):
    def __init__(self, dim: int, heads: int, cross_heads: int, hidden: int, qk_norm: bool):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn1 = SanaAttention(dim, heads, qk_norm, bias=False)
        self.attn2 = SanaAttention(dim, cross_heads, qk_norm, bias=True)
        self.ff = MixFFN(dim, hidden)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None, c: Tensor, rows: int) -> Tensor:
        """Maps x: [B, N, D] to [B, N, D]. text: [B, L, D], mask: [B, 1, 1, L], c: [B, 6, D]"""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + c).chunk(6, dim=1)
        x = torch.addcmul(x, gate, self.attn1(modulate(x, shift, scale)))
        x = x + self.attn2(x, text, mask)
        image = modulate(x, shift_mlp, scale_mlp).transpose(1, 2).unflatten(2, (rows, -1))
        return torch.addcmul(x, gate_mlp, self.ff(image).flatten(2).transpose(1, 2))


class SanaDiT(Backbone):
    """Implements SANA (arXiv 2410.10629) and the teachers of SANA-Sprint (2503.09641).

    cond holds text [B, L, caption_channels], optionally mask [B, L] (true on text tokens) and, for
    networks with a guidance embedding (Sprint's students), optionally guidance [B]. Those networks
    get t, and so do Sprint's teachers, whose timestep_scale is 0.001. SANA gets 1000 t."""

    FIXED: ClassVar = {"norm_eps": 1e-6}
    guidance = student_guidance = 4.5

    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 32,
        num_layers: int = 20,
        num_attention_heads: int = 70,
        attention_head_dim: int = 32,
        num_cross_attention_heads: int = 20,
        caption_channels: int = 2304,
        mlp_ratio: float = 2.5,
        qk_norm: str | None = None,
        timestep_scale: float = 1.0,
        guidance_embeds: bool = False,
        guidance_embeds_scale: float = 0.1,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.patch_size = patch_size
        self.time_scale = 1.0 if guidance_embeds else 1000 * timestep_scale
        self.guidance_scale = guidance_embeds_scale
        self.patch_embed = PatchEmbed(in_channels, dim, patch_size)
        # Checkpoints with a guidance embedding name the embedders one level higher.
        self.time_embed = Conditioning(dim, guidance=True) if guidance_embeds else nn.Module()
        if not guidance_embeds:
            self.time_embed.emb = Conditioning(dim)
        self.time_embed.linear = nn.Linear(dim, 6 * dim)
        self.caption_projection = embedder(caption_channels, dim, nn.GELU("tanh"))
        self.caption_norm = RMSNorm(dim, eps=1e-5)
        self.transformer_blocks = nn.ModuleList(
            SanaBlock(dim, num_attention_heads, num_cross_attention_heads, int(mlp_ratio * dim), bool(qk_norm))
            for _ in range(num_layers)
        )
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, patch_size**2 * in_channels)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict, features: bool = False):
        dtype = self.proj_out.weight.dtype
        x = self.patch_embed(x_t.to(dtype))
        text = self.caption_norm(self.caption_projection(cond["text"].to(dtype)))
        mask = cond["mask"][:, None, None].bool() if "mask" in cond else None
        embed = getattr(self.time_embed, "emb", self.time_embed)
        guidance = cond.get("guidance", torch.full_like(t, self.guidance))
        c = embed(self.time_scale * t, self.guidance_scale * guidance, None, dtype)
        modulation = self.time_embed.linear(F.silu(c)).unflatten(1, (6, -1))
        for block in self.transformer_blocks:
            x = block(x, text, mask, modulation, x_t.shape[-2] // self.patch_size)
        shift, scale = (self.scale_shift_table + c[:, None]).chunk(2, dim=1)
        return self.velocity(modulate(x, shift, scale), x_t, features)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Autoencoders: images to latents and back
# ----------------------------------------------------------------------------------------------------------------------
# posterior(images) returns the mean and standard deviation of the latents, and decoder(latents) the
# images. images: [B, 3, H, W] in [-1, 1]; latents: [B, C, H / downscale, W / downscale], before
# shift and scale, which Teacher applies. Arguments and FIXED are keys of config.json.

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)


class ResnetBlock(nn.Module):
    """Computes conv(silu(norm(conv(silu(norm(x)))))) + shortcut(x). [B, C, h, w]"""

    def __init__(self, dim: int, dim_out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, dim, eps=1e-6), conv3x3(dim, dim_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, dim_out, eps=1e-6), conv3x3(dim_out, dim_out)
        self.conv_shortcut = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Calls are nested so that each intermediate (0.5 GB at 1024 x 1024) is freed once used.
        return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x)))))) + self.conv_shortcut(x)


class PixelAttention(nn.Module):
    """Computes x + attention among all pixels, in one head as wide as the channels."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, dim, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).mT[:, None]  # [B, 1, h w, dim]
        h = self.to_out(F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h)))
        return x + h.mT.reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(dim, dim, groups) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(dim, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class AutoencoderKL(nn.Module):
    """Implements the autoencoder of SD3, SD3.5 and FLUX."""

    FIXED: ClassVar = {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "mid_block_add_attention": True}

    def __init__(
        self,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 16,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float = 0.0,
    ):
        super().__init__()
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        dims, groups = list(block_out_channels), norm_num_groups
        self.latent_channels, self.downscale = latent_channels, 2 ** (len(dims) - 1)
        pad = nn.ZeroPad2d((0, 1, 0, 1))  # at the right and the bottom only
        down = lambda dim: Chain(pad=pad, conv=nn.Conv2d(dim, dim, 3, stride=2))
        up = lambda dim: Chain(up=nn.Upsample(scale_factor=2), conv=conv3x3(dim, dim))  # nearest pixels

        def stages(dims: list[int], layers: int, name: str, resample: Callable[[int], Chain]) -> nn.Sequential:
            out = []
            for i, (dim, dim_out) in enumerate(zip([dims[0], *dims], dims)):
                blocks = [ResnetBlock(dim if j == 0 else dim_out, dim_out, groups) for j in range(layers)]
                resampler = [resample(dim_out)] if i < len(dims) - 1 else []
                out.append(Chain(**{"resnets": nn.Sequential(*blocks), name: nn.Sequential(*resampler)}))
            return nn.Sequential(*out)

        self.encoder = Chain(
            conv_in=conv3x3(3, dims[0]),
            down_blocks=stages(dims, layers_per_block, "downsamplers", down),
            mid_block=MidBlock(dims[-1], groups),
            conv_norm_out=nn.GroupNorm(groups, dims[-1], eps=1e-6),
            act=nn.SiLU(),
            conv_out=conv3x3(dims[-1], 2 * latent_channels),
        )
        self.decoder = Chain(
            conv_in=conv3x3(latent_channels, dims[-1]),
            mid_block=MidBlock(dims[-1], groups),
            up_blocks=stages(dims[::-1], layers_per_block + 1, "upsamplers", up),
            conv_norm_out=nn.GroupNorm(groups, dims[0], eps=1e-6),
            act=nn.SiLU(),
            conv_out=conv3x3(dims[0], 3),
        )

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()


# The deep compression autoencoder (DC-AE, arXiv 2410.10733) has residuals everywhere.


def shortcut(x: Tensor, y: Tensor) -> Tensor:
    """Brings x: [B, C, h, w] to the shape of y, half, equal or double in height and width. Each 2 x
    2 pixels become channels, or the reverse. Neighbouring channels are averaged, or repeated."""
    if x.shape == y.shape:
        return x
    dim, grows = y.shape[1], y.shape[2] > x.shape[2]
    if grows:
        dim *= 4
    elif y.shape[2] < x.shape[2]:
        x = F.pixel_unshuffle(x, 2)
    x = x.repeat_interleave(dim // x.shape[1], dim=1) if dim > x.shape[1] else x.unflatten(1, (dim, -1)).mean(2)
    return F.pixel_shuffle(x, 2) if grows else x


class Residual(Chain):
    """Adds the shortcut of x to the chain's output."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + shortcut(x, y)


class ResidualConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + shortcut(x, y)


class PixelRMSNorm(RMSNorm):
    """Applies RMSNorm over the channels of each pixel. [B, C, h, w]"""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class MultiscaleAttention(nn.Module):
    """Computes x + linear attention among pixels. Each kernel adds heads on convolved q, k, v."""

    def __init__(self, dim: int, head_dim: int, kernels: Sequence[int]):
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.to_qkv_multiscale = nn.ModuleList(
            Chain(
                proj_in=nn.Conv2d(3 * dim, 3 * dim, k, padding=k // 2, groups=3 * dim, bias=False),
                proj_out=nn.Conv2d(3 * dim, 3 * dim, 1, groups=3 * dim // head_dim, bias=False),
            )
            for k in kernels
        )
        self.to_out = nn.Linear((1 + len(kernels)) * dim, dim, bias=False)
        self.norm_out = PixelRMSNorm(dim, eps=1e-5, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        qkv = torch.cat([to(x.movedim(1, -1)) for to in (self.to_q, self.to_k, self.to_v)], dim=-1).movedim(-1, 1)
        qkv = torch.cat([qkv] + [scale(qkv) for scale in self.to_qkv_multiscale], dim=1)
        # As in the original, a head reads 3 head_dim consecutive channels. All may come from to_q.
        heads = qkv.unflatten(1, (-1, 3 * self.head_dim)).flatten(3)  # [B, heads, 3 head_dim, h w]
        y = linear_attention(*heads.chunk(3, dim=2)).flatten(1, 2).unflatten(2, x.shape[2:])
        return self.norm_out(self.to_out(y.movedim(1, -1)).movedim(-1, 1)) + x


class AutoencoderDC(nn.Module):
    """Implements SANA's autoencoder, DC-AE f32c32 (1.0 and 1.1). Its posterior has variance 0."""

    FIXED: ClassVar = {
        "in_channels": 3,
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "decoder_conv_act_fn": "relu",
        "encoder_out_shortcut": True,
        "decoder_in_shortcut": True,
    }

    def __init__(
        self,
        latent_channels: int = 32,
        attention_head_dim: int = 32,
        encoder_block_types: Sequence[str] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types: Sequence[str] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_block_out_channels: Sequence[int] = (128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels: Sequence[int] = (128, 256, 512, 512, 1024, 1024),
        encoder_layers_per_block: Sequence[int] = (2, 2, 2, 3, 3, 3),
        decoder_layers_per_block: Sequence[int] = (3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales: Sequence[Sequence[int]] = ((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales: Sequence[Sequence[int]] = ((), (), (), (5,), (5,), (5,)),
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        self.scaling_factor, self.shift_factor = scaling_factor, 0.0
        self.latent_channels, self.downscale = latent_channels, 2 ** (len(encoder_block_out_channels) - 1)

        def block(kind: str, dim: int, kernels: Sequence[int]) -> nn.Module:
            check_choice("block type", kind, ("ResBlock", "EfficientViTBlock"))
            norm = PixelRMSNorm(dim, eps=1e-5, bias=True)
            if kind == "ResBlock":
                return Residual(conv1=conv3x3(dim, dim), act=nn.SiLU(), conv2=conv3x3(dim, dim, bias=False), norm=norm)
            attention = MultiscaleAttention(dim, attention_head_dim, kernels)
            return Chain(attn=attention, conv_out=MixFFN(dim, 4 * dim, norm))

        dims = encoder_block_out_channels
        stages = zip(encoder_block_types, dims, encoder_qkv_multiscales, encoder_layers_per_block)
        down = [[block(*of) for _ in range(layers)] for *of, layers in stages]
        for stage, dim, dim_out in zip(down, dims, dims[1:]):
            stage.append(Residual(conv=conv3x3(dim, dim_out, stride=2)))
        self.encoder = Chain(
            conv_in=conv3x3(3, dims[0]),
            down_blocks=nn.Sequential(*(nn.Sequential(*stage) for stage in down)),
            conv_out=ResidualConv(dims[-1], latent_channels, 3, padding=1),
        )

        dims = decoder_block_out_channels
        stages = zip(decoder_block_types, dims, decoder_qkv_multiscales, decoder_layers_per_block)
        up = [[block(*of) for _ in range(layers)] for *of, layers in stages]
        for stage, dim, dim_out in zip(up, dims[1:], dims):
            stage.insert(0, Residual(up=nn.Upsample(scale_factor=2), conv=conv3x3(dim, dim_out)))
        self.decoder = Chain(  # the checkpoint numbers its blocks from the end
            conv_in=ResidualConv(latent_channels, dims[-1], 3, padding=1),
            up_blocks=Chain(**{str(i): nn.Sequential(*stage) for i, stage in reversed([*enumerate(up)])}),
            norm_out=PixelRMSNorm(dims[0], eps=1e-5, bias=True),
            act=nn.ReLU(),
            conv_out=conv3x3(dims[0], 3),
        )

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(images)
        return z, torch.zeros_like(z)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Files and text: reading and writing safely, prompts to conditions
# ----------------------------------------------------------------------------------------------------------------------
# Files have the layout of a diffusers pipeline: model_index.json names the parts, and each part has
# a folder with its config.json and safetensors. Pickle files are never opened.


class BadInput(ValueError):
    """Signals input that can't be used. The message is one line: what is wrong and what to do."""


@contextlib.contextmanager
def reading(source: object, advice: str = "download it again") -> Iterator[None]:
    """Turns any error while `source` is read into BadInput, with one line that names `source`."""
    try:
        yield
    except (BadInput, torch.OutOfMemoryError):
        raise
    except Exception as error:  # noqa: BLE001
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        found = "is missing" if isinstance(error, FileNotFoundError) else f"can't be read ({reason})"
        raise BadInput(f"{source} {found}: {advice}") from None


def check_finite(x: Tensor, part: object, advice: str = "download it again, or try --dtype fp32", error=BadInput):
    """Returns x, which `part` produced. Raises `error`, which names `part`, if x is not finite."""
    if not x.isfinite().all():
        raise error(f"{part}: not all numbers are finite; {advice}")
    return x


def read_text(file: Path) -> str:
    """Returns a text file's content. Raises BadInput if it can't be read as UTF-8."""
    with reading(file, "a text file in UTF-8 is needed"):
        return Path(file).read_text(encoding="utf-8-sig")  # utf-8-sig accepts a byte order mark


def read_json(path: Path) -> dict:
    """Returns the object in a JSON file. Raises BadInput if the file holds none."""
    with reading(path, "a JSON object is needed: download it again, or give another folder"):
        return {**json.loads(path.read_text(encoding="utf-8-sig"))}


def read_pixels(file: Path, resolution: int | None = None):
    """Reads an image on a white background, as numpy [H, W, 3] of bytes. With a resolution, returns
    its middle square, resized. Raises BadInput if the file can't be read."""
    import numpy as np
    from PIL import Image, ImageOps

    with reading(file, "repair or remove it"), Image.open(file) as image:
        if image.mode.startswith("I"):  # 16-bit grey
            image = image.point(lambda grey: grey / 257).convert("L")
        layer = ImageOps.exif_transpose(image).convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        return np.array(ImageOps.fit(upright, (resolution, resolution), Image.LANCZOS) if resolution else upright)


def write(file: Path, content: Callable[[Path], object]) -> None:
    """Lets `content` write a temporary file, then renames it to `file`. So `file` is always whole:
    the old one or the new one."""
    part = file.with_name(f".{file.name}.part")
    try:
        content(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_json(file: Path, content: dict) -> None:
    """Writes JSON as `write` does. Values without a JSON form (paths) become text."""
    text = json.dumps(content, indent=2, default=str) + "\n"
    write(file, lambda part: part.write_text(text, encoding="utf-8"))


def weight_files(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """Returns the safetensors of a part: one file, or the shards of an index. A variant's files
    (bf16, fp16) are used only if no plain ones exist. Raises BadInput."""
    for variant in ("", ".bf16", ".fp16"):
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.exists():
            names = set(read_json(index).get("weight_map", {}).values())
            if not names:
                raise BadInput(f"{index} names no files: download it again")
            return [folder / name for name in sorted(names)]
        if (folder / f"{stem}{variant}.safetensors").exists():
            return [folder / f"{stem}{variant}.safetensors"]
    raise BadInput(f"{folder} holds no {stem}.safetensors: weights are read from safetensors only")


# The Hub

NAMES = {  # the paper's teachers: their repositories, and the steps of their own samplers
    "sd3-medium": ("stabilityai/stable-diffusion-3-medium-diffusers", 28),
    "sd3.5-medium": ("stabilityai/stable-diffusion-3.5-medium", 40),
    "sd3.5-large": ("stabilityai/stable-diffusion-3.5-large", 28),
    "flux-dev": ("black-forest-labs/FLUX.1-dev", 28),
    "sana-0.6b": ("Efficient-Large-Model/Sana_600M_512px_diffusers", 20),
    "sana-1.6b": ("Efficient-Large-Model/Sana_1600M_512px_diffusers", 20),
    "sana-sprint-0.6b": ("Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers", 20),
    "sana-sprint-1.6b": ("Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers", 20),
}
PARTS = re.compile(r"(transformer|vae|scheduler|(text_encoder|tokenizer)(_\d)?)/[^/]+\.(json|txt|model|safetensors)$")
PIPELINE = re.compile(rf"model_index\.json$|{PARTS.pattern}")
CLIP_MODEL = re.compile(r"(model[^/]*\.safetensors(\.index\.json)?|[a-z_]+\.json|merges\.txt)$")
NETWORK = re.compile(r"(transformer/)?(config|diffusion_pytorch_model[^/]*)\.(json|safetensors)$")  # of a student


def files_to_read(files: Iterable[str], kind: re.Pattern = PIPELINE) -> list[str]:
    """Returns the files of a repository that are read: configurations, vocabularies, each tensor
    once (a variant, .fp16., if nothing plain is there). kind: PIPELINE, NETWORK or CLIP_MODEL."""
    kept = [f for f in files if kind.match(f)]
    is_weight = re.compile(r".*\.safetensors(\.index.*)?$")
    is_variant = re.compile(r".*\.(fp16|bf16)[.-]")
    plain = {f.rpartition("/")[0] for f in kept if is_weight.match(f) and not is_variant.match(f)}
    return [f for f in kept if not (is_variant.match(f) and f.rpartition("/")[0] in plain)]


def resolve(name_or_path: str | Path, kind: re.Pattern = PIPELINE) -> Path:
    """Returns the folder of a teacher's name, a path, or a Hub repository's id. A repository is
    downloaded to huggingface_hub's cache if necessary; HF_HOME, HF_TOKEN and HF_HUB_OFFLINE work as
    there. Raises BadInput."""
    import huggingface_hub as hub
    from huggingface_hub.utils import HfHubHTTPError

    name = os.path.expanduser(name_or_path)
    if Path(name).is_dir():
        return Path(name)
    repository = NAMES[name][0] if name in NAMES else name
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", repository):
        raise BadInput(f"{name} is not a folder, not a repository on the Hub and none of the names {', '.join(NAMES)}")
    errors = (OSError, ValueError, *HfHubHTTPError.__bases__)  # of requests or httpx
    names, reason = None, None
    try:
        names = files_to_read((file.rfilename for file in hub.model_info(repository).siblings), kind)
    except errors as error:  # without a network, use what the cache holds
        reason = error
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=names or [], local_files_only=names is None))
    except errors as error:
        error = reason or error
        reason = [*str(error).splitlines(), type(error).__name__][0]
        advice = "check the name and the network; accept a gated repository's licence on its page and log in (hf auth "
        advice += "login, or HF_TOKEN); HF_HOME chooses another disk"
        raise BadInput(f"{repository} can't be had from the Hub ({reason}): {advice}") from None


# Prompts

GRAMMAR = {  # composes prompts if no file is given: {name} becomes one of that line's choices
    "prompt": "{scene}|{scene}, {style}|{style} of {scene}|{thing} {place}, {light}|{lettering} {place}",
    "scene": "{thing} {place}|{several} {place}|{thing} {relation} {thing}|{thing} and {several} {place}, {light}",
    "thing": "a {quality} {object}|a {colour} {object}|a {colour} {object} made of {material}|a {quality} {colour} {object}",
    "several": "two {colour} {object}s|three {object}s|four {quality} {object}s|a row of {colour} {object}s",
    "lettering": 'a {colour} sign that says "{word} {word}"|a book called "{word}"|a {object} with the word "{word}" on it',
    "relation": "next to|to the left of|on top of|under|behind|in front of",
    "object": "cat|dog|robot|teapot|bicycle|lighthouse|owl|castle|violin|train|flower|astronaut|boat|chair|dragon|cake",
    "quality": "small|huge|shiny|old|broken|cheerful|transparent|fluffy|rusty|elegant",
    "colour": "red|blue|green|yellow|black|white|orange|purple|pink|golden",
    "material": "glass|wood|wool|paper|marble|copper|ice|leaves",
    "place": "in a forest|on a beach|in a busy street|on a kitchen table|under water|on the moon|in a library|in the snow",
    "light": "at sunrise|at night under neon lights|in soft studio light|in heavy fog|by candlelight|at noon",
    "style": "a watercolour|an oil painting|a 35mm photograph|a pencil drawing|a 3D rendering|a woodcut|a pixel-art picture",
    "word": "OPEN|HELLO|NORTH|TEA|FLOW|DREAM|NOISE|TIME",
}


def compose(key: str) -> str:
    """Composes a prompt of objects, attributes, counts, places and styles. The key fixes it."""
    rng, prompt = random.Random(key), "{prompt}"
    while "{" in prompt:
        prompt = re.sub(r"{(\w+)}", lambda match: rng.choice(GRAMMAR[match[1]].split("|")), prompt)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", prompt)


def read_prompts(file: str | Path) -> list[str]:
    """Returns the prompts of a file, one a line. Raises BadInput if there are none."""
    prompts = [line.strip() for line in read_text(Path(file)).split("\n") if line.strip()]
    if not prompts:
        raise BadInput(f"{file} holds no prompt: it needs one a line")
    return prompts


# Text

TEXT_ENCODERS = {  # of each family: text_encoder, text_encoder_2, text_encoder_3
    "sd3": ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"),
    "flux": ("CLIPTextModel", "T5EncoderModel"),
    "sana": ("Gemma2Model",),
}
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
CLIP_LENGTH = 77
TEXT_LENGTH = {"sd3": 256, "flux": 512, "sana": 300}  # the pipelines' numbers of tokens of T5, T5, Gemma


def from_pretrained(kind: str, folder: Path, **options):
    """Calls transformers' from_pretrained without progress bars and advice. Raises BadInput."""
    import transformers

    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    with reading(folder, f"it should hold what transformers calls {kind}; download it again"):
        return getattr(transformers, kind).from_pretrained(folder, **options)


def pretrained_network(kind: str, folder: Path, **options) -> nn.Module:
    """Loads a frozen transformers network from safetensors. Raises BadInput for missing weights."""
    net, report = from_pretrained(kind, folder, use_safetensors=True, output_loading_info=True, **options)
    if report["missing_keys"]:
        first = ", ".join(sorted(report["missing_keys"])[:3])
        raise BadInput(f"{folder}: the weights don't fit its config.json: missing {first}")
    return net.eval().requires_grad_(False)


def check_text(folder: Path, family: str) -> dict[str, tuple[str, str]]:
    """Returns the classes of a pipeline's text encoders and tokenizers, by the end of their names:
    "", "_2", "_3". Raises BadInput for a part that can't be used, before any is read."""
    index, kinds = read_json(folder / "model_index.json"), {}
    for suffix, needed in zip(("", "_2", "_3"), TEXT_ENCODERS[family]):
        encoder, tokenizer = ((index.get(name + suffix) or [None])[-1] for name in ("text_encoder", "tokenizer"))
        if suffix == "_3" and encoder is None:  # SD3 without T5
            continue
        if encoder != needed or tokenizer is None:
            line = (
                f"{folder}: text_encoder{suffix} is {encoder}, and tokenizer{suffix} {tokenizer}, in model_index.json"
            )
            raise BadInput(f"{line}; a {needed} and its tokenizer are needed")
        source = folder / f"tokenizer{suffix}"
        read_json(source / "tokenizer_config.json")
        words = [file for file in VOCABULARIES if (source / file).exists()]
        if not words:
            raise BadInput(f"{source} holds none of {', '.join(VOCABULARIES)}: download it again")
        if words[0] in VOCABULARIES[2:] and not importlib.util.find_spec("sentencepiece"):
            raise BadInput(f"{source}: to read {words[0]}, pip install sentencepiece")
        source = folder / f"text_encoder{suffix}"
        if read_json(source / "config.json").get("quantization_config"):
            raise BadInput(f"{source} has a quantization_config: take the one that is not quantized")
        kinds[suffix] = encoder, tokenizer
    return kinds


class TextEncoders:
    """Holds the tokenizers and text encoders of a pipeline's folder. cond = encoders(prompts)
    encodes as the pipeline does. text has one vector per token, pooled one vector per prompt:

    sd3   text [B, 77 + 256, 4096]: the penultimate states of two CLIPs side by side, padded with
          zeros, then T5's (zeros without T5); pooled [B, 2048]: both CLIPs' projected outputs
    flux  text [B, 512, 4096]: T5's states; pooled [B, 768]: CLIP's output at the end of the text
    sana  text [B, 300, 2304]: Gemma's last states; mask [B, 300]: 1 on tokens, 0 on padding

    CLIP and T5 get no mask: they attend to their padding. `instruction` is put before every SANA
    prompt that is not empty, unchanged. Raises BadInput for a missing or unreadable part."""

    def __init__(self, folder: Path, family: str, device: str = "cpu", dtype=torch.float32, instruction: str = ""):
        self.family, self.device, self.instruction = family, device, instruction
        self.parts: dict[str, tuple] = {}  # tokenizer and encoder, by the end of their names
        self.warned: set[str] = set()
        for suffix, (encoder, tokenizer) in check_text(folder, family).items():
            source = folder / f"text_encoder{suffix}"
            variant = re.search(r"(fp16|bf16)\b", weight_files(source, "model")[0].name)
            net = pretrained_network(encoder, source, variant=variant and variant[0], dtype=dtype).to(device)
            # Gemma's own padding is on the left.
            self.parts[suffix] = from_pretrained(tokenizer, folder / f"tokenizer{suffix}", padding_side="right"), net
        self.width = read_json(folder / "transformer" / "config.json").get("joint_attention_dim", 4096)

    @torch.no_grad()
    def __call__(self, prompts: list[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Returns the prompts' cond. max_length: the number of T5's or Gemma's tokens, by default
        the pipeline's. CLIP reads 77. Longer prompts are cut; each encoder warns once."""
        length = max_length or TEXT_LENGTH[self.family]
        if self.family == "flux":
            pooled = self.encode("", prompts, CLIP_LENGTH)[0].pooler_output
            return {"text": self.encode("_2", prompts, length)[0].last_hidden_state, "pooled": pooled}
        if self.family == "sana":  # keeps the first token and the last length - 1
            texts = [self.instruction + prompt.lower().strip() if prompt.strip() else "" for prompt in prompts]
            added = len(self.parts[""][0](self.instruction, verbose=False).input_ids) - 2 if self.instruction else 0
            output, mask = self.encode("", texts, length + added, masked=True, use_cache=False)
            keep = [0, *range(added + 1, length + added)]
            return {"text": output.last_hidden_state[:, keep], "mask": mask[:, keep]}
        clips = [self.encode(suffix, prompts, CLIP_LENGTH, output_hidden_states=True)[0] for suffix in ("", "_2")]
        text = torch.cat([clip.hidden_states[-2] for clip in clips], -1)
        text = F.pad(text, (0, self.width - text.shape[-1]))
        t5 = text.new_zeros(len(prompts), length, self.width)
        if "_3" in self.parts:
            t5 = self.encode("_3", prompts, length)[0].last_hidden_state
        return {"text": torch.cat([text, t5], 1), "pooled": torch.cat([clip.text_embeds for clip in clips], -1)}

    def encode(self, suffix: str, texts: list[str], length: int, masked: bool = False, **options: bool) -> tuple:
        """Returns the output of the text encoder with this suffix ("", "_2", "_3"), and the mask of
        its tokens, [B, length]. Raises BadInput if the output is not finite."""
        tokenizer, net = self.parts[suffix]
        over = max(map(len, tokenizer(texts, verbose=False).input_ids)) - length
        if over > 0 and suffix not in self.warned:
            warnings.warn(f"prompts are cut: text_encoder{suffix} reads {length} tokens, {over} too many")
            self.warned.add(suffix)
        batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device)
        output = net(ids, attention_mask=mask if masked else None, **options)
        for x in filter(torch.is_tensor, output.values()):
            check_finite(x, f"text_encoder{suffix}")
        return output, mask


# ----------------------------------------------------------------------------------------------------------------------
# 7. Teachers and students
# ----------------------------------------------------------------------------------------------------------------------

FREE = re.compile(  # keys with any value: they are read elsewhere, or shapes show them, or they have no effect
    "_.*|out_channels|caption_projection_dim|cross_attention(_head)?_dim|sample_size|force_upcast|"
    "(up|down)_block_types|(up|down)sample_block_type|(flow_|base_|max_)?shift|(base|max)_image_seq_len|"
    "use_dynamic_shifting|beta_(start|end|schedule)|trained_betas|solver_(order|type)|lower_order_final|euler_at_final|"
    "lambda_min_clipped|dynamic_thresholding_ratio|sample_max_value|variance_type|timestep_spacing|steps_offset"
)
EULER, DPM, SCM = "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "SCMScheduler"
PIPELINES = {  # pipeline class: family, network, autoencoder, schedulers
    "StableDiffusion3Pipeline": ("sd3", MMDiT, AutoencoderKL, (EULER,)),
    "FluxPipeline": ("flux", FLUX, AutoencoderKL, (EULER,)),
    "SanaPipeline": ("sana", SanaDiT, AutoencoderDC, (EULER, DPM)),
    "SanaSprintPipeline": ("sana", SanaDiT, AutoencoderDC, (SCM,)),
}
FLOW = {"num_train_timesteps": 1000, "time_shift_type": "exponential"}
FLOW_DPM = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "algorithm_type": "dpmsolver++"}
FLOW_DPM |= {"final_sigmas_type": "zero", "use_dynamic_shifting": False} | FLOW
TRIG = {"num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5}
SCHEDULERS = {EULER: FLOW, DPM: FLOW_DPM, SCM: TRIG}  # keys with one supported value


def check_config(name: str, config: dict, read: Iterable[str], fixed: dict) -> None:
    """Raises BadInput for a key that would silently change the result. `fixed` holds keys with one
    supported value. Every other key must be in `read`, match FREE, or be null or false."""
    for key, value in config.items():
        free = key in read or FREE.fullmatch(key) or value in (None, False)
        if value != fixed[key] if key in fixed else not free:
            known = fixed.get(key)
            raise BadInput(f"{name} knows {key} = {known!r} only, and the configuration has {value!r}")


def read_scheduler(folder: Path, pipeline: str) -> dict:
    """Returns a pipeline's scheduler_config.json. Raises BadInput for one that is not supported."""
    config, kinds = read_json(folder / "scheduler" / "scheduler_config.json"), PIPELINES[pipeline][3]
    name = config.get("_class_name")
    if name not in kinds:
        raise BadInput(f"{folder / 'scheduler'} is a {name}: with a {pipeline} only {', '.join(kinds)} is understood")
    if name == DPM:  # diffusers' defaults for missing keys
        config = {"use_flow_sigmas": False, "prediction_type": "epsilon"} | config
    check_config(name, config, (), SCHEDULERS[name])
    return {key: value for key, value in config.items() if value is not None}


def build_network(kind: type[nn.Module], config: dict) -> nn.Module:
    """Builds a network from its config.json. Raises BadInput for unsupported settings."""
    accepted = inspect.signature(kind).parameters
    check_config(kind.__name__, config, accepted, kind.FIXED)
    with reading(f"{kind.__name__}'s configuration"):
        net = kind(**{key: config[key] for key in accepted if config.get(key) is not None})
    net.config = config
    return net


def load_network(
    folder: Path, kind: type[nn.Module], device: str = "cpu", dtype=torch.float32, mapped: bool = False, **override
) -> nn.Module:
    """Loads a frozen network of this kind. Names and shapes are compared before weights are read.
    If mapped, the weights stay in their files, in the files' dtype, until to_device copies them.
    override replaces keys of config.json. Raises BadInput."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        net = build_network(kind, read_json(folder / "config.json") | override)
    weights: dict = {}
    for file in weight_files(folder):
        with reading(file):
            weights |= load_file(file)  # mapped: a tensor is read when it is used
    try:
        net.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        differences = textwrap.shorten(str(error).partition("\n")[2], 300, placeholder=" ...")
        raise BadInput(f"{folder}: the weights don't fit its config.json: {differences}") from None
    net.eval().requires_grad_(False)
    return net if mapped else to_device(net, device, dtype)


def to_device(net: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """Copies a network's weights to a device. It always copies: they may be mapped from files."""
    weights = {key: x.to(device, dtype, copy=True) for key, x in net.state_dict().items()}
    net.load_state_dict(weights, assign=True)
    return net


class Teacher:
    """Holds a pretrained flow-matching model: network, autoencoder, text encoders and sampling
    times. load_teacher makes it.

    dit: v = net(x_t, t, cond). Latents are in float32, as the losses see them: (z - shift) * scale,
    [B, C, h, w] (not FLUX's packed tokens). The first prompt loads the text encoders, and
    forget_text() frees them. resolution: pixels a side, or (height, width)."""

    def __init__(self, name: str, folder: Path, family: str, dit: nn.Module, vae: nn.Module, scheduler: dict):
        self.name, self.folder, self.family = name, folder, family
        self.dit, self.vae, self.scheduler = dit, vae, scheduler
        self.device, self.dtype = next(vae.parameters()).device, next(vae.parameters()).dtype
        self.scale, self.shift = vae.scaling_factor, vae.shift_factor
        # The training resolution. FLUX's network config lacks it, but its autoencoder's has it.
        latent_size = dit.config.get("sample_size")
        self.resolution = vae.downscale * latent_size if latent_size else vae.config.get("sample_size", 1024)
        self.sprint = scheduler["_class_name"] == SCM  # a Sprint student in the place of a teacher
        self.steps = NAMES[name][1] if name in NAMES else 2 if self.sprint else {"sana": 20}.get(family, 28)
        self.text = self.tokens = None  # tokens: the number of T5's or Gemma's, if not the pipeline's

    def encode_prompts(self, prompts: list[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Encodes prompts to cond (chapter 6). max_length: the number of T5's or Gemma's tokens."""
        if self.text is None:
            self.text = TextEncoders(self.folder, self.family, self.device, self.dtype, self.instruction)
        return self.text(prompts, max_length or self.tokens)

    @cached_property
    def instruction(self) -> str:
        """Returns the text that SANA was trained with before every prompt, unless another was set.
        It is a default value in diffusers. Raises BadInput if it isn't found there."""
        if self.family != "sana":
            return ""
        advice = "install diffusers, which has it, or give --instruction FILE, or --instruction none"
        with reading("SANA's instruction, which stands before every prompt,", advice):
            from diffusers import SanaPipeline

            return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)

    def forget_text(self) -> None:
        """Frees the text encoders' memory."""
        self.text = None
        gc.collect()
        torch.cuda.empty_cache()

    def times(self, steps: int, resolution: int | tuple[int, int]) -> Tensor:
        """Returns the descending times of the teacher's own pipeline on the Rectified Flow path,
        with the final 0 -> [steps + 1]. With r(t) = shift t / (1 + (shift - 1) t):

        SD3, SANA  r(linspace(1, r(1 / 1000), steps)), also for SANA's DPM-Solver++
        FLUX       r(linspace(1, 1 / steps, steps))
        Sprint     (students) evenly spaced TrigFlow times at equal SNR; of 2, the second is 1.3

        With dynamic shifting, shift = e^mu, where mu is linear in the number of tokens, and SD3's
        linspace ends at 1 / 1000."""
        config = self.scheduler
        if self.sprint:
            u = torch.linspace(1.5708, 0, steps + 1, dtype=torch.float64)
            if steps == 2:
                u[1] = 1.3
            return time_at(u.cos(), u.sin(), "rf").float()

        shift, dynamic = config.get("shift", config.get("flow_shift", 1.0)), config.get("use_dynamic_shifting")
        last = 1 / steps if self.family == "flux" else 1 / 1000 if dynamic else shift / (shift + 999)  # r(1 / 1000)
        if dynamic:
            _, h, w = self.latent_shape(resolution)
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            shift = math.exp(least + (most - least) * (h * w / 4 - low) / (high - low))
        t = torch.linspace(1, last, steps, dtype=torch.float64)
        return F.pad(shift * t / (1 + (shift - 1) * t), (0, 1)).float()

    def sample(
        self,
        z: Tensor,
        cond: Cond,
        uncond: Cond = None,
        steps: int | None = None,
        guidance: float = 1.0,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """Samples with the teacher's own sampler, as its pipeline does. z: [B, C, h, w] -> latents
        of this shape. Raises BadInput if they are not finite."""
        times = self.times(steps or self.steps, tuple(self.vae.downscale * n for n in z.shape[-2:]))
        if self.sprint:  # fresh noise between steps
            with torch.no_grad():
                x = generate(self.dit, z, cond, times=times, rng=rng)
        else:
            x = sample_ode(self.dit, z, cond, uncond, times, guidance)
        return check_finite(x, self.folder / "transformer")

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Maps images in [-1, 1], [B, 3, H, W], to the mean and standard deviation of their
        latents, [B, C, h, w]. Raises BadInput if these are not finite."""
        mean, deviation = map(widen, self.vae.posterior(images.to(self.device, self.dtype)))
        found = (mean - self.shift) * self.scale, deviation * self.scale
        return tuple(check_finite(x, self.folder / "vae") for x in found)

    def encode(self, images: Tensor) -> Tensor:
        """Encodes images in [-1, 1], [B, 3, H, W], to the posterior's mode, [B, C, h, w]."""
        return self.posterior(images)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents [B, C, h, w] to float32 images [B, 3, H, W] in about [-1, 1]. It does so
        one at a time: each takes more than a gigabyte at 1024 x 1024."""
        z = (latents / self.scale + self.shift).to(self.dtype)
        return check_finite(torch.cat([widen(self.vae.decoder(one)) for one in z.split(1)]), self.folder / "vae")

    def latent_shape(self, resolution: int | tuple[int, int]) -> tuple[int, int, int]:
        """Returns (C, h, w). Raises BadInput for a resolution that the networks can't take."""
        size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        unit = self.vae.downscale * self.dit.patch_size
        largest = unit * getattr(self.dit, "max_size", 10**6)
        if any(n < unit or n % unit or n > largest for n in size):
            limit = f" up to {largest}" if hasattr(self.dit, "max_size") else ""
            raise BadInput(f"resolution {size[0]} x {size[1]}: {self.name} takes multiples of {unit}{limit}")
        return self.vae.latent_channels, *(n // self.vae.downscale for n in size)


def load_teacher(
    name_or_path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, mapped: bool = False
) -> Teacher:
    """Loads a teacher by name (a key of NAMES), or from a folder or Hub repository in the diffusers
    layout. If mapped, the network's weights stay in their files until to_device(teacher.dit, ...).

    Raises BadInput, before weights are read, for networks that don't fit their configuration."""
    folder = resolve(name_or_path)
    if not (folder / "model_index.json").exists():
        raise BadInput(f"{folder}: model_index.json is missing, so it is no pipeline; a student goes with --student")
    pipeline = read_json(folder / "model_index.json").get("_class_name", "pipeline without a name")
    if pipeline not in PIPELINES:
        line = f"{folder} is a {pipeline}; the pipelines known here are {', '.join(PIPELINES)}"
        raise BadInput(f"{line}; a student (SiD...Pipeline) goes with --student, beside its teacher")
    family, backbone, autoencoder, _ = PIPELINES[pipeline]
    scheduler = read_scheduler(folder, pipeline)
    check_text(folder, family)
    # Sprint's pipeline feeds t to its network, whatever the configuration says.
    sprint = pipeline == "SanaSprintPipeline" or str(name_or_path).startswith("sana-sprint-")
    override = {"timestep_scale": 0.001} if sprint else {}
    dit = load_network(folder / "transformer", backbone, device, dtype, mapped, **override)
    vae = load_network(folder / "vae", autoencoder, device, dtype)
    return Teacher(str(name_or_path), folder, family, dit, vae, scheduler)


def load_student(folder_or_hub_id: str | Path, teacher: Teacher, mapped: bool = False) -> nn.Module:
    """Loads a student from its folder, from a whole pipeline's folder, or from a Hub repository of
    either, to the teacher's device. mapped: as in load_teacher. Raises BadInput."""
    folder = resolve(folder_or_hub_id, NETWORK)
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config, expected, kind = read_json(folder / "config.json"), teacher.dit.config, type(teacher.dit)
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    free = ("guidance_embeds", "timestep_scale", "sample_size")  # Sprint's students may differ in these
    for key in ("_class_name", *(key for key in defaults if key not in free)):
        own, other = (defaults.get(key) if x.get(key) is None else x[key] for x in (config, expected))
        if key == "_class_name":  # the authors' data-aided students are ...WithEncoder
            own = str(own).removesuffix("WithEncoder")
        if json.dumps(own) != json.dumps(other):
            raise BadInput(f"{folder} is another teacher's student: {key} is {own}, and {teacher.name}'s {other}")
    net = load_network(folder, kind, teacher.device, teacher.dtype, mapped, _class_name=expected["_class_name"])
    net.guidance = net.student_guidance
    return net


# ----------------------------------------------------------------------------------------------------------------------
# 8. Scale: the optimizer, adapters and saved students, many processes, state to resume from, memory
# ----------------------------------------------------------------------------------------------------------------------


def local(x: Tensor) -> Tensor:
    """Returns the part of a tensor that this process holds."""
    return x.to_local() if hasattr(x, "to_local") else x


class Float32Adam(torch.optim.Optimizer):
    """Implements Adam with beta1 = 0, as in the paper, for weights of low precision.

    bf16 rounds away updates of 1e-5 and less. So each bf16 weight has a float32 copy. Adam updates
    the copy, and the weight is the rounded copy. With beta1 = 0 the first moment is the gradient,
    so it is not stored. If accumulate, the gradients of a batch's parts are summed in float32,
    because bf16 sums are wrong by percents (FSDP2 does so by itself). take_step sets found_inf, a
    tensor on the device: if it is 1, the step changes nothing."""

    def __init__(self, weights: Iterable, lr: float, beta2: float = 0.999, eps: float = 1e-8, accumulate: bool = False):
        super().__init__(weights, {"lr": lr, "beta2": beta2, "eps": eps, "fused": True})
        for w in (w for group in self.param_groups for w in group["params"]):
            wide = widen(local(w.detach()))
            self.state[w] |= {"exp_avg_sq": torch.zeros_like(wide), "step": wide.new_zeros(())}
            if w.dtype != wide.dtype:
                self.state[w]["copy"] = wide
                if accumulate and local(w) is w:
                    w.grad_dtype = wide.dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                v, wide, applied = state["exp_avg_sq"], state.get("copy", local(w)), 1 - self.found_inf
                g = torch.where(applied > 0, widen(local(w.grad)), 0)
                state["step"] += applied
                v.lerp_(g * g, (1 - group["beta2"]) * applied.to(v))
                bias = -torch.expm1(state["step"].clamp(min=1) * math.log(group["beta2"]))  # 1 - beta2^step
                wide -= group["lr"] * g / ((v / bias).sqrt() + group["eps"])
                local(w).copy_(wide)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a backbone, which are all that its ModuleLists hold. They are
    recomputed, gathered, compiled and adapted one at a time."""
    return [block for part in net.children() if isinstance(part, nn.ModuleList) for block in part]


class AdaptedLinear(nn.Linear):
    """Computes y = W x + b + B A x: a linear layer with shared, frozen weights and a low-rank
    adapter (arXiv 2106.09685). B starts at zero, so the layer starts as the shared one. Raises
    BadInput for a rank above the layer's width."""

    def __init__(self, shared: nn.Linear, rank: int):
        width = min(shared.in_features, shared.out_features)
        if rank > width:
            raise BadInput(f"--lora {rank}: a layer is {width} wide, and the rank at most that")
        super().__init__(shared.in_features, shared.out_features, device="meta")
        self.weight, self.bias = shared.weight, shared.bias
        options = {"bias": False, "device": shared.weight.device, "dtype": shared.weight.dtype}
        self.lora_A = nn.Linear(shared.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, shared.out_features, **options)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x))


def adapt(net: nn.Module, rank: int) -> nn.Module:
    """Returns a network that shares the weights of `net` and has its own adapter on each linear
    layer of its blocks. So three networks hold one copy of the weights."""
    twin = copy.deepcopy(net, {id(x): x for x in (*net.parameters(), *net.buffers())})
    for parent in [module for block in blocks_of(twin) for module in block.modules()]:
        for name, layer in [*parent.named_children()]:
            if type(layer) is nn.Linear:
                setattr(parent, name, AdaptedLinear(layer, rank))
    return twin


def trainable_weights(net: nn.Module) -> list[nn.Parameter]:
    """Returns the trained weights of a student or fake network: its adapters, if any, else all."""
    adapters = [m for m in net.modules() if isinstance(m, AdaptedLinear)]
    return [w for m in adapters for w in (m.lora_A.weight, m.lora_B.weight)] or [*net.parameters()]


DIVERGED = "training diverged; the last state is whole: try a smaller --lr"


def save_student(net: nn.Module, teacher: Teacher | None, folder: str | Path) -> None:
    """Writes a student in the diffusers layout, each file whole or not at all. Adapters are merged
    (W + B A), and also written in the form that diffusers' load_lora_weights reads. All processes
    that share the network must call it; the first gets all tensors and writes them. The dtype is
    the teacher's (the network's if teacher is None). Raises FloatingPointError, and writes nothing,
    if a weight is not finite."""
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    (rank, world), adapters = rank_and_world(), {}
    weights = get_model_state_dict(net, options=StateDictOptions(full_state_dict=world > 1, cpu_offload=world > 1))
    if rank > 0:
        return
    for name, module in net.named_modules():
        if isinstance(module, AdaptedLinear):
            A, B = (weights.pop(f"{name}.lora_{x}.weight") for x in "AB")
            adapters |= {f"transformer.{name}.lora_A.weight": A, f"transformer.{name}.lora_B.weight": B}
            W = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = (widen(W) + widen(B) @ widen(A)).to("cpu", W.dtype)
    for key, x in (weights | adapters).items():
        check_finite(x, f"the student's {key}", DIVERGED, FloatingPointError)
    folder, dtype = Path(folder), teacher.dtype if teacher else None
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in (("pytorch_lora_weights", adapters), ("diffusion_pytorch_model", weights)):
        file = folder / f"{name}.safetensors"
        tensors = {key: value.to("cpu", dtype).contiguous() for key, value in tensors.items()}
        if tensors:
            write(file, partial(save_file, tensors, metadata={"format": "pt"}))
        else:  # remove the adapters of a former run
            file.unlink(missing_ok=True)
    write_json(folder / "config.json", net.config)


def recompute_blocks(net: nn.Module) -> None:
    """Applies activation checkpointing: a block keeps its input only, and backward reruns it."""
    from torch.utils.checkpoint import checkpoint

    # With cuDNN's attention it makes an illegal memory access (H200, torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)
    for block in blocks_of(net):
        # torch.compile can trace this function. Blocks use no random numbers: no state is kept.
        def forward(*inputs: object, original: Callable = block.forward):
            return checkpoint(original, *inputs, use_reentrant=False, preserve_rng_state=False)

        block.forward = forward


# Many processes: torchrun starts them, and FSDP2 shards the networks among them


def join(device: str) -> None:
    """Joins the processes that torchrun or another launcher started, if any. RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT describe them. On CUDA each process has its own GPU."""
    env = os.environ
    many = {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= env.keys() and int(env.get("WORLD_SIZE") or 1) > 1
    if many and rank_and_world()[1] == 1:
        gpu = int(env.get("LOCAL_RANK") or int(env["RANK"]) % max(1, torch.cuda.device_count()))
        own = torch.device(device, gpu) if device == "cuda" else None
        if own:
            torch.cuda.set_device(own)
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if own else "gloo", device_id=own)


def shard(net: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """Returns a copy of `net` of which each process holds a part. FSDP2 gathers a block when it is
    called, and sums gradients in float32 or wider."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    empty = {id(w): torch.empty_like(w, device="meta", dtype=dtype) for w in (*net.parameters(), *net.buffers())}
    empty |= {id(w): nn.Parameter(empty[id(w)], requires_grad=False) for w in net.parameters()}
    twin, mesh = copy.deepcopy(net, empty), init_device_mesh(device, (rank_and_world()[1],))
    # Inputs keep their dtypes: times and rotations are float32 whatever the weights are.
    mixed = MixedPrecisionPolicy(reduce_dtype=torch.promote_types(dtype, torch.float32), cast_forward_inputs=False)
    for part in (*blocks_of(twin), twin):  # the root, too, frees what it gathered
        fully_shard(part, mesh=mesh, mp_policy=mixed, reshard_after_forward=True)
    twin.to_empty(device=device)
    set_model_state_dict(twin, net.state_dict(), options=StateDictOptions(full_state_dict=True))
    return twin


def three_networks(
    teacher: Teacher, start: nn.Module | None, lora: int | None, recompute: bool = False, compiled: bool = False
) -> tuple[nn.Module, nn.Module]:
    """Returns the student, made from `start` or the teacher, and the fake network, made from the
    teacher: copies, or adapters of rank `lora` on shared weights. They and the teacher's network
    move to its device. With many processes, each holds a part of them. recompute: backward
    recomputes the blocks, on CUDA only."""
    device, many = teacher.device, rank_and_world()[1] > 1
    nets = [start or teacher.dit, teacher.dit]
    for net in set() if many else {*nets}:
        to_device(net, device, teacher.dtype)
    if lora:
        nets = [adapt(net, lora) for net in nets]
    if many:
        teacher.dit, *nets = (shard(net, device.type, teacher.dtype) for net in (teacher.dit, *nets))
    elif not lora:
        nets = [copy.deepcopy(net) if net is teacher.dit else net for net in nets]
    if compiled:  # gradients of inputs and weights, on or off, and two batch sizes: each case recompiles
        torch._dynamo.config.recompile_limit = 64
    for net in (teacher.dit, *nets):
        if recompute and device.type == "cuda":
            recompute_blocks(net)
        for block in blocks_of(net) if compiled else ():  # so that blocks of one shape share kernels
            block.compile()
    student, fake = nets
    student.guidance = student.student_guidance
    return student, fake


# State to resume from: state/ITERATION/ holds a safetensors file for each process and network.
# state.json is written last and names the iteration. Then the old state is deleted.


def fingerprint(net: nn.Module) -> int:
    """Returns the sum of a network's weight bits, read as whole numbers, over all processes."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = sum(local(x).view(kinds[x.itemsize]).sum(dtype=torch.int64) for x in net.state_dict().values())
    if rank_and_world()[1] > 1:
        torch.distributed.all_reduce(total)
    return int(total)


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns this process's trained weights and Float32Adam's state of them, without copying."""
    names, tensors = {w: name for name, w in net.named_parameters()}, {}
    for w in trainable_weights(net):
        entries = {"": w.detach()} | {f":{key}": x for key, x in optimizer.state[w].items()}
        tensors |= {f"{names[w]}{key}": local(x) for key, x in entries.items()}
    return tensors


def save_state(folder: Path, iteration: int, trained: dict, rng: torch.Generator, origin: dict) -> None:
    """Writes a new state beside the old one, which stays valid until the new one is whole. One
    network at a time passes through host memory. All processes must call it. trained: by role, a
    network and its optimizer. origin: what the run stands on, which a resumed run must have too.
    Raises FloatingPointError if a number is not finite."""
    from safetensors.torch import save_file

    rank, world = rank_and_world()
    new = folder / f"{iteration:07d}"
    new.mkdir(parents=True, exist_ok=True)
    for role, of in trained.items():
        tensors = {key: x.cpu().contiguous() for key, x in state_of(*of).items()}
        for key, x in tensors.items():
            check_finite(x, f"the {role}'s {key}", DIVERGED, FloatingPointError)
        write(new / f"{rank}-{role}.safetensors", partial(save_file, tensors | {":random": rng.get_state()}))
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        write_json(folder / "state.json", {"iteration": iteration} | origin)
        for old in folder.iterdir():
            if old.is_dir() and old != new:
                shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path, trained: dict, rng: torch.Generator, origin: dict) -> None:
    """Copies a saved state into the networks, their optimizers and rng. Raises BadInput for a state
    of another origin or other networks, and for one that can't be read."""
    from safetensors.torch import load_file

    notes = read_json(folder / "state.json")
    for what, x in origin.items():
        if notes.get(what) != x:
            raise BadInput(f"--resume: the run had another {what} ({notes.get(what)}, not {x}): restore it")
    for role, of in trained.items():
        file = folder / f"{notes['iteration']:07d}" / f"{rank_and_world()[0]}-{role}.safetensors"
        present = state_of(*of) | {":random": rng.get_state()}
        with reading(file, "give another --out to start again"):
            saved = load_file(file)
        if {key: x.shape for key, x in saved.items()} != {key: x.shape for key, x in present.items()}:
            raise BadInput(f"--resume: {file} is of another network or device")
        for key, x in present.items():
            x.copy_(saved[key])
        rng.set_state(saved[":random"])


def move(nets: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer], where: str | torch.device) -> None:
    """Moves networks, and their optimizers' state, to the CPU or to a device."""
    for net in nets:
        net.to(where)
    for state in (state for optimizer in optimizers for state in optimizer.state.values()):
        state |= {key: x.to(where) for key, x in state.items()}


def training_memory(teacher: Teacher, lora: int | None, accumulate: int = 1, other_start: bool = False) -> dict:
    """Returns the bytes of training on each device by part, without activations. In bf16 a trained
    weight takes 24, with accumulation 26. With LoRA a frozen weight takes 2, an adapter's 22 or 24.
    other_start: the student has its own frozen weights. Raises BadInput for too large a rank."""
    world, low = rank_and_world()[1], teacher.dtype.itemsize
    weights = sum(w.numel() for w in teacher.dit.parameters())
    trained = sum(w.numel() for w in trainable_weights(adapt(teacher.dit, lora) if lora else teacher.dit))
    # In one process, networks with adapters share one copy. Sharded networks don't.
    copies = 1 if not lora else 3 if world > 1 else 1 + other_start
    return {
        "frozen weights": copies * weights * low / world,
        "trained weights and float32 copies": 2 * trained * (low + (4 if low < 4 else 0)) / world,
        "Adam": 2 * trained * max(4, low) / world,
        # of one network at a time; FSDP2 keeps them whole until the last part of a batch
        "gradients": trained * (low / world if accumulate == 1 else 4),
    }


def device_memory(device: str) -> float:
    """Returns the bytes of the GPU's or else the machine's memory; infinity if unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


# ----------------------------------------------------------------------------------------------------------------------
# 9. Evaluation: CLIP score, maximum mean discrepancy, diversity
# ----------------------------------------------------------------------------------------------------------------------
# Scores use CLIP's embeddings, of unit length, of SEEDS pictures per prompt: x is [P, SEEDS, d].
# Prompts are independent, but pictures of one prompt are not. So standard errors count prompts.

SEEDS = 4  # pictures of each prompt
MEASURES = {"clip": "CLIP score", "cmmd": "CMMD to the reference", "diversity": "diversity"}


def to_pixels(images: Tensor):
    """Turns images [B, 3, H, W] in [-1, 1] into numpy [B, H, W, 3] of bytes."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def sample_pixels(teacher: Teacher, sampler: Callable, z: Tensor, cond: dict, seed: int):
    """Returns the pictures of sampler(z, cond, rng) as numpy [B, H, W, 3] of bytes. Raises
    FloatingPointError if the latents are not finite."""
    x = sampler(z, cond, rng=torch.Generator().manual_seed(seed))
    return to_pixels(teacher.decode(check_finite(x, "what the student generates", DIVERGED, FloatingPointError)))


class CLIP:
    """Embeds pictures and prompts with a CLIP model, which transformers reads from a folder or from
    the Hub by its id. Raises BadInput if it can't be loaded."""

    def __init__(self, name_or_folder: str | Path, device: str = "cpu"):
        self.name, folder = name_or_folder, resolve(name_or_folder, CLIP_MODEL)
        self.net = pretrained_network("AutoModel", folder).to(device)
        self.processor = from_pretrained("AutoImageProcessor", folder)
        self.tokenizer = from_pretrained("AutoTokenizer", folder)

    @torch.no_grad()
    def embed(self, pictures: Sequence | None = None, prompts: list[str] | None = None) -> Tensor:
        """Embeds either pictures (numpy [H, W, 3] of bytes) or prompts. -> [B, d], on the CPU"""
        if pictures is not None:
            read, inputs = self.net.get_image_features, self.processor(images=list(pictures), return_tensors="pt")
        else:
            read, options = self.net.get_text_features, {"padding": True, "truncation": True, "max_length": CLIP_LENGTH}
            inputs = self.tokenizer(prompts, return_tensors="pt", **options)
        x = read(**{key: value.to(self.net.device) for key, value in inputs.items()}).pooler_output
        return F.normalize(check_finite(x, self.name), dim=-1).cpu()


def mmd(x: Tensor, y: Tensor, sigma: float = 10.0) -> tuple[float, float]:
    """Returns the squared maximum mean discrepancy E k(x, x') + E k(y, y') - 2 E k(x, y) and its
    standard error, where k(x, y) = exp(-|x - y|^2 / (2 sigma^2)). The estimate is unbiased, so it
    may be negative. The error is the jackknife's, which leaves out each prompt in turn.

    x: [P, S, d] and y: [P, T, d]: x[i] and y[i] share prompt i, of P >= 3 independent ones. A pair
    of samples counts if their prompts differ."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:  # averages over the seeds of both prompts
        b, exact = b.double(), "donot_use_mm_for_euclid_dist"
        rows = (torch.cdist(row.double(), b, compute_mode=exact) for row in a)  # [P, S, T] each
        return torch.stack([(-row.square() / (2 * sigma**2)).exp().mean((1, 2)) for row in rows])

    xy = kernel(x, y)
    k = kernel(x, x) + kernel(y, y) - xy - xy.T
    n, k = len(k), k - k.diag().diag()
    left_out = (k.sum() - 2 * k.sum(1)) / ((n - 1) * (n - 2))
    return (k.sum() / (n * (n - 1))).item(), ((n - 1) * left_out.var(correction=0)).sqrt().item()


def scores(x: Tensor, texts: Tensor, reference: Tensor) -> dict[str, tuple[float, float]]:
    """Returns scores of pictures x: [P, S, d], with errors. texts: [P, d], reference: [P, T, d]

    clip       the cosine between a picture and its prompt
    cmmd       1000 MMD^2 to the reference with sigma = 10 (arXiv 2401.09603, there biased)
    diversity  the distance between two pictures of one prompt"""
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2)) / (x.shape[1] * (x.shape[1] - 1))
    per_prompt = {"clip": (x * texts[:, None]).sum(-1).mean(1), "diversity": apart}
    means = {key: (y.mean().item(), (y.std() / len(y) ** 0.5).item()) for key, y in per_prompt.items()}
    return means | {"cmmd": tuple(1000 * number for number in mmd(x, reference))}


class Evaluation:
    """Measures samplers on fixed prompts. evaluation(sampler, title) returns the scores, a picture
    of each prompt of this process, and seconds a picture. The seed and the prompt's place fix its
    noise, for any number of processes. All processes that share networks must call it.

    prompts: those to choose from, or none, to compose them. pictures: how many, SEEDS of a prompt.
    clip: a CLIP's folder or Hub id. Raises BadInput for fewer than 3 prompts."""

    def __init__(self, teacher: Teacher, clip: str, prompts: list[str], pictures: int, seed: int):
        count = -(-pictures // SEEDS)
        self.prompts = [*dict.fromkeys(prompts)][:count] or [compose(f"evaluation {seed} {i}") for i in range(count)]
        if len(self.prompts) < 3:
            raise BadInput(f"an evaluation needs 3 prompts or more ({3 * SEEDS} pictures), not {len(self.prompts)}")
        self.teacher, self.seed, self.clip = teacher, seed, CLIP(clip, teacher.device)
        self.texts = self.clip.embed(prompts=self.prompts)

    def sample_reference(
        self, cond: dict[str, Tensor], latent_shape: tuple[int, int, int], teacher_sampler: Callable
    ) -> None:
        """Samples the reference from the teacher, with other noise. cond: in host memory"""
        self.cond, self.template = cond, torch.empty(SEEDS, *latent_shape, device=self.teacher.device)
        self.reference, *_ = self.sample(teacher_sampler, self.seed + 1, "reference")

    def sample(self, sampler: Callable, seed: int, title: str) -> tuple[Tensor, list, float]:
        """Samples pictures by sampler(z, cond, rng=rng). Returns their embeddings [P, S, d], a
        picture of each prompt of this process, and seconds a picture (the median over prompts)."""
        (rank, world), count, device = rank_and_world(), len(self.prompts), self.teacher.device
        embedded, shown, seconds = [], [], []
        rounds = -(-count // world)  # the last one repeats prompts, so all processes sample equally often
        with tqdm(total=count * SEEDS, desc=title, unit=" images", leave=False, disable=rank > 0) as bar:
            for i in ((rank + world * j) % count for j in range(rounds)):
                own_seed = random.Random(f"{seed} {i}").getrandbits(62)
                z = noise_like(self.template, torch.Generator().manual_seed(own_seed))
                cond = {key: x[i : i + 1].to(device).expand(SEEDS, *x.shape[1:]) for key, x in self.cond.items()}
                start = time.perf_counter()
                pixels = sample_pixels(self.teacher, sampler, z, cond, own_seed + 1)
                seconds.append((time.perf_counter() - start) / SEEDS)
                shown.append(pixels[0])
                embedded.append(self.clip.embed(pixels))
                bar.update(world * SEEDS)
        x = torch.stack(embedded)
        if world > 1:
            parts = [torch.empty_like(x, device=device) for _ in range(world)]
            torch.distributed.all_gather(parts, x.to(device))
            x = torch.stack(parts, 1).flatten(0, 1)[:count].cpu()
        return x, shown, sorted(seconds)[len(seconds) // 2]

    def __call__(self, sampler: Callable, title: str) -> tuple[dict, list, float]:
        x, shown, seconds = self.sample(sampler, self.seed, title)
        return scores(x, self.texts, self.reference), shown, seconds


# ----------------------------------------------------------------------------------------------------------------------
# 10. Inputs and figures: prompts and pictures, encoded a stretch of a run at a time
# ----------------------------------------------------------------------------------------------------------------------

BATCH = 8  # an encoder takes this many prompts or images at a time
STRETCH = 1024  # a stretch has at least this many prompts of each process, and 8 iterations


def read_captions(folder: str | Path) -> tuple[list[str], list[Path]]:
    """Returns the captions of the images in a folder and its subfolders, of every kind that Pillow
    reads, and the images. Captions are in metadata.jsonl (file_name, text) or else in .txt files of
    the same names. Prints what is left out. Raises BadInput for a wrong index or no captions."""
    from PIL import Image

    kinds = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files, unreadable, hidden, folder = [], [], 0, Path(folder)
    index = folder / "metadata.jsonl"
    for where, folders, names in os.walk(folder, onerror=unreadable.append, followlinks=True):
        hidden += sum(name.startswith(".") for name in folders + names)
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(where, name) for name in names if not name.startswith(".")]
    images = sorted(file for file in files if file.suffix.lower() in kinds)
    others = sum(file.suffix.lower() not in {*kinds, ".txt", ".jsonl"} for file in files)
    if index.exists():
        pairs = []
        for number, line in enumerate(read_text(index).split("\n"), 1):
            try:
                entry = json.loads(line or "null")
                pairs += [(folder / entry["file_name"], entry["text"].strip())] if entry else []
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadInput(f'{index}, line {number}: needs {{"file_name": ..., "text": ...}}') from None
    else:
        texts = ((image, image.with_suffix(".txt")) for image in images)
        pairs = [(image, read_text(text).strip()) for image, text in texts if text.exists()]
    for image in (image for image, _ in pairs if not image.exists()):
        raise BadInput(f"{image}, which {index} names, is missing")
    if not pairs:
        raise BadInput(f"--data {folder} is no folder of images with captions")
    without = len({*images} - {image for image, _ in pairs})
    left_out = {
        "uncaptioned": without,
        "of other kinds": others,
        "hidden": hidden,
        "unreadable folders": len(unreadable),
    }
    left = ", ".join(f"{count:,} {why}" for why, count in left_out.items() if count)
    if left and rank_and_world()[0] == 0:
        print(f"{folder}: {len(pairs):,} images with captions; left out: {left}", file=sys.stderr)
    return [text for _, text in pairs], [image for image, _ in pairs]


@lru_cache(maxsize=4)
def epoch_order(total: int, seed: str, epoch: int) -> list[int]:
    """Returns the order in which an epoch goes through `total` items."""
    return random.Random(f"{seed} {epoch}").sample(range(total), total)


def encode(items: Sequence, encoder: Callable, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Applies `encoder` to BATCH items at a time. Returns one row per item, on `device`."""
    quiet = {"leave": False, "delay": 1, "disable": rank_and_world()[0] > 0}
    starts = tqdm(range(0, len(items), BATCH), "encoding", unit=f" x {BATCH}", **quiet)
    rows = [{key: x.to(device) for key, x in encoder(items[i : i + BATCH]).items()} for i in starts]
    return {key: torch.cat([row[key] for row in rows]) for key in (rows[0] if rows else ())}


def encode_images(teacher: Teacher, files: Sequence[Path]) -> dict[str, Tensor]:
    """Returns the mean and the standard deviation of the latents of images, cropped to squares."""
    pixels = torch.stack([torch.from_numpy(read_pixels(file, teacher.resolution)) for file in files])
    return dict(zip(("mean", "deviation"), teacher.posterior(pixels.permute(0, 3, 1, 2) / 127.5 - 1)))


@dataclass
class Inputs:
    """Makes the batches of a run. Prompts and images are encoded into host memory, for a stretch of
    iterations at a time. Each process encodes the items that it uses. If all items fit into one
    stretch, each process encodes them all, once. Each update takes new prompts, and each update of
    the fake network new images."""

    teacher: Teacher
    prompts: list[str]  # if there are none, the grammar composes one for every sample of the run
    images: list[Path]  # the files that the prompts are captions of, or none
    batch: int
    accumulate: int
    fake_updates: int
    iters: int
    seed: int

    def __post_init__(self):
        self.fake_parts, self.all_parts = self.fake_updates * self.accumulate, (self.fake_updates + 1) * self.accumulate
        self.length = max(8, -(-STRETCH // (self.batch * self.all_parts)))  # of a stretch, in iterations
        self.once = 0 < len(self.prompts) <= self.length * self.batch * self.all_parts

    def parts(self, iteration: int, images: bool = False) -> list[list[int]]:
        """Returns this process's share of an iteration's prompts: the fake network's batches, then
        the generator's. With images=True, returns the images of the fake network's batches. Each
        item comes once an epoch. If prompts are composed, item n is the run's n-th sample."""
        (rank, world), total = rank_and_world(), len(self.prompts)
        count, order = (self.fake_parts, f"{self.seed} images") if images else (self.all_parts, f"{self.seed}")
        starts = ((i * world + rank) * self.batch for i in range(iteration * count, (iteration + 1) * count))
        parts = [[*range(start, start + self.batch)] for start in starts]
        return [[epoch_order(total, order, n // total)[n % total] for n in part] for part in parts] if total else parts

    def prepare(self, iteration: int) -> None:
        """Encodes the stretch that contains `iteration`, and frees the text encoders."""
        self.stretch = iteration // self.length
        stretch = range(self.stretch * self.length, min((self.stretch + 1) * self.length, self.iters))
        texts = [i for n in stretch for part in self.parts(n) for i in part]
        images = [i for n in stretch for part in self.parts(n, images=True) for i in part] if self.images else []
        if self.once:
            texts, images = range(len(self.prompts)), range(len(self.images))
        texts, images = [*dict.fromkeys([*texts, *images])], [*dict.fromkeys(images)]
        self.cond = self.latents = {}
        prompts = [self.prompts[i] if self.prompts else compose(f"{self.seed} {i}") for i in texts]
        cond = encode(prompts, self.teacher.encode_prompts)
        self.teacher.forget_text()
        latents = encode([self.images[i] for i in images], partial(encode_images, self.teacher))
        self.cond = {item: {key: x[row] for key, x in cond.items()} for row, item in enumerate(texts)}
        self.latents = {item: {key: x[row] for key, x in latents.items()} for row, item in enumerate(images)}
        size = sum(x.nbytes for x in (*cond.values(), *latents.values()))
        if size > 1e8 and rank_and_world()[0] == 0:
            print(f"{len(prompts):,} prompts at a time take {size / 1e9:.2g} GB of host memory", file=sys.stderr)

    def pick(self, encoded: dict[int, dict[str, Tensor]], items: list[int]) -> dict[str, Tensor]:
        """Stacks the encoded rows of these items, on the device."""
        device = self.teacher.device
        rows = {key: torch.stack([encoded[item][key] for item in items]) for key in encoded[items[0]]}
        if device.type == "cuda":  # from pinned memory, so that the host need not wait for the copy
            rows = {key: x.pin_memory() for key, x in rows.items()}
        return {key: x.to(device, non_blocking=device.type == "cuda") for key, x in rows.items()}

    def batches(self, start: int, move: Callable) -> Iterator[tuple[dict, tuple | None]]:
        """Yields (cond, real) on the device, from iteration `start` on, which is prepared. With
        images, real is (x_0, its own cond), where x_0 is sampled from the autoencoder's posterior.
        For the generator's batches real is None. move("cpu") makes room for the text encoders."""
        rng = SharedGenerator(self.teacher.device)
        for iteration in itertools.count(start):
            if iteration // self.length != self.stretch and not self.once:
                move("cpu")
                self.prepare(iteration)
                move(self.teacher.device)
            rng.manual_seed(random.Random(f"{self.seed} posterior {iteration}").getrandbits(62))
            pictures = self.parts(iteration, images=True) if self.images else []
            for part, real in itertools.zip_longest(self.parts(iteration), pictures):
                if real is not None:
                    latents = self.pick(self.latents, real)
                    x_0 = latents["mean"] + latents["deviation"] * noise_like(latents["mean"], rng)
                    real = x_0, self.pick(self.cond, real)
                yield self.pick(self.cond, part), real


def pyplot():
    """Returns matplotlib.pyplot without a screen, in the style of this project's figures."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 11, "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.dpi": 130}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    plt.rcParams.update(style)
    return plt


def plot_images(file: Path, rows: dict[str, Sequence], prompts: list[str], title: str = "") -> None:
    """Plots a grid, one row per name, one column per prompt. rows: pixels, numpy [H, W, 3]"""
    plt = pyplot()
    columns, scale = len(prompts), max(1, len(prompts) / 4)  # enlarges the letters of wide grids
    size = (2.6 * columns + 0.4, 2.6 * len(rows) + (0.8 if title else 0.4))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False)
    for (name, images), line in zip(rows.items(), axes):
        for ax, pixels in zip(line, images):
            ax.imshow(pixels, interpolation="nearest" if pixels.shape[0] < 256 else None)
            ax.set(xticks=[], yticks=[], frame_on=False)
            ax.grid(visible=False)
        line[0].set_ylabel(name, fontsize=11 * scale)
    for ax, prompt in zip(axes[0], prompts):
        title_lines = textwrap.fill(textwrap.shorten(prompt, 90, placeholder=" ..."), int(32 / scale))
        ax.set_title(title_lines, fontsize=8 * scale, parse_math=False)  # prompts may hold a $
    figure.suptitle(title, fontsize=9)
    write(file, partial(figure.savefig, format="png"))
    plt.close(figure)


def plot_log(file: Path, log: list[dict]) -> None:
    """Plots the run's measurements and their running means against the images seen."""
    import numpy as np

    plt = pyplot()
    labels = {"fisher": "Fisher estimate", "fake_loss": "fake network's loss", "loss": "loss (about 0 at alpha = 1)"}
    labels |= {"discriminator": "discriminator (log 2: tells nothing)", "adversarial": "adversarial"}
    names, measured = [name for name in labels if name in log[0]], [row for row in log if "scores" in row]
    images, width = np.array([row["images"] for row in log]), max(1, len(log) // 20)
    size = (3.6 * len(names), 6 if measured else 3)
    figure, axes = plt.subplots(2 if measured else 1, len(names), figsize=size, squeeze=False)
    for ax, name in zip(axes[0], names):
        y = np.array([row[name] for row in log], dtype=float)
        ax.plot(images, y, ".", ms=2, alpha=0.3, color="tab:blue")
        ax.plot(images[width - 1 :], np.convolve(y, np.ones(width) / width, "valid"), color="tab:blue")
        ax.set_yscale("log" if name == "fisher" and (y > 0).any() else "linear")
        ax.set_title(labels[name], fontsize=9)
    for ax, (name, label) in zip(axes[-1], MEASURES.items() if measured else ()):
        y, error = np.array([row["scores"][name] for row in measured]).T
        ax.errorbar([row["images"] for row in measured], y, error, marker="o", ms=3, capsize=2, color="tab:orange")
        ax.set_title(f"{label} +- standard error", fontsize=9)
    for ax in axes.flat:
        ax.set(xlabel="images seen", xlim=(0, None), visible=ax.has_data())
    write(file, partial(figure.savefig, format="png"))
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# 11. Command line
# ----------------------------------------------------------------------------------------------------------------------


def fail(message: object, status: int = 2) -> NoReturn:
    """Ends the program with one line on standard error. Exit status 2 is for bad input."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


class Stream:
    """Wraps a standard stream. Once it is closed or its reader is gone, the rest is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        try:
            self.stream.write(text), self.stream.flush()
        except (OSError, AttributeError):
            self.stream = open(os.devnull, "w")  # noqa: SIM115


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends a script with one line on standard error. The exit status is 2 for bad input, 130 for
    Ctrl-C, and 1 for a full disk or device, or a run that diverged (FloatingPointError)."""
    from safetensors import SafetensorError

    with contextlib.redirect_stdout(Stream(sys.stdout)), contextlib.redirect_stderr(Stream(sys.stderr)):
        try:
            yield
        except BadInput as error:
            fail(error)
        except FloatingPointError as error:
            fail(error, status=1)
        except KeyboardInterrupt:
            fail("stopped: what was saved before is whole", status=130)
        except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
            fail(f"{error.filename} can't be written ({error.strerror}): choose another --out")
        except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
            fail(f"{error}; what was saved before is whole", status=1)
        except torch.OutOfMemoryError:
            fail("the GPU's memory is full: try a smaller --batch, --lora 16, or no --keep-activations", status=1)


def check_numbers(args: argparse.Namespace) -> None:
    """Raises BadInput for numbers that are not finite, learning rates that are not above 0, and
    counts below 1 (a seed may be 0)."""
    for name, value in vars(args).items():
        flag, rate, least = "--" + name.replace("_", "-"), name in ("lr", "fake_lr"), 0 if name == "seed" else 1
        for x in value if isinstance(value, list) else [value]:
            if type(x) is float and not (math.isfinite(x) and (x > 0 or not rate)):
                raise BadInput(f"{flag} {x}: needs a finite number{', above 0' * rate}")
        if type(value) is int and not least <= value < 2**63:
            raise BadInput(f"{flag} {value}: needs a whole number, {least} or more")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the arguments. With --resume, missing ones come from the run's args.json."""
    about = "Distills a flow-matching teacher into a generator of a few steps (SiD-DiT), and samples from both."
    parser = argparse.ArgumentParser(description=about, epilog="Names: " + ", ".join(NAMES))
    parser.error = fail
    add = parser.add_argument
    path = partial(add, type=os.path.expanduser)  # expands ~
    path("--teacher", required=True, metavar="NAME", help="a name (below), a pipeline's folder or a Hub id")
    path("--student", metavar="FOLDER", help="a student's folder or Hub id: to sample from, or to start training from")
    add("--steps", type=int, help="K of the student (4); with --sample alone, the teacher's own number")
    add("--resolution", type=int, help="pixels a side (what the teacher was trained at)")
    three = "classifier-free (4.5; FLUX 1: none): one number, or three: in the fake network's training, of the fake "
    three += "network and of the teacher in the generator's loss"
    add("--guidance", type=float, nargs="+", metavar="G", help=three)
    add("--embedded-guidance", type=float, help="FLUX: for teacher and fake network (3.5); its students use 1")
    add("--seed", type=int, default=0, help="fixes prompts, their order and all noise (%(default)s)")
    path("--out", metavar="FOLDER", help="the run's folder (runs/NAME); with --sample, a .png or a folder of them")
    add("--device", choices=("cuda", "mps", "cpu"), help="(the first of these that this machine has)")
    add("--dtype", choices=("bf16", "fp32"), help="dtype of all networks (bf16 on cuda, else fp32)")
    path("--instruction", metavar="FILE", help="SANA: the text before every prompt (diffusers'); none: no text")
    add("--tokens", type=int, help="tokens of T5 or Gemma (the pipeline's; the authors train SD3 with 77)")

    add = parser.add_argument_group("distillation").add_argument
    path = partial(add, type=os.path.expanduser)
    path("--prompts", metavar="FILE", help="one prompt a line (composed from a small grammar)")
    path("--data", metavar="FOLDER", help="images with captions: adds the adversarial term")
    add("--iters", type=int, default=2000, help="(%(default)s)")
    add("--batch", type=int, default=1, help="images of each process at a time (%(default)s)")
    add("--accumulate", type=int, default=4, help="batches of an update (%(default)s; the authors' 256)")
    add("--lora", type=int, metavar="RANK", help="train low-rank adapters on one frozen copy")
    add("--lr", type=float, help="learning rate (1e-6, SANA 5e-6; with --lora ten times that)")
    add("--fake-lr", type=float, help="learning rate of the fake network (--lr)")
    add("--fake-updates", type=int, default=1, metavar="N", help="fake network's updates per iteration (%(default)s)")
    add("--sid-scale", type=float, default=100.0, help="factor of the SiD or DMD loss (%(default)s)")
    add("--discriminator-scale", type=float, default=1.0, help="factor of its loss, with --data (%(default)s)")
    add("--loss", choices=LOSSES, default="sid", help="the generator's loss (%(default)s)")
    add("--alpha", type=float, default=1.0, help="alpha of the SiD loss (%(default)s)")
    add("--weight", choices=WEIGHTS, default="1-t", help="w(t) of the SiD or DMD loss (%(default)s)")
    add("--noise", choices=NOISES, default="fresh", help="noise between the student's steps (%(default)s)")
    add("--save-every", type=int, default=250, metavar="N", help="iterations between saves (%(default)s)")
    add("--keep-activations", action="store_true", help="faster, where the GPU's memory allows it")
    add("--compile", action="store_true", help="torch.compile: minutes at the start, on a GPU faster iterations")
    add("--resume", action="store_true", help="continue the run in --out, with its settings")
    add("--evaluate-every", type=int, metavar="N", help="measure the student every N iterations, keep the best")

    group = parser.add_argument_group("sampling and evaluation")
    only, add = group.add_mutually_exclusive_group().add_argument, group.add_argument
    only("--sample", action="append", metavar="PROMPT", help="repeat for more; @FILE: its lines, into the folder --out")
    only("--evaluate", action="store_true", help="a table: the teacher's own sampler, --student at 1, 2 and 4 steps")
    add("--num", type=int, help=f"pictures, {SEEDS} of a prompt (500; with --evaluate-every 64)")
    path = partial(add, type=os.path.expanduser)
    path("--clip", default="openai/clip-vit-large-patch14", metavar="NAME", help="a folder or Hub id (%(default)s)")

    args = parser.parse_args(argv)
    if not args.out:
        from_file = any(x.startswith("@") for x in args.sample or ())
        kind = "-samples" if from_file else "-evaluation" if args.evaluate else "-data" if args.data else ""
        folder = f"runs/{Path(args.teacher).resolve().name}{kind}"
        args.out = "sample.png" if args.sample and not from_file else folder
    if args.resume and (Path(args.out) / "args.json").is_file():
        former = read_json(Path(args.out) / "args.json") | {"out": args.out}
        args = parser.parse_args(argv, argparse.Namespace(**former))
    return args


def settle(args: argparse.Namespace) -> tuple[argparse.Namespace, Teacher, nn.Module | None]:
    """Fills in the defaults that depend on the device and the networks. Returns the settings, the
    teacher, and the student if one is given. The networks' weights are still in their files. Raises
    BadInput for settings that can't work."""
    check_numbers(args)
    if args.evaluate and not args.student:
        raise BadInput("--evaluate measures a student: give --student FOLDER")
    with reading("--sample", "write it in UTF-8"):
        "".join(args.sample or ()).encode()
    if args.data and args.prompts:
        raise BadInput("--prompts and --data together: with --data the prompts are its captions")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = args.device or next(name for name, is_there in present.items() if is_there)
    if not present[device]:
        raise BadInput(f"--device {device}: this machine has none; give --device cpu, or leave it out")
    join(device)
    dtype = args.dtype or ("bf16" if device == "cuda" else "fp32")
    teacher = load_teacher(args.teacher, device, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], mapped=True)
    text = args.instruction  # look for SANA's text now, before a run begins
    text = teacher.instruction if not text else "" if text == "none" else read_text(Path(text)).removesuffix("\n")
    teacher.instruction = text
    teacher.tokens, embeds = args.tokens, teacher.dit.config.get("guidance_embeds")
    if args.embedded_guidance is not None:
        if not embeds:
            raise BadInput(f"--embedded-guidance: {teacher.name} has no guidance embedding: give --guidance")
        teacher.dit.guidance = args.embedded_guidance
    student = load_student(args.student, teacher, mapped=True) if args.student else None
    guidance = args.guidance or [1.0 if embeds or teacher.family == "flux" else 4.5]
    if len(guidance) not in (1, 3):
        raise BadInput("--guidance: one number, or three")
    size = (student or teacher.dit).config.get("sample_size")
    images = args.iters * args.batch * args.accumulate * rank_and_world()[1]
    decided = {
        "device": device,
        "dtype": dtype,
        "steps": args.steps or (4 if args.student or not args.sample else teacher.steps),
        "resolution": args.resolution or (teacher.vae.downscale * size if size else teacher.resolution),
        "guidance": guidance if len(guidance) == 3 else guidance * 3,
        "lr": (5e-6 if teacher.family == "sana" else 1e-6) * (10 if args.lora else 1) if args.lr is None else args.lr,
        "num": args.num or (500 if args.evaluate else 64),
        # the authors' waiting times or, for shorter runs, a tenth and a fifth of all images
        "warmup": getattr(args, "warmup", (min(20_000, images // 10), min(40_000, images // 5))),
    }
    teacher.resolution = decided["resolution"]
    teacher.latent_shape(teacher.resolution)
    return argparse.Namespace(**(vars(args) | decided)), teacher, student


def check_memory(teacher: Teacher, parts: dict[str, float]) -> None:
    """Prints the memory that a run takes, by part. Raises BadInput if the device has less."""
    needed, have = sum(parts.values()), device_memory(teacher.device.type)
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    line = f"{teacher.name} takes {needed / 1e9:.1f} GB of memory ({listed}), besides activations, text encoders and "
    line += f"autoencoder; {teacher.device.type} has {have / 1e9:.1f} GB"
    if needed > 0.95 * have:  # CUDA itself needs some
        advice = "--dtype bf16, in training --lora 16 or more processes with --accumulate 1, or a smaller teacher"
        raise BadInput(f"{line}: try {advice}")
    if needed > 2e9 and rank_and_world()[0] == 0:
        print(line, file=sys.stderr)


def sample(args: argparse.Namespace, teacher: Teacher, student: nn.Module | None) -> None:
    """Runs --sample: pictures of prompts, by the teacher's own sampler or by a student. If --out is
    a .png, there is one for each prompt, and a grid of the first eight. Else it is a folder of
    numbered pictures. Prompts are encoded a stretch at a time."""
    from PIL import Image

    if rank_and_world()[0] > 0:  # only the first process samples
        return
    device, out = teacher.device, Path(args.out)
    lines = [read_prompts(os.path.expanduser(x[1:])) if x.startswith("@") else [x] for x in args.sample]
    prompts, in_folder = [*itertools.chain(*lines)], out.suffix.lower() != ".png"
    if out.suffix.lower() in Image.registered_extensions() and (in_folder or out.is_dir()):
        raise BadInput(f"--out {out}: give the name of a .png, or of a folder")
    (out if in_folder else out.parent).mkdir(parents=True, exist_ok=True)
    net = student or teacher.dit
    check_memory(teacher, {"weights": sum(w.numel() for w in net.parameters()) * teacher.dtype.itemsize})
    sampler = partial(generate, net, steps=args.steps, noise=args.noise)
    if not student:
        if teacher.scheduler["_class_name"] == DPM:
            print(f"{teacher.name}'s DPM-Solver++ is taken as Euler's method on shifted times", file=sys.stderr)
        uncond = encode([""], teacher.encode_prompts, device)
        sampler = partial(teacher.sample, uncond=uncond, steps=args.steps, guidance=args.guidance[-1])
    elif teacher.family == "sana":
        how = "after" if teacher.instruction else "without"
        print(f"prompts go in {how} the instruction; the authors' students' own pipeline has none", file=sys.stderr)
    rng, pictures = torch.Generator().manual_seed(args.seed), []
    template = torch.empty(1, *teacher.latent_shape(args.resolution), device=device)
    with tqdm(total=len(prompts) * args.steps, desc="sampling", unit="step", delay=2, leave=False) as bar:
        net.register_forward_hook(lambda *_: bar.update() and None)  # a hook must return None
        for i in range(len(prompts)):
            if i % STRETCH == 0:
                if i:  # make room for the text encoders
                    net.to("cpu")
                cond = encode(prompts[i : i + STRETCH], teacher.encode_prompts)
                teacher.forget_text()
                to_device(net, device, teacher.dtype)
            one = {key: x[[i % STRETCH]].to(device) for key, x in cond.items()}
            pixels = sample_pixels(teacher, sampler, noise_like(template, rng), one, args.seed + 1)[0]
            names = out / f"{i + 1:05d}.png", out.parent / f"{out.stem}-{i + 1}.png"
            file = names[0] if in_folder else names[1] if len(prompts) > 1 else out
            write(file, partial(Image.fromarray(pixels).save, format="PNG"))
            print(file)
            pictures += [pixels] if len(pictures) < 8 else []
    if len(pictures) > 1 and not in_folder:
        plot_images(out, {f"{'student' if args.student else 'teacher'}, {args.steps} steps": pictures}, prompts[:8])
        print(out)


def evaluate(args: argparse.Namespace, teacher: Teacher, student: nn.Module) -> None:
    """Runs --evaluate: measures the teacher's own sampler, and a student at 1, 2 and 4 steps."""
    given = read_prompts(args.prompts) if args.prompts else read_captions(args.data)[0] if args.data else []
    out, evaluation = Path(args.out), Evaluation(teacher, args.clip, given, args.num, args.seed)
    prompts = evaluation.prompts
    check_memory(teacher, {"weights": 2 * sum(w.numel() for w in student.parameters()) * teacher.dtype.itemsize})
    out.mkdir(parents=True, exist_ok=True)
    uncond, cond = encode([""], teacher.encode_prompts, teacher.device), encode(prompts, teacher.encode_prompts)
    teacher.forget_text()
    for net in (teacher.dit, student):
        to_device(net, teacher.device, teacher.dtype)
    teacher_sampler = partial(teacher.sample, uncond=uncond, guidance=args.guidance[-1])
    evaluation.sample_reference(cond, teacher.latent_shape(args.resolution), teacher_sampler)
    samplers = {("teacher", teacher.steps): teacher_sampler}
    for n in sorted({1, 2, 4, args.steps}):
        samplers["student", n] = partial(generate, student, steps=n, noise=args.noise)
    rows, pictures, (rank, world) = [], {}, rank_and_world()
    for (name, n), sampler in samplers.items():
        title = f"{name}, {n} step{'s' * (n > 1)}"
        measured, shown, seconds = evaluation(sampler, title)
        rows.append({"model": name, "steps": n, **measured, "seconds": seconds})
        pictures[title] = shown[:4]
    if rank > 0:
        return
    print(f"{SEEDS * len(prompts)} pictures a row, {SEEDS} of a prompt; CMMD: to the teacher's; +-: standard errors")
    print(f"{'':8}  steps {'CLIP score':>17} {'CMMD':>17} {'diversity':>17}  s / picture")
    for row in rows:
        line = "".join(f" {row[key][0]:>8.4f} +-{row[key][1]:6.4f}" for key in MEASURES)
        print(f"{row['model']:8} {row['steps']:6} {line} {row['seconds']:12.3f}")
    notes = {"args": vars(args), "prompts": len(prompts), "rows": rows, "seeds": SEEDS, "torch": torch.__version__}
    write_json(out / "metrics.json", notes)
    title = f"{Path(args.teacher).name}: the same prompts and noise"
    plot_images(out / "samples.png", pictures, prompts[::world][:4], title)
    print(f"{out}: metrics.json, samples.png")


class Log:
    """Keeps a run's measurements: `rows` of numbers, and one line per iteration in log.jsonl. A
    resumed run keeps the first `iterations` lines. New measurements stay on the device for a while,
    because reading them makes the host wait."""

    def __init__(self, file: Path, iterations: int):
        lines = file.read_text(encoding="utf-8").splitlines()[:iterations] if iterations else []
        self.file, self.rows, self.waiting = file, [json.loads(line) for line in lines], []
        if rank_and_world()[0] == 0:
            write(file, lambda part: part.write_text("".join(line + "\n" for line in lines), encoding="utf-8"))

    def add(self, measured: dict, read: bool) -> str:
        """Adds an iteration. If `read`, or after ten of them, reads the waiting ones, as means over
        the processes, and returns a summary for the progress bar. NaN and infinity become None."""
        self.waiting.append(measured)
        if not read and len(self.waiting) < 10:
            return ""
        names, (rank, world) = [name for name, x in measured.items() if isinstance(x, Tensor)], rank_and_world()
        values = torch.stack([torch.stack([row[name].float() for name in names]) for row in self.waiting])
        if world > 1:
            torch.distributed.all_reduce(values)
        for row, line in zip(self.waiting, (values / world).tolist()):
            self.rows.append(row | {name: x if math.isfinite(x) else None for name, x in zip(names, line)})
        if rank == 0:
            with open(self.file, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows[-len(self.waiting) :])
        self.waiting = []
        recent = [row["fisher"] for row in self.rows[-10:] if row["fisher"] is not None]
        skipped = sum(bool(row["skipped"]) for row in self.rows)
        number = f"{sum(recent) / len(recent):.3g}" if recent else "not finite"
        return f"Fisher estimate {number}" + (f", {skipped} skipped" if skipped else "")


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Appends Ctrl-C, SIGTERM or SIGHUP to a list, which is checked after each iteration. Ignored
    signals stay ignored (SIGHUP under nohup). A second signal ends the process, but not under
    torchrun, which sends each signal twice."""
    caught: list[int] = []
    with contextlib.ExitStack() as former:

        def catch(number: int, frame: object) -> None:
            caught.append(number)
            if rank_and_world()[1] == 1:
                former.close()

        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
            if signal.getsignal(number) != signal.SIG_IGN:
                former.callback(signal.signal, number, signal.signal(number, catch))
        yield caught


def max_over_processes(number: int) -> int:
    """Returns the largest number of all processes. Only CPUs take part: no device is waited for."""
    x = torch.tensor(number)
    if rank_and_world()[1] > 1:
        torch.distributed.all_reduce(x, torch.distributed.ReduceOp.MAX)
    return int(x)


def begin_run(out: Path, args: argparse.Namespace) -> int:
    """Writes args.json, which marks a folder as a run's, and returns the iteration of its state, or
    0 if it has none. Raises BadInput if the folder holds a run and --resume is not given."""
    out.mkdir(parents=True, exist_ok=True)
    state = out / "state" / "state.json"
    with reading(state, "it is no state of a run: give another --out to start again"):
        first = int(read_json(state)["iteration"]) if args.resume and state.is_file() else 0
    if first > args.iters:
        raise BadInput(f"--iters {args.iters}: the run in {out} has had {first} iterations")
    if rank_and_world()[0] == 0:
        try:
            (out / "args.json").touch(exist_ok=args.resume)
        except FileExistsError:
            raise BadInput(f"{out} holds a run: --resume goes on with it, another --out starts another") from None
        if not first:
            write_json(out / "args.json", vars(args))
    return first


SETTINGS = ("steps", "loss", "alpha", "weight", "noise", "guidance", "sid_scale", "discriminator_scale", "warmup")
SETTINGS += ("iters", "accumulate", "fake_updates")  # arguments of distill


def train(args: argparse.Namespace, teacher: Teacher, start: nn.Module | None) -> None:
    """Distills the teacher into a student, and saves student, state, measurements and pictures."""
    out, (rank, world), device = Path(args.out), rank_and_world(), teacher.device
    prompts, files = read_captions(args.data) if args.data else (read_prompts(args.prompts) if args.prompts else [], [])
    evaluation = Evaluation(teacher, args.clip, prompts, args.num, args.seed) if args.evaluate_every else None
    check_memory(teacher, training_memory(teacher, args.lora, args.accumulate, bool(start)))
    first = begin_run(out, args)

    # Encode prompts, and free the text encoders, before the networks move to the device.
    shown = prompts[:4] or [compose(f"shown {args.seed} {i}") for i in range(4)]
    uncond, cond = (encode(some, teacher.encode_prompts, device) for some in ([""], shown))
    eval_cond = encode(evaluation.prompts, teacher.encode_prompts) if evaluation else {}
    inputs = Inputs(teacher, prompts, files, args.batch, args.accumulate, args.fake_updates, args.iters, args.seed)
    inputs.prepare(first)

    # The state of the run is three networks, two optimizers and a random generator.
    torch.manual_seed(args.seed)  # fixes the adapters' first weights
    student, fake = three_networks(teacher, start, args.lora, not args.keep_activations, args.compile)
    origin = {"number of processes": world} | {f"--{name}": getattr(args, name) for name in ("lora", "dtype", "device")}
    origin |= {"teacher": fingerprint(teacher.dit), "first student": fingerprint(student)}
    adam = partial(Float32Adam, accumulate=args.accumulate > 1)
    trained = {"student": (student, adam(trainable_weights(student), lr=args.lr))}
    trained["fake"] = fake, adam(trainable_weights(fake), lr=args.fake_lr or args.lr)
    optimizers = [optimizer for _, optimizer in trained.values()]
    rng = SharedGenerator(device).manual_seed(args.seed)
    if first:
        load_state(out / "state", trained, rng, origin)
    if rank == 0:
        write_json(out / "args.json", vars(args))

    latents, per_iteration = teacher.latent_shape(args.resolution), world * args.accumulate * args.batch
    teacher_sampler = partial(teacher.sample, uncond=uncond, guidance=args.guidance[-1])
    student_sampler = partial(generate, student, steps=args.steps, noise=args.noise)
    z = noise_like(torch.empty(len(shown), *latents, device=device), torch.Generator().manual_seed(args.seed))
    preview = partial(sample_pixels, teacher, z=z, cond=cond, seed=args.seed + 1)
    pictures = {f"teacher, {teacher.steps} steps": preview(sampler=teacher_sampler)}
    log = Log(out / "log.jsonl", first)
    if evaluation:
        evaluation.sample_reference(eval_cond, latents, teacher_sampler)

    def save(done: int) -> None:
        pictures[f"student, {args.steps} steps"] = preview(sampler=student_sampler)
        save_student(student, teacher, out / "student")
        save_state(out / "state", done, trained, rng, origin)
        if rank == 0:
            title = f"{Path(args.teacher).name}, the student after {done * per_iteration:,} images"
            plot_images(out / f"samples-{done:06d}.png", pictures, shown, title)
            plot_log(out / "loss.png", log.rows)

    batches = inputs.batches(first, partial(move, (teacher.dit, student, fake), optimizers))
    options = {key: getattr(args, key) for key in SETTINGS} | {"start": first, "rng": rng, "uncond": uncond}
    loop = distill(teacher.dit, student, fake, optimizers, batches, (args.batch, *latents), **options)
    units = {"unit": " images", "unit_scale": True, "disable": rank > 0}
    bar = tqdm(total=args.iters * per_iteration, initial=first * per_iteration, **units)
    with signals() as caught, bar:
        for measured in loop:
            done = measured["iteration"] + 1
            last, halt = done == args.iters, max_over_processes(caught[0] if caught else 0)
            saves = last or done % args.save_every == 0
            if evaluation and (last or done % args.evaluate_every == 0):
                measured["scores"], *_ = evaluation(student_sampler, "evaluation")
                former = (row["scores"]["cmmd"][0] for row in log.rows if "scores" in row)
                if max_over_processes(rank == 0 and measured["scores"]["cmmd"][0] < min(former, default=math.inf)):
                    save_student(student, teacher, out / "student-best")
            bar.update(per_iteration)
            if summary := log.add(measured, read="scores" in measured or saves or halt):
                bar.set_postfix_str(summary, refresh=False)
            if saves:
                save(done)
            elif halt:
                save_state(out / "state", done, trained, rng, origin)
            if halt and not last:
                bar.close()
                again = f"--teacher {args.teacher} --resume --out {out} goes on"
                fail(f"stopped after iteration {done}, which is saved: {again}", 128 + halt)
    if rank == 0:
        names = ("teacher", "steps", "resolution", "device", "dtype", "tokens", "noise", "instruction")
        options = [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name) is not None]
        command = shlex.join(["python", "sid_fm.py", *options, f"--student={out}/student", "--sample", shown[0]])
        print(f"{out}: samples-*.png, loss.png and the student. To sample from it:\n{command}")


def main(argv: list[str] | None = None) -> None:
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    with one_line_errors():
        args, *networks = settle(parse(argv))
        (sample if args.sample else evaluate if args.evaluate else train)(args, *networks)
        if rank_and_world()[1] > 1:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
