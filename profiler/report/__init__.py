"""A routing profile as one HTML file that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from profiler.profile import RoutingProfile
from profiler.report.figures import figures_data
from profiler.report.glossary import GLOSSARY
from profiler.report.missing import missing_sections
from profiler.report.options import layer_options, pair_options, popularity_views
from profiler.report.summary import summarize
from profiler.report.tables import (
    active_table,
    convergence_table,
    drift_table,
    layer_table,
    potential_table,
    predictor_table,
    source_facts,
)

_FOLDER = Path(__file__).parent
# In this order: each file uses only what those before it define, and the last one draws the page.
_SCRIPTS = ("theme.js", "matrices.js", "heatmaps.js", "lines.js", "drift.js", "page.js")


def render_report(profile: RoutingProfile) -> str:
    """Lay out a profile as a page.

    Args:
        profile: everything that is shown; what is None in it is said in one line.

    Returns:
        HTML with style, script, charts' data and plotly.js within.
    """
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = "\n".join((_FOLDER / "script" / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    page = environment.get_template("page.html").render(
        model=_model_name(profile.source.model),
        facts=source_facts(profile),
        findings=summarize(profile),
        missing=missing_sections(profile),
        views=popularity_views(profile),
        layers=layer_options(profile),
        pairs=pair_options(profile),
        tables={
            "layers": layer_table(profile),
            "potentials": potential_table(profile),
            "active": active_table(profile),
            "convergence": convergence_table(profile),
            "domains": drift_table(profile.domain_drift, "domain"),
            "time": drift_table(profile.time_drift, "window"),
            "predictors": predictor_table(profile),
        },
        glossary=GLOSSARY,
        style=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()),
        script=Markup(script),
        data=_script_json(figures_data(profile)),
    )
    # Names in a file's JSON may hold halves of characters, which UTF-8 may not: they become ``?``.
    return page.encode("utf-8", "replace").decode()


def _script_json(value: object) -> Markup:
    """JSON that may stand in a script element, whatever strings it holds; refuses NaN and infinity."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _model_name(model: str) -> str:
    """A hub id as it is, of a local folder the last part alone: a page is shown to others."""
    return Path(model).name if Path(model).is_absolute() else model
