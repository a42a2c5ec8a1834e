"""Programs that measure jaxnorm, each run from the repository root:
`python -m benchmarks.batch_size`."""
