"""For mkdocs: pages of the repository's root are part of the site, and links between them work there as in the
repository."""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "model_card.md")
FILES = ("LICENSE", "SECURITY.md", "training/configs/*.yaml")
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_files(files, config):
    taken = [file for pattern in (*PAGES, *FILES) for file in sorted(ROOT.glob(pattern))]
    for file in taken:
        name = file.relative_to(ROOT).as_posix()
        # a page, or a file to show as it is
        name = name if file.name in PAGES or file.suffix != ".md" else f"{name}.txt"
        files.append(File.generated(config, name, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of the repository -> links of the site, where what is in docs/ is at the top."""
    source = page.file.src_uri
    here = "" if source in PAGES else "docs"

    def moved(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(here, posixpath.dirname(source), found[2]))
        target = target.removeprefix("docs/")
        target = f"{target}.txt" if target in FILES and target.endswith(".md") else target
        return found[1] + posixpath.relpath(target, posixpath.dirname(source) or ".") + found[3]

    markdown = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
    return LINK.sub(moved, markdown)


def on_page_content(html, page, config, files):
    """Types in docstrings are Markdown, which the reference shows as it is."""
    if not page.file.src_uri.startswith("api/"):
        return html
    marks = re.compile(r"\[`|`\]|`|\*(?=optional)|(?<=optional)\*")
    return re.sub(r"<code>[^<]*</code>", lambda found: marks.sub("", found[0]), html)
