"""The commands of tests/bench.py for a GPU, --speed and --memory, run on small networks on the CPU
and print the tables that the README shows."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench.py"


def tables(*words: str) -> list[list[list[str]]]:
    """The Markdown tables that bench.py prints. [table][row][cell]"""
    command = [sys.executable, BENCH, "--device", "cpu", "--threads", "1", *words]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("CPU, 1 threads, small networks, torch ")
    found: list[list[list[str]]] = [[]]
    for line in run.stdout.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line[1:-1].split("|")])
        elif found[-1]:
            found.append([])
    found = [table for table in found if table]
    for columns, rule, *rows in found:
        assert set(rule) == {"---"} and all(len(row) == len(columns) for row in (rule, *rows))
    return [[columns, *rows] for columns, _, *rows in found]


@pytest.mark.slow
def test_speed_prints_a_row_for_each_setting():
    sampling, training = tables("--speed", "--iters", "4")
    columns, *rows = sampling
    assert columns == ["sampling, s/image", "student, 4 steps", "teacher, 28 steps, guidance 4.5"]
    assert [row[0] for row in rows] == ["this project", "diffusers"]
    assert all(0 < float(few) < float(many) for _, few, many in rows)

    columns, *rows = training
    words = "size flags training s/image images/s speed_/_diffusers' peak_GB T_operations/image of_peak"
    assert columns == [word.replace("_", " ") for word in words.split()]
    kept, both = "`--keep-activations`", ["this project", "diffusers"]
    settings = [("128 px", kept, [*both, "authors' order"]), ("128 px", "default", both), ("64 px", kept, both)]
    compiled = [("128 px", f"`--compile` {kept}", both), ("128 px", "`--compile`", both[:1])]
    expected = [[size, flags, name] for size, flags, names in settings + compiled for name in names]
    assert [row[:3] for row in rows] == expected
    for _, flags, name, seconds, speed, ratio, memory, operations, share in rows:
        if "--compile" in flags:  # not on the CPU
            assert not any((seconds, speed, ratio, memory, operations, share))
            continue
        assert float(seconds) * float(speed) == pytest.approx(1, rel=0.02)
        assert (ratio == "1") == (name == "diffusers") and float(ratio.split()[0]) > 0
        assert not memory and float(operations) > 0 and share.endswith("%")
    recomputed, plain = rows[3], rows[0]
    assert recomputed[7] == plain[7]  # what is computed again isn't counted


@pytest.mark.slow
def test_memory_prints_a_row_for_each_run():
    (table,) = tables("--memory")
    columns, *rows = table
    assert columns == ["", "announced, GB", "measured, GB"]
    runs = ["sana-0.6b", "sd3-medium", "sd3-medium --lora 64", "sd3.5-large --lora 16", "flux-dev --lora 64"]
    assert [row[0] for row in rows] == [f"`--teacher {run}`" for run in runs]
    assert all(float(announced) > 0 and not measured for _, announced, measured in rows)
