import json

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load

from align.data.chat_encoder import ChatEncoder
from align.models.model_card import CardContent, MetricSummary, StageSummary, hub_id, write_model_card
from align.models.policy import save_policy
from align.models.reward_model import load_reward_model, save_reward_model, set_pad_token
from align.models.reward_scoring import score_groups
from align.models.settings import HeadSettings, PolicySettings
from align.records import Demonstration, Message
from align.testing.tiny import tiny_policy

SFT = StageSummary(
    name="general", kind="sft", data=["HuggingFaceH4/ultrachat_200k", "rows.jsonl"], rows=12_345, settings={"epochs": 2}
)
DPO = StageSummary(name="dpo", kind="preference", loss="rpo_bwd_kl", settings={"loss": {"beta": 0.1}, "lr": 5e-7})
POLICY = CardContent(
    title="My policy",
    kind="policy",
    base="HuggingFaceTB/SmolLM2-135M",
    datasets=["HuggingFaceH4/ultrachat_200k", "/data/rows.jsonl"],
    stages=[SFT, DPO],
    metrics=[MetricSummary(task="gsm8k", name="correct", value=0.31251, low=0.29, high=0.335, rows=1319)],
)
REWARD = CardContent(title="My judge", kind="reward_model", attributes={"helpfulness": 0.7, "verbosity": -0.3})


def test_the_hub_reads_the_front_matter(tmp_path):
    path = write_model_card(tmp_path, POLICY)
    assert path == tmp_path / "README.md"
    assert metadata_load(path) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "datasets": ["HuggingFaceH4/ultrachat_200k"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["align", "sft", "preference", "rpo_bwd_kl"],
    }
    card = ModelCard.load(path)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert str(card) == path.read_text()


def test_the_body_has_stages_settings_metrics_and_how_to_load(tmp_path):
    text = write_model_card(tmp_path, POLICY).read_text()
    assert "| `general` | `sft` |  | 12,345 | `HuggingFaceH4/ultrachat_200k`, `rows.jsonl` |" in text
    assert "| `dpo` | `preference` | `rpo_bwd_kl` |" in text
    assert "| `gsm8k` | `correct` | 0.3125 | 0.29 to 0.335 | 1,319 |" in text
    assert "AutoModelForCausalLM.from_pretrained(path)" in text
    settings = [block.partition("```")[0] for block in text.split("```yaml\n")[1:]]
    assert [yaml.safe_load(block) for block in settings] == [SFT.settings, DPO.settings]


def test_absolute_paths_are_shortened(tmp_path):
    stage = StageSummary(name="sft", kind="sft", data=["/home/me/rows.jsonl"])
    card = CardContent(title="t", kind="policy", base="/home/me/base", datasets=["/home/me/rows.jsonl"], stages=[stage])
    text = write_model_card(tmp_path, card).read_text()
    assert "/home/me" not in text
    assert "trained from `base`" in text and "- `rows.jsonl`" in text


def run_usage(folder, monkeypatch, **replacements):
    """Run the Python code of a model card in the model's folder and return its variables."""
    code = (folder / "README.md").read_text().split("```python\n")[1].partition("```")[0]
    for old, new in replacements.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(folder)
    variables = {}
    exec(code, variables)
    return variables


def test_the_code_of_a_policys_card_runs(tmp_path, monkeypatch, capsys):
    save_policy(*tiny_policy(), tmp_path)
    write_model_card(tmp_path, POLICY)
    found = run_usage(tmp_path, monkeypatch, **{"max_new_tokens=256": "max_new_tokens=3"})
    assert found["output"].shape[1] - found["inputs"]["input_ids"].shape[1] <= 3
    assert capsys.readouterr().out.strip()


def test_the_code_of_a_reward_models_card_gives_its_rewards(tmp_path, monkeypatch):
    save_policy(*tiny_policy(), tmp_path / "policy")
    head = HeadSettings(attributes=("helpfulness", "verbosity"), weights=(0.7, -0.3))
    model, tokenizer = load_reward_model(PolicySettings(path=str(tmp_path / "policy")), head)
    messages = (Message("user", "2 + 2?"), Message("assistant", "4"))
    group = ChatEncoder(tokenizer).encode(Demonstration(messages), 0)
    set_pad_token(model, tokenizer, {int(group.sequences[0].ids[-1])})
    save_reward_model(model, tokenizer, tmp_path / "judge")
    write_model_card(tmp_path / "judge", REWARD)
    found = run_usage(tmp_path / "judge", monkeypatch)
    (scores,) = score_groups(model, [group])
    torch.testing.assert_close(torch.tensor([*found["scores"].values()]), scores[0])
    assert found["reward"] == pytest.approx(model.rating.rewards(scores)[0], rel=1e-5)


def test_a_reward_models_card_has_attributes_and_weights(tmp_path):
    path = write_model_card(tmp_path, REWARD)
    text = path.read_text()
    assert metadata_load(path)["pipeline_tag"] == "text-classification"
    assert "base_model" not in metadata_load(path)
    assert "| `helpfulness` | 0.7 |" in text and "| `verbosity` | -0.3 |" in text
    assert "AutoModelForSequenceClassification" in text
    assert "no base model's license applies" in text


def test_adapters_load_with_peft(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    path = write_model_card(tmp_path, POLICY)
    assert metadata_load(path)["library_name"] == "peft"
    assert "AutoPeftModelForCausalLM" in path.read_text()


def base_folder(folder, front_matter):
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n\n# Base\n")
    return CardContent(title="t", kind="policy", base=str(folder))


def test_the_license_is_that_of_the_bases_readme(tmp_path):
    card = base_folder(tmp_path / "base", "license: other\nlicense_name: llama\nbase_model: meta/other")
    (tmp_path / "out").mkdir()
    front_matter = metadata_load(write_model_card(tmp_path / "out", card))
    assert (front_matter["license"], front_matter["license_name"]) == ("other", "llama")
    assert "base_model" not in front_matter, "that is the model which the base was trained from"


def test_a_base_with_a_card_of_ours_passes_on_its_base_and_license(tmp_path):
    card = base_folder(tmp_path / "sft", "license: mit\nbase_model: meta/base\ntags: [align, sft]")
    (tmp_path / "out").mkdir()
    front_matter = metadata_load(write_model_card(tmp_path / "out", card))
    assert (front_matter["license"], front_matter["base_model"]) == ("mit", "meta/base")


@pytest.mark.parametrize("broken", ["license: [", "- a list", "license: {a: 1}", ""])
def test_a_base_with_a_broken_readme_has_no_known_license(tmp_path, broken):
    card = base_folder(tmp_path / "base", broken)
    (tmp_path / "out").mkdir()
    path = write_model_card(tmp_path / "out", card)
    assert "license" not in metadata_load(path)
    assert "license of the base model is not recorded" in path.read_text()


HOSTILE = [
    "a: 'b'\n---\nlicense: mit",
    "---\nlicense: mit\n---",
    "``` `x` <script>alert(1)</script> | & # *",
    "{{ template }} {% raw %} \u2028 \r\n - item",
    "!!python/object:os.system {x: 1}",
    '"',
    "\\",
    "`",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_user_text_cannot_change_the_front_matter_or_leave_its_place(tmp_path, text):
    stage = StageSummary(name=text, kind=text, loss=text, data=[text], settings={text: [text, {"nested": text}]})
    card = CardContent(
        title=text,
        kind="policy",
        base=text,
        datasets=[text],
        stages=[stage],
        metrics=[MetricSummary(task=text, name=text, value=1.0)],
        attributes={text: 1.0},
    )
    path = write_model_card(tmp_path, card)
    front_matter, loaded = metadata_load(path), ModelCard.load(path)
    assert front_matter.keys() == {"library_name", "pipeline_tag", "tags"}
    assert set(front_matter["tags"]) <= {"align", text}
    assert loaded.data.license is None
    headings = [line for line in loaded.text.splitlines() if line.startswith("## ")]
    assert headings == [f"## {name}" for name in ("How to load", "Reward", "Training", "Data", "Evaluation", "License")]
    assert loaded.text.count("\n| ") == 3 * 3, "every table has a header, a rule and one row"


def test_settings_are_plain_yaml_of_any_json_value(tmp_path):
    settings = {"a": None, "b": [1, 2.5, True], "c": {"d": "é\n---\n"}}
    stage = StageSummary(name="sft", kind="sft", settings=settings)
    text = write_model_card(tmp_path, CardContent(title="t", kind="policy", stages=[stage])).read_text()
    block = text.split("```yaml\n")[1].partition("\n```")[0]
    assert json.dumps(yaml.safe_load(block)) == json.dumps(settings)


def test_a_local_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/sft").mkdir(parents=True)
    assert hub_id("runs/sft") is None
    assert hub_id("owner/sft") == "owner/sft"
    assert hub_id(None) is None and hub_id("gpt2") is None and hub_id("a/b/c") is None and hub_id("x" * 5000) is None
