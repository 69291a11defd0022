"""Score distillation of flow-matching models (SiD-DiT, arXiv 2509.25127), in one file to read beside the paper.

    1. Paths     one view of diffusion and flow matching: Bayes' rule and conditional expectations  (paper, section 2)
    2. Losses    the fake network's regression, the SiD loss, DMD for comparison, the adversarial pair  (section 3)
    3. Loop      few-step generation, and the one training loop that every script of this project runs

Notation, as in the paper: x_0 is clean data, e ~ N(0, I) noise, x_t = a(t) x_0 + s(t) e the noisy sample.
D(x_t, t) = E[x_0 | x_t] is the posterior mean; f_phi is the teacher's D, f_psi the fake network's, x_g = G_theta(z)
the generator's output. lambda = log(a^2 / s^2) is the log-SNR.

Every network has one face: v = net(x_t, t, cond), the velocity out, t in [0, 1] on the Rectified Flow path, cond a dict
of tensors (batch first) or None. Tensors are [B, ...] and times [B].
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# 1. Paths: Gaussian diffusion and flow matching are one model (paper, section 2)
# ----------------------------------------------------------------------------------------------------------------------
# All that is used: x_t is Gaussian given x_0, and a squared error is minimised by a conditional expectation. No ODE or
# SDE is needed. Then whatever a network is trained to predict is a linear function of x_t and of D(x_t, t).

T_END = {"rf": 1.0, "trig": math.pi / 2, "vp": 1.0, "ve": 80.0}  # vp and ve end before pure noise, a > 0
VP_BETA_MIN, VP_BETA_SLOPE = 0.1, 19.9  # the score SDE's beta(t), from 0.1 to 20


def known(what: str, name: str, choices: Iterable[str]) -> None:
    """Raises ValueError unless `name` is one of `choices`."""
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(choices)}")


def match_dims(t: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], to broadcast over x: [B, ...]."""
    return t.reshape(-1, *[1] * (x.ndim - 1))


def path_terms(t: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a(t), s(t) of x_t = a x_0 + s e, and their time derivatives a', s'. Raises ValueError for an unknown path."""
    known("path", path, T_END)
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
    """The time on `path` whose signal-to-noise ratio is a : s. On vp and ve, times beyond the path's end are clamped."""
    known("path", path, T_END)
    if path == "rf":
        return s / (a + s)
    if path == "trig":
        return torch.atan2(s, a)
    if path == "vp":  # invert B(t), a quadratic
        B = torch.log1p((s / a) ** 2).clamp(max=VP_BETA_MIN + VP_BETA_SLOPE / 2)
        return 2 * B / (VP_BETA_MIN + (VP_BETA_MIN**2 + 2 * VP_BETA_SLOPE * B).sqrt())
    return (s / a).clamp(max=T_END["ve"])


def prediction_row(kind: str, a: Tensor, s: Tensor, da: Tensor, ds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a network may predict is E[p x_0 + q e | x_t]: returns p, q and the determinant a q - s p.

    x0: (1, 0).  eps: (0, 1).  v = E[dx_t/dt | x_t]: (a', s').  score = grad log p_t = -E[e | x_t] / s (Tweedie).
    """
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    rows = {"x0": (one, zero), "eps": (zero, one), "v": (da, ds), "score": (zero, -1 / s)}
    known("prediction", kind, rows)
    p, q = rows[kind]
    return p, q, a * q - s * p


def convert(pred: Tensor, x_t: Tensor, t: Tensor, path: str, src: str, dst: str) -> Tensor:
    """Turn one prediction into another at the same x_t: src, dst in "x0", "eps", "v", "score" (paper, section 2).

    pred = p x_0 + q e together with x_t = a x_0 + s e is a 2 x 2 linear system for (x_0, e); its solution, put into
    dst's row, is Cramer's rule:  dst = [(p_dst q - q_dst p) x_t + (a q_dst - s p_dst) pred] / (a q - s p).

    pred, x_t: [B, ...], t: [B]. At pure noise (a = 0) eps and the score determine nothing else: from them the result is
    infinite or magnified rounding; so is any score at t = 0. Raises ValueError for an unknown path or prediction.
    """
    terms = path_terms(match_dims(t, x_t), path)
    p, q, det = prediction_row(src, *terms)
    p_dst, q_dst, det_dst = prediction_row(dst, *terms)
    if src == dst:
        return pred
    return (p_dst * q - q_dst * p) / det * x_t + det_dst / det * pred


def add_noise(x_0: Tensor, e: Tensor, t: Tensor, path: str = "rf") -> Tensor:
    """x_t = a(t) x_0 + s(t) e.  x_0, e: [B, ...], t: [B]."""
    a, s, _, _ = path_terms(match_dims(t, x_0), path)
    return a * x_0 + s * e


# All losses are one loss: |prediction error|^2 = c(t) |D^ - x_0|^2. So a recipe, which is a path, what is predicted, its
# weight w(t) and how t is drawn, is one density over log-SNR; the minimiser is the same for all of them.

T_MIN = 1e-3  # where uniform times begin: the weight of Rectified Flow, 1 / t^2, has no integral down to 0


class Recipe(NamedTuple):
    """How a network is trained: `predicts` on `path` under the squared error w(t) |error|^2, times drawn from a law.

    law = (mean, std): log(s/a) is normal, which on Rectified Flow is the logit-normal law; None: t uniform on the path.
    """

    path: str = "rf"
    predicts: str = "v"
    law: tuple[float, float] | None = None
    weight: Callable[[Tensor], Tensor] = torch.ones_like


FLOW_MATCHING = Recipe()
SID_LAW = (math.log(2), 1.6)  # the authors' times for both losses: t = sigmoid(n), n ~ N(log 2, 1.6^2)
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
    return (prediction_row(predicts, a, s, da, ds)[2] / s) ** 2


def draw_times(n: int, law: tuple[float, float] | None, path: str = "rf", rng: torch.Generator | None = None) -> Tensor:
    """n times on `path`: log(s/a) ~ N(*law), or uniform between T_MIN and the path's end where law is None. [n]"""
    device = rng.device if rng else None
    if law is None:
        return T_MIN + (T_END[path] - T_MIN) * torch.rand(n, generator=rng, device=device)
    ratio = (law[0] + law[1] * torch.randn(n, generator=rng, device=device)).exp()
    return time_at(torch.ones_like(ratio), ratio, path)


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


# Moving between paths: at equal signal-to-noise ratio the variables of two paths differ by a scale, and D is the same.


def equal_snr(x_t: Tensor, t: Tensor, src: str, dst: str) -> tuple[Tensor, Tensor]:
    """(x_t, t) on path src -> (X_u, u) on path dst with a(t)/s(t) = A(u)/S(u), X_u = (S/s) x_t. Needs t > 0.

    S/s and not A/a, which is 0/0 at pure noise, where generation starts. vp and ve end before pure noise (Rectified Flow
    t = 0.99347 and 0.98765): times beyond are clamped there.
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

    def forward(self, x_t: Tensor, t: Tensor, cond: dict | None = None, **features: bool):
        x_u, u = equal_snr(x_t, t, "rf", self.path)
        out = self.net(x_u, u, cond, **features)
        pred, *hidden = out if features else (out,)
        x_0 = convert(pred, x_u, u, self.path, self.predicts, "x0")
        v = convert(x_0, x_t, t, "rf", "x0", "v")
        return (v, *hidden) if features else v


def as_rectified_flow(net: nn.Module, path: str, predicts: str = "v") -> nn.Module:
    """A network on any path, seen through the equal-SNR map; it shares the parameters of `net`."""
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

    Returns v and, with features=True, the pooled hidden states [B, channels] of the conditional half, which alone the
    adversarial pair judges (else None). One unconditional row in uncond serves the whole batch. Raises ValueError for a
    guidance other than 1 without both cond and uncond.
    """
    plain = guidance == 1
    if not plain:
        if cond is None or uncond is None:
            raise ValueError(f"guidance {guidance} needs cond and uncond")
        x_t, t = torch.cat([x_t, x_t]), torch.cat([t, t])
        cond = {key: torch.cat([cond[key], uncond[key].expand_as(cond[key])]) for key in cond}
    v, hidden = net(x_t, t, cond, features=True) if features else (net(x_t, t, cond), None)
    if plain:
        return v, hidden
    v_cond, v_uncond = v.chunk(2)
    return v_uncond + guidance * (v_cond - v_uncond), hidden if hidden is None else hidden.chunk(2)[0]


def weighted(per_element: Tensor, w: Tensor) -> Tensor:
    """Every loss here: sum over dimensions, weight w(t): [B], mean over the batch. per_element: [B, ...] -> scalar"""
    return (w * per_element.flatten(1).sum(1)).mean()


def flow_matching_loss(pred: Tensor, x_0: Tensor, e: Tensor, t: Tensor, recipe: Recipe = FLOW_MATCHING) -> Tensor:
    """w(t) |pred - target|^2 with the recipe's target: by default |v - (e - x_0)|^2, conditional flow matching.

    It fits a teacher where x_0 is data, and the fake network where x_0 is the generator's samples (detached).
    pred is the network's output at add_noise(x_0, e, t, recipe.path). pred, x_0, e: [B, ...], t: [B] -> scalar
    """
    p, q, _ = prediction_row(recipe.predicts, *path_terms(match_dims(t, x_0), recipe.path))
    return weighted((pred - (p * x_0 + q * e)).square(), recipe.weight(t))


WEIGHTS = {  # w(t) of the generator's loss; where t stands in a denominator, that is clipped at 1e-5
    "1-t": lambda t: 1 - t,
    "(1-t)^2": lambda t: (1 - t) ** 2,
    "1/t": lambda t: 1 / t.clamp(min=1e-5),
    "1/t^2": lambda t: 1 / t.square().clamp(min=1e-5),
    "snr": lambda t: (1 - t) ** 2 / t.square().clamp(min=1e-5),
    "snr_sqrt": lambda t: (1 - t) / t.clamp(min=1e-5),
    "sid": None,  # 1 / mean |x_g - f_phi|, of the sample and not of t alone: the identities of the paper need the latter
}


def loss_weight(weight: str, t: Tensor, x_g: Tensor, d_real: Tensor) -> Tensor:
    """w(t) by name: a key of WEIGHTS, else ValueError. No gradient. t: [B] -> [B]"""
    known("weight", weight, WEIGHTS)
    if weight == "sid":
        return 1 / (x_g - d_real).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return WEIGHTS[weight](t)


def sid_loss(x_g: Tensor, d_real: Tensor, d_fake: Tensor, t: Tensor, alpha: float = 1.0, weight: str = "1-t") -> Tensor:
    """The generator's loss, L_alpha = L2 - alpha L1 (paper, section 3):

        L1 = E[w |f_phi - f_psi|^2],    L2 = E[w (f_phi - f_psi)^T (f_phi - x_g)]

    x_g is the generator's output and d_real = f_phi(x_t, t), d_fake = f_psi(x_t, t) are posterior means at
    x_t = add_noise(x_g, e, t). Keep the graph of all three: the gradient reaches the generator through x_g and through
    the inputs of both networks, whose weights are constants here. At psi* both L1 and L2 equal the Fisher divergence,
    so at alpha = 1 the value hovers around zero and says nothing about convergence: watch L1.
    x_g, d_real, d_fake: [B, ...], t: [B] -> scalar
    """
    difference = d_real - d_fake
    return weighted(difference * ((d_real - x_g) - alpha * difference), loss_weight(weight, t, x_g, d_real))


def dmd_loss(x_g: Tensor, d_real: Tensor, d_fake: Tensor, t: Tensor, weight: str = "1-t") -> Tensor:
    """Distribution matching distillation, for comparison: a scalar whose gradient with respect to each x_g of the batch
    is w (f_psi - f_phi) / B, with nothing flowing through either network. Shapes and weights as in sid_loss."""
    return weighted((d_fake - d_real).detach() * x_g, loss_weight(weight, t, x_g, d_real))


# The adversarial pair of the data-aided loss. The discriminator is the fake network itself: its last hidden states,
# averaged over image tokens, and every channel is a logit.


def judge(features: Tensor, real: bool) -> Tensor:
    """Binary cross-entropy of every channel against the label, logits clamped to +-10. [B, channels] -> [B]"""
    logits = features.clamp(-10, 10)
    return F.softplus(-logits if real else logits).mean(1)


def discriminator_loss(features_real: Tensor, features_fake: Tensor, size: int) -> Tensor:
    """(real + fake) / 2, times the size C H W of a sample, which puts it on the scale of a sum over dimensions."""
    return size * (judge(features_real, True).mean() + judge(features_fake, False).mean()) / 2


def adversarial_loss(features_fake: Tensor, size: int, w: Tensor) -> Tensor:
    """The generator's side: its samples judged as real, with the weight w(t): [B], times the size C H W."""
    return size * (w * judge(features_fake, True)).mean()


# ----------------------------------------------------------------------------------------------------------------------
# 3. Few-step generation and the training loop (paper, section 3)
# ----------------------------------------------------------------------------------------------------------------------

NOISES = ("fresh", "fixed", "ddim")
LOSSES = ("sid", "dmd")


def noise_like(x: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """e ~ N(0, I), drawn where rng lives: a CPU generator gives the same numbers on every device."""
    return torch.randn(x.shape, generator=rng, device=rng.device if rng else x.device, dtype=x.dtype).to(x.device)


def generate(
    net: Callable,
    z: Tensor,
    cond: dict | None = None,
    steps: int = 4,
    noise: str = "fresh",
    stop_after: int | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """x_g = G(z) in K = steps network evaluations, or what the first `stop_after` of them give.

    Step i predicts D at t_i = 1 - i/K and noises it to the next time, x = (1 - t_{i+1}) D + t_{i+1} n, where n is
    `fresh` noise, `fixed` (z again) or `ddim` (the noise that the prediction implies). Only the last step carries
    gradient. Raises ValueError unless 1 <= stop_after <= steps, and for an unknown noise. z: [B, ...] -> [B, ...]
    """
    last = steps if stop_after is None else stop_after
    if not 1 <= last <= steps:
        raise ValueError(f"generate needs 1 <= stop_after <= steps: stop_after is {last}, steps {steps}")
    known("noise", noise, NOISES)
    x_t = z
    for i in range(last):
        t = z.new_full((len(z),), 1 - i / steps)
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == last - 1):
            v = net(x_t, t, cond)
            x_0 = convert(v, x_t, t, "rf", "v", "x0")
        if i < last - 1:
            if noise == "ddim":
                n = convert(v, x_t, t, "rf", "v", "eps")
            else:
                n = z if noise == "fixed" else noise_like(z, rng)
            x_t = add_noise(x_0, n, torch.full_like(t, 1 - (i + 1) / steps))
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
    """The teacher's own sampling: Euler steps of dx/dt = v along descending times that end in 0. z: [B, ...] -> x_0"""
    times = torch.linspace(1, 0, 29) if times is None else times
    x_t = z
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        v, _ = guided(net, x_t, z.new_full((len(z),), t), cond, uncond, guidance)
        x_t = x_t + (t_next - t) * v
    return x_t


def set_trainable(optimizer: torch.optim.Optimizer, flag: bool) -> None:
    """Whether the weights that `optimizer` moves take gradients."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.requires_grad_(flag)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One optimizer step down the gradient of loss."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def distill(
    teacher: nn.Module,
    student: nn.Module,
    fake: nn.Module,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    batches: Iterable[tuple[dict | None, Tensor | None]],
    shape: tuple[int, ...],
    *,
    steps: int = 4,
    loss: str = "sid",
    alpha: float = 1.0,
    weight: str = "1-t",
    noise: str = "fresh",
    guidance: float = 1.0,
    uncond: dict | None = None,
    law: tuple[float, float] | None = SID_LAW,
    iters: int = 1000,
    sid_scale: float = 100.0,
    warmup: tuple[int, int] = (20_000, 40_000),
    rng: torch.Generator | None = None,
) -> Iterator[dict]:
    """The training loop: distils `teacher` into `student`. All three networks start as copies of the teacher.

    optimizers: the student's and the fake network's; Adam with betas (0, 0.999) in the paper. What they do not hold is
    frozen here. batches yields, for each iteration, cond (a dict of tensors or None) and real (data-aided: clean samples
    x_0 of that cond; data-free: None); the loop ends with it, or after `iters`. shape: of a batch of samples, (B, ...).
    law: of the times t of both losses. guidance: "long and short", the same in the fake network's training and in both
    networks of the generator's loss; the generator itself runs without. rng: where all noise, times and k come from.
    The generator's loss is sid_scale L_alpha (against Adam's eps). Data-aided it is (sid_scale L_alpha + adversarial) / 2,
    but the generator waits for the first warmup[0] images, and sees L_alpha alone until warmup[1].

    Yields after each iteration a dict of measurements, as tensors on the device: loss (L_alpha or DMD's), fisher (L1, an
    estimate of the Fisher divergence: the number to watch), fake_loss, and data-aided discriminator and adversarial;
    and the numbers iteration, images (seen so far) and k. Raises ValueError for an unknown loss, weight or noise.
    """
    known("loss", loss, LOSSES), known("weight", weight, WEIGHTS), known("noise", noise, NOISES)
    student_optimizer, fake_optimizer = optimizers
    for net in (teacher, student, fake):
        net.requires_grad_(False)
    set_trainable(student_optimizer, True)
    weights = next(student.parameters())
    like = torch.empty(shape, device=weights.device, dtype=torch.promote_types(weights.dtype, torch.float32))

    def generate_and_noise(cond: dict | None, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_g = generate(student, noise_like(like, rng), cond, steps, noise, stop_after=k, rng=rng)
        e, t = noise_like(like, rng), draw_times(shape[0], law, rng=rng).to(like)
        return x_g, e, t, add_noise(x_g, e, t)

    for iteration, (cond, real) in zip(range(iters), batches):
        images = iteration * shape[0]
        # K = steps: the k-th output of a K-step run, k uniform. The mixture of all steps' outputs is matched to the data.
        k = int(torch.randint(1, steps + 1, (), generator=rng, device=rng.device if rng else None))
        measured = {"iteration": iteration, "images": images + shape[0], "k": k}

        # 1. The fake network learns the generator's distribution: flow matching on its samples. Data-aided, it learns
        #    to tell them from real ones besides.
        set_trainable(fake_optimizer, True)
        with torch.no_grad():
            x_g, e, t, x_t = generate_and_noise(cond, k)
        v, hidden = guided(fake, x_t, t, cond, uncond, guidance, features=real is not None)
        fake_loss = measured["fake_loss"] = flow_matching_loss(v, x_g, e, t)
        if real is not None:
            _, hidden_real = fake(add_noise(real, noise_like(real, rng), t), t, cond, features=True)
            measured["discriminator"] = discriminator_loss(hidden_real, hidden, like[0].numel())
            fake_loss = fake_loss + measured["discriminator"]
        update(fake_optimizer, fake_loss)

        # 2. The generator follows L_alpha, both networks' weights held: gradients pass through their inputs alone.
        set_trainable(fake_optimizer, False)
        x_g, e, t, x_t = generate_and_noise(cond, k)
        if loss == "dmd" and real is None:
            x_t = x_t.detach()  # DMD sends nothing through the networks
        v_real, _ = guided(teacher, x_t, t, cond, uncond, guidance)
        v_fake, hidden = guided(fake, x_t, t, cond, uncond, guidance, features=real is not None)
        d_real, d_fake = (convert(v, x_t, t, "rf", "v", "x0") for v in (v_real, v_fake))
        w = loss_weight(weight, t, x_g, d_real)
        measured["fisher"] = weighted((d_real - d_fake).detach().square(), w)
        if loss == "sid":
            student_loss = sid_loss(x_g, d_real, d_fake, t, alpha, weight)
        else:
            student_loss = dmd_loss(x_g, d_real, d_fake, t, weight)
        measured["loss"] = student_loss
        student_loss = sid_scale * student_loss
        if real is not None:
            measured["adversarial"] = adversarial_loss(hidden, like[0].numel(), w)
            if images >= warmup[1]:
                student_loss = (student_loss + measured["adversarial"]) / 2
        if real is None or images >= warmup[0]:
            update(student_optimizer, student_loss)
        yield {key: value.detach() if isinstance(value, Tensor) else value for key, value in measured.items()}
