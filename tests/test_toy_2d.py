"""toy_2d.py: the derivation's claims, the measures against closed forms, and the script as a user runs it."""

import copy
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

import sid_fm
import toy_2d
from sid_fm import convert
from toy_2d import DATA, LINE, THETA, equal, gradients, line_losses, mean_is_zero, noisy

SCRIPT = Path(toy_2d.__file__)
KINDS = ("x0", "eps", "v", "score")
GAUSSIAN = toy_2d.Mixture(torch.tensor([[0.8]]).double(), 0.5)  # data on a line
ON_A_LINE = {"mixture data": (LINE, THETA), "Gaussian data": (GAUSSIAN, torch.tensor([-0.4, 1.1]).double())}
HIDDEN = tqdm(disable=True)


def main(monkeypatch, *args):
    """The script in this process. Returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["toy_2d.py", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        toy_2d.main()
    return stop.value.code


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def holds(claim):
    _, error, tolerance = claim
    return error <= tolerance


def failed(step, seed=0, **options):
    torch.manual_seed(seed)
    claims = list(step(rng(seed), **options))
    assert claims
    return [claim for claim in claims if not holds(claim)]


# The derivation: each step as the script runs it, and with other settings


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("step", toy_2d.STEPS, ids=lambda step: step.__name__)
def test_every_step_holds(float64, step, seed):
    assert not failed(step, seed)


@pytest.mark.parametrize("path", sid_fm.T_END)
def test_steps_2_to_4_hold_on_every_path(float64, path):
    for seed in range(3):  # Bayes' rule is checked at one time a seed
        assert not failed(toy_2d.step_2_bayes, seed, path=path)
    for kind in KINDS:
        assert not failed(toy_2d.step_3_one_loss, path=path, predicts=kind)
        assert not failed(toy_2d.step_4_paths, path=path, predicts=kind)


@pytest.mark.parametrize("weight", [name for name in sid_fm.WEIGHTS if name != "sid"])
@pytest.mark.parametrize(("data", "theta"), ON_A_LINE.values(), ids=ON_A_LINE)
def test_step_7_holds_for_every_weight_of_t_alone(float64, data, theta, weight):
    assert not failed(toy_2d.step_7_identity, data=data, theta=theta, weight=weight)


@pytest.mark.parametrize(("data", "theta"), ON_A_LINE.values(), ids=ON_A_LINE)
def test_step_8_holds_for_other_data(float64, data, theta):
    assert not failed(toy_2d.step_8_alpha, data=data, theta=theta)


def the_formula(rng, alpha=1.0, weight="1-t"):
    """Claims of the same form as a step's: sid_loss and its gradients, written out."""
    x, phi, psi = inputs = [torch.randn(7, 3, generator=rng).requires_grad_() for _ in range(3)]
    t = sid_fm.sample_times(7, sid_fm.SID_LAW, rng=rng)
    loss, w, d = (
        sid_fm.sid_loss(*inputs, t, alpha, weight),
        sid_fm.loss_weight(weight, t, x, phi)[:, None] / 7,
        phi - psi,
    )
    yield equal("loss", loss, (w * d * (phi - x - alpha * d)).sum())
    slopes = [-w * d, w * (phi - x + (1 - 2 * alpha) * d), w * (x - phi + 2 * alpha * d)]
    yield equal("gradients", torch.stack(torch.autograd.grad(loss, inputs)), torch.stack(slopes))


def held_weights(rng):
    """A claim of the same form: the generator's loss gives no gradient to teacher and fake network."""
    teacher, reached = toy_2d.Net(), []
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3) for net in (student, fake)]
    held = [*teacher.parameters(), *fake.parameters()]
    optimizers[0].register_step_pre_hook(lambda *_: reached.extend(w for w in held if w.grad is not None))
    next(sid_fm.distill(teacher, student, fake, optimizers, [(None, None)] * 2, (8, 2), rng=rng))
    yield "no gradient reaches teacher or fake network", len(reached), 0


@pytest.mark.parametrize("weight", sid_fm.WEIGHTS)
def test_the_loss_is_the_formula_for_every_alpha_and_weight(float64, weight):
    for alpha in (0.0, 0.5, 1.0, 1.2):
        assert not failed(the_formula, alpha=alpha, weight=weight)


def test_no_gradient_of_the_generators_loss_reaches_teacher_or_fake_network(float64):
    assert not failed(held_weights)


@pytest.mark.parametrize("noise", sid_fm.NOISES)
def test_step_10_holds_for_every_number_of_steps(float64, noise):
    for steps in (1, 2, 4):
        for k in range(1, steps + 1):
            assert not failed(toy_2d.step_10_few_steps, steps=steps, noise=noise, k=k)


def scaled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * (1 + 1e-6)


def with_alpha(function):
    return lambda x_g, real, fake, t, alpha=1.0, weight="1-t": function(x_g, real, fake, t, alpha * 1.001, weight)


def with_half_the_gradient(function):
    def loss(x_g, real, fake, t, alpha=1.0, weight="1-t"):
        return function(x_g, (real + real.detach()) / 2, fake, t, alpha, weight)

    return loss


def detached_by_half(function):
    def generate(*args, **kwargs):
        x_g = function(*args, **kwargs)
        return (x_g + x_g.detach()) / 2

    return generate


FAULTS = [
    (toy_2d.step_2_bayes, toy_2d.Mixture, "posterior_mean", lambda f: lambda *args: 0.9 * f(*args)),
    (toy_2d.step_2_bayes, toy_2d, "convert", scaled),
    (toy_2d.step_3_one_loss, toy_2d, "convert", scaled),
    (toy_2d.step_3_one_loss, toy_2d, "loss_factor", scaled),
    (toy_2d.step_4_paths, sid_fm, "equal_snr", lambda f: lambda *args: (f(*args)[0] * (1 + 1e-6), f(*args)[1])),
    (toy_2d.step_4_paths, sid_fm, "as_rectified_flow", lambda f: lambda net, *args: scaled(f(net, *args))),
    (toy_2d.step_6_fake_network, sid_fm, "flow_matching_loss", lambda f: lambda v, x_0, e, t: f(v, 0.9 * x_0, e, t)),
    (toy_2d.step_7_identity, toy_2d.Mixture, "posterior_mean", lambda f: lambda *args: 0.97 * f(*args)),
    (toy_2d.step_7_identity, toy_2d, "sid_loss", with_alpha),
    (toy_2d.step_8_alpha, toy_2d, "sid_loss", with_alpha),
    (toy_2d.step_8_alpha, toy_2d, "sid_loss", with_half_the_gradient),
    (the_formula, sid_fm, "sid_loss", with_alpha),
    (the_formula, sid_fm, "sid_loss", with_half_the_gradient),
    (held_weights, sid_fm, "set_trainable", lambda f: lambda optimizer, flag: f(optimizer, True)),
    (toy_2d.step_9_guidance, sid_fm, "guided", lambda f: lambda *args, guidance: f(*args, guidance=guidance + 1e-6)),
    (toy_2d.step_10_few_steps, toy_2d, "generate", scaled),
    (toy_2d.step_10_few_steps, toy_2d, "generate", detached_by_half),
]


@pytest.mark.parametrize(("step", "home", "name", "fault"), FAULTS, ids=lambda x: getattr(x, "__name__", x))
def test_a_step_notices_a_fault(float64, monkeypatch, step, home, name, fault):
    """A small fault in what the step makes a claim about."""
    monkeypatch.setattr(home, name, fault(getattr(home, name)))
    assert failed(step)


# The derivation: claims that the script leaves to the tests


@pytest.mark.parametrize("path", sid_fm.T_END)
def test_the_velocity_is_a_mean_and_carries_the_density(float64, path):
    """v = E[dx_t/dt | x_t], by weighted samples; and dlog p_t/dt + div v + v . score = 0."""
    _, _, t, x_t = noisy(DATA, 1, rng(), path)
    x_0, (a, s, da, ds) = DATA.sample(100_000, rng(1)), sid_fm.path_terms(t, path)
    e = (x_t - a * x_0) / s
    weight = (-e.square().sum(1) / 2).softmax(0)[:, None]
    v = DATA.predict(x_t, t, path=path)
    assert holds(mean_is_zero("v", weight * (da * x_0 + ds * e - v)))

    _, _, t, x_t = noisy(DATA, 200, rng(), path)
    x_t.requires_grad_(), t.requires_grad_()
    log_p = DATA.log_components(x_t, t, path).logsumexp(1)
    score, dt = torch.autograd.grad(log_p.sum(), (x_t, t))
    v = DATA.predict(x_t, t, path=path)
    divergence = sum(torch.autograd.grad(v[:, i].sum(), x_t, retain_graph=True)[0][:, i] for i in range(2))
    assert holds(equal("continuity", divergence + (v * score).sum(1), -dt))


@pytest.mark.parametrize("name", toy_2d.RECIPES)
def test_sampled_times_follow_a_recipes_density(float64, name):
    """Without weights pi is the law of lambda itself."""
    path, _, law, _ = recipe = toy_2d.RECIPES[name]
    lam = torch.linspace(-40, 40, 400_001)
    density = toy_2d.weight_density(recipe._replace(predicts="x0", weight=torch.ones_like), lam)
    a, s, _, _ = sid_fm.path_terms(sid_fm.sample_times(100_000, law, path, rng()), path)
    samples = (2 * (a / s).log()).clamp(-40, 40)
    for power in (1, 2):
        assert holds(mean_is_zero("lambda", samples**power - torch.trapezoid(density * lam**power, lam)))


@pytest.mark.parametrize("name", [name for name, recipe in toy_2d.RECIPES.items() if recipe.law])
def test_densities_of_log_normal_times_in_closed_form(float64, name):
    """w c is (1 + a/s)^2 on Rectified Flow and 1 + (a/s)^2 for EDM and TrigFlow, and a/s is log-normal."""
    path, _, (m, s), _ = recipe = toy_2d.RECIPES[name]
    lam = torch.linspace(-8, 40, 20_001)  # from the end of EDM's path
    weight = (1 + (lam / 2).exp()) ** 2 if path == "rf" else 1 + lam.exp()
    expected = weight * torch.distributions.Normal(-2 * m, 2 * s).log_prob(lam).exp()
    expected = expected / torch.trapezoid(expected, lam)
    assert holds(equal("pi", toy_2d.weight_density(recipe, lam), expected))


@pytest.mark.parametrize("name", ["DDPM, noise prediction", "Rectified Flow, uniform t"])
def test_a_recipe_moved_to_another_path_has_the_same_density(float64, name):
    """p(u) = p(t) dt/du, by autograd of the equal-SNR map to TrigFlow, where |du/dlambda| = cos u sin u / 2."""
    path, predicts, _, _ = recipe = toy_2d.RECIPES[name]
    lam = torch.linspace(-8, 8, 2001)
    u = torch.atan2((-lam / 4).exp(), (lam / 4).exp()).requires_grad_()
    t = sid_fm.time_at(u.cos(), u.sin(), path)
    (dt_du,) = torch.autograd.grad(t.sum(), u)
    u, t = u.detach(), t.detach()
    moved = toy_2d.loss_factor(t, path, predicts) * dt_du * u.cos() * u.sin() / 2
    assert holds(equal("pi", moved / torch.trapezoid(moved, lam), toy_2d.weight_density(recipe, lam)))


def test_a_density_integrates_to_1_and_is_zero_outside_uniform_times():
    lam = torch.linspace(-80, 40, 120_001).double()
    for recipe in toy_2d.RECIPES.values():
        assert abs(torch.trapezoid(toy_2d.weight_density(recipe, lam), lam) - 1) < 1e-9
    pi = toy_2d.weight_density(toy_2d.Recipe("vp", "eps"), lam)
    low, high = (2 * math.log(a / s) for a, s, _, _ in (sid_fm.path_terms(torch.tensor(t), "vp") for t in (1.0, 1e-3)))
    inside = (lam > low) & (lam < high)
    assert (pi[inside] > 0).all() and not pi[~inside].any()


@pytest.mark.parametrize("path", sid_fm.T_END)
def test_a_density_is_finite_in_float32(path):
    density = toy_2d.weight_density(toy_2d.Recipe(path, "v"), torch.linspace(-10, 10, 9))
    assert density.isfinite().all() and density.max() > 0


def least_squares(X, y, w):
    """argmin of sum w (X theta - y)^2 and its standard errors. X: [n, p], y, w: [n]"""
    inverse = torch.linalg.inv(X.T @ (w[:, None] * X))
    theta = inverse @ (X.T @ (w * y))
    spread = (w * (y - X @ theta))[:, None] * X
    return theta, (inverse @ (spread.T @ spread) @ inverse).diagonal().sqrt()


@pytest.mark.parametrize("name", ["EDM", "Rectified Flow, logit-normal t (SD3)"])
def test_two_recipes_have_one_minimiser(float64, name):
    """For data N(m, sigma^2), D = sigma^2 f_1 + m f_2: a linear model whose weights are (sigma^2, m)."""
    (path, predicts, law, weight), (m, sigma) = toy_2d.RECIPES[name], (0.7, 0.5)
    t = sid_fm.sample_times(100_000, law, path, rng())
    a, s, _, _ = sid_fm.path_terms(t, path)
    x_0, e = torch.randn(2, len(t), generator=rng(1))
    x_0 = m + sigma * x_0
    features = torch.stack([a * (a * x_0 + s * e), s**2], 1) / ((a * sigma) ** 2 + s**2)[:, None]
    theta, error = least_squares(features, x_0, weight(t) * toy_2d.loss_factor(t, path, predicts))
    assert ((theta - torch.tensor([sigma**2, m])).abs() < 5 * error).all()


@pytest.mark.parametrize(("path", "end"), [("trig", 1.0), ("vp", 0.99347), ("ve", 0.98765)])
def test_the_posterior_mean_is_the_same_number_at_equal_snr(float64, path, end):
    t = torch.linspace(0.01, end, 500)
    x_t = sid_fm.add_noise(DATA.sample(500, rng()), torch.randn(500, 2, generator=rng(1)), t)
    x_u, u = sid_fm.equal_snr(x_t, t, "rf", path)
    assert holds(equal("D", DATA.posterior_mean(x_u, u, path), DATA.posterior_mean(x_t, t)))
    # At pure noise the time is clamped to the path's end. D differs by (a/s^2) Cov[x_0] x_t, to first order in a/s.
    x_u, u = sid_fm.equal_snr(x_t, torch.ones(500), "rf", path)
    a, s, _, _ = sid_fm.path_terms(u[:, None], path)
    difference = DATA.posterior_mean(x_u, u, path) - DATA.posterior_mean(x_t, torch.ones(500))
    assert (difference.abs() <= 1e-9 + 1.5 * a / s**2 * x_u.norm(dim=1, keepdim=True)).all()


def fisher_divergence(data, theta, weight="1-t"):
    """E_t w |f_phi - f_psi*|^2 from the two scores, D - D' = (t^2 / (1 - t)) (score - score'), on a grid of x_t."""
    x, total = torch.linspace(-14, 14, 4001)[:, None].requires_grad_(), 0
    for t in toy_2d.TIMES:
        pair = (data, toy_2d.Mixture(theta[:1, None], theta[1]))
        logs = [p.log_components(x, t.expand(len(x))).logsumexp(1) for p in pair]
        score, score_g = (torch.autograd.grad(log.sum(), x)[0][:, 0] for log in logs)
        integrand = logs[1].detach().exp() * (t**2 / (1 - t) * (score - score_g)) ** 2
        total = total + sid_fm.WEIGHTS[weight](t) * torch.trapezoid(integrand, x.detach()[:, 0]) / len(toy_2d.TIMES)
    return total


@pytest.mark.parametrize("weight", ["1-t", "1/t^2"])
@pytest.mark.parametrize(("data", "theta"), ON_A_LINE.values(), ids=ON_A_LINE)
def test_both_losses_are_the_fisher_divergence(float64, data, theta, weight):
    """At psi*; elsewhere L_alpha is (L - gap) / 2 + (1/2 - alpha) L1, for every alpha, and there is a gap."""
    L = fisher_divergence(data, theta, weight)
    assert holds(equal("L", torch.stack(line_losses(data, theta, theta, weight)), L))
    psi = theta + torch.tensor([0.2, 0.15])
    gap = fisher_divergence(toy_2d.Mixture(psi[:1, None], psi[1]), theta, weight)
    L1, L2 = line_losses(data, theta, psi, weight)
    assert gap > 1e-3 * L
    for alpha in (0.0, 0.5, 1.0, 1.2):
        assert holds(equal("L_alpha", L2 - alpha * L1, (L - gap) / 2 + (0.5 - alpha) * L1))


def directions(data, theta):
    """Degrees from the true gradient to that of L_alpha at alpha = 0 and 1, and to that of L1."""
    g = gradients(data, theta)
    others = torch.stack([g["L2"], g["L2"] - g["L1"], g["L1"]])
    return torch.cosine_similarity(others, g["true"][None]).acos().rad2deg().tolist()


@pytest.mark.parametrize(("data", "theta"), ON_A_LINE.values(), ids=ON_A_LINE)
def test_the_naive_loss_points_elsewhere(float64, data, theta):
    """L1's gradient with psi held is a multiple of neither part: 1e-3 is far beyond the quadrature's error."""
    g = gradients(data, theta)
    for other in (g["true"], g["through psi*"]):
        apart = g["L1"] - (g["L1"] @ other) / (other @ other) * other
        assert apart.norm() > 1e-3 * g["L1"].norm()


def test_alpha_1_points_downhill_on_a_grid_of_generators(float64):
    """And L1 alone points uphill for a narrow one, as a one-step student is when it starts."""
    for data, _ in ON_A_LINE.values():
        for theta in itertools.product((-2.0, -0.5, 0.3, 1.7), (0.1, 0.6, 1.4)):
            none, one, _ = directions(data, torch.tensor(theta))
            assert none < 90 and one < 90
        assert directions(data, torch.tensor([0.3, 0.1]))[2] > 90


@pytest.mark.parametrize("theta", [(-0.4, 1.1), (-0.4, 0.3), (1.5, 0.2), (2.0, 1.5)])
def test_what_alpha_1_follows_in_closed_form(float64, theta):
    """For Gaussian data: c, which has the true gradient's sign in m and in s."""
    (m, s), mu, sigma, t = theta, GAUSSIAN.means[0, 0], GAUSSIAN.sigma, toy_2d.TIMES
    a, w, g = 1 - t, 1 - t, gradients(GAUSSIAN, torch.tensor(theta))
    b_phi, b_psi = (a * width**2 / ((a * width) ** 2 + t**2) for width in (sigma, s))  # df/dx_t
    c_m = -w * (mu - m) * (1 - a * b_phi) * (1 - a * b_psi)
    c_s = -w * (b_phi - b_psi) * 2 * a * s * t**2 / ((a * s) ** 2 + t**2)
    c = g["L2"] - g["L1"]
    assert holds(equal("c", c, torch.stack([c_m.mean(), c_s.mean()])))
    assert (c * g["true"] > 0).all()


def test_near_the_data_every_alpha_gives_half_the_true_gradient(float64):
    """At a distance d from the generator that makes the data, L1's gradient is of order d^2, the true one of order d."""
    share = []
    for distance in (1e-2, 1e-3):
        g = gradients(GAUSSIAN, torch.tensor([0.8, 0.5]) + distance * torch.tensor([0.6, 0.8]))
        share.append(float(g["L1"].norm() / g["true"].norm()))
    assert abs(share[0] / share[1] / 10 - 1) < 1e-2


class Guided:
    """In the place of a Mixture: the posterior mean that guidance by 2.5 from N(0, 1) to N(0, 1/4) makes."""

    parts = toy_2d.Mixture(torch.zeros(1, 1).double(), 0.5), toy_2d.Mixture(torch.zeros(1, 1).double(), 1.0)

    def posterior_mean(self, x_t, t):
        narrow, wide = (part.posterior_mean(x_t, t) for part in self.parts)
        return wide + 2.5 * (narrow - wide)


def at_rest(data, theta, alpha):
    """The (m, s) where the gradient of L_alpha is zero, psi held at psi*: Newton's method from theta."""

    def gradient(theta):
        g = gradients(data, theta)
        return g["L2"] - alpha * g["L1"]

    for _ in range(6):
        slopes = [(gradient(theta + h) - gradient(theta - h)) / 2e-4 for h in 1e-4 * torch.eye(2)]
        theta = theta - torch.linalg.solve(torch.stack(slopes, 1), gradient(theta))
    assert gradient(theta).norm() < 1e-9
    return theta


@pytest.mark.parametrize(
    ("data", "start", "minimum", "rest"),
    [(LINE, (0.57, 0.9), 0.895, 0.914), (Guided(), (0.0, 0.13), 0.118, 0.147)],
    ids=["mixture data", "guided"],
)
def test_alpha_1_rests_beside_the_minimum_where_the_data_cannot_be_generated(float64, data, start, minimum, rest):
    for alpha, s in ((0.5, minimum), (1.0, rest)):
        assert float(at_rest(data, torch.tensor(start), alpha)[1]) == pytest.approx(s, abs=5e-4)


def test_a_guided_score_is_that_of_no_noisy_data(float64):
    """At t = 1/2 it is that of a variance of 1/5, less than the noise alone has: 1/4."""
    x_t, t = torch.ones(1, 1), torch.full((1,), 0.5)
    score = convert(Guided().posterior_mean(x_t, t), x_t, t, "rf", "x0", "score")
    assert holds(equal("variance", -1 / score, torch.tensor([[0.2]])))


# Mixtures and measures


@pytest.mark.parametrize("name", toy_2d.MIXTURES)
def test_mixtures_are_densities_and_their_samples_follow_them(name):
    mixture = toy_2d.MIXTURES[name]
    axis = torch.linspace(-4, 4, 401)
    log_p = mixture.log_components(torch.cartesian_prod(axis, axis), torch.zeros(401**2)).logsumexp(1)
    assert abs(torch.trapezoid(torch.trapezoid(log_p.exp().reshape(401, 401), axis), axis) - 1) < 1e-4
    assert holds(mean_is_zero("x_0", mixture.sample(20_000, rng()) - mixture.weights @ mixture.means))


def measure_of(name="ring", samples=20_000, directions=64):
    return toy_2d.MixtureMeasure(toy_2d.MIXTURES[name], torch.randn(samples, 2, generator=rng(1)), directions)


def test_measure_against_closed_forms():
    measure = measure_of()
    mixture, x = measure.mixture, measure.mixture.sample(20_000, rng())
    good = measure.scores(x)
    assert good["w2"] < 0.06 and good["mass_error"] < 0.1
    for n in (3, 4):
        assert abs(good[f"within_{n}_sigma"] - (1 - math.exp(-(n**2) / 2))) < 3e-3 / (n - 2)
    exact = measure.scores(toy_2d.toy_samples(mixture.predict, measure.z, 64))
    assert exact["ratio"] == 1 and good["ratio"] == good["w2"] / exact["w2"]
    # a shift by d adds d^2 / 2 to the squared distance, averaged over directions
    shifted = measure.scores(x + torch.tensor([0.3, -0.4]))["w2"]
    assert abs(shifted - math.sqrt(0.5**2 / 2)) < 0.03
    # without one of its modes, and with one mode's worth of samples at the centre of the ring
    nearest = torch.cdist(x, mixture.means).argmin(1)
    dropped = measure.scores(torch.where((nearest == 3)[:, None], torch.zeros(2), x))
    assert dropped["mass_error"] > 0.8
    assert abs(dropped["within_4_sigma"] - 7 / 8) < 0.02
    moved = measure.scores(torch.where((nearest == 3)[:, None], mixture.means[4], x))
    assert moved["mass_error"] > 0.9


@pytest.mark.parametrize("name", toy_2d.MIXTURES)
def test_quantiles_are_those_of_the_projected_mixture(name):
    measure = measure_of(name, 1001, directions=3)
    mixture = measure.mixture
    for direction, quantiles in zip(measure.directions.T, torch.from_numpy(measure.quantiles)):
        centres = mixture.means @ direction
        cdf = torch.special.ndtr((quantiles[:, None] - centres) / mixture.sigma) @ mixture.weights
        torch.testing.assert_close(cdf, (torch.arange(1001) + 0.5) / 1001, atol=2e-4, rtol=0)


# Training


def test_distillation_moves_the_student_to_the_data():
    """SiD and DMD, one step and few: from the teacher's one-step blur most of the way to the data."""
    measure = measure_of(samples=10_000)

    def w2(net, steps):
        return measure.scores(toy_2d.toy_samples(net, measure.z, steps, "fresh"))["w2"]

    teacher = toy_2d.toy_teacher(measure.mixture, "rf", 500, 0, HIDDEN)
    start = w2(teacher, 1)
    assert start > 0.5
    for options in ({"steps": 1}, {"steps": 2, "alpha": 0.5}, {"steps": 1, "loss": "dmd"}):
        distilled = toy_2d.toy_student(teacher, 250, 0, HIDDEN, **options)
        assert w2(distilled.student, options["steps"]) < start / 4
        fisher = distilled.log["fisher"]
        assert np.mean(fisher[-25:]) < max(fisher) / 4  # rises while the fake network learns, then falls


class Constant(nn.Module):
    """A network of one weight, whose velocity is that weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, cond=None):
        return self.weight.expand_as(x_t)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_distilled_student_has_the_running_mean_of_its_weights(monkeypatch):
    """And a copy of it after 1 and after all iterations, a number an iteration in the log, a tick an iteration on the bar."""
    values = [1.0, 3.0, 2.0]

    def distill(teacher, student, *args, iters, rng, **options):
        assert options == {"alpha": 0.5} and rng.initial_seed() == 7
        for i in range(iters):
            student.weight.data.fill_(values[i])
            zero = torch.zeros(())
            yield {"iteration": i, "images": 4, "k": 1, "fisher": torch.tensor(values[i]), "skipped": zero}

    monkeypatch.setattr(sid_fm, "distill", distill)
    nets, bar = (Constant(), Constant(), Constant()), tqdm(total=3, disable=False, file=open(os.devnull, "w"))  # noqa: SIM115
    distilled = toy_2d.distill_student(*nets, (1e-3, 1e-3), [], (4, 2), 3, 7, bar, alpha=0.5)
    mean = values[0]
    for n, value in enumerate(values[1:], 1):
        mean = mean + 6 / (n + 6) * (value - mean)
    assert distilled.student.weight.item() == pytest.approx(mean, rel=1e-6)
    assert [*distilled.copies] == [1, 2, 3] and distilled.copies[1].weight.item() == values[0]
    log = {"iteration": [0, 1, 2], "images": [4] * 3, "k": [1] * 3, "fisher": values, "skipped": [0] * 3}
    assert distilled.log == log and distilled.fake is nets[2] and bar.n == 3


def test_learning_rates_fall_to_a_fiftieth():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule, rates = toy_2d.cosine(optimizer, 100), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == 1 and rates[50] == pytest.approx(0.5) and rates[-1] == 0.02
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("path", ["trig", "vp", "ve"])
def test_a_teacher_on_any_path_is_a_rectified_flow_network(path):
    measure, z = measure_of(samples=5000, directions=32), torch.randn(5000, 2, generator=rng(1))
    teacher = toy_2d.toy_teacher(measure.mixture, path, 400, 0, HIDDEN)
    assert measure.scores(toy_2d.toy_samples(teacher, z, 16))["w2"] < 0.15


def test_samples_of_a_teacher_are_those_of_eulers_method():
    net, z = toy_2d.Net(), torch.randn(6, 2, generator=rng())
    expected = sid_fm.sample_ode(net, z, times=torch.linspace(1, 0, 9))
    torch.testing.assert_close(toy_2d.toy_samples(net, z, 8), expected)


def test_all_outputs_are_those_of_each_number_of_steps():
    net, z = toy_2d.Net(), torch.randn(6, 2, generator=rng())
    x = toy_2d.toy_samples(net, z, 3, "fixed", all_outputs=True)
    for k in (1, 2, 3):
        part = slice(2 * k - 2, 2 * k)
        torch.testing.assert_close(x[part], sid_fm.generate(net, z[part], None, 3, "fixed", stop_after=k))


# Jobs


def test_jobs_run_two_at_a_time_and_give_their_results():
    meeting = threading.Barrier(2, timeout=30)

    def job(name, bar):
        assert bar.total == 3
        bar.update()
        meeting.wait()  # never passes unless two run at once
        return name

    names = ["a", "b", "c", "d"]
    assert toy_2d.run_jobs({name: (3, partial(job, name)) for name in names}) == {name: name for name in names}


def test_an_error_in_one_job_ends_the_others():
    ended = []

    def endless(bar):
        try:
            while True:
                bar.update()
                time.sleep(0.001)
        finally:
            ended.append(True)

    def fails(bar):
        raise FloatingPointError("a student diverged")

    def never(bar):
        ended.append("ran")

    with pytest.raises(FloatingPointError, match="diverged"):
        toy_2d.run_jobs({"endless": (9, endless), "fails": (9, fails), "waiting": (9, never), "next": (9, never)})
    assert True in ended


# The script


def test_a_short_run_plots_and_tabulates_and_a_seed_fixes_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toy_2d, "TEACHER_ITERS", 400)
    monkeypatch.setattr(toy_2d, "check_all", lambda seed: True)
    tables = []
    for folder in ("a", "b"):
        args = ("--quick", "--iters", 20, "--steps", 2, "--mixture", "grid", "--seed", 3, "--out", tmp_path / folder)
        assert main(monkeypatch, *args) == 0
        tables.append(json.loads((tmp_path / folder / "results.json").read_text())["table"])
    assert tables[0] == tables[1]
    names = {"densities.png", "alpha.png", "samples.png", "convergence.png", "results.json"}
    assert {file.name for file in (tmp_path / "a").iterdir()} == names
    students = [
        "SiD 2-step student, 1 step",
        "SiD 2-step student, 2 steps",
        "SiD 2-step student, all its outputs",
        "SiD 1-step student, 1 step",
        "DMD 1-step student, 1 step",
    ]
    assert [row for row in tables[0] if "student" in row] == students
    out = capsys.readouterr().out
    assert all(f"\n{row} " in out for row in tables[0])


def test_the_sweep_prints_its_tables(monkeypatch, tmp_path, capsys):
    """Each cell has three seeds; a student that skips an update, and one that ends worse than its
    teacher's one step, are counted as diverged."""
    monkeypatch.setattr(toy_2d, "TEACHER_ITERS", 200)
    monkeypatch.setattr(toy_2d, "MixtureMeasure", partial(toy_2d.MixtureMeasure, directions=8))
    seen, student = [], toy_2d.toy_student

    def watched(teacher, iters, seed, bar, **options):
        seen.append((seed, options))
        if options.get("weight") == "snr" and seed == 1:
            raise FloatingPointError("a student diverged")
        run = student(teacher, iters, seed, bar, **options)
        if options.get("loss") == "dmd":
            run.student.last.bias.data += 100
        return run

    monkeypatch.setattr(toy_2d, "toy_student", watched)
    assert main(monkeypatch, "--sweep", "--quick", "--iters", "3", "--out", tmp_path) == 0
    cells = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert [*cells][:2] == ["SiD, alpha = 0.0, 1-t", "SiD, alpha = 0.0, sid"]
    assert len(cells) == 4 * 5 + 3 * 7 and len(seen) == 3 * len(cells)
    assert {seed for seed, _ in seen} == {0, 1, 2}
    assert {"steps": 4, "law": None, "noise": "fresh"} in [options for _, options in seen]
    for name, cell in cells.items():
        failed = 3 if "DMD" in name else 1 if "snr" in name else 0
        assert cell["diverged"] == failed and ("ratio" in cell) == (failed < 3)
    out = capsys.readouterr().out
    assert (tmp_path / "sweep.png").exists() and "123 students of 3 iterations" in out
    text = toy_2d.cell_text(cells["SiD, alpha = 0.0, snr"], ", ")
    assert f"snr  {text}\n".replace("snr  ", "") in out and text.endswith("%, 1 of 3 div.")


def test_a_lagging_fake_network_is_updated_once_and_five_times(monkeypatch, tmp_path, capsys):
    """Four students with about as many evaluations; the rate and the number of updates are those
    that it says."""
    monkeypatch.setattr(toy_2d, "TEACHER_ITERS", 40)
    seen, distill = [], sid_fm.distill

    def watched(*args, **options):
        rates = [optimizer.param_groups[0]["initial_lr"] for optimizer in args[3]]
        seen.append((options["fake_updates"], options["iters"], *rates))
        return distill(*args, **options)

    monkeypatch.setattr(sid_fm, "distill", watched)
    assert main(monkeypatch, "--lag", "--quick", "--iters", "26", "--out", tmp_path) == 0
    rate = toy_2d.RATE
    assert sorted(seen) == [
        (1, 26, rate, rate / 30),
        (1, 26, rate, rate),
        (5, 10, rate, rate / 30),
        (5, 10, rate, rate),
    ]
    students, out = json.loads((tmp_path / "lag.json").read_text()), capsys.readouterr().out
    assert [*students] == ["1 update, keeps up", "1 update, lags", "5 updates, keeps up", "5 updates, lags"]
    for name, rows in students.items():
        assert rows[-1][0] == 130 and re.search(rf"{name} +{rows[-1][1]:.2f} ", out)
    assert (tmp_path / "lag.png").exists()


def test_features_are_what_the_last_layer_sees():
    net = toy_2d.Net()
    x_t, t = torch.randn(5, 2), torch.rand(5)
    v, hidden = net(x_t, t, features=True)
    torch.testing.assert_close(v, net(x_t, t))
    torch.testing.assert_close(net.last(hidden), v)


def test_real_data_have_other_masses_than_the_teacher_s(monkeypatch, tmp_path, capsys):
    """Each scale of the figure is a run of its own, which goes on from the data-free student and its
    fake network, with samples of the even ring."""
    monkeypatch.setattr(toy_2d, "TEACHER_ITERS", 40)
    seen, distill = [], sid_fm.distill

    def watched(*args, **options):
        if "sid_scale" in options:
            (_, (x_0, cond)), weights = next(args[4]), torch.cat([w.flatten() for w in args[2].parameters()])
            masses = toy_2d.MIXTURES["ring"].log_components(x_0, torch.zeros(len(x_0))).softmax(1).mean(0)
            assert cond is None and x_0.shape == (1024, 2) and (8 * masses - 1).abs().max() < 0.5
            seen.append((options["sid_scale"], options["discriminator_scale"], float(weights.sum())))
        return distill(*args, **options)

    monkeypatch.setattr(sid_fm, "distill", watched)
    assert main(monkeypatch, "--data", "--quick", "--iters", "2", "--out", tmp_path) == 0
    scales = sorted((sid, disc) for sid, disc, _ in seen)
    assert scales == sorted([(100, 1), (1, 100), (0.03, 100), (0, 100)])
    assert len({weights for *_, weights in seen}) == 1
    table, out = json.loads((tmp_path / "data.json").read_text())["table"], capsys.readouterr().out
    assert len(table) == 3 + len(scales) and all(f"{name} " in out for name in table)
    assert (tmp_path / "data.png").exists()


def test_a_run_that_diverges_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toy_2d, "TEACHER_ITERS", 40)
    monkeypatch.setattr(toy_2d, "check_all", lambda seed: True)
    monkeypatch.setattr(sid_fm, "sid_loss", lambda x_g, *args: x_g.sum() * math.nan)
    assert main(monkeypatch, "--quick", "--iters", "5", "--out", tmp_path) == 1
    err = capsys.readouterr().err
    assert "a student diverged at iteration 1 (" in err and "loss sid" in err and "Traceback" not in err


def test_check_alone_reports_and_a_failed_claim_is_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr(toy_2d, "STEPS", [toy_2d.step_10_few_steps])
    assert main(monkeypatch, "--check") == 0
    assert "2 of 2 hold" in capsys.readouterr().out

    def step_1(rng):
        yield "pigs fly", math.nan, 1.0

    monkeypatch.setattr(toy_2d, "STEPS", [step_1])
    assert main(monkeypatch, "--check") == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--steps", "0"), "--steps 0: needs a whole number, 1 or more"),
        (("--iters", "-3"), "--iters"),
        (("--seed", "99999999999999999999"), "--seed"),
        (("--alpha", "nan"), "--alpha nan: needs a finite number"),
        (("--alpha", "one"), "--alpha: invalid float value"),
        (("--check", "--sweep"), "not allowed with"),
        (("--data", "--mixture", "grid"), "leave --mixture out"),
        (("--mixture", "square"), "invalid choice: 'square'"),
        (("--colour",), "unrecognized arguments: --colour"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(monkeypatch, capsys, args, says):
    assert main(monkeypatch, *args) == 2
    out, err = capsys.readouterr()
    assert says in err and err.startswith("toy_2d.py: ") and err.count("\n") == 1 and not out


def test_a_folder_that_cannot_be_made_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(toy_2d, "check_all", lambda seed: True)
    assert main(monkeypatch, "--out", os.devnull) in (1, 2)
    err = capsys.readouterr().err
    assert os.devnull in err and err.count("\n") == 1


def test_ctrl_c_ends_at_once_and_keeps_what_was_plotted(tmp_path):
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a shell's background job ignore it
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, former)
    deadline = time.monotonic() + 60
    while not (tmp_path / "alpha.png").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)  # by now it trains the teacher
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)  # the run would take longer
    assert process.returncode == 130
    assert "toy_2d.py: stopped" in errors and "Traceback" not in errors
    assert {file.name for file in tmp_path.iterdir()} == {"densities.png", "alpha.png"}


def test_a_full_disk_is_one_line(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(toy_2d, "plot_densities", full)
    monkeypatch.setattr(toy_2d, "check_all", lambda seed: True)
    assert main(monkeypatch, "--quick", "--out", tmp_path) == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and err.count("\n") == 1
