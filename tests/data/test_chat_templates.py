import re
from pathlib import Path

import pytest
import trl
from toy_chat import (
    ASSISTANT,
    CHATML,
    CHATML_BLOCKS,
    CHATML_SHORT_BLOCKS,
    ENDLESS,
    GEMMA,
    LLAMA2,
    LLAMA3,
    LLAMA3_BLOCKS,
    QWEN3,
    TEXTS,
    USER,
    adding_bos,
    dialogue,
    flat,
    pair,
    tokenizer_of,
    trained_runs,
)
from transformers import AutoTokenizer

from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import TEMPLATES, apply_template
from align.errors import InputError
from align.records import Comparison, Demonstration, Message, Response

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def test_every_built_in_template_is_tested():
    assert {name for name, (source, _, _) in TEXTS.items() if source is None} == set(TEMPLATES)


def test_a_dialogue_can_start_with_the_assistant():
    tokenizer = tokenizer_of("{{ '<|im_start|>system\nsay yes<|im_end|>\n' }}" + CHATML)
    messages = (Message(ASSISTANT, "yes"), *dialogue("1", "no"))
    group = ChatEncoder(tokenizer).encode(Demonstration(messages), 0)
    assert tokenizer.decode(group.sequences[0].ids).count("yes<|im_end|>") == 2
    assert trained_runs(group.sequences[0], tokenizer) == ["yes<|im_end|>", "no<|im_end|>"]


@pytest.mark.parametrize("said", ["think", "i", "n", "im_end", "hm", "t is", "user"])
def test_a_response_is_not_confused_with_template_text(said):
    tokenizer = tokenizer_of(QWEN3)
    records = [pair("1", said, "no"), Demonstration(dialogue("1", said))]
    for sequence in [ChatEncoder(tokenizer).encode(record, 0).sequences[0] for record in records]:
        assert trained_runs(sequence, tokenizer) == [f"<think>\n\n</think>\n\n{said}<|im_end|>"]


@pytest.mark.parametrize(
    ("plain", "marked"), [(CHATML, CHATML_BLOCKS), (CHATML, CHATML_SHORT_BLOCKS), (LLAMA3, LLAMA3_BLOCKS)]
)
def test_generation_blocks_and_rendered_prompts_give_the_same_mask(plain, marked):
    demonstration = Demonstration(dialogue("1", " yes\n", "2", "2", "user", "the moon is", system="far"))
    with_prompts, with_blocks = (
        ChatEncoder(tokenizer_of(template)).encode(demonstration, 0) for template in (plain, marked)
    )
    assert flat(with_prompts) == flat(with_blocks)
    assert len(trained_runs(with_blocks.sequences[0], tokenizer_of(plain))) == 3


ORIGINALS = ["cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "phi3", "qwen2_5", "qwen3_instruct_2507"]


@pytest.mark.parametrize("name", ORIGINALS)
def test_templates_in_use_give_the_same_mask_with_and_without_blocks(name):
    """TRL ships templates of well-known models, each with and without generation blocks."""
    sources = [(TRL_TEMPLATES / f"{name}{suffix}.jinja").read_text(encoding="utf-8") for suffix in ("", "_training")]
    special = dict.fromkeys(re.findall(r"<\|\w+\|>|<\w+_of_turn>", sources[0])) | dict.fromkeys(("<s>", "</s>"))
    tokenizers = [tokenizer_of(source, special=tuple(special)) for source in sources]
    demonstration = Demonstration(dialogue("1", "yes", "2", "the moon is", "2", "no"))
    groups = [ChatEncoder(tokenizer).encode(demonstration, 0) for tokenizer in tokenizers]
    assert flat(groups[0]) == flat(groups[1])
    runs = trained_runs(groups[0].sequences[0], tokenizers[0])
    end_of_turn = runs[0].removeprefix("yes")
    assert runs == [said + end_of_turn for said in ("yes", "the moon is", "no")]
    assert end_of_turn in special


def test_generation_blocks_give_the_mask_of_transformers():
    tokenizer = tokenizer_of(LLAMA3_BLOCKS)
    messages = dialogue("1", "yes", "2", "the moon is")
    chat = [{"role": message.role, "content": message.content} for message in messages]
    expected = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    sequence = ChatEncoder(tokenizer).encode(Demonstration(messages), 0).sequences[0]
    assert sequence.ids.tolist() == expected["input_ids"]
    assert sequence.loss_mask.astype(int).tolist() == expected["assistant_masks"]


MOVED_SYSTEM = (  # moves the system message before the last message
    "{% for m in messages if m.role != 'system' %}"
    "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
)
FORCED_THINKING = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
THOUGHT = "<think>\nhm\n</think>\n\nyes"


@pytest.mark.parametrize(
    ("template", "record", "words"),
    [
        (MOVED_SYSTEM, Comparison(dialogue("1", system="be"), (Response("yes"),)), ["is not the beginning of", "'be"]),
        (FORCED_THINKING, pair(), ["is not the beginning of", "assistant\\n<think>\\n' becomes", "its <think> block"]),
        (
            FORCED_THINKING,
            Demonstration(dialogue("1", "no", "2", THOUGHT)),
            ["is not the beginning of", "one row per answer"],
        ),
        (QWEN3, Demonstration(dialogue("1", THOUGHT, "2", THOUGHT)), ["alters an assistant message", "'yes<|im_end|>"]),
        (
            GEMMA,
            Demonstration(dialogue("1", "yes", system="be")),
            ["cannot render the dialogue", "System role not supported"],
        ),
        (CHATML.replace("m.content", "m.text"), pair(), ["cannot render the dialogue", "text"]),
        (CHATML_BLOCKS.replace("'assistant' %}", "'tool' %}"), Demonstration(dialogue("1", "yes")), ["block", "'yes'"]),
        (CHATML.replace("{{ '<|im", "{{{ '<|im"), pair(), ["cannot render the dialogue"]),
        (CHATML + "{{ 1 / 0 }}", pair(), ["cannot render the dialogue", "division by zero"]),
        (
            CHATML + "{{ messages[0].content.index('zz') }}",
            pair(),
            ["cannot render the dialogue", "substring not found"],
        ),
        (
            CHATML + "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
            pair(),
            ["cannot render the dialogue"],
        ),
    ],
)
def test_unsuitable_templates_are_rejected_with_the_row_and_the_difference(template, record, words):
    with pytest.raises(InputError) as raised:
        ChatEncoder(tokenizer_of(template)).encode(record, 41)
    assert all(word in str(raised.value) for word in ["row 42", *words])
    assert "\n" not in str(raised.value)


def test_thinking_in_the_last_message_is_trained_if_the_template_keeps_it():
    tokenizer = tokenizer_of(QWEN3)
    group = ChatEncoder(tokenizer).encode(Demonstration(dialogue("1", "no", "2", THOUGHT)), 0)
    assert trained_runs(group.sequences[0], tokenizer) == ["no<|im_end|>", THOUGHT + "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids("<think>") in group.sequences[0].ids


def test_each_turn_continues_the_thought_that_its_prompt_opens_if_the_template_keeps_it():
    tokenizer = tokenizer_of(FORCED_THINKING)
    group = ChatEncoder(tokenizer).encode(Demonstration(dialogue("1", THOUGHT, "2", THOUGHT + "!")), 0)
    rest = THOUGHT.removeprefix("<think>\n")
    assert trained_runs(group.sequences[0], tokenizer) == [rest + "<|im_end|>", rest + "!<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_built_in_template_writes_the_bos_that_the_tokenizer_would_add(name):
    tokenizer = adding_bos(None)
    source = apply_template(tokenizer, name)
    assert source == tokenizer.chat_template
    text = tokenizer.apply_chat_template([{"role": USER, "content": "1"}], tokenize=False)
    assert text.count("<s>") == 1 and text.startswith("<s>")


def test_the_next_message_is_not_trained_if_a_turn_has_no_end_token():
    tokenizer = tokenizer_of(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}{{ '<|head|>' }}{% endif %}{% endfor %}"
    )
    encoder = ChatEncoder(tokenizer)
    group = encoder.encode(Demonstration(dialogue("1", "yes", " 2", "no")), 0)
    assert trained_runs(group.sequences[0], tokenizer) == ["yes", "no</s>"]
    assert encoder.counts["no end-of-turn token in the template"] == 2


def test_a_tokenizer_without_eos_is_rejected():
    tokenizer = tokenizer_of(ENDLESS, special=("<|im_start|>",))
    with pytest.raises(InputError, match="row 6.*eos_token"):
        ChatEncoder(tokenizer).encode(pair(), 5)
    for name in TEMPLATES:
        with pytest.raises(InputError, match="no eos_token"):
            apply_template(tokenizer, name)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_built_in_template_falls_back_to_eos(name):
    tokenizer = tokenizer_of(special=("<s>", "</s>"))
    apply_template(tokenizer, name)
    encoder = ChatEncoder(tokenizer)
    group = encoder.encode(pair(), 0)
    assert [trained_runs(one, tokenizer) for one in group.sequences] == [["yes, far away</s>"], ["no</s>"]]
    assert "no end-of-turn token in the template" not in encoder.counts


def test_a_missing_template_is_reported_with_the_known_ones(tmp_path):
    tokenizer = tokenizer_of()
    with pytest.raises(InputError, match="chatml, plain, steerlm"):
        ChatEncoder(tokenizer)
    with pytest.raises(InputError, match="did you mean 'chatml'"):
        apply_template(tokenizer, "chatlm")
    with pytest.raises(InputError, match=r"missing\.jinja cannot be read"):
        apply_template(tokenizer, str(tmp_path / "missing.jinja"))
    (tmp_path / "own.jinja").write_text(LLAMA2, encoding="utf-8")
    assert apply_template(tokenizer, str(tmp_path / "own.jinja")) == LLAMA2 == tokenizer.chat_template
    assert apply_template(tokenizer) == LLAMA2


def test_a_named_template_of_the_tokenizer_is_chosen_by_its_name_and_saved_as_the_default(tmp_path):
    tokenizer = tokenizer_of({"own": CHATML, "tool_use": LLAMA2})
    with pytest.raises(
        InputError, match="several chat templates and no default: set chat_template to one of own, tool"
    ):
        apply_template(tokenizer)
    with pytest.raises(InputError, match="did you mean 'tool_use'"):
        apply_template(tokenizer, "tool_us")
    assert apply_template(tokenizer, "own") == CHATML == apply_template(tokenizer)
    assert trained_runs(ChatEncoder(tokenizer).encode(pair(), 0).sequences[1], tokenizer) == ["no<|im_end|>"]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == {"default": CHATML, "own": CHATML, "tool_use": LLAMA2}
    assert apply_template(loaded) == CHATML
    assert apply_template(loaded, "tool_use") == LLAMA2
