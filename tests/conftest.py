"""Settings that must stand before JAX is imported."""

import os

# Eight CPU devices for tests of meshes; the GPU interpreter needs a thread for every simulated warpgroup.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("NPROC", "32")
