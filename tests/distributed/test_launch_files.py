"""What a launch file may say: nothing that the recipe decides, and no more GPUs than there are."""

import json
from pathlib import Path

import pytest
import yaml

from align.distributed.launch_files import check_gpus, check_launch_environment, check_training_launch
from align.errors import InputError

LAUNCH = Path(__file__).parents[2] / "launch"
RECIPE = {"precision": "bf16", "max_grad_norm": 1.0}

REFUSED = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {}},
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "fp16": {"enabled": True},
    "amp": {"enabled": True},
}
ACCEPTED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": True},
    "amp": {"enabled": False},
    "zero_optimization": {"stage": 2},
}


def launch_file(folder, deepspeed=None, **values):
    """A launch file for DeepSpeed, with a JSON file of DeepSpeed's own where one is given."""
    path = folder / "launch.yaml"
    config = {"zero_stage": 2}
    if deepspeed is not None:
        (folder / "zero.json").write_text(json.dumps(deepspeed))
        config = {"deepspeed_config_file": str(folder / "zero.json")}
    path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": config} | values))
    return str(path)


@pytest.mark.parametrize("key", REFUSED)
def test_a_deepspeed_key_that_the_recipe_decides_is_named_in_one_line(tmp_path, key):
    path = launch_file(tmp_path, ACCEPTED | {key: REFUSED[key]})
    with pytest.raises(InputError, match=rf"zero.json sets {key}, which the recipe decides by train\.") as error:
        check_training_launch(path, **RECIPE)
    assert error.value.loc == ("launch",) and "\n" not in str(error.value)


def test_automatic_and_equal_values_are_accepted(tmp_path):
    check_training_launch(launch_file(tmp_path, ACCEPTED), **RECIPE)
    check_training_launch(launch_file(tmp_path, mixed_precision="bf16"), **RECIPE)
    check_training_launch(launch_file(tmp_path, mixed_precision=False), **RECIPE)  # YAML reads an unquoted no


@pytest.mark.parametrize("value", ["bf16", "fp16"])
def test_a_precision_other_than_the_recipes_is_refused(tmp_path, value, monkeypatch):
    fp32 = {"precision": "fp32", "max_grad_norm": 1.0}
    with pytest.raises(InputError, match=r"sets mixed_precision, .* by train\.precision"):
        check_training_launch(launch_file(tmp_path, mixed_precision=value), **fp32)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", value)  # as accelerate launch hands it on
    with pytest.raises(InputError, match=r"accelerate launch sets mixed_precision"):
        check_launch_environment(**fp32)


def test_a_deepspeed_file_is_read_in_the_launched_process_too(tmp_path, monkeypatch):
    path = tmp_path / "zero.json"
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(InputError, match="no such file"):
        check_launch_environment(**RECIPE)
    path.write_text('{"optimizer": {"type": "Adam"}}')
    with pytest.raises(InputError, match="sets optimizer"):
        check_launch_environment(**RECIPE)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_the_projects_launch_files_are_accepted_where_their_gpus_are(path):
    values = yaml.safe_load(path.read_text())
    if "num_processes" not in values:
        pytest.skip("no file of accelerate launch")
    check_training_launch(str(path), precision="fp32", max_grad_norm=1.0)
    needed = 0 if values["use_cpu"] else values["num_processes"] // values["num_machines"]
    check_gpus(str(path), needed)
    if needed:
        with pytest.raises(InputError, match=f"needs {needed} GPUs on each machine, and this one has"):
            check_gpus(str(path), needed - 1)


def test_one_process_needs_no_gpu_unless_the_file_asks_for_one(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("distributed_type: 'NO'\nnum_processes: 1\n")
    check_gpus(str(path), 0)
    path.write_text("distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: false\n")
    with pytest.raises(InputError, match="this one has none"):
        check_gpus(str(path), 0)
