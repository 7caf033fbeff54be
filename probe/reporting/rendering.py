"""Pages of one file: a template, its style and its script, and the policy that lets these pass and nothing else.

Such a page asks no host for anything: a content-security policy names style and script by their hashes. Every name is
text, escaped by the template, or by JSON where the script reads it.
"""

import base64
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from probe.reporting.charts import number, percent
from probe.sources import display_name

_TEMPLATES = Path(__file__).parent / "templates"


@functools.cache
def environment(templates: Path) -> jinja2.Environment:
    """The templates of a folder: they escape everything, and fail on a name that is not there."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"percent": percent, "number": number, "display": display_name}
    return found


def render_page(name: str, context: dict[str, Any]) -> bytes:
    """A template with its style, its script and its policy. `data` of the context is what the script is given."""
    style, script = ((_TEMPLATES / name).read_text().strip() for name in ("report.css", "report.js"))
    page = (
        environment(_TEMPLATES)
        .get_template(name)
        .render(**context, **inlined(style, script), data_json=json_block(context["data"]))
    )
    return page.encode(errors="replace")  # a name that is no text has been made one before


def inlined(style: str, script: str) -> dict[str, Any]:
    """Style and script for a template, and the policy that lets these two pass and nothing else."""
    assert "</" not in script, "it would end the element that it stands in"
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return {"style": Markup(style), "script": Markup(script), "policy": policy}  # noqa: S704  both are our own files


def json_block(value: Any) -> Markup:
    """JSON for a script element that is only read: it cannot end the element, whatever names it holds."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # noqa: S704  escaped just now


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
