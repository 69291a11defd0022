"""Chapters 1 to 3 of sid_fm.py: what toy_2d.py's checks of the derivation leave open."""

import copy
import itertools
import math
from functools import partial

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
    measured = next(distill(teacher, student, fake, optimizers, [(None, None)] * 2, (8, 2), rng=rng()))
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


class Calls(list):
    """What networks are called with, in order: (name, rows, time of the first row, word of the
    first row)."""

    def __init__(self, teacher, student, fake, optimizers):
        super().__init__()
        for name, net in (("teacher", teacher), ("student", student), ("fake", fake)):
            net.register_forward_pre_hook(partial(self.note, name))

    def note(self, name, net, inputs):
        x_t, t, cond, *_ = inputs
        self.append((name, len(x_t), float(t[0]), cond and float(cond["word"][0, 0])))

    def of(self, name):
        return [call for call in self if call[0] == name]


def words(first, count):
    """Conditions of batches of 8: all of one number, from `first` on."""
    return [{"word": torch.full((8, 2), float(first + i))} for i in range(count)]


@pytest.mark.parametrize(
    "guidance, training, of_fake, of_teacher",
    [(4.5, 16, 16, 16), ((0.0, 1.0, 1.0), 16, 8, 8), ([1.0, -2.0, 1.0], 8, 16, 8), ((1.0, 1.0, 4.5), 8, 8, 16)],
)
def test_distill_uses_guidance_in_three_places_but_not_in_the_generator(guidance, training, of_fake, of_teacher):
    nets = trio()
    calls, uncond = Calls(*nets), {"word": torch.zeros(1, 2)}
    batches = [(cond, None) for cond in words(1, 2)]
    list(distill(*nets, batches, (8, 2), steps=1, guidance=guidance, uncond=uncond, rng=rng()))
    assert [(name, rows, word) for name, rows, _, word in calls] == [
        ("student", 8, 1.0),
        ("fake", training, 1.0),
        ("student", 8, 2.0),
        ("teacher", of_teacher, 2.0),
        ("fake", of_fake, 2.0),
    ]


@pytest.mark.parametrize("data", [False, True], ids=["data-free", "data-aided"])
def test_each_update_has_new_batches_and_real_samples_captions_of_their_own(data):
    """Two updates of the fake network and one of the generator, of two batches each: six batches,
    in this order. It ends where they do."""
    nets = trio()
    calls, reals = Calls(*nets), [(torch.randn(8, 2), cond) if data else None for cond in words(101, 4)]
    batches = iter([*zip(words(1, 6), [*reals, None, None]), *((cond, None) for cond in words(7, 5))])
    run = list(distill(*nets, batches, (8, 2), steps=1, fake_updates=2, accumulate=2, iters=9, rng=rng()))
    assert len(run) == 1 and run[0]["images"] == 16 and not list(batches)
    assert [word for *_, word in calls.of("student")] == [1, 2, 3, 4, 5, 6]
    assert [word for *_, word in calls.of("teacher")] == [5, 6]
    free = [1, 2, 3, 4, 5, 6]
    assert [word for *_, word in calls.of("fake")] == ([1, 101, 2, 102, 3, 103, 4, 104, 5, 6] if data else free)


def test_generation_follows_its_times():
    """In place of steps; by default they are even."""
    given, (teacher, student, fake, optimizers) = torch.tensor([0.9, 0.6, 0.25, 0.0]), trio()
    calls = Calls(teacher, student, fake, optimizers)
    options = {"steps": 1, "iters": 30, "times": given, "rng": rng()}
    run = list(distill(teacher, student, fake, optimizers, itertools.repeat((None, None)), (8, 2), **options))
    assert {measured["k"] for measured in run} == {1, 2, 3}
    assert {t for _, _, t, _ in calls.of("student")} == {*given[:3].tolist()}

    def after(**options):
        teacher, student, fake, optimizers = copy.deepcopy(start)
        batches = itertools.repeat((None, None))
        list(distill(teacher, student, fake, optimizers, batches, (8, 2), iters=4, rng=rng(), **options))
        return weights(student)

    start = trio()
    assert torch.equal(after(), after(times=torch.tensor([1, 0.75, 0.5, 0.25, 0])))
    assert not torch.equal(after(), after(times=torch.tensor([1, 0.9, 0.75, 0.5, 0])))


ONE_ITERATION = {
    "the paper's": {},
    "other weights": {"alpha": 0.5, "weight": "1/t^2", "law": None, "sid_scale": 7.0},
    "fixed noise": {"noise": "fixed"},
    "ddim noise": {"noise": "ddim"},
    "guided": {"guidance": 3.0},
    "guided in the fake network alone": {"guidance": (1.5, 1.5, 1.0)},
    "guided as three": {"guidance": (1.0, 2.0, 4.5)},
    "guided by nothing and against": {"guidance": [0.0, -1.5, 0.5]},
    "other times": {"times": [0.9, 0.3, 0.0]},
    "other times, fixed noise": {"times": [0.9, 0.3, 0.0], "noise": "fixed"},
    "other times, ddim noise": {"times": [0.9, 0.3, 0.0], "noise": "ddim"},
    "dmd": {"loss": "dmd"},
    "accumulated": {"accumulate": 3},
    "three fake updates": {"fake_updates": 3, "accumulate": 2},
    "data-aided": {"real": True},
    "data-aided, other weights": {"real": True, "weight": "1/t^2", "sid_scale": 0.5, "discriminator_scale": 20.0},
    "data-aided, without a discriminator": {"real": True, "discriminator_scale": 0.0},
    "data-aided, guided, dmd": {"real": True, "guidance": 3.0, "loss": "dmd"},
    "data-aided, two fake updates": {"real": True, "fake_updates": 2, "accumulate": 2, "guidance": (2.0, 1.0, 3.0)},
}


@pytest.mark.parametrize("options", ONE_ITERATION.values(), ids=ONE_ITERATION)
def test_one_iteration_is_the_losses_of_chapter_2(options):
    """One iteration at K = 2, written out with formulas, from the same random numbers."""
    options = {"alpha": 1.0, "weight": "1-t", "law": sid_fm.SID_LAW, "noise": "fresh", "loss": "sid"} | options
    guidance, scale = options.setdefault("guidance", 1.0), options.setdefault("sid_scale", 100.0)
    in_training, of_fake, of_teacher = guidance if isinstance(guidance, (list, tuple)) else (guidance,) * 3
    discriminator_scale = options.setdefault("discriminator_scale", 1.0)
    accumulate, fake_updates = options.setdefault("accumulate", 1), options.setdefault("fake_updates", 1)
    times, aided = options.pop("times", None), options.pop("real", False)
    options |= {"times": torch.tensor(times)} if times else {"steps": 2}
    times = times or [1.0, 0.5, 0.0]

    def conditions():
        return {"word": torch.randn(8, 2)}

    real = [(torch.randn(8, 2) + 2, conditions()) if aided else None for _ in range(fake_updates * accumulate)]
    batches = [(conditions(), x) for x in [*real, *[None] * accumulate]]
    teacher, student, fake, _ = trio()
    mine, opponent = copy.deepcopy(student), copy.deepcopy(fake)

    def sgd(net):
        return torch.optim.SGD(net.parameters(), lr=1e-3)

    nets, uncond = (teacher, student, fake, (sgd(student), sgd(fake))), {"word": torch.zeros(1, 2)}
    measured = next(distill(*nets, batches, (8, 2), warmup=(0, 0), uncond=uncond, rng=rng(), **options))

    g, like = rng(), torch.empty(8, 2)
    k, means = measured["k"], dict.fromkeys(measured.keys() - {"iteration", "images", "k", "skipped"}, 0.0)
    assert k == 2 and means.keys() >= ({"discriminator", "adversarial"} if aided else set())

    def velocity(net, x_t, t, cond, guidance):
        v, h = net(x_t, t, cond, features=True)
        return v + (guidance - 1) * (v - net(x_t, t, {"word": torch.zeros(8, 2)})), h

    def draw(generator, cond):
        z = sid_fm.noise_like(like, g)
        t, t_next = (torch.full((8,), t) for t in times[:2])
        v = generator(z, t, cond).detach()
        n = {"fresh": lambda: sid_fm.noise_like(like, g), "fixed": lambda: z, "ddim": lambda: z + (1 - times[0]) * v}
        x = (1 - times[1]) * (z - times[0] * v) + times[1] * n[options["noise"]]()
        x_g = x - times[1] * generator(x, t_next, cond)
        e, t = sid_fm.noise_like(like, g), sid_fm.sample_times(8, options["law"], rng=g)
        return x_g, e, t, (1 - t)[:, None] * x_g + t[:, None] * e

    for i in range(0, fake_updates * accumulate, accumulate):
        total = 0
        for cond, sample in batches[i : i + accumulate]:
            x_g, e, t, _ = draw(mine, cond)
            x_g = x_g.detach()
            v, h = velocity(opponent, add_noise(x_g, e, t), t, cond, in_training)
            loss = (v - (e - x_g)).square().sum(1).mean()
            means["fake_loss"] += loss.detach() / fake_updates / accumulate
            if aided:  # at the noise and the times of the generated samples
                x_0, real_cond = sample
                _, h_real = opponent(add_noise(x_0, e, t), t, real_cond, features=True)
                discriminator = (F.softplus(-h_real).mean() + F.softplus(h).mean()) / 2
                means["discriminator"] += discriminator.detach() / fake_updates / accumulate
                loss = loss + discriminator_scale * 2 * discriminator
            total = total + loss / accumulate
        opponent.zero_grad()
        total.backward()
        sgd(opponent).step()
    torch.testing.assert_close(weights(opponent), weights(fake))

    total = 0
    for cond, _ in batches[-accumulate:]:
        x_g, _, t, x_t = draw(mine, cond)
        v, h = velocity(opponent, x_t, t, cond, of_fake)
        phi = x_t - t[:, None] * velocity(teacher, x_t, t, cond, of_teacher)[0]
        psi = x_t - t[:, None] * v
        w = 1 - t if options["weight"] == "1-t" else 1 / t**2
        if options["loss"] == "sid":
            loss = (w * ((phi - psi) * ((phi - x_g) - options["alpha"] * (phi - psi))).sum(1)).mean()
        else:
            loss = (w * ((psi - phi).detach() * x_g).sum(1)).mean()
        means["loss"] += loss.detach() / accumulate
        means["fisher"] += (w * (phi - psi).square().sum(1)).mean().detach() / accumulate
        loss = scale * loss
        if aided:
            adversarial = 2 * ((1 - t)[:, None] * F.softplus(-h)).mean()
            means["adversarial"] += adversarial.detach() / accumulate
            loss = (loss + adversarial) / 2
        total = total + loss / accumulate
    total.backward()
    sgd(mine).step()
    torch.testing.assert_close(weights(mine), weights(student))
    for name, mean in means.items():
        torch.testing.assert_close(measured[name], mean)


def test_low_precision_weights_see_float32_samples():
    seen = []

    class Half(Tiny):
        def forward(self, x_t, t, cond=None, features=False):
            seen.append((x_t.dtype, t.dtype))
            return super().forward(x_t.to(torch.bfloat16), t.to(torch.bfloat16)).float()

    teacher = Half().to(torch.bfloat16)
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    optimizers = tuple(torch.optim.Adam(net.parameters()) for net in (student, fake))
    list(distill(teacher, student, fake, optimizers, [(None, None)] * 2, (8, 2), rng=rng()))
    assert set(seen) == {(torch.float32, torch.float32)}


def test_discriminator_that_tells_nothing():
    """Hidden states of zero are logits of zero: the measurement is log 2, whatever the size of a sample."""
    teacher, student, fake, optimizers = trio()
    nn.init.zeros_(fake.first.weight), nn.init.zeros_(fake.first.bias)
    batches = itertools.repeat((None, (torch.randn(8, 2), None)))
    run = distill(teacher, student, fake, optimizers, batches, (8, 2), rng=rng())
    assert float(next(run)["discriminator"]) == pytest.approx(math.log(2), rel=4 * torch.finfo().eps)


def test_data_aided_schedule():
    """The generator waits for the first images, then sees SiD alone, then both."""
    moved, last = [], None
    teacher, student, fake, optimizers = trio()
    real = torch.randn(8, 2) + 2, None
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
