"""The laboratory: pictures whose facts are known exactly, and how the shipped base was trained on them."""
