"""What fedpet is compared with, and how: baselines, tuned like fedpet, and the table of all."""
