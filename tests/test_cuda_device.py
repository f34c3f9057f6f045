"""The CUDA device on a fake torch.cuda whose streams run late, and on a GPU where there is one."""

import random

import pytest
import torch
from torch.nn import functional

from moert.device import cuda, cuda_api
from moert.device.backend import ExpertBatches
from moert.device.cuda import CudaDevice, open_cuda
from moert.device.staging import StagingPool
from moert.errors import DeviceError, DeviceMemoryError
from moert.hardware.allocator import allocate
from moert.quant.format import ExpertLayout
from moert.quant.matmul import ACTIVATIONS

from .fake_cuda import FakeCuda

PAGE = 4096
ORDERS = ["", "copy", "compute"]  # which stream runs as early as it may


def numbers(nbytes, seed=0):
    return torch.randint(0, 255, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def host(nbytes, seed=0):
    memory = allocate(nbytes)
    return memory.copy_(numbers(nbytes, seed))


@pytest.fixture(params=ORDERS, ids=["late", "copies early", "computing early"])
def fake(request):
    with FakeCuda(eager=request.param) as fake:
        yield fake


def compute(fake, out, memory):
    """Reads device memory on the stream that computes."""
    fake.current_stream().push(lambda: out.copy_(memory))


def test_memory_begins_on_a_page_and_is_counted():
    fake = FakeCuda()
    device = open_cuda(cuda=fake.api())
    assert (device.name, device.kind, device.integrated, device.total_bytes) == ("Fake GPU", "cuda", False, 1 << 30)
    left = device.available_bytes()
    assert left == (1 << 30) - (100 << 20)
    block = device.allocate(3 * PAGE)
    assert block.data_ptr() % PAGE == 0
    assert block.shape == (3 * PAGE,)
    assert device.available_bytes() == left - 4 * PAGE
    fake.cached = 50 << 20  # of torch's allocator, which gives it out again
    assert device.available_bytes() == left - 4 * PAGE


def test_too_much_memory_is_refused_with_what_is_left():
    device = open_cuda(cuda=FakeCuda().api())
    with pytest.raises(DeviceMemoryError, match=r"Out of memory on Fake GPU: 2.00 GiB wanted, 924.0 MiB left") as error:
        device.allocate(2 << 30)
    assert error.value.exit_code == 2
    assert "--device-budget" in str(error.value)


def test_a_limit_leaves_room_for_what_cuda_takes():
    fake = FakeCuda()
    device = open_cuda(cuda=fake.api())
    assert device.overhead_bytes == (100 + 64) << 20  # in use at first, and what torch rounds up
    device.limit(356 << 20)
    assert fake.fraction == pytest.approx(256 / 1024)
    assert device.available_bytes() == 256 << 20
    with pytest.raises(DeviceMemoryError, match=r"256\.0 MiB left"):
        device.allocate(256 << 20)
    with pytest.raises(DeviceMemoryError, match=r"CUDA itself takes 164\.0 MiB of the 64\.0 MiB allowed"):
        device.limit(64 << 20)
    device.close()
    assert fake.fraction == 1  # for whoever opens it next


def test_attention_is_not_planned_for_each_length():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        CudaDevice(FakeCuda().api())
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_cublas_takes_more_from_hopper_on():
    fake = FakeCuda()
    fake.found.major = 9
    assert open_cuda(cuda=fake.api()).overhead_bytes == (100 + 128) << 20


def test_what_others_use_is_not_all_overhead():
    fake = FakeCuda(total=8 << 30)
    fake.used = 5 << 30
    assert open_cuda(cuda=fake.api()).overhead_bytes == (640 + 64) << 20


@pytest.mark.parametrize("locked", [True, False])
def test_computing_waits_for_copies(fake, locked):
    device = CudaDevice(fake.api())
    memory, source = device.allocate(8 * PAGE), host(8 * PAGE)
    if locked:
        assert device.page_lock(source) is source
    out = torch.zeros(8 * PAGE, dtype=torch.uint8)
    pieces = zip(source.split(PAGE), memory.split(PAGE), strict=True)
    copies = [device.copy(*piece) for piece in pieces]
    device.after(copies)
    compute(fake, out, memory)
    device.synchronise()
    assert out.equal(numbers(8 * PAGE))
    assert all(copy.done for copy in copies)


def test_without_waiting_the_fake_shows_it():
    with FakeCuda(eager="compute") as fake:
        device = CudaDevice(fake.api())
        memory, source = device.allocate(PAGE), host(PAGE)
        device.page_lock(source)
        out = torch.zeros(PAGE, dtype=torch.uint8)
        device.copy(source, memory)
        compute(fake, out, memory)
        device.synchronise()
        assert not out.equal(source)


def test_copies_behind_a_fence_leave_what_is_still_computed_with(fake):
    device = CudaDevice(fake.api())
    memory, source = device.allocate(PAGE), host(2 * PAGE)
    device.page_lock(source)
    device.after([device.copy(source[:PAGE], memory)])
    first = torch.zeros(PAGE, dtype=torch.uint8)
    compute(fake, first, memory)
    device.fence()
    device.copy(source[PAGE:], memory)
    device.synchronise()
    assert first.equal(source[:PAGE])
    assert memory.equal(source[PAGE:])


def test_a_source_may_be_overwritten_once_waited_for(fake):
    device = CudaDevice(fake.api())
    memory, source = device.allocate(2 * PAGE), host(PAGE)
    device.page_lock(source)
    first = device.copy(source, memory[:PAGE])
    first.wait()
    assert first.done
    source.copy_(numbers(PAGE, 1))
    device.copy(source, memory[PAGE:]).wait()
    assert memory.equal(torch.cat([numbers(PAGE), numbers(PAGE, 1)]))


def test_done_comes_true_and_then_the_time_is_known():
    with FakeCuda() as fake:
        device = CudaDevice(fake.api())
        memory, source = device.allocate(PAGE), host(PAGE)
        device.page_lock(source)
        before = device.mark()
        copy = device.copy(source, memory)
        assert copy.span is None
        assert not copy.done
        while not copy.done:
            pass
        begin, end = copy.span
        assert begin < end
        after = device.mark()
        assert device.when(after) is None
        device.synchronise()
        assert device.when(before) < device.when(after)


@pytest.mark.parametrize("base_seconds", [0.0, 4.0])
def test_times_of_marks_are_those_of_the_device(monkeypatch, base_seconds):
    """However often the event from which they are reckoned changes, on whichever stream it lies."""
    monkeypatch.setattr(cuda, "_BASE_SECONDS", base_seconds)
    with FakeCuda() as fake:
        device = CudaDevice(fake.api())
        memory, source = device.allocate(PAGE), host(PAGE)
        device.page_lock(source)
        start, clock, marks = device.mark(), fake.clock, []
        for step in range(20):
            marks.append(device.mark() if step % 3 else device.copy(source, memory).end)
        device.synchronise()
        want = [(mark.event.mark.reached - start.event.mark.reached) / 1000 for mark in marks]
        assert [device.when(mark) - device.when(start) for mark in marks] == pytest.approx(want)
        assert fake.clock > clock


def test_memory_that_is_not_locked_goes_through_the_pool(fake, monkeypatch):
    """Many times the pool; the source may be overwritten at once."""
    monkeypatch.setattr(cuda, "_CHUNK_BYTES", PAGE)
    device = CudaDevice(fake.api())
    memory, source = device.allocate(40 * PAGE), host(40 * PAGE)
    fake.refuse = 801
    assert device.page_lock(source) is None
    want = source.clone()
    rng, at, copies = random.Random(0), 0, []
    while at < len(source):
        size = min(rng.randint(1, 6) * PAGE - 7, len(source) - at)
        copies.append(device.copy(source[at : at + size], memory[at : at + size]))
        source[at : at + size] = 0
        at += size
    copies[-1].wait()
    assert memory.equal(want)


def test_a_refused_lock_leaves_no_error_for_the_next_launch():
    fake = FakeCuda()
    device = CudaDevice(fake.api())
    fake.refuse, before = 2, fake.probes
    fake.fail = RuntimeError("CUDA error: the one that was left behind")
    assert device.page_lock(allocate(PAGE)) is None
    assert fake.probes == before + 1


def test_the_pool_never_holds_more_than_its_chunks(fake):
    """In both directions, with sizes around a chunk."""
    pool = StagingPool(fake.api(), 100, 3)
    for size in (0, 1, 99, 100, 101, 300, 301, 1234):
        source, there, back = numbers(size), torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
        pool.send(source, there, fake.compute)
        pool.fetch(there, back, fake.compute)
        assert back.equal(source)


def test_a_chunk_on_its_way_is_not_taken_by_another_stream(fake):
    pool, other = StagingPool(fake.api(), 100, 1), fake.Stream(None)
    source, there = numbers(100), torch.zeros(100, dtype=torch.uint8)
    pool.send(source, there, fake.compute)
    back = torch.zeros(100, dtype=torch.uint8)
    pool.fetch(numbers(100, 1), back, other)
    fake.synchronize(None)
    assert there.equal(source)
    assert back.equal(numbers(100, 1))


def test_the_pool_may_be_made_in_inference_mode(fake):
    device, x = CudaDevice(fake.api()), numbers(10)
    with torch.inference_mode():
        assert device.fetch(device.send(x)).equal(x)
    assert device.fetch(device.send(x)).equal(x)


@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (3, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
def test_activations_there_and_back(fake, monkeypatch, shape, dtype):
    monkeypatch.setattr(cuda, "_CHUNK_BYTES", 1024)
    device = CudaDevice(fake.api())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(9).to(dtype)
    there, want = device.send(x), x.clone()
    x.zero_()  # what was sent is sent
    there_too = device.send(want.mT if want.ndim > 1 else want)
    assert device.fetch(there).equal(want)
    assert device.fetch(there_too).equal(want.mT if want.ndim > 1 else want)


def test_an_integrated_device_computes_with_the_hosts_memory(monkeypatch):
    fake = FakeCuda(integrated=True, total=8 << 30)
    monkeypatch.setattr(cuda.memory, "total_bytes", lambda: 16 << 30)
    monkeypatch.setattr(cuda.memory, "available_bytes", lambda: 11 << 30)
    device = open_cuda(cuda=fake.api())
    assert device.integrated
    assert (device.total_bytes, device.available_bytes(), device.overhead_bytes) == (16 << 30, 11 << 30, 0)
    memory = host(4 * PAGE)
    shared = device.page_lock(memory)
    assert shared.data_ptr() == memory.data_ptr()
    assert fake.locked == {memory.data_ptr(): (4 * PAGE, 3)}
    assert device.page_lock(memory).data_ptr() == memory.data_ptr()  # once is enough
    fake.shift = 1 << 40
    assert device.page_lock(memory) is None
    device.limit(1)  # the host's budget holds
    assert fake.fraction is None
    device.close()
    assert not fake.locked
    assert fake.emptied


def raw_experts(layout, count, seed=0):
    """An arena of raw experts in any order, their offsets and float64 matrices."""
    g = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, layout.raw_dtype)
    size, places = layout.slice_sizes[0], random.Random(seed).sample(range(count + 1), count)
    arena, matrices = torch.full(((count + 1) * size,), 255, dtype=torch.uint8), []
    for place in places:
        weights = [torch.randn(shape, generator=g).to(dtype) for shape in layout.shapes]
        for w, at in zip(weights, layout.offsets(0), strict=False):
            begin = place * size + at
            arena[begin : begin + w.nbytes] = w.view(-1).view(torch.uint8)
        matrices.append([w.double() for w in weights])
    return arena, [[place * size] for place in places], matrices


def check_raw(device, place, activation, dtype):
    layout = ExpertLayout(48, 40, 32, (16,), dtype)
    arena, offsets, matrices = raw_experts(layout, 3)
    g = torch.Generator().manual_seed(5)
    x, out = torch.randn(6, 48, generator=g), torch.ones(6, 48)
    tokens = [torch.tensor([4, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 5, 3])]
    weights = [torch.rand(len(t), generator=g) for t in tokens]
    want = out.double()
    for t, w, (gate, up, down) in zip(tokens, weights, matrices, strict=True):
        v = x[t].double()
        want[t] += w[:, None] * ((ACTIVATIONS[activation](v @ gate.T) * (v @ up.T)) @ down.T)
    there, sums = device.send(x), device.send(out)
    device.experts(layout, activation, place(arena)).add(ExpertBatches(offsets, tokens, weights), there, sums)
    assert torch.allclose(device.fetch(sums).double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_weights_kept_as_they_are(monkeypatch, activation, dtype):
    monkeypatch.setattr(cuda, "_BLOCK_WEIGHTS", 16 * 48)
    check_raw(CudaDevice(FakeCuda().api()), lambda arena: arena, activation, dtype)


def test_nested_bits_with_another_activation_are_refused():
    device = CudaDevice(FakeCuda().api())
    with pytest.raises(DeviceError, match="no kernels for the activation gelu"):
        device.experts(ExpertLayout(64, 32, 32, (2, 4)), "gelu", allocate(PAGE))


@pytest.fixture
def gpu():
    reason = cuda_api.why_not(cuda_api.of_torch())
    if reason:
        pytest.skip(f"no GPU that can be used: {reason}")
    device = open_cuda()
    yield device
    device.close()


@pytest.mark.gpu
def test_copies_on_a_gpu(gpu):
    size = 64 << 20
    memory, source = gpu.allocate(size), host(size)
    shared = gpu.page_lock(source)
    assert shared is not None
    for locked in (source, numbers(size, 1)):
        copy = gpu.copy(locked, memory)
        gpu.after([copy])
        assert gpu.fetch(memory).equal(locked)
        copy.wait()
        assert copy.done
        assert 0 < copy.span[1] - copy.span[0] < 60
    if gpu.integrated:
        source.copy_(numbers(size, 2))
        assert gpu.fetch(shared).equal(numbers(size, 2))


@pytest.mark.gpu
def test_memory_stays_within_the_limit_on_a_gpu(gpu):
    if gpu.integrated:
        pytest.skip("an integrated device has the host's memory")
    gpu.limit(gpu.overhead_bytes + (256 << 20))
    with pytest.raises(DeviceMemoryError, match="--device-budget"):
        gpu.allocate(1 << 30)
    with pytest.raises(DeviceMemoryError), gpu.guard():
        torch.empty(1 << 30, dtype=torch.uint8, device=gpu.torch_device)
    gpu.allocate(128 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_kept_as_they_are_on_a_gpu(gpu, dtype):
    check_raw(gpu, lambda arena: gpu.send(arena), "silu", dtype)


@pytest.mark.gpu
def test_nested_experts_on_a_gpu(gpu):
    from .test_triton_kernels import LAYOUT, inputs, make_experts, routing

    experts, matrices = make_experts(LAYOUT, [1, 2, 3], "cpu")
    tokens, weights = routing(7, 3)
    x, want = inputs(7, LAYOUT.hidden), torch.zeros(7, LAYOUT.hidden, dtype=torch.float64)
    for t, w, (gate, up, down) in zip(tokens, weights, matrices, strict=True):
        v = x[t].double()
        want[t] += w.double()[:, None] * ((functional.silu(v @ gate.T) * (v @ up.T)) @ down.T)
    memory = gpu.send(experts.arena)
    out = gpu.send(torch.zeros(7, LAYOUT.hidden))
    gpu.experts(LAYOUT, "silu", memory).add(ExpertBatches(experts.offsets, tokens, weights), gpu.send(x), out)
    error = (gpu.fetch(out).double() - want).abs().max()
    assert error <= 0.05 * want.abs().max()  # inputs may be rounded to 8 bits
