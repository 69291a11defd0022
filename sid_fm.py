"""Score distillation of flow-matching models (SiD-DiT, arXiv 2509.25127), in one file to read beside the paper.

    1. Paths     one view of diffusion and flow matching: Bayes' rule and conditional expectations  (paper, section 2)
    2. Losses    the fake network's regression, the SiD loss, DMD for comparison, the adversarial pair  (section 3)
    3. Loop      few-step generation, and the one training loop that every script of this project runs

The paper ends here. What follows is what it takes to run it on the teachers of its experiments:

    4. Backbones       MMDiT (SD3, SD3.5), FLUX, SANA's linear DiT, in plain PyTorch
    5. Autoencoders    KL (SD3, FLUX) and DC-AE (SANA)
    6. Text            prompts to conditions, on transformers' CLIP, T5 and Gemma-2
    7. Teachers        their names, loading them and their students
    8. Scale           low-rank adapters, saving students, memory, many processes, state to resume from
    9. Evaluation      CLIP score, maximum mean discrepancy, diversity
   10. Command line    python sid_fm.py --teacher sd3-medium

Notation, as in the paper: x_0 is clean data, e ~ N(0, I) noise, x_t = a(t) x_0 + s(t) e the noisy sample.
D(x_t, t) = E[x_0 | x_t] is the posterior mean; f_phi is the teacher's D, f_psi the fake network's, x_g = G_theta(z)
the generator's output. lambda = log(a^2 / s^2) is the log-SNR.

Every network has one face: v = net(x_t, t, cond), the velocity out, t in [0, 1] on the Rectified Flow path, cond a dict
of tensors (batch first) or None. Tensors are [B, ...] and times [B].
"""

import argparse
import contextlib
import copy
import errno
import gc
import hashlib
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
import tempfile
import textwrap
import time
import warnings
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# 1. Paths: Gaussian diffusion and flow matching are one model (paper, section 2)
# ----------------------------------------------------------------------------------------------------------------------
# Two facts are used: x_t is Gaussian given x_0, and a squared error is minimised by a conditional expectation. No ODE or
# SDE is needed. It follows that every quantity a network may predict is a linear function of x_t and of D(x_t, t).

T_END = {"rf": 1.0, "trig": math.pi / 2, "vp": 1.0, "ve": 80.0}  # vp and ve end before pure noise, a > 0
VP_BETA_MIN, VP_BETA_SLOPE = 0.1, 19.9  # the score SDE's beta(t), from 0.1 to 20


def check_choice(what: str, name: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless `name` is one of `choices`."""
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(choices)}")


def match_dims(t: Tensor, x: Tensor) -> Tensor:
    """Gives t: [B] the shape [B, 1, ...], so that it broadcasts over x: [B, ...]."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def path_terms(t: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a(t), s(t) of x_t = a x_0 + s e, and their time derivatives a', s'. Raises ValueError for an unknown path."""
    check_choice("path", path, T_END)
    if path == "rf":  # Rectified Flow
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path == "trig":  # TrigFlow
        return t.cos(), t.sin(), -t.sin(), t.cos()
    if path == "vp":  # variance preserving: a = exp(-B / 2), s^2 = 1 - a^2, and B' = beta
        beta, B = VP_BETA_MIN + VP_BETA_SLOPE * t, VP_BETA_MIN * t + VP_BETA_SLOPE * t**2 / 2
        a, s = (-B / 2).exp(), (-torch.expm1(-B)).sqrt()
        return a, s, -beta * a / 2, beta * a**2 / (2 * s)
    # "ve", variance exploding, as EDM has it: t is the noise level sigma
    return torch.ones_like(t), t, torch.zeros_like(t), torch.ones_like(t)


def time_at(a: Tensor, s: Tensor, path: str) -> Tensor:
    """The time on `path` at which a(t) / s(t) = a / s. On vp and ve, times beyond the path's end are clamped."""
    check_choice("path", path, T_END)
    if path == "rf":
        return s / (a + s)
    if path == "trig":
        return torch.atan2(s, a)
    if path == "vp":  # invert B(t), a quadratic
        B = torch.log1p((s / a) ** 2).clamp(max=VP_BETA_MIN + VP_BETA_SLOPE / 2)
        return 2 * B / (VP_BETA_MIN + (VP_BETA_MIN**2 + 2 * VP_BETA_SLOPE * B).sqrt())
    return (s / a).clamp(max=T_END["ve"])


def add_noise(x_0: Tensor, e: Tensor, t: Tensor, path: str = "rf") -> Tensor:
    """x_t = a(t) x_0 + s(t) e.  x_0, e: [B, ...], t: [B]."""
    a, s, _, _ = path_terms(match_dims(t, x_0), path)
    return a * x_0 + s * e


def prediction_row(kind: str, a: Tensor, s: Tensor, da: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
    """A network of this kind predicts E[p x_0 + q e | x_t]. Returns p and q.

    x0: (1, 0).  eps: (0, 1).  v = E[dx_t/dt | x_t]: (a', s').  score = grad log p_t = -E[e | x_t] / s (Tweedie).
    """
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    rows = {"x0": (one, zero), "eps": (zero, one), "v": (da, ds), "score": (zero, -1 / s)}
    check_choice("prediction", kind, rows)
    return rows[kind]


def convert(pred: Tensor, x_t: Tensor, t: Tensor, path: str, src: str, dst: str) -> Tensor:
    """Turns one prediction into another at the same x_t: src, dst in "x0", "eps", "v", "score" (paper, section 2).

    pred = p x_0 + q e and x_t = a x_0 + s e are a 2 x 2 linear system for (x_0, e), in conditional expectation. Its
    solution, put into the row of dst, is Cramer's rule:
        dst = [(p_dst q - q_dst p) x_t + (a q_dst - s p_dst) pred] / (a q - s p)
    On Rectified Flow, for example: D = x_t - t v, E[e | x_t] = x_t + (1 - t) v, score = -E[e | x_t] / t.

    pred, x_t: [B, ...], t: [B]. At pure noise (a = 0) eps and the score do not determine the other predictions: the result
    is infinite or magnified rounding there. So is any score at t = 0. Raises ValueError for an unknown path or prediction.
    """
    a, s, da, ds = path_terms(match_dims(t, x_t), path)
    p, q = prediction_row(src, a, s, da, ds)
    p_dst, q_dst = prediction_row(dst, a, s, da, ds)
    if src == dst:
        return pred
    determinant = a * q - s * p
    return (p_dst * q - q_dst * p) / determinant * x_t + (a * q_dst - s * p_dst) / determinant * pred


# Moving between paths: at equal signal-to-noise ratio the variables of two paths differ by a scale, and D is the same.


def equal_snr(x_t: Tensor, t: Tensor, src: str, dst: str) -> tuple[Tensor, Tensor]:
    """Maps (x_t, t) on path src to (X_u, u) on path dst, with a(t)/s(t) = A(u)/S(u) and X_u = (S/s) x_t. Needs t > 0.

    The scale is computed as S/s, because A/a is 0/0 at pure noise, where generation starts. The paths vp and ve end before
    pure noise, at Rectified Flow t = 0.99347 and 0.98765: later times are clamped to their end.
    """
    a, s, _, _ = path_terms(t, src)
    u = time_at(a, s, dst)
    _, S, _, _ = path_terms(u, dst)
    return match_dims(S / s, x_t) * x_t, u


class RectifiedFlowView(nn.Module):
    """A network trained to predict `predicts` on `path`, seen as v = net(x_t, t, cond) on the Rectified Flow path."""

    def __init__(self, net: nn.Module, path: str, predicts: str):
        super().__init__()
        self.net, self.path, self.predicts = net, path, predicts

    def forward(self, x_t: Tensor, t: Tensor, cond: dict | None = None, features: bool = False):
        x_u, u = equal_snr(x_t, t, "rf", self.path)
        pred, hidden = self.net(x_u, u, cond, features=True) if features else (self.net(x_u, u, cond), None)
        x_0 = convert(pred, x_u, u, self.path, self.predicts, "x0")
        v = convert(x_0, x_t, t, "rf", "x0", "v")
        return (v, hidden) if features else v


def as_rectified_flow(net: nn.Module, path: str, predicts: str = "v") -> nn.Module:
    """A network trained on any path, seen through the equal-SNR map. It shares the parameters of `net`.

    No teacher of the paper needs it. SANA-Sprint's too is a Rectified Flow network: TrigFlow is how its pipeline calls it.
    """
    return net if (path, predicts) == ("rf", "v") else RectifiedFlowView(net, path, predicts)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Losses: score identity distillation (paper, section 3)
# ----------------------------------------------------------------------------------------------------------------------


def guided(
    net: Callable,
    x_t: Tensor,
    t: Tensor,
    cond: dict | None = None,
    uncond: dict | None = None,
    guidance: float = 1.0,
    features: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Classifier-free guidance, v = v_uncond + guidance (v_cond - v_uncond), in one batched call.

    Returns v and, with features=True, the pooled hidden states [B, channels] of the conditional half (else None): the
    adversarial pair judges that half alone. One unconditional row in uncond serves the whole batch. An entry that uncond
    lacks (the scale of a guidance embedding) is cond's. Raises ValueError for a guidance other than 1 without both.
    """
    plain = guidance == 1
    if not plain:
        if cond is None or uncond is None:
            raise ValueError(f"guidance {guidance} needs cond and uncond")
        x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
        cond = {key: torch.cat([x, uncond.get(key, x).expand_as(x)]) for key, x in cond.items()}
    v, hidden = net(x_t, t, cond, features=True) if features else (net(x_t, t, cond), None)
    if plain:
        return v, hidden
    v_cond, v_uncond = v.chunk(2)
    return v_uncond + guidance * (v_cond - v_uncond), hidden if hidden is None else hidden.chunk(2)[0]


def weighted_mean(per_element: Tensor, w: Tensor) -> Tensor:
    """The reduction of every loss: sum over dimensions, weight w(t): [B], mean over the batch. [B, ...] -> scalar"""
    return (w * per_element.flatten(1).sum(1)).mean()


def flow_matching_loss(
    pred: Tensor, x_0: Tensor, e: Tensor, t: Tensor, path: str = "rf", predicts: str = "v", w: Tensor | None = None
) -> Tensor:
    """w(t) |pred - target|^2, by default |v - (e - x_0)|^2: conditional flow matching.

    It fits a teacher where x_0 is data, and the fake network where x_0 is the generator's samples (detached).
    pred is the network's output at x_t = add_noise(x_0, e, t, path). pred, x_0, e: [B, ...]; t, w: [B] -> scalar
    """
    p, q = prediction_row(predicts, *path_terms(match_dims(t, x_0), path))
    return weighted_mean((pred - (p * x_0 + q * e)).square(), torch.ones_like(t) if w is None else w)


# The weight w(t) of the generator's loss. A denominator is clipped at 1e-5. Since D = x_t - t v, the weight 1/t^2 turns the
# loss between posterior means into one between velocities.
WEIGHTS = {
    "1-t": lambda t: 1 - t,
    "(1-t)^2": lambda t: (1 - t) ** 2,
    "1/t": lambda t: 1 / t.clamp(min=1e-5),
    "1/t^2": lambda t: 1 / t.square().clamp(min=1e-5),
    "snr": lambda t: (1 - t) ** 2 / t.square().clamp(min=1e-5),
    "snr_sqrt": lambda t: (1 - t) / t.clamp(min=1e-5),
    "sid": None,  # 1 / mean |x_g - f_phi|: it depends on the sample, while the paper's identities need a function of t
}


def loss_weight(weight: str, t: Tensor, x_g: Tensor, d_real: Tensor) -> Tensor:
    """w(t) by name, without gradient. Raises ValueError unless `weight` is a key of WEIGHTS. t: [B] -> [B]"""
    check_choice("weight", weight, WEIGHTS)
    if weight == "sid":
        return 1 / (x_g - d_real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return WEIGHTS[weight](t)


def sid_loss(
    x_g: Tensor, d_real: Tensor, d_fake: Tensor, t: Tensor, alpha: float = 1.0, weight: str | Tensor = "1-t"
) -> Tensor:
    """The generator's loss, L_alpha = L2 - alpha L1 (paper, section 3):

        L1 = E[w |f_phi - f_psi|^2],    L2 = E[w (f_phi - f_psi)^T (f_phi - x_g)]

    What alpha does to the gradient: at psi*, with L the Fisher divergence, grad L_alpha = grad L / 2 + (1/2 - alpha) grad L1,
    where grad L1 holds psi fixed. So alpha = 1/2 is unbiased, and alpha = 1 follows the part of the gradient that flows
    through psi*(theta). What it does to the value: at psi* both L1 and L2 equal L, so at alpha = 1 the value hovers around
    zero and says nothing about convergence; L1 does. (Both need a w of t alone: any but "sid".)

    x_g is the generator's output; d_real = f_phi(x_t, t) and d_fake = f_psi(x_t, t) are posterior means at
    x_t = add_noise(x_g, e, t). Keep the graph of all three: the gradient reaches the generator through x_g and through
    the inputs of both networks, whose weights are constants here.
    x_g, d_real, d_fake: [B, ...], t: [B], weight: a key of WEIGHTS, else w: [B] -> scalar
    """
    w = loss_weight(weight, t, x_g, d_real) if isinstance(weight, str) else weight
    difference = d_real - d_fake
    return weighted_mean(difference * ((d_real - x_g) - alpha * difference), w)


def dmd_loss(x_g: Tensor, d_real: Tensor, d_fake: Tensor, t: Tensor, weight: str | Tensor = "1-t") -> Tensor:
    """Distribution matching distillation, for comparison: a scalar whose gradient with respect to each x_g of the batch
    is w (f_psi - f_phi) / B. Nothing flows through either network. Shapes and weights as in sid_loss."""
    w = loss_weight(weight, t, x_g, d_real) if isinstance(weight, str) else weight
    return weighted_mean((d_fake - d_real).detach() * x_g, w)


# The adversarial pair of the data-aided loss. The discriminator is the fake network itself: its last hidden states,
# averaged over image tokens, are the logits, one a channel.


def cross_entropy(features: Tensor, real: bool) -> Tensor:
    """Binary cross-entropy of every channel against the label, logits clamped to +-10. [B, channels] -> [B]"""
    logits = features.clamp(-10, 10)
    return F.softplus(-logits if real else logits).mean(1)


def discriminator_loss(features_real: Tensor, features_fake: Tensor, size: int) -> Tensor:
    """(real + fake) / 2, times the size C H W of a sample, which puts it on the scale of a sum over dimensions."""
    return size * (cross_entropy(features_real, True).mean() + cross_entropy(features_fake, False).mean()) / 2


def adversarial_loss(features_fake: Tensor, size: int, w: Tensor) -> Tensor:
    """The generator's side: its samples are judged as real, with the weight w(t): [B], times the size C H W."""
    return size * (w * cross_entropy(features_fake, True)).mean()


# ----------------------------------------------------------------------------------------------------------------------
# 3. Few-step generation and the training loop (paper, section 3)
# ----------------------------------------------------------------------------------------------------------------------

NOISES = ("fresh", "fixed", "ddim")
LOSSES = ("sid", "dmd")
SID_LAW = (math.log(2), 1.6)  # the authors' times for both losses: t = sigmoid(n), n ~ N(log 2, 1.6^2)
T_MIN = 1e-3  # where uniform times begin: the weight of Rectified Flow, 1 / t^2, has no integral down to 0


class SharedGenerator(torch.Generator):
    """A random generator for process `rank` of `world` processes that were given the same seed. Each process samples the
    numbers of the whole batch and keeps its own rows, so that all of them together see the numbers of one process."""

    rank, world = 0, 1


def random_rows(law: Callable, shape: tuple[int, ...], rng: torch.Generator | None, **options) -> Tensor:
    """Random numbers of this shape; law is torch.rand or torch.randn. From a SharedGenerator, this process's rows."""
    rank, world = (rng.rank, rng.world) if isinstance(rng, SharedGenerator) else (0, 1)
    return law(world * shape[0], *shape[1:], generator=rng, **options)[rank * shape[0] : (rank + 1) * shape[0]]


def noise_like(x: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """e ~ N(0, I), sampled on the device of rng: a CPU generator gives the same numbers on every device."""
    return random_rows(torch.randn, x.shape, rng, device=rng.device if rng else x.device, dtype=x.dtype).to(x.device)


def sample_times(
    n: int, law: tuple[float, float] | None, path: str = "rf", rng: torch.Generator | None = None
) -> Tensor:
    """n times on `path`: log(s/a) ~ N(law[0], law[1]^2), which on Rectified Flow is the logit-normal law; where law is
    None, uniform between T_MIN and the path's end. [n]"""
    device = rng.device if rng else None
    if law is None:
        return T_MIN + (T_END[path] - T_MIN) * random_rows(torch.rand, (n,), rng, device=device)
    ratio = (law[0] + law[1] * random_rows(torch.randn, (n,), rng, device=device)).exp()
    return time_at(torch.ones_like(ratio), ratio, path)


def sample_k(steps: int, iteration: int, rng: torch.Generator | None = None) -> int:
    """1 .. steps, uniform. It is a function of the iteration and of rng's seed, so that every process has the same k."""
    return random.Random(f"{rng.initial_seed() if rng else torch.initial_seed()} {iteration}").randint(1, steps)


def generate(
    net: Callable,
    z: Tensor,
    cond: dict | None = None,
    steps: int = 4,
    noise: str = "fresh",
    stop_after: int | None = None,
    times: Tensor | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """x_g = G(z) in K = steps network evaluations. stop_after=k returns the output of step k.

    Step i takes D = x_t - t v at t_i = 1 - i/K, which is a posterior mean for a teacher and a sample for a student, and
    adds noise up to the next time: x = (1 - t_{i+1}) D + t_{i+1} n. The noise n is `fresh`, `fixed` (z again) or `ddim` (the
    noise E[e | x_t] that the prediction implies). Only the last step carries gradient. times: t_0 > ... > t_K = 0 in place
    of 1 - i/K; K is then their number. Raises ValueError unless 1 <= stop_after <= steps, and for an unknown noise.
    z: [B, ...] -> [B, ...]
    """
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
    net: Callable,
    z: Tensor,
    cond: dict | None = None,
    uncond: dict | None = None,
    times: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """The teacher's own sampler: Euler steps of dx/dt = v along descending times [K + 1] that end in 0 (28 by default).

    It is `generate` with ddim noise, as (1 - t') (x_t - t v) + t' (x_t + (1 - t) v) = x_t + (t' - t) v.
    z: [B, ...] -> x_0. uncond (one row may serve all) and guidance as in `guided`, with the errors that it raises.
    """

    def guided_net(x_t: Tensor, t: Tensor, cond: dict | None) -> Tensor:
        return guided(net, x_t, t, cond, uncond, guidance)[0]

    times = torch.linspace(1, 0, 29) if times is None else times
    return generate(guided_net, z, cond, noise="ddim", times=times)


def set_trainable(optimizer: torch.optim.Optimizer, flag: bool) -> None:
    """Sets whether the weights that `optimizer` moves take gradients."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.requires_grad_(flag)


def backward(loss: Tensor, net: nn.Module, last: bool) -> None:
    """loss.backward(). Processes that share `net` exchange gradients only after the last part of a batch."""
    if hasattr(net, "set_requires_gradient_sync"):
        net.set_requires_gradient_sync(last)
    loss.backward()


def take_step(optimizer: torch.optim.Optimizer) -> Tensor:
    """One optimizer step, skipped where the gradient is not finite. Clears the gradients.

    Returns 1 if it was skipped, else 0, as a tensor on the device. Fused optimizers, and Float32Adam of chapter 8, read it there;
    others make the host wait.
    """
    weights = [w for group in optimizer.param_groups for w in group["params"]]
    gradients = [
        optimizer.state[w].get("gradient", w.grad) for w in weights
    ]  # a sum that the optimizer keeps, or torch's
    gradients = [gradient for gradient in gradients if gradient is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # over all processes' shards
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
    batches: Iterable[tuple[dict | None, Tensor | None]],
    shape: tuple[int, ...],
    *,
    # the method
    steps: int = 4,
    loss: str = "sid",
    alpha: float = 1.0,
    weight: str = "1-t",
    noise: str = "fresh",
    guidance: float = 1.0,
    uncond: dict | None = None,
    law: tuple[float, float] | None = SID_LAW,
    sid_scale: float = 100.0,
    # the schedule
    start: int = 0,
    iters: int = 1000,
    accumulate: int = 1,
    rng: torch.Generator | None = None,
    # data-aided
    warmup: tuple[int, int] = (20_000, 40_000),
) -> Iterator[dict]:
    """The training loop: distils `teacher` into `student`. Student and fake network start as copies of the teacher
    (data-aided, the student starts from a data-free one).

    optimizers: of the student and of the fake network; Adam with betas (0, 0.999) in the paper. All weights that neither
    holds are frozen. batches yields (cond, real): cond is a dict of tensors or None; real is None, or data-aided the clean
    samples x_0 of that cond. An update takes `accumulate` of them and follows the mean of their losses. The loop ends with
    the batches, or after iteration `iters`, counted from `start`. shape: of a batch of samples, (B, ...).

    law: of the times t of both losses (sample_times). guidance: the same in the fake network's training and in both
    networks of the generator's loss ("long and short" guidance); the generator itself runs without. sid_scale: multiplies
    L_alpha, which keeps its gradient above Adam's eps. rng: the source of all noise and times; its seed fixes k.
    warmup: data-aided, the generator waits for the first warmup[0] images, and sees L_alpha alone until warmup[1].

    Yields after each iteration a dict of measurements, as tensors on the device: loss (L_alpha or DMD's), fisher (L1, an
    estimate of the Fisher divergence: the number to watch), fake_loss, skipped (how many of the two updates were skipped),
    data-aided discriminator (its cross-entropy by the logit: log 2 where it tells nothing) and adversarial; and the numbers
    iteration, images (seen so far, by all processes) and k. Nothing in an iteration waits for the device if the optimizers
    are fused. Raises ValueError for an unknown loss, weight or noise.
    """
    for what, name, choices in (("loss", loss, LOSSES), ("weight", weight, WEIGHTS), ("noise", noise, NOISES)):
        check_choice(what, name, choices)
    student_optimizer, fake_optimizer = optimizers
    for net in (teacher, student, fake):
        net.requires_grad_(False)
    set_trainable(student_optimizer, True)
    weights = next(student.parameters())
    template = torch.empty(shape, device=weights.device, dtype=torch.promote_types(weights.dtype, torch.float32))
    size = template[0].numel()  # C H W
    images = shape[0] * accumulate * getattr(rng, "world", 1)  # of an iteration
    batches = iter(batches)

    for iteration in range(start, iters):
        parts = list(itertools.islice(batches, accumulate))
        if len(parts) < accumulate:
            return
        # The k-th output of a K-step run, k uniform: the mixture of all steps' outputs is what is matched to the data.
        k = sample_k(steps, iteration, rng)
        sums: dict = defaultdict(float)  # of the parts' measurements

        # 1. The fake network learns the generator's distribution: flow matching on its samples.
        set_trainable(fake_optimizer, True)
        for i, (cond, real) in enumerate(parts, 1):
            with torch.no_grad():
                x_g = generate(student, noise_like(template, rng), cond, steps, noise, stop_after=k, rng=rng)
            e, t = noise_like(template, rng), sample_times(shape[0], law, rng=rng).to(template)
            x_t = add_noise(x_g, e, t)
            v, hidden = guided(fake, x_t, t, cond, uncond, guidance, features=real is not None)
            fake_loss = flow_matching_loss(v, x_g, e, t)
            sums["fake_loss"] += fake_loss.detach()
            if real is not None:  # it also learns to tell generated samples from real ones
                _, hidden_real = fake(add_noise(real, noise_like(real, rng), t), t, cond, features=True)
                discriminator = discriminator_loss(hidden_real, hidden, size)
                sums["discriminator"] += discriminator.detach() / size
                fake_loss = fake_loss + discriminator
            backward(fake_loss / accumulate, fake, last=i == accumulate)
        skipped = take_step(fake_optimizer)
        set_trainable(fake_optimizer, False)

        # 2. The generator follows L_alpha: the gradient reaches it through x_g and through x_t, the input of both networks.
        seen = iteration * images
        waits = real is not None and seen < warmup[0]
        for i, (cond, real) in enumerate(parts, 1):
            x_g = generate(student, noise_like(template, rng), cond, steps, noise, stop_after=k, rng=rng)
            e, t = noise_like(template, rng), sample_times(shape[0], law, rng=rng).to(template)
            x_t = add_noise(x_g, e, t)
            v_real, _ = guided(teacher, x_t, t, cond, uncond, guidance)
            v_fake, hidden = guided(fake, x_t, t, cond, uncond, guidance, features=real is not None)
            d_real, d_fake = (x_t - match_dims(t, x_t) * v for v in (v_real, v_fake))  # f_phi, f_psi
            w = loss_weight(weight, t, x_g, d_real)
            if loss == "sid":
                student_loss = sid_loss(x_g, d_real, d_fake, t, alpha, w)
            else:
                student_loss = dmd_loss(x_g, d_real, d_fake, t, w)
            sums["loss"] += student_loss.detach()
            sums["fisher"] += weighted_mean((d_real - d_fake).detach().square(), w)
            student_loss = sid_scale * student_loss
            if real is not None:  # w = 1 - t whatever `weight` is: unlike D, a cross-entropy does not shrink with t
                adversarial = adversarial_loss(hidden, size, 1 - t)
                sums["adversarial"] += adversarial.detach()
                student_loss = (student_loss + adversarial) / 2 if seen >= warmup[1] else student_loss
            if not waits:
                backward(student_loss / accumulate, student, last=i == accumulate)
        skipped = skipped if waits else skipped + take_step(student_optimizer)
        means = {name: total / accumulate for name, total in sums.items()}
        yield {"iteration": iteration, "images": seen + images, "k": k, **means, "skipped": skipped}


# ----------------------------------------------------------------------------------------------------------------------
# 4. Backbones: SD3 and SD3.5's MMDiT, SANA's linear DiT, FLUX
# ----------------------------------------------------------------------------------------------------------------------
# Constructors take the keys of a checkpoint's config.json; modules carry the names of its tensors, so that loading is
# load_state_dict and saving its inverse. What never varies among the checkpoints is no option but a line of FIXED, which
# the loader holds a config against. As in the original networks, time embeddings, norms' statistics, rotations and
# linear attention are computed in float32 whatever the dtype of the rest. Weights may be wider than the products that they
# enter, as a student's are (chapter 8): each layer casts its own.


def widen(x: Tensor) -> Tensor:
    """To float32, where latents, features and images live; what is wider stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoidal(t: Tensor) -> Tensor:
    """cos and sin of t at 128 frequencies from 1 down to 1e-4, in float32. [B] -> [B, 256]"""
    rates = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
    angles = t[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: LN(x) (1 + scale) + shift. x: [B, N, D]; shift, scale: [B, 1, D]"""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + eps) * weight (+ bias), over the last dimension, the mean in float32. (FLUX takes torch's.)"""

    def __init__(self, dim: int, eps: float = 1e-6, bias: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        unit = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        y = (x * unit).to(x.dtype) * self.weight
        return y if self.bias is None else y + self.bias


class PatchEmbed(nn.Module):
    """Latents to tokens, [B, C, h, w] -> [B, (h / p) (w / p), D], with a table of positions where max_size is given."""

    def __init__(self, channels: int, dim: int, patch_size: int, max_size: int = 0, base_size: int = 0):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.max_size, self.base_size = max_size, base_size
        if max_size:
            self.register_buffer("pos_embed", torch.empty(1, max_size**2, dim))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Half of the channels for the column and half for the row, each sin and cos of the position, scaled so that
        the table spans 0 .. base_size."""
        if self.max_size:
            n, dim = self.max_size, self.pos_embed.shape[-1]
            omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
            angles = torch.arange(n, dtype=torch.float64)[:, None] * self.base_size / n * omega
            one = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.pos_embed)  # [n, D / 2]
            table = torch.cat([one[None].expand(n, -1, -1), one[:, None].expand(-1, n, -1)], dim=-1)
            self.pos_embed.copy_(table.reshape(1, n * n, dim))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.proj(x)
        rows, columns = tokens.shape[-2:]
        tokens = tokens.flatten(2).transpose(1, 2).contiguous()  # else every block would walk them transposed
        if not self.max_size:
            return tokens
        top, left = (self.max_size - rows) // 2, (self.max_size - columns) // 2
        if min(top, left) < 0:
            raise ValueError(
                f"{rows} x {columns} patches: the table of positions has {self.max_size} x {self.max_size}"
            )
        table = self.pos_embed.unflatten(1, (self.max_size, self.max_size))[:, top : top + rows, left : left + columns]
        return tokens + table.flatten(1, 2)


class Chain(nn.Sequential):
    """Modules that run in the order given, under the names given."""

    def __init__(self, **steps: nn.Module):
        super().__init__(OrderedDict(steps))


def embedder(dim_in: int, dim: int, activation: nn.Module | None = None) -> Chain:
    """linear, activation, linear: of time, guidance, pooled text, captions."""
    return Chain(linear_1=nn.Linear(dim_in, dim), act=activation or nn.SiLU(), linear_2=nn.Linear(dim, dim))


class Conditioning(nn.Module):
    """c = time + guidance + pooled text, each embedded, as far as the network has them. -> [B, D]"""

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
    """c -> n shifts, scales and gates. [B, D] -> n tensors [B, 1, D]"""

    def __init__(self, dim: int, n: int):
        super().__init__()
        self.n, self.linear = n, nn.Linear(dim, n * dim)

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(c))[:, None].chunk(self.n, dim=-1)


def feed_forward(dim: int) -> Chain:
    wide = Chain(proj=nn.Linear(dim, 4 * dim), act=nn.GELU("tanh"))
    return Chain(net=nn.Sequential(wide, nn.Identity(), nn.Linear(4 * dim, dim)))


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding: neighbouring channels are the two coordinates that turn. x: [B, N, H, d]; rope: of rope_table"""
    cos, sin = rope
    neighbour = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x.float() * cos + neighbour.float() * sin).to(x.dtype)


class JointAttention(nn.Module):
    """Attention among image tokens; with context=True jointly among text and image tokens, which have projections and
    q/k-norms of their own, text first."""

    def __init__(
        self,
        dim: int,
        heads: int,
        norm: Callable[[int], nn.Module],
        out: bool = True,
        context: bool = False,
        last: bool = False,
    ):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)]) if out else None
        self.norm_q, self.norm_k = norm(dim // heads), norm(dim // heads)
        if context:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.to_add_out = None if last else nn.Linear(dim, dim)
            self.norm_added_q, self.norm_added_k = norm(dim // heads), norm(dim // heads)

    def forward(
        self, x: Tensor, text: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x: [B, N, D], text: [B, L, D] -> the same shapes; None for text where it has no output."""

        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1))  # [B, N, H, d]

        q, k, v = self.norm_q(split(self.to_q(x))), self.norm_k(split(self.to_k(x))), split(self.to_v(x))
        if text is not None:
            q = torch.cat([self.norm_added_q(split(self.add_q_proj(text))), q], dim=1)
            k = torch.cat([self.norm_added_k(split(self.add_k_proj(text))), k], dim=1)
            v = torch.cat([split(self.add_v_proj(text)), v], dim=1)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2).flatten(2)
        y_text = None
        if text is not None:
            y_text, y = y.split([text.shape[1], x.shape[1]], dim=1)
            y_text = None if self.to_add_out is None else self.to_add_out(y_text)
        return y if self.to_out is None else self.to_out[0](y), y_text


class JointBlock(nn.Module):
    """MMDiT's block, and FLUX's double-stream block: image and text tokens meet in attention alone.

    dual: a second attention among image tokens (SD3.5-Medium). last: nobody reads the text tokens after this block.
    """

    def __init__(self, dim: int, heads: int, norm: Callable[[int], nn.Module], dual: bool = False, last: bool = False):
        super().__init__()
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(dim, heads, norm, context=True, last=last)
        self.attn2 = JointAttention(dim, heads, norm) if dual else None
        self.ff = feed_forward(dim)
        self.ff_context = None if last else feed_forward(dim)

    def forward(
        self, x: Tensor, text: Tensor, c: Tensor, rope: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
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
    """The face that all backbones share. `guidance` is what a guidance embedding is fed unless cond["guidance"] says."""

    FIXED: ClassVar = {}
    guidance = 1.0

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of activations and products."""
        return self.proj_out.weight.dtype

    def guidance_of(self, cond: dict, t: Tensor) -> Tensor:
        return cond["guidance"] if "guidance" in cond else torch.full_like(t, self.guidance)

    def velocity(self, tokens: Tensor, like: Tensor, features: bool) -> Tensor | tuple[Tensor, Tensor]:
        """Output projection of the last hidden states (after the final norm), and their mean where features are asked.
        tokens: [B, N, D] -> v as x_t, hidden [B, D]"""
        p = self.patch_size  # a token's channels are ordered (row in patch, column in patch, C)
        rows = like.shape[-2] // p
        grid = self.proj_out(tokens).unflatten(2, (p, p, -1)).unflatten(1, (rows, -1))  # [B, h/p, w/p, p, p, C]
        v = grid.permute(0, 5, 1, 3, 2, 4).reshape(len(like), -1, *like.shape[-2:]).to(like.dtype)
        return (v, widen(tokens).mean(1)) if features else v


class MMDiT(Backbone):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206). cond: text [B, L, joint_attention_dim], pooled [B, pooled].

    Raises ValueError for latents beyond the table of positions.
    """

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
        x = self.pos_embed(x_t.to(self.dtype))
        text = self.context_embedder(cond["text"].to(self.dtype))
        c = self.time_text_embed(1000 * t, None, cond["pooled"], self.dtype)
        for block in self.transformer_blocks:
            x, text = block(x, text, c)
        scale, shift = self.norm_out(c)
        return self.velocity(modulate(x, shift, scale), x_t, features)


flux_norm = partial(nn.RMSNorm, eps=1e-6)  # torch's own rounds once, in the dtype of x


class SingleBlock(nn.Module):
    """FLUX's single-stream block: attention and MLP side by side, over text and image tokens together."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm = Modulation(dim, 3)
        self.attn = JointAttention(dim, heads, flux_norm, out=False)
        self.proj_mlp = nn.Linear(dim, 4 * dim)
        self.proj_out = nn.Linear(5 * dim, dim)

    def forward(self, x: Tensor, c: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate = self.norm(c)
        y = modulate(x, shift, scale)
        mlp = F.gelu(self.proj_mlp(y), approximate="tanh")
        return torch.addcmul(x, gate, self.proj_out(torch.cat([self.attn(y, rope=rope)[0], mlp], dim=-1)))


def rope_table(
    rows: int, columns: int, text: int, axes: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos of the rotations, and sin with the sign that it has on each coordinate's neighbour: (x, y) turns into
    (x cos - y sin, y cos + x sin). Image tokens are at (0, row, column), text tokens at the origin. [text + N, 1, d]"""
    exact = torch.float32 if device.type == "mps" else torch.float64
    row, column = torch.meshgrid(*(torch.arange(n, device=device, dtype=exact) for n in (rows, columns)), indexing="ij")
    positions = F.pad(torch.stack([torch.zeros_like(row), row, column]).flatten(1), (text, 0))  # [3, text + N]
    rates = (10000.0 ** (-torch.arange(0, d, 2, device=device, dtype=exact) / d) for d in axes)
    angles = torch.cat([p[:, None, None] * rate for p, rate in zip(positions, rates)], dim=-1)
    cos, sin = angles.cos().float(), angles.sin().float()
    return torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)


class FLUX(Backbone):
    """FLUX.1: double-stream, then single-stream blocks, with rotary positions (Black Forest Labs, 2024).

    cond: text [B, L, joint_attention_dim], pooled [B, pooled] and, if wanted, guidance [B]. Latents are packed 2 x 2.
    """

    FIXED: ClassVar = {"patch_size": 1}  # in packed latents
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
        dim = num_attention_heads * attention_head_dim
        self.axes = tuple(axes_dims_rope)
        self.x_embedder = nn.Linear(in_channels, dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.time_text_embed = Conditioning(dim, pooled_projection_dim, guidance_embeds)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(dim, num_attention_heads, flux_norm) for _ in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(dim, num_attention_heads) for _ in range(num_single_layers)
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, in_channels)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict, features: bool = False):
        packed = F.pixel_unshuffle(x_t.to(self.dtype), 2)  # [B, 4 C, h / 2, w / 2]
        x, text = self.x_embedder(packed.flatten(2).transpose(1, 2)), self.context_embedder(cond["text"].to(self.dtype))
        c = self.time_text_embed(1000 * t, 1000 * self.guidance_of(cond, t), cond["pooled"], self.dtype)
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
    """SANA's linear attention among image tokens (ReLU kernel), or softmax attention from image to text tokens.
    Sprint's q/k-norm spans all heads."""

    def __init__(self, dim: int, heads: int, qk_norm: bool, bias: bool):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.norm_q, self.norm_k = (RMSNorm(dim, eps=1e-5) if qk_norm else nn.Identity() for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x: [B, N, D], text: [B, L, D], mask: [B, 1, 1, L], true where there is text -> [B, N, D]"""
        source = x if text is None else text
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(source)), self.to_v(source)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # [B, H, N, d]
        if text is None:
            y = linear_attention(*(y.transpose(2, 3) for y in (q, k, v))).transpose(2, 3)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        return self.to_out[0](y.transpose(1, 2).flatten(2))


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sum_j relu(q_i . k_j) v_j / sum_j relu(q_i . k_j) with relu on q and k each, so that sums over j come first: N d^2
    operations instead of N^2 d. A row of ones appended to v makes the denominator. All [B, H, d, N], tokens last."""
    dtype = v.dtype
    q, k, v = F.relu(q).float(), F.relu(k).float(), F.pad(v.float(), (0, 0, 0, 1), value=1.0)
    y, norm = ((v @ k.transpose(2, 3)) @ q).split([v.shape[2] - 1, 1], dim=2)
    return (y / (norm + 1e-15)).to(dtype)


class MixFFN(nn.Module):
    """Gated convolutional MLP: 1 x 1 out, 3 x 3 depthwise, SiLU gate, 1 x 1 back. [B, D, h, w] -> the same"""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.conv_inverted = nn.Conv2d(dim, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        return self.conv_point(y * F.silu(gate))


class SanaBlock(nn.Module):
    def __init__(self, dim: int, heads: int, cross_heads: int, hidden: int, qk_norm: bool):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, dim))
        self.attn1 = SanaAttention(dim, heads, qk_norm, bias=False)
        self.attn2 = SanaAttention(dim, cross_heads, qk_norm, bias=True)
        self.ff = MixFFN(dim, hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None, c: Tensor, rows: int) -> Tensor:
        """x: [B, N, D], text: [B, L, D], mask: [B, 1, 1, L], c: [B, 6, D] -> [B, N, D]"""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + c).chunk(6, dim=1)
        x = torch.addcmul(x, gate, self.attn1(modulate(x, shift, scale)))
        x = x + self.attn2(x, text, mask)
        image = modulate(x, shift_mlp, scale_mlp).transpose(1, 2).unflatten(2, (rows, -1))
        return torch.addcmul(x, gate_mlp, self.ff(image).flatten(2).transpose(1, 2))


class SanaDiT(Backbone):
    """SANA (arXiv 2410.10629) and the teachers of SANA-Sprint (2503.09641).

    cond: text [B, L, caption_channels], mask [B, L] (true where there is text; optional) and, for checkpoints with a
    guidance embedding (students of Sprint), guidance [B] if wanted. Those are fed t, as are Sprint's teachers, whose
    timestep_scale is 0.001; SANA is fed 1000 t.
    """

    FIXED: ClassVar = {"interpolation_scale": None, "norm_eps": 1e-6}
    guidance = 4.5

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
        # With a guidance embedding the checkpoints hold the embedders one level higher.
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
        self.scale_shift_table = nn.Parameter(torch.empty(2, dim))
        self.proj_out = nn.Linear(dim, patch_size**2 * in_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)

    def forward(self, x_t: Tensor, t: Tensor, cond: dict, features: bool = False):
        x = self.patch_embed(x_t.to(self.dtype))
        text = self.caption_norm(self.caption_projection(cond["text"].to(self.dtype)))
        mask = cond["mask"][:, None, None].bool() if "mask" in cond else None
        embed = getattr(self.time_embed, "emb", self.time_embed)
        c = embed(self.time_scale * t, self.guidance_scale * self.guidance_of(cond, t), None, self.dtype)
        modulation = self.time_embed.linear(F.silu(c)).unflatten(1, (6, -1))
        for block in self.transformer_blocks:
            x = block(x, text, mask, modulation, x_t.shape[-2] // self.patch_size)
        shift, scale = (self.scale_shift_table + c[:, None]).chunk(2, dim=1)
        return self.velocity(modulate(x, shift, scale), x_t, features)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Autoencoders: images to latents and back
# ----------------------------------------------------------------------------------------------------------------------
# Both have one face: encode(images) -> latents, decode(latents) -> images, deterministic. images: [B, 3, H, W] in
# [-1, 1], H and W multiples of `downscale`; latents: [B, C, H / downscale, W / downscale], before any shift and scale.
# Arguments are config.json's keys. FIXED holds its keys that have one supported value: what a strict load cannot notice.

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1 x 1 convolution on x where the number of channels changes."""

    def __init__(self, dim: int, dim_out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, dim, eps=1e-6), conv3x3(dim, dim_out)
        self.norm2, self.conv2 = nn.GroupNorm(groups, dim_out, eps=1e-6), conv3x3(dim_out, dim_out)
        self.conv_shortcut = nn.Identity() if dim == dim_out else nn.Conv2d(dim, dim_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Nested, and the shortcut last: half a gigabyte at 1024 x 1024, each intermediate is freed once it has been used.
        return self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x)))))) + self.conv_shortcut(x)


class PixelAttention(nn.Module):
    """x + attention among all pixels, in one head as wide as the channels."""

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
    """The autoencoder of SD3, SD3.5 and FLUX. encode gives the mean, which is the mode, of the posterior."""

    FIXED: ClassVar = {"act_fn": "silu", "latents_mean": None, "latents_std": None}

    def __init__(
        self,
        block_out_channels: Sequence[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 16,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        dims, groups = list(block_out_channels), norm_num_groups
        self.latent_channels, self.downscale = latent_channels, 2 ** (len(dims) - 1)

        def downsample(dim: int) -> Chain:
            return Chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(dim, dim, 3, stride=2))  # right and bottom only

        def upsample(dim: int) -> Chain:
            return Chain(up=nn.Upsample(scale_factor=2), conv=conv3x3(dim, dim))  # nearest neighbours

        def stages(dims: list[int], layers: int, name: str, resample: Callable[[int], Chain]) -> nn.Sequential:
            out = []
            for i, (dim, dim_out) in enumerate(zip([dims[0], *dims], dims)):
                blocks = [ResnetBlock(dim if j == 0 else dim_out, dim_out, groups) for j in range(layers)]
                resampler = [resample(dim_out)] if i < len(dims) - 1 else []
                out.append(Chain(**{"resnets": nn.Sequential(*blocks), name: nn.Sequential(*resampler)}))
            return nn.Sequential(*out)

        self.encoder = Chain(
            conv_in=conv3x3(3, dims[0]),
            down_blocks=stages(dims, layers_per_block, "downsamplers", downsample),
            mid_block=MidBlock(dims[-1], groups),
            conv_norm_out=nn.GroupNorm(groups, dims[-1], eps=1e-6),
            act=nn.SiLU(),
            conv_out=conv3x3(dims[-1], 2 * latent_channels),
        )
        self.decoder = Chain(
            conv_in=conv3x3(latent_channels, dims[-1]),
            mid_block=MidBlock(dims[-1], groups),
            up_blocks=stages(dims[::-1], layers_per_block + 1, "upsamplers", upsample),
            conv_norm_out=nn.GroupNorm(groups, dims[0], eps=1e-6),
            act=nn.SiLU(),
            conv_out=conv3x3(dims[0], 3),
        )

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images).chunk(2, dim=1)[0]  # mean, log variance

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


# The deep compression autoencoder (DC-AE, arXiv 2410.10733) learns residuals everywhere, also where the shape changes.


def fit(x: Tensor, like: Tensor) -> Tensor:
    """x: [B, C, h, w] in the shape of `like`, half or twice as high and wide or the same, without parameters.

    Each 2 x 2 pixels become channels, or the reverse, and neighbouring channels are averaged, or each repeated.
    """
    if x.shape == like.shape:
        return x
    dim, grows = like.shape[1], like.shape[2] > x.shape[2]
    if grows:
        dim *= 4
    elif like.shape[2] < x.shape[2]:
        x = F.pixel_unshuffle(x, 2)
    x = x.repeat_interleave(dim // x.shape[1], dim=1) if dim > x.shape[1] else x.unflatten(1, (dim, -1)).mean(2)
    return F.pixel_shuffle(x, 2) if grows else x


class Residual(Chain):
    """x, made to fit, + the chain of x."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + fit(x, y)


class ResidualConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + fit(x, y)


class PixelRMSNorm(RMSNorm):
    """RMSNorm over the channels of each pixel. [B, C, h, w]"""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class MultiscaleAttention(nn.Module):
    """x + linear attention among all pixels. For each k of `kernels` further heads see q, k, v mixed over k x k pixels."""

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
        # A head takes 3 head_dim consecutive channels: to_q, to_k, to_v are thirds of one projection, whatever the names.
        heads = qkv.unflatten(1, (-1, 3 * self.head_dim)).flatten(3)  # [B, heads, 3 head_dim, h w]
        y = linear_attention(*heads.chunk(3, dim=2)).flatten(1, 2).unflatten(2, x.shape[2:])
        return self.norm_out(self.to_out(y.movedim(1, -1)).movedim(-1, 1)) + x


class GatedConv(MixFFN):
    """x + norm(MixFFN(x))"""

    def __init__(self, dim: int):
        super().__init__(dim, 4 * dim)
        self.norm = PixelRMSNorm(dim, eps=1e-5, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x)) + x


class AutoencoderDC(nn.Module):
    """The autoencoder of SANA: DC-AE f32c32, versions 1.0 and 1.1."""

    FIXED: ClassVar = {
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
    ):
        super().__init__()
        self.latent_channels, self.downscale = latent_channels, 2 ** (len(encoder_block_out_channels) - 1)

        def block(kind: str, dim: int, kernels: Sequence[int]) -> nn.Module:
            check_choice("block type", kind, ("ResBlock", "EfficientViTBlock"))
            if kind == "EfficientViTBlock":
                return Chain(attn=MultiscaleAttention(dim, attention_head_dim, kernels), conv_out=GatedConv(dim))
            norm = PixelRMSNorm(dim, eps=1e-5, bias=True)
            return Residual(conv1=conv3x3(dim, dim), act=nn.SiLU(), conv2=conv3x3(dim, dim, bias=False), norm=norm)

        def stages(kinds, dims, layers, kernels) -> list[list[nn.Module]]:
            return [[block(*of) for _ in range(n)] for *of, n in zip(kinds, dims, kernels, layers)]

        dims = encoder_block_out_channels
        down = stages(encoder_block_types, dims, encoder_layers_per_block, encoder_qkv_multiscales)
        for stage, dim, dim_out in zip(down, dims, dims[1:]):
            stage.append(Residual(conv=conv3x3(dim, dim_out, stride=2)))
        self.encoder = Chain(
            conv_in=conv3x3(3, dims[0]),
            down_blocks=nn.Sequential(*(nn.Sequential(*stage) for stage in down)),
            conv_out=ResidualConv(dims[-1], latent_channels, 3, padding=1),
        )

        dims = decoder_block_out_channels
        up = stages(decoder_block_types, dims, decoder_layers_per_block, decoder_qkv_multiscales)
        for stage, dim, dim_out in zip(up, dims[1:], dims):
            stage.insert(0, Residual(up=nn.Upsample(scale_factor=2), conv=conv3x3(dim, dim_out)))
        self.decoder = Chain(  # its blocks are numbered from the end
            conv_in=ResidualConv(latent_channels, dims[-1], 3, padding=1),
            up_blocks=Chain(**{str(i): nn.Sequential(*stage) for i, stage in reversed([*enumerate(up)])}),
            norm_out=PixelRMSNorm(dims[0], eps=1e-5, bias=True),
            act=nn.ReLU(),
            conv_out=conv3x3(dims[0], 3),
        )

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Text: prompts to conditions
# ----------------------------------------------------------------------------------------------------------------------
# From here on files are read, in the layout of a diffusers pipeline: a folder with a model_index.json that names the
# parts, and for each part a folder with its config.json and safetensors. No pickle is ever opened.


class BadInput(ValueError):
    """What was given can't be used: one line that says what is wrong and what to do."""


class OwnTrouble(BadInput):
    """Of one process among many, which therefore says it itself."""


def read_text(file: Path) -> str:
    """A text file's content. Raises BadInput."""
    try:
        return file.read_text(encoding="utf-8-sig")  # with a byte order mark or without
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror}") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises BadInput."""
    if not path.exists():
        raise BadInput(f"{path} is missing: is {path.parent} a folder in the diffusers layout?")
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds no valid JSON object: download it again")
    return content


def weight_files(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """The safetensors of a part: one file, or shards with an index; the plain ones, else those of a variant."""
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


VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
CLIP_LENGTH = 77
TEXT_LENGTH = {"sd3": 256, "flux": 512, "sana": 300}  # tokens of T5, T5 and Gemma, as the families' pipelines have them


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keeps transformers' progress bars and advice off the screen."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error(), logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def find_instruction() -> str | None:
    """The text that SANA was trained to see before every prompt, a default in diffusers; None where that is missing."""
    try:
        with quiet_transformers():
            from diffusers import SanaPipeline

            return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
    except (ImportError, RuntimeError, AttributeError, KeyError, TypeError):  # absent, broken, or another version
        return None


class TextEncoders:
    """The tokenizers and text encoders of a pipeline's folder: cond = encoders(prompts), as its pipeline encodes them.

    sd3   text [B, 77 + 256, 4096]: the penultimate states of two CLIPs side by side, padded with zeros, then T5's states
          (zeros in a folder without T5); pooled [B, 2048]: both CLIPs' projected outputs
    flux  text [B, 512, 4096]: T5's states; pooled [B, 768]: CLIP's output at the end of the text
    sana  text [B, 300, 2304]: Gemma's last states; mask [B, 300]: 1 on tokens, 0 on padding

    CLIP and T5 are given no mask: they attend to their padding. Weights are read from safetensors only.
    instruction: what stands before every prompt of SANA but the empty one; newlines and trailing spaces count.
    """

    def __init__(self, folder: Path, family: str, device: str = "cpu", dtype=torch.float32, instruction: str = ""):
        import transformers

        check_choice("family", family, TEXT_LENGTH)
        folder = Path(folder)
        self.family, self.device, self.instruction = family, device, instruction
        self.tokenizers: dict = {}
        self.encoders: dict = {}
        dtype_key = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
        for name, part in read_json(folder / "model_index.json").items():
            if not name.startswith(("tokenizer", "text_encoder")) or part[1] is None:
                continue
            source = folder / name
            if name.startswith("tokenizer"):
                if not any((source / file).exists() for file in VOCABULARIES):
                    raise BadInput(f"{source} holds none of {', '.join(VOCABULARIES)}: download it again")
                # Older releases take the T5 files' add_prefix_space as a wish for sentencepiece.
                options = {"add_prefix_space": None} if "T5" in part[1] else {}
                self.tokenizers[name] = self.open(part[1], source, **options)
                self.tokenizers[name].padding_side = "right"  # Gemma's own default is left
            else:
                read_json(source / "config.json")
                variant = re.search(r"(fp16|bf16)\b", weight_files(source, "model")[0].name)
                options = {"variant": variant and variant[0], dtype_key: dtype}
                if family == "sana":  # older releases default to an attention without Gemma-2's soft cap
                    options["attn_implementation"] = "eager"
                self.encoders[name] = self.open_network(part[1], source, **options).to(device)
        if family == "sd3":
            self.width = read_json(folder / "transformer" / "config.json")["joint_attention_dim"]

    @staticmethod
    def open(kind: str, source: Path, **options):
        """transformers' from_pretrained. Raises BadInput."""
        import transformers
        from safetensors import SafetensorError

        try:
            with quiet_transformers():
                return getattr(transformers, kind).from_pretrained(source, **options)
        except (AttributeError, OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BadInput(f"{source} can't be loaded as {kind} ({reason}): download it again") from None

    @staticmethod
    def open_network(kind: str, source: Path, **options) -> nn.Module:
        """A network of transformers with all of its weights. Raises BadInput."""
        options |= {"use_safetensors": True, "output_loading_info": True}
        net, report = TextEncoders.open(kind, source, **options)
        if report["missing_keys"]:
            first = ", ".join(sorted(report["missing_keys"])[:3])
            raise BadInput(f"{source}: the weights don't fit its config.json: missing {first}")
        return net.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: list[str], max_length: int | None = None) -> dict[str, Tensor]:
        """The prompts' cond. max_length: of T5's or Gemma's tokens, by default the pipeline's; CLIP always reads 77.

        Longer prompts are cut, with one warning that says by how much.
        """
        cut: list[str] = []
        encode = {"sd3": self.encode_sd3, "flux": self.encode_flux, "sana": self.encode_sana}[self.family]
        cond = encode(prompts, max_length or TEXT_LENGTH[self.family], cut)
        if cut:
            warnings.warn(f"prompts were cut: {'; '.join(cut)}", stacklevel=3)
        return cond

    def tokenize(self, nth: str, texts: list[str], length: int, cut: list[str]) -> tuple[Tensor, Tensor]:
        """ids and mask, [B, length], for text encoder nth: "", "_2" or "_3". What does not fit is noted in `cut`."""
        tokenizer = self.tokenizers[f"tokenizer{nth}"]
        over = max(map(len, tokenizer(texts, verbose=False).input_ids)) - length
        if over > 0:
            cut.append(f"text_encoder{nth} reads {length} tokens, {over} too many")
        batch = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return batch.input_ids.to(self.device), batch.attention_mask.to(self.device)

    def run(self, nth: str, texts: list[str], length: int, cut: list[str], **options: bool):
        """What text encoder nth, a CLIP or T5, returns."""
        return self.encoders[f"text_encoder{nth}"](self.tokenize(nth, texts, length, cut)[0], **options)

    def encode_sd3(self, prompts: list[str], length: int, cut: list[str]) -> dict[str, Tensor]:
        clips = [self.run(nth, prompts, CLIP_LENGTH, cut, output_hidden_states=True) for nth in ("", "_2")]
        text = torch.cat([clip.hidden_states[-2] for clip in clips], -1)
        text = F.pad(text, (0, self.width - text.shape[-1]))
        if "text_encoder_3" in self.encoders:
            t5 = self.run("_3", prompts, length, cut).last_hidden_state
        else:
            t5 = text.new_zeros(len(prompts), length, self.width)
        return {"text": torch.cat([text, t5], 1), "pooled": torch.cat([clip.text_embeds for clip in clips], -1)}

    def encode_flux(self, prompts: list[str], length: int, cut: list[str]) -> dict[str, Tensor]:
        pooled = self.run("", prompts, CLIP_LENGTH, cut).pooler_output
        return {"text": self.run("_2", prompts, length, cut).last_hidden_state, "pooled": pooled}

    def encode_sana(self, prompts: list[str], length: int, cut: list[str]) -> dict[str, Tensor]:
        """Of an instructed prompt's states the first and the last length - 1 are kept. The empty prompt, which is the
        unconditional one, is encoded bare; all its padding sees the one token it has, so that any of it will do."""
        prompts = [prompt.lower().strip() for prompt in prompts]
        total = length
        if self.instruction:
            total += len(self.tokenizers["tokenizer"](self.instruction, verbose=False).input_ids) - 2
        texts = [self.instruction + prompt if prompt else "" for prompt in prompts]
        ids, mask = self.tokenize("", texts, total, cut)
        states = self.encoders["text_encoder"](ids, attention_mask=mask, use_cache=False).last_hidden_state
        keep = [0, *range(total - length + 1, total)]
        return {"text": states[:, keep], "mask": mask[:, keep]}


# ----------------------------------------------------------------------------------------------------------------------
# 7. Teachers
# ----------------------------------------------------------------------------------------------------------------------


class Published(NamedTuple):
    """A teacher of the paper: where it is published, the steps of its own sampler, its network where that differs from
    the constructor's defaults."""

    repository: str
    pipeline: str
    steps: int
    network: dict


SD3, FLUX1, SANA = "StableDiffusion3Pipeline", "FluxPipeline", "SanaPipeline"
SD35_MEDIUM = {"qk_norm": "rms_norm", "pos_embed_max_size": 384, "dual_attention_layers": list(range(13))}
SD35_LARGE = {"qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38}
SANA_06B = {"num_layers": 28, "num_attention_heads": 36, "num_cross_attention_heads": 16}
SPRINT = {"qk_norm": "rms_norm_across_heads", "timestep_scale": 0.001, "sample_size": 32}
NAMES = {
    "sd3-medium": Published("stabilityai/stable-diffusion-3-medium-diffusers", SD3, 28, {}),
    "sd3.5-medium": Published("stabilityai/stable-diffusion-3.5-medium", SD3, 40, SD35_MEDIUM),
    "sd3.5-large": Published("stabilityai/stable-diffusion-3.5-large", SD3, 28, SD35_LARGE),
    "flux-dev": Published("black-forest-labs/FLUX.1-dev", FLUX1, 28, {"guidance_embeds": True}),
    "sana-0.6b": Published("Efficient-Large-Model/Sana_600M_512px_diffusers", SANA, 20, SANA_06B | {"sample_size": 16}),
    "sana-1.6b": Published("Efficient-Large-Model/Sana_1600M_512px_diffusers", SANA, 20, {"sample_size": 16}),
    "sana-sprint-0.6b": Published(
        "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_teacher_diffusers", SANA, 20, SANA_06B | SPRINT
    ),
    "sana-sprint-1.6b": Published("Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers", SANA, 20, SPRINT),
}


class Family(NamedTuple):
    """What the teachers of one pipeline class have in common."""

    kind: str
    backbone: type[nn.Module]
    backbone_class: str  # its name in config.json
    autoencoder: type[nn.Module]
    latent: dict  # latents are (z - shift) * scale
    scheduler: dict
    conditions: dict  # shapes of one prompt's


# fmt: off
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
PIPELINES = {
    SD3: Family("sd3", MMDiT, "SD3Transformer2DModel", AutoencoderKL, {"scaling_factor": 1.5305, "shift_factor": 0.0609},
                EULER, {"text": (333, 4096), "pooled": (2048,)}),
    FLUX1: Family("flux", FLUX, "FluxTransformer2DModel", AutoencoderKL, {"scaling_factor": 0.3611, "shift_factor": 0.1159},
                  EULER | {"use_dynamic_shifting": True}, {"text": (512, 4096), "pooled": (768,)}),
    SANA: Family("sana", SanaDiT, "SanaTransformer2DModel", AutoencoderDC, {"scaling_factor": 0.41407},
                 EULER, {"text": (300, 2304), "mask": (300,)}),
}
PIPELINES["SanaSprintPipeline"] = PIPELINES[SANA]
# fmt: on


def network_config(family: Family, network: dict) -> dict:
    """The config.json of a network at its true size, as diffusers would write it."""
    parameters = inspect.signature(family.backbone).parameters
    config = {"_class_name": family.backbone_class} | {key: p.default for key, p in parameters.items()} | network
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    if family.kind == "sd3":
        config |= {"caption_projection_dim": dim, "out_channels": config["in_channels"]}
    elif family.kind == "sana":
        heads = config["num_cross_attention_heads"]
        config |= {"cross_attention_dim": dim, "cross_attention_head_dim": dim // heads}
    return config


def build(kind: type[nn.Module], config: dict) -> nn.Module:
    """A network from its config.json. Raises BadInput where that asks for what the network has no code for."""
    for key, value in kind.FIXED.items():
        if config.get(key, value) != value:
            raise BadInput(f"{kind.__name__} knows {key} = {value!r} only, and the configuration has {config[key]!r}")
    accepted = inspect.signature(kind).parameters
    try:
        net = kind(**{key: config[key] for key in accepted if config.get(key) is not None})
    except (TypeError, ValueError) as error:
        raise BadInput(f"{kind.__name__} can't be built from its configuration: {error}") from None
    net.config = config
    return net


def open_part(kind: type[nn.Module], folder: Path, **override) -> tuple[nn.Module, list[Path]]:
    """A network without its weights (on the meta device), and the files that hold them. Names and shapes have been
    compared, and no weight has been read. Raises BadInput."""
    from safetensors import SafetensorError, safe_open

    with torch.device("meta"):
        net = build(kind, read_json(folder / "config.json") | override)
    expected = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    files, found = weight_files(folder), {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except FileNotFoundError:
            raise BadInput(f"{path}, which the index names, is missing: download it again") from None
        except SafetensorError as error:
            raise BadInput(f"{path} is truncated or not a safetensors file ({error}): download it again") from None
    differences = {"missing": expected.keys() - found.keys(), "unexpected": found.keys() - expected.keys()}
    named = [f"{what} {', '.join(sorted(keys)[:3])} ({len(keys)} in all)" for what, keys in differences.items() if keys]
    if named:
        raise BadInput(f"{folder}: the weights don't fit its config.json: {'; '.join(named)}")
    for key, shape in expected.items():
        if found[key] != shape:
            raise BadInput(f"{folder}: {key} has shape {list(found[key])}, its config.json asks for {list(shape)}")
    return net, files


def fill_part(net: nn.Module, files: list[Path], device: str, dtype: torch.dtype) -> nn.Module:
    """open_part's network with its weights, frozen. Each tensor is taken as it comes: memory holds them once."""
    from safetensors import safe_open

    state = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                state[key] = file.get_tensor(key).to(device, dtype, copy=True)
    net.load_state_dict(state, assign=True)
    return net.eval().requires_grad_(False)


def random_part(kind: type[nn.Module], config: dict, device: str, dtype: torch.dtype) -> nn.Module:
    """A network at the size of its configuration, with random weights: made where they live, in the dtype asked for."""
    with torch.device("meta"):
        net = build(kind, config).to(dtype)
    net = net.to_empty(device=device)
    here = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(here):
        torch.manual_seed(0)  # the same ones in every run
        for module in net.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return net.eval().requires_grad_(False)


PARTS = re.compile(r"(transformer|vae|scheduler|(text_encoder|tokenizer)(_\d)?)/[^/]+\.(json|txt|model|safetensors)$")
PIPELINE = re.compile(rf"model_index\.json$|{PARTS.pattern}")
NETWORK = re.compile(r"(transformer/)?(config|diffusion_pytorch_model[^/]*)\.(json|safetensors)$")  # a student's
CLIP_MODEL = re.compile(r"(model[^/]*\.safetensors(\.index\.json)?|[a-z_]+\.json|merges\.txt)$")


def wanted(files: Iterable[str], kind: re.Pattern = PIPELINE) -> list[str]:
    """Of a repository's files those that are read: configurations, vocabularies, and each tensor once. A variant
    (.fp16.) counts where nothing plain is there. kind: PIPELINE, NETWORK or CLIP_MODEL."""
    kept = [f for f in files if kind.match(f)]
    is_weight = re.compile(r".*\.safetensors(\.index.*)?$")
    is_variant = re.compile(r".*\.(fp16|bf16)[.-]")
    plain = {f.rpartition("/")[0] for f in kept if is_weight.match(f) and not is_variant.match(f)}
    return [f for f in kept if not (is_variant.match(f) and f.rpartition("/")[0] in plain)]


def make_room(what: str, folder: Path, needed: int, advice: str) -> None:
    """Makes the folder. Raises BadInput unless `needed` bytes more fit into it."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        size = f"{needed / 1e9:.1f} GB more and {folder} has {free / 1e9:.1f} GB free"
        raise BadInput(f"{what} needs {size}: make room, {advice}")


def fetch(repository: str, kind: re.Pattern = PIPELINE) -> Path:
    """The folder of a Hub repository in huggingface_hub's cache, downloaded as far as it is not there. Raises BadInput.

    HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub; without a network the cache serves.
    """
    import huggingface_hub as hub
    from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    def cached(name: str) -> str | None:
        path = hub.try_to_load_from_cache(repository, name)
        return path if isinstance(path, str) else None

    names = None
    try:
        files = hub.HfApi().model_info(repository, files_metadata=True).siblings
        names = wanted((file.rfilename for file in files), kind)
        new = sum(file.size or 0 for file in files if file.rfilename in names and not cached(file.rfilename))
        cache = Path(hub.constants.HF_HUB_CACHE)
        make_room(repository, cache, new, "or set HF_HOME to a folder on a larger disk")
        return Path(hub.snapshot_download(repository, allow_patterns=names))
    except GatedRepoError:
        advice = "accept its licence on its page on the Hub, then log in (hf auth login) or set HF_TOKEN"
        raise BadInput(f"{repository} is gated: {advice}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise BadInput(f"{repository} is not on the Hub, or is private: check its name, or set HF_TOKEN") from None
    except (OSError, *HfHubHTTPError.__bases__) as error:  # no disk; no network, as requests or httpx tells it
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise BadInput(f"{repository}: the disk is full; make room, or set HF_HOME to another disk") from None
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            advice = "log in again (hf auth login) or set HF_TOKEN"
            raise BadInput(f"{repository}: the Hub refuses the token; {advice}") from None
        for name in ("model_index.json", "transformer/config.json", "config.json"):
            if cached(name) and all(map(cached, names or [])):
                return Path(cached(name)).parents[name.count("/")]
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{repository} is not in the cache and the Hub can't be reached ({reason}): go online") from None


def resolve(name_or_path: str | Path, kind: re.Pattern = PIPELINE) -> Path:
    """The folder of a teacher's name, of a folder's path, or of a Hub repository's id. Raises BadInput."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    name = str(name_or_path)
    if name in NAMES:
        return fetch(NAMES[name].repository, kind)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return fetch(name, kind)
    raise BadInput(f"{name} is no folder, no repository on the Hub and none of the names {', '.join(NAMES)}")


class Teacher:
    """A pretrained flow-matching model with all that goes around its network, in the terms of chapters 1 to 3.

    dit: v = net(x_t, t, cond). Latents are as the losses see them, (z - shift) * scale, unpacked, in float32. The text
    encoders are loaded when the first prompt comes, and leave memory with forget_text(). resolution: pixels a side, or
    (height, width). Made by load_teacher, which can leave the network's weights to load_network().
    """

    fill: Callable[[str, torch.dtype], nn.Module]  # device, dtype -> the network with its weights

    def __init__(self, name: str, folder: Path | None, family: Family, dit: nn.Module, vae: nn.Module, scheduler: dict):
        self.name, self.folder, self.family = name, folder, family
        self.dit, self.vae, self.scheduler = dit, vae, scheduler
        self.scale = vae.config.get("scaling_factor", 1.0)
        self.shift = vae.config.get("shift_factor") or 0.0
        self.weights = next(vae.parameters())  # their dtype and device are everyone's
        # What it was trained at: FLUX's network doesn't say, its autoencoder does.
        latent_size = dit.config.get("sample_size")
        self.resolution = vae.downscale * latent_size if latent_size else vae.config.get("sample_size", 1024)
        self.steps = NAMES[name].steps if name in NAMES else {"sana": 20}.get(family.kind, 28)
        self.text = None

    def load_network(self, device: str) -> nn.Module:
        """dit's weights, straight to a device."""
        self.dit = self.fill(device, self.weights.dtype)
        return self.dit

    def encode_prompts(self, prompts: list[str], max_length: int | None = None) -> dict[str, Tensor]:
        """Prompts to cond (chapter 6 gives shapes), on the teacher's device. max_length: of T5's or Gemma's tokens."""
        if self.folder is None:
            return random_conditions(self.family, prompts, self.weights, max_length)
        if self.text is None:
            device, dtype = self.weights.device, self.weights.dtype
            self.text = TextEncoders(self.folder, self.family.kind, device, dtype, self.instruction)
        return self.text(prompts, max_length)

    @cached_property
    def instruction(self) -> str:
        """What stands before SANA's prompts: diffusers' text, where that is installed, unless another one is set."""
        if self.family.kind != "sana" or self.folder is None:
            return ""
        found = find_instruction()
        if found is None:
            warnings.warn("SANA's prompts go in bare: for its instruction install diffusers, or give a file of it")
        return found or ""

    def forget_text(self) -> None:
        """Frees the text encoders' memory."""
        self.text = None
        gc.collect()
        torch.cuda.empty_cache()

    def times(self, steps: int, resolution: int | tuple[int, int]) -> Tensor:
        """The descending times that the teacher's own pipeline walks, on the Rectified Flow path, with the final 0.

        With r(t) = s t / (1 + (s - 1) t): SD3 and SANA (s = 3) put linspace(1, r(1 / 1000), steps) through r; FLUX puts
        linspace(1, 1 / steps, steps) through r with s = e^mu, mu linear in the number of tokens. A consistency scheduler
        (SANA-Sprint's students) divides the TrigFlow quarter circle, mapped here at equal SNR. For SANA these are the
        Euler scheduler's; its pipeline comes with DPM-Solver++, which walks nearly the same. -> [steps + 1]
        """
        config, s = self.scheduler, self.scheduler.get("shift", self.scheduler.get("flow_shift", 1.0))
        if config.get("_class_name") == "SCMScheduler":
            u = torch.linspace(1.5708, 0, steps + 1, dtype=torch.float64)
            if steps == 2:
                u[1] = 1.3
            return time_at(u.cos(), u.sin(), "rf").float()

        def r(t: Tensor | float) -> Tensor | float:
            return s * t / (1 + (s - 1) * t)

        if config.get("use_dynamic_shifting"):
            _, h, w = self.latent_shape(resolution)
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            s = math.exp(least + (most - least) * (h * w / 4 - low) / (high - low))
        last = 1 / steps if self.family.kind == "flux" else r(1 / 1000)
        t = r(torch.linspace(1, last, steps, dtype=torch.float64))
        return torch.cat([t, torch.zeros(1, dtype=torch.float64)]).float()

    def sample(
        self,
        z: Tensor,
        cond: dict,
        uncond: dict | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """The teacher's own sampling, as its pipeline does it. z ~ N(0, I): [B, C, h, w] -> latents"""
        steps = steps or self.steps
        times = self.times(steps, tuple(self.vae.downscale * n for n in z.shape[-2:]))
        one_of_many = os.environ.get("RANK", "0") != "0"
        with tqdm(total=steps, desc="teacher", unit="step", delay=2, leave=False, disable=one_of_many) as bar:

            def net(*inputs: object, **options: bool):
                bar.update()
                return self.dit(*inputs, **options)

            if self.scheduler.get("_class_name") == "SCMScheduler":
                # Fresh noise between steps, as in few-step generation.
                with torch.no_grad():
                    return generate(net, z, cond, times=times, rng=rng)
            return sample_ode(net, z, cond, uncond, times, guidance)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1], [B, 3, H, W], to latents [B, C, h, w]: the posterior's mode."""
        z = self.vae.encode(images.to(self.weights.device, self.weights.dtype))
        return (widen(z) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images in [-1, 1] (as far as the decoder keeps to it), [B, 3, H, W] in float32. One at a
        time: at 1024 x 1024 each takes more than a gigabyte on the way."""
        z = (latents / self.scale + self.shift).to(self.weights.dtype)
        return torch.cat([widen(self.vae.decode(one)) for one in z.split(1)])

    def latent_shape(self, resolution: int | tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w). Raises BadInput for a resolution that the networks can't take."""
        size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
        unit = self.vae.downscale * self.dit.patch_size
        largest = unit * getattr(self.dit, "max_size", 10**6)
        if any(n < unit or n % unit or n > largest for n in size):
            limit = f" up to {largest}" if hasattr(self.dit, "max_size") else ""
            raise BadInput(f"resolution {size[0]} x {size[1]}: {self.name} takes multiples of {unit}{limit}")
        return self.vae.latent_channels, *(n // self.vae.downscale for n in size)


def condition_shapes(family: Family, tokens: int | None = None) -> dict[str, tuple[int, ...]]:
    """Of one prompt's conditions, with so many tokens of T5 or Gemma."""
    longer = tokens - TEXT_LENGTH[family.kind] if tokens else 0
    return {name: (n + longer * (name != "pooled"), *rest) for name, (n, *rest) in family.conditions.items()}


def random_conditions(family: Family, prompts: list[str], like: Tensor, tokens: int | None = None) -> dict[str, Tensor]:
    """What stands for prompts where there is no text encoder: noise of the right shapes, the same for the same prompt."""
    shapes, rows = condition_shapes(family, tokens), []
    for prompt in prompts:
        rng = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        rows.append({key: torch.randn(shape, generator=rng) for key, shape in shapes.items() if key != "mask"})
    cond = {key: torch.stack([row[key] for row in rows]).to(like) for key in rows[0]}
    if "mask" in shapes:
        cond["mask"] = torch.ones(len(prompts), *shapes["mask"], dtype=torch.int64, device=like.device)
    return cond


def open_pipeline(name_or_path: str | Path) -> tuple[Path, Family, tuple, tuple]:
    """A pipeline's folder, its family, its network and its autoencoder, which are open_part's. Raises BadInput."""
    folder = resolve(name_or_path)
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name", "pipeline without a name")
    if pipeline not in PIPELINES:
        raise BadInput(f"{folder} is a {pipeline}; the pipelines known here are {', '.join(PIPELINES)}")
    for part in (key for key, entry in index.items() if isinstance(entry, list) and entry[0]):
        if PARTS.match(f"{part}/x.json") and not (folder / part).is_dir():
            raise BadInput(f"{folder} lacks {part}, which its model_index.json names: download it again")
    # Sprint's pipeline feeds its network t itself, whatever the configuration says; so do we feed the teachers of Sprint.
    sprint = pipeline == "SanaSprintPipeline" or str(name_or_path).startswith("sana-sprint-")
    family, override = PIPELINES[pipeline], {"timestep_scale": 0.001} if sprint else {}
    dit = open_part(family.backbone, folder / "transformer", **override)
    return folder, family, dit, open_part(family.autoencoder, folder / "vae")


def describe(name_or_path: str | Path, random_weights: bool = False) -> Teacher:
    """What is known of a teacher before any weight is read: its networks are on the meta device, and of a name nothing is
    downloaded. Raises BadInput, for a folder's weights that don't fit their configuration too."""
    name = str(name_or_path)
    if name in NAMES:
        family = PIPELINES[NAMES[name].pipeline]
        with torch.device("meta"):
            dit = build(family.backbone, network_config(family, NAMES[name].network))
            return Teacher(name, None, family, dit, build(family.autoencoder, family.latent), family.scheduler)
    if random_weights:
        raise BadInput(f"random weights need one of the names {', '.join(NAMES)}, not {name}")
    folder, family, (dit, _), (vae, _) = open_pipeline(name)
    return Teacher(name, folder, family, dit, vae, {})


def load_teacher(
    name_or_path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    random_weights: bool = False,
    network: bool = True,
) -> Teacher:
    """A teacher by name (a key of NAMES), from a folder in the diffusers layout, or from a Hub repository.

    random_weights builds a named teacher at its true size without any download: random weights, random conditions.
    network=False leaves its network on the meta device, until load_network() or for a student in its place.
    Raises BadInput for whatever of the network or the autoencoder does not fit, before weights are read.
    """
    name = str(name_or_path)
    if random_weights:
        outline = describe(name, random_weights)
        fill = partial(random_part, type(outline.dit), outline.dit.config)
        vae = random_part(type(outline.vae), outline.vae.config, device, dtype)
        teacher = Teacher(name, None, outline.family, outline.dit, vae, outline.scheduler)
    else:
        folder, family, part, vae = open_pipeline(name)
        scheduler, fill = read_json(folder / "scheduler" / "scheduler_config.json"), partial(fill_part, *part)
        teacher = Teacher(name, folder, family, part[0], fill_part(*vae, device, dtype), scheduler)
    teacher.fill = fill
    if network:
        teacher.weights = next(teacher.load_network(device).parameters())
    return teacher


def as_student(net: nn.Module) -> nn.Module:
    """What differs between FLUX the teacher and its students: a guidance embedding of 1."""
    if isinstance(net, FLUX):
        net.guidance = 1.0
    return net


def open_student(folder_or_hub_id: str | Path, teacher: Teacher) -> Callable[[str], nn.Module]:
    """load_student in two steps: what can't be is refused before any weight is read, and what this returns loads the
    student to a device. Raises BadInput."""
    folder = resolve(folder_or_hub_id, NETWORK)
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config, expected = read_json(folder / "config.json"), teacher.dit.config
    if config.get("_class_name") != expected["_class_name"]:
        raise BadInput(f"{folder} is a {config.get('_class_name')}, and {teacher.name} a {expected['_class_name']}")
    override = {"timestep_scale": expected["timestep_scale"]} if "timestep_scale" in expected else {}
    part = open_part(teacher.family.backbone, folder, **override)
    return lambda device: as_student(fill_part(*part, device, teacher.weights.dtype))


def load_student(folder_or_hub_id: str | Path, teacher: Teacher) -> nn.Module:
    """A student from its folder, from a whole pipeline's folder, or from a Hub repository of either, on the device of the
    teacher's network. Raises BadInput."""
    return open_student(folder_or_hub_id, teacher)(next(teacher.dit.parameters()).device)


# ----------------------------------------------------------------------------------------------------------------------
# 8. Scale: adapters and saved students, memory, many processes, runs that survive
# ----------------------------------------------------------------------------------------------------------------------


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The blocks of a backbone: what is recomputed, gathered and adapted one at a time."""
    return [*net.transformer_blocks, *getattr(net, "single_transformer_blocks", ())]


class AdaptedLinear(nn.Linear):
    """y = W x + b + B A x: a linear layer with shared, frozen weights and a low-rank adapter on it (arXiv 2106.09685). B starts
    at zero, so that the layer starts as the shared one. Raises BadInput for a rank above its width."""

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
    """A network of its own modules on the very weights of `net`, with an adapter on each linear layer of its blocks.

    Teacher, student and fake network so hold one copy of the weights; which adapters are on is which network is called.
    """
    twin = copy.deepcopy(net, {id(x): x for x in (*net.parameters(), *net.buffers())})
    for block in blocks_of(twin):
        for parent in [*block.modules()]:
            for name, layer in [*parent.named_children()]:
                if type(layer) is nn.Linear:
                    setattr(parent, name, AdaptedLinear(layer, rank))
    return twin


def trainable_weights(net: nn.Module) -> list[nn.Parameter]:
    """The weights of a student or fake network that are trained: its adapters, if it has any, else all."""
    adapters = [m for m in net.modules() if isinstance(m, AdaptedLinear)]
    return [w for m in adapters for w in (m.lora_A.weight, m.lora_B.weight)] or [*net.parameters()]


def plain_weights(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A network's tensors under the checkpoint's names, adapters merged, W + B A; and the adapters in the layout of
    diffusers' LoRA files. Of a network that processes share the first one gets all, the others nothing."""
    if processes()[1] > 1:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, adapters = get_model_state_dict(net, options=whole), {}
    else:
        weights, adapters = net.state_dict(), {}
    if weights:
        for name, module in net.named_modules():
            if isinstance(module, AdaptedLinear):
                A, B = (weights.pop(f"{name}.lora_{x}.weight") for x in "AB")
                adapters |= {f"transformer.{name}.lora_A.weight": A.cpu(), f"transformer.{name}.lora_B.weight": B.cpu()}
                W = weights[f"{name}.weight"]
                weights[f"{name}.weight"] = (widen(W) + widen(B) @ widen(A)).to(
                    "cpu", W.dtype
                )  # no second copy on the device
    return weights, adapters


def write(file: Path, content: Callable[[Path], object]) -> None:
    """Written beside and renamed into place: a file is whole or absent. Raises OSError; of a full disk with ENOSPC."""
    part = file.with_name(f".{file.name}.part")
    try:
        content(part)
        part.replace(file)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if re.search(r"os error (28|122)\b|No space left|quota exceeded", str(error)):  # as safetensors tells it
            raise OSError(errno.ENOSPC, "the disk is full") from None
        raise


def write_json(file: Path, content: dict) -> None:
    """As write; what JSON has no form for (paths) as text."""
    text = json.dumps(content, indent=2, default=str) + "\n"
    write(file, lambda part: part.write_text(text, encoding="utf-8"))


def save_student(net: nn.Module, teacher: Teacher | None, folder: str | Path) -> None:
    """Writes a student in the diffusers layout, config.json and safetensors, each file whole or not at all; adapters are
    merged, and kept beside it as the file that diffusers' load_lora_weights reads. Where processes share the network all
    must call this, and the first one writes.

    Floating-point weights are written in the dtype of the teacher's (as they are where teacher is None).
    """
    from safetensors.torch import save_file

    weights, adapters = plain_weights(net)
    if processes()[0] > 0:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = teacher.weights.dtype if teacher else None
    weights = {key: value.to("cpu", dtype).contiguous() for key, value in weights.items()}
    for name, tensors in (("pytorch_lora_weights", adapters), ("diffusion_pytorch_model", weights)):
        file = folder / f"{name}.safetensors"
        if tensors:
            write(file, partial(save_file, tensors, metadata={"format": "pt"}))
        else:  # of a former run
            file.unlink(missing_ok=True)
    write_json(folder / "config.json", net.config)


def recompute_blocks(net: nn.Module) -> None:
    """Activation checkpointing: of each block only the input is kept, and backward runs it again."""
    from torch.utils.checkpoint import checkpoint

    for block in blocks_of(net):
        # A frame that torch.compile can see. Blocks draw nothing, so that no random state need be kept.
        def forward(*inputs: object, original: Callable = block.forward):
            return checkpoint(original, *inputs, use_reentrant=False, preserve_rng_state=False)

        block.forward = forward


def compile_blocks(net: nn.Module) -> None:
    """torch.compile, a block at a time: blocks of one shape share their kernels, so that few are compiled."""
    # Training calls a block with and without gradients of inputs and of weights, at one batch size and at two.
    torch._dynamo.config.recompile_limit = 64
    for block in blocks_of(net):
        block.compile()


class Float32Adam(torch.optim.Optimizer):
    """Adam with beta1 = 0, as in the paper, for weights of low precision.

    bf16 rounds away updates of 1e-5 and less. So behind each bf16 weight stands a float32 copy that takes the update; the weight
    is its rounding. The copy of a float32 weight is the weight itself. The first moment is the gradient and needs no memory.
    accumulate: gradients of several parts of a batch are added up in float32, since sums in bf16 are percents off. (FSDP2 does
    so by itself.) take_step sets found_inf on the device; where it is 1 the step changes nothing.
    """

    def __init__(
        self, weights: Iterable[Tensor], lr: float, beta2: float = 0.999, eps: float = 1e-8, accumulate: bool = False
    ):
        super().__init__(weights, {"lr": lr, "beta2": beta2, "eps": eps, "fused": True})
        for w in (w for group in self.param_groups for w in group["params"]):
            wide = widen(local(w.detach()))
            self.state[w] |= {"exp_avg_sq": torch.zeros_like(wide), "step": wide.new_zeros(())}
            if w.dtype != wide.dtype:
                self.state[w]["copy"] = wide
                if accumulate and local(w) is w:
                    w.register_post_accumulate_grad_hook(self.add_gradient)

    def add_gradient(self, w: Tensor) -> None:
        """Adds the gradient of one part of a batch to the float32 sum, and frees it."""
        self.state[w]["gradient"] = w.grad.float() + self.state[w].get("gradient", 0)
        w.grad = None

    @torch.no_grad()
    def step(self) -> None:
        skipped = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for w in group["params"]:
                state = self.state[w]
                gradient = state.pop("gradient", w.grad)
                if gradient is None:
                    continue
                g, v, wide = widen(local(gradient)), state["exp_avg_sq"], state.get("copy", local(w))
                finite = torch.ones_like(state["step"]) if skipped is None else 1 - skipped
                state["step"] += finite
                v.copy_(torch.where(finite > 0, v + (1 - group["beta2"]) * (g * g - v), v))
                unbiased = v / -torch.expm1(state["step"] * math.log(group["beta2"]))
                update = g / (unbiased.sqrt() + group["eps"])
                wide -= torch.where(finite > 0, group["lr"] * update, 0)
                local(w).copy_(wide)


# Memory


class FusedAttention(torch.autograd.Function):
    """What fused attention keeps for its backward. (On the meta device torch would keep all N x N weights.)"""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y)
        return y


def kept_by_autograd(net: nn.Module, x_t: Tensor, cond: dict) -> tuple[int, int]:
    """Bytes that one evaluation of `net` (on the meta device: nothing is computed) keeps for its backward: with all
    activations, and with recompute_blocks, which keeps the inputs of blocks and one block's activations at a time."""
    weights = {w.untyped_storage()._cdata for w in net.parameters()}
    kept: list[dict] = [{}]  # storages: of what is outside blocks, then of each block
    inputs: dict = {}
    inside = [0]

    def enter_block(block: nn.Module, args: tuple) -> None:
        inputs.update({x.untyped_storage()._cdata: x for x in args if isinstance(x, Tensor)})
        kept.append({})
        inside[0] = len(kept) - 1

    def leave_block(*_: object) -> None:
        inside[0] = 0

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in weights:
            kept[inside[0]][x.untyped_storage()._cdata] = x
        return x

    hooks = [block.register_forward_pre_hook(enter_block) for block in blocks_of(net)]
    hooks += [block.register_forward_hook(leave_block) for block in blocks_of(net)]
    attention = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, mask=None: FusedAttention.apply(q, k, v)
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            net(x_t.requires_grad_(), x_t.new_empty(len(x_t)), cond)
    finally:
        F.scaled_dot_product_attention = attention
        for hook in hooks:
            hook.remove()

    def size(*parts: dict) -> int:
        return sum(x.untyped_storage().nbytes() for x in {key: x for part in parts for key, x in part.items()}.values())

    return size(*kept), size(kept[0], inputs) + max(size(part) for part in kept[1:])


def memory_needed(
    teacher: Teacher,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    rank: int = 0,
    guidance: float = 1.0,
    tokens: int | None = None,
    world: int = 1,
    copies: int = 1,
) -> dict[str, float]:
    """Bytes by part that distillation takes on each device: weights (three networks, the teacher in dtype, what is trained
    in float32), gradients (of one network at a time), Adam's second moments (of two), and the activations of the generator's
    update, "recomputed" as far as recompute_blocks leaves them. teacher: as described. shape: of a batch of latents.
    copies: how often the frozen weights are held."""
    config = teacher.dit.config
    with torch.device("meta"):
        net = build(teacher.family.backbone, config)
        size = sum(p.numel() for p in net.parameters())
        count = sum(p.numel() for p in trainable_weights(adapt(net, rank) if rank else net))
    # Frozen weights, and what FSDP2 gathers, are in dtype; else convolutions of more than 1 x 1 keep cast copies.
    if rank or world > 1:
        net.to(dtype)
    width = config.get("joint_attention_dim") or config["caption_channels"]
    sizes = {name: (n, *[width] * len(rest)) for name, (n, *rest) in condition_shapes(teacher.family, tokens).items()}
    if "pooled" in sizes:
        sizes["pooled"] = (config["pooled_projection_dim"],)
    activations = [0, 0]
    # The generator's graph holds gradients of weights, the two networks behind it of inputs alone.
    for rows, weights_too in ((shape[0], not rank), ((2 if guidance == 1 else 4) * shape[0], False)):
        cond = {name: torch.empty(rows, *of, device="meta", dtype=dtype) for name, of in sizes.items()}
        x_t = torch.empty(rows, *shape[1:], device="meta")
        activations = [a + b for a, b in zip(activations, kept_by_autograd(net.requires_grad_(weights_too), x_t, cond))]
    return {
        "weights": (copies * size * dtype.itemsize + 2 * count * 4) / world,
        "gradients": count * 4 / world,
        "optimiser": 2 * count * 4 / world,
        "activations": float(activations[0]),
        "recomputed": float(activations[1]),
    }


def device_memory(device: str) -> float:
    """Bytes of the device, of the machine for a CPU; infinite where that can't be known."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[1])
    if device == "mps":
        return float(torch.mps.recommended_max_memory())
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else math.inf


# Many processes: torchrun starts them, FSDP2 shards the networks among them


def processes() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    import torch.distributed as dist

    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def join(device: str) -> None:
    """Joins the processes that torchrun started, if it did. On CUDA each has a GPU of its own."""
    if "TORCHELASTIC_RUN_ID" in os.environ and processes()[1] == 1:
        own = torch.device(device, int(os.environ["LOCAL_RANK"])) if device == "cuda" else None
        if own:
            torch.cuda.set_device(own)
        # Long enough for the others to wait while the first process encodes all prompts and images.
        options = {"timeout": timedelta(days=1), "device_id": own}
        torch.distributed.init_process_group("nccl" if own else "gloo", **options)


@contextlib.contextmanager
def agreed(device: str) -> Iterator[None]:
    """What each process does by itself: where it fails in one all leave, and that one says why."""
    went_well = torch.zeros((), device=device)
    try:
        yield
        went_well += 1
    finally:
        if processes()[1] > 1:
            failed = not went_well
            torch.distributed.all_reduce(went_well, torch.distributed.ReduceOp.MIN)
            if not went_well:
                leave()
                if not failed:
                    raise SystemExit(2)


def leave() -> None:
    """Leaves the other processes. Gloo's threads live on, since DTensor's caches keep the group, and need the interpreter
    once more to let go of their last tensors: without the wait they abort a process whose interpreter is ending."""
    torch.distributed.destroy_process_group()
    time.sleep(0.5)


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return x.to_local() if hasattr(x, "to_local") else x


def shard(net: nn.Module, device: str) -> nn.Module:
    """A copy of `net` of which each process holds its part: FSDP2 gathers a block when it is called, and adds gradients up in
    float32 or wider. Trained as `net` is."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    empty = {id(w): nn.Parameter(torch.empty_like(w, device="meta"), requires_grad=False) for w in net.parameters()}
    twin = copy.deepcopy(net, empty)
    sums = torch.promote_types(next(net.parameters()).dtype, torch.float32)
    # Inputs keep their dtypes: times and rotations are float32 whatever the weights are.
    mixed = MixedPrecisionPolicy(reduce_dtype=sums, cast_forward_inputs=False)
    # Also the root lets go of what it gathered: a network that is frozen in one call is trained in the next.
    options = {"mesh": init_device_mesh(device, (processes()[1],)), "mp_policy": mixed, "reshard_after_forward": True}
    for part in (*blocks_of(twin), twin):
        fully_shard(part, **options)
    twin.to_empty(device=device)
    set_model_state_dict(twin, net.state_dict(), options=StateDictOptions(full_state_dict=True))
    return twin


def three_networks(
    teacher: Teacher, start: nn.Module, rank: int | None, device: str, recompute: bool = False, compiled: bool = False
) -> tuple[nn.Module, nn.Module]:
    """The student, from `start`, and the fake network, from the teacher's network: copies, or adapters of this rank on the very
    weights. Where there are many processes, each holds its part of all three, the teacher's network included."""
    student, fake = start, teacher.dit
    if rank:
        student, fake = adapt(student, rank), adapt(fake, rank)
    if processes()[1] > 1:
        teacher.dit, student, fake = (shard(net, device) for net in (teacher.dit, student, fake))
    else:
        student, fake = (copy.deepcopy(net) if net is teacher.dit else net for net in (student, fake))
    if recompute and device == "cuda":
        # With cuDNN's attention training ended there in an illegal memory access (H200, torch 2.11), without it not.
        torch.backends.cuda.enable_cudnn_sdp(False)
    for net in (teacher.dit, student, fake):
        if recompute:
            recompute_blocks(net)
        if compiled:
            compile_blocks(net)
    return as_student(student), fake


# State to resume from: state/ITERATION/RANK-NETWORK.safetensors, of each process, and state/state.json, which names the
# iteration. That file is what makes a state: it is written when all others are, and only then the former ones go.


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer, rng: torch.Generator) -> dict[str, Tensor]:
    """Trained weights and the optimizer's moments, this process's, by name; and the random state."""
    ours, tensors = {id(w) for group in optimizer.param_groups for w in group["params"]}, {":random": rng.get_state()}
    for name, w in net.named_parameters():
        if id(w) in ours:
            entries = {"": w.detach()} | {f":{key}": x for key, x in optimizer.state[w].items()}
            tensors |= {f"{name}{key}": local(x).cpu().contiguous() for key, x in entries.items()}
    return tensors


def save_state(
    folder: Path, iteration: int, settings: dict, nets: dict[str, nn.Module], optimizers: Iterable, rng: torch.Generator
) -> None:
    """Written beside what is there, which stays good until this is whole; a network at a time passes through the machine's
    memory."""
    from safetensors.torch import save_file

    rank, world = processes()
    new = folder / f"{iteration:07d}"
    new.mkdir(parents=True, exist_ok=True)
    for (role, net), optimizer in zip(nets.items(), optimizers):
        write(new / f"{rank}-{role}.safetensors", partial(save_file, state_of(net, optimizer, rng)))
    if world > 1:
        torch.distributed.barrier()
    if rank == 0:
        notes = {"iteration": iteration, "processes": world, "settings": settings}
        write_json(folder / "state.json", notes)
        for old in folder.iterdir():
            if old.is_dir() and old != new:
                shutil.rmtree(old, ignore_errors=True)


def read_state(folder: Path) -> dict:
    """state.json: iteration, processes, settings. Raises BadInput."""
    notes = read_json(folder / "state.json")
    if not {"iteration", "processes", "settings"} <= notes.keys() or "planned" not in notes["settings"]:
        raise BadInput(f"{folder / 'state.json'} is no state of a run: give another --out to start again")
    return notes


def load_state(folder: Path, settings: dict, nets: dict, optimizers: Iterable, rng: torch.Generator) -> int:
    """Puts a state back where save_state took it from, and returns its iteration. Raises BadInput for one of other
    settings, of another number of processes, or that can't be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    rank, world = processes()
    notes = read_state(folder)
    if notes["processes"] != world:
        raise BadInput(f"--resume: the run had {notes['processes']} processes and this one has {world}: start as many")
    former = notes["settings"]
    other = [key for key in settings if settings[key] != former.get(key)]
    other = [
        "other prompts" if key == "inputs" else f"--{key.replace('_', '-')} was {former.get(key)}" for key in other
    ]
    if other:
        raise BadInput(f"--resume: the run in {folder.parent} had other settings: {', '.join(other)}")
    for (role, net), optimizer in zip(nets.items(), optimizers):
        weights = dict(net.named_parameters())
        file = folder / f"{notes['iteration']:07d}" / f"{rank}-{role}.safetensors"
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise OwnTrouble(f"{file} can't be read ({error}): give another --out to start again") from None
        rng.set_state(tensors.pop(":random"))
        with torch.no_grad():
            for key, x in tensors.items():
                name, _, entry = key.partition(":")
                w = weights[name]
                if not entry:
                    local(w).copy_(x)
                elif entry == "step":
                    optimizer.state[w][entry] = x.to(w.device if optimizer.defaults.get("fused") else "cpu")
                else:
                    local(optimizer.state[w].setdefault(entry, torch.zeros_like(w))).copy_(x)
    return notes["iteration"]


@contextlib.contextmanager
def signals() -> Iterator[list[tuple[int, float]]]:
    """The first Ctrl-C or SIGTERM joins a list, to be dealt with when an iteration is done; another one ends the process,
    unless it comes within two seconds: to a process of torchrun's each may come twice."""
    caught: list[tuple[int, float]] = []

    def catch(number: int, frame: object) -> None:
        caught.append((number, time.monotonic()))
        if caught[-1][1] > caught[0][1] + 2:
            signal.signal(number, former[number])
            signal.raise_signal(number)

    former = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def visiting(device: str, *nets: nn.Module) -> Iterator[None]:
    """Networks on the device for a while, then off it: while others train it holds nothing else."""
    for net in nets:
        net.to(device)
    try:
        yield
    finally:
        for net in nets:
            net.to("cpu")


# ----------------------------------------------------------------------------------------------------------------------
# 9. Evaluation: CLIP score, maximum mean discrepancy, diversity
# ----------------------------------------------------------------------------------------------------------------------
# All of it on CLIP's embeddings, of unit length, of a few pictures of each prompt: x is [prompts, seeds, d]. Prompts are
# independent draws and pictures of one prompt are not, so the prompt is what standard errors count.

SEEDS = 4  # pictures of each prompt


def to_pixels(images: Tensor):
    """[B, 3, H, W] in [-1, 1] -> numpy [B, H, W, 3] of bytes."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class CLIP:
    """Embeddings of pictures and of prompts by a CLIP model, which transformers reads: from a folder, or by its id on the
    Hub. Where it computes is where `net` is. Raises BadInput."""

    def __init__(self, name_or_folder: str | Path):
        folder = resolve(name_or_folder, CLIP_MODEL)
        self.net = TextEncoders.open_network("CLIPModel", folder)
        self.prepare = TextEncoders.open("CLIPImageProcessor", folder)  # resizes, crops, normalises
        self.tokenizer = TextEncoders.open("CLIPTokenizer", folder)

    @torch.no_grad()
    def embed(self, pictures: Sequence | None = None, prompts: list[str] | None = None) -> Tensor:
        """Of either pictures, numpy [H, W, 3] of bytes each, or prompts. -> [B, d]"""
        if pictures is not None:
            read, inputs = self.net.get_image_features, self.prepare(images=list(pictures), return_tensors="pt")
        else:
            read, options = self.net.get_text_features, {"padding": True, "truncation": True, "max_length": CLIP_LENGTH}
            inputs = self.tokenizer(prompts, return_tensors="pt", **options)
        x = read(**{key: value.to(self.net.device) for key, value in inputs.items()})
        return F.normalize(x if isinstance(x, Tensor) else x.pooler_output, dim=-1)  # the latter from transformers 5 on


def mmd(x: Tensor, y: Tensor, paired: bool = False, sigma: float = 10.0) -> tuple[float, float]:
    """The squared maximum mean discrepancy E k(x, x') + E k(y, y') - 2 E k(x, y) of a Gaussian kernel, unbiased (so below
    zero at times where the distributions are equal), and its standard error (jackknife).

    k(x, y) = exp(-|x - y|^2 / (2 sigma^2)). x: [P, S, d], y: [Q, T, d], of P and Q independent prompts, 3 or more: a pair
    of samples counts if their prompts differ. paired: y[i] is of the prompt of x[i], so these don't make a pair either.
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:  # means over both prompts' seeds
        b, exact = b.double(), "donot_use_mm_for_euclid_dist"
        rows = (torch.cdist(row.double(), b, compute_mode=exact) for row in a)  # [Q, S, T] each
        return torch.stack([(-row.square() / (2 * sigma**2)).exp().mean((1, 2)) for row in rows])

    # The mean of a symmetric matrix, and that without each row and column; the diagonal doesn't count.
    def off_diagonal(k: Tensor) -> tuple[Tensor, Tensor]:
        n, k = len(k), k - k.diag().diag()
        return k.sum() / (n * (n - 1)), (k.sum() - 2 * k.sum(1)) / ((n - 1) * (n - 2))

    def variance(left_out: Tensor) -> Tensor:
        return (len(left_out) - 1) * left_out.var(correction=0)

    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    if paired:
        value, left_out = off_diagonal(xx + yy - xy - xy.T)
        return value.item(), variance(left_out).sqrt().item()
    (of_x, without_x), (of_y, without_y) = off_diagonal(xx), off_diagonal(yy)
    without_x = without_x - 2 * (xy.sum() - xy.sum(1)) / (xy.numel() - xy.shape[1])
    without_y = without_y - 2 * (xy.sum() - xy.sum(0)) / (xy.numel() - xy.shape[0])
    return (of_x + of_y - 2 * xy.mean()).item(), (variance(without_x) + variance(without_y)).sqrt().item()


def scores(x: Tensor, texts: Tensor, reference: Tensor, paired: bool) -> dict[str, tuple[float, float]]:
    """What pictures are worth, each with its standard error. x: [P, S, d], texts: [P, d], reference: [Q, T, d]

    clip       the cosine between a picture and its prompt
    cmmd       1000 MMD^2 to the reference with sigma = 10 (arXiv 2401.09603, there biased); paired as in mmd
    diversity  the distance between two pictures of one prompt
    """

    def mean(values: Tensor) -> tuple[float, float]:
        return values.mean().item(), (values.std() / len(values) ** 0.5).item()

    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2)) / (x.shape[1] * (x.shape[1] - 1))
    value, error = mmd(x, reference, paired)
    cosine = (x * texts[:, None]).sum(-1).mean(1)
    return {"clip": mean(cosine), "cmmd": (1000 * value, 1000 * error), "diversity": mean(apart)}


MEASURES = {"clip": "CLIP score", "cmmd": "CMMD to the reference", "diversity": "diversity"}  # keys of scores


class Panel:
    """A fixed set of prompts and noises that samplers are measured on. Noise is a function of seed and prompt alone:
    the same for every sampler, and however many processes share the prompts.

    cond_of(i): the condition of prompt i, one row. shape: (C, h, w) of its latents.
    """

    def __init__(self, teacher: Teacher, clip: CLIP, prompts: list[str], cond_of: Callable, shape: tuple, device: str):
        self.teacher, self.clip, self.prompts, self.cond_of = teacher, clip, prompts, cond_of
        self.like = torch.empty(SEEDS, *shape, device=device)
        self.texts = clip.embed(prompts=prompts).cpu()

    @torch.no_grad()
    def draw(self, sampler: Callable, seed: int, title: str) -> tuple[Tensor, list, float]:
        """Of what sampler(z, cond, rng=rng) makes, latents: embeddings [P, S, d], a picture of each prompt of this process,
        seconds a picture (the median over prompts). Where processes share networks all must call this."""
        rank, world = processes()
        count, found, shown, seconds = len(self.prompts), [], [], []
        rounds = -(-count // world)  # some processes may draw a prompt in vain, so that all draw as often
        with tqdm(total=count * SEEDS, desc=title, unit=" images", leave=False, disable=rank > 0) as bar:
            for i in (rank + world * j for j in range(rounds)):
                rng = torch.Generator().manual_seed(random.Random(f"{seed} {i % count}").getrandbits(63))
                z = noise_like(self.like, rng)
                cond = {key: x.expand(SEEDS, *x.shape[1:]) for key, x in self.cond_of(i % count).items()}
                start = time.perf_counter()
                pixels = to_pixels(self.teacher.decode(sampler(z, cond, rng=rng)))
                seconds.append((time.perf_counter() - start) / SEEDS)
                shown.append(pixels[0])
                found.append(self.clip.embed(pixels))
                bar.update(world * SEEDS)
        x = torch.stack(found)
        if world > 1:
            parts = [torch.empty_like(x) for _ in range(world)]
            torch.distributed.all_gather(parts, x)
            x = torch.stack(parts, 1).flatten(0, 1)[:count]
        return x.cpu(), shown, sorted(seconds)[len(seconds) // 2]


# ----------------------------------------------------------------------------------------------------------------------
# 10. Command line
# ----------------------------------------------------------------------------------------------------------------------

GRAMMAR = {  # what prompts are made of where no file is given: {name} stands for one of that line's choices
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
BATCH = 8  # prompts or images that go through an encoder together


def compose(count: int, seed: int) -> list[str]:
    """Prompts from the grammar: objects, attributes, counts, places, styles, lettering."""
    rng = random.Random(seed)

    def expand(name: str) -> str:
        return re.sub(r"{(\w+)}", lambda match: expand(match[1]), rng.choice(GRAMMAR[name].split("|")))

    return [re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", expand("prompt")) for _ in range(count)]


def read_inputs(args: argparse.Namespace) -> tuple[list[str], list[tuple[Path, int]]]:
    """The prompts of --prompts, one a line; or of --data its captions, and the images that they belong to, each with the
    time of its last change; else nothing. Raises BadInput."""
    if args.data and args.prompts:
        raise BadInput("--prompts and --data together: with --data the prompts are its captions")
    if args.prompts:
        prompts = [line.strip() for line in read_text(args.prompts).splitlines() if line.strip()]
        if not prompts:
            raise BadInput(f"{args.prompts} holds no prompt: it needs one a line")
        return prompts, []
    captions = read_captions(args.data) if args.data else {}
    return [*captions.values()], [(image, image.stat().st_mtime_ns) for image in captions]


@lru_cache(maxsize=2)
def shuffled(total: int, key: str) -> list[int]:
    return random.Random(key).sample(range(total), total)


def taken(first: int, count: int, total: int, seed: int) -> list[int]:
    """Which of `total` items come at places first, first + 1, ... of a run: each once a round, in an order that seed and
    round fix, whatever the number of processes."""
    return [shuffled(total, f"{seed} {place // total}")[place % total] for place in range(first, first + count)]


def read_captions(folder: Path) -> dict[Path, str]:
    """Images of a folder with their captions: from metadata.jsonl (file_name, text), else same-named .txt files.
    Raises BadInput."""
    if not folder.is_dir():
        raise BadInput(f"--data {folder} is not a folder")
    captions, index = {}, folder / "metadata.jsonl"
    lines = read_text(index).split("\n") if index.exists() else []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = json.loads(line)
                captions[folder / entry["file_name"]] = entry["text"].strip()
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadInput(f'{index}, line {number}: needs {{"file_name": ..., "text": ...}}') from None
    for image in captions:
        if not image.exists():
            raise BadInput(f"{image}, which {index} names, is missing")
    for image in pictures_in(folder) if not index.exists() else ():
        text = image.with_suffix(".txt")
        if not text.exists():
            raise BadInput(f"{image} has no caption: it needs {text.name} beside it, or an entry in metadata.jsonl")
        captions[image] = read_text(text).strip()
    if not captions:
        raise BadInput(f"--data {folder} holds no images (png, jpg, webp)")
    return captions


def pictures_in(folder: Path) -> list[Path]:
    """The image files of a folder and its folders, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))


def read_pixels(path: Path, resolution: int | None = None):
    """An image, or the largest square in its middle, resized. -> numpy [H, W, 3] of bytes. Raises BadInput."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            if resolution:
                upright = ImageOps.fit(upright, (resolution, resolution), Image.LANCZOS)
            return np.array(upright)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{path} can't be read as an image ({error}): repair or remove it") from None


def read_image(path: Path, resolution: int) -> Tensor:
    """The largest square in the middle of an image, resized. -> [3, resolution, resolution] in [-1, 1]"""
    return torch.from_numpy(read_pixels(path, resolution)).permute(2, 0, 1) / 127.5 - 1


class Cache:
    """What encoders make of each item, computed once and kept on disk: cache[items] is a batch on the device.

    One memory-mapped safetensors file an item, named by a digest of the item and of `key`, which is all else that its
    tensors depend on; written beside and renamed, so that a killed run goes on where it was. Raises BadInput if the disk
    can't hold them, before anything is written.
    """

    def __init__(self, folder: Path, items: Iterable, encode: Callable[[list], dict], key: list, device: str = "cpu"):
        from safetensors.torch import save_file

        names = {item: hashlib.sha256(json.dumps([key, str(item)]).encode()).hexdigest()[:24] for item in items}
        self.files, self.device = {item: folder / f"{name}.safetensors" for item, name in names.items()}, device
        missing = [item for item, file in self.files.items() if not file.exists()]
        title = {"desc": f"encoding {folder.name}", "unit": folder.name.rstrip("s")}
        with tqdm(total=len(missing), disable=not missing, **title) as bar:
            for i in range(0, len(missing), BATCH):
                some = missing[i : i + BATCH]
                rows = {name: x.cpu() for name, x in encode(some).items()}
                if i == 0:
                    needed = sum(x[0].nbytes for x in rows.values()) * len(missing)
                    make_room("the cache", folder, needed, "give fewer prompts or images, or choose another --out")
                for j, item in enumerate(some):
                    row = {name: x[j : j + 1].clone(memory_format=torch.contiguous_format) for name, x in rows.items()}
                    write(self.files[item], partial(save_file, row))
                bar.update(len(some))

    def __getitem__(self, items: list) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        rows = []
        for file in (self.files[item] for item in items):
            try:
                rows.append(load_file(file))
            except SafetensorError:
                raise OwnTrouble(f"{file} is damaged: remove it and start again") from None
        batch = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        if self.device == "cuda":  # from pinned memory the host need not wait for the copy
            batch = {name: x.pin_memory() for name, x in batch.items()}
        return {name: x.to(self.device, non_blocking=self.device == "cuda") for name, x in batch.items()}


def encode_once(
    args: argparse.Namespace, teacher: Teacher, folder: Path, prompts: list[str], images: Sequence = ()
) -> tuple[Cache, Cache]:
    """Conditions of the prompts and of the empty one, and latents of the images, on disk. No text encoder stays in
    memory; where there are more processes, the first encodes and the others find it done."""
    # What tells this teacher's encoders from others: the size and time of each of its files
    files = sorted(teacher.folder.glob("*/*.safetensors")) if teacher.folder else []
    files = [file for file in files if PARTS.match(file.relative_to(teacher.folder).as_posix()) and file.is_file()]
    key = [teacher.name, *([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files), args.dtype]

    def encode_texts(some: list[str]) -> dict[str, Tensor]:
        return teacher.encode_prompts(some, args.tokens)

    def encode_images(some: list[tuple[Path, int]]) -> dict[str, Tensor]:
        return {"x_0": teacher.encode(torch.stack([read_image(file, args.resolution) for file, _ in some]))}

    rank, _ = processes()
    for turn in (rank == 0, rank > 0):
        with agreed(args.device):
            if turn:
                pictures = Cache(folder / "images", images, encode_images, [*key, args.resolution], args.device)
                with warnings.catch_warnings(record=True) as caught:
                    key += [args.tokens, teacher.instruction]
                    texts = Cache(folder / "prompts", ["", *prompts], encode_texts, key, args.device)
    teacher.forget_text()
    if caught and rank == 0:  # not one warning for every few prompts
        more = f" (and {len(caught) - 1} more such warnings)" if caught[1:] else ""
        warnings.warn(f"{caught[0].message}{more}", stacklevel=2)
    return texts, pictures


def pyplot():
    """matplotlib without a screen, in the one style of this project's figures."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 11, "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.dpi": 130}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    plt.rcParams.update(style)
    return plt


def draw_samples(file: Path, rows: dict[str, Sequence], prompts: list[str], title: str = "") -> None:
    """A grid: one row per name, one column per prompt. rows: of pixels, numpy [H, W, 3]"""
    plt = pyplot()
    columns, scale = len(prompts), max(1, len(prompts) / 4)  # of the letters: a wide grid is shown small
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


def draw_losses(file: Path, log: list[dict]) -> None:
    """The run's measurements against the images seen, and their running means."""
    import numpy as np

    plt = pyplot()
    names = {"fisher": "Fisher estimate", "fake_loss": "fake network's loss", "loss": "generator's loss (about 0)"}
    if "discriminator" in log[0]:
        names |= {"discriminator": "discriminator (log 2: tells nothing)", "adversarial": "adversarial"}
    images = np.array([row["images"] for row in log])
    measured = [row for row in log if "scores" in row]
    rows = 2 if measured else 1
    figure, axes = plt.subplots(rows, len(names), figsize=(3.6 * len(names), 3 * rows), squeeze=False)
    width = max(1, len(log) // 20)  # of the running mean
    for ax, (name, label) in zip(axes[0], names.items()):
        y = np.array([row[name] for row in log], dtype=float)
        ax.plot(images, y, ".", ms=2, alpha=0.3, color="tab:blue")
        ax.plot(images[width - 1 :], np.convolve(y, np.ones(width) / width, "valid"), color="tab:blue")
        ax.set_yscale("log" if name == "fisher" and (y > 0).any() else "linear")
        if name == "discriminator":
            ax.axhline(math.log(2), color="0.5", ls=":")
        ax.set_title(label, fontsize=9)
    for ax, (name, label) in zip(axes[-1], MEASURES.items() if measured else ()):
        y, error = np.array([row["scores"][name] for row in measured]).T
        ax.errorbar([row["images"] for row in measured], y, error, marker="o", ms=3, capsize=2, color="tab:orange")
        ax.set_title(f"{label} +- standard error", fontsize=9)
    for ax in axes.flat:
        ax.set(xlabel="images seen", xlim=(0, None), visible=ax.has_data())
    write(file, partial(figure.savefig, format="png"))
    plt.close(figure)


def fail(message: object, status: int = 2) -> NoReturn:
    """One line, of the first process alone unless the trouble is another's own; exit status 2 for bad input."""
    if os.environ.get("RANK", "0") == "0" or isinstance(message, OwnTrouble):
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(status)


def whole_number(text: str) -> int:
    """An argument from 0 to 2^63 - 1, as a seed is."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise ValueError
    return value


def positive_integer(text: str) -> int:
    if not whole_number(text):
        raise ValueError
    return int(text)


def finite_number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


def make_folder(folder: Path) -> None:
    """Raises BadInput if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadInput(f"cannot write to the folder --out {folder}: {error.strerror}") from None


CLAIMED: dict[Path, int] = {}  # folders that this process writes a run to, kept open


def claim(folder: Path) -> None:
    """make_folder, for this process alone until it ends, where the file system knows locks. Raises BadInput if another one
    has it."""
    make_folder(folder)
    if os.name != "posix" or os.environ.get("RANK", "0") != "0" or folder.resolve() in CLAIMED:
        return
    import fcntl

    here = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(here, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"another run is writing to {folder}: choose another --out") from None
    except OSError:
        os.close(here)
    else:
        CLAIMED[folder.resolve()] = here


def say_disk_full(error: OSError) -> NoReturn:
    """The one line of a full disk; any other error goes on."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        raise error
    fail(OwnTrouble("the disk is full: what was saved before is whole"), status=1)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    about = "Distils a flow-matching teacher into a generator of a few steps (SiD-DiT), and samples from both."
    parser = argparse.ArgumentParser(description=about, epilog="Names: " + ", ".join(NAMES))
    parser.error = fail
    add = parser.add_argument
    add("--teacher", required=True, metavar="NAME", help="a name (below), a folder in the diffusers layout or a Hub id")
    add("--student", metavar="FOLDER", help="a student's folder or Hub id: to sample from, or to start training from")
    add("--steps", type=positive_integer, help="K of the student (4); with --sample alone, the teacher's own number")
    add("--resolution", type=positive_integer, help="pixels a side (what the teacher was trained at)")
    add("--guidance", type=finite_number, help="classifier-free, of teacher and fake network (4.5; FLUX 1: none)")
    add("--seed", type=whole_number, default=0, help="of prompts, their order and all noise (%(default)s)")
    add("--out", type=Path, help="the run's folder (runs/NAME, runs/NAME-data); with --sample, a picture's name")
    add("--device", choices=("cuda", "mps", "cpu"), help="(the first of these that is there)")
    add("--dtype", choices=("bf16", "fp32"), help="of all but the trained weights (cuda bf16, else fp32)")
    add("--random-weights", action="store_true", help="the named teacher at its true size, without a download")
    add("--instruction", type=Path, metavar="FILE", help="SANA: the text that stands before every prompt")
    add(
        "--tokens",
        type=positive_integer,
        help="of T5 or Gemma (as the pipeline: 256, 512, 300; the authors train SD3 with 77)",
    )

    add = parser.add_argument_group("distillation").add_argument
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line (composed from a small grammar)")
    add("--data", type=Path, metavar="FOLDER", help="images with captions: adds the adversarial term")
    add("--iters", type=positive_integer, default=2000, help="(%(default)s)")
    add("--batch", type=positive_integer, default=1, help="images of each process at a time (%(default)s)")
    add(
        "--accumulate",
        type=positive_integer,
        default=4,
        help="batches of an iteration (%(default)s; the authors' 256 images)",
    )
    add(
        "--lora",
        type=positive_integer,
        metavar="RANK",
        help="train low-rank adapters on one frozen copy of the weights",
    )
    add("--lr", type=finite_number, help="(1e-6, SANA 5e-6; with --lora ten times that)")
    add("--loss", choices=LOSSES, default="sid", help="of the generator (%(default)s)")
    add("--alpha", type=finite_number, default=1.0, help="of the SiD loss (%(default)s)")
    add("--weight", choices=WEIGHTS, default="1-t", help="w(t) of the SiD or DMD loss (%(default)s)")
    add("--noise", choices=NOISES, default="fresh", help="between the student's steps (%(default)s)")
    add("--save-every", type=positive_integer, default=250, metavar="N", help="iterations between saves (%(default)s)")
    add("--compile", action="store_true", help="torch.compile: minutes at the start, on a GPU faster iterations")
    add("--resume", action="store_true", help="go on where the run in --out was")
    add(
        "--evaluate-every",
        type=positive_integer,
        metavar="N",
        help="measure the student every N iterations, keep the best",
    )

    add = parser.add_argument_group("sampling").add_argument
    add("--sample", action="append", metavar="PROMPT", help="draw this; repeat for more")

    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate", action="store_true", help="a table: the teacher's own sampler, --student at 1, 2 and 4 steps")
    add("--reference", metavar="FOLDER", help="of pictures to be like (the teacher's own samples)")
    add("--num", type=positive_integer, help=f"pictures, {SEEDS} of a prompt (500; with --evaluate-every 64)")
    add("--clip", default="openai/clip-vit-large-patch14", metavar="NAME", help="a folder or Hub id (%(default)s)")

    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    try:
        " ".join(map(str, args.words)).encode()
    except UnicodeEncodeError:
        fail("an argument is not UTF-8")
    if args.evaluate and not args.student:
        fail("--evaluate measures a student: give --student FOLDER")
    if args.evaluate and args.sample:
        fail("--evaluate and --sample together: one at a time")
    return args


def prepare(args: argparse.Namespace, training: bool = False) -> Teacher:
    """The teacher in the dtype asked for, once it is known to fit: its autoencoder on the device, its network on the CPU if
    that is to be trained, else without weights. Puts into args what was left open. Raises BadInput."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    args.device = args.device or next(device for device, present in there.items() if present)
    if not there[args.device]:
        raise BadInput(f"--device {args.device}: this machine has none; give --device cpu, or leave it out")
    if not args.sample:
        join(args.device)
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
    outline = describe(args.teacher, args.random_weights)
    if args.guidance is None:
        args.guidance = 1.0 if outline.dit.config.get("guidance_embeds") else 4.5
    args.recompute = weigh(args, outline, dtype, training)
    # Networks go to their device when the text encoders have left it: in training from the CPU, where processes share them
    # in parts.
    teacher = load_teacher(args.teacher, "cpu", dtype, args.random_weights, network=training)
    teacher.weights = next(teacher.vae.to(args.device).parameters())
    args.resolution = args.resolution or teacher.resolution
    if args.instruction is not None:
        teacher.instruction = read_text(args.instruction).removesuffix("\n")
    return teacher


def weigh(args: argparse.Namespace, outline: Teacher, dtype: torch.dtype, training: bool) -> bool:
    """Says what memory a run takes, by part, before anything is loaded. Raises BadInput where it is more than there is.
    Returns whether blocks must be recomputed for it to fit."""
    world = processes()[1]
    count, have = sum(p.numel() for p in outline.dit.parameters()), device_memory(args.device)
    if args.device == "cpu" and not args.sample:  # which the processes of one machine share
        have /= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    recompute, parts = False, {"weights": count * dtype.itemsize * (2 if args.evaluate else 1)}
    if training:
        shape = (args.batch, *outline.latent_shape(args.resolution or outline.resolution))
        # Adapters of all networks are on one copy, but where processes share them or the student starts elsewhere.
        copies = 1 if not args.lora else 3 if world > 1 else 1 + bool(args.student)
        parts = memory_needed(outline, shape, dtype, args.lora or 0, args.guidance, args.tokens, world, copies)
        if args.accumulate > 1:  # until they are added up, at the last batch, each process has all of them
            parts["gradients"] *= world
        recomputed = parts.pop("recomputed")
        recompute = sum(parts.values()) > 0.85 * have  # the rest is for what no formula sees
        if recompute:
            parts["activations"] = recomputed
    needed = sum(parts.values())
    where = f"{args.device} has" if args.device == "cuda" else "this machine has"
    said = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items()) + ", blocks recomputed" * recompute
    line = f"{args.teacher}, {count / 1e9:.2f} billion weights, takes {needed / 1e9:.1f} GB of memory in {args.dtype} "
    line += f"({said}) besides text encoders and autoencoder; {where} {have / 1e9:.1f} GB"
    if needed > 0.95 * have:  # CUDA itself takes some
        advice = {
            "--dtype bf16": args.dtype == "fp32",
            f"--batch 1 --accumulate {args.batch * args.accumulate}": training and args.batch > 1,
            "--lora 16": training and not args.lora,
            f"--accumulate 1 --batch {args.batch * args.accumulate}": training and world > 1 and args.accumulate > 1,
            "more processes": training,
            "a smaller teacher": True,
        }
        raise BadInput(f"{line}: try {', '.join(text for text, helps in advice.items() if helps)}")
    if needed > 2e9 and processes()[0] == 0:
        print(line, file=sys.stderr)
        if args.device == "cpu" and count > 1e9:
            print("on a CPU this takes hours where a GPU takes minutes", file=sys.stderr)
    return recompute


@torch.no_grad()
def sample(args: argparse.Namespace) -> None:
    """--sample: draws prompts with the teacher, or with a student."""
    from PIL import Image, ImageDraw

    if os.environ.get("RANK", "0") != "0":  # one process draws
        return
    out = args.out or Path("sample.png")
    out = out if out.suffix or out.is_dir() else out.with_suffix(".png")
    if out.is_dir() or out.suffix.lower() != ".png":
        raise BadInput(f"--out {out}: with --sample it is the name of a picture, a .png")
    make_folder(out.parent)
    teacher = prepare(args)
    shape = teacher.latent_shape(args.resolution)
    load = open_student(args.student, teacher) if args.student else teacher.load_network
    steps = args.steps or (4 if args.student else teacher.steps)
    cond = teacher.encode_prompts(args.sample, args.tokens)
    uncond = None if args.student else teacher.encode_prompts([""], args.tokens)
    teacher.forget_text()
    net = load(args.device)
    z = noise_like(torch.empty(len(args.sample), *shape, device=args.device), torch.Generator().manual_seed(args.seed))
    drawn = []
    for i in range(len(z)):
        rng = torch.Generator().manual_seed(args.seed + 1)
        z_i, one = z[i : i + 1], {key: value[i : i + 1] for key, value in cond.items()}
        if args.student:
            x = generate(net, z_i, one, steps, args.noise, rng=rng)
        else:
            x = teacher.sample(z_i, one, uncond, steps, args.guidance, rng)
        drawn += [*to_pixels(teacher.decode(x))]
        image = Image.fromarray(drawn[i])
        if args.random_weights:
            ImageDraw.Draw(image).text((4, 4), "random weights", fill="white", stroke_width=1, stroke_fill="black")
        file = out if len(z) == 1 else out.with_stem(f"{out.stem}-{i + 1}")
        write(file, partial(image.save, format="PNG"))
        print(file)
    if len(z) > 1:
        name = f"{'student' if args.student else 'teacher'}, {steps} steps{', random weights' * args.random_weights}"
        draw_samples(out, {name: drawn}, args.sample)
        print(out)


# What a resumed run may be told otherwise.
PASSING = ("out", "resume", "iters", "save_every", "recompute", "sample", "words")
PASSING += ("evaluate", "evaluate_every", "reference", "num", "clip")
MOST_SKIPPED = 10  # updates in a row


def train(args: argparse.Namespace) -> None:
    """Distils the teacher into a student, and shows how it goes."""
    # What is given, as far as it can be looked at before anything is loaded
    asked = copy.copy(args)
    out = args.out or Path("runs") / (Path(args.teacher).resolve().name + ("-data" if args.data else ""))
    there = (out / "state" / "state.json").is_file()
    if args.resume and not there:
        raise BadInput(f"--resume: {out} holds no state of a run; leave --resume out to start one")
    if there and not args.resume:
        raise BadInput(f"{out} holds the state of a run: --resume goes on with it, another --out starts anew")
    prompts, images = read_inputs(args)
    measure = Measure(args, prompts, 64) if args.evaluate_every else None
    args.planned = args.iters
    if args.resume:
        former = read_state(out / "state")
        if former["iteration"] > args.iters:
            raise BadInput(f"--iters {args.iters}: the run in {out} has had {former['iteration']} already")
        args.planned = former["settings"]["planned"]  # one that is made longer goes on as it began
    prompts = prompts or compose(min(args.planned * args.batch * args.accumulate, 2048), args.seed)
    claim(out)

    # The teacher, and what its encoders make of it
    teacher = prepare(args, training=True)
    rank, world = processes()
    steps = args.steps = args.steps or 4
    shape = (args.batch, *teacher.latent_shape(args.resolution))
    start = load_student(args.student, teacher) if args.student else teacher.dit
    judged = measure.prompts if measure else []
    texts, latents = encode_once(args, teacher, out / "cache", [*prompts, *judged], images)
    uncond = texts[[""]]

    # Three networks, two optimisers
    if world == 1:
        teacher.dit.to(args.device), start.to(args.device)
    torch.manual_seed(args.seed)  # of the adapters
    student, fake = three_networks(teacher, start, args.lora, args.device, args.recompute, args.compile)
    del start  # where processes share the networks, none keeps a whole one
    args.lr = args.lr or (5e-6 if teacher.family.kind == "sana" else 1e-6) * (10 if args.lora else 1)
    optimizers = tuple(
        Float32Adam(trainable_weights(net), args.lr, accumulate=args.accumulate > 1) for net in (student, fake)
    )

    # The state of the run: these, and the source of random numbers
    rng = SharedGenerator(args.device).manual_seed(args.seed)
    rng.rank, rng.world = rank, world
    state = {"student": student, "fake": fake}, optimizers, rng
    settings = {key: value for key, value in vars(args).items() if key not in PASSING}
    settings = json.loads(json.dumps(settings, default=str))
    settings["inputs"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()  # images come with their captions
    first, log = 0, []
    if args.resume:
        with agreed(args.device):
            first = load_state(out / "state", settings, *state)
        log = read_log(out / "log.jsonl", first)

    # What is shown of it: four prompts from the same noise, by the teacher's sampler and by the student
    shown, note = prompts[:4], " (random weights)" if args.random_weights else ""
    picture_rng = torch.Generator().manual_seed(args.seed)
    z, cond = noise_like(torch.empty(len(shown), *shape[1:], device=args.device), picture_rng), texts[shown]
    if measure:
        measure.open(teacher, texts)
    with visiting(args.device, teacher.vae):
        theirs = teacher.decode(teacher.sample(z, cond, uncond, guidance=args.guidance, rng=picture_rng))
    pictures = {f"teacher, {teacher.steps} steps": to_pixels(theirs)}
    if rank == 0:
        write_json(out / "args.json", vars(args))
        write(out / "log.jsonl", lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in log)))

    def save(done: int) -> None:
        picture_rng = torch.Generator().manual_seed(args.seed + 1)
        with visiting(args.device, teacher.vae), torch.no_grad():
            ours = teacher.decode(generate(student, z, cond, steps, args.noise, rng=picture_rng))
        seen = f"{done * each:,} images"
        if not ours.isfinite().all():
            fail(f"diverged after {seen}: try a smaller --lr; {out} has what was saved before", status=1)
        save_student(student, teacher, out / "student")
        save_state(out / "state", done, settings, *state)
        if rank == 0:
            pictures[f"student, {steps} step{'s' * (steps > 1)}"] = to_pixels(ours)
            title = f"{Path(args.teacher).name}{note}, the student after {seen}"
            draw_samples(out / f"samples-{done:06d}.png", pictures, shown, title)
            draw_losses(out / "loss.png", log)

    def batches() -> Iterator[tuple[dict, Tensor | None]]:
        for n in itertools.count(first * args.accumulate):
            picks = taken((n * world + rank) * args.batch, args.batch, len(prompts), args.seed)
            real = latents[[images[i] for i in picks]]["x_0"] if images else None
            yield texts[[prompts[i] for i in picks]], real

    each = world * args.accumulate * args.batch  # images of an iteration
    total = args.iters * each
    options = {"steps": steps, "guidance": args.guidance, "uncond": uncond, "start": first, "rng": rng}
    options |= {key: getattr(args, key) for key in ("loss", "alpha", "weight", "noise", "iters", "accumulate")}
    # The authors' waiting times of the adversarial term, for runs as long as theirs; shorter ones wait a tenth, a fifth.
    planned = args.planned * each
    options["warmup"] = (min(20_000, planned // 10), min(40_000, planned // 5))
    waiting: list[dict] = []  # measurements that are still on the device
    hosts = torch.distributed.new_group(timeout=timedelta(days=1), backend="gloo") if world > 1 else None
    bar = tqdm(total=total, initial=first * each, unit=" images", unit_scale=True, desc=out.name, disable=rank > 0)
    with signals() as stop, bar:
        for measured in distill(teacher.dit, student, fake, optimizers, batches(), shape, **options):
            done = measured["iteration"] + 1
            last = done == args.iters
            if measure and (last or done % args.evaluate_every == 0):
                measured["scores"], *_ = measure(few_step(student, steps, args.noise), "evaluation")
                better = measured["scores"]["cmmd"][0] < min(cmmds([*log, *waiting]), default=math.inf)
                if world > 1:  # one decides for all, as all must save together
                    better = torch.tensor(float(better), device=args.device)
                    torch.distributed.broadcast(better, 0)
                if better:
                    save_student(student, teacher, out / "student-best")
            waiting.append(measured)
            bar.update(each)
            saves = last or done % args.save_every == 0
            halt = torch.tensor(stop[0][0] if stop else 0)
            if world > 1:  # all or none; no host waits for its device here
                torch.distributed.all_reduce(halt, torch.distributed.ReduceOp.MAX, group=hosts)
            # Reading the measurements waits for the device, so that is done seldom.
            if not (len(waiting) == 10 or saves or halt):
                continue
            log += read_measurements(waiting, out / "log.jsonl")
            waiting.clear()
            bar.set_postfix_str(say_progress(log), refresh=False)
            if len(log) >= MOST_SKIPPED and all(row["skipped"] for row in log[-MOST_SKIPPED:]):
                bar.close()
                said = f"{MOST_SKIPPED} updates in a row, up to iteration {done}, were skipped: no finite gradient"
                fail(f"diverged: {said}; try a smaller --lr; {out} has what was saved before", status=1)
            if saves:
                save(done)
            elif halt:
                save_state(out / "state", done, settings, *state)
            if halt and not last:
                bar.close()
                launch = ["torchrun", f"--nproc_per_node={world}", "--"] if world > 1 else ["python"]
                again = shlex.join([*launch, "sid_fm.py", *asked.words, *["--resume"] * (not args.resume)])
                fail(f"stopped after iteration {done}, which is saved. To go on:\n{again}", status=128 + int(halt))
    if rank > 0:
        return
    if measure:
        best = min(cmmds(log), default=math.inf)
        share = measure.seconds / (time.perf_counter() - measure.begun)
        said = f"CMMD {best:.3g} on {len(judged)} prompts; evaluation took {share:.0%} of the time"
        print(f"{out / 'student-best'}: {said}")
    command = ["python", "sid_fm.py", "--teacher", args.teacher, "--student", str(out / "student")]
    for name in ("steps", "resolution", "device", "dtype", "tokens", "noise", "instruction"):
        if getattr(asked, name) not in (None, "fresh"):
            command += [f"--{name}", str(getattr(asked, name))]
    command += [*["--random-weights"] * args.random_weights, "--sample", shown[0]]
    print(f"{out}: samples-*.png, loss.png and the student. To sample from it:\n{shlex.join(command)}")


def read_measurements(waiting: list[dict], file: Path) -> list[dict]:
    """Measurements as numbers, means over the processes, appended to the log; None is what was not finite."""
    names = [name for name, x in waiting[0].items() if isinstance(x, Tensor)]
    values = torch.stack([torch.stack([row[name].float() for name in names]) for row in waiting])
    rank, world = processes()
    if world > 1:
        torch.distributed.all_reduce(values)
    numbers = [[x if math.isfinite(x) else None for x in line] for line in (values / world).tolist()]
    rows = [row | dict(zip(names, line)) for row, line in zip(waiting, numbers)]
    if rank == 0:
        with open(file, "a", encoding="utf-8") as log:
            log.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def read_log(file: Path, iterations: int) -> list[dict]:
    """The log up to an iteration; a kill may have cut its last line."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return [row for row in rows if row["iteration"] < iterations]


def cmmds(rows: list[dict]) -> list[float]:
    """Those that were measured."""
    return [row["scores"]["cmmd"][0] for row in rows if "scores" in row]


def say_progress(log: list[dict]) -> str:
    recent = [row["fisher"] for row in log[-10:] if row["fisher"] is not None]
    fisher = f"Fisher estimate {sum(recent) / len(recent):.3g}" if recent else "no finite Fisher estimate"
    skipped = sum(bool(row["skipped"]) for row in log)
    said = [fisher, *(f"CMMD {x:.3g}" for x in cmmds(log)[-1:]), *[f"{skipped} skipped"] * bool(skipped)]
    return ", ".join(said)


class Measure:
    """What --evaluate and --evaluate-every measure with, made before anything else is loaded: the prompts (the first of
    those given, else composed ones), the pictures of the reference (none: the teacher's own samples) and CLIP. Raises
    BadInput. Once it is open, measure(sampler, title) -> scores, a picture of each prompt, seconds a picture.
    """

    def __init__(self, args: argparse.Namespace, given: list[str], pictures: int):
        count = -(-(args.num or pictures) // SEEDS)
        self.args, self.prompts = args, [*dict.fromkeys(given)][:count] or compose(count, args.seed + 1)
        if len(self.prompts) < 3:
            raise BadInput(f"an evaluation needs 3 prompts or more, not {len(self.prompts)}")
        self.likes = pictures_in(Path(args.reference)) if args.reference else []
        if args.reference and len(self.likes) < 3:
            raise BadInput(f"--reference {args.reference} is no folder of 3 images or more (png, jpg, webp)")
        try:
            self.clip = CLIP(args.clip)
        except BadInput as error:
            raise BadInput(f"{error}, or give --clip the folder of a CLIP model") from None

    def open(self, teacher: Teacher, texts: Cache) -> None:
        """Draws or reads the reference."""
        args, self.begun, self.seconds = self.args, time.perf_counter(), 0.0
        self.own_sampler = partial(teacher.sample, uncond=texts[[""]], guidance=args.guidance)
        shape = teacher.latent_shape(args.resolution)
        with self.visit(teacher):
            self.panel = Panel(teacher, self.clip, self.prompts, lambda i: texts[[self.prompts[i]]], shape, args.device)
            if self.likes:
                with tqdm(self.likes, desc="reference", unit=" images", leave=False, disable=processes()[0] > 0) as bar:
                    self.reference = torch.stack([self.clip.embed([read_pixels(file)]).cpu() for file in bar])
            else:  # with other noise than those that are measured
                self.reference, *_ = self.panel.draw(self.own_sampler, args.seed + 1, "reference")

    @contextlib.contextmanager
    def visit(self, teacher: Teacher) -> Iterator[None]:
        start = time.perf_counter()
        with visiting(self.args.device, teacher.vae, self.clip.net):
            yield
        self.seconds += time.perf_counter() - start

    def __call__(self, sampler: Callable, title: str) -> tuple[dict, list, float]:
        with self.visit(self.panel.teacher):
            x, shown, seconds = self.panel.draw(sampler, self.args.seed, title)
            return scores(x, self.panel.texts, self.reference, paired=not self.likes), shown, seconds


def few_step(net: nn.Module, steps: int, noise: str) -> Callable:
    """A student as what Panel.draw takes."""
    return partial(generate, net, steps=steps, noise=noise)


def evaluate(args: argparse.Namespace) -> None:
    """--evaluate: measures the teacher's own sampler, and a student at 1, 2, 4 steps."""
    out = args.out or Path("runs") / f"{Path(args.teacher).resolve().name}-evaluation"
    measure = Measure(args, read_inputs(args)[0], 500)
    claim(out)
    teacher = prepare(args)
    load = open_student(args.student, teacher)
    prompts, (rank, world) = measure.prompts, processes()
    texts, _ = encode_once(args, teacher, out / "cache", prompts)
    teacher.load_network(args.device)
    student = load(args.device)
    measure.open(teacher, texts)
    samplers = {("teacher", teacher.steps): measure.own_sampler}
    samplers |= {("student", n): few_step(student, n, args.noise) for n in sorted({1, 2, 4, args.steps or 4})}
    rows, drawn, cuda = [], {}, args.device == "cuda"
    for (name, n), sampler in samplers.items():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        found, shown, seconds = measure(sampler, f"{name}, {n} steps")
        peak = torch.cuda.max_memory_allocated() if cuda else None
        rows.append({"model": name, "steps": n, **found, "seconds": seconds, "peak_bytes": peak})
        drawn[f"{name}, {n} step{'s' * (n > 1)}"] = shown[:4]
    if rank > 0:
        return
    like = f"pictures of {args.reference}" if measure.likes else "teacher's own samples from other noise"
    count = f"{SEEDS * len(prompts)} pictures a row, {SEEDS} of a prompt"
    print(f"{count}; reference: the {like}. +-: standard errors")
    print(f"{'':8}  steps {'CLIP score':>17} {'CMMD':>17} {'diversity':>17}  s / picture  peak GB")
    for row in rows:
        line = "".join(f" {row[key][0]:>8.4f} +-{row[key][1]:6.4f}" for key in MEASURES)
        peak = f"{row['peak_bytes'] / 1e9:.1f}" if cuda else ""
        print(f"{row['model']:8} {row['steps']:6} {line} {row['seconds']:12.3f} {peak:>8}")
    notes = {"args": vars(args), "prompts": len(prompts), "rows": rows, "seeds": SEEDS, "torch": torch.__version__}
    write_json(out / "metrics.json", notes)
    title = f"{Path(args.teacher).name}{' (random weights)' * args.random_weights}: the same prompts and noise"
    draw_samples(out / "samples.png", drawn, prompts[::world][:4], title)
    print(f"{out}: metrics.json, samples.png")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends a script with one line on standard error in place of a traceback: exit status 2 for bad input, 130 for Ctrl-C,
    1 for a disk or a device that is full and for a run that diverged (FloatingPointError)."""
    from safetensors import SafetensorError

    try:
        yield
    except BadInput as error:
        fail(error)
    except FloatingPointError as error:
        fail(error, status=1)
    except KeyboardInterrupt:
        fail("stopped: what was saved before is whole", status=130)
    except (OSError, SafetensorError) as error:  # safetensors' error is what a full disk is when it writes
        if isinstance(error, SafetensorError):
            reason = str(error)
        else:
            reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        fail(f"{reason}; what was saved before is whole", status=1)
    except torch.OutOfMemoryError:
        fail("the GPU's memory is full: try a smaller --batch, --resolution or --tokens", status=1)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    warnings.formatwarning = lambda message, *_, **__: f"{message}\n"
    try:
        (sample if args.sample else evaluate if args.evaluate else train)(args)
        if processes()[1] > 1:
            leave()
    except BadInput as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped: what was saved before is whole", status=130)
    except torch.cuda.OutOfMemoryError:
        fail("the GPU's memory is full: try a smaller --batch, --resolution or --tokens", status=1)
    except torch._dynamo.exc.TorchDynamoException as error:
        fail(f"--compile failed ({str(error).strip().splitlines()[0]}): leave it out", status=1)
    except OSError as error:
        say_disk_full(error)


if __name__ == "__main__":
    main()
