"""captioner: make an image captioner accurate and complete without human labels, then caption datasets."""

__version__ = "0.2.0.dev0"
