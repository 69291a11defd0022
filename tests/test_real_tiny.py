"""tests/test_real.py on tiny pipelines in the checkpoints' real layout: it finds no fault where none
is, and names the part in which one is."""

import re
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import Oracle
from safetensors.torch import load_file, save_file
from test_real import PARTS, Row, check, table

import sid_fm

pytestmark = pytest.mark.filterwarnings("ignore:prompts are cut")
ROWS = {"text": 8, "velocity": 4, "vae": 2, "sampler": 3}


def part_of(row: Row) -> str:
    """The first word of a row, which names its part."""
    return re.match(r"\w+", row.what)[0]


def failed(rows: list[Row]) -> set[str]:
    """The parts of the rows that are not ok; of a part of different rows, the row."""
    return {re.match("sampler: times|vae: .*|files: [a-z_]*|[a-z]*", row.what)[0] for row in rows if not row.ok}


@pytest.mark.parametrize("family", ["sd3-medium", "flux-dev", "sana", "sana-sprint"])
def test_here_as_in_diffusers(pipeline, family, tmp_path):
    """With a student; Sprint's has another layout than its teacher."""
    student = pipeline(family, **{"guidance_embeds": True} if family == "sana-sprint" else {})
    rows = check(str(pipeline(family)), student=str(student), out=tmp_path / "runs" / "picture.png")
    files = {"sd3-medium": 10, "flux-dev": 8}.get(family, 6)
    assert Counter(map(part_of, rows)) == {"files": files, **ROWS, "student": 4}
    assert not failed(rows)
    assert (tmp_path / "runs" / "picture.png").read_bytes()[:4] == b"\x89PNG"


def test_where_float32_does_not_fit_it_is_bfloat16(pipeline, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sid_fm, "device_memory", lambda device: 0.0)
    rows = check(str(pipeline("flux-dev")), out=tmp_path / "picture.png")
    assert not failed(rows)
    assert any(row.error > 1e-3 for row in rows)
    assert "flux-dev in bfloat16 on cpu" in capsys.readouterr().out


def test_files_of_a_variant(copied, tmp_path):
    """Where nothing plain is, here and in diffusers; the autoencoder's is plain."""
    folder = copied("flux-dev")
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        file = next((folder / part).glob("*.safetensors"))
        file.rename(file.with_suffix(".fp16.safetensors"))
    rows = check(str(folder), out=tmp_path / "picture.png")
    assert Counter(map(part_of, rows)) == {"files": 8, **ROWS}
    assert not failed(rows)


def test_diffusers_holds_one_network_at_a_time(pipeline):
    oracle = Oracle(pipeline("flux-dev"))
    text, *others = (weakref.ref(getattr(oracle.hold(part), part)) for part in ("text_encoder", "transformer", "vae"))
    assert text() is None and [other() is None for other in others] == [True, False]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone(pipeline, part, tmp_path):
    rows = check(str(pipeline("sd3-medium")), parts=(part,), out=tmp_path / "picture.png")
    assert Counter(map(part_of, rows)) == {part: {"files": 10, **ROWS}[part]}
    assert not failed(rows)
    assert (tmp_path / "picture.png").exists() == (part == "sampler")


# ----------------------------------------------------------------------------------------------------------------------
# Faults
# ----------------------------------------------------------------------------------------------------------------------


def changed(part: str, tensor: str) -> Callable[[Path], None]:
    """Changes one number in ten of a part's first tensor whose name ends so, by a tenth of the
    largest."""

    def change(folder: Path) -> None:
        file = next((folder / part).glob("*.safetensors"))
        weights = load_file(file)
        name = next(name for name in weights if name.endswith(tensor))
        weights[name].view(-1)[::10] += 0.1 * weights[name].abs().max()
        save_file(weights, file, metadata={"format": "pt"})

    return change


def replaced(file: str, *pairs: tuple[str, str]) -> Callable[[Path], None]:
    """Replaces texts in a file, all at once."""

    def replace(folder: Path) -> None:
        text, table = (folder / file).read_text(encoding="utf-8"), dict(pairs)
        new = re.sub("|".join(map(re.escape, table)), lambda match: table[match[0]], text)
        assert new != text
        (folder / file).write_text(new, encoding="utf-8")

    return replace


def swapped(file: str, a: str, b: str) -> Callable[[Path], None]:
    """Swaps two entries of a vocabulary."""
    return replaced(file, (f'"{a}"', f'"{b}"'), (f'"{b}"', f'"{a}"'))


SCHEDULER = "scheduler/scheduler_config.json"
FAULTS = {  # the pipeline, what differs in the files that diffusers reads, the part that must fail
    "transformer": ("flux-dev", changed("transformer", "transformer_blocks.1.attn.to_q.weight"), "velocity"),
    "CLIP": ("sd3-medium", changed("text_encoder_2", "layers.0.mlp.fc1.weight"), "text"),
    "T5": ("flux-dev", changed("text_encoder_2", "SelfAttention.o.weight"), "text"),
    "encoder": ("flux-dev", changed("vae", "encoder.conv_in.weight"), "vae: encode"),
    "decoder": ("flux-dev", changed("vae", "decoder.conv_out.weight"), "vae: decode"),
    "CLIP's vocabulary": ("sd3-medium", swapped("tokenizer/vocab.json", "red</w>", "fox</w>"), "text"),
    "T5's vocabulary": ("flux-dev", swapped("tokenizer_2/tokenizer.json", "▁red", "▁fox"), "text"),
    "shift": ("sd3-medium", replaced(SCHEDULER, ('"shift": 3.0', '"shift": 2.9')), "sampler: times"),
    "dynamic shift": ("flux-dev", replaced(SCHEDULER, ('"max_shift": 1.15', '"max_shift": 1.2')), "sampler: times"),
    "flow shift": ("sana", replaced(SCHEDULER, ('"flow_shift": 3.0', '"flow_shift": 2.9')), "sampler: times"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_fails_its_part(pipeline, copied, fault, tmp_path):
    """Of two faults all parts are looked at: beside the named one the sampler's pictures may fail."""
    family, change, part = FAULTS[fault]
    folder = copied(family)
    change(folder)
    parts = PARTS if fault in ("transformer", "shift") else (part.partition(":")[0],)
    rows = check(str(pipeline(family)), str(folder), parts=parts, out=tmp_path / "picture.png")
    assert {part} <= failed(rows) <= {part, "sampler"}
    if part == "velocity":
        assert sum(part_of(row) == part and not row.ok for row in rows) == 4


def test_what_raises_is_a_row(pipeline, copied, tmp_path, capsys):
    folder = copied("flux-dev")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    rows = check(str(pipeline("flux-dev")), str(folder), out=tmp_path / "picture.png")
    assert failed(rows) == {"vae", "sampler"}
    assert Counter(map(part_of, rows)) == {"files": 8, "text": 8, "velocity": 4, "sampler": 2, "vae": 1}
    assert re.search(
        r"\| vae \| diffusers: BadInput: .* holds no .*safetensors.*\*\*no\*\* \|", capsys.readouterr().out
    )


def test_a_pipeline_that_is_not_understood_is_named(copied):
    """By its configurations and by its tensors."""
    folder = copied("sd3-medium")
    replaced("vae/config.json", ('"silu"', '"relu"'))(folder)
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    weights["another.weight"] = torch.zeros(2)
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    rows = check(str(folder))
    assert failed(rows) == {"files: transformer", "files: vae", "loading"}
    errors = {re.match(r"files: \w+|\w+", row.what)[0]: row.error for row in rows if not row.ok}
    assert errors["files: transformer"] == 1 and "act_fn = 'silu'" in errors["files: vae"]


def test_table():
    """A bar in a text doesn't end its cell; what is no number fails."""
    rows = [Row("a | b", 0.5, 1), Row("c", float("nan"), 1), Row("d", "ValueError: no", 1)]
    assert [row.ok for row in rows] == [True, False, False]
    assert table("title", rows).splitlines()[4:] == [
        r"| a \| b | 0.5 | 1e+00 | yes |",
        "| c | nan | 1e+00 | **no** |",
        "| d | ValueError: no | 1e+00 | **no** |",
    ]


@pytest.mark.slow
def test_the_command_line(pipeline, copied, tmp_path):
    """As its reader types it, on a folder whose shift differs: the table, the failing rows, and the
    picture."""
    folder, picture = copied("sd3-medium"), tmp_path / "picture.png"
    FAULTS["shift"][1](folder)
    options = {"--part": "sampler", "--teacher": pipeline("sd3-medium"), "--oracle": folder, "--out": picture}
    command = [sys.executable, "-m", "pytest", "tests/test_real.py", "-s", "-p", "no:cacheprovider"]
    command += [str(x) for option in options.items() for x in option]
    root = Path(sid_fm.__file__).parent
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert result.returncode == 1, result.stdout
    lines = result.stdout.splitlines()
    start = lines.index("| what | error | bound | ok |")
    assert re.match(
        r"sd3-medium in float32 on cpu, \d{4}-\d\d-\d\d, torch \d.*, transformers \d.*, diffusers \d", lines[start - 2]
    )
    assert re.fullmatch(r"\| sampler: times \| 0\.0\d+ \| 1e-06 \| \*\*no\*\* \|", lines[start + 2])
    assert re.search("assert not .*sampler: times", result.stdout)
    assert picture.exists()
