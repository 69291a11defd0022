"""SiD on a small text-conditioned DiT: the paper's experiment on pictures that can be scored exactly.

    python dit_tiny.py                train a teacher, distil it data-free and data-aided, print a table, draw figures
    python dit_tiny.py --quick        the same, short: to see it work
    python dit_tiny.py --arch sana    on SANA's network; --arch flux on FLUX's
    python dit_tiny.py --preset gpu   larger: pictures of 64 x 64 pixels, tens of millions of weights

Networks, losses, loop and samplers are sid_fm's. Chapters: pictures and captions; reading pictures back; networks and
latents; teacher and students; measuring; figures; the command line.
"""

import argparse
import copy
import json
import math
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sid_fm
from sid_fm import (
    add_noise,
    fail,
    finite_number,
    flow_matching_loss,
    noise_like,
    positive_integer,
    sample_times,
    whole_number,
    write_json,
)
from toy_2d import BLUE, GREY, INK, RED, TITLES, cosine, few_step, plot_decay, plural, save, workers

# ----------------------------------------------------------------------------------------------------------------------
# Pictures and captions
# ----------------------------------------------------------------------------------------------------------------------
# One object ("red circle"), two alike ("two red circles"), or a pair of two colours in a relation ("red circle left of
# blue square"). Each stands near a place that the caption settles, and never over another, so that a picture can be read
# back. Sizes and distances from the places are continuous: all pictures of a caption are one connected set.

COLOURS = {"red": (0.84, 0.16, 0.16), "green": (0.13, 0.60, 0.30), "blue": (0.16, 0.35, 0.80)}
PALETTE = torch.tensor([(0.96, 0.95, 0.92), *COLOURS.values()]) * 2 - 1  # the background, then the colours, in [-1, 1]
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left of", "above")  # along x, along y
KINDS = torch.tensor([0.4, 0.2, 0.4])  # how often: one object, two alike, a pair

# A scene is SIZE units a side, whatever the number of pixels that show it (24, or 64 with --preset gpu).
SIZE = 24
RADII = (3.5, 4.5)  # half the side of an object's box: from, to
APART = 13  # between the places of two objects
JITTER = 1.5  # how far from its place an object may stand, along x and along y


class Scenes(NamedTuple):
    """n pictures, described. Of one object the second column means nothing."""

    count: Tensor  # [n] 1 or 2
    relation: Tensor  # [n] index of RELATIONS, or -1
    colour: Tensor  # [n, 2] index of COLOURS
    shape: Tensor  # [n, 2] index of SHAPES
    radius: Tensor  # [n, 2]
    centre: Tensor  # [n, 2, 2]: x, y


def draw_scenes(n: int, rng: torch.Generator) -> Scenes:
    """Colours, shapes, sizes and places independent and uniform, but for what a caption of two objects asks for."""

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=rng)

    kind = torch.multinomial(KINDS, n, replacement=True, generator=rng)
    colour, shape = draw(len(COLOURS), n, 2), draw(len(SHAPES), n, 2)
    colour[:, 1] = (colour[:, 0] + torch.where(kind == 1, 0, 1 + draw(len(COLOURS) - 1, n))) % len(COLOURS)
    shape[:, 1] = torch.where(kind == 1, shape[:, 0], shape[:, 1])
    count, relation = 1 + (kind > 0).long(), torch.where(kind == 2, draw(len(RELATIONS), n), -1)
    return Scenes(count, relation, colour, shape, *place(count, relation, rng))


def place(count: Tensor, relation: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """radius [n, 2], centre [n, 2, 2]. One object is near the middle; two are side by side, or one above the other, never
    nearer than one unit."""
    n = len(count)
    radius = RADII[0] + (RADII[1] - RADII[0]) * torch.rand(n, 2, generator=rng)
    centre = SIZE / 2 + JITTER * (2 * torch.rand(n, 2, 2, generator=rng) - 1)
    axis = (relation == RELATIONS.index("above")).long()
    offset = torch.tensor([-APART / 2, APART / 2])
    centre[torch.arange(n), :, axis] += torch.where(count[:, None] == 1, 0, offset)
    return radius, centre


def draw_again(scenes: Scenes, rng: torch.Generator) -> Scenes:
    """Other pictures of the same captions."""
    return Scenes(*scenes[:4], *place(scenes.count, scenes.relation, rng))


def captions(scenes: Scenes) -> list[str]:
    names, texts = [*COLOURS], []
    for count, relation, colour, shape in zip(*(scenes[i].tolist() for i in range(4))):
        first, second = (f"{names[c]} {SHAPES[s]}" for c, s in zip(colour, shape))
        pair = f"{first} {RELATIONS[relation]} {second}" if relation >= 0 else f"two {first}s"
        texts.append(first if count == 1 else pair)
    return texts


@cache
def palette_on(device: torch.device) -> Tensor:
    """Copied once: such a copy makes the host wait for a GPU."""
    return PALETTE.to(device)


def pixels_of(size: int, device: torch.device) -> Tensor:
    """Where the middles of a picture's `size` columns, or rows, are in the scene."""
    return (torch.arange(size, device=device) + 0.5) * (SIZE / size)


def coverage(shape: Tensor, radius: Tensor, centre: Tensor, size: int) -> Tensor:
    """How much of each pixel an object covers, by its signed distance. [n], [n], [n, 2] -> [n, size, size] in [0, 1]"""
    grid = pixels_of(size, radius.device)
    x, y, r = (grid - centre[:, :1])[:, None, :], (grid - centre[:, 1:])[:, :, None], radius[:, None, None]
    circle, square = torch.hypot(x, y) - r, torch.maximum(x.abs(), y.abs()) - r
    triangle = torch.maximum(y - r, (2 * x.abs() - y - r) / 5**0.5)
    distance = torch.stack([circle, square, triangle])[shape, torch.arange(len(shape), device=shape.device)]
    return (0.5 - distance * (size / SIZE)).clamp(0, 1)


def render(scenes: Scenes, size: int = SIZE) -> Tensor:
    """-> pictures [n, 3, size, size] in [-1, 1], where the scenes' tensors are"""
    palette = palette_on(scenes.radius.device)
    pictures = palette[0][:, None, None].expand(len(scenes.count), 3, size, size)
    for i in range(2):
        cover = coverage(scenes.shape[:, i], scenes.radius[:, i], scenes.centre[:, i], size)
        cover = (cover * (scenes.count > i)[:, None, None])[:, None]
        pictures = pictures + cover * (palette[1:][scenes.colour[:, i]][:, :, None, None] - pictures)
    return pictures


# ----------------------------------------------------------------------------------------------------------------------
# Reading pictures back
# ----------------------------------------------------------------------------------------------------------------------

LEAST_AREA = 8  # of the scene; smaller specks are no objects
LEAST_OVERLAP = 0.6  # intersection over union with the best template; below it an object's shape cannot be read
UNREADABLE = len(SHAPES)


class Found(NamedTuple):
    """The objects of a batch of pictures, in one list."""

    picture: Tensor  # [m] index of the picture
    colour: Tensor  # [m] index of COLOURS
    shape: Tensor  # [m] index of SHAPES, or UNREADABLE
    radius: Tensor  # [m]
    centre: Tensor  # [m, 2]: x, y


def read_objects(pictures: Tensor) -> Found:
    """Each pixel's nearest colour; connected pixels (of 8 neighbours) of one colour are an object. How far the colours
    there and at the edge are from the background's says how much of a pixel is covered. For each shape, the covered area
    gives a radius and its centroid a centre; of the three so drawn the one that overlaps most is read. No learned part.

    pictures: [n, 3, size, size]
    """
    size, palette = pictures.shape[-1], palette_on(pictures.device)
    area_of_pixel, places = (SIZE / size) ** 2, size**2 + 1
    nearest = (pictures[:, None] - palette[:, :, None, None]).square().sum(2).argmin(1)
    masks = F.one_hot(nearest, len(PALETTE))[..., 1:].permute(0, 3, 1, 2).float()
    label = masks * torch.arange(1, places, device=pictures.device).view(size, size)
    while not torch.equal(label, spread := F.max_pool2d(label, 3, 1, 1) * masks):
        label = spread  # the largest label of an object floods it
    picture, colour, y, x = label.nonzero(as_tuple=True)
    key = (picture * len(COLOURS) + colour) * places + label[picture, colour, y, x].long()
    key, pixels = key.unique(return_counts=True)
    key = key[pixels * area_of_pixel >= LEAST_AREA]
    picture, colour = key // places // len(COLOURS), key // places % len(COLOURS)
    mask = label[picture, colour] == (key % places)[:, None, None]
    tint = palette[1:] - palette[0]
    tint = (tint / tint.square().sum(1, keepdim=True))[colour]
    covered = torch.einsum("mcyx,mc->myx", pictures[picture] - palette[0][:, None, None], tint).clamp(0, 1)
    edge = (F.max_pool2d(mask[:, None].float(), 3, 1, 1)[:, 0] > 0) & (nearest[picture] == 0)
    covered = covered * (mask | edge)
    total, grid = covered.sum((1, 2)), pixels_of(size, pictures.device)
    centroid = torch.stack([covered.sum(1) @ grid, covered.sum(2) @ grid], 1) / total[:, None]
    # Areas are pi r^2, (2 r)^2 and 2 r^2; a triangle's centroid lies r / 3 below the middle of its box.
    radii = (total * area_of_pixel / torch.tensor([math.pi, 4, 2]).to(total)[:, None]).sqrt()
    below = torch.tensor([[0, 0], [0, 0], [0, 1 / 3]]).to(total)
    centres = centroid - radii[..., None] * below[:, None]
    overlap = []
    for shape in range(len(SHAPES)):
        template = coverage(torch.full_like(picture, shape), radii[shape], centres[shape], size)
        overlap.append(torch.minimum(template, covered).sum((1, 2)) / torch.maximum(template, covered).sum((1, 2)))
    overlap, shape = torch.stack(overlap).max(0)
    best = shape, torch.arange(len(shape), device=shape.device)
    return Found(picture, colour, torch.where(overlap > LEAST_OVERLAP, shape, UNREADABLE), radii[best], centres[best])


def accuracy(found: Found, scenes: Scenes) -> dict[str, Tensor]:
    """Whether each picture shows its caption, 0 or 1, in the spirit of GenEval: the objects' shapes, their colours, how
    many there are, the relation (nan where the caption has none), and all of it. Tensors [n]"""
    n, rows = len(scenes.count), torch.arange(len(scenes.count))
    got = torch.zeros(n, len(COLOURS), len(SHAPES) + 1, dtype=torch.long)  # how many of each colour and shape
    asked = torch.zeros_like(got)
    got.index_put_((found.picture, found.colour, found.shape), torch.tensor(1), accumulate=True)
    for i in range(2):
        asked[rows, scenes.colour[:, i], scenes.shape[:, i]] += (scenes.count > i).long()
    span = torch.zeros(n, len(COLOURS), 3)  # of a colour that has one object: its centre and radius
    span.index_put_((found.picture, found.colour), torch.cat([found.centre, found.radius[:, None]], 1))
    first, second = (span[rows, scenes.colour[:, i]] for i in range(2))
    alone = (got.sum(2)[rows[:, None], scenes.colour] == 1).all(1)
    axis, related = scenes.relation.clamp(min=0), scenes.relation >= 0
    distance = (second - first)[rows, axis]
    apart = alone & (distance > first[:, 2]) & (distance > second[:, 2])  # neither's centre is beside the other
    return {
        "object": (got.sum(1) == asked.sum(1)).all(1).float(),
        "colour": ((got.sum(2) > 0) == (asked.sum(2) > 0)).all(1).float(),
        "count": (got.sum((1, 2)) == scenes.count).float(),
        "relation": apart.float().masked_fill(~related, math.nan),
        "all": ((got == asked).flatten(1).all(1) & (apart | ~related)).float(),
    }


def where_drawn(found: Found, scenes: Scenes) -> Tensor:
    """Of the object, where one was asked for and one was found: is it larger than the middle size, right of the middle,
    below it? 0 or 1, [n, 3]; -1 elsewhere."""
    one = ((scenes.count == 1) & (torch.bincount(found.picture, minlength=len(scenes.count)) == 1))[found.picture]
    bins = torch.full((len(scenes.count), 3), -1)
    values = torch.cat([found.radius[:, None] > sum(RADII) / 2, found.centre > SIZE / 2], 1).long()
    bins[found.picture[one]] = values[one]
    return bins


def diversity(bins: Tensor, caption: Tensor) -> float:
    """Bits: the entropies of the three answers, summed, given the caption (one of 9), with Miller and Madow's correction
    for finite samples; 3 where all are even. bins: from where_drawn, caption: [n]"""
    drawn, bits = bins[:, 0] >= 0, 0.0
    for values in bins[drawn].T:
        h = torch.bincount(caption[drawn] * 2 + values, minlength=18).view(9, 2).double()
        total = h.sum(1).clamp(min=1)
        entropy = torch.special.entr(h / total[:, None]).sum(1) + ((h > 0).sum(1) - 1).clamp(min=0) / (2 * total)
        bits += float(entropy.mean()) / math.log(2)
    return bits


def features(pictures: Tensor) -> Tensor:
    """What the Frechet distance is measured on, [n, 64]: colours (48) and strength of edges (16), averaged over a grid
    of 4 x 4."""
    dx, dy = pictures.diff(dim=3)[:, :, :-1], pictures.diff(dim=2)[..., :-1]
    edges = (dx.square() + dy.square()).sum(1, keepdim=True).add(1e-6).sqrt()
    return torch.cat([F.adaptive_avg_pool2d(part, 4).flatten(1) for part in (pictures, edges)], 1).double()


def frechet(x: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """|m - mean|^2 + tr(C + covariance - 2 (C covariance)^(1/2)), m and C the moments of x: [n, d], of doubles"""
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ x.T.cov() @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - mean).square().sum() + x.T.cov().trace() + covariance.trace() - 2 * cross)


# ----------------------------------------------------------------------------------------------------------------------
# Networks and latents
# ----------------------------------------------------------------------------------------------------------------------

WORDS = ["", "two", *RELATIONS, *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES)]
LENGTH, WIDTH = 5, 96  # of a caption, in words; of a word's embedding
# Frozen, and by position: each word in each place has its own orthogonal direction, so that no two captions are alike.
EMBEDDING = nn.init.orthogonal_(torch.empty(LENGTH * len(WORDS), WIDTH), generator=torch.Generator().manual_seed(7))
EMBEDDING = EMBEDDING.view(LENGTH, len(WORDS), WIDTH) * WIDTH**0.5
BLOCK, CHANNELS = 4, 12  # a latent pixel stands for BLOCK x BLOCK pixels


def latent_shape(size: int = SIZE) -> tuple[int, int, int]:
    """Of a picture of size x size pixels."""
    return CHANNELS, size // BLOCK, size // BLOCK


class Preset(NamedTuple):
    """What --preset settles: pictures, network, and how long it is trained."""

    size: int  # pixels a side of a picture
    heads: int
    head_dim: int
    layers: int
    batch: int
    teacher_iters: int
    iters: int  # of distillation
    samples: int  # a row of the table

    @property
    def rate(self) -> float:
        """What learning rates are multiplied by: those below are for a width of 64, and Adam wants them as 1 / width."""
        return 64 / (self.heads * self.head_dim)


LAPTOP = Preset(SIZE, 4, 16, 4, 64, 4500, 1800, 4000)
PRESETS = {
    "laptop": LAPTOP,
    "quick": LAPTOP._replace(teacher_iters=900, iters=150, samples=200),
    "gpu": Preset(64, 5, 64, 8, 64, 4000, 1500, 4000),
}

NETWORKS = {"mmdit": sid_fm.SD3, "sana": sid_fm.SANA, "flux": sid_fm.FLUX1}  # the pipelines whose networks they are


def network(arch: str, preset: Preset) -> dict:
    """The configuration, as a checkpoint's config.json has it."""
    side, head, layers = latent_shape(preset.size)[1], preset.head_dim, preset.layers
    common = {"num_attention_heads": preset.heads, "attention_head_dim": head}
    # fmt: off
    return common | {
        "mmdit": {  # sample_size spreads the table of positions, for so few tokens to be far apart in it
            "patch_size": 2, "in_channels": CHANNELS, "num_layers": layers, "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH, "pos_embed_max_size": side // 2, "sample_size": 4 * side},
        "sana": {
            "patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": layers,
            "num_cross_attention_heads": preset.heads, "caption_channels": WIDTH, "sample_size": side},
        "flux": {
            "in_channels": 4 * CHANNELS, "num_layers": layers // 4, "num_single_layers": layers - layers // 4,
            "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH,
            "axes_dims_rope": [head // 4, 3 * head // 8, 3 * head // 8]},
    }[arch]
    # fmt: on


def build(arch: str, seed: int, preset: Preset = LAPTOP) -> nn.Module:
    """sid_fm's network at a small size. Gates and the output start at zero, as DiT's do: each block as the identity."""
    family = sid_fm.PIPELINES[NETWORKS[arch]]
    torch.manual_seed(seed)
    net = sid_fm.build(family.backbone, sid_fm.network_config(family, network(arch, preset)))
    for layer in [net.proj_out, *(m.linear for m in net.modules() if isinstance(m, sid_fm.Modulation))]:
        nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return net


def encode_text(texts: list[str]) -> dict[str, Tensor]:
    """cond of sid_fm's networks: text [B, LENGTH, WIDTH], pooled [B, WIDTH], mask [B, LENGTH]. "" is the empty prompt."""
    index = {word.replace(" ", "_"): i for i, word in enumerate(WORDS)}
    joined = {relation: relation.replace(" ", "_") for relation in RELATIONS}
    rows = []
    for text in texts:
        for relation, word in joined.items():
            text = text.replace(relation, word)
        words = [index[word] for word in text.split()]
        rows.append(words + [0] * (LENGTH - len(words)))
    ids = torch.tensor(rows)
    text, mask = EMBEDDING[torch.arange(LENGTH), ids], ids > 0
    mask[:, 0] = True  # attention wants one word at least
    return {"text": text, "pooled": text.mean(1) * LENGTH**0.5, "mask": mask}


class Autoencoder:
    """The real teachers' autoencoder in miniature, linear and exact: the first CHANNELS principal components of blocks
    of BLOCK x BLOCK pixels, each scaled to unit variance."""

    def __init__(self, size: int = SIZE, device: str = "cpu") -> None:
        self.size, self.device = size, device
        # A larger picture shows as much through so many times the noise: the shift of times in SD3 (arXiv 2403.03206).
        self.shift = size / SIZE
        blocks = self.split(render(draw_scenes(4000, torch.Generator().manual_seed(0)), size)).flatten(0, 2)
        variance, vectors = torch.linalg.eigh(blocks.T.cov())
        parts = blocks.mean(0), vectors[:, -CHANNELS:], variance[-CHANNELS:].sqrt()
        self.mean, self.vectors, self.scale = (x.to(device) for x in parts)

    @staticmethod
    def split(pictures: Tensor) -> Tensor:
        return F.pixel_unshuffle(pictures, BLOCK).movedim(1, -1)

    def draw(self, scenes: Scenes) -> Tensor:
        """The scenes' pictures, drawn on the device."""
        return render(Scenes(*(on_device(x, self.device) for x in scenes)), self.size)

    def of(self, scenes: Scenes) -> Tensor:
        """The scenes' latents."""
        return self.encode(self.draw(scenes))

    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, size, size] -> [B, CHANNELS, size / BLOCK, size / BLOCK]"""
        return ((self.split(pictures) - self.mean) @ self.vectors / self.scale).movedim(-1, 1).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """[B, CHANNELS, size / BLOCK, size / BLOCK] -> [B, 3, size, size]"""
        blocks = (latents.movedim(1, -1) * self.scale) @ self.vectors.T + self.mean
        return F.pixel_shuffle(blocks.movedim(-1, 1), BLOCK)


class Recorded:
    """Iterations of training on a GPU, recorded once and then replayed as CUDA graphs: the kernels of networks so small take
    less time to run than to launch one by one.

    iteration: of tensors that come anew each time, (cond, x_0 or None) -> tensors by name. What its host code decides must
    follow from the `kind` that a call names: there is a recording of each. rng: what it draws its noise from.
    """

    def __init__(self, iteration: Callable[[dict, Tensor | None], dict[str, Tensor]], rng: torch.Generator):
        self.iteration, self.rng, self.recordings = iteration, rng, {}
        self.stream, self.memory = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, kind: object, cond: dict, x_0: Tensor | None = None) -> dict[str, Tensor]:
        if kind not in self.recordings:
            # The first of a kind runs as it is, which makes what stays: the optimizers' states, the libraries' workspaces.
            self.recordings[kind] = None
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an optimizer's, that its step could be recorded and is not
                outputs = self.iteration(cond, x_0)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.recordings[kind] is None:
            self.recordings[kind] = self.record(cond, x_0)
        graph, inputs, outputs = self.recordings[kind]
        for kept, new in zip(inputs, (*cond.values(), x_0)):
            if kept is not None:
                kept.copy_(new)
        graph.replay()
        return {name: value.clone() for name, value in outputs.items()}  # the next replay overwrites its own

    def record(self, cond: dict, x_0: Tensor | None) -> tuple:
        cond = {key: value.clone() for key, value in cond.items()}
        x_0 = None if x_0 is None else x_0.clone()
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.rng)
        with torch.cuda.graph(graph, pool=self.memory, stream=self.stream):
            outputs = self.iteration(cond, x_0)
        return graph, (*cond.values(), x_0), outputs


def adam(weights: list[Tensor], rate: float, betas: tuple[float, float]) -> torch.optim.Adam:
    """On a GPU the learning rate is a tensor, which a recorded step reads there."""
    device = weights[0].device
    recorded = device.type == "cuda"
    lr = torch.tensor(rate, device=device) if recorded else rate
    return torch.optim.Adam(weights, lr=lr, betas=betas, fused=True, capturable=recorded)


def on_device(x: Tensor, device: str) -> Tensor:
    """From pinned memory a copy to a GPU doesn't make the host wait."""
    return x if device == "cpu" else x.pin_memory().to(device, non_blocking=True)


# ----------------------------------------------------------------------------------------------------------------------
# Teacher and students
# ----------------------------------------------------------------------------------------------------------------------

DROPPED = 0.1  # share of captions that the teacher's training replaces by the empty prompt
TEACHER_LR = 5e-3
# Learning rates of the student and of its fake network, which has to keep up.
FEW_STEPS, ONE_STEP, DATA_AIDED = (3e-4, 2e-3), (1e-3, 3e-3), (1e-4, 1e-3)


def train_teacher(
    net: nn.Module,
    autoencoder: Autoencoder,
    preset: Preset,
    iters: int,
    seed: int,
    submit: Callable,
    tick: Callable[[Tensor], None],
) -> nn.Module:
    """Flow matching with caption dropout. On a CPU each half of a batch has a thread of its own: at this size two threads
    inside one operation gain nothing. Returns the running mean of the weights."""
    rng, batch, device = torch.Generator().manual_seed(seed), preset.batch, autoencoder.device
    noise = rng if device == "cpu" else torch.Generator(device).manual_seed(seed)
    empty, average, weights = encode_text([""]), copy.deepcopy(net), list(net.parameters())
    optimizer = adam(weights, preset.rate * TEACHER_LR, (0.9, 0.99))
    schedule = cosine(optimizer, iters)

    def iteration(cond: dict, x_0: Tensor) -> dict[str, Tensor]:
        e, t = noise_like(x_0, noise), sample_times(batch, (math.log(autoencoder.shift), 1.0), rng=noise)

        def gradients(part: slice) -> tuple[Tensor, tuple[Tensor, ...]]:
            some = {key: value[part] for key, value in cond.items()}
            loss = flow_matching_loss(
                net(add_noise(x_0[part], e[part], t[part]), t[part], some), x_0[part], e[part], t[part]
            )
            return loss.detach(), torch.autograd.grad(loss, weights, materialize_grads=True)

        if device == "cpu":
            jobs = [submit(gradients, part) for part in (slice(batch // 2), slice(batch // 2, batch))]
            losses, grads = zip(*(job.result() for job in jobs))
            loss, grads = sum(losses) / 2, [(first + second) / 2 for first, second in zip(*grads)]
        else:
            loss, grads = gradients(slice(batch))
        for weight, grad in zip(weights, grads):
            weight.grad = grad
        optimizer.step()
        running_mean(average, net, 0.99 if i else 0.0)  # no recording is made of the first iteration
        return {"loss": loss / x_0[0].numel()}

    step = (lambda _, *inputs: iteration(*inputs)) if device == "cpu" else Recorded(iteration, noise)
    for i in range(iters):
        scenes = draw_scenes(batch, rng)
        dropped = torch.rand(batch, generator=rng) < DROPPED
        cond = encode_text(captions(scenes))
        cond = {key: torch.where(sid_fm.match_dims(dropped, v), empty[key], v) for key, v in cond.items()}
        cond = {key: on_device(value, device) for key, value in cond.items()}
        measured = step("teacher", cond, autoencoder.of(scenes))
        schedule.step()
        tick(measured["loss"])
    return average.requires_grad_(False)


def running_mean(average: nn.Module, net: nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) net, weight by weight."""
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    update([*average.parameters()], [*net.parameters()], None)


MAKING = threading.Lock()  # adapters are drawn from torch's own generator, which all threads share


class Distilled(NamedTuple):
    student: nn.Module  # the running mean of its weights
    fake: nn.Module
    copies: dict[int, nn.Module]  # of the same, along the way
    judged: float | None  # the discriminator's cross-entropy by the logit at the end, data-aided


def distil(
    teacher: nn.Module,
    autoencoder: Autoencoder,
    iters: int,
    seed: int,
    tick: Callable[[Tensor], None],
    start: Distilled | None = None,
    lora: int | None = None,
    preset: Preset = LAPTOP,
    **options,
) -> Distilled:
    """One run of sid_fm.distill: data-free, or, from where `start` ended, data-aided; lora: the adapters' rank, if any."""
    make = partial(sid_fm.adapt, rank=lora) if lora else copy.deepcopy
    teacher = copy.deepcopy(teacher)
    with MAKING:
        torch.manual_seed(seed)
        student, fake = (
            (copy.deepcopy(start.student), copy.deepcopy(start.fake)) if start else (make(teacher), make(teacher))
        )
    average, steps, batch, device = copy.deepcopy(student), options["steps"], preset.batch, autoencoder.device
    rates = DATA_AIDED if start else ONE_STEP if steps == 1 else FEW_STEPS
    nets = teacher, student, fake
    optimizers = [adam(sid_fm.trained(net), preset.rate * lr, (0.0, 0.99)) for net, lr in zip(nets[1:], rates)]
    schedules = [cosine(optimizer, iters) for optimizer in optimizers]
    rng, data = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    # Data-aided, the fake network first learns to judge, and to follow the mean of the student's weights.
    wait, alone = (batch * iters // 10, batch * iters // 5) if start else (0, 0)
    uncond = {key: value.to(device) for key, value in encode_text([""]).items()}
    options |= {"rng": rng, "warmup": (wait, alone), "uncond": uncond}

    def iteration(cond: dict, real: Tensor | None) -> dict[str, Tensor]:
        """Iteration i of sid_fm.distill, by itself: what a GPU records."""
        shape = batch, *latent_shape(preset.size)
        (measured,) = sid_fm.distill(*nets, optimizers, [(cond, real)], shape, start=i, iters=i + 1, **options)
        running_mean(average, student, 0.98 if i else 0.0)
        return {name: value for name, value in measured.items() if isinstance(value, Tensor)}

    step = (lambda _, *inputs: iteration(*inputs)) if device == "cpu" else Recorded(iteration, rng)
    entropies, copies, marks, skipped = [], {}, {*np.geomspace(1, iters, 12).astype(int).tolist()}, 0
    for i in range(iters):
        scenes, images = draw_scenes(batch, data), i * batch
        cond = {key: on_device(value, device) for key, value in encode_text(captions(scenes)).items()}
        real = autoencoder.of(scenes) if start else None
        measured = step((sid_fm.sample_k(steps, i, rng), images >= wait, images >= alone), cond, real)
        schedules[1].step()
        if images >= wait:
            schedules[0].step()
        skipped = skipped + measured["skipped"]
        if (i % 50 == 0 or i + 1 == iters) and skipped:  # waits for a GPU
            said = ", ".join(f"{name} {options[name]}" for name in ("loss", "alpha", "weight", "guidance"))
            raise FloatingPointError(f"a student diverged ({plural(steps)}, {said})")
        if start:
            entropies.append(measured["discriminator"])
        if i + 1 in marks:
            copies[i + 1] = copy.deepcopy(average)
        tick(measured["fisher"])
    judged = float(torch.stack(entropies[-100:]).mean()) if start else None
    return Distilled(average.requires_grad_(False), fake, copies, judged)


def open_network(arch: str, folder: Path, device: str = "cpu") -> nn.Module:
    part = sid_fm.open_part(sid_fm.PIPELINES[NETWORKS[arch]].backbone, folder)
    return sid_fm.fill_part(*part, device, torch.float32)


def prepare_teacher(args: argparse.Namespace, autoencoder: Autoencoder) -> nn.Module:
    """The teacher of a former run with the same settings, or a new one, saved in the diffusers layout."""
    folder = args.out / "teacher"
    preset = PRESETS[args.preset]
    settings = {"arch": args.arch, "iterations": args.teacher_iters, "seed": args.seed, "device": args.device}
    settings |= {key: getattr(preset, key) for key in ("size", "heads", "head_dim", "layers", "batch")}
    notes = folder / "training.json"
    if notes.is_file() and json.loads(notes.read_text()) == settings:
        print(f"  teacher: the one in {folder}")
        return open_network(args.arch, folder, args.device)
    net = build(args.arch, args.seed, preset).to(args.device)
    with workers("teacher", args.teacher_iters) as (submit, tick):
        net = train_teacher(net, autoencoder, preset, args.teacher_iters, args.seed, submit, tick("loss"))
    sid_fm.save_student(net, None, folder)
    write_json(notes, settings)
    return net


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------

GROUPS = 20  # of the jackknife


class Measure:
    """Every row of the table has the same captions and the same noise. batch: of pictures that are sampled together"""

    def __init__(self, autoencoder: Autoencoder, samples: int, seed: int, batch: int = LAPTOP.batch):
        self.autoencoder, self.batch, device = autoencoder, batch, autoencoder.device
        self.scenes = draw_scenes(samples, torch.Generator().manual_seed(seed + 1000))
        self.texts = captions(self.scenes)
        self.cond, self.empty = (
            {key: value.to(device) for key, value in encode_text(texts).items()} for texts in (self.texts, [""])
        )
        rng = torch.Generator().manual_seed(seed + 2000)
        self.z = torch.randn(samples, *latent_shape(autoencoder.size), generator=rng).to(device)
        # Against data as the autoencoder shows them: what it loses is no network's doing.
        scenes = draw_scenes(20_000, torch.Generator().manual_seed(seed + 3000))
        real = features(autoencoder.decode(autoencoder.of(scenes))).cpu()
        self.mean, self.covariance = real.mean(0), real.T.cov()

    @torch.no_grad()
    def sample(self, sampler: Callable[[Tensor, dict], Tensor]) -> tuple[Tensor, float]:
        """-> pictures [samples, 3, size, size], seconds per thousand"""
        start = time.perf_counter()
        parts = zip(self.z.split(self.batch), *(value.split(self.batch) for value in self.cond.values()))
        latents = torch.cat([sampler(z, dict(zip(self.cond, values))) for z, *values in parts])
        pictures = self.autoencoder.decode(latents)
        if pictures.is_cuda:
            torch.cuda.synchronize()
        return pictures, (time.perf_counter() - start) * 1000 / len(latents)

    def __call__(self, pictures: Tensor) -> dict[str, tuple[float, float]]:
        """Each figure with half the width of its 95% interval, by a delete-one-group jackknife."""
        found = Found(*(x.cpu() for x in read_objects(pictures)))
        right, bins, x = accuracy(found, self.scenes), where_drawn(found, self.scenes), features(pictures).cpu()
        caption = self.scenes.colour[:, 0] * len(SHAPES) + self.scenes.shape[:, 0]

        def figures(rows: Tensor) -> np.ndarray:
            values = [frechet(x[rows], self.mean, self.covariance), diversity(bins[rows], caption[rows])]
            return np.array(values + [float(value[rows].nanmean()) for value in right.values()])

        group = torch.arange(len(x)) % GROUPS
        left_out = np.stack([figures(group != g) for g in range(GROUPS)])
        half = 1.96 * np.sqrt((GROUPS - 1) * left_out.var(axis=0))
        whole = figures(group >= 0)
        return {name: (float(v), float(h)) for name, v, h in zip(("frechet", "diversity", *right), whole, half)}

    def euler(self, net: nn.Module, steps: int, guidance: float) -> Callable[[Tensor, dict], Tensor]:
        times, s = torch.linspace(1, 0, steps + 1), self.autoencoder.shift
        times = s * times / (1 + (s - 1) * times)
        return lambda z, cond: sid_fm.sample_ode(net, z, cond, self.empty, times, guidance)


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------

GUIDANCES = (1.0, 2.5, 4.5, 7.0)


def draw_convergence(out: Path, distances: dict[int, float], title: str) -> None:
    """Frechet distance against iterations: the paper says that it falls exponentially."""
    figure, axes = sid_fm.pyplot().subplots(1, 2, figsize=(10, 3.8), sharey=True)
    x, y = np.array([*distances]), np.array([*distances.values()])
    plot_decay(axes, f"Frechet distance, {title}", x, y, int(y.argmax()), BLUE)
    save(figure, out, "convergence.png")


def draw_guidance(out: Path, teacher: dict[float, dict], students: dict[str, dict], guidance: float) -> None:
    """Accuracy and diversity against the guidance that the teacher is sampled with, and that students learned from."""
    figure, axes = sid_fm.pyplot().subplots(1, 2, figsize=(10, 3.8))
    panels = (("all", "accuracy, all of the caption, %", 100), ("diversity", "diversity, bits", 1))
    for axis, (key, label, scale) in zip(axes, panels):
        values, halves = scale * torch.tensor([line[key] for line in teacher.values()]).T
        axis.errorbar([*teacher], values, halves, color=GREY, marker="o", capsize=3, label="teacher, 28 steps")
        for i, (name, line) in enumerate(students.items(), 1):  # beside each other, to be told apart
            style = {"color": (BLUE, RED, INK)[i - 1], "marker": "s", "capsize": 3, "label": name}
            axis.errorbar([guidance + 0.12 * i], [scale * line[key][0]], [scale * line[key][1]], **style)
        axis.set(xlabel=f"guidance (students: distilled at {guidance:g}, drawn aside)", ylabel=label)
    axes[0].legend(fontsize=8.5)
    save(figure, out, "guidance.png")


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    """Teacher, students, table, figures."""
    start, preset = time.perf_counter(), PRESETS[args.preset]
    threads = 2 if args.device == "cpu" else 1  # a GPU has one queue, and records graphs while nothing else runs
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # products in TF32
    autoencoder = Autoencoder(preset.size, args.device)
    teacher = prepare_teacher(args, autoencoder)
    count = sum(weight.numel() for weight in teacher.parameters()) / 1e6
    said = f"{count:.2f} million weights, {args.teacher_iters} iterations of {preset.batch}"
    print(f"  teacher ready: {said} ({time.perf_counter() - start:.0f} s)", flush=True)
    options = {name: getattr(args, name) for name in ("loss", "alpha", "weight", "noise", "guidance", "lora", "seed")}
    free, one, aided = (
        f"{TITLES[args.loss]} {name}" for name in (f"{args.steps}-step", "one-step", f"{args.steps}-step data-aided")
    )
    third = args.iters // 3  # of the iterations continue data-aided, while the one-step student has all
    with workers("distilling", args.iters * 2, threads) as (submit, tick):
        run_one = partial(distil, teacher, autoencoder, tick=tick("Fisher estimate"), preset=preset, **options)

        def both() -> tuple[Distilled, Distilled]:
            first = run_one(iters=args.iters - third, steps=args.steps)
            return first, run_one(iters=max(1, third), steps=args.steps, start=first)

        jobs = submit(both), submit(run_one, iters=args.iters, steps=1)
        (first, second), dedicated = (job.result() for job in jobs)
    students = {free: first.student, aided: second.student, one: dedicated.student}
    for name, student in students.items():
        sid_fm.save_student(student, None, args.out / name.lower().replace(" ", "-"))
    print(f"  {len(students)} students distilled ({time.perf_counter() - start:.0f} s)", flush=True)

    measure = Measure(autoencoder, args.samples, args.seed, preset.batch if args.device == "cpu" else 2000)
    fresh = draw_again(measure.scenes, torch.Generator().manual_seed(args.seed + 4000))
    rows = {
        "data": ("-", lambda: (autoencoder.draw(fresh), math.nan)),
        "data, through the autoencoder": ("-", lambda: (autoencoder.decode(autoencoder.of(fresh)), math.nan)),
    }
    for n in (28, 4, 2, 1):
        rows[f"teacher, {plural(n)}"] = n, partial(measure.sample, measure.euler(teacher, n, args.guidance))
    for name, student in students.items():
        for n in sorted({1, 2, 4, args.steps}, reverse=True):
            if n <= (1 if name == one else args.steps):
                rows[f"{name}, {plural(n)}"] = n, partial(measure.sample, few_step(student, n, args.noise, args.seed))
    sweep = {g: measure.euler(teacher, 28, g) for g in GUIDANCES if g != args.guidance}

    def fill(job: Callable[[], tuple[Tensor, float]], tick: Callable[[Tensor], None]) -> tuple[Tensor, dict]:
        pictures, seconds = job()
        line = measure(pictures) | {"seconds": seconds}
        tick(torch.tensor(line["all"][0]))
        return pictures, line

    with workers("measuring", len(rows) + len(sweep) + len(dedicated.copies), threads) as (submit, tick):
        tick = tick("accuracy")
        lines = {name: (n, submit(fill, job, tick)) for name, (n, job) in rows.items()}
        guided = {g: submit(fill, partial(measure.sample, sampler), tick) for g, sampler in sweep.items()}
        along = {
            i: submit(fill, partial(measure.sample, few_step(net, 1, args.noise, args.seed)), tick)
            for i, net in dedicated.copies.items()
        }
        pictures = {name: job.result()[0] for name, (_, job) in lines.items()}
        table = {name: {"steps": n} | job.result()[1] for name, (n, job) in lines.items()}
        guided = {g: job.result()[1] for g, job in guided.items()}
        along = {i: job.result()[1]["frechet"][0] for i, job in along.items()}

    print_table(table, args)
    print(f"  the discriminator's cross-entropy at the end: {second.judged:.3f} (log 2 = 0.693 where it tells nothing)")
    guided |= {args.guidance: table["teacher, 28 steps"]}
    seconds = time.perf_counter() - start
    settings = vars(args) | {"out": str(args.out)}
    guidance = {str(g): guided[g] for g in sorted(guided)}
    write_json(
        args.out / "results.json",
        {
            "args": settings,
            "seconds": seconds,
            "table": table,
            "discriminator": second.judged,
            "guidance": guidance,
            "convergence": along,
        },
    )
    shown = [measure.texts.index(text) for text in dict.fromkeys(sorted(measure.texts, key=len))]
    shown = shown[:: max(1, len(shown) // 8)][:8]
    names = ["data", *(f"teacher, {plural(n)}" for n in (28, 4, 1))]
    names += [f"{free}, {plural(args.steps)}", f"{aided}, {plural(args.steps)}", f"{one}, 1 step"]
    panels = {
        name.replace(", ", "\n").replace(" data", "\ndata"): sid_fm.to_pixels(pictures[name][shown])
        for name in dict.fromkeys(names)
    }
    sid_fm.draw_samples(args.out / "samples.png", panels, [measure.texts[i] for i in shown])
    print(f"  drew {args.out / 'samples.png'}")
    draw_convergence(args.out, along, f"{one} student")
    best = {name: table[f"{name}, {plural(1 if name == one else args.steps)}"] for name in students}
    draw_guidance(args.out, {g: guided[g] for g in sorted(guided)}, best, args.guidance)
    print(f"  {seconds:.0f} s in all")


def print_table(table: dict[str, dict], args: argparse.Namespace) -> None:
    categories = ("all", "object", "colour", "count", "relation")
    print(f"\n{'':31}{'Frechet':>14}{'diversity':>13}" + "".join(f"{name:>11}" for name in categories) + "  s/1000")
    for name, line in table.items():
        cells = f"{line['frechet'][0]:8.3f} ±{line['frechet'][1]:5.3f}{line['diversity'][0]:7.2f} ±{line['diversity'][1]:4.2f}"
        cells += "".join(f"{100 * line[key][0]:6.1f} ±{100 * line[key][1]:3.1f}" for key in categories)
        seconds = "" if math.isnan(line["seconds"]) else f"{line['seconds']:8.2f}"
        print(f"{name:31}{cells}{seconds}")
    print(f"{args.samples} samples a row, ± half a 95% interval; accuracy in %, guidance {args.guidance:g}\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = fail
    add = parser.add_argument
    add("--arch", choices=NETWORKS, default="mmdit", help="the network (%(default)s)")
    add("--steps", type=positive_integer, default=4, help="K of the few-step student (%(default)s)")
    add("--loss", choices=sid_fm.LOSSES, default="sid", help="of the students (%(default)s)")
    add("--alpha", type=finite_number, default=1.0, help="of the SiD loss (%(default)s)")
    # Between velocities, as flow matching is. The authors' 1 - t hardly sees the noise that a student leaves in.
    add("--weight", choices=sid_fm.WEIGHTS, default="1/t^2", help="w(t) of the SiD or DMD loss (%(default)s)")
    add("--noise", choices=sid_fm.NOISES, default="fresh", help="between the student's steps (%(default)s)")
    add("--guidance", type=finite_number, default=1.0, help="of the teacher, and in distillation (%(default)s)")
    add("--lora", type=positive_integer, metavar="RANK", help="students as low-rank adapters on the teacher")
    one_of = parser.add_mutually_exclusive_group().add_argument
    one_of("--preset", choices=PRESETS, default="laptop", help="pictures, network and length (%(default)s)")
    one_of("--quick", dest="preset", action="store_const", const="quick", help="a short run: --preset quick")
    add("--device", choices=("cpu", "cuda"), help="where networks live (cpu; with --preset gpu cuda)")
    add("--teacher-iters", type=positive_integer, help="of the teacher's training (4500; quick 900, gpu 4000)")
    add("--iters", type=positive_integer, help="of distillation (1800; quick 150, gpu 1500)")
    add("--samples", type=positive_integer, help="a row of the table (4000; quick 200)")
    add("--seed", type=whole_number, default=0, help="fixes everything (%(default)s)")
    add("--out", type=Path, default=Path("runs/dit_tiny"), help="folder of weights and figures (%(default)s)")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if args.preset == "gpu" else "cpu")
    for name in ("teacher_iters", "iters", "samples"):
        setattr(args, name, getattr(args, name) or getattr(PRESETS[args.preset], name))
    return args


def main() -> None:
    args = parse()
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise sid_fm.BadInput("this machine has no GPU that torch can use: give --device cpu or another --preset")
        if args.lora:  # a rank that is too large is refused before the teacher is trained
            sid_fm.adapt(build(args.arch, args.seed, PRESETS[args.preset]), args.lora)
        sid_fm.claim(args.out)
        run(args)
    except sid_fm.BadInput as error:
        fail(error)
    except FloatingPointError as error:
        fail(f"{error}: try other settings, or another --seed", status=1)
    except OSError as error:
        sid_fm.say_disk_full(error)
    except KeyboardInterrupt:
        fail(f"stopped: a teacher whose training ended is kept in {args.out}", status=130)


if __name__ == "__main__":
    main()
