"""Know before you run: will a model fit, how fast can it be, and what would bound it."""
