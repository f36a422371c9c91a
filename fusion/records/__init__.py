"""What a bucket holds of runs: paths, documents, checkpoints, pointers.

The documents are typed; their types, listed here, are what readers of a bucket import.
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
