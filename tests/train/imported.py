"""What the processes of a launch import, imported before they are forked."""

import importlib.util

for name in (
    "deepspeed.launcher.runner",  # not installed everywhere
    "accelerate.commands.launch",
    "torch.distributed.run",
    "torch.distributed.elastic.rendezvous.static_tcp_rendezvous",
    "torch._functorch.aot_autograd",
    "torch._inductor.compile_fx",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload",
    "peft",
    "transformers.models.llama.modeling_llama",
    "align.cli",
    "align.commands.run",
    "align.stages.training.policy_training",
):
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)
