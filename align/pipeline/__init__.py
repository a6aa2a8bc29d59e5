"""Run steps in dependency order: skip finished ones, resume interrupted ones, rerun changed ones.

Knows nothing about machine learning. Each step fills one folder, whose manifest holds a fingerprint of the step's
settings and inputs.
"""

from align.pipeline.cleanup import Cleanup
from align.pipeline.copying import copied
from align.pipeline.lock import LOCK_FILE, locked
from align.pipeline.planning import FINISHED, INTERRUPTED, RUNNING, WAITING, PlannedStep, plan
from align.pipeline.runner import Execute, run
from align.pipeline.steps import MAX_NAME, Step, check_name, dependents, fingerprints, order

__all__ = [
    "FINISHED",
    "INTERRUPTED",
    "LOCK_FILE",
    "MAX_NAME",
    "RUNNING",
    "WAITING",
    "Cleanup",
    "Execute",
    "PlannedStep",
    "Step",
    "check_name",
    "copied",
    "dependents",
    "fingerprints",
    "locked",
    "order",
    "plan",
    "run",
]
