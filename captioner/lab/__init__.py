"""The laboratory: pictures whose facts are known exactly, and how a base is trained on them."""
