"""What a user runs: the flow `train`, its tasks, the only poll loop, and the `trainyard` command."""
