"""Write what a run has trained in forms that other tools read: plain models, peft's adapters.

A plain Hugging Face folder serves everybody; an adapter of peft is small and needs the checkpoint
beside it. Each has a model card, and either may go to the Hugging Face Hub.
"""

from fedpet.export.hub_upload import push_to_hub
from fedpet.export.peft_adapter import export_peft
from fedpet.export.plain_model import write_model
from fedpet.export.saved_run import FORMATS, export_run, merge_run

__all__ = ["FORMATS", "export_peft", "export_run", "merge_run", "push_to_hub", "write_model"]
