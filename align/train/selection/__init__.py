"""Online selection of the groups to train on: scores, the sampler, and the journal of what was chosen."""
