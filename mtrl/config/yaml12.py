"""YAML with the scalars of YAML 1.2 (core schema, https://yaml.org/spec/1.2.2/#103-core-schema).

PyYAML implements YAML 1.1, where `12:00` is 720, `010` is 8, `yes` is true and `1e6` is a string.
It also silently replaces the first of two equal keys by the second.

One deviation from the core schema: digits of an integer may be grouped, as in `20_000_000`.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

_BOOL = "true|True|TRUE|false|False|FALSE"
_DECIMAL = r"[-+]?[0-9]+(?:_[0-9]+)*"
_INT = rf"{_DECIMAL}|0o[0-7]+|0x[0-9a-fA-F]+"
_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_FLOAT = rf"{_NUMBER}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_WORD = re.compile(r"\.(?=[a-zA-Z])")  # the dot of `.inf` and `.nan`
_RESOLVERS = (  # the first match wins, because every integer also matches as a float
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
)


class Loader(yaml.SafeLoader):
    """YAML loader that rejects duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012, declared so by PyYAML

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping like PyYAML, but raise on duplicate keys."""
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            keys = [self.construct_object(key) for key, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        return found

    def _int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)

    def _float(self, node: yaml.ScalarNode) -> float:
        return float(_WORD.sub("", self.construct_scalar(node)))


class Dumper(yaml.SafeDumper):
    """YAML dumper that quotes every string `Loader` would parse as another type."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _kind in (Loader, Dumper):
    for _tag, _pattern, _first in _RESOLVERS:
        _whole = re.compile(rf"(?:{_pattern})\Z")
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, _first)
Loader.add_constructor("tag:yaml.org,2002:int", Loader._int)
Loader.add_constructor("tag:yaml.org,2002:float", Loader._float)


def load(text: str, loader: type[Loader] = Loader) -> Any:
    """Parse a YAML document into plain values.

    Raises:
        yaml.YAMLError: If the text is not YAML, or gives a key twice. A malicious text can make
            the parser raise any other exception.
    """
    return yaml.load(text, loader)


def dump(tree: Any) -> str:
    """Format plain values as YAML, in their order, such that `load` restores them."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False)
