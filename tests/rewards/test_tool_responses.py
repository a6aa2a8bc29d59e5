"""Responses that call tools, before judges and in scored groups."""

import json

from saved_models import SMALL_LLAMA, save_reward_and_policy

from align.data.chat_encoder import ChatEncoder
from align.data.reading import read
from align.data.writing import write
from align.distributed.journal import Journal
from align.inference.samples import Sample, prompt_key
from align.records import Comparison, Demonstration, Message, Prompt, Response, ToolCall
from align.rewards.judge_prompts.own import conversation
from align.rewards.judges import load_judge
from align.rewards.thoughts import response_text, visible_text
from align.rewards.verdicts import Verdict
from align.synth.group_statistics import GroupStatistics
from align.synth.scored_groups import comparisons, prompt_of, score_groups
from align.synth.settings import GroupSettings
from align.train.filters import best_demonstration

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
OSLO, BERN = (ToolCall("weather", json.dumps({"city": city})) for city in ("Oslo", "Bern"))
ASKED = Prompt((Message("user", "How is it?"),), {"id": 1}, (WEATHER,))
AS_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ 'CALL ' + c.function | tojson }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def test_a_judge_of_text_reads_the_visible_text_and_the_calls():
    response = response_text("<think>so</think>I look.", "stop", (OSLO,))
    assert visible_text(response) == f"I look.\n{AS_TEXT}"
    assert visible_text(response_text("", None, (OSLO,))) == AS_TEXT
    messages = (*ASKED.messages, Message("assistant", "", (OSLO,)), Message("tool", "blue"))
    assert conversation(Prompt(messages, tools=(WEATHER,))) == (
        f"Tools:\n{json.dumps(WEATHER)}\n\nUser: How is it?\n\nAssistant: {AS_TEXT}\n\nTool: blue"
    )


def test_a_reward_model_scores_the_tokens_that_training_sees(tmp_path):
    save_reward_and_policy(tmp_path, config=SMALL_LLAMA | {"max_position_embeddings": 512})
    judge = load_judge("reward_model", path=str(tmp_path / "reward"))
    inner = judge.judge
    inner.tokenizer.chat_template = TEMPLATE
    inner.encoder = ChatEncoder(inner.tokenizer)
    responses = (Response("I look.", tool_calls=(OSLO,)), Response("Fine."))
    group = inner.encoder.encode(Comparison(ASKED.messages, responses, tools=ASKED.tools), 0)
    assert 'CALL {"name": "weather", "arguments": {"city": "Oslo"}}' in inner.tokenizer.decode(group.sequences[0].ids)
    texts = [response_text(each.content, None, each.tool_calls) for each in responses]
    ((first, second),) = judge([(ASKED, texts)])
    (scores,) = inner.scorer([group])
    expected = inner.rating.rewards(scores)
    assert [first.reward, second.reward] == expected and expected[0] != expected[1]


def by_city(groups):
    for _, texts in groups:
        yield tuple(Verdict(2.0 if "Oslo" in text else 1.0 if "Bern" in text else 0.0) for text in texts)


def test_groups_keep_tools_and_calls_on_the_way_to_training(tmp_path):
    samples = [
        Sample(prompt_key(ASKED), number, "p", text, 1, "stop", 7, calls)
        for number, (text, calls) in enumerate([("", (BERN,)), ("", (OSLO,)), ("", (OSLO,)), ("Fine.", ()), ("", ())])
    ]
    statistics = GroupStatistics()
    with Journal(tmp_path / "verdicts", {}) as journal:
        scored = score_groups([ASKED], samples, by_city, journal=journal, statistics=statistics)
        write(tmp_path / "groups.jsonl", comparisons(scored, GroupSettings(), statistics))
    assert statistics.counts["responses:left out, duplicate"] == statistics.counts["responses:left out, empty"] == 1
    (group,) = read(str(tmp_path / "groups.jsonl")).records
    assert (group.prompt, group.tools) == (ASKED.messages, ASKED.tools)
    assert [(one.content, one.tool_calls, one.reward) for one in group.responses] == [
        ("", (OSLO,), 2.0),
        ("", (BERN,), 1.0),
        ("Fine.", (), 0.0),
    ]
    assert prompt_key(prompt_of(group)) == prompt_key(ASKED)
    best = best_demonstration(group, statistics.counts)
    assert best.messages == (*ASKED.messages, Message("assistant", "", (OSLO,))) and best.tools == ASKED.tools
    assert prompt_key(prompt_of(Demonstration(best.messages, tools=best.tools))) == prompt_key(ASKED)
