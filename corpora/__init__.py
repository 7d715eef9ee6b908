"""One short script per real corpus; each writes a folder of JSON Lines manifests and audio."""
