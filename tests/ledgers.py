"""What a step used, from which tests make ledgers."""

from align.accounting.ledger import Usage

TRAINED = Usage(
    tokens_trained=1000,
    tokens_computed=700,
    flops=6e12,
    flops_source="formula",
    seconds=1800,
    devices=4,
    peak_flops=1e10,
    peak_memory_bytes=500,
    wire_bytes=80,
    weights=2000,
)
