"""CMake builds the kernels, torch's CppExtension the bindings; both are linked into embedkern._native."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
# torch's build takes them from PATH; an environment that isn't activated doesn't have them there.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


class BuildKernelsFirst(BuildExtension):
    def build_extensions(self) -> None:
        build = Path(self.build_temp).resolve() / "kernels"
        options = shlex.split(os.environ.get("CMAKE_ARGS", ""))  # such as -DEK_CUDA=OFF
        subprocess.check_call(["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *options])
        subprocess.check_call(["cmake", "--build", build, "--target", "kernels"])
        link = (build / "link.txt").read_text().splitlines()
        if len(link) == 1:
            print("embedkern: built without nvcc: CUDA kernels (pool) are left out; GPU calls go to other backends")
        for extension in self.extensions:
            extension.extra_link_args += link
            extension.depends.append(link[0])
            extension.define_macros.append(("EK_CUDA", str(int(len(link) > 1))))
        super().build_extensions()


setup(
    ext_modules=[
        CppExtension(
            "embedkern._native",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "bindings").glob("*.cpp")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=["-g0", "-fvisibility=hidden"],
        )
    ],
    cmdclass={"build_ext": BuildKernelsFirst},
)
