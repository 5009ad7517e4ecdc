"""The options of `lorascope export`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExportConfig:
    """Write files for other tools."""

    to: str
    """Format: peft (the adapter), saelens (the SAE), neuronpedia (its bulk import), csv (tables)."""
    output: str | None = None
    """Folder to write (default: export/FORMAT in the study). Exported again, it is replaced as a whole."""
    corpus: str = "train"
    """Corpus whose features and examples are written (neuronpedia, csv)."""
    examples: int = 20
    """Strongest examples per feature (neuronpedia), and those whose tokens are counted as top tokens (csv)."""
    per_quantile: int = 4
    """Examples per quantile of activation (neuronpedia)."""
    window: int = 24
    """Tokens on either side of an example (neuronpedia)."""
    name: str | None = None
    """Name of the release and its source sets (neuronpedia; default: the study's folder)."""
    model_id: str | None = None
    """Id of the base model there (neuronpedia; default: from the model's name)."""
    creator: str = "clkht01d40000jv08hvalcvly"
    """Id of the user who imports (neuronpedia; default: that of a local installation)."""
