"""Compile the engine model with Cython; where no C compiler is at hand the same files run uncompiled."""

from Cython.Build import cythonize
from setuptools import Extension, setup

HOT = ["engine/scheduler", "engine/kernel", "steptime/curve"]

extensions = [
    Extension(
        "block." + path.replace("/", "."),
        [f"src/block/{path}.py"],
        extra_compile_args=["-O3", "-fno-math-errno"],
        optional=True,  # a failed compilation leaves the uncompiled form
    )
    for path in HOT
]

setup(
    ext_modules=cythonize(
        extensions,
        language_level=3,
        compiler_directives={
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "annotation_typing": True,
        },
    )
)
