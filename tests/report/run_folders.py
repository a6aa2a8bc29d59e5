"""Create run folders without training."""

import json
import math
import random

STEPS = {
    "base": {"stage": "import"},
    "code_sft": {"stage": "sft", "data": "code", "train": {"learning_rate": 3e-3}},
    "sft": {"stage": "sft", "policy": "code_sft", "data": "demonstrations", "train": {"learning_rate": 1e-3}},
    "rate": {"stage": "reward_model", "policy": "base", "data": "rated", "loss": "regression"},
    "dpo": {"stage": "preference", "policy": "sft", "data": "pairs", "loss": {"name": "dpo", "sft_weight": 1e-5}},
    "answers1": {"stage": "generate", "policy": "dpo", "data": "prompts"},
    "rpo1": {"stage": "preference", "policy": "dpo", "data": "answers1", "loss": {"name": "rpo_bwd_kl"}},
    "answers2": {"stage": "generate", "policy": "rpo1", "data": "prompts"},
    "rpo2": {"stage": "preference", "policy": "rpo1", "data": "answers2", "loss": {"name": "rpo_bwd_kl"}},
}
POLICIES = ["base", "sft", "dpo", "rpo1", "rpo2"]
STEPS |= {f"evaluate-{name}": {"stage": "evaluate", "policies": [name], "tasks": {}} for name in POLICIES}
PASSES = {"base": 0.02, "sft": 0.35, "dpo": 0.55, "rpo1": 0.68, "rpo2": 0.74}
NUM_PROMPTS = 60
LEDGER = {
    "tokens_trained": 1234567,
    "tokens_computed": 987654,
    "flops": 3.21e15,
    "seconds": 754.2,
    "mfu": 0.412,
    "peak_flops": 1e12,
    "peak_memory_bytes": 3 * 2**30,
    "energy_kwh": 0.0125,
    "energy_source": "counters of the processor (RAPL)",
    "energy_measured": True,
    "flops_source": "2 a weight and token",
    "co2_kg": 0.0048,
    "cost": None,
    "wire_bytes": 0,
    "weights": 1000000,
    "cost_per_weight": None,
    "devices": 1,
}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def metrics(stage, num_steps=60, *, seed=0):
    """Yield metrics as the training loop logs them."""
    draw = random.Random(seed)
    for step in range(1, num_steps + 1):
        far = step / num_steps
        noise = draw.gauss(0, 0.05)
        line = {
            "step": step,
            "loss": 1.0 + 2 * math.exp(-4 * far) + noise,
            "grad_norm": 1 + abs(noise) * 5,
            "lr": 1e-3 * (1 - far),
            "tokens_trained": 1000,
            "tokens_computed": 800,
            "seconds": 0.5,
            "peak_memory_bytes": 2**30,
        }
        if stage == "preference":
            line |= {
                "loss/preference": 0.69 * (1 - far),
                "loss/sft": 0.3 + noise / 10,
                "rewards/chosen": 0.2 * far + noise,
                "rewards/rejected": -1.5 * far + noise,
                "rewards/margins": 1.7 * far,
                "rewards/accuracies": min(1.0, 0.5 + far / 2),
                "logps/chosen": -12 + far,
                "logps/rejected": -13 - 7 * far,
            }
        if step % 20 == 0:
            line["held_out/loss"] = 1.1 + 2 * math.exp(-4 * far)
        if step % 20 == 0 and stage == "preference":
            line |= {"held_out/rewards/margins": 1.5 * far, "held_out/rewards/accuracies": 0.9}
        yield line


def trained(folder, name, settings, *, ledger):
    lines = list(metrics(settings["stage"], seed=len(name)))
    write_lines(folder / name / "metrics.jsonl", lines)
    rows = {"rows": 6000, "records": 5990, "trained": 5301, "held_out": 589, "dropped:overlong": 93, "dropped:empty": 7}
    report = {}
    if settings["stage"] == "reward_model":
        gain = {"value": 0.2, "low": 0.1, "high": 0.3}
        report = {
            "attributes": [
                {"attribute": "helpfulness", "mse": 0.81, "mse_of_mean": 1.02, "gain": gain, "pearson": 0.46, "n": 589}
            ],
            "pairs": {
                "all": {"value": 0.713, "low": 0.66, "high": 0.76, "pairs": 320, "n": 300},
                "by_margin": [{"margin": [0, 1], "value": 0.6, "low": 0.5, "high": 0.7, "pairs": 100, "n": 90}],
                "by_subset": [],
            },
        }
    manifest = {
        "rows": rows | {"cut:prompt from the left": 41},
        "optimizer_steps": len(lines),
        "first": lines[0],
        "last": lines[-1],
        "kept": lines[-1],
        "ledger": ledger,
        **({"report": report} if report else {}),
    }
    return manifest


def generated(folder, name, *, mean, prompt, response):
    draw = random.Random(name)
    rewards, lines = [], []
    for number in range(50):
        found = [round(draw.gauss(mean, 0.6), 3) for _ in range(4)]
        rewards += found
        lines.append(
            {
                "prompt": [{"role": "user", "content": f"{prompt} {number}"}],
                "responses": [
                    {"content": f"{response} {number}.{place}", "reward": reward, "attributes": {}}
                    for place, reward in enumerate(sorted(found, reverse=True))
                ],
                "chosen": None,
                "metadata": {},
            }
        )
    write_lines(folder / name / "groups.jsonl", lines)
    report = {
        "counts": {"prompts": 50, "responses": 200, "responses:left out, empty": 3},
        "reward_mean": sum(rewards) / len(rewards),
        "reward_deviation": 0.6,
        "gap_mean": 1.2,
        "longer_wins": 0.53,
        "length_correlation": 0.04,
    }
    return {"report": report, "ledger": LEDGER | {"tokens_trained": None, "mfu": None}}


def outcomes(policy, passes):
    """Return whether the policy passes each prompt; a better policy fails some prompts that a worse one passes."""
    draw = random.Random(policy)
    return [draw.random() < passes[policy] for _ in range(NUM_PROMPTS)]


def evaluated(folder, name, policies, *, passes, prompt, response):
    lines = []
    for policy in policies:
        for number, passed in enumerate(outcomes(policy, passes)):
            text = f"{response} {policy} says {'dog, cat, cow' if passed else 'a dog and'} to {number}"
            parts = {"correct": [float(passed), 1]}
            lines.append({"policy": policy, "prompt": f"{prompt} ({number})", "response": text, "parts": parts})
    write_lines(folder / name / "general.jsonl", lines)
    write_lines(folder / name / "nll.jsonl", [{"policy": policies[0], "row": 0, "parts": {"nll": [31.5, 12]}}])
    measured = {
        "repetition": {"value": 0.05, "low": 0.0, "high": 0.1, "n": NUM_PROMPTS},
        "length": {"value": 123.4, "low": 110.0, "high": 130.0, "n": NUM_PROMPTS},
    }
    return {"scores": {policy: row(policy, passes) for policy in policies}, "measures": {"general": measured}}


def row(policy, passes):
    rate, nll = sum(outcomes(policy, passes)) / NUM_PROMPTS, 3.2 - 2 * passes[policy]
    return {
        "general": {"value": rate, "low": max(0, rate - 0.05), "high": min(1, rate + 0.05), "n": NUM_PROMPTS},
        "nll": {"value": nll, "low": nll - 0.03, "high": nll + 0.03, "n": 200},
        "ifeval prompt_strict": {"value": rate / 2, "low": rate / 2.5, "high": rate / 1.6, "n": 541},
    }


def changes(passes):
    found = {}
    for before, after in zip(POLICIES, POLICIES[1:], strict=False):
        one, two = row(before, passes), row(after, passes)
        found[after] = {}
        for task in two:
            moved = two[task]["value"] - one[task]["value"]
            wide = 0.08 if task == "general" else 0.02
            found[after][task] = {
                "value": moved, "low": moved - wide, "high": moved + wide, "n": two[task]["n"], "from": before
            }  # fmt: skip
    return found


def make_run(  # noqa: PLR0913 - what tests vary
    folder,
    *,
    run="nightly",
    done=tuple(STEPS),
    prompt="Name three animals, in small letters.\nSeparate them by commas.",
    response="Well:",
    passes=PASSES,
    **changed,
):
    """Create a run folder in which the steps of `done` are finished; `changed` are settings of the recipe."""
    inputs = {"base": [], "rate": ["base"], "dpo": ["sft"]} | {f"evaluate-{name}": [name] for name in POLICIES}
    names, ledgers = list(STEPS), {}
    for place, (name, settings) in enumerate(STEPS.items()):
        if name not in done:
            continue
        if settings["stage"] in ("sft", "preference", "reward_model"):
            manifest = trained(folder, name, settings, ledger=LEDGER | {"devices": 1 + place % 2})
        elif settings["stage"] == "generate":
            manifest = generated(folder, name, mean=0.5 + 0.1 * place, prompt=prompt, response=response)
        elif settings["stage"] == "evaluate":
            manifest = evaluated(folder, name, settings["policies"], passes=passes, prompt=prompt, response=response)
        else:
            manifest = {}
        if manifest.get("ledger"):
            ledgers[name] = manifest["ledger"]
        before = inputs.get(name, names[max(0, place - 1) : place])
        about = {"step": name, "stage": settings["stage"], "settings": settings, "seed": 0}
        versions = {"python": "3.11.7", "align": "0.1.0", "torch": "2.13.0"}
        write(folder / name / "manifest.json", {
            **about, "inputs": dict.fromkeys(before, "0f"), "versions": versions, **manifest
        })  # fmt: skip
    total = {"tokens_trained": sum(of["tokens_trained"] or 0 for of in ledgers.values()), "energy_kwh": 0.1}
    recipe = {"run": run, "seed": 7, "policy": {"path": "some/model"}, "data": {"pairs": {"path": "rows.jsonl"}}}
    write(folder / "recipe.json", {**recipe, "steps": STEPS, **changed})
    write(folder / "ledger.json", {"steps": ledgers, "total": total})
    if set(STEPS) == set(done):
        write(folder / "table.json", {policy: row(policy, passes) for policy in POLICIES})
        write(folder / "changes.json", changes(passes))
    return folder
