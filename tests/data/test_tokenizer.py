import pytest
from transformers import AutoTokenizer

from align.data.tokenizer import train_tokenizer
from align.errors import InputError

WORDS = ["cat", "horse", "mango", "exclamation"]
TEXTS = [form for word in WORDS for form in (word, f" {word}", word.upper(), f" {word.upper()}")]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=600, chat_template=TEMPLATE)


@pytest.mark.parametrize(
    "text",
    ["cat, HORSE!", "two  spaces\n\ttab ", "naïve café — 日本語 🙂", " leading , before a comma", "<|im_end|>", ""],
)
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("text", TEXTS)
def test_every_training_word_is_one_token(tokenizer, text):
    assert len(tokenizer(text)["input_ids"]) == 1


def test_training_again_gives_the_same_tokenizer(tokenizer):
    again = train_tokenizer(iter(TEXTS), vocab_size=600, chat_template=TEMPLATE)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_turn_starts_and_ends_with_one_token(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False)
    start, word, end = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens([start, word, end]) == ["<|im_start|>", "cat", "<|im_end|>"]
    assert tokenizer.eos_token_id == end
    assert tokenizer.pad_token_id not in (start, word, end)
    assert tokenizer.decode([start, word, end], skip_special_tokens=True) == "cat"


def test_a_saved_folder_loads_as_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.chat_template == TEMPLATE
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|im_end|>", "<|pad|>", None)


def test_the_vocabulary_is_limited_and_contains_every_byte(tokenizer):
    assert len(train_tokenizer(TEXTS, vocab_size=270, chat_template=TEMPLATE)) == 270
    assert len(tokenizer) < 600  # the texts have no more merges
    with pytest.raises(InputError, match="vocab_size is 258; .* need at least 259"):
        train_tokenizer(TEXTS, vocab_size=258, chat_template=TEMPLATE)
