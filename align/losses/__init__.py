"""Pure loss functions of log-probabilities, rewards and labels. They never see a model or a batch."""
