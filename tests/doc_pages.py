"""What README and manual show: their pages, commands and Python examples."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(p for p in ROOT.glob("docs/**/*.md") if p.name != "contributing.md")]

TESTED_ELSEWHERE = {
    "any_model",
    "clusters",
    "custom_tasks",
    "demonstrations",
    "fine_tuning",
    "hooks",
}
"""Pages whose commands and examples are tested beside the code they are about."""

SHOWN = [page for page in PAGES if page.stem not in TESTED_ELSEWHERE]
"""Pages whose commands and examples are tested with the manual."""


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[str]:
    """The lines of ```bash blocks, and those indented by four spaces that call a program."""
    text = read(path)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^ {4}((?:mtrl-|pip |python |tensorboard ).*)$", prose, re.MULTILINE)
    return [part.strip() for line in lines for part in line.split(" && ") if part.strip()]


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", read(path), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[`*]|\[(.*?)\]\(.*?\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in plain}


def links(path: Path) -> list[str]:
    """Targets of links and pictures that are not on the web."""
    text = re.sub(r"^```.*?^```", "", read(path), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in found if not re.match(r"\w+:", target)]
