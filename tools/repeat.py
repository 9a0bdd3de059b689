"""`make test-repeat N=10`: the tests N times over, then how often each of them failed. For finding tests that fail now and then.

python -m tools.repeat 10 -- WORDS...        WORDS go to pytest
Ctrl-C ends it with the summary of the rounds that were whole.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter, defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# What pytest ends with when all passed, and when some failed; anything else is no round.
_PASSED, _FAILED = 0, 1


def failed_tests(report: Path) -> dict[str, str]:
    """Test -> the first line of what it said, for each that failed in a report of pytest."""
    found = {}
    for case in xml.parse(report).getroot().iter("testcase"):
        for fault in (*case.findall("failure"), *case.findall("error")):
            found[f"{case.get('classname')}::{case.get('name')}"] = (fault.get("message") or "").partition("\n")[0]
    return found


def summary(rounds: int, failures: dict[str, list[str]]) -> list[str]:
    """One line for each test that failed, the most frequent first, with what it said most often."""
    if not failures:
        return [f"{rounds} rounds, no test failed"]
    lines = [f"{rounds} rounds, {len(failures)} tests failed at least once:"]
    for test, said in sorted(failures.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"  {len(said)} of {rounds}  {test}  {Counter(said).most_common(1)[0][0][:160]}".rstrip())
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.repeat")
    parser.add_argument("rounds", type=int)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    failures: dict[str, list[str]] = defaultdict(list)
    done = 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            for number in range(1, options.rounds + 1):
                begun = time.monotonic()
                code = subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={report}", "--no-header", *options.words], cwd=REPOSITORY).returncode
                if code not in (_PASSED, _FAILED):
                    print(f"pytest ended with {code} in round {number}", file=sys.stderr)
                    return code
                done = number
                found = failed_tests(report)
                for test, said in found.items():
                    failures[test].append(said)
                print(f"round {number} of {options.rounds}: {len(found)} failed, {time.monotonic() - begun:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    print("\n".join(summary(done, failures)))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
