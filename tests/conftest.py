"""Shared test set-up: CPU only, eight fake devices, a compile cache that survives runs."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of these tests is compilation: 56 s of processor time for two files that take 76 at level 1.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
                      "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_enable_concurrency_optimized_scheduler=false")  # fmt: skip

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
_CACHE = pathlib.Path(os.environ.get("DINA_TEST_CACHE", pathlib.Path(__file__).parent.parent / ".cache" / "tests"))
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
