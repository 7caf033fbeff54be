"""The page: a template, its style and its script, and the policy that lets these pass and nothing else."""

from pathlib import Path
from typing import Any

from probe.reporting.rendering import environment, inlined, json_block

_TEMPLATES = Path(__file__).parent / "templates"


def render_page(context: dict[str, Any]) -> tuple[bytes, str]:
    """The page, and its content-security policy for a header: it asks this server and no other.

    Args:
      context: what the template shows; `data` of it is what the script is given.
    """
    style, script = ((_TEMPLATES / f"serve.{kind}").read_text().strip() for kind in ("css", "js"))
    parts = inlined(style, script)
    policy = f"{parts['policy']}; connect-src 'self'; frame-ancestors 'none'"
    page = (
        environment(_TEMPLATES)
        .get_template("serve.html")
        .render(**context, style=parts["style"], script=parts["script"], data_json=json_block(context["data"]))
    )
    return page.encode(errors="replace"), policy
