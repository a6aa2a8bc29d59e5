"""A user's own optimizer and callbacks, named in tests by dotted path."""

import torch

CALLS = []


class Signs(torch.optim.Optimizer):
    """Sign descent with momentum (Lion), whose state is a tensor, an int and a float."""

    def __init__(self, params, lr, *, momentum=0.9, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is None:
                    continue
                state = self.state[value]
                if not state:
                    state.update(average=torch.zeros_like(value), count=0, decay=1.0)
                state["count"] += 1
                state["decay"] *= 0.99
                state["average"].lerp_(value.grad, 1 - group["momentum"])
                value.mul_(1 - group["lr"] * group["weight_decay"])
                value.add_(state["average"].sign(), alpha=-group["lr"] * state["decay"] / state["count"])


def no_optimizer(params, lr):
    return "none"


def record(event):
    """Remember what the callback was told."""
    CALLS.append((event.kind, event.step, event.num_steps, "held_out/loss" in event.metrics, event.is_main))


def stop_at_two(event):
    return event.kind == "step" and event.step == 2


def fail(event):
    raise KeyError("missing")
