"""A hook of MkDocs: docs/notebook.ipynb, which a code host shows by itself, is a page of the site, too."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

SOURCE, PAGE = "notebook.ipynb", "notebook.md"


def as_markdown(notebook: dict[str, Any]) -> str:
    """Cells of text as they are, cells of code as blocks, each with what it shows."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", source))  # what it links to is not on the site
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            html, plain = output.get("data", {}).get("text/html"), output.get("text")
            if html:
                parts.append(f'<div class="shown">\n{"".join(html)}\n</div>')
            elif plain:
                parts.append(f"```text\n{''.join(plain)}\n```")
    return "\n\n".join([*parts, f"The notebook itself, to be run: [{SOURCE}]({SOURCE})."]) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Adds the page."""
    path = Path(config["docs_dir"]) / SOURCE
    content = as_markdown(json.loads(path.read_text(encoding="utf-8")))
    files.append(File.generated(config, PAGE, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Other pages link to the page in place of the file."""
    return markdown if page.file.src_uri == PAGE else markdown.replace(f"{SOURCE})", f"{PAGE})")
