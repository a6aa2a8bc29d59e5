"""Tiny random chat models on disk: what recipes and judges load."""

from align.data.tokenizer import train_tokenizer
from align.models.policy import load_policy, save_policy
from align.models.reward_model import load_reward_model, save_reward_model, set_pad_token
from align.models.settings import HeadSettings, PolicySettings

# ChatML without line breaks between turns
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
NAMES, WEIGHTS = ("good", "long"), (2.0, -1.0)  # attributes of the reward models


def save_tokenizer(folder):
    """Save a tokenizer with one token per byte, and return its path."""
    train_tokenizer(["a b"], vocab_size=259, chat_template=TEMPLATE).save_pretrained(folder / "tokenizer")
    return str(folder / "tokenizer")


def save_reward_and_policy(folder, *, reward="reward", config=SMALL_LLAMA, seed=0):
    """Save a reward model under the name `reward`, and a policy as `policy`."""
    settings = PolicySettings(from_config=config, tokenizer=save_tokenizer(folder), seed=seed)
    model, tokenizer = load_reward_model(settings, HeadSettings(attributes=NAMES, weights=WEIGHTS))
    set_pad_token(model, tokenizer, {1})
    save_reward_model(model, tokenizer, folder / reward)
    save_policy(*load_policy(settings), folder / "policy")
