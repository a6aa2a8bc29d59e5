"""Policies and reward models: settings, loading, adapters, the tree forward and token log-probabilities."""

import logging

# peft imports bitsandbytes where it is installed, which on a CPU suggests kernels that are not used here
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# accelerate imports DeepSpeed where it is installed, which reports a missing GPU on stdout and sets its logger's level
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
