"""Settings every test runs under: shapes checked, double precision, no silent promotion, repeatable examples."""

import os
import sys
import zlib

import hypothesis
import jax
import platformdirs
import pytest
from jaxtyping import Array, Key, install_import_hook

if "hopjax" in sys.modules:  # its annotations would go unchecked, silently
    raise RuntimeError("hopjax was imported before tests/conftest.py could install the shape checks")

# Left installed for the whole run: submodules imported later are checked too.
install_import_hook("hopjax", "beartype.beartype")

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", platformdirs.user_cache_dir("hopjax-tests", appauthor=False))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

hypothesis.settings.register_profile("hopjax", derandomize=True, deadline=None, print_blob=True, database=None, max_examples=50)
hypothesis.settings.load_profile("hopjax")


@pytest.fixture
def key(request: pytest.FixtureRequest) -> Key[Array, ""]:
    """A key of the test's own, the same in every run."""
    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))
