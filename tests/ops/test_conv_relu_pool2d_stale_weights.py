"""Whatever way a weight changes, the next result follows it: no packed copy of it may survive."""

from __future__ import annotations

import threading

import pytest
import torch
from conv_pool_cases import make_inputs, plain

import pyops
from pyops.nn import ConvReLUPool2d

# (in_channels, out_channels, kernel, options): one for each way the CPU kernels pack weights.
PATHS = {
    "few channels": (3, 32, 3, {"padding": 1}),
    "winograd": (64, 64, 3, {"padding": 1}),
    "winograd 5x5": (64, 64, 5, {"padding": 2}),
    "direct": (8, 16, 5, {"padding": 2}),
    "depthwise": (16, 16, 3, {"padding": 1, "groups": 16}),
    "scalar": (4, 5, 3, {"dilation": 2, "groups": 1}),
}
EACH_PATH = pytest.mark.parametrize("path", PATHS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def inputs_of(path, dtype=torch.float32):
    c, k, kernel, options = PATHS[path]
    shapes = (2, c, 16, 16), (k, c // options.get("groups", 1), kernel, kernel)
    return (*make_inputs(*shapes, dtype=dtype), options)


def assert_follows(x, w, b, options, previous=None):
    """The op's result is that of the weight as it is now, and no longer `previous`."""
    got = pyops.conv_relu_pool2d(x, w, b, backend="cpu", **options).detach()
    want = plain(x.double(), w.double(), b.double(), **options).detach()
    tolerance = 1e-4 if x.dtype == torch.float32 else 3e-2
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    if previous is not None:
        assert (got - previous).abs().max() > 0.2 * want.abs().max()
    return got


def write_in_place(w):
    w.mul_(-1)


def write_one_element_each(w):
    for k in range(w.shape[0]):
        w[k, 0, 0, 0] += 40.0


def write_data(w):
    w.data.mul_(-1)


def write_data_element(w):
    w.data[:, 0, 0, 0] += 40.0


def replace_data(w):
    w.data = -w.data


def write_through_numpy(w):
    w.detach().view(torch.int16 if w.element_size() == 2 else torch.int32).numpy().__imul__(0)


def write_through_a_view(w):
    w.view(-1)[:] = -w.view(-1)


def write_through_set(w):
    w.set_((-w).clone())


WRITES = [
    write_in_place,
    write_one_element_each,
    write_data,
    write_data_element,
    replace_data,
    write_through_numpy,
    write_through_a_view,
    write_through_set,
]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@DTYPES
@EACH_PATH
def test_writes(path, dtype, write):
    x, w, b, options = inputs_of(path, dtype)
    w = torch.nn.Parameter(w)
    first = assert_follows(x, w, b, options)
    assert_follows(x, w, b, options)
    with torch.no_grad():
        write(w)
    assert_follows(x, w, b, options, previous=first)


@EACH_PATH
def test_write_data_bumps_no_version(path):
    """Why the tests above matter: a cache by version counter would not see this write."""
    x, w, b, options = inputs_of(path)
    first = assert_follows(x, w, b, options)
    version = w._version
    w.data.neg_()
    assert w._version == version
    assert_follows(x, w, b, options, previous=first)
    w.data.neg_()
    assert torch.equal(assert_follows(x, w, b, options), first)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@EACH_PATH
def test_writes_between_inferences(path, mode):
    x, w, b, options = inputs_of(path)
    with mode():
        first = assert_follows(x, w, b, options)
        w.neg_()
        assert_follows(x, w, b, options, previous=first)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "fused Adam", "foreach SGD"])
@EACH_PATH
def test_optimizer_steps(path, optimizer):
    x, w, b, options = inputs_of(path)
    w, b = torch.nn.Parameter(w), torch.nn.Parameter(b)
    extra = {"fused Adam": {"fused": True}, "foreach SGD": {"foreach": True}}.get(optimizer, {})
    step_size = 10.0 if "SGD" in optimizer else 0.5
    optimizer = getattr(torch.optim, optimizer.split()[-1])([w, b], lr=step_size, **extra)
    previous = assert_follows(x, w, b, options)
    for _ in range(3):
        loss = pyops.conv_relu_pool2d(x, w, b, backend="cpu", **options).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        now = assert_follows(x, w, b, options)
        assert not torch.equal(now, previous)
        previous = now


@EACH_PATH
def test_gradients_use_the_weight_of_their_forward(path):
    """The gradient for the input follows the weight, too."""
    x, w, b, options = inputs_of(path)
    x.requires_grad_()

    def grads(f, **extra):
        return torch.autograd.grad(f(x, w, b, **options, **extra).sum(), x)[0]

    first = grads(pyops.conv_relu_pool2d, backend="cpu")
    w.data.mul_(-1)
    second = grads(pyops.conv_relu_pool2d, backend="cpu")
    torch.testing.assert_close(second, grads(plain), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(first, second, atol=1e-2)


@pytest.mark.parametrize("assign", [False, True])
@EACH_PATH
def test_load_state_dict(path, assign):
    c, k, kernel, options = PATHS[path]
    module = ConvReLUPool2d(c, k, kernel, backend="cpu", **options)
    other = torch.nn.Conv2d(c, k, kernel, **options)
    x = torch.randn(2, c, 16, 16)
    first = assert_follows(x, module.weight, module.bias, options)
    assert torch.equal(module(x), first)
    module.load_state_dict(other.state_dict(), assign=assign)
    now = assert_follows(x, other.weight, other.bias, options)
    assert torch.equal(module(x), now) and not torch.equal(now, first)


@EACH_PATH
def test_new_tensor_at_an_old_address(path):
    x, w, b, options = inputs_of(path)
    base = w.clone()
    seen, reused = set(), 0
    for factor in (1.0, -1.0, 0.5, -2.0) * 4:
        w = base * factor
        reused += w.data_ptr() in seen
        seen.add(w.data_ptr())
        assert_follows(x, w, b, options)
        del w
    # The allocator alone may not hand an address out again; this storage certainly does.
    storage = base.clone()
    for factor in (1.0, -1.0, 0.5):
        storage.copy_(base * factor)
        fresh = torch.empty(0).set_(storage.untyped_storage(), 0, base.shape, base.stride())
        assert fresh.data_ptr() == storage.data_ptr()
        assert_follows(x, fresh, b, options)


@EACH_PATH
def test_same_address_with_another_shape(path):
    x, w, b, options = inputs_of(path)
    assert_follows(x, w, b, options)
    k = w.shape[0]
    if options.get("groups", 1) == 1:
        assert_follows(x, w[: k // 2], b[: k // 2], options)
    assert_follows(x, w.flip(2), b, options)
    assert_follows(x, w.transpose(2, 3), b, options)
    assert_follows(x, w, b, options)


@EACH_PATH
def test_several_threads_with_weights_of_their_own(path):
    """Four threads call with one shape and different, changing weights."""
    x, w, b, options = inputs_of(path)
    wrong = []
    barrier = threading.Barrier(4)

    def work(index):
        try:
            mine = w * (index + 1)
            barrier.wait()
            for _ in range(6):
                mine.data.neg_()
                assert_follows(x, mine, b, options)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@EACH_PATH
def test_one_weight_written_between_calls_of_several_threads(path):
    """Threads take turns with one shared weight: each sees the last write, whoever made it."""
    x, w, b, options = inputs_of(path)
    wrong, lock = [], threading.Lock()

    def work():
        try:
            for _ in range(5):
                with lock:
                    assert_follows(x, w, b, options)
                    w.data.neg_()
                    assert_follows(x, w, b, options)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
