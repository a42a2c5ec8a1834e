"""Programs that measure jaxnorm. Each is run as a module from the repository root: `python -m benchmarks.batch_size`."""
