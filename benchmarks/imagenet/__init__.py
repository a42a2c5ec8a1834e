"""The parts of `benchmarks.train_imagenet`."""
