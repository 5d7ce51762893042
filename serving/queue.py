"""Who waits, and in which order they are to be admitted."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from typing import Literal, get_args

from serving.request import Request, State

Policy = Literal["fcfs", "priority", "lpm"]
POLICIES: tuple[str, ...] = get_args(Policy)
MOST_TO_COMPARE = 128
"""With more requests waiting, `lpm` is `fcfs`: comparing prefixes of all would cost too much."""


def rank(request: Request) -> tuple[int, float]:
    """The order under the priority policy: the lower first."""
    return request.params.priority, request.arrival


class WaitingQueue:
    """Waiting requests: first come first served, by priority, or longest cached prefix first.

    Preempted requests go to the head, under the priority policy to where they belong.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """A new request."""
        if self._policy == "priority":
            bisect.insort_right(self._requests, request, key=rank)
        else:
            self._requests.append(request)

    def put_back(self, request: Request) -> None:
        """A preempted request."""
        if self._policy == "priority":
            bisect.insort_left(self._requests, request, key=rank)
        else:
            self._requests.insert(0, request)

    def remove(self, request: Request) -> None:
        """Take a request out."""
        self._requests.remove(request)

    def in_order(self, cached_tokens: Callable[[Request], int]) -> list[Request]:
        """All requests that may be admitted, the first first; those whose grammar is still being
        compiled are left out and keep their place.
        """
        ready = [r for r in self._requests if r.state is not State.WAITING_GRAMMAR]
        if self._policy != "lpm" or len(ready) > MOST_TO_COMPARE:
            return ready
        preempted = [request for request in ready if request.state is State.PREEMPTED]
        new = [request for request in ready if request.state is not State.PREEMPTED]
        return preempted + sorted(new, key=cached_tokens, reverse=True)
