"""toy_2d.py: every claim of the derivation, the measures against closed forms, and the script as a user runs it."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import sid_fm
import toy_2d

SCRIPT = Path(toy_2d.__file__)


def main(monkeypatch, *args):
    """The script in this process. Returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["toy_2d.py", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        toy_2d.main()
    return stop.value.code or 0


@pytest.mark.parametrize("check", toy_2d.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_derivation(check, seed):
    results = toy_2d.run_check(check, seed)
    assert results and not [result for result in results if not result.ok]


def scaled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * (1 + 1e-9)


def with_slope(function):
    def terms(t, path):
        a, s, da, ds = function(t, path)
        return a, s, da * 1.1, ds

    return terms


def with_alpha(function):
    return lambda x_g, real, fake, t, alpha=1.0, weight="1-t": function(x_g, real, fake, t, alpha * 1.001, weight)


def with_half_the_gradient(function):
    def loss(x_g, real, fake, t, alpha=1.0, weight="1-t"):
        return function(x_g, (real + real.detach()) / 2, fake, t, alpha, weight)

    return loss


FAULTS = [
    (toy_2d.check_posterior_mean, toy_2d, "path_terms", with_slope),
    (toy_2d.check_tweedie, toy_2d, "convert", scaled),
    (toy_2d.check_convert, toy_2d, "convert", scaled),
    (toy_2d.check_loss_factors, toy_2d, "convert", scaled),
    (toy_2d.check_weight_density, toy_2d, "weight_density", lambda f: lambda recipe, lam: f(recipe, lam + 0.01)),
    (toy_2d.check_weight_density, toy_2d, "sample_times", lambda f: lambda *args: 0.98 * f(*args)),
    (toy_2d.check_equal_snr, sid_fm, "equal_snr", lambda f: lambda *args: (f(*args)[0] * (1 + 1e-9), f(*args)[1])),
    (toy_2d.check_equal_snr, sid_fm, "as_rectified_flow", lambda f: lambda net, *args: scaled(f(net, *args))),
    (toy_2d.check_score_identity, toy_2d.Mixture, "posterior_mean", lambda f: lambda *args: 0.97 * f(*args)),
    (toy_2d.check_three_forms, toy_2d, "sid_loss", with_alpha),
    (toy_2d.check_lagging_fake, toy_2d, "sid_loss", with_alpha),
    (toy_2d.check_gradients, toy_2d, "sid_loss", with_alpha),
    (toy_2d.check_gradients, toy_2d, "sid_loss", with_half_the_gradient),
    (toy_2d.check_fake_network, toy_2d, "flow_matching_loss", lambda f: lambda v, x_0, e, t: f(v, 0.9 * x_0, e, t)),
    (toy_2d.check_sid_loss, toy_2d, "sid_loss", with_alpha),
    (toy_2d.check_sid_loss, toy_2d, "sid_loss", with_half_the_gradient),
    (toy_2d.check_generate, toy_2d, "generate", scaled),
]


@pytest.mark.parametrize(
    ("check", "home", "name", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_check_fails_on_a_fault(monkeypatch, check, home, name, fault):
    """Each check notices a small fault in what it makes a claim about."""
    monkeypatch.setattr(home, name, fault(getattr(home, name)))
    assert [result for result in toy_2d.run_check(check) if not result.ok]


def test_weight_density_is_zero_outside_a_uniform_law():
    lam = torch.tensor([-80.0, 0.0, 2 * math.log(1 / sid_fm.T_MIN)])
    pi = toy_2d.weight_density(toy_2d.FLOW_MATCHING, lam)
    assert pi[0] == 0 and pi[1] > 0 and pi[2] == 0


@pytest.mark.parametrize("path", sid_fm.T_END)
def test_a_density_is_finite_in_float32(path):
    density = toy_2d.weight_density(toy_2d.Recipe(path, "v"), torch.linspace(-10, 10, 9))
    assert density.isfinite().all() and density.max() > 0


@pytest.mark.parametrize("name", toy_2d.MIXTURES)
def test_mixtures_are_densities_and_their_samples_follow_them(name):
    mixture = toy_2d.MIXTURES[name]()
    axis = torch.linspace(-2, 2, 801)
    density = mixture.log_prob(torch.cartesian_prod(axis, axis), torch.zeros(801**2)).exp().reshape(801, 801)
    assert abs(torch.trapezoid(torch.trapezoid(density, axis), axis) - 1) < 1e-4
    x = mixture.sample(20_000, torch.Generator().manual_seed(0))
    mean = mixture.weights @ mixture.means
    assert ((x.mean(0) - mean).abs() < 5 * x.std(0) / 20_000**0.5).all()


def test_measure_against_closed_forms():
    mixture, rng = toy_2d.ring(), torch.Generator().manual_seed(0)
    measure = toy_2d.Measure(mixture, 20_000, directions=64)
    x = mixture.sample(20_000, rng)
    good = measure(x)
    assert good["w2"] < 0.03 and good["modes"] == 8 and good["mass_error"] < 0.1
    assert abs(good["within_4_sigma"] - (1 - math.exp(-8))) < 5e-4
    # a shift by d adds d^2 / 2 to the squared distance, averaged over directions
    shifted = measure.sliced_w2(x + torch.tensor([0.3, -0.4]))
    assert abs(shifted - math.sqrt(0.5**2 / 2)) < 0.03
    # without one of its modes, and with one mode's worth of samples at the centre of the ring
    nearest = torch.cdist(x, mixture.means).argmin(1)
    dropped = measure(torch.where((nearest == 3)[:, None], torch.zeros(2), x))
    assert dropped["modes"] == 8 - (dropped["mass_error"] > 0.9)
    assert abs(dropped["within_4_sigma"] - 7 / 8) < 0.02
    moved = measure(torch.where((nearest == 3)[:, None], mixture.means[4], x))
    assert moved["modes"] == 7 and moved["mass_error"] > 0.9


def test_quantiles_are_those_of_the_projected_mixture():
    mixture = toy_2d.MIXTURES["unequal"]()
    measure = toy_2d.Measure(mixture, 1001, directions=3)
    for direction, quantiles in zip(measure.directions.T, torch.from_numpy(measure.quantiles)):
        centres = mixture.means @ direction
        cdf = torch.special.ndtr((quantiles[:, None] - centres) / mixture.sigma) @ mixture.weights
        torch.testing.assert_close(cdf, (torch.arange(1001) + 0.5) / 1001, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["power law", "exponential"])
def test_fit_decay_tells_one_from_the_other(kind):
    x = np.geomspace(1, 1000, 40)
    y = 0.01 + (x**-0.8 if kind == "power law" else np.exp(-x / 150))
    fits = toy_2d.fit_decay(x, y)
    assert min(fits, key=lambda name: fits[name].error) == kind
    assert fits[kind].error < 0.05 < max(fit.error for fit in fits.values())


def test_distillation_moves_the_student_to_the_data():
    """SiD and DMD, one step and few: from the teacher's one-step blur most of the way to the data."""
    mixture, ticks = toy_2d.ring(), []
    teacher = toy_2d.train_teacher(mixture, "rf", 500, 0, ticks.append)
    assert len(ticks) == 500
    measure = toy_2d.Measure(mixture, 10_000, directions=64)
    z = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(1))
    start = measure.sliced_w2(toy_2d.in_chunks(toy_2d.few_step(teacher, 1), z))
    assert start > 0.5
    for options in ({"steps": 1}, {"steps": 2, "alpha": 0.5}, {"steps": 1, "loss": "dmd"}):
        student, fisher, copies = toy_2d.distil(teacher, 250, 0, ticks.append, **options)
        assert measure.sliced_w2(toy_2d.in_chunks(toy_2d.few_step(student, options["steps"]), z)) < start / 4
        assert len(fisher) == 250 and max(copies) == 250
        assert np.mean(fisher[-25:]) < max(fisher) / 4  # rises while the fake network learns, then falls


@pytest.mark.parametrize("path", ["trig", "vp", "ve"])
def test_a_teacher_on_any_path_is_a_rectified_flow_network(path):
    mixture = toy_2d.ring()
    teacher = toy_2d.train_teacher(mixture, path, 400, 0, lambda loss: None)
    z = torch.randn(5000, 2, generator=torch.Generator().manual_seed(1))
    x = toy_2d.in_chunks(toy_2d.euler(teacher, 16), z)
    assert toy_2d.Measure(mixture, 5000, directions=32).sliced_w2(x) < 0.15


def test_a_short_run_draws_and_tabulates_and_a_seed_fixes_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toy_2d, "TEACHER_ITERS", 400)
    monkeypatch.setattr(toy_2d, "check_all", lambda seed: True)
    tables = []
    for folder in ("a", "b"):
        args = (
            "--quick",
            "--iters",
            "20",
            "--steps",
            "2",
            "--mixture",
            "grid",
            "--out",
            tmp_path / folder,
            "--seed",
            "3",
        )
        assert main(monkeypatch, *args) == 0
        tables.append(json.loads((tmp_path / folder / "results.json").read_text())["table"])
    assert tables[0] == tables[1]
    names = {"densities", "alpha", "samples", "convergence", "flow"}
    assert {file.name for file in (tmp_path / "a").iterdir()} == {f"{name}.png" for name in names} | {"results.json"}
    assert [row for row in tables[0] if "student" in row] == [
        "SiD 2-step student*, 1 step",
        "SiD 2-step student*, 2 steps",
        "SiD 2-step student*, all its outputs",
        "SiD 1-step student*, 1 step",
        "DMD 1-step student*, 1 step",
    ]
    assert "averaged over the last 30% of 20 iterations" in capsys.readouterr().out


def test_the_sweep_draws_its_tables(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toy_2d, "TEACHER_ITERS", 40)
    assert main(monkeypatch, "--sweep", "--quick", "--iters", "2", "--out", tmp_path) == 0
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 4 * 7 + 3 * 3 + 4 * 3
    assert (tmp_path / "sweep.png").exists() and "DMD" in capsys.readouterr().out


def test_a_run_that_diverges_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(toy_2d, "TEACHER_ITERS", 40)
    monkeypatch.setattr(toy_2d, "check_all", lambda seed: True)
    monkeypatch.setattr(sid_fm, "sid_loss", lambda x_g, *args: x_g.sum() * math.nan)
    assert main(monkeypatch, "--quick", "--iters", "5", "--out", tmp_path) == 1
    assert "a student diverged" in capsys.readouterr().err


def test_check_alone_reports_and_a_failed_claim_is_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr(toy_2d, "CHECKS", {toy_2d.check_generate: 10})
    assert main(monkeypatch, "--check") == 0
    assert "4 of 4 hold" in capsys.readouterr().out
    monkeypatch.setattr(toy_2d, "CHECKS", {lambda rng: iter([toy_2d.Check("pigs fly", math.nan, 1.0, "none")]): 1})
    assert main(monkeypatch, "--check") == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--steps", "0"), "--steps: invalid positive_integer value"),
        (("--iters", "-3"), "--iters"),
        (("--seed", "99999999999999999999"), "--seed"),
        (("--alpha", "nan"), "--alpha: invalid finite_number value"),
        (("--alpha", "one"), "--alpha: invalid finite_number value"),
        (("--check", "--sweep"), "not allowed with"),
        (("--mixture", "square"), "invalid choice: 'square'"),
        (("--colour",), "unrecognized arguments: --colour"),
        (("--out", os.devnull), "cannot write to the folder --out"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(monkeypatch, capsys, args, says):
    assert main(monkeypatch, *args) == 2
    out, err = capsys.readouterr()
    assert says in err and err.startswith("toy_2d.py: ") and err.count("\n") == 1 and not out


def test_ctrl_c_keeps_what_was_drawn(tmp_path):
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
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"stopped: what was drawn so far is in {tmp_path}" in errors and "Traceback" not in errors
    assert {file.name for file in tmp_path.iterdir()} >= {"densities.png", "alpha.png"}


def test_a_full_disk_is_one_line(monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "argv", ["toy_2d.py", "--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(toy_2d, "draw_densities", full)
    monkeypatch.setattr(toy_2d, "check_all", lambda seed: True)
    with pytest.raises(SystemExit) as error:
        toy_2d.main()
    assert error.value.code == 1 and "the disk is full" in capsys.readouterr().err
