"""The cost of training: by formula (FLOPs, communication, memory), by meter (energy), and recorded in a ledger."""
