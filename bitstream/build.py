"""Compiles the kernels when the package is built, so that the first call of an installation need not.

The code is for this processor, and for these versions of Python and numba: elsewhere the first call compiles anew.
``[tool.setuptools.cmdclass]`` in pyproject.toml names the classes.
"""

import os
import subprocess
import sys

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Puts compiled kernels beside their source; without numba, or if it fails, a warning takes their place."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # what is edited is compiled when it is called
            return
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        program = "import bitstream.kernels as a, vqcodec.compiled as b; a.compile_ahead(); b.compile_ahead()"
        command = [sys.executable, "-c", program]
        if subprocess.run(command, cwd=self.build_lib, env=environment).returncode:
            self.warn("the kernels are not compiled: the first call will do that")


class BuildWheel(bdist_wheel):
    """A wheel for this platform and Python, as its compiled kernels are."""

    def finalize_options(self) -> None:
        self.distribution.has_ext_modules = lambda: True
        super().finalize_options()
