"""HTML pages that need no other file: one layout, light and dark, for the report of a run and of a study."""

from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

LAYOUT = "layout.html.jinja"


def render(package: str, template: str, **values: Any) -> str:
    """The HTML of a template of `package`, which may extend `layout.html.jinja`; values are escaped."""

    def source(name: str) -> str:
        folder = __name__ if name == LAYOUT else package
        return (files(folder) / name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
