"""Qwen-VL models: load, tune, render, fuse."""
