"""What each rank runs whose parameters are sent for ahead: steps held to one device's, and what is in memory when."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import torch

from q3n_functional import compiled, model
from tests import parallel_ranks
from tests.parallel_ranks import Case


def error(backend: str, case: Case) -> float:
    """This rank's largest error in three steps, every kind of layer compiled once; eager where no backend is named."""
    parallel_ranks.expected(case)  # on one device, with the loss as it is
    torch._dynamo.reset()
    options: dict[str, Any] = {"backend": backend} if backend else {}
    loss = compiled.compiled(model.loss, "layers" if backend else "none", ahead=True, **options)
    with patch.object(model, "loss", loss), torch._dynamo.config.patch(error_on_recompile=True):
        return parallel_ranks.error(case)


if __name__ == "__main__":
    parallel_ranks.main(*sys.argv[1:], error=lambda values: error(values[0], Case(*values[1:])))
