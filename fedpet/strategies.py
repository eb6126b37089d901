"""Stands in for the folder `strategies/` in a checkout; the wheel holds the folder itself."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_spec = spec_from_file_location(__name__, Path(__file__).parents[1] / "strategies" / "__init__.py")
sys.modules[__name__] = module_from_spec(_spec)  # what the import statement hands out
_spec.loader.exec_module(sys.modules[__name__])
