"""Builds the native libraries of pyops; everything else is in pyproject.toml.

_cpu.so   the CPU kernels, on torch's stable ABI and without Python.h: one binary for every
          torch from 2.11 on. Each csrc/cpu/*.isa.cpp is compiled once per instruction set.
_cuda.so  the CUDA kernels in csrc/cuda/*.cu, if nvcc is found, GPU or not: PYOPS_CUDA=auto (default),
          0 (never) or 1 (fail if impossible); TORCH_CUDA_ARCH_LIST (default "8.0 9.0a+PTX").
_C        pybind11 module: facts about the build, this CPU and the CUDA kernels.

Torch is only read, never imported: its headers and libraries are enough.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch the libraries run under
AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
AVX512 = f"{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd"
AVX512_BF16 = f"{AVX512} -mavx512bf16 -mavx512vnni"
ISA_FLAGS = {"baseline": ""}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16}


def find_torch() -> Path | None:
    """Folder of the torch to build against: this environment's, also from an isolated build."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    for place in ("purelib", "platlib"):
        candidate = Path(sysconfig.get_path(place)) / "torch"
        if (candidate / "include").is_dir():
            return candidate
    return None


def cuda_plan() -> tuple[str | None, str]:
    """(path of nvcc or None, the decision in words)."""
    wanted = os.environ.get("PYOPS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"PYOPS_CUDA: expected auto, 0 or 1, got {wanted!r}")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=os.pathsep.join([f"{home}/bin", os.environ.get("PATH", "")]))
    if wanted == "0":
        return None, "not built: PYOPS_CUDA=0"
    if nvcc:
        return nvcc, f"built for {cuda_archs()}"
    if wanted == "1":
        raise SystemExit("PYOPS_CUDA=1, but nvcc was not found (on PATH or under CUDA_HOME)")
    return None, "not built: nvcc not found"


def cuda_archs() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0 9.0a+PTX")


def arch_flags(hopper_only: bool) -> str:
    """nvcc's flags; a `*_wgmma*.cu` becomes code for 9.0a alone, where that is asked for."""
    archs = re.split(r"[ ;]+", cuda_archs().strip())
    if hopper_only and any(arch.startswith("9.0a") for arch in archs):
        archs = ["9.0a"]
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            base = number.rstrip("a")  # what needs the `a` is no part of it
            flags.append(f"-gencode arch=compute_{base},code=compute_{base}")
    return " ".join(flags)


class NinjaBuild(build_ext):
    """Writes one build.ninja for the libraries and lets ninja build what changed."""

    def run(self) -> None:
        import pybind11

        torch = find_torch()
        if torch is None:
            raise SystemExit("pyops needs torch>=2.11: install it first, then build again")
        version = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
        torch_version = version.group(1) if version else "unknown"
        nvcc, cuda_words = cuda_plan()
        print(f"pyops: torch {torch_version} at {torch}; CUDA {cuda_words}", flush=True)
        # One folder for every way to build (editable, wheel, in place), so that each reuses the objects.
        work = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        targets = {
            ext.name: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions
        }
        cpu = targets["pyops._C"].parent / "_cpu.so"
        cuda = cpu.with_name("_cuda.so")
        include = f"-isystem {torch}/include -DTORCH_TARGET_VERSION={TORCH_TARGET}"
        common = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra"
        common += " -Wno-psabi -Wno-unused-function -Wno-maybe-uninitialized -g0"
        python = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        facts = rf'-DPYOPS_TORCH_VERSION=\"{torch_version}\" "-DPYOPS_CUDA_BUILD=\"{cuda_words}\""'
        cxx = os.environ.get("CXX", "c++")
        kernel_table = f"{sys.executable} {CSRC}/cuda/kernel_table.py"
        lines = [
            "rule cxx",
            f"  command = {cxx} {common} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = $out",
            "rule nvcc",
            f"  command = {kernel_table} compile $out {nvcc} -std=c++17 -O3 -Xptxas -v "
            "-static-global-template-stub=false -Xcompiler -fPIC,-fvisibility=hidden $flags "
            "-MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = $out",
            "rule program",
            f"  command = {cxx} -no-pie $in -o $out $libs\n  description = $out",
            # Stands for a library of that name, which this machine may lack, in what needs it.
            "rule stub",
            f"  command = {cxx} -shared -Wl,-soname,libtorch_cuda.so -x c /dev/null -o $out",
            "rule table",
            f"  command = {kernel_table} table $out $in\n  description = $out",
            "rule link",
            f"  command = {cxx} -shared -Wl,--gc-sections -s $in -o $out $libs",
            "  description = $out",
        ]

        def compile_to(
            objects: list[str], rule: str, source: Path, flags: str, tag: str = "", after: str = ""
        ) -> None:
            out = work / f"{source.relative_to(CSRC).as_posix().replace('/', '-')}{tag}.o"
            lines.append(f"build {out}: {rule} {source} {after}\n  flags = {flags}")
            objects.append(str(out))

        objects: list[str] = []
        for source in [CSRC / "schemas.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]:
            if source.name.endswith(".isa.cpp"):
                for isa, flags in ISA_FLAGS.items():
                    compile_to(objects, "cxx", source, f"{flags} -DPYOPS_ISA={isa}", f".{isa}")
            else:
                compile_to(objects, "cxx", source, include)
        lines.append(f"build {cpu}: link {' '.join(objects)}")
        lines.append(f"  libs = -L{torch}/lib -ltorch_cpu -lc10")
        # What the kernels use, as rows of C++, from ptxas and from a program that knows their launch sizes.
        table = work / "cuda_kernels.h"
        if nvcc:
            toolkit = Path(nvcc).parent.parent
            hosts: list[str] = []
            kernels: list[str] = []
            program: list[str] = []
            has_sm90a = "-DPYOPS_SM90A " if "9.0a" in cuda_archs() else ""
            for source in sorted((CSRC / "cuda").glob("*.cu")):
                hopper = "_wgmma" in source.stem
                compile_to(kernels, "nvcc", source, has_sm90a + arch_flags(hopper))
            for source in sorted((CSRC / "cuda").glob("*.cpp")):
                to = program if source.stem.endswith("_main") else hosts
                flags = f"{include} -isystem {toolkit}/include -DUSE_CUDA {has_sm90a}"
                compile_to(to, "cxx", source, flags)
            libs = f"  libs = -L{toolkit}/lib64 -lcudart_static -lrt -ldl -lpthread"
            stub = work / "libtorch_cuda.so"
            lines.append(f"build {stub}: stub")
            lines.append(f"build {cuda}: link {' '.join(hosts + kernels)} | {stub}")
            lines.append(f"{libs} -L{torch}/lib -ltorch_cpu -lc10 -Wl,--no-as-needed {stub}")
            plans = work / "kernel_plans"
            lines.append(f"build {plans}: program {' '.join(program + kernels)}\n{libs}")
            lines.append(f"build {table}: table {plans} {' '.join(kernels)}")
        else:
            table.write_text("")
        objects = []
        compile_to(
            objects, "cxx", CSRC / "bindings.cpp", f"{python} {facts} -I{work}", after=f"|| {table}"
        )
        compile_to(objects, "cxx", CSRC / "cpu" / "isa.cpp", "", ".facts")
        lines.append(f"build {targets['pyops._C']}: link {' '.join(objects)}")
        cpu.parent.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(work)], check=True)


setup(
    ext_modules=[Extension("pyops._C", [])],
    cmdclass={"build_ext": NinjaBuild},
    # An isolated build finds the torch of the environment it builds for; only where there is
    # none does it need one of its own.
    setup_requires=[] if find_torch() else ["torch>=2.11"],
)
