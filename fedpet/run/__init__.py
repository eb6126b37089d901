"""One run: prepare, federate, write checkpoints and results, on Ray or any Grid."""
