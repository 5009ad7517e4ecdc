"""Views: one function per page, from a study to a JSON-ready dict. They load no language model.

The report embeds what they give; each says what to run when its stage has not been.
"""

from lorascope.views.ablation_tables import ablation_view
from lorascope.views.category_shares import category_view
from lorascope.views.compare import comparison_view
from lorascope.views.curves import training_curves
from lorascope.views.feature_list import feature_table
from lorascope.views.front import overview
from lorascope.views.gains import recovery_view
from lorascope.views.latents import sae_page
from lorascope.views.lens import feature_lens, lens_view
from lorascope.views.losses import dropped
from lorascope.views.making import provenance
from lorascope.views.maps import direction_map
from lorascope.views.one_feature import feature_page
from lorascope.views.one_trace import trace_page
from lorascope.views.reasoning import reasoning_view
from lorascope.views.scores import explanation_scores

__all__ = [
    "ablation_view",
    "category_view",
    "comparison_view",
    "direction_map",
    "dropped",
    "explanation_scores",
    "feature_lens",
    "feature_page",
    "feature_table",
    "lens_view",
    "overview",
    "provenance",
    "reasoning_view",
    "recovery_view",
    "sae_page",
    "trace_page",
    "training_curves",
]
