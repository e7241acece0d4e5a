"""The base's training forward equals the stock one; what was made loads where it should."""
