"""One file per subcommand of `sphere`: parse, call, print. `experiments/` and `scripts/` are doors to them."""
