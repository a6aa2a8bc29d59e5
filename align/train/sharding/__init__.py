"""How a training step uses its processes and devices: accelerator, optimizer, and replicated or sharded models."""
