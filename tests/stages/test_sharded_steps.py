"""Steps of a recipe that are launched with their weights shared out leave what one process leaves."""

import json

import pytest
from safetensors.torch import load_file
from small_runs import RECIPE, metrics, run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install align[deepspeed]")
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.usefixtures("forked_launches")]

ZERO3 = "launch/zero3-cpu-2.yaml"
RATED = """  rate: {{stage: reward_model, policy: base, data: pairs, loss: bt, head: {{attributes: [good]}},
         train: {{learning_rate: 1.0e-3, prompts_per_step: 4}}}}
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    for name, value in {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}.items():
        monkeypatch.setenv(name, value)


def both(tmp_path, text, steps, *overrides):
    """The folders of the run in this process, and of one whose steps are launched."""
    launched = [f"steps.{step}.launch={ZERO3}" for step in steps]
    run(tmp_path / "alone", *overrides, text=text)
    run(tmp_path / "launched", *overrides, *launched, text=text)
    for step in steps:
        lines, lines_of_two = metrics(tmp_path / "alone", step), metrics(tmp_path / "launched", step)
        assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in lines_of_two], abs=2e-6)
        assert [line["grad_norm"] for line in lines] == pytest.approx(
            [line["grad_norm"] for line in lines_of_two], rel=1e-5
        )
        said = (tmp_path / "launched/runs/small" / step / "manifest.json").read_text()
        assert json.loads(said)["ledger"]["devices"] == 2
    return tmp_path / "alone/runs/small", tmp_path / "launched/runs/small"


def same_files(alone, launched, step, file):
    """The same tensors by name, nearly; and something of them was trained."""
    one, two = load_file(alone / step / file), load_file(launched / step / file)
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max().item() for name in one) <= 5e-5
    return one


def test_weights_that_were_shared_out_are_saved_whole(tmp_path):
    decay = "steps.dpo.train.weight_decay=0.3"
    alone, launched = both(tmp_path, RECIPE + RATED, ("dpo", "rate"), decay)
    before, after = load_file(alone / "sft/model.safetensors"), same_files(alone, launched, "dpo", "model.safetensors")
    assert any((after[name] - before[name]).abs().max() > 1e-3 for name in before)
    names = {path.name for path in (alone / "dpo").iterdir()}
    assert {path.name for path in (launched / "dpo").iterdir()} == names | {"launch.log"}
    same_files(alone, launched, "rate", "model.safetensors")
    AutoModelForCausalLM.from_pretrained(launched / "dpo")
    AutoModelForSequenceClassification.from_pretrained(launched / "rate")


def test_adapters_on_weights_that_were_shared_out_are_saved_as_adapters(tmp_path):
    lora = ["policy.lora.rank=2", "policy.lora.adapters=continued"]
    alone, launched = both(tmp_path, RECIPE, ("sft", "dpo"), *lora)
    for step in ("sft", "dpo"):
        assert not (launched / step / "model.safetensors").exists()
        adapters = same_files(alone, launched, step, "adapter_model.safetensors")
        assert any(value.abs().max() > 0 for name, value in adapters.items() if "lora_B" in name)
