"""Tiny policies and datasets for smoke tests: built in under a second, in memory, without network access."""

from __future__ import annotations

from random import Random

from transformers import PreTrainedTokenizerBase

from align.data.chat_templates import apply_template
from align.data.tokenizer import train_tokenizer
from align.errors import InputError
from align.models.loading.pretrained import load_base
from align.models.policy import Policy
from align.models.settings import PolicySettings
from align.records import Comparison, Demonstration, Message, Response

# From the worst to the best first word of a response. The reward depends on this word alone, so a tiny policy learns
# the preference in a few optimizer steps, and what it learns carries over to held-out rows.
OPENINGS = ("No", "Hardly", "Perhaps", "Yes", "Certainly", "Gladly")
COLORS = ("red", "blue", "white", "green", "black", "yellow")
ANIMALS = ("cat", "dog", "bird", "wolf", "fish", "mouse")
MAX_ATTRIBUTE = 4.0  # HelpSteer's attributes range from 0 to 4

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}
VOCAB_SIZE = 384  # 256 bytes, three special tokens, and one token for each word above


def tiny_policy(*, seed: int = 0) -> tuple[Policy, PreTrainedTokenizerBase]:
    """Return a random two-layer Llama in fp32 on the CPU and its tokenizer, as `load_policy` does.

    The tokenizer is a byte-level BPE, so it encodes any text, and has the ChatML template. The weights (about 40,000)
    depend on `seed` only. To get a folder that a recipe or `from_pretrained` loads, pass both to `save_policy`.

    >>> policy, tokenizer = tiny_policy()
    >>> tokenizer.decode(tokenizer.encode("Gladly, the cat is red."))
    'Gladly, the cat is red.'
    """
    tokenizer = train_tokenizer(_corpus(), vocab_size=VOCAB_SIZE, chat_template="")
    apply_template(tokenizer, "chatml")
    config = {
        **TINY_LLAMA,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    return Policy(load_base(PolicySettings(from_config=config, seed=seed))).train(), tokenizer


def tiny_preferences(num_rows: int = 32, *, num_responses: int = 2, seed: int = 0) -> list[Comparison]:
    """Return `num_rows` prompts with `num_responses` (2 to 6) responses each, in random order of reward.

    Rewards are distinct within a prompt and lie in [0, 1]; `helpfulness` is the reward scaled to HelpSteer's [0, 4].
    The reward depends on the first word of the response only. Another number of responses raises `InputError`.

    >>> row = tiny_preferences(num_rows=1)[0]
    >>> row.prompt[0].content
    'What color is the wolf?'
    >>> [(response.content, response.reward) for response in row.responses]
    [('No, the wolf is green.', 0.0), ('Perhaps, the wolf is green.', 0.4)]
    """
    if not 2 <= num_responses <= len(OPENINGS):
        raise InputError(f"num_responses is {num_responses}, not from 2 to {len(OPENINGS)}")
    random = Random(seed)
    rows: list[Comparison] = []
    for _ in range(num_rows):
        animal, color = random.choice(ANIMALS), random.choice(COLORS)
        openings = random.sample(OPENINGS, num_responses)
        rows.append(Comparison(_prompt(animal), tuple(_response(opening, animal, color) for opening in openings)))
    return rows


def tiny_demonstrations(num_rows: int = 32, *, seed: int = 0) -> list[Demonstration]:
    """Return `num_rows` dialogues of one question and its best answer, for supervised fine-tuning.

    >>> [message.content for message in tiny_demonstrations(num_rows=1)[0].messages]
    ['What color is the wolf?', 'Gladly, the wolf is green.']
    """
    random = Random(seed)
    rows: list[Demonstration] = []
    for _ in range(num_rows):
        animal, color = random.choice(ANIMALS), random.choice(COLORS)
        answer = Message("assistant", _answer(OPENINGS[-1], animal, color))
        rows.append(Demonstration((*_prompt(animal), answer)))
    return rows


def _prompt(animal: str) -> tuple[Message, ...]:
    return (Message("user", f"What color is the {animal}?"),)


def _answer(opening: str, animal: str, color: str) -> str:
    return f"{opening}, the {animal} is {color}."


def _response(opening: str, animal: str, color: str) -> Response:
    reward = OPENINGS.index(opening) / (len(OPENINGS) - 1)
    return Response(_answer(opening, animal, color), reward, {"helpfulness": MAX_ATTRIBUTE * reward})


def _corpus() -> list[str]:
    """Return every prompt and answer that the rows can contain, and the roles of the chat template."""
    texts = ["system", "user", "assistant"]
    for animal in ANIMALS:
        texts.append(_prompt(animal)[0].content)
        texts += [_answer(opening, animal, color) for opening in OPENINGS for color in COLORS]
    return texts
