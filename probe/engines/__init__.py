"""Engines: who else may make the shards of a plan. `worker` is what they run, `ray` schedules it on a cluster."""
