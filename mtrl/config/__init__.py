"""The configuration: sections, presets, YAML. It imports neither torch nor MuJoCo, for `--help`."""
