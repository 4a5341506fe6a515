"""Compiled programs kept from run to run."""

import os
import warnings


def keep_programs() -> None:
    """In the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        import platformdirs

        jax.config.update("jax_compilation_cache_dir", platformdirs.user_cache_dir("hopjax", appauthor=False))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # The cache is shared by processes and written without a lock: a torn entry is only compiled again.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)
