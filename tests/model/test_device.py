"""The device and the threads of a process."""

import pytest
import torch

from lib.model.device import use
from lib.pipeline.errors import WorkbenchError


def test_a_device_that_is_not_there_is_named_with_the_way_out():
    threads = torch.get_num_threads()
    try:
        assert (
            use({"threads": 1, "device": "cpu"}) == torch.device("cpu")
            and torch.get_num_threads() == 1
        )
        if not torch.cuda.is_available():
            assert use({"threads": 1, "device": "auto"}) == torch.device("cpu")
            with pytest.raises(
                WorkbenchError, match="no CUDA device here; set compute.device to auto or cpu"
            ):
                use({"threads": 1, "device": "cuda"})
    finally:
        torch.set_num_threads(threads)
