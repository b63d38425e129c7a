"""Settings that must stand before JAX is imported, how the suite is spread over cores, and how hard XLA tries."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

import pytest

# Eight CPU devices for tests of meshes; the GPU interpreter needs a thread for every simulated warpgroup.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM does the work of -O1, half of that of -O2, which is most of a compilation; what XLA itself does to a program stays.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=1"
os.environ.setdefault("NPROC", "32")

# A command that a test starts imports two thousand modules: 4 s of CPU, or 10 where it has to compile them, as where nobody kept them.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# On a CPU what one test compiled no other compiles again, in whatever process of this run it is. Nothing is kept for the next run.
CACHE = "dsv3_jax_tests_"
if os.environ["JAX_PLATFORMS"] == "cpu" and CACHE not in os.environ.get("JAX_COMPILATION_CACHE_DIR", ""):
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix=CACHE)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite on CPUs runs in a process for each core, up to four: one by itself keeps little more than one core busy.

    The tests of a file stay together, as they share what is slow to make, and the files that take minutes go first, so that no process
    is left alone with one at the end. `-n 0` runs all in one process.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and os.environ["JAX_PLATFORMS"] == "cpu"
    started_by_another = "PYTEST_XDIST_WORKER" in os.environ  # each worker comes by here too
    if whole and not started_by_another and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses, config.option.dist = min(4, len(os.sched_getaffinity(0))), "loadfile"
        config.option.loadscopereorder = False  # the order of `pytest_collection_modifyitems`


def pytest_collection_finish():
    """What is imported stays: Python's collector need not look at it again and again while JAX traces (a fifteenth of the time)."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


# Files that take half a minute or more, the longest first
LONG = ["train_command", "products", "speculation", "recipes", "engine", "run", "mesh", "exchange", "http", "executor", "step"]
LONG += ["reference_models", "loss", "weights", "spread"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(name) if (name := item.path.stem.removeprefix("test_")) in LONG else len(LONG))


@pytest.fixture(scope="module", autouse=True)
def compile_fast(request):
    """Most tests compile for longer than they compute: on a CPU half the time without LLVM's optimisations.

    Those of kernels keep some, because they interpret them. That what users run meets the reference values too is tested where those are.
    """
    import jax  # now that the settings stand

    fast = request.path.parent.name != "pallas_kernels" and os.environ["JAX_PLATFORMS"] == "cpu"
    jax.config.update("jax_disable_most_optimizations", fast)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(fast))  # for the commands that tests start
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
