"""The reward model as a judge: order of verdicts, abstentions, and independence of the batch."""

import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer

import pytest
import torch
from json_handler import JsonHandler
from saved_models import NAMES, SMALL_LLAMA, WEIGHTS, save_reward_and_policy
from transformers import AutoModelForSequenceClassification

from align.content_hash import content_of
from align.errors import InputError
from align.models.reward_model import load_reward_model, save_reward_model, set_pad_token
from align.models.settings import HeadSettings, PolicySettings
from align.records import Message, Prompt
from align.rewards.judges import load_judge
from align.rewards.reward_model_judge import GROUPS_AT_ONCE
from align.rewards.settings import JudgeSettings

CONFIG = SMALL_LLAMA | {"max_position_embeddings": 128}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder with a reward model and a policy."""
    root = tmp_path_factory.mktemp("models")
    save_reward_and_policy(root, config=CONFIG)
    return root


def prompt(text):
    return Prompt((Message("user", text),))


GROUPS = [
    (prompt(f"say {number}"), [f"{number} {letter}" for letter in "abc"[: 1 + number % 3]]) for number in range(70)
]


def test_verdicts_keep_the_order_of_groups_and_responses(folders):
    judge = load_judge("reward_model", path=str(folders / "reward"))
    assert len(GROUPS) > GROUPS_AT_ONCE
    together = list(judge(GROUPS))
    assert [len(each) for each in together] == [len(texts) for _, texts in GROUPS]
    for (asked, texts), verdicts in zip(GROUPS, together, strict=True):
        for text, verdict in zip(texts, verdicts, strict=True):
            ((alone,),) = judge([(asked, [text])])
            assert verdict.reward == pytest.approx(alone.reward, abs=1e-5)
            assert verdict.reward == pytest.approx(
                2 * verdict.attributes["good"] - verdict.attributes["long"], abs=1e-5
            )
    assert len({verdict.reward for verdicts in together for verdict in verdicts}) > 100


def test_a_verdict_is_the_models_output_for_the_rendered_dialogue(folders):
    judge = load_judge("reward_model", path=str(folders / "reward"))
    ((verdict,),) = judge([(prompt("hello"), ["well met"])])
    text = "<|im_start|>user\nhello<|im_end|><|im_start|>assistant\nwell met<|im_end|>"
    ids = judge.judge.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model = judge.judge.scorer.model
    model.use_forward("plain")
    expected = model.hf(input_ids=ids.to(model.device)).logits[0].cpu()
    torch.testing.assert_close(torch.tensor([verdict.attributes[name] for name in NAMES]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_verdict_is_bit_identical_in_any_batch(folders, precision):
    judge = load_judge("reward_model", path=str(folders / "reward"), precision=precision)
    together = list(judge(GROUPS))
    for first in (1, 2, 5, 13, 40, 63):  # what a kill leaves to be judged
        assert list(judge(GROUPS[first:])) == together[first:]
    assert [list(judge([group])) for group in GROUPS] == [[each] for each in together]


def test_groups_longer_than_a_sliding_window_leave_the_others_unchanged(folders, tmp_path):
    settings = PolicySettings(
        from_config=CONFIG | {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 40},
        tokenizer=str(folders / "tokenizer"),
    )
    model, tokenizer = load_reward_model(settings, HeadSettings(attributes=NAMES, weights=WEIGHTS))
    set_pad_token(model, tokenizer, {1})
    save_reward_model(model, tokenizer, tmp_path / "windowed")
    groups = [(prompt("word " * (1 + number % 4)), [f"{number} a", f"{number} b"]) for number in range(12)]
    judge = load_judge("reward_model", path=str(tmp_path / "windowed"))
    together = list(judge(groups))
    assert judge.judge.scorer.forwards == {False: "tree", True: "plain"}
    for first in range(1, 12):
        assert list(load_judge("reward_model", path=str(tmp_path / "windowed"))(groups[first:])) == together[first:]


def test_too_long_and_empty_responses_get_no_reward_but_a_reason(folders):
    judge = load_judge("reward_model", path=str(folders / "reward"))
    groups = [
        (prompt("a"), ["b", "c" * 200]),
        (prompt("a"), ["b", " ", "d"]),
        (prompt("a"), ["", ""]),
        (prompt("a"), []),
    ]
    long, holey, empty, none = judge(groups)
    assert [verdict.reward for verdict in long] == [None, None]
    assert "too long" in long[0].why and "128" in long[0].why
    assert [verdict.reward is None for verdict in holey] == [False, True, False]
    assert holey[1].why == "the response is empty"
    ((first,), (third,)) = judge([(prompt("a"), ["b"]), (prompt("a"), ["d"])])
    assert [holey[0].reward, holey[2].reward] == pytest.approx([first.reward, third.reward], abs=1e-5)
    assert [verdict.reward for verdict in empty] == [None, None]
    assert none == ()


def test_only_the_needed_groups_are_computed(folders):
    judge = load_judge("reward_model", path=str(folders / "reward"))
    list(judge(GROUPS[:1]))  # the first time the forward is compared with that of transformers
    seen = []
    judge.judge.scorer.model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    verdicts = judge(GROUPS)
    for number in range(1, len(GROUPS) + 1):
        next(verdicts)
        assert sum(seen) == sum(len(texts) for _, texts in GROUPS[:number])


def test_the_content_of_a_reward_model_depends_on_its_aggregation(folders, tmp_path):
    again = [content_of(str(folders / "reward")) for _ in range(2)]
    model, tokenizer = load_reward_model(PolicySettings(path=str(folders / "reward")), HeadSettings(weights=(1.0, 1.0)))
    save_reward_model(model, tokenizer, tmp_path / "other")
    assert again[0] == again[1] != content_of(str(tmp_path / "other"))


@pytest.mark.parametrize("what", ["policy", "tokenizer"])
def test_other_models_are_rejected_in_one_line(folders, what):
    with pytest.raises(InputError) as error:
        load_judge("reward_model", path=str(folders / what))
    assert str(folders / what) in str(error.value) and "\n" not in str(error.value)


def test_bf16_gives_nearly_the_same_rewards(folders):
    exact = [
        verdict.reward for of in load_judge("reward_model", path=str(folders / "reward"))(GROUPS) for verdict in of
    ]
    half = load_judge("reward_model", path=str(folders / "reward"), precision="bf16")
    rounded = [verdict.reward for of in half(GROUPS) for verdict in of]
    assert rounded == pytest.approx(exact, abs=0.05)  # bf16 keeps eight bits, and rewards here are of the order of 1
    assert rounded != exact
    keys = [
        JudgeSettings(name="reward_model", settings={"path": "reward", "precision": precision}).cache_key()
        for precision in ("fp32", "bf16")
    ]
    assert keys[0] != keys[1]
    with pytest.raises(InputError, match="precision: Input should be 'fp32' or 'bf16'"):
        load_judge("reward_model", path=str(folders / "reward"), precision="bf61")


@contextmanager
def classifier_server(path):
    """A server that answers /classify as vLLM does, with the values of transformers."""
    model = AutoModelForSequenceClassification.from_pretrained(path)

    class Handler(JsonHandler):
        def do_GET(self):
            self.say(200, {"data": [{"id": "rater"}]})

        def do_POST(self):
            request = self.body()
            asked = (self.path, request["model"], request["use_activation"], request["add_special_tokens"])
            if asked != ("/classify", "rater", False, False):
                self.say(404, {"error": f"{asked}"})
                return
            with torch.no_grad():
                found = [model(torch.tensor([ids])).logits[0].tolist() for ids in request["input"]]
            self.say(200, {"data": [{"probs": values} for values in found]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_gives_the_verdicts_of_the_model_in_this_process(folders):
    path = str(folders / "reward")
    groups = [*GROUPS, (prompt("a"), ["b", "c" * 200]), (prompt("a"), ["b", " ", "d"]), (prompt("a"), ["", ""])]
    expected = list(load_judge("reward_model", path=path)(groups))
    with classifier_server(path) as url:
        engine = {"server": {"base_url": url, "models": {path: "rater"}}}
        served = list(load_judge("reward_model", path=path, engine=engine)(groups))
    assert [[each.why for each in verdicts] for verdicts in served] == [[each.why for each in one] for one in expected]
    compared = 0
    for ours, theirs in zip(served, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.reward == (None if other.reward is None else pytest.approx(other.reward, abs=1e-5))
            assert one.attributes == pytest.approx(other.attributes, abs=1e-5)
            compared += one.reward is not None
    assert compared > 100


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (
            {"transformers_serve": {}},
            "transformers serve has no scores of reward models; use vllm, or leave engine",
        ),
        (
            {"sglang": {}},
            "SGLang gives the reward models of several architectures a head with random",
        ),
        ({"local": {"precision": "bf16"}}, "a reward model has no settings of a local engine; use vllm, or leave"),
    ],
)
def test_engines_that_cannot_rate_are_refused_in_one_line(engine, said):
    with pytest.raises(InputError, match=said) as caught:
        load_judge("reward_model", path="org/rater", engine=engine)
    assert caught.value.loc[-2:] == ("engine", *engine)
    assert "\n" not in str(caught.value)


def test_the_engine_is_part_of_what_decides_a_verdict_where_there_is_one():
    plain, served, faster = (
        JudgeSettings(name="reward_model", settings={"path": "org/rater", "engine": engine}).cache_key()
        for engine in ({}, {"vllm": {}}, {"vllm": {"gpu_share": 0.3}})
    )
    assert plain["settings"] == {"path": "org/rater", "precision": "fp32"}
    assert served == faster != plain
