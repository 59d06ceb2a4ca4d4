"""From a template to a page that stands alone: styles and scripts inline and named by hash in the policy, whatever it is given escaped.

Used by the page of a cache (`pipelines.page`) and by the report of a sweep (`pipelines.sweep.report`), which have their look, their charts and the
behaviour of `common.js` in common.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from kdcache.console import counted, human_bytes, human_seconds, visible
from kdcache.errors import StoreError


def render_page(template: str, *, package: str, styles: Sequence[str] = (), scripts: Sequence[str] = (), **context: Any) -> bytes:
    """`template` of `package`, UTF-8. styles, scripts: files of the package, after those that every page has; they stand where the template has
    `style` and `script`, and their hashes are `style_hash` and `script_hash`."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return value if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable() else visible(value)

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in (package, __package__)]),
        autoescape=True, undefined=StrictUndefined, finalize=finalize, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "counted": counted,
        "bytes": human_bytes,
        "seconds": human_seconds,
        "number": _number,
        "figure": _figure,
        "percent": _percent,
    }
    style, script = _joined("page.css", package, styles), _joined("common.js", package, scripts)
    return (
        environment.get_template(template)
        .render(**context, style=Markup(style), script=Markup(script), style_hash=_hash(style), script_hash=_hash(script))
        .encode("utf-8")
    )


def _joined(first: str, package: str, names: Sequence[str]) -> str:
    texts = [resources.files(__package__).joinpath(first).read_text("utf-8")]
    return "".join([*texts, *(resources.files(package).joinpath(name).read_text("utf-8") for name in names)])


def replace_page(file: str, page: bytes, *, remedy: str) -> None:
    """Write a page whole or not at all. Raises StoreError, which says `remedy`."""
    target = Path(file)
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as part:
            part.write(page)
        os.chmod(part.name, 0o666 & ~_umask())
        os.replace(part.name, target)
    except OSError as error:
        raise StoreError(f"{file} can't be written: {error.strerror}; {remedy}") from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _hash(text: str) -> str:
    """As a content security policy names what may stand in the page."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _number(value: float) -> str:
    """1,234"""
    return f"{value:,.0f}"


def _figure(value: float | None) -> str:
    """Three digits, as measured figures are written; nothing for None."""
    return "" if value is None else f"{value:.3g}"


def _percent(value: float) -> str:
    """A share as a percentage: two digits below 10, one above."""
    percent = 100 * value
    return f"{percent:.1f}" if percent >= 9.995 else f"{percent:.2f}" if percent >= 0.005 or percent == 0 else "< 0.01"
