"""The job number in what sbatch printed, also where a site's wrapper prints more than sbatch does."""

import re

from jobs.core.errors import SubmissionUnknownError

# sbatch's line, with and without --parsable, and on a federation of clusters. A banner that mentions a number is no such line.
_ANSWER = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S+)?(?: on cluster \S+)?")


def job_number(output: str) -> str:
    """The last line that is a job number. Raises SubmissionUnknownError where none is: sbatch ended well, so a job may exist."""
    found = [match[1] for line in output.splitlines() if (match := _ANSWER.fullmatch(line.strip()))]
    if not found:
        raise SubmissionUnknownError(f"sbatch succeeded but printed no job number: {output.strip()[:200]!r}. Look for the job with: squeue --me -o '%i %j %k'")
    return found[-1]
