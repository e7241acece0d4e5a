"""Images in, rows out: for the stages of a round and for whole data sets.

``stages``      a stage's images captioned, or asked about
``prepare``     images read, decoded and cut ahead by other processes, within limits
``worker``      a bulk job's engine and what feeds it: read → prepare → caption → verify → row → part
``coordinator`` hands shards to workers, brings those back that died, finds what killed them
``leases``      which machine works on which shard
``output``      a Parquet file per input shard, logs of those underway, a manifest, a journal of what is done
``local``       workers and preparation as processes of this machine
``cluster``     the same on a Ray cluster
``watch``       progress, status file, tripwires
``estimate``    how long a job would take
"""
