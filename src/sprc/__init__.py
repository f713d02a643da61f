"""SPRC with gated fusion: composed image retrieval on CIRR and FashionIQ."""
