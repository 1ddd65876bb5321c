"""XLA_FLAGS of the tests, and of the processes that they start."""

# Nearly all of the tests' time is compilation of programs that run once or twice: LLVM does not optimise them.
COMPILED_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def devices(count):
    """Return the flags of a process with so many CPU devices: the same texts, so that processes share their programs."""
    return f"--xla_force_host_platform_device_count={count} {COMPILED_FAST}"
