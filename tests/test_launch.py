"""Every file for `accelerate launch`: what accelerate and DeepSpeed themselves make of it is what its name says."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from torch.distributed.fsdp import OffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.run import config_from_args

from align.accounting.flops import Decoder
from align.workflow.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
README = LAUNCH / "README.md"
TRAIN = ["-m", "align", "train", "RECIPE", "--step", "NAME"]
OURS = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.25}
ELSEWHERE = {"compute_environment", "distributed_type", "mixed_precision"}  # keys that accelerate does not copy


class Asked(NamedTuple):
    """What the name of a file promises."""

    kind: str
    processes: int  # of each machine
    machines: int = 1
    cpu: bool = False
    stage: int = 0
    moments_on: str = "none"  # DeepSpeed's word for: where the weights are


ASKED = {
    "cpu-1": Asked("NO", 1, cpu=True),
    "ddp-cpu-2": Asked("MULTI_GPU", 2, cpu=True),
    "zero1-cpu-2": Asked("DEEPSPEED", 2, cpu=True, stage=1),
    "zero2-cpu-2": Asked("DEEPSPEED", 2, cpu=True, stage=2),
    "zero3-cpu-2": Asked("DEEPSPEED", 2, cpu=True, stage=3),
    "gpu-1": Asked("NO", 1),
    "ddp-8gpu": Asked("MULTI_GPU", 8),
    "zero2-8gpu": Asked("DEEPSPEED", 8, stage=2),
    "zero3-8gpu": Asked("DEEPSPEED", 8, stage=3),
    "zero3-8gpu-offload": Asked("DEEPSPEED", 8, stage=3, moments_on="cpu"),
    "zero3-4x8gpu": Asked("DEEPSPEED", 8, machines=4, stage=3),
    "fsdp2-8gpu": Asked("FSDP", 8),
}
ONE = [name for name, asked in ASKED.items() if asked.kind == "NO"]
SPAWNED = [name for name, asked in ASKED.items() if asked.kind != "NO"]
ZERO = [name for name, asked in ASKED.items() if asked.stage]


class Launched(NamedTuple):
    """What accelerate was about to start: one command, or torchrun's arguments for several processes."""

    started: object
    environment: dict[str, str]


@pytest.fixture
def launch(monkeypatch):
    """`accelerate launch` with a file, up to where processes would start."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in [each for each in os.environ if each.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    found = []

    class Process:
        """That ends at once, and well."""

        returncode = 0

        def __init__(self, command, env):
            found.append(Launched(command, env))

        def wait(self):
            return self.returncode

    monkeypatch.setattr("torch.distributed.run.run", lambda given: found.append(Launched(given, {**os.environ})))
    monkeypatch.setattr("accelerate.commands.launch.subprocess.Popen", Process)

    def call(name):
        if ASKED[name].stage:
            pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install align[deepspeed]")
        # On the machine of rank 0 accelerate would ask whether the port is free here.
        more = ["--machine_rank", "3", "--main_process_ip", "10.0.0.1"] if ASKED[name].machines > 1 else []
        launch_command(launch_command_parser().parse_args(["--config_file", f"launch/{name}.yaml", *more, *TRAIN]))
        return found.pop()

    return call


def test_each_file_is_here_and_no_other():
    assert {path.stem for path in LAUNCH.glob("*.yaml")} - {"skypilot"} == ASKED.keys()


@pytest.mark.parametrize("name", ASKED)
def test_accelerate_knows_every_key_of_a_file_and_goes_by_it(name):
    path, asked, parser = LAUNCH / f"{name}.yaml", ASKED[name], launch_command_parser()
    config = load_config_from_file(str(path))  # which refuses keys that it does not know
    assert config.distributed_type.value == asked.kind
    assert (config.num_machines, config.num_processes) == (asked.machines, asked.machines * asked.processes)
    arguments = _validate_launch_command(parser.parse_args(["--config_file", str(path), *TRAIN]))[0]
    assert arguments.mixed_precision == "no"
    values = yaml.safe_load(path.read_text("utf-8"))
    options = vars(parser.parse_args(TRAIN)).keys()
    for section in ("deepspeed_config", "fsdp_config"):  # whose keys it takes as they come, misspelt or not
        assert values.get(section, {}).keys() <= options
        values |= values.pop(section, {})
    assert {key: value for key, value in values.items() if key not in ELSEWHERE} == {
        key: getattr(arguments, key) for key in values.keys() - ELSEWHERE
    }


@pytest.mark.parametrize("name", ASKED)
def test_a_file_begins_with_the_command_that_uses_it(name):
    head = (LAUNCH / f"{name}.yaml").read_text("utf-8").partition("\ncompute_environment")[0].replace("\\\n#", "")
    (command,) = [line for line in head.splitlines() if line.startswith("#   ")]
    words = shlex.split(command.removeprefix("#"))
    at = words.index("accelerate")
    assert all("=" in word for word in words[:at])
    parsed = launch_command_parser().parse_args(words[at + 2 :])
    assert (words[at + 1], parsed.config_file, parsed.module) == ("launch", f"launch/{name}.yaml", True)
    assert [parsed.training_script, *parsed.training_script_args] == TRAIN[1:]


@pytest.mark.parametrize("name", ONE)
def test_of_one_process_accelerate_starts_the_command_alone(name, launch):
    command, environment = launch(name)
    assert command == [sys.executable, *TRAIN]
    assert environment["ACCELERATE_USE_CPU"] == str(ASKED[name].cpu)


@pytest.mark.parametrize("name", SPAWNED)
def test_accelerate_starts_as_many_processes_as_the_name_says(name, launch):
    arguments, environment = launch(name)
    config, _, started = config_from_args(arguments)  # as torchrun reads them
    asked = ASKED[name]
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (
        asked.machines, asked.machines, asked.processes,
    )  # fmt: skip
    assert started[-len(TRAIN) :] == TRAIN
    assert config.rdzv_backend == "static"
    address, _, port = config.rdzv_endpoint.partition(":")
    if asked.machines > 1:
        assert (address, port, config.rdzv_configs["rank"]) == ("10.0.0.1", "29500", 3)
    else:
        assert int(port) not in (0, 29500)  # a free one, and not the same for every launch: accelerate's default
    ways = {way for way in ("DEEPSPEED", "FSDP") if environment.get(f"ACCELERATE_USE_{way}") == "true"}
    assert ways == {asked.kind} - {"MULTI_GPU"}
    assert "ACCELERATE_USE_CPU" not in environment  # with which DeepSpeed would not be joined


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_takes_the_settings_and_shards_as_the_name_says(name, launch):
    with patch_environment(**launch(name).environment):
        plugin = DeepSpeedPlugin()
    left = {key for key, value in plugin.deepspeed_config.items() if value == "auto"}
    assert left <= {*OURS, "train_batch_size"}  # the last is the product of ours, which accelerate forms
    settings = {key: value for key, value in plugin.deepspeed_config.items() if key != "train_batch_size"}
    config = pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig(settings | OURS)
    asked, zero = ASKED[name], config.zero_config
    assert (plugin.zero_stage, zero.stage) == (asked.stage, asked.stage)
    assert {key: getattr(config, key) for key in OURS} == OURS
    assert (zero.offload_optimizer.device, zero.offload_param.device) == (asked.moments_on, "none")
    assert config.zero_force_ds_cpu_optimizer is (asked.moments_on == "none")  # torch's AdamW on the CPU, not built
    assert not config.bfloat16_config.enabled and not config.float16_config.enabled
    # Weights are shared out as they are read, and found again in whole when they are finished.
    assert (plugin.is_zero3_init_enabled(), zero.gather_16bit_weights_on_model_save) == (asked.stage == 3,) * 2


def test_fsdp_gathers_layer_by_layer_and_lets_go_after_the_forward(launch):
    with patch_environment(**launch("fsdp2-8gpu").environment):
        plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None  # so that the model's own are taken
    assert type(plugin.cpu_offload) is OffloadPolicy  # which leaves all where it is
    assert plugin.cpu_ram_efficient_loading  # each process reads its shard of the weights
    assert not plugin.activation_checkpointing


def commands():
    """Every command of the README's blocks, as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_the_readme_names_every_file_and_none_that_is_not_there():
    said = set(re.findall(r"[\w.-]+\.(?:yaml|json|sbatch)\b", README.read_text("utf-8"))) - {"pipeline.yaml"}
    assert said == {path.name for path in LAUNCH.iterdir()} - {README.name}


STEP = re.compile(r"(?:--step |--until |STEP=|sbatch \S+ \S+ )(\S+)")


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_is_one_that_runs(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    line = " ".join(words)
    (recipe,) = re.findall(r"recipes/\S+", line)
    loaded = load_recipe(Path(recipe), [word for word in words if re.match(r"[a-z_]+[\w.]*=", word)])
    for step in STEP.findall(line):
        assert loaded.expanded(step) == [step]
    files = [word for word in words if word.startswith("launch/")]
    files += [step.launch for step in loaded.steps.values() if getattr(step, "launch", None)]
    assert all(Path(file).is_file() for file in files)
    if words[0] == "accelerate":
        given = _validate_launch_command(launch_command_parser().parse_args(words[2:]))[0]
        assert [given.module, given.training_script, *given.training_script_args[:2]] == [
            True,
            "align",
            "train",
            recipe,
        ]
    else:
        assert words[:2] in (["align", "run"], ["sbatch", "launch/slurm.sbatch"], ["sky", "launch"])


LLAMA = {  # as their published configurations have them
    "1B": Decoder(hidden=2048, layers=16, query_width=2048, kv_width=512, intermediate=8192, vocab=128256),
    "8B": Decoder(
        hidden=4096, layers=32, query_width=4096, kv_width=1024, intermediate=14336, vocab=128256, tied=False
    ),
    "70B": Decoder(
        hidden=8192, layers=80, query_width=8192, kv_width=1024, intermediate=28672, vocab=128256, tied=False
    ),
}
RANK = 16
# Bytes of a trained weight: itself, its gradient, AdamW's two moments; the copy of each share that DeepSpeed 0.19.8
# trains, in ZeRO-3 too (its tensors were counted); and of the gradient the copy in DDP's buckets.
WEIGHT, GRADIENT, MOMENTS, COPY, BUCKETS = 4, 4, 8, 4, 4


def gib(model):
    """What a process holds from one step to the next, and while gradients add up."""
    weights = model.num_weights
    wide = 4 * model.hidden + 2 * (model.query_width + model.kv_width) + 3 * (model.hidden + model.intermediate)
    adapters = model.layers * RANK * wide  # two thin matrices for each of seven
    alone = WEIGHT + GRADIENT + MOMENTS
    found = {
        "`gpu-1.yaml`": weights * alone,
        "`gpu-1.yaml`, adapters": weights * WEIGHT + adapters * alone,
        "`ddp-8gpu.yaml`": weights * (alone + BUCKETS),
        "`zero2-8gpu.yaml`": weights * (WEIGHT + (GRADIENT + MOMENTS + COPY) / 8),
        "`zero3-8gpu.yaml`": weights * (alone + COPY) / 8,
        "`zero3-8gpu.yaml`, adapters": (weights * WEIGHT + adapters * (alone + COPY)) / 8,
        "`fsdp2-8gpu.yaml`": weights * alone / 8,
        "`zero3-8gpu-offload.yaml`": weights * WEIGHT / 8,
        # one of the gradients is DeepSpeed's buffer
        "main memory of the machine, with offload": weights * (GRADIENT + GRADIENT + MOMENTS + COPY),
        "`zero3-4x8gpu.yaml`": weights * (alone + COPY) / 32,
        "added by `reduce: once`": weights * GRADIENT,
    }
    return {row: f"{size / 2**30:,.1f}" for row, size in found.items()}


def test_the_readme_says_how_much_memory_each_file_needs():
    text = README.read_text("utf-8")
    table = text[text.index("| GiB in each process |") :].split("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    columns = {size: {row[0]: row[at] for row in rows} for at, size in enumerate(head) if at}
    assert columns == {size: gib(model) for size, model in LLAMA.items()}
