"""Runs the paper's experiment on a small text-to-image DiT, with pictures that code can read back.

    python dit_tiny.py                trains a teacher, distills it, prints a table, plots samples
    python dit_tiny.py --quick        does the same in one minute, less well
    python dit_tiny.py --arch sana    uses SANA's network; --arch flux uses FLUX's
    python dit_tiny.py --places       compares guidance in each of its three places

Networks, losses, training loop and samplers come from sid_fm.py. The function that distills a
student comes from toy_2d.py. The chapters are: pictures and captions; reading pictures back;
networks and latents; teacher and students; measuring; figures; command line.
"""

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import sid_fm
from sid_fm import add_noise, flow_matching_loss, noise_like, sample_times
from toy_2d import BLUE, GREY, INK, TITLES, Distilled, cosine, distill_student, plural, run_jobs, save_figure

# ----------------------------------------------------------------------------------------------------------------------
# Pictures and captions
# ----------------------------------------------------------------------------------------------------------------------
# A picture shows one object ("red circle"), two that are alike ("two red circles"), or two of
# different colours in a relation ("red circle left of blue square"). Each object is near a place
# that the caption determines. Objects don't overlap, so that a picture can be read back. Sizes and
# positions are continuous.

COLOURS = {"red": (0.84, 0.16, 0.16), "green": (0.13, 0.60, 0.30), "blue": (0.16, 0.35, 0.80)}
PALETTE = torch.tensor([(0.96, 0.95, 0.92), *COLOURS.values()]) * 2 - 1  # background, colours
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "above")  # along x, along y
KINDS = torch.tensor([0.4, 0.2, 0.4])  # probabilities: one object, two alike, a relation

SIZE = 24  # pixels a side of a picture
PIXELS = torch.arange(SIZE) + 0.5  # coordinates of the pixels' centres, along x and y
RADII = (3.0, 4.5)  # the range of half the side of an object's box
PLACES = torch.tensor([-6.5, 6.5])  # coordinates of two objects, relative to the middle
JITTER = 2.0  # the largest distance of an object from its place, along x and along y


class Scenes(NamedTuple):
    """Describes n pictures. If a picture has one object, column 1 is not used."""

    count: Tensor  # [n] 1 or 2
    relation: Tensor  # [n] index of RELATIONS, or -1
    colour: Tensor  # [n, 2] index of COLOURS
    shape: Tensor  # [n, 2] index of SHAPES
    radius: Tensor  # [n, 2]
    centre: Tensor  # [n, 2, 2]: x, y


def sample_scenes(n: int, rng: torch.Generator) -> Scenes:
    """Samples n scenes. Everything that the kind leaves open is uniform and independent."""
    integers = partial(torch.randint, generator=rng)
    kind = torch.multinomial(KINDS, n, replacement=True, generator=rng)
    colour, shape = integers(len(COLOURS), (n, 2)), integers(len(SHAPES), (n, 2))
    colour[:, 1] = (colour[:, 0] + torch.where(kind == 1, 0, 1 + integers(len(COLOURS) - 1, (n,)))) % len(COLOURS)
    shape[:, 1] = torch.where(kind == 1, shape[:, 0], shape[:, 1])
    count, relation = 1 + (kind > 0).long(), torch.where(kind == 2, integers(len(RELATIONS), (n,)), -1)
    radius = RADII[0] + (RADII[1] - RADII[0]) * torch.rand(n, 2, generator=rng)
    # One object is near the middle. Two are side by side or one above the other, and may touch.
    centre = SIZE / 2 + JITTER * (2 * torch.rand(n, 2, 2, generator=rng) - 1)
    axis = (relation == RELATIONS.index("above")).long()
    centre[torch.arange(n), :, axis] += torch.where(count[:, None] == 1, 0, PLACES)
    return Scenes(count, relation, colour, shape, radius, centre)


def write_captions(scenes: Scenes) -> list[str]:
    """Returns the caption of each scene, such as "red circle left of blue square"."""
    names, texts = [*COLOURS], []
    for count, relation, colour, shape in zip(*(column.tolist() for column in scenes[:4])):
        first, second = (f"{names[c]} {SHAPES[s]}" for c, s in zip(colour, shape))
        pair = f"{first} {RELATIONS[relation]} {second}" if relation >= 0 else f"two {first}s"
        texts.append(first if count == 1 else pair)
    return texts


def coverage(shape: Tensor, radius: Tensor, centre: Tensor) -> Tensor:
    """Returns the share of each pixel that an object covers, by the pixel's distance from the edge.
    The edge is two pixels wide. [n], [n], [n, 2] -> [n, SIZE, SIZE] in [0, 1]"""
    x, y = (PIXELS - centre[:, :1])[:, None, :], (PIXELS - centre[:, 1:])[:, :, None]
    r = radius[:, None, None]
    circle, square = torch.hypot(x, y) - r, torch.maximum(x.abs(), y.abs()) - r
    triangle = torch.maximum(y - r, (2 * x.abs() - y - r) / 5**0.5)
    distance = torch.stack([circle, square, triangle])[shape, torch.arange(len(shape))]
    return (0.5 - distance / 2).clamp(0, 1)


def render(scenes: Scenes) -> Tensor:
    """Draws scenes as pictures: [n, 3, SIZE, SIZE] in [-1, 1]."""
    pictures = PALETTE[0][:, None, None].expand(len(scenes.count), 3, SIZE, SIZE)
    for i in range(2):
        covered = coverage(scenes.shape[:, i], scenes.radius[:, i], scenes.centre[:, i])
        covered = (covered * (scenes.count > i)[:, None, None])[:, None]
        pictures = pictures + covered * (PALETTE[1:][scenes.colour[:, i]][:, :, None, None] - pictures)
    return pictures


# ----------------------------------------------------------------------------------------------------------------------
# Reading pictures back
# ----------------------------------------------------------------------------------------------------------------------

LEAST_PIXELS = 8  # a smaller region of one colour is not an object
LEAST_OVERLAP = 0.6  # the least intersection over union of an object and its best template
UNREADABLE = len(SHAPES)


class Found(NamedTuple):
    """Describes the m objects that were found in a batch of pictures."""

    picture: Tensor  # [m] index of the picture
    colour: Tensor  # [m] index of COLOURS
    shape: Tensor  # [m] index of SHAPES, or UNREADABLE
    radius: Tensor  # [m]
    centre: Tensor  # [m, 2]: x, y


def find_regions(nearest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds connected regions of one colour. A pixel is connected to its 8 neighbours. nearest:
    [n, SIZE, SIZE], the index of PALETTE -> picture [m], colour [m], mask [m, SIZE, SIZE]"""
    colours = F.one_hot(nearest, len(PALETTE))[..., 1:].permute(0, 3, 1, 2).float()
    label = colours * torch.arange(1.0, SIZE**2 + 1).view(SIZE, SIZE)
    while not torch.equal(label, spread := F.max_pool2d(label, 3, 1, 1) * colours):
        label = spread  # each pixel takes the largest label around it, until a region has one label
    pixels = torch.zeros(len(nearest), len(COLOURS), SIZE**2 + 1)  # how many have each label
    pixels.scatter_add_(2, label.flatten(2).long(), colours.flatten(2))
    picture, colour, region = (pixels >= LEAST_PIXELS).nonzero(as_tuple=True)
    return picture, colour, label[picture, colour] == region[:, None, None]


def read_objects(pictures: Tensor) -> Found:
    """Finds the objects in pictures: [n, 3, SIZE, SIZE] in [-1, 1], without any learned part.

    Each connected region of one colour is an object. A pixel's colour tells how much of the pixel
    the object covers, also at the edge. For each shape, the covered area gives a radius and its
    centroid gives a centre. The shape whose template overlaps most with the region is read. It is
    UNREADABLE if this overlap is LEAST_OVERLAP or less."""
    nearest = (pictures[:, None] - PALETTE[:, :, None, None]).square().sum(2).argmin(1)
    picture, colour, mask = find_regions(nearest)
    direction = PALETTE[1:] - PALETTE[0]  # from the background to each colour
    direction = (direction / direction.square().sum(1, keepdim=True))[colour]
    covered = torch.einsum("mcyx,mc->myx", pictures[picture] - PALETTE[0][:, None, None], direction).clamp(0, 1)
    edge = (F.max_pool2d(mask[:, None].float(), 3, 1, 1)[:, 0] > 0) & (nearest[picture] == 0)
    covered = covered * (mask | edge)
    area = covered.sum((1, 2))
    centroid = torch.stack([covered.sum(1) @ PIXELS, covered.sum(2) @ PIXELS], 1) / area[:, None]
    # Areas are pi r^2, (2 r)^2 and 2 r^2. A triangle's centroid is r / 3 below its box's middle.
    radii = (area / torch.tensor([math.pi, 4, 2])[:, None]).sqrt()
    centres = centroid - radii[..., None] * torch.tensor([[0, 0], [0, 0], [0, 1 / 3]])[:, None]
    templates = [coverage(torch.full_like(picture, i), radii[i], centres[i]) for i in range(len(SHAPES))]
    common, either = (torch.stack([f(x, covered) for x in templates]) for f in (torch.minimum, torch.maximum))
    overlap, shape = (common.sum((2, 3)) / either.sum((2, 3))).max(0)
    best = shape, torch.arange(len(shape))
    return Found(picture, colour, torch.where(overlap > LEAST_OVERLAP, shape, UNREADABLE), radii[best], centres[best])


def accuracy(found: Found, scenes: Scenes) -> dict[str, Tensor]:
    """Returns whether each picture shows its caption: 0 or 1, [n] each. The keys are object (the
    shapes), colour, count, relation (nan if there is none) and, as in GenEval, all of these."""
    n, rows = len(scenes.count), torch.arange(len(scenes.count))
    shown = torch.zeros(n, len(COLOURS), len(SHAPES) + 1, dtype=torch.long)  # objects of each kind
    asked = torch.zeros_like(shown)
    shown.index_put_((found.picture, found.colour, found.shape), torch.tensor(1), accumulate=True)
    for i in range(2):
        asked[rows, scenes.colour[:, i], scenes.shape[:, i]] += (scenes.count > i).long()
    position = torch.zeros(n, len(COLOURS), 3)  # x, y, radius: used if one object has this colour
    position.index_put_((found.picture, found.colour), torch.cat([found.centre, found.radius[:, None]], 1))
    first, second = (position[rows, scenes.colour[:, i]] for i in range(2))
    one_each = (shown.sum(2)[rows[:, None], scenes.colour] == 1).all(1)
    axis, related = scenes.relation.clamp(min=0), scenes.relation >= 0
    distance, radius = (second - first)[rows, axis], torch.maximum(first, second)[:, 2]
    apart = one_each & (distance > radius)  # each centre is beyond the other object's edge
    return {
        "object": (shown.sum(1) == asked.sum(1)).all(1).float(),
        "colour": ((shown.sum(2) > 0) == (asked.sum(2) > 0)).all(1).float(),
        "count": (shown.sum((1, 2)) == scenes.count).float(),
        "relation": apart.float().masked_fill(~related, math.nan),
        "all": ((shown == asked).flatten(1).all(1) & (apart | ~related)).float(),
    }


def size_and_position(found: Found, scenes: Scenes) -> Tensor:
    """Returns whether an object is larger than the middle size, right of the middle, and below it:
    0 or 1, [n, 3]. Rows are -1 unless the caption has one object and one was found."""
    one = ((scenes.count == 1) & (torch.bincount(found.picture, minlength=len(scenes.count)) == 1))[found.picture]
    answers = torch.full((len(scenes.count), 3), -1)
    values = torch.cat([found.radius[:, None] > sum(RADII) / 2, found.centre > SIZE / 2], 1).long()
    answers[found.picture[one]] = values[one]
    return answers


def diversity(answers: Tensor, caption: Tensor) -> float:
    """Returns the sum of the answers' mean entropies given the caption, in bits: 3 if all are even.
    It has Miller and Madow's finite-sample correction. answers: [n, 3]; caption: [n], 0 to 8"""
    answered, bits = answers[:, 0] >= 0, 0.0
    for values in answers[answered].T:
        counts = torch.bincount(caption[answered] * 2 + values, minlength=18).view(9, 2).double()
        total = counts.sum(1).clamp(min=1)
        entropy = torch.special.entr(counts / total[:, None]).sum(1)
        entropy += ((counts > 0).sum(1) - 1).clamp(min=0) / (2 * total)
        bits += float(entropy.mean()) / math.log(2)
    return bits


def frechet_features(pictures: Tensor) -> Tensor:
    """Returns the features that the Frechet distance compares: [n, 64], float64. They are colours
    (48) and the strength of edges (16), averaged over each cell of a grid of 4 x 4."""
    dx, dy = pictures.diff(dim=3)[:, :, :-1], pictures.diff(dim=2)[..., :-1]
    edges = (dx.square() + dy.square()).sum(1, keepdim=True).add(1e-6).sqrt()
    return torch.cat([F.adaptive_avg_pool2d(part, 4).flatten(1) for part in (pictures, edges)], 1).double()


def frechet_distance(x: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Returns |m - mean|^2 + tr(C + covariance - 2 (C covariance)^(1/2)). m and C are the mean and
    covariance of x: [n, d], float64."""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ x.T.cov() @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - mean).square().sum() + x.T.cov().trace() + covariance.trace() - 2 * cross)


# ----------------------------------------------------------------------------------------------------------------------
# Networks and latents
# ----------------------------------------------------------------------------------------------------------------------

WORDS = ["", "two", "left_of", "above", *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES)]
LENGTH, WIDTH = 5, 96  # words in the longest caption; width of a word's embedding
# The text encoder is a frozen table: each word at each position has its own orthogonal direction.
EMBEDDING = nn.init.orthogonal_(torch.empty(LENGTH * len(WORDS), WIDTH), generator=torch.Generator().manual_seed(7))
EMBEDDING = EMBEDDING.view(LENGTH, len(WORDS), WIDTH) * WIDTH**0.5
BLOCK, CHANNELS = 4, 12  # a latent pixel represents BLOCK x BLOCK pixels
LATENT = (CHANNELS, SIZE // BLOCK, SIZE // BLOCK)  # the shape of a picture's latent

DIT = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 16}
IMAGE = {"patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS}
# An entry has the network's class in sid_fm.py and its config.json, which diffusers can also read.
NETWORKS: dict[str, tuple[type[nn.Module], dict]] = {
    "mmdit": (
        sid_fm.MMDiT,
        {"_class_name": "SD3Transformer2DModel", **DIT, **IMAGE}
        | {"caption_projection_dim": 64, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}
        # The position table is stretched. Otherwise the few tokens would be close together in it.
        | {"pos_embed_max_size": 3, "sample_size": 24},
    ),
    "sana": (
        sid_fm.SanaDiT,
        {"_class_name": "SanaTransformer2DModel", **DIT, **IMAGE, "sample_size": 6, "caption_channels": WIDTH}
        | {"num_cross_attention_heads": 4, "cross_attention_head_dim": 16, "cross_attention_dim": 64},
    ),
    "flux": (
        sid_fm.FLUX,  # it has no patches: a token is a square of 2 x 2 latent pixels
        {"_class_name": "FluxTransformer2DModel", **DIT, "in_channels": 4 * CHANNELS, "axes_dims_rope": [4, 6, 6]}
        | {"num_layers": 1, "num_single_layers": 3, "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH},
    ),
}


def tiny_network(arch: str, seed: int) -> nn.Module:
    """Builds one of sid_fm's networks at a small size. As in DiT, gates and output start at zero.
    So each block starts as the identity."""
    torch.manual_seed(seed)
    net = sid_fm.build_network(*NETWORKS[arch])
    for layer in [net.proj_out, *(m.linear for m in net.modules() if isinstance(m, sid_fm.Modulation))]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


def encode_text(texts: list[str], device: str = "cpu") -> dict[str, Tensor]:
    """Returns the cond of sid_fm's networks: text [B, LENGTH, WIDTH], pooled [B, WIDTH], and mask
    [B, LENGTH]. "" is the empty prompt. Raises ValueError for an unknown word."""
    words = [[WORDS.index(word) for word in text.replace("left of", "left_of").split()] for text in texts]
    ids = torch.tensor([row + [0] * (LENGTH - len(row)) for row in words])
    text, mask = EMBEDDING[torch.arange(LENGTH), ids], ids > 0
    mask[:, 0] = True  # attention needs at least one word
    return {"text": text.to(device), "pooled": text.mean(1).to(device) * LENGTH**0.5, "mask": mask.to(device)}


# The autoencoder is linear: it keeps the first CHANNELS principal components of each block of a
# picture, scaled to unit variance.
BLOCKS = F.pixel_unshuffle(render(sample_scenes(4000, torch.Generator().manual_seed(0))), BLOCK)
BLOCKS = BLOCKS.movedim(1, -1).flatten(0, 2)
VARIANCES, VECTORS = torch.linalg.eigh(BLOCKS.T.cov())  # in ascending order
BLOCK_MEAN, COMPONENTS, SCALE = BLOCKS.mean(0), VECTORS[:, -CHANNELS:], VARIANCES[-CHANNELS:].sqrt()


def encode_pictures(pictures: Tensor) -> Tensor:
    """Encodes pictures: [B, 3, SIZE, SIZE] as latents: [B, *LATENT]."""
    blocks = F.pixel_unshuffle(pictures, BLOCK).movedim(1, -1)
    return ((blocks - BLOCK_MEAN) @ COMPONENTS / SCALE).movedim(-1, 1).contiguous()


def decode_latents(latents: Tensor) -> Tensor:
    """Decodes latents: [B, *LATENT] to pictures: [B, 3, SIZE, SIZE]."""
    blocks = (latents.movedim(1, -1) * SCALE) @ COMPONENTS.T + BLOCK_MEAN
    return F.pixel_shuffle(blocks.movedim(-1, 1), BLOCK)


# ----------------------------------------------------------------------------------------------------------------------
# Teacher and students
# ----------------------------------------------------------------------------------------------------------------------

BATCH_SIZE = 64
TEACHER_RATE = 5e-3
# Learning rates of a student and of its fake network, which has to keep up with the student.
FEW_STEP_RATES, ONE_STEP_RATES, DATA_AIDED_RATES = (3e-4, 2e-3), (1e-3, 3e-3), (1e-4, 1e-3)


def tiny_teacher(net: nn.Module, iters: int, seed: int, bar: tqdm) -> nn.Module:
    """Trains `net` by flow matching with caption dropout. Returns a copy with averaged weights."""
    rng, device = torch.Generator().manual_seed(seed), next(net.parameters()).device
    optimizer = torch.optim.Adam(net.parameters(), lr=TEACHER_RATE, betas=(0.9, 0.99), fused=True)
    schedule, average = cosine(optimizer, iters), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for _ in range(iters):
        scenes = sample_scenes(BATCH_SIZE, rng)
        dropped = torch.rand(BATCH_SIZE, generator=rng) < 0.1
        cond = encode_text(["" if drop else text for text, drop in zip(write_captions(scenes), dropped)], device)
        x_0 = encode_pictures(render(scenes)).to(device)
        e, t = noise_like(x_0, rng), sample_times(BATCH_SIZE, (0.0, 1.0), rng=rng).to(device)
        loss = flow_matching_loss(net(add_noise(x_0, e, t), t, cond), x_0, e, t)
        loss.backward()
        sid_fm.take_step(optimizer)
        schedule.step()
        average.update_parameters(net)
        bar.set_postfix_str(f"loss {loss.item() / x_0[0].numel():.3f}", refresh=False)
        bar.update()
    return average.module.requires_grad_(False)


def load_or_train_teacher(args: argparse.Namespace) -> nn.Module:
    """Loads the teacher of an earlier run with the same settings, or trains and saves a new one."""
    folder = args.out / "teacher"
    settings = {"arch": args.arch, "iterations": args.teacher_iters, "seed": args.seed, "device": args.device}
    notes = folder / "training.json"
    if notes.is_file() and json.loads(notes.read_text()) == settings:
        print(f"  teacher: the one in {folder}")
        return sid_fm.load_network(folder, NETWORKS[args.arch][0], args.device, torch.float32)
    net = tiny_network(args.arch, args.seed).to(args.device)
    train = partial(tiny_teacher, net, args.teacher_iters, args.seed)
    net = run_jobs({"teacher": (args.teacher_iters, train)})["teacher"]
    sid_fm.save_student(net, None, folder)
    sid_fm.write_json(notes, settings)
    return net


def caption_batches(seed: int, device: str, data: bool = False) -> Iterator[tuple[dict, tuple[Tensor, dict] | None]]:
    """Yields (cond, real) without end. With data=True, real is other pictures' latents and cond."""
    rng = torch.Generator().manual_seed(seed)

    def captions(scenes: Scenes) -> dict[str, Tensor]:
        return encode_text(write_captions(scenes), device)

    while True:
        cond, real = captions(sample_scenes(BATCH_SIZE, rng)), None
        if data:
            scenes = sample_scenes(BATCH_SIZE, rng)
            real = encode_pictures(render(scenes)).to(device), captions(scenes)
        yield cond, real


def tiny_students(args: argparse.Namespace, teacher: nn.Module) -> list[Distilled]:
    """Distills the few-step student, its data-aided continuation, and the one-step student.

    The continuation takes the last third of the few-step student's iterations. It starts from the
    data-free student and fake network. At first only the fake network learns. It learns to tell
    generated pictures from real ones, and follows the student's averaged weights."""
    names = ("loss", "alpha", "weight", "noise", "guidance")
    options = {name: getattr(args, name) for name in names} | {"uncond": encode_text([""], args.device)}
    distill = partial(distill_student, teacher, shape=(BATCH_SIZE, *LATENT), seed=args.seed, **options)
    batches = partial(caption_batches, args.seed + 1, args.device)
    clone = partial(sid_fm.adapt, rank=args.lora) if args.lora else copy.deepcopy
    torch.manual_seed(args.seed)  # for the adapters' first weights
    few, one = ((clone(teacher), clone(teacher)) for _ in range(2))  # student, fake network
    continued = max(1, args.iters // 3)
    with_data = {"sid_scale": args.sid_scale, "discriminator_scale": args.discriminator_scale}
    with_data["warmup"] = BATCH_SIZE * continued // 10, BATCH_SIZE * continued // 5

    def few_step(bar: tqdm) -> tuple[Distilled, Distilled]:
        run = partial(distill, steps=args.steps, bar=bar)
        free = run(*few, FEW_STEP_RATES, batches(), iters=max(1, args.iters - continued))
        start = copy.deepcopy(free.student), free.fake
        return free, run(*start, DATA_AIDED_RATES, batches(data=True), iters=continued, **with_data)

    def one_step(bar: tqdm) -> Distilled:
        return distill(*one, ONE_STEP_RATES, batches(), iters=args.iters, bar=bar, steps=1)

    done = run_jobs({"few-step student": (args.iters, few_step), "one-step student": (args.iters, one_step)})
    return [*done["few-step student"], done["one-step student"]]


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------

GROUPS = 20  # the jackknife leaves out one group of samples at a time
GUIDANCES = (1.0, 1.5, 2.5, 4.5)  # the teacher's guidance in the figure


class PictureMeasure:
    """Measures samplers, all on the same captions and from the same noise."""

    def __init__(self, samples: int, seed: int, device: str = "cpu"):
        self.seed, self.scenes = seed, sample_scenes(samples, torch.Generator().manual_seed(seed + 1000))
        self.texts = write_captions(self.scenes)
        self.cond, self.uncond = encode_text(self.texts, device), encode_text([""], device)
        self.z = torch.randn(samples, *LATENT, generator=torch.Generator().manual_seed(seed + 2000)).to(device)
        # The reference passes through the autoencoder, so that its error is not counted.
        data = render(sample_scenes(20_000, torch.Generator().manual_seed(seed + 3000)))
        data = frechet_features(decode_latents(encode_pictures(data)))
        self.mean, self.covariance = data.mean(0), data.T.cov()

    def euler(self, net: nn.Module, steps: int, guidance: float) -> Callable:
        times = torch.linspace(1, 0, steps + 1)
        return partial(sid_fm.sample_ode, net, uncond=self.uncond, times=times, guidance=guidance)

    def few_step(self, net: nn.Module, steps: int, noise: str) -> Callable:
        rng = torch.Generator().manual_seed(self.seed)
        return partial(sid_fm.generate, net, steps=steps, noise=noise, rng=rng)

    def scores(self, pictures: Tensor) -> dict[str, tuple[float, float]]:
        """Measures pictures of the first captions: [n, 3, SIZE, SIZE]. Returns name -> (value, half
        of a 95% interval). The intervals come from a jackknife over GROUPS groups."""
        scenes = Scenes(*(column[: len(pictures)] for column in self.scenes))
        found, x = read_objects(pictures), frechet_features(pictures)
        parts, answers = accuracy(found, scenes), size_and_position(found, scenes)
        caption = scenes.colour[:, 0] * len(SHAPES) + scenes.shape[:, 0]

        def figures(rows: Tensor) -> np.ndarray:
            distance = frechet_distance(x[rows], self.mean, self.covariance)
            means = [float(part[rows].nanmean()) for part in parts.values()]
            return np.array([distance, diversity(answers[rows], caption[rows]), *means])

        group = torch.arange(len(x)) % GROUPS
        left_out = np.stack([figures(group != g) for g in range(GROUPS)])
        halves = 1.96 * np.sqrt((GROUPS - 1) * left_out.var(axis=0))
        measurements = zip(("frechet", "diversity", *parts), figures(slice(None)), halves)
        return {name: (float(value), float(half)) for name, value, half in measurements}

    @torch.no_grad()
    def sample(self, sampler: Callable, count: int, bar: tqdm) -> tuple[Tensor, dict]:
        """Returns pictures of the first `count` captions, their scores and the seconds per 1000."""
        start, latents = time.perf_counter(), []
        for rows in torch.arange(count).split(250):
            cond = {name: value[rows] for name, value in self.cond.items()}
            latents.append(sampler(self.z[rows], cond).cpu())
            bar.update(len(rows))
        pictures = decode_latents(torch.cat(latents))
        seconds = (time.perf_counter() - start) * 1000 / count
        return pictures, self.scores(pictures) | {"seconds": seconds}

    def jobs(self, samplers: dict[str, Callable], count: int) -> dict[str, tuple[int, Callable]]:
        """Returns a job of run_jobs for each sampler. The job calls `sample`."""
        return {name: (count, partial(self.sample, sampler, count)) for name, sampler in samplers.items()}


def print_table(table: dict[str, dict], samples: int, guidance: float) -> None:
    print(f"\n{'':31}{'accuracy, %':>14}{'Frechet distance':>20}{'diversity, bits':>18}{'s per 1000':>13}")
    for name, line in table.items():
        (right, half), distance, bits = line["all"], line["frechet"], line["diversity"]
        cells = f"{100 * right:9.1f} ±{100 * half:3.1f}{distance[0]:13.3f} ±{distance[1]:5.3f}"
        cells += f"{bits[0]:12.2f} ±{bits[1]:4.2f}"
        print(f"{name:31}{cells}" + (f"{line['seconds']:13.2f}" if "seconds" in line else ""))
    print(f"{samples} samples a row, ± half a 95% interval; guidance {guidance:g}\n")


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def plot_guidance(file: Path, teacher: dict[str, dict], students: dict[str, dict]) -> None:
    """Plots accuracy against diversity. A point's label is, for the teacher, the guidance of its
    sampling and, for a student, where guidance was used in its distillation."""
    figure, axis = sid_fm.pyplot().subplots(figsize=(8, 4.6))
    groups = (
        (teacher, "o-", GREY, "teacher, 28 steps, guided", "left"),
        (students, "s", BLUE, "one-step students", "right"),
    )
    for rows, marker, color, label, side in groups:
        points = [(row["diversity"], 100 * row["all"]) for row in rows.values()]
        axis.plot(*zip(*points), marker, color=color, markersize=7, label=label)
        for name, (bits, right) in zip(rows, points):
            offset = (8 if side == "left" else -8, -3)
            axis.annotate(name, (bits, right), offset, textcoords="offset points", ha=side, fontsize=9, color=INK)
    axis.set(xlabel="diversity, bits (the data: 3)", ylabel="accuracy, %")
    axis.margins(0.15, 0.12)
    axis.legend(fontsize=9, loc="lower left")
    save_figure(figure, file)


def plot_pictures(file: Path, pictures: dict[str, Tensor], texts: list[str]) -> None:
    """Plots a row for each sampler and six columns: one object, two alike, "above" and "left of"."""
    lengths = {2: 1, 3: 1, 5: 2, 6: 2}  # words in a caption: how many of these captions
    chosen = [[text for text in dict.fromkeys(texts) if len(text.split()) == n][:k] for n, k in lengths.items()]
    shown = [texts.index(text) for some in chosen for text in some]
    rows = {name.replace(", ", "\n"): sid_fm.to_pixels(x[shown]) for name, x in pictures.items()}
    sid_fm.plot_images(file, rows, [texts[i] for i in shown])


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def run_tiny(args: argparse.Namespace) -> None:
    """Trains the teacher, distills students, prints a table and plots samples."""
    start = time.perf_counter()
    teacher = load_or_train_teacher(args)
    print(f"  teacher ready ({time.perf_counter() - start:.0f} s)", flush=True)
    free, aided, one = tiny_students(args, teacher)
    print(f"  students distilled ({time.perf_counter() - start:.0f} s)", flush=True)

    title, few = TITLES[args.loss], [n for n in sorted({4, 2, 1, args.steps}, reverse=True) if n <= args.steps]
    students = {  # name -> its run, and the numbers of steps that it is measured at
        f"{title} {args.steps}-step": (free, few),
        f"{title} {args.steps}-step data-aided": (aided, few),
        f"{title} one-step": (one, [1]),
    }
    measure = PictureMeasure(args.samples, args.seed, args.device)
    samplers = {f"teacher, {plural(n)}": measure.euler(teacher, n, args.guidance) for n in (28, 4, 2, 1)}
    for name, (result, counts) in students.items():
        sid_fm.save_student(result.student, None, args.out / name.lower().replace(" ", "-"))
        samplers |= {f"{name}, {plural(n)}": measure.few_step(result.student, n, args.noise) for n in counts}
    results = run_jobs(measure.jobs(samplers, args.samples))

    data = render(measure.scenes)
    data = {"data": data, "data, through the autoencoder": decode_latents(encode_pictures(data))}
    pictures = data | {name: results[name][0] for name in samplers}
    table = {name: measure.scores(x) for name, x in data.items()} | {name: results[name][1] for name in samplers}
    notes = {"args": vars(args), "seconds": time.perf_counter() - start, "table": table}
    notes["discriminator"] = float(np.mean(aided.log["discriminator"][-100:]))
    sid_fm.write_json(args.out / "results.json", notes)
    print_table(table, args.samples, args.guidance)
    print(f"  the discriminator's cross-entropy at the end: {notes['discriminator']:.3f} (0.693 is chance)")

    shown = {"data": "data", "teacher, 28 steps": "teacher, 28 steps", "teacher, 1 step": "teacher, 1 step"}
    shown |= {"student, 1 step": f"{title} one-step, 1 step"}
    shown |= {f"student, {plural(args.steps)}": f"{title} {args.steps}-step, {plural(args.steps)}"}
    plot_pictures(args.out / "samples.png", {row: pictures[name] for row, name in shown.items()}, measure.texts)
    print(f"  {notes['seconds']:.0f} s in all; weights, results.json and figures are in {args.out}")


def study_places(args: argparse.Namespace) -> None:
    """Distills one-step students of three seeds with guidance in some of three places: the fake
    network's training, the fake network in the generator's loss, and the teacher in that loss.
    Prints medians and ranges. Plots accuracy against diversity of students and guided teacher."""
    teacher, g, seeds = load_or_train_teacher(args), args.guidance, range(args.seed, args.seed + 3)
    measure, columns = PictureMeasure(args.samples, args.seed, args.device), ("all", "frechet", "diversity")
    places = {  # the few-step paper (2505.12674) names the first and the last two
        "in all three": (g, g, g),
        "nowhere": (1, 1, 1),
        "teacher alone": (1, 1, g),
        "both in the loss": (1, g, g),
        "zero-CFG": (0, 0, 1),
        "anti-CFG": (-1, -1, 1),
    }

    def scores(bar: tqdm, guidance: tuple, seed: int) -> list[float]:
        options = {"weight": args.weight, "uncond": encode_text([""], args.device), "guidance": guidance, "steps": 1}
        nets, batches = (copy.deepcopy(teacher), copy.deepcopy(teacher)), caption_batches(seed + 1, args.device)
        shape = (BATCH_SIZE, *LATENT)
        try:
            run = distill_student(teacher, *nets, ONE_STEP_RATES, batches, shape, args.iters, seed, bar, **options)
        except FloatingPointError:
            return [math.nan] * len(columns)
        _, row = measure.sample(measure.few_step(run.student, 1, "fresh"), args.samples, tqdm(disable=True))
        return [row[name][0] for name in columns]

    runs = {f"{name}, seed {i}": {"guidance": three, "seed": i} for name, three in places.items() for i in seeds}
    done = run_jobs({name: (args.iters, partial(scores, **options)) for name, options in runs.items()})
    guided = {f"{x:g}": measure.euler(teacher, 28, x) for x in GUIDANCES}
    guided = {x: row for x, (_, row) in run_jobs(measure.jobs(guided, args.samples)).items()}
    guided = {x: {name: guided[x][name][0] for name in columns} for x in guided}
    ranges = {name: np.sort([done[f"{name}, seed {i}"] for i in seeds], axis=0).T.tolist() for name in places}
    students = {name: dict(zip(columns, (row[1] for row in rows))) for name, rows in ranges.items()}
    notes = {"args": vars(args), "columns": columns, "results": done, "teacher": guided}
    sid_fm.write_json(args.out / "places.json", notes)
    print(f"\n{'guidance':18}{'the three':>15}{'accuracy, %':>24}{'Frechet distance':>24}{'diversity, bits':>24}")
    for name, three in places.items():
        line = f"{name:18}{', '.join(f'{x:g}' for x in three):>15}"
        for (low, middle, high), form in zip(ranges[name], (".1%", ".3f", ".2f")):
            line += f"{f'{middle:{form}} ({low:{form}} to {high:{form}})':>24}"
        print(line)
    for x, row in guided.items():
        print(f"{f'teacher, {x}':33}{row['all']:24.1%}{row['frechet']:24.3f}{row['diversity']:24.2f}")
    print(f"one-step students, {args.iters} iterations; medians and ranges of three seeds, {args.samples} samples each")
    plot_guidance(args.out / "guidance.png", guided, students)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = sid_fm.fail
    add = parser.add_argument
    add("--arch", choices=NETWORKS, default="mmdit", help="the network (%(default)s)")
    add("--steps", type=int, default=4, help="K of the few-step student (%(default)s)")
    add("--loss", choices=sid_fm.LOSSES, default="sid", help="loss of the students (%(default)s)")
    add("--alpha", type=float, default=1.0, help="alpha of the SiD loss (%(default)s)")
    # The authors' 1 - t gives little weight to the small noise that a student leaves in a picture.
    add("--weight", choices=sid_fm.WEIGHTS, default="1/t^2", help="w(t) of the SiD or DMD loss (%(default)s)")
    add("--noise", choices=sid_fm.NOISES, default="fresh", help="noise between the student's steps (%(default)s)")
    add("--guidance", type=float, help="guidance of the teacher and in distillation (1; with --places 2.5)")
    add("--sid-scale", type=float, default=100.0, help="factor of the SiD or DMD loss with data (%(default)s)")
    add("--discriminator-scale", type=float, default=1.0, help="factor of the discriminator's loss (%(default)s)")
    add("--lora", type=int, metavar="RANK", help="train low-rank adapters on the teacher")
    add("--quick", action="store_true", help="a short run, one minute")
    add("--places", action="store_true", help="compare guidance in each of its three places, 20 minutes")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device of the networks (%(default)s)")
    add("--teacher-iters", type=int, help="iterations of the teacher's training (7500; with --quick 700)")
    add("--iters", type=int, help="iterations of distillation (1800; with --quick 120, with --places 500)")
    add("--samples", type=int, help="samples in a table's row (4000; with --quick 200, with --places 1000)")
    add("--seed", type=int, default=0, help="seed of all random numbers (%(default)s)")
    add("--out", type=Path, default=Path("runs/dit_tiny"), help="folder of weights and figures (%(default)s)")
    args = parser.parse_args()
    sid_fm.check_numbers(args)
    args.teacher_iters = args.teacher_iters or (700 if args.quick else 7500)
    args.iters = args.iters or (120 if args.quick else 500 if args.places else 1800)
    args.samples = args.samples or (200 if args.quick else 1000 if args.places else 4000)
    args.guidance = (2.5 if args.places else 1.0) if args.guidance is None else args.guidance
    return args


def main() -> None:
    warnings.filterwarnings("ignore", "Detected call of .lr_scheduler")  # a student may wait
    with sid_fm.one_line_errors():
        args = parse()
        if args.device == "cuda" and not torch.cuda.is_available():
            raise sid_fm.BadInput("torch finds no GPU on this machine: use --device cpu")
        if args.samples < 5 * GROUPS:
            raise sid_fm.BadInput(f"--samples is {5 * GROUPS} at least: the intervals need them")
        if args.lora:  # a rank that is too large is refused before the teacher is trained
            sid_fm.adapt(tiny_network(args.arch, args.seed), args.lora)
        args.out.mkdir(parents=True, exist_ok=True)
        (study_places if args.places else run_tiny)(args)


if __name__ == "__main__":
    main()
