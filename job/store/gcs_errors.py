"""What an error of Google Cloud Storage means: try again, or tell the user what to do."""

from __future__ import annotations

import errno
import json
import os
import re

import requests
import urllib3
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.cloud.storage.exceptions import InvalidResponse

from job.domain.errors import JobError, MissingInput, PermissionRefused, StorageFailed


class Corrupted(Exception):
    """The bytes changed on the way."""


class SessionLost(Exception):
    """The server no longer knows a resumable upload: begin it again."""


_MAY_HEAL = (
    Corrupted,
    SessionLost,
    auth.TransportError,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    json.JSONDecodeError,  # half an answer
    ConnectionError,
    TimeoutError,
)
_MALFORMED = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.MissingSchema,
)


def may_heal(error: Exception) -> bool:
    """Say whether the same request may succeed a little later."""
    if isinstance(error, api.GoogleAPICallError | InvalidResponse):
        code = status_of(error)
        damaged = code == 400 and re.search(r"crc32c|md5|checksum|hash", str(error), re.IGNORECASE)
        return code in (408, 429) or code >= 500 or bool(damaged)
    if isinstance(error, auth.RefreshError):
        return error.retryable or isinstance(error.__cause__, auth.TransportError)
    if isinstance(error, auth.DefaultCredentialsError):  # a new pod's metadata server can be late
        return "KUBERNETES_SERVICE_HOST" in os.environ and not _key_file()
    return isinstance(error, _MAY_HEAL) and not isinstance(error, _MALFORMED)


def status_of(error: Exception) -> int:
    """Return the HTTP status that an error of the client stands for, 0 if none."""
    if isinstance(error, InvalidResponse):
        return int(error.response.status_code)
    return int(getattr(error, "code", None) or 0)


def explained(what: str, location: str, error: Exception) -> JobError:
    """Return the error that tells the user what to do. ``what``: the act that failed, as in "read x in"."""
    bucket = location.removeprefix("gs://").partition("/")[0]
    if may_heal(error):
        no_credentials = isinstance(error, auth.DefaultCredentialsError)
        advice = _credentials_advice() if no_credentials else "Check the network."
        return StorageFailed(
            f"Could not {what} {location}: {error}. Tried again until the time was used up. {advice} What "
            "was committed before is intact: run the same command again."
        )
    if isinstance(error, auth.GoogleAuthError):
        return PermissionRefused(f"Cannot {what} {location}. {_credentials_advice()} The reason: {error}")
    if status_of(error) in (401, 403):
        return PermissionRefused(
            f"Not allowed to {what} {location}. {_role_advice(what, bucket)} The service said: {error}"
        )
    if status_of(error) == 400 and "requester pays" in str(error):
        return PermissionRefused(
            f"Cannot {what} {location}: its requests are paid by who makes them. Name the project that "
            f"pays in JOB_GCS_PROJECT. The service said: {error}"
        )
    if isinstance(error, api.NotFound):
        return no_bucket(location)
    return StorageFailed(f"Could not {what} {location}: {error}")


def no_bucket(location: str) -> MissingInput:
    """Return the error for a bucket that does not exist."""
    bucket = "gs://" + location.removeprefix("gs://").partition("/")[0]
    return MissingInput(
        f"There is no bucket {bucket}. Correct the name, or create it: gcloud storage buckets create {bucket}"
    )


def _role_advice(what: str, bucket: str) -> str:
    advice = (
        f"Grant roles/storage.objectUser on gs://{bucket} (roles/storage.objectViewer is enough for data) to "
        "the identity of the job: with Workload Identity, its Kubernetes service account."
    )
    if what.startswith(("replace", "delete")):
        advice += (
            " That role can replace and delete, which roles/storage.objectCreator cannot. A retention "
            "policy, an object's retention or a hold forbids it to everybody: then use a bucket without. "
            f"See: gcloud storage buckets describe gs://{bucket}"
        )
    return advice


def _key_file() -> str:
    return os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")


def _credentials_advice() -> str:
    if path := _key_file():
        try:
            with open(path, "rb"):
                fault = "is not usable"
        except OSError as error:
            fault = "is a folder" if error.errno == errno.EISDIR else f"cannot be read ({error.strerror})"
        return (
            f"GOOGLE_APPLICATION_CREDENTIALS names {path}, which {fault}. Name a readable file with "
            "credentials, or remove the variable."
        )
    return (
        "There are no usable credentials. Log in with `gcloud auth application-default login`, or in "
        "Kubernetes let the service account use Workload Identity."
    )
