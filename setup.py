"""Builds `stx_patch._C`, the package's one extension: C11 sources and one C++ file over simdjson.

One abi3 binary serves every CPython from 3.10 and every PyTorch that has `ATen/dlpack.h`:
PyTorch's headers are used, nothing of PyTorch is linked. PyTorch must therefore be installed
before, and the build must see it: `pip install --no-build-isolation .`

Environment switches, all off by default:

    STX_WERROR=1                    warnings are errors
    STX_DEBUG=1                     -O0 -g, assertions on
    STX_SANITIZE=address,undefined  these sanitizers, assertions on
    STX_COVERAGE=1                  gcov counters
    STX_URING=0                     without io_uring

Something missing stops the build with one line that says what to install. On systems other than
Linux no extension is built: the package then leaves every load to stock safetensors.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = sys.platform == "linux"
C_FLAGS = ["-std=c11", "-D_GNU_SOURCE"]
CPP_FLAGS = ["-std=c++17", "-fno-exceptions", "-fno-rtti"]


def stop(sentence: str) -> NoReturn:
    raise SystemExit(f"stx_patch: {sentence}")


def switched_on(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def python_include() -> str:
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        stop("free-threaded Python is not supported: build with an ordinary CPython >= 3.10")
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        stop(f"Python.h not found in {folder}: apt-get install python3-dev")
    return folder


def torch_include() -> str:
    """PyTorch's header folder, found without importing PyTorch, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        stop("PyTorch not found: pip install torch, then build with --no-build-isolation")
    folder = Path(spec.submodule_search_locations[0], "include")
    if not (folder / "ATen" / "dlpack.h").is_file():
        stop(f"ATen/dlpack.h not found in {folder}: pip install 'torch>=2.4'")
    return str(folder)


def pkg_config(library: str, debian_package: str) -> tuple[list[str], list[str]]:
    """Compile and link flags of `library`; its headers count as system headers."""
    tool = shutil.which(os.environ.get("PKG_CONFIG", "pkg-config"))
    if tool is None:
        stop("pkg-config not found: apt-get install pkg-config")
    if subprocess.run([tool, "--exists", library]).returncode != 0:
        stop(f"{library} not found: apt-get install {debian_package}")
    cflags, libs = (
        shlex.split(subprocess.check_output([tool, question, library], text=True))
        for question in ("--cflags", "--libs")
    )
    return [re.sub("^-I", "-isystem", flag) for flag in cflags], libs


def uring() -> tuple[list[str], list[str]]:
    """The same of liburing, linked statically where its archive is there: few machines that run a
    wheel have the shared one. Without it every read goes through threads."""
    if os.environ.get("STX_URING") == "0":
        return ["-DSTX_NO_URING"], []
    flags, libs = pkg_config("liburing", "liburing-dev")
    tool = os.environ.get("PKG_CONFIG", "pkg-config")
    folder = subprocess.check_output([tool, "--variable=libdir", "liburing"], text=True).strip()
    archive = Path(folder, "liburing.a")
    return flags, [str(archive)] if archive.is_file() else libs


def extra_flags() -> tuple[list[str], list[str]]:
    """Compile and link flags; they come after the interpreter's own, so that the last -O wins."""
    compile_flags = ["-O2", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wshadow", "-Wconversion"]
    link_flags = ["-Wl,--exclude-libs,ALL", "-Wl,-z,relro,-z,now"]
    if switched_on("STX_WERROR"):
        compile_flags.append("-Werror")
    if switched_on("STX_DEBUG"):
        compile_flags += ["-O0", "-g", "-UNDEBUG"]
    if switched_on("STX_SANITIZE"):
        sanitizers = [f"-fsanitize={os.environ['STX_SANITIZE']}", "-fno-sanitize-recover=all"]
        compile_flags += [*sanitizers, "-fno-omit-frame-pointer", "-g", "-UNDEBUG"]
        link_flags += sanitizers
    if switched_on("STX_COVERAGE"):
        compile_flags.append("--coverage")
        link_flags.append("--coverage")
    return compile_flags, link_flags


def cuda_include() -> list[str]:
    """Where CUDA's header is, if it is: csrc/device_cuda.c compares itself with it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [Path(home, "include") for home in homes if home]
    return [f"-isystem{path}" for path in found if (path / "cuda_runtime_api.h").is_file()][:1]


class BuildNative(build_ext):
    """Looks for what the build needs, then compiles the two languages side by side."""

    def build_extensions(self) -> None:
        headers = [f"-isystem{python_include()}", f"-isystem{torch_include()}"]
        simdjson_flags, simdjson_libs = pkg_config("simdjson", "libsimdjson-dev")
        uring_flags, uring_libs = uring()
        for program in (self.compiler.compiler_so[0], self.compiler.compiler_so_cxx[0]):
            if shutil.which(program) is None:
                stop(f"compiler {program} not found: apt-get install g++")
        compile_flags, link_flags = extra_flags()
        for extension in self.extensions:
            extension.extra_compile_args = compile_flags + headers + uring_flags + cuda_include()
            extension.extra_link_args = link_flags + simdjson_libs + uring_libs
        self.compile_in_pool({".c": C_FLAGS, ".cpp": CPP_FLAGS + simdjson_flags})
        super().build_extensions()

    def compile_in_pool(self, language_flags: dict[str, list[str]]) -> None:
        """Each file becomes a job with its language's flags; setuptools knows one list for all."""
        compile_all, compile_one = self.compiler.compile, self.compiler._compile

        def compile_side_by_side(*args, **options):
            with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                jobs = []

                def submit(obj, src, suffix, cc_args, flags, pp_opts):
                    flags = [*flags, *language_flags[suffix]]
                    jobs.append(pool.submit(compile_one, obj, src, suffix, cc_args, flags, pp_opts))

                self.compiler._compile = submit
                objects = compile_all(*args, **options)
            for job in jobs:
                job.result()  # raises what the compiler raised
            return objects

        self.compiler.compile = compile_side_by_side


CORE = Extension(
    "stx_patch._C",
    sources=[*sorted(glob("csrc/*.c")), "csrc/json_simdjson.cpp"],
    depends=[*sorted(glob("csrc/*.h")), "setup.py"],
    include_dirs=["csrc"],
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    py_limited_api=True,
)

setup(
    ext_modules=[CORE] if NATIVE else [],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if NATIVE else {},
)
