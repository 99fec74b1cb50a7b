"""The configuration: sections, presets, YAML in and out."""
