"""Recipes whose steps keep their adapters: what each step's folder holds, and what is refused before anything runs."""

import importlib.util
import json
import math

import pytest
from safetensors.torch import load_file
from small_runs import RECIPE, metrics, run

from align.errors import InputError
from align.inference.settings import LocalSettings, SamplingSettings
from align.inference.transformers_engine import TransformersEngine
from align.models.policy import load_policy
from align.models.settings import LoraSettings, PolicySettings
from align.records import Message, Prompt

WIDE = RECIPE.replace("hidden_size: 16, intermediate_size: 32", "hidden_size: 64, intermediate_size: 128")
IMPORT = WIDE.partition("  sft: ")[0]
STEPS = """
run: small
runs: {runs}
policy:
  path: {base}
  lora: {{rank: 2, alpha: 8, adapters: stacked}}
data:
  shown: {{path: "tasks:general", limit: 16}}
  pairs: {{path: "tasks:general", limit: 12, responses: 2}}
steps:
  sft: {{stage: sft, data: shown, train: {{learning_rate: 1.0e-2, prompts_per_step: 4}}}}
  dpo: {{stage: preference, data: pairs, loss: {{name: dpo}}, train: {{learning_rate: 1.0e-2, prompts_per_step: 4}}}}
  rpo: {{stage: preference, data: pairs, loss: {{name: rpo_sq}}, train: {{learning_rate: 1.0e-2, prompts_per_step: 4}}}}
"""
WAYS = {
    "stacked": ((), [2, 4, 6]),
    "continued": (("policy.lora.adapters=continued",), [2, 2, 2]),
    "stacked in 4 bits": (("policy.quantize=nf4",), [2, 4, 6]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    run(folder, text=IMPORT)
    return folder / "runs/small/base"


@pytest.fixture(scope="module", params=WAYS)
def finished(tmp_path_factory, base, request):
    overrides, ranks = WAYS[request.param]
    if "policy.quantize=nf4" in overrides and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed (align[qlora])")
    folder = tmp_path_factory.mktemp("run")
    run(folder, *overrides, text=STEPS.replace("{base}", str(base)))
    return folder, ranks, "nf4" if "policy.quantize=nf4" in overrides else None


def test_each_step_saves_one_adapter_that_holds_those_before_it(finished, base):
    folder, ranks, _ = finished
    for step, rank in zip(("sft", "dpo", "rpo"), ranks, strict=True):
        saved = load_file(folder / "runs/small" / step / "adapter_model.safetensors")
        assert {value.shape[0] for name, value in saved.items() if "lora_A" in name} == {rank}
        assert not list((folder / "runs/small" / step).glob("model*"))
        about = json.loads((folder / "runs/small" / step / "made_of.json").read_text())
        assert about["base"] == str(base) and about["rank"] + about["rank_below"] == rank


def test_every_step_begins_at_the_policy_that_entered_it(finished):
    folder = finished[0]
    first = metrics(folder, "dpo")[0], metrics(folder, "rpo")[0]
    assert math.isclose(first[0]["loss"], math.log(2), abs_tol=1e-6)
    assert all(abs(line["rewards/margins"]) < 1e-4 for line in first)
    # The second preference step goes on where the first one ended: there the chosen responses were more likely.
    assert first[1]["logps/chosen"] != pytest.approx(first[0]["logps/chosen"], abs=0.1)


def test_what_answers_later_is_what_was_trained(finished):
    path, quantize = str(finished[0] / "runs/small/rpo"), finished[2]
    policy, tokenizer = load_policy(
        PolicySettings(path=path, lora=LoraSettings(adapters="continued"), quantize=quantize)
    )
    prompts = [Prompt((Message("user", text),)) for text in ("Say a.", "Say b.")]
    sampling = SamplingSettings(num_responses=2, max_new_tokens=8)
    answers = []
    for engine in (
        TransformersEngine(policy.base, tokenizer, name="rpo"),
        TransformersEngine.load(path, LocalSettings(precision="fp32"), name="rpo"),
    ):
        answers.append(sorted((each.key, each.number, each.text) for each in engine.sample(prompts, sampling)))
    assert answers[0] == answers[1] and len({text for _, _, text in answers[0]}) > 1


def test_a_reward_model_in_such_a_recipe_is_refused_before_anything_runs(tmp_path, base):
    text = (
        STEPS.replace("{base}", str(base))
        + "  rm: {{stage: reward_model, data: pairs, train: {{learning_rate: 1.0e-3}}}}\n"
    )
    with pytest.raises(
        InputError, match=r"small\.yaml:6: policy\.lora\.adapters: a reward model is saved with its adapters merged"
    ):
        run(tmp_path, text=text)
    assert not (tmp_path / "runs").exists()
