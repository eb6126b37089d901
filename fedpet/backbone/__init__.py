"""Load a pretrained checkpoint: its weights, its device, which of its modules can be adapted."""
