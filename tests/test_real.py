"""One command for whoever has a teacher's weights: this project against diffusers, on real files.

    pytest tests/test_real.py --teacher sd3-medium -s

It prints a table in Markdown and draws a picture, runs/real-sd3-medium.png. PLEASE PUT BOTH INTO AN
ISSUE OF THIS PROJECT, whatever the table says: the other tests hold random weights, in the real
layout, against diffusers, and no real ones. --teacher is a name (sid_fm.NAMES) or the folder of a
pipeline in the diffusers layout. It needs diffusers: pip install -r tests/requirements.txt.

    files      the files that are read; every tensor in them must be used exactly once
    text       the conditions of eight prompts
    velocity   the network at four noise levels
    vae        encoding and decoding
    sampler    the teacher's own sampler, from the same noise, from prompts to pixels

An error is the largest difference, relative to the largest number (of pictures the mean over
pixels). Rows of text are often exactly 0: both sides run transformers' encoders, and what is
compared is tokens, lengths, and how states are joined.

    --part text         does one part alone; on a CPU the sampler takes most of the time
    --student HUB_ID    adds a student by its repository or folder, for example one of the authors':
                        its velocities to the table, its four steps from that noise to the picture
    --oracle FOLDER     is what diffusers reads; by default it reads the same files
    --device cuda       is the device; by default it is the CPU, if float32 fits in its memory, and
                        else the GPU. Where float32 doesn't fit, it is bfloat16, with wider bounds
    --out FILE.png      is the picture

This project runs first, then diffusers. Each has one network in memory at a time, but for the text
encoders, which are there together, and this project's autoencoder. Both sides sample SANA with
Euler's method at the shift of its DPM-Solver++. tests/test_real_tiny.py tests this command.
"""

import datetime
import gc
import json
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import diffusers
import pytest
import torch
import transformers
from oracle import Oracle, error, has_weights, not_used_once, parts_of, tensors_of, weights_of
from torch import Tensor

import sid_fm

PARTS = ("files", "text", "velocity", "vae", "sampler")
# In bfloat16 diffusers rounds 1000 t and 1000 times the guidance for FLUX. These stay as they are.
TIMES, GUIDANCE = (1.0, 0.5, 0.25, 0.125), 4.0
PROMPTS = [
    "",
    "A red fox sitting in the snow, a photograph.",
    "an oil painting of two ships on a stormy sea",
    "  White   space,\tand a line\nof its own ",
    "a red fox in the snow, " * 60,
    "Ünïcode: 狐狸在雪地里, лиса на снегу, ثعلب في الثلج",
    "🦊 in the ❄️, 👩🏽‍🚀",
    'A sign that says "50% OFF!", <b>bold</b> & <|endoftext|> </s> <eos>',
]
DRAWN = [1, 2]  # of the prompts
BOUNDS = {  # of errors in float32 and in bfloat16, by how a row begins
    "text": (1e-4, 3e-2),
    "velocity": (1e-4, 5e-2),
    "vae": (1e-4, 5e-2),
    "sampler: times": (1e-6, 1e-6),
    "sampler: picture": (1e-3, 1e-1),  # the mean over pixels in [0, 1]
    "student": (1e-4, 5e-2),
}


class Row(NamedTuple):
    """A row of the table. error: a number, or the first line of what was raised."""

    what: str
    error: float | str
    bound: float = 0

    @property
    def ok(self) -> bool:
        """Whether the error is a number within the bound."""
        return not isinstance(self.error, str) and self.error <= self.bound


def first_line(raised: Exception) -> str:
    """An exception's class and the first line of its message."""
    return f"{type(raised).__name__}: {raised}".splitlines()[0]


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def files(teacher: str, folder: Path, oracle: Path) -> Iterator[Row]:
    """A row for the listing of the repository, or of the folder where the Hub can't be asked, and
    one for each part, which names the files that are read."""
    import huggingface_hub as hub

    listing, source = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()], "folder"
    if not Path(teacher).is_dir():
        try:
            siblings = hub.model_info(sid_fm.NAMES.get(teacher, (teacher,))[0]).siblings
            listing, source = [file.rfilename for file in siblings], "repository"
        except Exception as raised:  # noqa: BLE001
            source = f"cache ({type(raised).__name__})"
    read = sid_fm.files_to_read(listing)
    missing = sum(not (folder / name).is_file() for name in read)
    yield Row(f"files: {len(read)} of the {len(listing)} in the {source} are read", missing)
    for part in parts_of(folder):
        names = {name.partition("/")[2] for name in read if name.startswith(f"{part}/")}
        try:
            wrong: int | str = not_used_once(folder, part, oracle)
            opened = {file.name for file in weights_of(folder / part)} if has_weights(part) else set()
            wrong += len(opened ^ {name for name in names if name.endswith(".safetensors")})
        except Exception as raised:  # noqa: BLE001
            wrong = first_line(raised)
        yield Row(f"files: {part} ({', '.join(sorted(names))})", wrong)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers
# ----------------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """What both sides are given. z: noise, [2, C, h, w]; images: [2, 3, H, W]"""

    parts: tuple[str, ...]
    z: Tensor
    images: Tensor
    steps: int
    guidance: float  # 1 where it is embedded
    student: str | None


@torch.no_grad()
def measure(side: "sid_fm.Teacher | Oracle", task: Task, given: dict | None = None) -> tuple[dict, dict, dict]:
    """What one side makes of the task: {row: tensors}, its pictures, its conditions. A part that
    raises has the first line as its row. given: the other side's conditions, for the velocities."""
    rows, pictures, cond, ours = {}, {}, {}, isinstance(side, sid_fm.Teacher)
    z, who = task.z.to(side.device), "sid_fm.py" if ours else "diffusers"

    def conditions(prompts: list[int], source: dict = cond) -> dict[str, Tensor]:
        if not source:
            source.update({key: x.cpu() for key, x in side.encode_prompts(PROMPTS).items()})
            side.forget_text()
            if ours and {"velocity", "sampler"} & {*task.parts}:  # its weights are still in files
                sid_fm.to_device(side.dit, side.device, side.dtype)
        return {key: x[prompts].to(side.device) for key, x in source.items()}

    def text():
        for i, prompt in enumerate(PROMPTS):
            yield f"text: {json.dumps(prompt[:40], ensure_ascii=False)}", [*conditions([i]).values()]

    def velocity(net: Callable | None = None, what: str = "velocity"):
        c = conditions(DRAWN, given or cond) | {"guidance": torch.full((2,), GUIDANCE, device=side.device)}
        net = net or side.dit
        for t in TIMES:
            yield f"{what} at t = {t}", [net(z, z.new_full((2,), t), c)]

    def vae():
        yield "vae: encode", [side.encode(task.images)]
        yield "vae: decode", [side.decode(z)]

    def sampler():
        yield "sampler: times", [side.times(task.steps, task.images.shape[-2:])]
        c, uncond = conditions(DRAWN), conditions([0]) if task.guidance != 1 else None
        x = side.sample(z, c, uncond, task.steps, task.guidance, rng=torch.Generator().manual_seed(1))
        pictures[f"{who}, {task.steps} steps"] = images = side.decode(x).cpu()
        for i, image in zip(DRAWN, images):
            yield f"sampler: picture of {json.dumps(PROMPTS[i])}", [(image / 2 + 0.5).clamp(0, 1)]

    def student():
        if ours:  # the student takes the network's place
            side.dit.to("meta")
        net = sid_fm.load_student(task.student, side) if ours else side.student(task.student)
        yield from velocity(net, "student: velocity")
        if ours:
            x = sid_fm.generate(net, z, conditions(DRAWN), rng=torch.Generator().manual_seed(1))
            pictures["student, 4 steps"] = side.decode(x).cpu()

    for part in (part for part in (text, velocity, sampler, vae, student) if part.__name__ in task.parts):
        print(f"{who}: {part.__name__}", file=sys.stderr)
        try:
            for what, tensors in part():
                rows[what] = [x.cpu().double() for x in tensors]
        except Exception as raised:  # noqa: BLE001
            rows[part.__name__] = first_line(raised)
    return rows, pictures, cond


def difference(what: str, ours: object, its: object) -> float | str:
    """The error of a row: the largest of its tensors', or the first line of what was raised."""
    raised = [f"{who}: {x}" for who, x in (("sid_fm.py", ours), ("diffusers", its)) if isinstance(x, str)]
    if raised:
        return "; ".join(raised)
    try:
        measured = [(a - b).abs().mean() if "picture" in what else error(a, b) for a, b in zip(ours, its, strict=True)]
        return torch.tensor(measured).max().item()  # NaN if one is
    except Exception as raised:  # noqa: BLE001
        return first_line(raised)


def place(folder: Path, device: str | None) -> tuple[str, torch.dtype]:
    """The device, by default the CPU if float32 fits there or if there is no GPU; and the dtype."""
    sizes: Counter = Counter()
    for part in filter(has_weights, parts_of(folder)):
        sizes[part.partition("_")[0]] += 4 * sum(math.prod(shape) for _, shape in tensors_of(folder / part))

    def fits(device: str) -> bool:
        return max(sizes.values()) < 0.7 * sid_fm.device_memory(device)

    device = device or ("cpu" if fits("cpu") or not torch.cuda.is_available() else "cuda")
    return device, torch.float32 if fits(device) else torch.bfloat16


def numbers(teacher: str, oracle: Path, student: str | None, parts: tuple, device: str, dtype, out: Path):
    """The rows of all parts but the files', and the picture."""
    torch.backends.cudnn.allow_tf32 = False
    side = sid_fm.load_teacher(teacher, device, dtype, mapped=True)
    if student and "sampler" in parts:
        parts = (*parts, "student")
    size, rng = (side.resolution, side.resolution * 3 // 4), torch.Generator().manual_seed(0)
    z, images = torch.randn(2, *side.latent_shape(size), generator=rng), torch.rand(2, 3, *size, generator=rng) * 2 - 1
    guidance = 1.0 if side.family == "flux" or side.sprint else 4.5
    task = Task(parts, z, images, side.steps, guidance, student)
    ours, pictures, cond = measure(side, task)
    del side
    gc.collect()
    torch.cuda.empty_cache()
    its, its_pictures, _ = measure(Oracle(oracle, device, dtype), task, cond)
    for what in {**ours, **its}:
        found = [side[what] for side in (ours, its) if what in side]
        if len(found) == 2 or isinstance(found[0], str):  # else the other side's part raised
            bounds = next((x for start, x in BOUNDS.items() if what.startswith(start)), (0, 0))
            yield Row(what, difference(what, ours.get(what), its.get(what)), bounds[dtype == torch.bfloat16])
    drawn = {name: sid_fm.to_pixels(x) for name, x in sorted({**pictures, **its_pictures}.items())}
    if drawn:  # side by side
        out.parent.mkdir(parents=True, exist_ok=True)
        prompts = [textwrap.shorten(PROMPTS[i], 36, placeholder=" ...") for i in DRAWN]
        sid_fm.plot_images(out, dict(zip(prompts, zip(*drawn.values()))), [*drawn], f"{Path(teacher).name}, one noise")


def table(title: str, rows: list[Row]) -> str:
    """The title and the rows, in Markdown."""
    lines = [title, "", "| what | error | bound | ok |", "|---|---|---|---|"]
    for row in rows:
        number = row.error if isinstance(row.error, str) else f"{row.error:.2g}"
        cells = row.what, number, f"{row.bound:.0e}" if row.bound else "0", "yes" if row.ok else "**no**"
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def check(
    teacher: str,
    oracle: str | None = None,
    student: str | None = None,
    parts: tuple[str, ...] = PARTS,
    device: str | None = None,
    out: str | Path | None = None,
) -> list[Row]:
    """Compares this project with diffusers, as the module says. Prints the table, draws the picture
    and returns the table's rows."""
    folder, name = sid_fm.resolve(teacher), Path(teacher).name if Path(teacher).is_dir() else teacher
    source, out = sid_fm.resolve(oracle) if oracle else folder, Path(out or f"runs/real-{Path(teacher).name}.png")
    rows, where = [], ""
    try:
        if "files" in parts:
            rows += files(teacher, folder, source)
        if parts != ("files",):
            device, dtype = place(folder, device)
            where = f" in {str(dtype)[6:]} on {torch.cuda.get_device_name() if device == 'cuda' else device}"
            rows += numbers(teacher, source, student, parts, device, dtype, out)
    except Exception as raised:  # noqa: BLE001
        rows.append(Row("loading", first_line(raised)))
    versions = ", ".join(f"{x.__name__} {x.__version__}" for x in (torch, transformers, diffusers))
    print("\n" + table(f"{name}{where}, {datetime.date.today()}, {versions}", rows))
    return rows


@pytest.mark.filterwarnings("ignore:prompts are cut")
def test_a_teacher(pytestconfig):
    """The command itself."""
    names = "teacher", "oracle", "student", "device", "out"
    options = {name: pytestconfig.getoption(f"--{name}") for name in names}
    if not options["teacher"]:
        pytest.skip("give --teacher, a name or a pipeline's folder")
    part = pytestconfig.getoption("--part")
    rows = check(**options, parts=(part,) if part else PARTS)
    assert not [row.what for row in rows if not row.ok]
