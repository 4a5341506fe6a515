"""What is chosen by the device that programs are compiled for: the one place where a CPU gets another program than a GPU or a TPU.

On accelerators nothing is: the plain formulation and the compiler's defaults.
"""

import functools

import jax

# On CPUs jaxlib 0.10 and later send products and convolutions through a library (YNNPACK) that takes up to twice the time of the code
# used before; its reductions are three times as fast as XLA's own.
_CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def compiler_options() -> dict[str, str] | None:
    """The `compiler_options` of `jax.jit` for networks on the default backend; None for the defaults.

    None on everything but a CPU, and where this jaxlib does not know the options (it is asked once, by compiling an empty program).
    """
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: None, compiler_options=_CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError:  # "No such compile option"
        return None
    return dict(_CPU_OPTIONS)
