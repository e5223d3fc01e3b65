"""Compiles CUDA kernels for the CPU: the same .cu files, by g++ against the emulator.

A kernel library is one entry file (extern "C" functions around the launchers, see entry.h) that
includes or names the .cu files. Variants: "plain"; "race" with race detection; "asan" with
AddressSanitizer (only in a process that preloads it).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUT = ROOT / "build" / "emulator"
PARTS = ("scheduler.cpp", "memory.cpp", "race.cpp", "copies.cpp", "matrix.cpp")
COMMON = ["-g1", "-fPIC", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-attributes"]
KERNEL = ["-std=c++17", "-x", "c++", "-O1", "-DPYOPS_EMULATE", "-ftrivial-auto-var-init=pattern"]
EMULATOR = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-DPYOPS_EMULATE"]
VARIANTS = {
    "plain": [],
    "race": ["-fsanitize=thread"],  # whose hooks are the emulator's
    "asan": ["-fsanitize=address", "-fsanitize-recover=address"],
}
MODES = {"early": 0, "late": 1, "random": 2}


class EmulatorError(AssertionError):
    """What the emulator reports: a race, a deadlock, a misuse."""


def cuda_include() -> Path | None:
    """Folder with cuda_bf16.h and its like: CUDA's, or the one that nvidia-cuda-runtime installs."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), str(Path(nvcc).resolve().parents[1])]
    homes += [str(home) for home in sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for home in homes:
        if (Path(home) / "include" / "cuda_bf16.h").is_file():
            return Path(home) / "include"
    return None


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    if cuda_include() is None:
        return "the emulator needs CUDA's headers (cuda_bf16.h)"
    return None


def _folder(source: Path) -> Path:
    """Where what comes of a source goes; a test's temporary source keeps it beside itself."""
    return OUT if source.is_relative_to(ROOT) else source.parent


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Processes that want to make the same file do it one after the other."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:20]


def _compile(source: Path, flags: Sequence[str], include: Sequence[Path]) -> Path:
    """Object file of a source, made again when the command or a file that went in has changed.

    Which files those are is known from the last time (CUDA's headers are not among them).
    """
    searched = [flag for place in include for flag in ("-I", str(place))]
    command = ["g++", *COMMON, *flags, *searched, "-isystem", str(cuda_include())]
    command += ["-c", str(source)]
    listed = _folder(source) / f"{source.stem}-{_key(*command)}.d"

    def made() -> Path:
        names = listed.read_text().replace("\\\n", " ").split()[1:] if listed.is_file() else []
        files = [Path(name) for name in names]
        texts = [file.read_text() if file.is_file() else "gone" for file in files]
        return listed.with_name(f"{listed.stem}-{_key(*texts)}.o")

    if not made().is_file():
        with _alone(listed):
            if not made().is_file():
                part, dependencies = listed.with_suffix(".part"), listed.with_suffix(".d.part")
                _run([*command, "-MMD", "-MF", str(dependencies), "-o", str(part)])
                dependencies.rename(listed)
                part.rename(made())
    return made()


def build(sources: Sequence[Path], variant: str = "plain", defines: Sequence[str] = ()) -> Path:
    """Shared library of kernel sources in a variant, built if it is not there yet."""
    flags = [*KERNEL, *VARIANTS[variant], *(f"-D{name}" for name in defines)]
    objects = [_compile(HERE / part, EMULATOR, [HERE]) for part in PARTS]
    cuda = ROOT / "csrc" / "cuda"
    for source in sources:
        objects.append(_compile(source, flags, [source.parent, HERE, cuda, cuda.parent]))
    target = _folder(sources[0]) / f"{sources[0].stem}-{variant}-{_key(*objects)}.so"
    with _alone(target):
        if not target.is_file():
            link = ["-fsanitize=address"] if variant == "asan" else []
            part = target.with_suffix(".part")
            _run(["g++", "-shared", *link, *map(str, objects), "-ldl", "-o", str(part)])
            part.rename(target)
    return target


class Emulated:
    """The extern "C" functions of a kernel library, each returning a report or null."""

    def __init__(
        self, sources: Sequence[Path], variant: str = "plain", defines: Sequence[str] = ()
    ) -> None:
        self.library = ctypes.CDLL(str(build(sources, variant, defines)))

    def call(
        self,
        name: str,
        *args: object,
        seed: int = 0,
        mode: str = "random",
        resident: int = 1,
        check_bounds: bool = True,
    ) -> None:
        """Calls a function with tensors (as pointers), ints, floats or ctypes values.

        check_bounds: report every access of global memory outside the tensors among `args` (with
        race detection; copies in the background always). resident: clusters that run at the same
        time. Raises EmulatorError with the report.
        """
        library = self.library
        library.emu_configure(ctypes.c_uint64(seed), MODES[mode], resident)
        library.emu_forget_buffers()
        native: list[object] = []
        for index, arg in enumerate(args):
            if isinstance(arg, torch.Tensor):
                if check_bounds and arg.numel() > 0:
                    storage = arg.untyped_storage()
                    library.emu_buffer(
                        ctypes.c_void_p(storage.data_ptr()),
                        ctypes.c_size_t(storage.nbytes()),
                        f"argument {index}".encode(),
                    )
                native.append(ctypes.c_void_p(arg.data_ptr()))
            elif isinstance(arg, bool | int):
                native.append(ctypes.c_int64(arg))
            elif isinstance(arg, float):
                native.append(ctypes.c_float(arg))
            elif arg is None:
                native.append(ctypes.c_void_p())
            else:
                native.append(arg)
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        report = function(*native)
        if report is not None:
            raise EmulatorError(report.decode())
