"""A reward model over K responses to a prompt: through the tree, and one by one as transformers does it, in turns.

Usage, from the root of the repository:

    python -m tests.benchmarks.scoring --model MODEL --data FILE [options]

    --model MODEL            folder, hub id or gguf:FILE; a language model gets a new head
    --data FILE              rows with prompts and responses in any format that align reads
    --prompts N              prompts to score (16)
    --responses K            responses to each: its own, then those of the rows behind it (4)
    --response-tokens N      responses are cut here, as sampling would cut them; 0: nowhere (128)
    --max-prompt-length N    rows with a longer prompt are left out (1024)
    --threads N              (2)

Both sides run in this process, in fp32 and on the CPU, on the same weights and token ids; which is first changes with
every prompt. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from align.data.chat_encoder import ChatEncoder
from align.data.chat_templates import apply_template
from align.data.reading import read
from align.data.token_groups import TokenGroup
from align.models.loading.pretrained import silence_transformers
from align.models.probe import choose_forward
from align.models.reward_model import RewardModel, load_reward_model
from align.models.reward_scoring import score_groups
from align.models.settings import PolicySettings
from align.models.tree.batch import count_tokens
from align.records import Comparison, Response


def main() -> None:
    """Score every prompt both ways and print what was measured."""
    options = arguments().parse_args()
    silence_transformers()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_reward_model(PolicySettings(path=options.model))
    apply_template(tokenizer)
    groups = list(choose(options, tokenizer))
    if len(groups) < options.prompts:
        raise SystemExit(f"--prompts {options.prompts}: there are {len(groups)}")
    choose_forward(model, [group.sequences for group in groups], "tree")
    print(json.dumps(measure(model, groups)))


def arguments() -> argparse.ArgumentParser:
    """The options of the usage above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    numbers = {"prompts": 16, "responses": 4, "response-tokens": 128, "max-prompt-length": 1024, "threads": 2}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def choose(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenGroup]:
    """The first prompts that are short enough, each with its K responses."""
    found = [record for record in read(options.data, on_error="skip").records if isinstance(record, Comparison)]
    encoder = ChatEncoder(tokenizer, max_prompt_length=options.max_prompt_length)
    number = 0
    for row, record in enumerate(found):
        texts = [each.content for other in found[row:] + found[:row] for each in other.responses[: options.responses]]
        said = tuple(Response(cut(text, tokenizer, options.response_tokens)) for text in texts[: options.responses])
        group = encoder.encode(Comparison(record.prompt, said), row)
        if group is not None and number < options.prompts:
            number += 1
            yield group


def cut(text: str, tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    """The text as far as its first tokens go."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[:most])) if most and len(ids) > most else text


def measure(model: RewardModel, groups: list[TokenGroup]) -> dict[str, object]:
    """Seconds of both ways over all prompts, and how far their scores are apart."""
    ways: dict[str, Callable[[RewardModel, TokenGroup], Tensor]] = {"tree": as_tree, "plain": one_by_one}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    apart = 0.0
    for number, group in enumerate([groups[0], *groups]):  # the first once more: its first time pays for the start
        scores: dict[str, Tensor] = {}
        for name in sorted(ways, reverse=bool(number % 2)):
            model.use_forward(name)  # pyright: ignore[reportArgumentType] - one of the two
            began = time.perf_counter()
            scores[name] = ways[name](model, group)
            seconds[name].append(time.perf_counter() - began)
        apart = max(apart, (scores["tree"] - scores["plain"]).abs().max().item())
    tree, alone = (seconds[name][1:] for name in ("tree", "plain"))
    return {
        "prompts": len(groups),
        "responses": len(groups[0].sequences),
        "speedup": sum(alone) / sum(tree),
        "median_speedup": median(each / other for each, other in zip(alone, tree, strict=True)),
        "seconds_tree": sum(tree),
        "seconds_one_by_one": sum(alone),
        "tokens_tree": sum(count_tokens(group.sequences) for group in groups),
        "tokens_one_by_one": sum(len(each.ids) for group in groups for each in group.sequences),
        "max_score_difference": apart,
    }


def as_tree(model: RewardModel, group: TokenGroup) -> Tensor:
    """Attributes of the group's responses in one forward, the building of the tree included."""
    return score_groups(model, [group])[0]


@torch.no_grad()
def one_by_one(model: RewardModel, group: TokenGroup) -> Tensor:
    """The same by the forward of transformers, a response at a time."""
    return torch.cat([model.forward_sequence(each) for each in group.sequences])


if __name__ == "__main__":
    main()
