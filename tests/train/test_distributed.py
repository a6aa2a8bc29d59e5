"""However the weights lie over two processes, a step computes what one process computes."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from distributed_runs import CASES, MOVED, STEPS, alone, run_case
from forked import start_forked
from launching import LAUNCH, finish, fsdp_on_a_cpu, told
from safetensors.torch import load_file
from tiny_training import chosen, gap, metrics

from align.data.batching import order
from align.distributed.journal import Journal

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install align[deepspeed]")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]

# What the cut into micro-batches of two processes decides, of training and of the held-out rows
WORK = ("tokens_computed", "pairs_attended", "targets", "micro_batches")
PREFIXES = ("", "held_out/", "start/held_out/", "routing/", "kl/", "held_out/kl/", "start/held_out/kl/", "selection/")
CHANGING = {
    "seconds",
    "selection/seconds",
    "peak_memory_bytes",
    "imbalance",
    *(prefix + name for name in WORK for prefix in PREFIXES),
}

# Its rows are those that one process chooses
SELECTED = ("selected", "embedded", "gradient", "scorer", "layers", "continued")

# Left out for time where weights are sharded: "selected" and "gradient" choose rows with sharded weights, too
SCORED = ("embedded", "scorer", "layers")  # the last one is refused there

# How the model is wrapped, the class that says how its weights lie, whether all of them are cut, and the cases: under
# ZeRO-1 and ZeRO-2 every process has all weights, and what an objective computes is what it computes under DDP
WAYS = {
    "ddp": ("DistributedDataParallel", "Replicated", False, [*CASES, *MOVED]),
    "zero1": ("DeepSpeedEngine", "Zero12", False, ("rpo", "resumed", "each")),
    "zero2": (
        "DeepSpeedEngine",
        "Zero12",
        False,
        ("rpo", "alone", "adapters", "reward", "resumed", "bf16", "bf16 reduced", "each"),
    ),
    "zero3": ("DeepSpeedEngine", "Zero3", True, [name for name in CASES if name not in SCORED]),
    "fsdp2": ("FSDPPolicy", "Fsdp2", False, [name for name in CASES if name not in SCORED]),
}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_do_what_one_does(tmp_path, way):
    launch = fsdp_on_a_cpu(tmp_path) if way == "fsdp2" else LAUNCH / f"{way}-cpu-2.yaml"
    where = {"ACCELERATE_TORCH_DEVICE": "cpu"} if way == "fsdp2" else {}
    wrapped, lies, is_cut, cases = WAYS[way]
    if "continued" in cases:
        shutil.copytree(stopped_alone()[0], tmp_path / "continued")
    script = Path(__file__).with_name("distributed_runs.py")
    launched = start_forked(launch, "--main_process_port", "0", script, tmp_path, ",".join(cases), **where)
    output, errors = finish(launched)
    assert launched.returncode == 0, errors[-3000:]
    seen = told(output)
    assert sorted(one["case"] for one in seen) == sorted([*cases, *cases])
    for one in seen:
        assert (one["processes"], one["way"], one["cut"] > 0) == (2, lies, is_cut)
        assert one["wrapped"] == (wrapped if one["case"] != "reward" else wrapped.replace("Policy", "RewardModel"))
    for name in set(cases) - set(MOVED):
        compare(name, tmp_path / name)
    if "continued" in cases:
        rows = rechosen(tmp_path / "stopped")
        run_case(tmp_path / "stopped", "continued")
        for name in MOVED:
            assert chosen(tmp_path / name)[4] == rows == stopped_alone()[1]
            compare("continued", tmp_path / name)


def rechosen(folder):
    """Let the journal of a run that was killed after step 5 say that it chose other rows of the step, and return them.

    No score leads to them: whoever trains on them has read the journal.
    """
    path = folder / "selection.jsonl"
    *lines, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines))
    key, ((groups, metrics),), _ = json.loads(last)
    super_batch = order(65, seed=0, epoch=1)[32 : 2 * 32]  # step 5 is the second of the second epoch
    assert key == "4" and len(groups) == 8 and set(groups) < set(super_batch)
    rows = [row for row in super_batch if row not in groups][:8]
    with Journal(path, json.loads(lines[0])["made_with"]) as journal:
        journal.add(key, [[rows, metrics]])
    return rows


@cache
def stopped_alone():
    """The folder of a run of one process that was killed, and the rows that its journal has for step 5."""
    folder = Path(mkdtemp())
    run_case(folder, "stopped")
    return folder, rechosen(folder)


@cache
def continued_alone():
    """The metrics and the folder of that run, which one process has continued."""
    folder = Path(mkdtemp()) / "continued"
    shutil.copytree(stopped_alone()[0], folder)
    run_case(folder, "continued")
    return metrics(folder), folder


@pytest.mark.parametrize("way", ["ddp", "zero3"])
def test_three_processes_go_on_from_a_kill_bit_for_bit(tmp_path, way):
    """Of three numbers a sum depends on their order, of two it does not."""
    script = Path(__file__).with_name("distributed_runs.py")
    more = ["--num_processes", "3", "--main_process_port", "0"]
    launched = start_forked(LAUNCH / f"{way}-cpu-2.yaml", *more, script, tmp_path, "resumed")
    output, errors = finish(launched)
    assert launched.returncode == 0, errors[-3000:]  # the script compares the two
    assert [one["processes"] for one in told(output)] == [3, 3, 3]
    compare("resumed", tmp_path / "resumed")


def compare_rounded(name, folder):
    """The losses and final weights against those of one process: sums in another order are rounded to 1 in 256."""
    lines, of_one = alone(name)
    gaps = [abs(line["loss"] - other["loss"]) for line, other in zip(lines, metrics(folder), strict=True)]
    trained, trained_by_two = (load_file(where / "trained.safetensors") for where in (of_one, folder))
    # A gradient near zero may change its sign when it is rounded, and AdamW moves a weight by up to 3e-3 in each step
    limit = 3e-2 if name == "bf16 reduced" else 1e-2
    assert max(gaps) <= 1e-2 and gap(trained, trained_by_two) <= limit, (max(gaps), gap(trained, trained_by_two))


def compare(name, folder):
    """Every number of every step, and the final weights, against those of one process."""
    lines, of_one = continued_alone() if name == "continued" else alone(name)
    lines_of_two = metrics(folder)
    assert len(lines) == len(lines_of_two) == STEPS
    trained, trained_by_two = (load_file(where / "trained.safetensors") for where in (of_one, folder))
    if name.startswith("bf16"):
        compare_rounded(name, folder)
        return
    for line, line_of_two in zip(lines, lines_of_two, strict=True):
        assert line.keys() - CHANGING == line_of_two.keys() - CHANGING
        for part in line.keys() - CHANGING:
            if part == "start/held_out/rewards/accuracies" or (part == "rewards/accuracies" and line["step"] == 1):
                continue  # every margin is 0 but for rounding, and so its sign is chance
            assert line[part] == pytest.approx(line_of_two[part], rel=1e-5, abs=1e-5), (name, part)
        assert line["loss"] == pytest.approx(line_of_two["loss"], rel=0, abs=2e-6), name
        if name == "alone":  # the rank without a group runs that of the other, for nothing
            assert line_of_two["tokens_computed"] == 2 * line["tokens_computed"]
    if name in SELECTED:  # the rows, not only the numbers
        groups, groups_by_two = (chosen(where) for where in (of_one, folder))
        assert groups == groups_by_two and len(groups) == STEPS
    assert gap(trained, trained_by_two) <= 5e-5
    assert name in ("adapters", "mixture") or max(line["grad_norm"] for line in lines) > 1  # clipped
