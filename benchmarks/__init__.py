"""Compare fedpet with baselines that are tuned alike, and measure its costs. See README.md."""
