"""Linear probes: what the speech tokens keep of the encoder's features (docs/probes.md)."""
