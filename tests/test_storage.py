import pytest
import torch

from hf_turboquant.storage import TokenBuffer


def new_buffer(block=128):
    return TokenBuffer({"a": (torch.uint8, (block, 3)), "b": (torch.float32, (block,))}, block, 2, 3, "cpu")


def test_growth_copies_each_token_a_bounded_number_of_times():
    buffer, copied = new_buffer(), 0
    for length in range(1, 40_000):
        before = buffer.capacity
        buffer.reserve(length)
        copied += before if buffer.capacity != before else 0
        buffer.length = length
        assert buffer.capacity - length <= length / 16 + 256
    assert copied < 40 * 40_000


def test_growth_keeps_what_is_there():
    buffer = new_buffer(block=1)
    buffer.reserve(5)
    buffer["a"][:] = 7
    kept = buffer["a"].clone()
    buffer.reserve(100)
    assert torch.equal(buffer["a"][:, :, :5], kept)
    buffer.reserve(10)
    assert buffer.capacity >= 100


def test_limit_bounds_the_allocation():
    buffer = new_buffer(block=1)
    buffer.reserve(64, limit=65)
    assert 64 <= buffer.capacity <= 65


def test_a_snapshot_has_its_own_length_and_tensors():
    buffer = new_buffer()
    buffer.reserve(10)
    buffer.length = 10
    snapshot = buffer.snapshot()
    buffer.length = 11
    buffer.map(lambda tensor: tensor[:1])
    assert snapshot.length == 10 and snapshot["a"].shape[0] == 2 and buffer["a"].shape[0] == 1


def test_a_failed_map_changes_nothing():
    buffer = new_buffer()
    buffer.reserve(10)
    shapes = [tensor.shape for tensor in buffer.tensors.values()]

    def fail_on_floats(tensor):
        if tensor.is_floating_point():
            raise RuntimeError("out of memory")
        return tensor[:1]

    with pytest.raises(RuntimeError):
        buffer.map(fail_on_floats)
    assert [tensor.shape for tensor in buffer.tensors.values()] == shapes
