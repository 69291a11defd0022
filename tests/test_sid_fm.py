"""Chapters 1 to 3 of sid_fm.py: what toy_2d.py's checks of the derivation leave open."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sid_fm
from sid_fm import add_noise, convert, distill, generate, guided, sample_ode, sid_loss


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Tiny(nn.Module):
    """A velocity network with a condition and features, as the real ones have them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 16), nn.Linear(16, 2)
        self.calls = 0

    def forward(self, x_t, t, cond=None, features=False):
        self.calls += 1
        word = cond["word"] if cond else torch.zeros_like(x_t)
        h = self.first(torch.cat([x_t, t[:, None], word], 1)).tanh()
        return (self.last(h), h) if features else self.last(h)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def trio(lr=1e-2):
    teacher = Tiny()
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    optimizers = tuple(torch.optim.Adam(net.parameters(), lr=lr, betas=(0.0, 0.999)) for net in (student, fake))
    return teacher, student, fake, optimizers


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


# Chapter 1


@pytest.mark.parametrize(
    "call",
    [
        lambda x, t: sid_fm.path_terms(t, "edm"),
        lambda x, t: sid_fm.time_at(t, t, "edm"),
        lambda x, t: convert(x, x, t, "rf", "x0", "noise"),
        lambda x, t: sid_loss(x, x, x, t, weight="none"),
        lambda x, t: generate(Tiny(), x, noise="white"),
        lambda x, t: generate(Tiny(), x, steps=4, stop_after=5),
        lambda x, t: generate(Tiny(), x, steps=0),
        lambda x, t: next(distill(*trio(), [(None, None)], (4, 2), loss="gan")),
        lambda x, t: next(distill(*trio(), [(None, None)], (4, 2), weight="none")),
        lambda x, t: next(distill(*trio(), [(None, None)], (4, 2), noise="white")),
        lambda x, t: guided(Tiny(), x, t, {"word": x}, None, 4.5),
        lambda x, t: guided(Tiny(), x, t, None, {"word": x}, 4.5),
    ],
)
def test_bad_arguments_name_what_is_wrong(call):
    with pytest.raises(ValueError, match="unknown|1 <= stop_after <= steps|needs cond and uncond"):
        call(torch.randn(4, 2), torch.full((4,), 0.5))


@pytest.mark.parametrize("src", ["eps", "score"])
def test_noise_alone_does_not_determine_the_clean_sample(src):
    x_t = torch.randn(3, 2)
    assert not convert(torch.randn(3, 2), x_t, torch.ones(3), "rf", src, "x0").isfinite().any()
    torch.testing.assert_close(convert(x_t, x_t, torch.ones(3), "rf", "v", "x0"), torch.zeros(3, 2))


def test_convert_keeps_any_shape():
    x, t = torch.randn(3, 4, 5, 6), torch.tensor([0.2, 0.5, 0.9])
    D = convert(x, x + 1, t, "rf", "v", "x0")
    torch.testing.assert_close(D, x + 1 - t.reshape(3, 1, 1, 1) * x)


@pytest.mark.parametrize("path", ["vp", "ve"])
def test_times_beyond_the_end_of_a_path_are_clamped(path):
    end = {"vp": 0.99347, "ve": 0.98765}[path]
    t = torch.tensor([end - 1e-5, end + 1e-5, 1.0])
    _, u = sid_fm.equal_snr(torch.randn(3, 2), t, "rf", path)
    assert u[0] < sid_fm.T_END[path] * (1 - 1e-6)
    torch.testing.assert_close(u[1:], torch.full((2,), sid_fm.T_END[path]))


def test_a_rectified_flow_network_is_not_wrapped():
    net = Tiny()
    assert sid_fm.as_rectified_flow(net, "rf") is net
    assert list(sid_fm.as_rectified_flow(net, "trig").parameters()) == list(net.parameters())


@pytest.mark.parametrize("path", sid_fm.T_END)
def test_a_view_hands_on_features_and_is_finite_at_pure_noise_in_float32(path):
    net = Tiny().float()
    view = sid_fm.as_rectified_flow(net, path, "x0")
    x_t, t = torch.randn(3, 2).float(), torch.tensor([0.01, 0.5, 1.0]).float()
    v, h = view(x_t, t, None, features=True)
    assert torch.equal(v, view(x_t, t)) and v.isfinite().all() and h.shape == (3, 16)


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "score"])
def test_converting_to_itself_changes_nothing_even_at_the_ends(kind):
    pred, x_t = torch.randn(2, 3, 2)
    assert torch.equal(convert(pred, x_t, torch.tensor([0.0, 0.5, 1.0]), "rf", kind, kind), pred)


def test_uniform_times_fill_the_path():
    t = sid_fm.sample_times(100_000, None, "trig", rng())
    assert t.min() >= sid_fm.T_MIN and t.max() <= math.pi / 2
    error = (t.mean() - (sid_fm.T_MIN + math.pi / 2) / 2).abs() / (t.std() / 100_000**0.5)
    assert error < 5


# Chapter 2


def test_guidance_is_one_batched_call():
    net, x_t, t = Tiny(), torch.randn(4, 2), torch.rand(4)
    cond, uncond = {"word": torch.randn(4, 2)}, {"word": torch.zeros(1, 2)}
    v_cond, h_cond = net(x_t, t, cond, features=True)
    v_uncond = net(x_t, t)
    net.calls = 0
    v, h = guided(net, x_t, t, cond, uncond, 4.5, features=True)
    assert net.calls == 1
    torch.testing.assert_close(v, v_uncond + 4.5 * (v_cond - v_uncond))
    torch.testing.assert_close(h, h_cond)
    v, h = guided(net, x_t, t, cond, uncond, 4.5)
    torch.testing.assert_close(v, v_uncond + 4.5 * (v_cond - v_uncond))
    assert h is None
    torch.testing.assert_close(guided(net, x_t, t, cond, uncond, 1.0, features=True), (v_cond, h_cond))


def test_dmd_moves_the_sample_along_the_difference_and_nothing_else():
    x_g, real, fake = (torch.randn(5, 3, requires_grad=True) for _ in range(3))
    t = torch.rand(5)
    sid_fm.dmd_loss(x_g, real, fake, t, "1-t").backward()
    torch.testing.assert_close(x_g.grad, (1 - t)[:, None] * (fake - real).detach() / 5)
    assert real.grad is None and fake.grad is None


def test_adversarial_pair_is_binary_cross_entropy():
    real, fake, w = 20 * torch.randn(6, 8), 20 * torch.randn(6, 8), torch.rand(6)
    bce = lambda h, label: F.binary_cross_entropy_with_logits(
        h.clamp(-10, 10), torch.full_like(h, label), reduction="none"
    )
    expected = 12 * (bce(real, 1.0).mean() + bce(fake, 0.0).mean()) / 2
    torch.testing.assert_close(sid_fm.discriminator_loss(real, fake, 12), expected)
    torch.testing.assert_close(sid_fm.adversarial_loss(fake, 12, w), 12 * (w[:, None] * bce(fake, 1.0)).mean())


# Chapter 3


def test_sid_loss_takes_a_weight_by_name_or_as_a_tensor():
    x_g, real, fake, t = *torch.randn(3, 5, 3), torch.rand(5)
    for loss in (sid_loss, sid_fm.dmd_loss):
        named, given = loss(x_g, real, fake, t, weight="1/t"), loss(x_g, real, fake, t, weight=1 / t)
        torch.testing.assert_close(named, given)
        assert not torch.isclose(named, loss(x_g, real, fake, t))


def test_euler_follows_its_times():
    z, times, x = torch.randn(4, 2), torch.tensor([1.0, 0.7, 0.2, 0.0]), None
    net, cond, uncond = Tiny(), {"word": torch.randn(4, 2)}, {"word": torch.zeros(4, 2)}
    x = z
    for t, t_next in itertools.pairwise(times):
        v_cond, v_uncond = net(x, t.expand(4), cond), net(x, t.expand(4), uncond)
        x = x + (t_next - t) * (v_uncond + 3 * (v_cond - v_uncond))
    torch.testing.assert_close(sample_ode(net, z, cond, uncond, times, guidance=3), x.detach())
    few_step = generate(net, z, cond, steps=28, noise="ddim")  # is an Euler step on Rectified Flow
    torch.testing.assert_close(few_step, sample_ode(net, z, cond))


def test_euler_takes_28_steps_by_default_and_converges_at_first_order():
    # Gaussian data N(m, s^2) in one dimension: the flow carries z to m + s z
    def v(x_t, t, cond=None):
        a, s = 1 - t[:, None], t[:, None]
        D = 0.5 + a * 0.6**2 / ((a * 0.6) ** 2 + s**2) * (x_t - a * 0.5)
        return convert(D, x_t, t, "rf", "x0", "v")

    z = torch.randn(100, 1)
    torch.testing.assert_close(sample_ode(v, z), sample_ode(v, z, times=torch.linspace(1, 0, 29)))
    coarse, fine = (
        (sample_ode(v, z, times=torch.linspace(1, 0, n + 1)) - (0.5 + 0.6 * z)).abs().max() for n in (64, 128)
    )
    assert 1.7 < coarse / fine < 2.3


def test_distill_yields_measurements_and_leaves_the_teacher_alone():
    teacher, student, fake, optimizers = trio()
    teacher.requires_grad_(False)
    student.requires_grad_(False)  # as a copy of a frozen teacher is
    before = weights(teacher)
    run = list(distill(teacher, student, fake, optimizers, itertools.repeat((None, None)), (8, 2), iters=60, rng=rng()))
    assert [r["iteration"] for r in run] == list(range(60)) and run[-1]["images"] == 480
    assert set(run[0]) == {"iteration", "images", "k", "fake_loss", "fisher", "loss", "skipped"}
    assert all(
        math.isfinite(r[key]) and not r[key].requires_grad
        for r in run
        for key in ("fake_loss", "fisher", "loss", "skipped")
    )
    assert {r["k"] for r in run} == {1, 2, 3, 4}
    assert torch.equal(weights(teacher), before) and all(p.grad is None for p in teacher.parameters())
    assert not torch.equal(weights(student), before) and not torch.equal(weights(fake), before)


def test_where_the_fake_network_is_the_teacher_there_is_nothing_to_see():
    teacher, student, fake, optimizers = trio(lr=0.0)
    measured = next(distill(teacher, student, fake, optimizers, [(None, None)], (8, 2), rng=rng()))
    assert measured["fisher"] == 0 and measured["loss"] == 0


def test_distill_is_reproducible_and_runs_without_a_generator():
    def result(generator):
        teacher, student, fake, optimizers = trio()
        for net in (student, fake):
            net.load_state_dict(reference)
        teacher.load_state_dict(reference)
        list(
            distill(teacher, student, fake, optimizers, itertools.repeat((None, None)), (8, 2), iters=3, rng=generator)
        )
        return weights(student)

    reference = Tiny().state_dict()
    assert torch.equal(result(rng(1)), result(rng(1)))
    assert not torch.equal(result(rng(1)), result(rng(2)))
    torch.manual_seed(3)
    first = result(None)
    assert first.isfinite().all()


def test_distill_uses_guidance_in_all_three_places_but_not_in_the_generator():
    teacher, student, fake, optimizers = trio()
    rows = {"teacher": [], "student": [], "fake": []}
    for name, net in (("teacher", teacher), ("student", student), ("fake", fake)):
        net.register_forward_pre_hook(lambda module, inputs, name=name: rows[name].append(len(inputs[0])))
    batches = [({"word": torch.randn(8, 2)}, None)]
    uncond = {"word": torch.zeros(1, 2)}
    list(distill(teacher, student, fake, optimizers, batches, (8, 2), steps=1, guidance=4.5, uncond=uncond, rng=rng()))
    assert rows == {"teacher": [16], "student": [8, 8], "fake": [16, 16]}


ONE_ITERATION = {
    "the paper's": {},
    "other weights": {"alpha": 0.5, "weight": "1/t^2", "law": None, "sid_scale": 7.0},
    "fixed noise": {"noise": "fixed"},
    "ddim noise": {"noise": "ddim"},
    "guided": {"guidance": 3.0},
    "dmd": {"loss": "dmd"},
    "data-aided": {"real": True},
    "data-aided, other weights": {"real": True, "weight": "1/t^2"},
    "data-aided, guided, dmd": {"real": True, "guidance": 3.0, "loss": "dmd"},
}


@pytest.mark.parametrize("options", ONE_ITERATION.values(), ids=ONE_ITERATION)
def test_one_iteration_is_the_losses_of_chapter_2(options):
    """One iteration at K = 2, written out with formulas, from the same random numbers."""
    options = {"alpha": 1.0, "weight": "1-t", "law": sid_fm.SID_LAW, "noise": "fresh", "loss": "sid"} | options
    guidance, scale = options.setdefault("guidance", 1.0), options.setdefault("sid_scale", 100.0)
    real = torch.randn(8, 2) + 2 if options.pop("real", False) else None
    cond, uncond = {"word": torch.randn(8, 2)}, {"word": torch.zeros(1, 2)}
    teacher, student, fake, _ = trio()
    mine, opponent = copy.deepcopy(student), copy.deepcopy(fake)

    def sgd(net):
        return torch.optim.SGD(net.parameters(), lr=1e-3)

    nets = (teacher, student, fake, (sgd(student), sgd(fake)))
    loop = distill(*nets, [(cond, real)], (8, 2), steps=2, warmup=(0, 0), uncond=uncond, rng=rng(), **options)
    measured = next(loop)

    g, like = rng(), torch.empty(8, 2)
    k = measured["k"]

    def velocity(net, x_t, t):
        v, h = net(x_t, t, cond, features=True)
        return v + (guidance - 1) * (v - net(x_t, t, {"word": torch.zeros(8, 2)})), h

    def draw(generator):
        z = x = sid_fm.noise_like(like, g)
        t = torch.ones(8)
        if k == 2:
            v = generator(x, t, cond).detach()
            n = {"fresh": lambda: sid_fm.noise_like(like, g), "fixed": lambda: z, "ddim": lambda: x}[options["noise"]]()
            x, t = (x - v) / 2 + n / 2, t / 2
        x_g = x - t[:, None] * generator(x, t, cond)
        e, t = sid_fm.noise_like(like, g), sid_fm.sample_times(8, options["law"], rng=g)
        return x_g, e, t

    x_g, e, t = draw(mine)
    x_g = x_g.detach()
    v, h = velocity(opponent, add_noise(x_g, e, t), t)
    loss = (v - (e - x_g)).square().sum(1).mean()
    if real is not None:
        _, h_real = opponent(add_noise(real, sid_fm.noise_like(real, g), t), t, cond, features=True)
        loss = loss + 2 * (F.softplus(-h_real).mean() + F.softplus(h).mean()) / 2
    loss.backward()
    sgd(opponent).step()
    torch.testing.assert_close(weights(opponent), weights(fake))

    x_g, e, t = draw(mine)
    x_t = (1 - t)[:, None] * x_g + t[:, None] * e
    v, h = velocity(opponent, x_t, t)
    phi, psi = x_t - t[:, None] * velocity(teacher, x_t, t)[0], x_t - t[:, None] * v
    w = 1 - t if options["weight"] == "1-t" else 1 / t**2
    if options["loss"] == "sid":
        loss = (w * ((phi - psi) * ((phi - x_g) - options["alpha"] * (phi - psi))).sum(1)).mean()
    else:
        loss = (w * ((psi - phi).detach() * x_g).sum(1)).mean()
    torch.testing.assert_close(measured["loss"], loss.detach())
    torch.testing.assert_close(measured["fisher"], (w * (phi - psi).square().sum(1)).mean().detach())
    loss = scale * loss
    if real is not None:
        loss = (loss + 2 * ((1 - t)[:, None] * F.softplus(-h)).mean()) / 2
    loss.backward()
    sgd(mine).step()
    torch.testing.assert_close(weights(mine), weights(student))


def test_low_precision_weights_see_float32_samples():
    seen = []

    class Half(Tiny):
        def forward(self, x_t, t, cond=None, features=False):
            seen.append((x_t.dtype, t.dtype))
            return super().forward(x_t.to(torch.bfloat16), t.to(torch.bfloat16)).float()

    teacher = Half().to(torch.bfloat16)
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    optimizers = tuple(torch.optim.Adam(net.parameters()) for net in (student, fake))
    list(distill(teacher, student, fake, optimizers, [(None, None)], (8, 2), rng=rng()))
    assert set(seen) == {(torch.float32, torch.float32)}


def test_discriminator_that_tells_nothing():
    """Hidden states of zero are logits of zero: the measurement is log 2, whatever the size of a sample."""
    teacher, student, fake, optimizers = trio()
    nn.init.zeros_(fake.first.weight), nn.init.zeros_(fake.first.bias)
    run = distill(teacher, student, fake, optimizers, itertools.repeat((None, torch.randn(8, 2))), (8, 2), rng=rng())
    assert float(next(run)["discriminator"]) == pytest.approx(math.log(2), rel=4 * torch.finfo().eps)


def test_data_aided_schedule():
    """The generator waits for the first images, then sees SiD alone, then both."""
    moved, last = [], None
    teacher, student, fake, optimizers = trio()
    real = torch.randn(8, 2) + 2
    run = distill(
        teacher, student, fake, optimizers, itertools.repeat((None, real)), (8, 2), warmup=(16, 32), iters=6, rng=rng()
    )
    last = weights(student)
    for measured in run:
        moved.append(not torch.equal(weights(student), last))
        last = weights(student)
        assert {"discriminator", "adversarial"} <= set(measured)
    assert moved == [False, False, True, True, True, True]

    def after(iters, warmup):
        teacher, student, fake, optimizers = (copy.deepcopy(net) for net in start)
        optimizers = tuple(torch.optim.SGD(net.parameters(), lr=1e-3) for net in (student, fake))
        batches = itertools.repeat((None, real))
        list(distill(teacher, student, fake, optimizers, batches, (8, 2), warmup=warmup, iters=iters, rng=rng()))
        return weights(student)

    start = trio()
    assert torch.equal(after(2, (0, 16)), after(2, (0, 1000)))  # below the threshold: SiD alone
    assert not torch.equal(after(3, (0, 16)), after(3, (0, 1000)))
