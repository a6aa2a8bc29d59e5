"""The policy, its tree forward and its log-probabilities."""

import logging

# peft imports bitsandbytes wherever that is installed, and on a CPU it advises kernels that no training here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# accelerate imports DeepSpeed wherever that is installed, which then says on stdout, where results go, that there is no
# GPU; it sets its logger's level by itself.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
