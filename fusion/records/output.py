"""The folder that all runs and submissions are written to, which `--output` names.

    runs/<run id>/                           see `fusion.records.run`
    submissions/<name>/<date>/<digest>/      see `fusion.submissions.submission`
    pointers/runs/<variant>/<name>.json      see `fusion.records.best_run`
    pointers/submissions/<name>/current.json
    reports/                                 pages about several runs, see `fusion.report`
    parts/<name>/                            chunks of a prediction that has not finished

The key of a submission is its path below `submissions/`: `<name>/<date>/<digest>`.
"""

from __future__ import annotations

from fusion.records import pointers
from fusion.records.manifests import Folder
from fusion.records.run import RunFolder
from fusion.records.schemas import SubmissionPointer


class OutputFolder(Folder):
    """An output, identified by the URL of its folder."""

    def runs(self) -> list[RunFolder]:
        return [RunFolder(folder.url) for folder in self.ls("runs")]

    def submission(self, key: str) -> Folder:
        return Folder(self.at("submissions", key))

    def submissions(self, name: str, date: str) -> list[Folder]:
        """The submissions of this name and date, committed or not."""
        return self.ls("submissions", name, date)

    def current_url(self, name: str) -> str:
        """URL of the pointer to the submission that is published under a name."""
        return pointers.url(self.url, "submissions", name, "current")

    def current(self, name: str) -> SubmissionPointer | None:
        """The pointer at `current_url`; None if it does not exist, or, with a warning in the log, is damaged."""
        return pointers.read(SubmissionPointer, self.url, "submissions", name, "current")


def key_of(submission: Folder) -> str:
    return "/".join(submission.url.split("/")[-3:])
