"""Programs that a test runs once or twice, for which compiling takes all the time."""

import functools
from typing import Any

import jax

# The same operations, in loops that are not optimised: a network's gradient compiles in a quarter of the time.
OPTIONS: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
quickly: Any = functools.partial(jax.jit, compiler_options=OPTIONS)
