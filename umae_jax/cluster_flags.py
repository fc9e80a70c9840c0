"""Flags of the commands that can run as several processes. Does not import JAX."""

from absl import flags


class ClusterFlags:
    """Addresses and timeouts of the processes; see `multihost.initialize`."""

    def __init__(self) -> None:
        integer = flags.DEFINE_integer
        self.coordinator_address = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
        self.num_processes = integer("num_processes", None, "Number of processes; 1 ignores any cluster.", 1)
        self.process_id = integer("process_id", None, "Index of this process, from 0.", 0)
        self.initialization_timeout = integer("initialization_timeout", 300, "Seconds to wait for all processes.", 1)
        self.heartbeat_timeout = integer("heartbeat_timeout", 100, "Seconds without heartbeat; then the run ends.", 1)
