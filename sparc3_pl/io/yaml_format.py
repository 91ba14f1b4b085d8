"""YAML as this program reads and writes it: one dialect for both, so that what was written is read back as it was.

Numbers are those of YAML 1.2, as on a command line: ``1e-4`` and ``77950e8`` are floats, ``012`` is twelve and ``1:30``
a text. Beside ``true`` and ``false``, ``yes``, ``no``, ``on`` and ``off`` are truth values. A key that stands twice in
a mapping is refused.
"""

import re
from typing import Any

import yaml

__all__ = ["dump_yaml", "load_yaml"]

_INT = re.compile(r"[-+]?(?:0b[01][01_]*|0o[0-7][0-7_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|[0-9][0-9_]*)$")
_FLOAT = re.compile(
    r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_OURS = {"int": _INT, "float": _FLOAT, "timestamp": None, "value": None}
"""Resolvers in place of PyYAML's, by the last part of their tags."""
_TAG = "tag:yaml.org,2002:"


class _Rules(yaml.constructor.SafeConstructor):
    """What both loaders have in common."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if not hasattr(node, "is_flat"):  # what ``<<`` merged into it may stand in it too
            _refuse_twice(node)
            node.is_flat = True
        super().flatten_mapping(node)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        return int(text, 0 if re.match(r"[-+]?0[box]", text) else 10)


def _refuse_twice(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if (key.tag, str(key.value)) in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key.value!r} stands twice in one mapping", key.start_mark
            )
        seen.add((key.tag, str(key.value)))


class _Loader(_Rules, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    pass


class _PureLoader(_Rules, yaml.SafeLoader):
    r"""A loader without libyaml, which refuses the escapes (``\udcff``) of a path's bytes that are not UTF-8."""


class _Dumper(yaml.SafeDumper):
    """Quotes every text that PyYAML's resolvers or ours would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if data.isprintable() else '"'  # with escapes; a lone NEL or CR is lost in any other style
        return self.represent_scalar(f"{_TAG}str", data, style)


for _class in (_Loader, _PureLoader):
    _class.yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) not in _OURS]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_constructor(f"{_TAG}int", _class.construct_int)
for _class in (_Loader, _PureLoader, _Dumper):
    for _name in ("int", "float"):
        _class.add_implicit_resolver(_TAG + _name, _OURS[_name], list("-+.0123456789"))
_Dumper.add_representer(str, _Dumper.represent_str)


def load_yaml(text: str) -> Any:
    """The value that ``text`` holds; None for a text without any.

    Raises:
        yaml.YAMLError: if it is not YAML, or a key stands twice in a mapping.
    """
    loader = _PureLoader if re.search(r"\\u[dD][89a-fA-F]", text) else _Loader
    try:
        return loader(text).get_single_data()
    except ValueError as error:  # as for ``!!int x``
        raise yaml.YAMLError(str(error)) from error


def dump_yaml(value: Any, sort_keys: bool = False) -> str:
    """``value`` as YAML that ``load_yaml`` reads back as it was; keys keep their order unless ``sort_keys``."""
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=sort_keys)
