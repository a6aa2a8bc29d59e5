"""The engine in this process: distributions, ends of responses, and independence of batch, order and kills."""

import os
import signal
import time
import tracemalloc
from collections import Counter
from datetime import datetime

import pytest
import torch
from frequencies import are_drawn_from, shares_by_definition
from held import hold_after_items
from transformers import AutoConfig, AutoModelForCausalLM

from align.config import build
from align.data.chat_clock import pinned_time
from align.data.tokenizer import train_tokenizer
from align.distributed.journal import Journal
from align.errors import InputError
from align.inference.samples import TOO_LONG, prompt_key, respond, sample_with_journal
from align.inference.settings import LocalSettings, SamplingSettings
from align.inference.transformers_engine import TransformersEngine
from align.records import Message, Prompt
from align.rewards.thoughts import visible_text

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
PROMPTS = [
    Prompt((Message("user", text),))
    for text in (
        "a",
        "tell me",
        "a longer prompt, with words",
        "naïve 日本語",
        "x" * 70,
        "one two three four",
        "ab",
        "?",
    )
]
LLAMA = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_engine(batch_size=64, *, spread=0.4, name="tiny", kind=None, template=TEMPLATE, **settings):
    """An engine with a byte tokenizer and a random model; a larger spread gives more confident predictions."""
    tokenizer = train_tokenizer(["a b"], vocab_size=259, chat_template=template)
    values = {**LLAMA, "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 512, **settings}
    values |= {"model_type": kind} if kind else {}
    config = AutoConfig.for_model(**values, vocab_size=len(tokenizer), initializer_range=spread)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return TransformersEngine(model, tokenizer, name=name, batch_size=batch_size), model, tokenizer


def by_place(samples):
    found = {}
    for sample in samples:
        assert (sample.key, sample.number) not in found, "sampled twice"
        found[sample.key, sample.number] = sample
    return found


SETTINGS = SamplingSettings(num_responses=3, temperature=0.9, top_p=0.95, max_new_tokens=40, seed=5)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_samples_do_not_depend_on_batch_size_or_order(kind):
    settings = {"state_size": 4} if kind == "mamba" else {}
    asked = SETTINGS.model_copy(update={"stop": ["e", "t", "q", "7"]})
    expected = by_place(tiny_engine(64, kind=kind, **settings)[0].sample(PROMPTS, asked))
    assert len(expected) == 3 * len(PROMPTS)
    assert len({sample.num_tokens for sample in expected.values()}) > 3  # rows come and go
    for batch_size in (1, 3, 8):
        engine, _, _ = tiny_engine(batch_size, kind=kind, **settings)
        assert by_place(engine.sample(PROMPTS[::-1], asked)) == expected, batch_size
    assert bool(engine.unsupported) == (kind == "mamba")


def test_a_sample_depends_on_its_own_seed_only():
    engine, _, _ = tiny_engine()
    whole = by_place(engine.sample(PROMPTS, SETTINGS))
    few = by_place(engine.sample(PROMPTS[2:4], SETTINGS.model_copy(update={"num_responses": 2})))
    assert few == {place: whole[place] for place in few}
    longer = by_place(engine.sample(PROMPTS, SETTINGS.model_copy(update={"max_new_tokens": 60})))
    ended = [place for place, sample in whole.items() if sample.finish == "stop"]
    assert ended and all(longer[place] == whole[place] for place in ended)


def test_seeds_policies_and_numbers_give_different_samples():
    whole = by_place(tiny_engine()[0].sample(PROMPTS, SETTINGS))
    other_seed = by_place(tiny_engine()[0].sample(PROMPTS, SETTINGS.model_copy(update={"seed": 6})))
    other_name = by_place(tiny_engine(name="twin")[0].sample(PROMPTS, SETTINGS))
    for other in (other_seed, other_name):
        same = [place for place in whole if whole[place].text == other[place].text]
        assert len(same) <= len(whole) // 10
    texts = Counter(sample.text for sample in whole.values())
    assert len(texts) >= 0.9 * len(whole)


def test_finished_samples_and_duplicate_prompts_are_not_sampled_again():
    engine, _, _ = tiny_engine()
    whole = by_place(engine.sample(PROMPTS, SETTINGS))
    done = {place: whole[place].num_tokens for place in list(whole)[::2]}
    rest = by_place(engine.sample([*PROMPTS, *PROMPTS], SETTINGS, finished=done))
    assert rest == {place: sample for place, sample in whole.items() if place not in done}
    other, _, _ = tiny_engine()
    assert by_place(other.sample(PROMPTS, SETTINGS, finished=done)) == rest  # and what all have taken is the same
    first, _, _ = tiny_engine()
    assert by_place(first.sample(PROMPTS, SETTINGS)) == whole
    for figure in ("processed_tokens", "sampled_tokens", "attended_pairs"):
        assert getattr(other.throughput, figure) == getattr(first.throughput, figure) > 0
    num_tokens = sum(sample.num_tokens for sample in whole.values())
    assert first.throughput.sampled_tokens == num_tokens == first.throughput.new_tokens
    assert other.throughput.new_tokens == sum(sample.num_tokens for sample in rest.values())


def test_a_killed_run_resumes_to_the_same_samples(tmp_path):
    settings = SETTINGS.model_copy(update={"num_responses": 20})
    expected = by_place(tiny_engine()[0].sample(PROMPTS, settings))
    path = tmp_path / "samples.jsonl"

    def live(batch_size):
        engine, _, _ = tiny_engine(batch_size)
        with Journal(path, {"settings": settings.model_dump()}) as journal:
            return list(sample_with_journal(engine, PROMPTS, settings, journal))

    kills = []
    for batch_size in (2, 5):
        before = path.read_bytes().count(b"\n") if path.exists() else 1
        if (child := os.fork()) == 0:
            torch.set_num_threads(1)
            hold_after_items(before - 1 + 40)
            live(batch_size)
            os._exit(0)
        while not path.exists() or path.read_bytes().count(b"\n") < before + 20:
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        path.write_bytes(path.read_bytes()[:-7])  # in the middle of a line
        kills.append(path.read_bytes().count(b"\n"))
    assert 20 <= kills[0] < kills[1] < len(expected)
    assert by_place(live(8)) == expected
    assert path.read_bytes().count(b"\n") == 1 + len(expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_greedy_decoding_equals_generate(kind):
    settings = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512} if kind != "llama" else {}
    engine, model, tokenizer = tiny_engine(kind=kind, **settings)
    samples = by_place(engine.sample(PROMPTS, SamplingSettings(temperature=0, max_new_tokens=24)))
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt.messages[0].content)["input_ids"]])
        said = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        sample = samples[prompt_key(prompt), 0]
        assert sample.text == tokenizer.decode(said, skip_special_tokens=True)
        assert sample.num_tokens == len(said)
        assert sample.finish == ("stop" if tokenizer.eos_token_id in said.tolist() else "length")


def share_of_texts(model, tokenizer, ids, temperature, top_p):
    """Probability of the text of each next token, from the model's own logits."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    found = Counter()
    for token, share in shares_by_definition(logits, temperature, top_p).items():
        found[tokenizer.decode([token], skip_special_tokens=True)] += share
    return found


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.5, 0.9)])
def test_response_frequencies_match_the_model(temperature, top_p):
    engine, model, tokenizer = tiny_engine(spread=0.25)
    settings = SamplingSettings(num_responses=4000, temperature=temperature, top_p=top_p, max_new_tokens=1)
    texts = [sample.text for sample in engine.sample(PROMPTS[2:3], settings)]
    ids = tokenizer(PROMPTS[2].messages[0].content)["input_ids"]
    assert are_drawn_from(texts, share_of_texts(model, tokenizer, ids, temperature, top_p))
    assert not are_drawn_from(texts, share_of_texts(model, tokenizer, ids, 1.2 * temperature, top_p))


def test_the_second_token_is_conditioned_on_the_first():
    engine, model, tokenizer = tiny_engine(spread=0.25)
    settings = SamplingSettings(num_responses=6000, max_new_tokens=2, seed=3)
    samples = list(engine.sample(PROMPTS[1:2], settings))
    plain = Counter(sample.text[0] for sample in samples if sample.text and sample.text[0].isascii())
    first = plain.most_common(1)[0][0]
    ids = [*tokenizer(PROMPTS[1].messages[0].content)["input_ids"], *tokenizer(first)["input_ids"]]
    seconds = [sample.text[1:] for sample in samples if sample.text[:1] == first]
    assert len(seconds) > 100
    assert are_drawn_from(seconds, share_of_texts(model, tokenizer, ids, 1.0, 1.0))


def test_a_stop_string_ends_a_response_regardless_of_tokenization():
    engine, _, _ = tiny_engine(spread=0.2)
    settings = SamplingSettings(num_responses=4, max_new_tokens=60, seed=2)
    free = by_place(engine.sample(PROMPTS, settings))
    stop = ["e", *(sample.text[10:14] for sample in list(free.values())[:3])]  # a byte a token: four tokens and more
    stopped = by_place(engine.sample(PROMPTS, settings.model_copy(update={"stop": stop})))
    num_cut = 0
    for place, whole in free.items():
        cut = min((whole.text.find(each) for each in stop if each in whole.text), default=None)
        assert stopped[place].text == whole.text[:cut]
        if cut is not None:
            num_cut += 1
            assert stopped[place].finish == "stop"
            assert stopped[place].num_tokens <= whole.num_tokens
    print(f"{num_cut} of {len(free)} cut")
    assert num_cut > len(free) // 4
    assert any(sample.num_tokens < free[place].num_tokens for place, sample in stopped.items())


def test_an_immediate_end_of_turn_gives_an_empty_sample():
    engine, model, tokenizer = tiny_engine()
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    ends_at_once = TransformersEngine(model, tokenizer, name="mute")
    samples = list(ends_at_once.sample(PROMPTS, SETTINGS))
    assert len(samples) == 3 * len(PROMPTS)
    assert {(sample.text, sample.num_tokens, sample.finish) for sample in samples} == {("", 1, "stop")}


def test_text_has_no_special_tokens_and_complete_characters():
    engine, model, tokenizer = tiny_engine()
    special = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    said = tokenizer("日本語 🙂 é")["input_ids"]
    row_ids = [*said[:4], tokenizer.pad_token_id, *said[4:], special]
    assert engine._text(row_ids) == "日本語 🙂 é"


def test_a_sample_begins_with_the_thought_that_the_prompt_opens():
    opened = TEMPLATE + "{% if add_generation_prompt %}:{{ '<think>\\n' }}{% endif %}"
    closed = TEMPLATE + "{% if add_generation_prompt %}:{{ '<think>\\n\\n</think>\\n' }}{% endif %}"
    settings = SamplingSettings(temperature=0, max_new_tokens=12)
    for template, mark in ((opened, "<think>\n"), (closed, ""), (TEMPLATE, "")):
        engine, model, tokenizer = tiny_engine(template=template)
        (sample,) = engine.sample(PROMPTS[:1], settings)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}], add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        ids = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        assert sample.text == mark + tokenizer.decode(ids, skip_special_tokens=True)
        assert visible_text(sample.text) == ("" if mark else sample.text)


def test_respond_keeps_the_order_of_the_prompts():
    engine, _, _ = tiny_engine(2)
    settings = SamplingSettings(temperature=0, max_new_tokens=12)
    texts = {key: sample.text for (key, _), sample in by_place(engine.sample(PROMPTS, settings)).items()}
    asked = [PROMPTS[3], PROMPTS[0], PROMPTS[3], PROMPTS[5]]
    assert [each.text for each in respond(engine, asked, settings)] == [texts[prompt_key(prompt)] for prompt in asked]


def test_throughput_counts_sampled_tokens():
    engine, _, _ = tiny_engine()
    start = time.perf_counter()
    samples = list(engine.sample(PROMPTS, SETTINGS))
    assert engine.throughput.new_tokens == sum(sample.num_tokens for sample in samples)
    assert 0 < engine.throughput.seconds <= time.perf_counter() - start
    assert engine.throughput.tokens_per_s == engine.throughput.new_tokens / engine.throughput.seconds


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_responses": 0}, "num_responses"),
        ({"num_responses": 2, "temperature": 0}, "2 responses at temperature 0 are one response 2 times"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": [""]}, "stop"),
        ({"top_k": 3}, "unknown key"),
    ],
)
def test_invalid_sampling_settings_are_rejected_in_one_line(values, said):
    with pytest.raises(InputError, match=said) as caught:
        build(SamplingSettings, values, ("sampling",))
    assert "\n" not in str(caught.value)


def test_a_prompt_too_long_for_the_context_is_returned_first_and_unanswered():
    engine, _, _ = tiny_engine(max_position_embeddings=100)
    short = [prompt for prompt in PROMPTS if prompt is not PROMPTS[4]]
    for room, is_left_out in ((30, False), (31, True)):  # behind 70 of its own
        sampling = SamplingSettings(num_responses=2, max_new_tokens=room)
        found = list(engine.sample(PROMPTS, sampling))
        empty = [(one.key, one.number, one.text, one.num_tokens) for one in found if one.finish == TOO_LONG]
        key = prompt_key(PROMPTS[4])
        assert empty == ([(key, 0, "", 0), (key, 1, "", 0)] if is_left_out else [])
        assert found[: len(empty)] == [one for one in found if one.finish == TOO_LONG]
        others = {(one.key, one.number): one for one in found if one.key != key}
        assert others == {(one.key, one.number): one for one in engine.sample(short, sampling)}
        done = {(key, 0): 0}
        again = [one.number for one in engine.sample(PROMPTS[4:5], sampling, finished=done)]
        assert again == [1]


def test_a_missing_model_is_rejected(tmp_path):
    with pytest.raises(InputError, match="cannot load a model from"):
        TransformersEngine.load(str(tmp_path / "nowhere"), name="nowhere")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_saved_policy_is_loaded_in_the_requested_precision(tmp_path, precision):
    _, model, tokenizer = tiny_engine()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = TransformersEngine.load(str(tmp_path), LocalSettings(precision=precision), name="tiny")
    samples = by_place(engine.sample(PROMPTS, SETTINGS))
    exact = by_place(tiny_engine()[0].sample(PROMPTS, SETTINGS))
    assert (samples == exact) == (precision == "fp32")


def test_the_text_of_a_sample_keeps_special_marks_of_a_thought_and_no_other_special_token():
    engine, model, tokenizer = tiny_engine()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|tool|>"]})
    ids = tokenizer("<|tool|><think>far</think>yes<|im_end|>", add_special_tokens=False)["input_ids"]
    assert engine._text(ids) == "faryes"  # of a tokenizer that had no marks when the engine was made
    assert TransformersEngine(model, tokenizer, name="marked")._text(ids) == "<think>far</think>yes"


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def greedy(model, ids, number):
    """Tokens by definition: the most likely one, computed from everything before it each time."""
    for _ in range(number):
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def test_an_open_user_turn_continues_the_template_where_the_user_would_speak():
    engine, model, tokenizer = tiny_engine(template=CHAT)
    asked = [Prompt((Message("user", ""),)), Prompt((Message("system", "Be odd."), Message("user", "")))]
    settings = SamplingSettings(temperature=0, max_new_tokens=12)
    found = {sample.key: sample for sample in engine.open_user_turns().sample(asked, settings)}
    for prompt, head in zip(asked, ["<user>", "<system>Be odd.</><user>"], strict=True):
        ids = tokenizer(head, add_special_tokens=False)["input_ids"]
        expected = greedy(model, ids, found[prompt_key(prompt)].num_tokens)[len(ids) :]
        text = tokenizer.decode([each for each in expected if each != tokenizer.eos_token_id], skip_special_tokens=True)
        assert found[prompt_key(prompt)].text == text
    (answer,) = engine.sample(asked[:1], settings)
    assert answer.text != found[prompt_key(asked[0])].text  # the engine itself still answers
    strict, _, _ = tiny_engine(template="{% for m in messages %}{{ m.content | lower }}{% endfor %}")
    with pytest.raises(InputError, match="the chat template alters a user's message"):
        list(strict.open_user_turns().sample(asked[:1], settings))


def test_an_open_user_turn_has_the_date_of_its_step_and_no_control_tokens_from_a_message():
    engine, _, tokenizer = tiny_engine(template="{{ strftime_now('%d %b') }}" + CHAT)
    asked = Prompt((Message("system", "Say <|pad|> first."), Message("user", "")))
    seen = []
    for day in (1, 2):
        with pinned_time(datetime(2026, 7, day)):
            seen.append(engine.open_user_turns()._prompt_ids(asked, 0))
    first, second = (tokenizer.decode(ids) for ids in seen)
    assert first == "01 Jul<system>Say <|pad|> first.</><user>" and second == first.replace("01", "02")
    assert tokenizer.pad_token_id not in seen[0] and tokenizer.pad_token == "<|pad|>"


def test_likelihoods_of_choices_are_those_of_their_first_tokens():
    engine, model, tokenizer = tiny_engine(template=CHAT)
    for prompt, logps in zip(PROMPTS, engine.choice_logps(PROMPTS, ("Yes", "No")), strict=True):
        head = f"<user>{prompt.messages[0].content}</><assistant>"
        ids = torch.tensor([tokenizer(head, add_special_tokens=False)["input_ids"]])
        expected = model(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        firsts = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")]
        torch.testing.assert_close(torch.tensor(logps, dtype=torch.float64), expected[firsts], atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="'Yes' and 'Yeah' begin with the same token"):
        list(engine.choice_logps(PROMPTS[:1], ("Yes", "Yeah")))


def test_responses_that_wait_take_no_more_memory_where_they_may_be_longer():
    engine, _, _ = tiny_engine()
    asked, sizes = [Prompt((Message("user", f"question {number}"),)) for number in range(50)], []
    for longest in (16, 400):
        tracemalloc.start()
        waiting = engine._start(asked, SamplingSettings(max_new_tokens=longest, num_responses=4))
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(waiting) == 200
    assert sizes[1] < 1.5 * sizes[0]
