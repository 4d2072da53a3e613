"""What `mkdocs build` does in addition: navigation from the contents page, notebooks as pages, and links out of
`docs/`.

The pages are written for readers of the repository, where a link may lead to any file. On the site such a file gets a
page of its own, so that the link works there too, without a network.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(?<!\\)(\]\()([^)\s#]+)([^)\s]*\))")
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SOURCES = "source"
"""The site's folder for files from outside `docs/`."""


def on_config(config: Any) -> Any:
    """The navigation: the pages in the order of the contents page, under its headings of both levels."""
    navigation: list[Any] = [{"Contents": "index.md"}]
    section = group = navigation
    for line in (Path(config.docs_dir) / "index.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = group = []
            navigation.append({line[3:].strip(): section})
        elif line.startswith("### "):
            group = []
            section.append({line[4:].strip(): group})
        elif line.startswith(("|", "- ")):
            group.extend(_page_of(link) for _, link, _ in LINK.findall(line))
    config.nav = navigation
    return config


def on_files(files: Files, config: Any) -> Files:
    """Pages for notebooks, and for files outside `docs/` that pages link to."""
    docs, outside = Path(config.docs_dir), set[str]()
    for notebook in sorted((docs / "notebooks").glob("*.ipynb")):
        name = f"notebooks/{notebook.name}"
        files.append(File.generated(config, _page_of(name), content=notebook_page(notebook)))
    for file in list(files.documentation_pages()):
        links = LINK.findall(FENCED.sub("", file.content_string))
        outside |= {path for _, link, _ in links if (path := _path(file.src_uri, link)).startswith("../")}
    for path in sorted(outside):
        if (target := docs / path).is_file():
            files.append(
                File.generated(config, _source_page(path), content=source_page(target, path.removeprefix("../")))
            )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """A page whose links to notebooks and to files outside `docs/` lead to the pages made of them."""
    here = page.file.src_uri
    if here.startswith(f"{SOURCES}/"):
        return markdown

    def rewritten(link: re.Match[str]) -> str:
        path = _path(here, link[2])
        to = _source_page(path) if path.startswith("../") else _page_of(path)
        if to == path or files.get_file_from_path(to) is None:
            return link[0]
        return f"{link[1]}{relpath(to, str(PurePosixPath(here).parent))}{link[3]}"

    parts = re.split(f"({FENCED.pattern})", markdown, flags=FENCED.flags)
    return "".join(part if i % 2 else LINK.sub(rewritten, part) for i, part in enumerate(parts))


def notebook_page(notebook: Path) -> str:
    """A notebook as Markdown: text, fenced code, outputs, and a link to the file under the title."""
    cells = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        cells.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        cells += [output_block(output) for output in cell.get("outputs", [])]
    title, _, rest = "\n\n".join(cells).partition("\n")
    return f"{title}\n\n[Download the notebook]({notebook.name}){{ download }}\n{rest}\n"


def output_block(output: dict[str, Any]) -> str:
    """The output of a cell: a picture, a table, or text."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    kind = next(kind for kind in ("image/png", "text/html", "text/plain") if kind in data)
    content = "".join(data[kind]).strip()
    if kind == "image/png":
        return f'<img alt="The figure of the cell above" src="data:image/png;base64,{content}">'
    if kind == "text/html":
        # A blank line would end the block of HTML.
        return "<div>" + "\n".join(line for line in content.splitlines() if line.strip()) + "</div>"
    return f"```text\n{content}\n```"


def source_page(path: Path, name: str) -> str:
    """A page with a file's text."""
    language = {".py": "python", ".toml": "toml", ".md": "markdown"}.get(path.suffix, "text")
    return f"# {name}\n\n````{language}\n{path.read_text(encoding='utf-8')}\n````\n"


def _path(page: str, link: str) -> str:
    """The target of a link, relative to `docs/`. A web address is unchanged."""
    return link if "://" in link or link.startswith("mailto:") else normpath(str(PurePosixPath(page).parent / link))


def _page_of(path: str) -> str:
    return f"{path}.md" if path.endswith(".ipynb") else path


def _source_page(path: str) -> str:
    return f"{SOURCES}/{path.removeprefix('../')}.md"
