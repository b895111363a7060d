"""The device and threads of a process; a batch goes to a GPU filled up and with what is known."""

from types import SimpleNamespace

import pytest
import torch

from lib import kernels
from lib.kernels import support
from lib.model import device, tokens
from lib.model.device import use
from lib.pipeline.errors import WorkbenchError


@pytest.mark.parametrize(
    "length, longest, width", [(3, 512, 64), (64, 512, 64), (65, 512, 128), (65, 100, 100)]
)
def test_a_batch_is_filled_up_for_a_gpu(length, longest, width):
    ids, mask = torch.randint(5, 90, (2, length)), torch.ones(2, length).long()
    config = SimpleNamespace(max_position_embeddings=longest, mask_padding=True)
    packed = device.aligned((ids, mask), (7, 0), config)
    assert packed.shape == (2, 2, width) and packed.dtype == torch.int32
    assert torch.equal(packed[0, :, :length], ids.int())
    assert bool((packed[0, :, length:] == 7).all())
    assert packed[1].sum(dim=1).tolist() == [length, length]


def test_a_batch_stays_as_it_is_if_padding_changes_results(tiny):
    ids = torch.randint(5, 40, (2, 9))
    config = SimpleNamespace(max_position_embeddings=512, mask_padding=False)
    assert device.aligned((ids,), (0,), config).shape == (1, 2, 9)
    assert device.to_device(ids, ids, 0, tiny())[0] is ids  # on a CPU


@pytest.mark.parametrize(
    "place, masks, expected", [("cpu", True, 70), ("meta", True, 80), ("meta", False, 70)]
)
def test_the_padded_length_is_that_of_the_rows_on_the_device(tiny, place, masks, expected):
    model = tiny(max_position_embeddings=80, mask_padding=masks).to(place)
    assert device.padded_length(70, model) == expected
    ids = torch.ones(2, 70).long()
    assert device.to_device(ids, ids, 0, model)[0].shape == (2, expected)


def test_a_batch_on_another_device_brings_its_numbers_of_tokens(tiny):
    ids, mask = tokens.pad([[2, 9, 8, 7, 3], [2, 9, 3]], 0)
    ids, there = device.to_device(ids, mask, 0, tiny(max_position_embeddings=80).to("meta"))
    assert ids.is_meta and ids.shape == there.shape == (2, 64)
    assert kernels.kept_tokens(there).shape == (2,) and kernels.kept_tokens(mask) is None


def test_kept_numbers_of_tokens_are_those_of_the_mask_until_it_changes(tiny):
    model = tiny()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    kernels.keep_tokens(mask, torch.tensor([7, 8]))  # other numbers, to see that they are used
    assert support.real_tokens(model.model.padding_mask(mask)).tolist() == [7, 8]
    mask[0, 2] = 1
    assert kernels.kept_tokens(mask) is None and model.model.padding_mask(mask) is None
    mask[0, 1] = 0
    assert support.real_tokens(model.model.padding_mask(mask)) is None  # a hole


def test_a_filled_batch_has_the_same_embeddings(tiny):
    model = tiny(max_position_embeddings=80)
    ids, mask = tokens.pad([[2, 9, 8, 7, 3], [2, 9, 3]], 0)
    wide, more = device.aligned((ids, mask), (0, 0), model.config).long()
    assert wide.shape == (2, 64)
    with torch.no_grad():
        found, expected = (model(*given).pooler_output for given in ((wide, more), (ids, mask)))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_the_kind_of_a_machine_names_what_decides_the_last_bits():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        name, unit, one = device.kind(torch.device("cpu")).rsplit(", ", 2)
        torch.set_num_threads(2)
        assert device.kind(torch.device("cpu")) == f"{name}, {unit}, 2 threads"
    finally:
        torch.set_num_threads(threads)
    assert name and unit == torch.backends.cpu.get_cpu_capability() and one == "1 thread"


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
