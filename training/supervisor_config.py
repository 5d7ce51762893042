"""How a run is supervised: the settings of `training.supervisor` and its parts."""

from __future__ import annotations

import dataclasses

from training.launchers import Launcher


@dataclasses.dataclass(frozen=True)
class SupervisorConfig:
    """How a run is supervised.

    hosts: names, in the order of process numbers; those beyond the largest size are spare.
    sizes: numbers of hosts that the mesh can take, best first; empty is all of them.
    launcher: how a command gets onto a host.
    health: flags of the health check; None makes none.
    check_first: check before the first attempt, and not only after a failure.
    links: check the links between hosts too, once they are sound by themselves.
    heartbeat_seconds: between two signs of life of a worker.
    timeout_seconds: without one, after which a worker counts as hung; ten times as long while it
        starts or compiles. A step has the limit of `faults.watchdog_seconds`.
    health_seconds: that a health check may take.
    max_restarts: restarts in a row that bring no new checkpoint, before giving up.
    backoff_seconds: before the first restart of such a row; doubled for each, up to a minute.
    port: of the coordinator, on the first host; each attempt takes the next of ten.
    """

    hosts: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    launcher: Launcher = Launcher()
    health: tuple[str, ...] | None = ()
    check_first: bool = True
    links: bool = False
    heartbeat_seconds: float = 1.0
    timeout_seconds: float = 30.0
    health_seconds: float = 120.0
    max_restarts: int = 5
    backoff_seconds: float = 1.0
    port: int = 8476

    def __post_init__(self) -> None:
        if not self.hosts or len(set(self.hosts)) < len(self.hosts):
            raise ValueError(f"hosts={','.join(self.hosts)}: name each host once, at least one")
        for size in self.sizes:
            if not 1 <= size <= len(self.hosts):
                raise ValueError(f"size {size} is not between 1 and the {len(self.hosts)} hosts")
        for name in ("heartbeat_seconds", "timeout_seconds", "health_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.timeout_seconds < 3 * self.heartbeat_seconds:
            raise ValueError(
                f"timeout_seconds={self.timeout_seconds} must be at least three times "
                f"heartbeat_seconds={self.heartbeat_seconds}"
            )
