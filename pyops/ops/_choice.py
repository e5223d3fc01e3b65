"""Which backend a call takes, and the memory of calls that were checked before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import backends
from . import _arguments as arguments
from ._registration import needs_plain_torch


def choose(
    op: str,
    device: torch.device,
    backend: str | None,
    refusal: Callable[[str], str | None],
    passed_over: Callable[[str], bool] = lambda name: False,
) -> str | None:
    """The backend asked for, or the first that automatic choice tries and that takes the call; None: plain torch.

    `refusal(name)` says why a backend cannot take this call at all, or None; automatic choice also leaves out
    what is `passed_over(name)`, as slower here than plain torch. RuntimeError: `backend` cannot take the call.
    """
    if backend is not None:
        arguments.one_of("backend", backend, backends.NAMES)
        reason = backends.why_not(op, backend, device.type) or refusal(backend)
        if reason is not None:
            raise RuntimeError(f"backend: {backend} cannot take this call: {reason}")
        return backend
    order, _ = backends.automatic(op, device)
    for name in order:
        if name != "reference" and not passed_over(name) and refusal(name) is None:
            return name
    return None


def settle(use: str, backend: str | None) -> str:
    """`use`, but the reference inside a transform of torch.func whose derivatives only plain torch has.

    RuntimeError: `backend` was asked for and has none.
    """
    if use == "reference" or not needs_plain_torch():
        return use
    if backend is not None:
        raise RuntimeError(
            f"backend: {backend} has no forward-mode or torch.func derivatives; use backend=None"
        )
    return "reference"


class Plans(dict[Any, Any]):
    """Checked calls by everything that their checks depend on; of bounded size."""

    _MOST = 4096

    def find(self, key: tuple[Any, ...], options: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The plan remembered for `key` and the types of `options` (True == 1 == 1.0), else `make()`'s."""
        key = (key, *map(type, options))
        try:
            return self[key]
        except (KeyError, TypeError):  # a new combination; or symbolic sizes and lists: no hash
            plan = make()
        try:
            hash(key)
        except TypeError:
            return plan
        if len(self) >= self._MOST:
            self.clear()
        self[key] = plan
        return plan
