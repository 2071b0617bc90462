"""Compile the engine model and the middle of the gateway's streams with Cython.

Where no C compiler is at hand, or with BLOCK_NO_COMPILE=1, the same files run uncompiled.
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

HOT = [
    "steptime/curve",
    "engine/sequence",
    "engine/blocks",
    "engine/scheduler",
    "engine/store",
    "engine/admission",
    "engine/kernel",
    "engine/resume",
    "engine/ask",
    "engine/spread",
    "gateway/wire/relay",
]

extensions = [
    Extension(
        "block." + path.replace("/", "."),
        [f"src/block/{path}.py"],
        extra_compile_args=["-O3", "-fno-math-errno", "-g0"],
        optional=True,  # a failed compilation leaves the uncompiled form
    )
    for path in HOT
]

setup(
    # Beside vLLM only the plugin runs, which needs nothing compiled.
    ext_modules=[]
    if os.environ.get("BLOCK_NO_COMPILE") == "1"
    else cythonize(
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
