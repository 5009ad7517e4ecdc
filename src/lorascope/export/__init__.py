"""Files for other tools: the adapter for PEFT, the SAE for SAELens, features for Neuronpedia, tables as CSV.

Nothing here loads a language model.
"""

from lorascope.export.settings import ExportConfig
from lorascope.export.stage import export_study

__all__ = ["ExportConfig", "export_study"]
