"""Ranks that are threads of this process, joined by the process group of threads that torch tests DTensor with."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded


def simulate(ranks: int, function: Callable[[], Any]) -> list[Any]:
    """What `function` returns on each of the ranks; where it raises on any, AssertionError with what all raised."""
    results, raised = [None] * ranks, [""] * ranks
    store = dist.HashStore()

    def work(rank: int) -> None:
        # Never destroyed: it ends with the thread, and torch 2.11 cannot.
        dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
        try:
            results[rank] = function()
        except BaseException as error:
            raised[rank] = traceback.format_exc()
            threaded.ProcessLocalGroup.exception_handle(error)  # wakes those who wait for this one

    # By default a group's name means one group for all threads.
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        threads = [Thread(target=work, args=(rank,), daemon=True) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    assert not any(raised), "\n".join(filter(None, raised))
    return results
