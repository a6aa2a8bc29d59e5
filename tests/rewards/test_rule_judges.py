"""Judges that need no model: rewards, abstentions, and errors that name their row."""

import pytest

from align.errors import InputError
from align.procedural import tasks
from align.records import Message, Prompt
from align.rewards.judges import load_judge
from align.rewards.rule_judges import REWARDS

INSTRUCTIONS = [
    {"id": "punctuation:no_comma"},
    {"id": "length_constraints:number_words", "kwargs": {"num_words": 2, "relation": "at least"}},
]


def prompt(**metadata):
    return Prompt((Message("user", "Say something about the moon, in a few words please"),), metadata)


def rewards(verdicts):
    return [verdict.reward for verdict in verdicts]


def test_the_verifier_rewards_the_share_or_all_or_both():
    group = (prompt(instructions=INSTRUCTIONS), ["a b", "a, b", "a", "a,", ""])
    expected = {"share": [1, 0.5, 0.5, 0, 0], "all": [1, 0, 0, 0, 0], "both": [1, 0.25, 0.25, 0, 0]}
    assert expected.keys() == REWARDS.keys()
    for reward, values in expected.items():
        assert rewards(*load_judge("verifier", reward=reward)([group])) == values


def test_the_verifier_keeps_both_checks_and_rewards_the_selected_one():
    group = (prompt(instructions=INSTRUCTIONS), ["Sure, here:\na b"])
    for loose, reward in ((False, 0.5), (True, 1.0)):
        [(verdict,)] = load_judge("verifier", loose=loose)([group])
        assert verdict.reward == reward
        assert verdict.raw == {"strict": [False, True], "loose": [True, True]}
        assert ("punctuation:no_comma" in verdict.why) is not loose


def test_a_response_with_too_few_words_gets_no_reward():
    asked = prompt(instruction_id_list=["punctuation:no_comma"], kwargs=[{}])
    ((short, long),) = load_judge("verifier", min_words=3)([(asked, ["***", "one two three"])])
    assert (short.reward, long.reward) == (0, 1)
    assert short.why.startswith("1 words, fewer than 3") and short.raw["strict"] == [True]
    ((unbounded,),) = load_judge("verifier")([(asked, ["***"])])
    assert unbounded.reward == 1


def test_the_verifier_uses_the_checks_of_a_procedural_task():
    rows = tasks.comparisons("general", num_rows=20, num_responses=3, seed=0)
    groups = [(Prompt(row.prompt, row.metadata), [each.content for each in row.responses]) for row in rows]
    judged = list(load_judge("verifier", reward="both")(groups))
    assert [rewards(verdicts) for verdicts in judged] == [[each.reward for each in row.responses] for row in rows]
    assert len({reward for verdicts in judged for reward in rewards(verdicts)}) > 2


def test_the_verifier_judges_programs_and_other_responses_together():
    facts = {"kind": "code", "examples": [["[1, 2]", "3"], ["[]", "0"]]}
    words = tasks.prompts("general", num_rows=1, seed=0, split="test")[0]
    groups = [(prompt(**facts), ["sum", "lambda x: sum(x)", "len"]), (words, ["?"]), (prompt(**facts), ["len", "sum"])]
    share, other, again = load_judge("verifier")(groups)
    assert rewards(share) == [1, 1, 0.5]
    assert rewards(other) == [0]
    assert rewards(again) == [0.5, 1]


def test_the_verifier_abstains_without_instructions():
    for metadata in ({}, {"instructions": []}, {"kind": "poem"}, {"answer": "5"}):
        [verdicts] = load_judge("verifier")([(prompt(**metadata), ["a", "b"])])
        assert rewards(verdicts) == [None, None]
        assert "no verifiable instructions" in verdicts[0].why


def is_short(response: str, *, letters: int) -> bool:
    return len(response) <= letters


def test_a_custom_verifier_is_named_in_the_settings():
    judge = load_judge("verifier", verifiers={"my:short": f"{__name__}:is_short"})
    asked = prompt(instructions=[*INSTRUCTIONS, {"id": "my:short", "kwargs": {"letters": 3}}])
    [verdicts] = judge([(asked, ["a b", "abcd efg"])])
    assert verdicts[1].raw["strict"] == [True, True, False]
    assert verdicts[0].reward == 1


def test_only_the_known_answer_is_rewarded():
    solution = "Half of 48 is 24.\n48 + 24 = 72\n#### 72"
    for answer in ("72", 72, 72.0, solution):
        responses = ["The answer is 72.", "#### 73", "I do not know.", ""]
        [verdicts] = load_judge("ground_truth")([(prompt(answer=answer), responses)])
        assert rewards(verdicts) == [1, 0, 0, 0]
        assert [verdict.raw["given"] for verdict in verdicts] == ["72", "73", None, None]
        assert verdicts[0].raw["expected"] == ("72.0" if answer == 72.0 and isinstance(answer, float) else "72")


def test_a_prompt_without_an_answer_gets_no_reward_or_fails_first():
    groups = [(prompt(answer="5", key=17), ["5"]), (prompt(key=18), ["5", "6"])]
    judged = list(load_judge("ground_truth")(groups))
    assert [rewards(verdicts) for verdicts in judged] == [[1], [None, None]]
    with pytest.raises(InputError, match="prompt 18: the prompt has no `answer`"):
        next(iter(load_judge("ground_truth", missing="error")(groups)))


BAD = [
    ("verifier", {"reward": "most"}, "judge verifier.settings.reward: Input should be 'share'"),
    ("verifier", {"loos": True}, "judge verifier.settings.loos: unknown key; did you mean 'loose'"),
    ("verifier", {"loose": "yes"}, "judge verifier.settings.loose: Input should be a valid boolean"),
    ("verifier", {"verifiers": {"a": "no.such:thing"}}, "cannot be imported"),
    ("ground_truth", {"missing": "skip"}, "judge ground_truth.settings.missing: Input should be 'abstain' or 'error'"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD)
def test_an_invalid_setting_is_rejected_in_one_line(name, settings, message):
    with pytest.raises(InputError) as refused:
        load_judge(name, **settings)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"instructions": [{"id": "startend:quote"}]},
            "prompt 'Say something about the moon, in a few w': no verifier",
        ),
        ({"instructions": [{"id": "startend:quote"}], "key": 3}, "prompt 3: no verifier is called 'startend:quote'"),
    ],
)
def test_the_error_of_an_invalid_instruction_names_its_row(metadata, message):
    with pytest.raises(InputError) as refused:
        list(load_judge("verifier")([(prompt(**metadata), ["a"])]))
    assert message in str(refused.value)


@pytest.mark.parametrize("answer", [True, ["5"], " ", {"value": 5}])
def test_an_invalid_answer_is_rejected(answer):
    with pytest.raises(InputError, match="prompt 4: `answer` is a string or a number"):
        list(load_judge("ground_truth")([(prompt(answer=answer, key=4), ["5"])]))
