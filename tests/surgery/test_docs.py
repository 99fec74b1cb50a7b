"""The code on the page about any model runs as printed."""

import re

import pytest
import torch

PAGE = "docs/any_model.md"


@pytest.mark.parametrize("title", ["", "Lightning", "Hugging Face"])
def test_the_page_runs(title, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = (request.config.rootpath / PAGE).read_text(encoding="utf-8")
    sections = dict(re.findall(r"^#+ (.*?)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    first, *_ = sections.values()
    torch.manual_seed(0)
    space: dict[str, object] = {}
    exec(code(first), space)
    if title:
        exec(code(sections[title]), space)
    assert space["model"].last.cosines.shape == (2, 2)


def code(section: str) -> str:
    (found,) = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    return found
