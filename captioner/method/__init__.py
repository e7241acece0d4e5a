"""ATAC: claims, verdicts, golden captions, pairs."""
