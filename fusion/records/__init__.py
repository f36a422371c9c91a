"""Reads and writes the folder of a run in a bucket: its paths, JSON documents, checkpoints, and the pointers to it.

Each JSON document has a typed schema. Code that reads a bucket can import the schemas listed here.
"""

from fusion.records.schemas import (
    AblationRecord,
    AttemptEnd,
    AttemptStart,
    CheckpointManifest,
    Effect,
    EnsembleMember,
    EnsembleRecord,
    FileEntry,
    IntervalBin,
    Intervals,
    LeaseRecord,
    Manifest,
    MetricsManifest,
    Night,
    Pulled,
    RunFacts,
    RunPointer,
    SourceWorth,
    SubmissionManifest,
    SubmissionPointer,
)

__all__ = [
    "AblationRecord",
    "AttemptEnd",
    "AttemptStart",
    "CheckpointManifest",
    "Effect",
    "EnsembleMember",
    "EnsembleRecord",
    "FileEntry",
    "IntervalBin",
    "Intervals",
    "LeaseRecord",
    "Manifest",
    "MetricsManifest",
    "Night",
    "Pulled",
    "RunFacts",
    "RunPointer",
    "SourceWorth",
    "SubmissionManifest",
    "SubmissionPointer",
]
