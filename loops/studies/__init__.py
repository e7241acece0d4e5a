"""One module per study: a claim of the method, measured on the scenes by ``captioner study NAME``.

A module has a docstring whose first line is the question, ``COLUMNS`` (metric -> title), beside it
NAME.toml with its sizes, and
``measure(config, work) -> Iterator[(arm, metrics)]`` for one seed (``config.seed``).
``work`` is a directory of the seed's own in which a killed study finds what it had done. PAIRED, if there,
is the arm that the others are compared with.
"""
