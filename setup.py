"""What pyproject.toml cannot say without being experimental: the CPU kernel."""

from setuptools import Extension, setup


setup(
    ext_modules=[
        # Built where there is a C++20 compiler, and absent where not: kernels/cpu.py says so then. It needs neither
        # PyTorch nor Python headers, and is linked without OpenMP on purpose.
        Extension(
            "optimum_sparse.kernels._cpu",
            ["optimum_sparse/kernels/cpu.cpp"],
            extra_compile_args=["-std=c++20", "-O3", "-g0", "-fopenmp"],
            py_limited_api=True,
            optional=True,
        )
    ]
)
