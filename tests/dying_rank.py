"""`q3n`, of which one rank is killed once: DIE in the environment is RANK:MODULE.FUNCTION:CALL."""

import importlib
import os
import signal
import sys

from q3n_functional import cli
from q3n_functional.parallel import launch


def _die(rank: str, name: str, call: str) -> None:
    module, _, function = name.rpartition(".")
    owner, calls = importlib.import_module(f"q3n_functional.{module}"), []
    original = getattr(owner, function)

    def dying(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == int(call):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    if launch.world().rank == int(rank) and not launch.restarted():
        setattr(owner, function, dying)


if __name__ == "__main__":
    if die := os.environ.get("DIE"):
        _die(*die.split(":"))
    cli.main(sys.argv[1:])
