"""Procedural tasks, engines that sample, judges that rate, and the groups that both make."""
