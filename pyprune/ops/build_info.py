"""What this build of pyprune is made of: the start of every bug report."""

import platform

import torch

from pyprune import _C
from pyprune.ops import CUDA_PROBLEM


class BuildInfo(dict[str, str]):
    """A dict of facts about the build that prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.items())


def build_info() -> BuildInfo:
    """Return versions, compiler, CPU capabilities and CUDA status; ``print`` shows them as a table.

    The CPU capability in use is the fastest that the machine has; the environment variable
    ``PYPRUNE_CPU_CAPABILITY`` (``default``, ``avx2`` or ``avx512``) overrides it.

    Example:
        >>> build_info()["cpu_capability"] in ("default", "avx2", "avx512")
        True
    """
    native = _C.build_info()
    return BuildInfo(
        pyprune=native["version"],
        python=platform.python_version(),
        torch=torch.__version__,
        built_with_torch=native["built_with_torch"],
        compiler=native["compiler"],
        native_module=_C.__file__,
        machine=platform.machine(),
        cpu_capability=_C.cpu_capability(),
        cpu_capabilities_built=native["cpu_capabilities"],
        cpu_capabilities_here=", ".join(_C.available_cpu_capabilities()),
        threads=str(torch.get_num_threads()),
        cuda_build=native["cuda"],
        cuda_runtime=CUDA_PROBLEM or "kernels loaded",
    )
