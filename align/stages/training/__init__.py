"""What the stages that train share: their settings, rows, models, memory and result."""
