"""The policy, its tree forward and its log-probabilities."""

import logging

# peft imports bitsandbytes wherever that is installed, and on a CPU it advises kernels that no training here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
