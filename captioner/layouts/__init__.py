"""Writers: what trainers and loaders read."""
