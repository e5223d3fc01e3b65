"""Compiles the Triton kernels for GPUs that need not be here and tells what ptxas made of them.

The launchers are called with meta tensors, and what they would launch is compiled: the same
kernels, arguments, specialisations and configs. Run as a program of its own, without Triton's
interpreter.
"""

import contextlib
import io
import json
import multiprocessing
import os
import re
import sys
from dataclasses import asdict, dataclass

# Compiled anew each time: what ptxas says is not in Triton's cache.
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"

import torch  # noqa: E402  (Triton reads the environment as it is imported)
import triton
from pyops.triton_kernels import common, conv_relu_pool
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import create_function_from_signature


@dataclass
class Compiled:
    case: str
    kernel: str
    config: str
    arch: int
    registers: int
    spill_bytes: int
    shared: int
    matrix_instructions: int  # wgmma on 90, tcgen05 on 100, mma.sync on 80
    tensor_cores: bool  # any of those
    serialised: list[str]
    boxes: bool  # whether it loads by TMA


def meta(channels, out, size, taps=3, *, dtype=torch.bfloat16, padding=1, stride=1, **options):
    """A call on channels_last meta tensors: (tensors, what `forward` takes after them, codes)."""
    batch = options.pop("batch", 8)
    last = options.pop("channels_last", True)
    layout = torch.channels_last if last else torch.contiguous_format
    groups = options.pop("groups", 1)
    x = torch.empty(batch, channels, size, size, device="meta", dtype=dtype, memory_format=layout)
    w = torch.empty(out, channels // groups, taps, taps, device="meta", dtype=dtype)
    b = torch.empty(out, device="meta", dtype=dtype)
    call = {
        "activation": "relu",
        "slope": 0.1,
        "pool": "max",
        "window": (2, 2),
        "step": (2, 2),
        "pool_padding": (0, 0),
        "ceil_mode": False,
    } | options
    precise = call.pop("precise", False)
    return (x, w, b), ((stride,) * 2, (padding,) * 2, (1, 1), groups, *call.values()), precise


ALEXNET = {"window": (3, 3), "step": (2, 2)}
# One of each class of config: by boxes or pointers, few channels, unaligned ones, overlapping
# windows, each dtype.
FORWARD = {
    "128 to 128": meta(128, 128, 112),
    "64 to 64": meta(64, 64, 224),
    "64 to 64, int64": meta(64, 64, 224, batch=2000),
    "float16, 24 to 32, average": meta(
        24, 32, 28, dtype=torch.float16, pool="avg", activation="leaky_relu"
    ),
    "TF32, 128 to 128": meta(128, 128, 112, dtype=torch.float32),
    "float32 exact": meta(64, 64, 56, dtype=torch.float32, precise=True),
    "AlexNet 2, 3x3 windows": meta(64, 192, 27, 5, padding=2, **ALEXNET),
    "3 to 64": meta(3, 64, 224),
    "3 to 64, NCHW, int64": meta(3, 64, 224, batch=3000, channels_last=False),
    "AlexNet 1, 3x3 windows": meta(3, 64, 224, 11, padding=2, stride=4, **ALEXNET),
    "ResNet, stride 2, no pool": meta(256, 256, 28, stride=2, pool="none"),
    "67 to 45, unaligned": meta(67, 45, 57, ceil_mode=True),
    "64 to 96, 3x3 stride 3 windows": meta(64, 96, 57, window=(3, 3), step=(3, 3)),
}
BACKWARD = (
    "128 to 128",
    "float32 exact",
    "3 to 64, NCHW, int64",
    "64 to 64, int64",
    "float16, 24 to 32, average",
    "AlexNet 2, 3x3 windows",
    "67 to 45, unaligned",
)


def jobs(archs) -> list[tuple[int, str, bool]]:
    """(architecture, case, whether backward)."""
    forward = [(arch, name, False) for arch in archs for name in FORWARD]
    # The backward kernels differ less between architectures than between cases.
    few = BACKWARD[:3]
    return [(a, name, True) for a in archs for name in (BACKWARD if a == 90 else few)] + forward


def compile_case(job: tuple[int, str, bool]) -> list[dict]:
    arch, name, backward = job
    tensors, options, precise = FORWARD[name]
    torch.backends.cudnn.conv.fp32_precision = "ieee" if precise else "tf32"

    def forward():
        return conv_relu_pool.forward(*tensors, *options, True)

    def both():
        output, codes = forward()
        launches.clear()
        conv_relu_pool.backward(output, *tensors[:2], codes, *options, (True, True, True))

    launches = []
    # On 90, where the kernels are meant to win, every config; elsewhere the first choice.
    with _recorded(arch, launches):
        (both if backward else forward)()
    return [
        asdict(_compile(name, arch, kernel, config, bind))
        for kernel, configs, bind in launches
        for config in (configs if arch == 90 else configs[:1])
    ]


def compile_spilling() -> dict:
    """A tile far too large for its warps, to see that a spill is seen."""
    launches = []
    with _recorded(90, launches):
        tensors, options, _ = FORWARD["128 to 128"]
        conv_relu_pool.forward(*tensors, *options, True)
    kernel, (config, *_), bind = launches[0]
    config = common.Config(config.constants, num_warps=4, num_stages=3)
    return asdict(_compile("spilling", 90, kernel, config, bind))


@contextlib.contextmanager
def _recorded(arch: int, launches: list):
    """As on a GPU of that architecture, but what would be launched is only noted."""
    functions = {
        "launch": lambda kernel, configs, key, bind: launches.append((kernel, configs, bind)),
        "capability": lambda tensor: divmod(arch, 10),
        "multiprocessors": lambda tensor: 132,
    }
    saved = {name: getattr(common, name) for name in functions}
    for name, function in functions.items():
        setattr(common, name, function)
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(common, name, function)


def _compile(case: str, arch: int, kernel, config, bind) -> Compiled:
    captured = {}

    class Recorder:
        def __getitem__(self, grid):
            return lambda **arguments: captured.update(arguments)

    common.run(Recorder(), config, bind)
    target = GPUTarget("cuda", arch, 32)
    backend = CUDABackend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**captured)
    options, signature, constants, attributes = kernel._pack_args(
        backend, captured, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=target, options=options.__dict__)
    log = log.getvalue()
    used = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    instructions = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    return Compiled(
        case=case,
        kernel=kernel.__name__,
        config=f"{config.constants} warps={config.num_warps} stages={config.num_stages}",
        arch=arch,
        registers=int(used[1]),
        spill_bytes=int(spills[1]) + int(spills[2]),
        shared=compiled.metadata.shared,
        matrix_instructions=compiled.asm["ptx"].count(instructions[arch]),
        tensor_cores=any(name in compiled.asm["ptx"] for name in instructions.values()),
        # C7510 to C7518 tell of serialised wgmma. C7519, an arrive that ptxas adds, costs nothing.
        serialised=re.findall(r"\(C75(?!19).*|.*Potential Performance Loss.*", log),
        boxes="cp.async.bulk.tensor" in compiled.asm["ptx"],
    )


def main(archs: list[int]) -> None:
    """Writes the list of all that was compiled as JSON."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(compile_case, jobs(archs), chunksize=1)
    json.dump([row for rows in results for row in rows] + [compile_spilling()], sys.stdout)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]] or [80, 90, 100])
