"""The variables of the environment by which processes tell where they come from."""

RUN = "BGHOST_RUN_ID"
"""The run of the host that a process comes from, at whatever remove."""

OWNER = "BGHOST_WORKER_PID"
"""The pid of the worker that a program comes from."""
