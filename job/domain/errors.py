"""Every way in which the job ends badly, and the exit code that tells a cluster about it.

The codes follow ``sysexits.h`` where it has one. The failure policy of the Kubernetes Jobs decides by
these numbers, so they are part of the product's interface; docs/reference.md lists them.
"""

from __future__ import annotations


class JobError(Exception):
    """An expected failure. Its message states the rule broken, the value received and what to do."""

    exit_code = 71


class UsageError(JobError):
    """An option or a combination of options cannot work."""

    exit_code = 2


class InvalidData(JobError):
    """Bytes were found, but they are not what they must be: checksum, size, format."""

    exit_code = 65


class MissingInput(JobError):
    """A folder, file, bucket or run that the user named does not exist."""

    exit_code = 66


class ResourceUnavailable(JobError):
    """A required GPU, a processor that TensorFlow can use, or a peer worker is missing or was lost."""

    exit_code = 69


class Diverged(JobError):
    """The loss or the weights are no longer finite."""

    exit_code = 70


class IdentityConflict(JobError):
    """The run exists with another identity, or workers differ in their runs or their devices."""

    exit_code = 73


class StorageFailed(JobError):
    """Storage or a download failed, also after retries."""

    exit_code = 74


class Interrupted(JobError):
    """A signal reached us; the last commit is intact and the same command continues from it."""

    exit_code = 75


class PermissionRefused(JobError):
    """Storage answered that we may not read or write there, or credentials are missing."""

    exit_code = 77


class Superseded(JobError):
    """A newer attempt owns the run (or its owner is alive on this host)."""

    exit_code = 79
