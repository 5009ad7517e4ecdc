"""`lorascope report`: one self-contained HTML file. Style sheet and script are files of their own, put into it here.

The page's Content-Security-Policy allows exactly that style sheet and that script (by their hashes) and no request.
"""

import base64
import hashlib
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from lorascope import __version__
from lorascope.config import Options
from lorascope.errors import RunFailed
from lorascope.report.charts import histogram
from lorascope.report.figures_of import (
    accuracy_bars,
    card_names,
    class_meaning,
    kl_bars,
    layer_chart,
    loss_chart,
    patched_bars,
    sae_chart,
)
from lorascope.report.flows import flow_chart, flow_table
from lorascope.report.gather import ReportConfig, gather
from lorascope.report.grids import decoder_map, layer_map, matrix_ticks, strongest_writes
from lorascope.report.marks import (
    bar_mark,
    bounds_words,
    interval_note,
    interval_words,
    percent_axis,
    scale_top,
    score_floor,
    score_mark,
    score_pair,
    score_words,
    share_bar,
)
from lorascope.report.numbers import (
    duration,
    figures,
    memory,
    minus,
    moment,
    percent,
    points,
    tick,
    whole,
    whole_percent,
)
from lorascope.report.rings import largest_subcategory, share_rings
from lorascope.report.scatter import link_target, listed_features, point_map, shape_defs, shape_mark, shown_features
from lorascope.report.tokens import heat_tokens, lone_text, plain_tokens, shown_text, token_list
from lorascope.store import INDEX
from lorascope.study import Study, atomic_write_bytes

LIMIT = 20 * 10**6
"""Largest report in bytes."""
MADE = ("train", "eval", "ablation", "examples", "explanations", "compare", "categories", "sae", "reasoning", "lens")
INPUTS = ("adapter", *MADE, "tokenizer")
CHARTS = (accuracy_bars, card_names, class_meaning, kl_bars, layer_chart, loss_chart, patched_bars, sae_chart)
MAPS = (histogram, layer_map, matrix_ticks)
MARKS = (decoder_map, strongest_writes, bar_mark, interval_words, percent_axis, scale_top, share_bar)
SCORES = (bounds_words, interval_note, score_floor, score_mark, score_pair, score_words)
NUMBERS = (duration, figures, tick, memory, minus, moment, percent, points, whole, whole_percent)
TOKENS = (heat_tokens, lone_text, plain_tokens, shown_text, token_list)
KINDS = (flow_chart, flow_table, largest_subcategory, share_rings)
POINTS = (link_target, listed_features, point_map, shape_defs, shape_mark, shown_features)
HELPERS: tuple[Callable[..., Any], ...] = (*CHARTS, *MAPS, *MARKS, *SCORES, *NUMBERS, *TOKENS, *KINDS, *POINTS)
"""What templates may call."""


def write_report(study: Study, config: ReportConfig, options: Options) -> dict[str, Any]:
    """Write `report.html`; the result is `{"report", "bytes", "directions", "latents", "traces", "missing"}`.

    Raises:
        BadInput: the config makes no sense.
        RunFailed: the file would be over 20 MB.
    """

    def work() -> dict[str, Any]:
        data = gather(study, config, options.seed)
        html = render_html(data).encode("utf-8")
        if len(html) > LIMIT:
            raise RunFailed(
                f"The report would have {len(html) / 1e6:.0f} MB; show less with --directions, --latents, --traces or "
                "--trace-tokens."
            )
        atomic_write_bytes(study.path / "report.html", html)
        return {
            "report": str(study.path / "report.html"),
            "bytes": len(html),
            "directions": len(data["directions"]),
            "latents": len(data["latents"]),
            "traces": len(data["traces"]["pages"]),
            "missing": missing_commands(data),
        }

    inputs = [name for name in INPUTS if (study.path / name).exists()]
    # A recording's index holds the hashes of its shards, which need not be read again.
    inputs += sorted(path.relative_to(study.path).as_posix() for path in study.path.glob(f"scalars/*/*/{INDEX}"))
    return study.run("report", config, options, inputs=inputs, outputs=["report.html"], work=work)


def missing_commands(data: dict[str, Any]) -> list[str]:
    """The commands that would fill the sections that are empty."""
    first = ("curves", "map", "ablation", "scores", "compare", "categories", "reasoning", "lens")
    views = [data[name] for name in (*first, "sae", "table", "traces")]
    views += [data["overview"]["recovery"], data["sae"].get("patched", {})]
    return list(dict.fromkeys(view["missing"]["run"] for view in views if "missing" in view))


def render_html(data: dict[str, Any]) -> str:
    """The whole page."""
    environment = make_environment(jinja2.PackageLoader("lorascope.report"))
    style, script = asset("report.css"), asset("shared.js") + asset("report.js")
    payload = data["traces"].get("data", {"features": [], "traces": []})
    return environment.get_template("report.html.j2").render(
        **data,
        style=Markup(style),
        script=Markup(script),
        policy=policy(style, script),
        payload=embedded_json(payload),
        version=__version__,
    )


def make_environment(loader: jinja2.BaseLoader) -> jinja2.Environment:
    """Templates that escape every value, fail on a name that is not there, and may call the `HELPERS`."""
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update({helper.__name__: helper for helper in HELPERS})
    return environment


def asset(name: str) -> str:
    """The text of a file that goes into the page."""
    return (resources.files("lorascope.report") / name).read_text(encoding="utf-8")


def policy(style: str, script: str) -> str:
    """A Content-Security-Policy that allows this style sheet and this script and nothing else."""
    own = f"style-src {hash_source(style)}; script-src {hash_source(script)}"
    return f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'"


def hash_source(text: str) -> str:
    """A text's hash as the policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"


def embedded_json(value: Any) -> Markup:
    """JSON that cannot end the element it is in, nor be read as markup."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
