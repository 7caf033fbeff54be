"""Pages of Chromium that are listened to."""

from typing import Any

VIEWS = {"light": ("light", 1200, 900), "dark": ("dark", 1200, 900), "phone": ("light", 390, 844)}


def new_page(browser: Any, view: str, said: list[str], asked: list[str]) -> Any:
    """A page in a context of its own, to be closed by the caller.

    What it writes on the console, by errors and dialogs too, is added to `said`; the addresses it asks for to `asked`.
    """
    scheme, width, height = VIEWS[view]
    page = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height}).new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    return page
