"""The core: what every normalization is made of. The map of the package says what is where."""
