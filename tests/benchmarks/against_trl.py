"""The same preference rows trained by TRL's DPOTrainer and by align, in turns: seconds, memory, tokens and losses.

Usage, from the root of the repository:

    python -m tests.benchmarks.against_trl --model MODEL --data FILE [options]

    --model MODEL            folder, hub id or gguf:FILE
    --data FILE              preference rows in any format that align reads
    --rows N                 prompts to train on (32)
    --prompts-per-step N     prompts of an optimizer step (8)
    --pairs pairs|all        the first two responses of a row, or all pairs of its first `--responses` (pairs)
    --responses K            responses of a group under `--pairs all` (4)
    --steps N                optimizer steps (one epoch)
    --max-prompt-length N    rows with a longer prompt are left out (512)
    --max-length N           rows with a longer sequence are left out (no limit)
    --precision fp32|bf16    bf16: matrix products in bf16 over fp32 weights, on both sides (fp32)
    --token-budget N         tokens of one of align's micro-batches (2048)
    --learning-rate X        constant (1e-6)
    --threads N              of each side; only one computes at a time (2)
    --device cpu|cuda        where both sides compute; memory is the process's or what PyTorch holds of the GPU's (cpu)
    --blocks N               0: both sides at once, step by step in turns; otherwise the number of times that each side
                             takes all steps, every time in a new process and from the same weights, where memory cannot
                             hold both sides; on a shared machine their ratio says less (0)

Each side runs in a process of its own, so that its peak memory is its own. Both precompute the reference,
keep all activations, and train the same token ids in the same order with the same optimizer; TRL takes all pairs of a
step as one batch. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from align.accounting.flops import Work, decoder_from_config, forward_flops, training_flops
from align.data.batching import plan_step
from align.data.chat_encoder import ChatEncoder
from align.data.reading import read
from align.data.token_groups import TokenSequence
from align.errors import InputError
from align.models.lm_head.logprobs import KEPT_CPU
from align.models.loading.pretrained import silence_transformers
from align.models.policy import load_policy, save_policy
from align.models.settings import PolicySettings
from align.records import Comparison, Record, Response
from tests.benchmarks.sides import PRODUCT_SIDE, SIDES, Row, StepReport, Task

GIB = 2**30

# Children of a small server: after a fork and exec of this process a child's peak would begin with this one's.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.benchmarks.sides"])  # imported once for all of them


def main() -> None:
    """Run both sides and print what was measured."""
    options = arguments().parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL reports its use to the hub otherwise
    with TemporaryDirectory() as model:
        with ProcessPoolExecutor(1, mp_context=CONTEXT) as other_process:  # which takes its memory with it
            other_process.submit(write_plain, options.model, Path(model)).result()
        task = Task(
            model=model,
            rows=choose_rows(options, AutoTokenizer.from_pretrained(model)),
            prompts_per_step=options.prompts_per_step,
            num_steps=options.steps or options.rows // options.prompts_per_step,
            precision=options.precision,
            token_budget=options.token_budget,
            learning_rate=options.learning_rate,
            threads=options.threads,
            device=options.device,
        )
        report(measure(task, take_turns(task, options.blocks)))


def write_plain(path: str, folder: Path) -> None:
    """Write the model as a folder that both sides load alike: the peer reads no GGUF file and may leave dropout on."""
    silence_transformers()
    save_policy(*load_policy(PolicySettings(path=path)), folder)


def arguments() -> argparse.ArgumentParser:
    """The options of the usage above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", choices=("pairs", "all"), default="pairs")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    numbers = {"rows": 32, "prompts-per-step": 8, "responses": 4, "max-prompt-length": 512, "token-budget": 2048}
    for name, default in {**numbers, "threads": 2, "blocks": 0, "steps": None, "max-length": None}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def choose_rows(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[Row, ...]:
    """The first rows that both sides can train alike, as many as asked for; says what was left out, and why."""
    encoder = ChatEncoder(tokenizer, max_length=options.max_length, max_prompt_length=options.max_prompt_length)
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    num_responses = 2 if options.pairs == "pairs" else options.responses
    for number, record in enumerate(read(options.data, on_error="skip").records):
        ranked = best_first(record, num_responses)
        tokens = encoder.encode(ranked, number) if ranked is not None else None
        if ranked is None:
            left_out[f"without {num_responses} responses of different rewards"] += 1
        elif tokens is None:
            left_out["too long"] += 1
        else:
            row = Row(tokens, *as_text(tokenizer, ranked))
            if same_tokens(tokenizer, row):
                rows.append(row)
            else:
                left_out["other tokens as plain text"] += 1
        if len(rows) == options.rows:
            break
    print(f"{len(rows)} prompts of {num_responses} responses; left out: {dict(left_out) or 'none'}")
    if len(rows) < options.rows or options.rows % options.prompts_per_step:
        wanted = f"--rows {options.rows} in whole steps of {options.prompts_per_step}"
        raise SystemExit(f"{wanted}: there are {len(rows)} rows")
    return tuple(rows)


def best_first(record: Record, num_responses: int) -> Comparison | None:
    """The first responses of a comparison in descending order; None if they are too few or tied."""
    if not isinstance(record, Comparison) or len(record.responses) < num_responses:
        return None

    def standing(index: int) -> tuple[bool, float]:
        return index == record.chosen, record.responses[index].reward or 0.0

    order = sorted(range(num_responses), key=standing, reverse=True)
    if len(set(map(standing, order))) < num_responses:
        return None
    responses = tuple(record.responses[index] for index in order)
    return replace(record, responses=responses, chosen=0 if order[0] == record.chosen else None)


def as_text(tokenizer: PreTrainedTokenizerBase, comparison: Comparison) -> tuple[str, tuple[str, ...]]:
    """The rendered prompt, and each response to its end of turn, which is EOS in TRL's text form."""
    chat = [{"role": message.role, "content": message.content} for message in comparison.prompt]
    eos = str(tokenizer.eos_token)

    def render(said: Sequence[Response], *, generation_prompt: bool = False) -> str:
        messages = [*chat, *({"role": "assistant", "content": response.content} for response in said)]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))

    prompt = render([], generation_prompt=True)
    whole = [render([response]) for response in comparison.responses]
    assert all(text.startswith(prompt) for text in whole)  # the encoder refuses other templates
    said = [text[len(prompt) :] for text in whole]
    return prompt, tuple(text[: text.rfind(eos)] + eos if eos in text else text + eos for text in said)


def same_tokens(tokenizer: PreTrainedTokenizerBase, row: Row) -> bool:
    """Whether the text becomes the group's own tokens, divided at the same place."""
    prompt = tokenizer(row.prompt)["input_ids"]
    return all(
        tokenizer(row.prompt + response)["input_ids"] == sequence.ids.tolist()
        and sequence.ids[: sequence.loss_mask.argmax()].tolist() == prompt
        for response, sequence in zip(row.responses, row.tokens.sequences, strict=True)
    )


class Side:
    """One of the two in a process of its own, which computes only while `step` waits for it."""

    def __init__(self, name: str, task: Task) -> None:
        self.name = name
        self._channel, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=SIDES[name], args=(task, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def step(self) -> StepReport:
        """One optimizer step."""
        self._channel.send("go")
        return self._receive()

    def close(self) -> None:
        """Wait for the end of the process after its last step."""
        self._process.join()

    def _receive(self) -> Any:  # noqa: ANN401 - whatever the process sends
        try:
            return self._channel.recv()
        except EOFError as error:
            raise SystemExit(f"the side of {self.name} ended early; its error is above, or memory ran out") from error


def take_turns(task: Task, blocks: int) -> dict[str, list[StepReport]]:
    """The steps of both sides, in order; prints each."""
    reports: dict[str, list[StepReport]] = {name: [] for name in SIDES}

    def step(side: Side) -> None:
        number = len(reports[side.name]) % task.num_steps + 1
        done = side.step()
        reports[side.name].append(done)
        print(f"{side.name:5} step {number}: {done.seconds:.3f} s, loss {done.loss:.7f}", flush=True)

    for names in [tuple(SIDES)] if blocks == 0 else [(name,) for name in SIDES] * blocks:
        sides = [Side(name, task) for name in names]
        for _ in range(task.num_steps):
            for side in sides:
                step(side)
        for side in sides:
            side.close()
    return reports


def distinct(sequences: Iterable[TokenSequence]) -> Work:
    """The work of the distinct (prefix, token) pairs, found one by one; a token attends to its whole path."""
    node_of: dict[tuple[int, int], int] = {}
    attended, targets = 0, 0
    for sequence in sequences:
        node = 0
        for depth, token in enumerate(sequence.ids.tolist(), start=1):
            attended += depth if (node, token) not in node_of else 0
            node = node_of.setdefault((node, token), len(node_of) + 1)
        targets += int(sequence.loss_mask.sum())
    return Work(len(node_of), attended, targets)


def step_work(task: Task, step: int) -> list[Work]:
    """What align's micro-batches of an optimizer step have to compute."""
    groups = [row.tokens.sequences for row in task.rows]
    sizes = [distinct(group).tokens for group in groups]
    plan = plan_step(task.indices(step), sizes, token_budget=task.token_budget)
    return [distinct(each for index in micro for each in groups[index]) for micro in plan.ranks[0]]


def measure(task: Task, reports: dict[str, list[StepReport]]) -> dict[str, Any]:
    """The figures of the comparison by name."""
    ours, theirs = reports["align"], reports["trl"]
    found: dict[str, Any] = {
        "speedup": statistics.median(b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)),
        "speedup_of_sums": sum(one.seconds for one in theirs) / sum(one.seconds for one in ours),
        "memory_ratio": max(one.peak_bytes for one in ours) / max(one.peak_bytes for one in theirs),
        "max_loss_difference": max(abs(a.loss - b.loss) for a, b in zip(ours, theirs, strict=True)),
    }
    for name, side in reports.items():
        found[f"tokens_{name}"] = sum(one.tokens for one in side)
        found[f"seconds_{name}"] = [one.seconds for one in side]
        found[f"losses_{name}"] = [one.loss for one in side]
        found[f"peak_bytes_{name}"] = max(one.peak_bytes for one in side)
    model = decoder_from_config(AutoConfig.from_pretrained(task.model).to_dict())
    works = [work for step in range(task.num_steps) for work in step_work(task, step)] * (len(ours) // task.num_steps)
    useful = sum(training_flops(model, work) for work in works)
    kept = KEPT_CPU // model.vocab if task.device == "cpu" else 0  # targets that the head computes once
    again = sum(forward_flops(model, Work(0, 0, max(0, work.targets - kept))) for work in works)
    side = PRODUCT_SIDE[task.device]
    rate = 2 * side**3 / statistics.median(time_s for one in ours for time_s in one.products_s)
    possible = rate * sum(found["seconds_align"])
    return found | {
        "tokens_distinct": sum(work.tokens for work in works),
        "flop_share": useful / possible,
        "flop_share_with_recomputation": (useful + again) / possible,
        "product_side": side,
        "product_gflops_per_s": rate / 1e9,
        "device": task.device,
        "precision": task.precision,
        "threads": task.threads,
    }


def report(found: dict[str, Any]) -> None:
    """Print the figures; the last line is one JSON object."""
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl")))
    for name in SIDES:
        side = found[f"seconds_{name}"]
        print(
            f"{name:5} {found[f'tokens_{name}']:>9,} tokens through the model; seconds a step: median "
            f"{statistics.median(side):.3f}, min {min(side):.3f}, max {max(side):.3f}; "
            f"peak memory {found[f'peak_bytes_{name}'] / GIB:.2f} GiB"
        )
    print(f"distinct (prefix, token) pairs of the micro-batches, counted one by one: {found['tokens_distinct']:,}")
    print(f"largest difference of a step's loss: {found['max_loss_difference']:.2g}")
    print(
        f"model FLOPs: {found['flop_share']:.1%} of the rate of a {found['product_side']}^3 product, "
        f"{found['product_gflops_per_s']:.0f} GFLOP/s; {found['flop_share_with_recomputation']:.1%} "
        "with what the head computes again"
    )
    print(
        f"align is {found['speedup']:.2f} times as fast by the median of the steps' ratios, "
        f"{found['speedup_of_sums']:.2f} by the sums of seconds, with {found['memory_ratio']:.3f} of the memory"
    )
    print(json.dumps(found))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        raise SystemExit(f"against_trl: {error}") from error
