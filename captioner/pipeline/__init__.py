"""Bulk captioning: a coordinator hands shards to workers and publishes their rows.

``output``      one Parquet file per input shard, a manifest, a journal of what is done
``coordinator`` hands out shards, collects rows, brings workers back that died, finds what killed them
``worker``      an engine and what feeds it: read → prepare in other processes → caption → verify → rows
``local``       workers and preparation as processes of this machine
``cluster``     the same on a Ray cluster
``watch``       progress, status file, tripwires
``estimate``    how long a job would take
"""
