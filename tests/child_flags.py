"""What a test's child process is told about its devices."""

import os


def cpu_devices(count: int) -> str:
    """This process's XLA_FLAGS with another number of CPU devices: of two flags the last counts."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
