"""Layer thirds: early, middle and late in the model, whichever of its layers are adapted or recorded."""

from lorascope.addresses import direction_layer
from lorascope.store import INDEX, Store
from lorascope.study import Study

THIRDS = ("early", "middle", "late")


def layer_count(study: Study) -> int | None:
    """How many decoder layers the study's model has, as `record` wrote it into `study.json`.

    A study that was recorded before this was kept has 1 + its highest adapted layer (a recording of neurons, which may
    lie in any layer, changes nothing); None before any recording.
    """
    known = study.manifest.get("layers")
    if known is not None:
        return int(known)
    stores = [Store.open(path.parent) for path in sorted(study.path.glob(f"scalars/*/adapter/{INDEX}"))]
    layers = [layer for store in stores for name in store.addresses if (layer := direction_layer(name)) is not None]
    return 1 + max(layers) if layers else None


def layer_third(layer: int, count: int) -> str:
    """The third of the model's layers 0 to count - 1 that a layer is in."""
    return THIRDS[min(3 * layer // count, 2)]
