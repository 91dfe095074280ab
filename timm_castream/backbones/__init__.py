"""timm's networks: which take a stream, where their stages are, and how a stream runs beside them."""
