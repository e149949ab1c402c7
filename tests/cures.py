"""`make cures`: take one protection after another out of the code, and see the test fail that holds it.

A test that passes without what it protects protects nothing. Each cure is taken out of a copy of the repository; a unit
test keeps the list true to the code (tests/unit/test_cures.py).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_FAILED = 1  # pytest: some tests failed; anything higher says that nothing was tested
_SECONDS = 900


@dataclass(frozen=True, slots=True)
class Cure:
    """What protects, how it is taken out, and the tests of which one must fail then.

    cure occurs once in the file; without stands in its place.
    """

    name: str
    file: str
    cure: str
    without: str
    tests: str

    @property
    def words(self) -> list[str]:
        """The tests, as arguments of pytest."""
        path, _, wanted = self.tests.partition(" -k ")
        return [path, "-k", wanted] if wanted else [path]


CURES = (
    Cure(
        "bytes that are no UTF-8 are refused",
        "streams/records.py",
        '            str(value, "utf-8")  # msgspec does not look into fields that it skips\n',
        "",
        "tests/unit/test_records.py",
    ),
    Cure(
        "whatever a decoder raises is a rejection",
        "streams/records.py",
        "        except (msgspec.DecodeError, UnicodeDecodeError) as error:\n"
        '            raise Rejected("malformed", str(error)) from None\n'
        "        except Exception as error:\n"
        '            raise Rejected("malformed", f"{type(error).__name__}: {error}") from None\n',
        '        except msgspec.DecodeError as error:\n            raise Rejected("malformed", str(error)) from None\n',
        "tests/unit/test_records.py",
    ),
    Cure(
        "a record without a value is refused",
        "streams/records.py",
        '        if value is None:\n            raise Rejected("malformed", "a tombstone: no value")\n',
        "",
        "tests/unit/test_internal.py",
    ),
    Cure(
        "a codec that does not work is found at the start",
        "streams/codecs.py",
        "        if not works:\n",
        "        if False:\n",
        "tests/unit/test_record_batches.py",
    ),
    Cure(
        "what is fetched inflates in a bounded stream",
        "streams/fetched.py",
        "    fetcher.MemoryRecords = _RecordBatches\n"
        "    fetcher.PartitionRecords = _Records\n"
        "    fetcher.FetchResult = _Fetched\n",
        "    pass\n",
        "tests/fuzz/test_fuzz.py",
    ),
    Cure(
        "the key of a dead letter is cut",
        "sinks/outbox.py",
        '        headers["key_truncated"] = str(len(letter.key))\n',
        "        pass\n",
        "tests/integration/test_bounds_sql.py -k letter",
    ),
    Cure(
        "no two positions share a message key",
        "sinks/model.py",
        'id_.replace("\\\\", "\\\\\\\\").replace("|", "\\\\|")',
        "id_",
        "tests/integration/test_bounds_sql.py -k share",
    ),
    Cure(
        "an internal record counts only under its own key",
        "streams/internal.py",
        "        if record.key != found.security_id.encode():\n",
        "        if False:\n",
        "tests/unit/test_internal.py",
    ),
    Cure(
        "a job stands for a correction of its security",
        "sinks/resets.py",
        '    return {row["job_id"] for row in rows}\n',
        "    return {job.job_id for job in jobs}\n",
        "tests/integration/test_herd_sql.py",
    ),
    Cure(
        "the reset rate has a range",
        "sinks/ranges.py",
        "RESET_RATE = Real(1, 1e9)\n",
        "RESET_RATE = Real(-1e309, 1e309)\n",
        "tests/unit/test_ranges.py",
    ),
    Cure(
        "a body that cannot be read is a bad request",
        "streams/web/parameters.py",
        "    except (web.RequestPayloadError, HttpProcessingError) as error:\n"
        '        raise Problem("invalid", f"the body cannot be read: {type(error).__name__}") from None\n',
        "    finally:\n        pass\n",
        "tests/web/test_hostile.py -k stumble or odd",
    ),
    Cure(
        "the stored offset moves over holes",
        "streams/transport.py",
        "        return is_still and self._left[tp] > position and held is not None and held.next_offset == position\n",
        "        return False\n",
        "tests/fuzz/test_fuzz.py -k markers",
    ),
    Cure(
        "a batch that keeps failing shrinks",
        "sinks/failures.py",
        "    return failure is Failure.LIMIT or in_a_row >= _REPEATED\n",
        "    return False\n",
        "tests/integration/test_offsets.py -k too_much",
    ),
    Cure(
        "claims that came to nothing are counted",
        "sinks/claiming.py",
        "                  else o.barren + 1 end\n",
        "                  else o.barren end\n",
        "tests/integration/test_offsets.py -k nothing",
    ),
    Cure(
        "a claim that was given up in order is not counted",
        "sinks/claiming.py",
        "                  when o.released or o.next_offset",
        "                  when o.next_offset",
        "tests/integration/test_offsets.py -k nothing",
    ),
    Cure(
        "a partition that nobody survives is read in trial",
        "streams/trials.py",
        "_BARREN = 2  # claims in a row\n",
        "_BARREN = 10**9\n",
        "tests/integration/test_poison.py -k each",
    ),
    Cure(
        "a death counts only where another record passes",
        "streams/trial.py",
        "            passes = bool(found) and await self._subject.vouch(self._batch(found[0]))\n",
        "            passes = True\n",
        "tests/integration/test_poison.py -k condemns_none",
    ),
    Cure(
        "a host that does not answer is given up",
        "sinks/session.py",
        "        if self._asked is None or self._session.is_closed():\n            return\n        left",
        "        return\n        left",
        "tests/integration/test_silent_postgres.py -k sink",
    ),
    Cure(
        "a job's row is locked before its security's",
        "sinks/resets.py",
        "    await connection.execute(_HOLD, [job.job_id])\n",
        "",
        "tests/integration/test_lock_order.py",
    ),
    Cure(
        "each worker of the valuation begins at a place of its own",
        "sinks/claims.py",
        '        share = place(row["slot"] or 0)\n',
        "        share = 0.0\n",
        "tests/integration/test_claims_sql.py -k others",
    ),
    Cure(
        "what lies before the place where a worker began comes afterwards",
        "sinks/claims.py",
        '                self._cursors[security] = ""\n',
        "                self._halfway.add(security)\n",
        "tests/integration/test_claims_sql.py -k middle",
    ),
    Cure(
        "the watermarks of a claim are moved on by index",
        "sinks/valuation.py",
        "    await connection.execute(BY_INDEX)  # a merge join would begin at the security's first key, each time\n",
        "",
        "tests/integration/test_claims_sql.py -k closed",
    ),
    Cure(
        "dates share a key",
        "streams/produce.py",
        "    if topic == topics.BUSINESS_DATES:\n        return DATES_KEY\n",
        "",
        "tests/unit/test_produce.py",
    ),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 when some test passes although its cure is gone."""
    parser = argparse.ArgumentParser(prog="make cures", description=__doc__)
    parser.add_argument("--only", default="", help="those with this in their name or file")
    only = parser.parse_args(arguments).only
    wanted = [cure for cure in CURES if only in cure.name or only in cure.file]
    useless = []
    for number, cure in enumerate(wanted, 1):
        started = time.monotonic()
        print(f"{number}/{len(wanted)} without: {cure.name} …", end=" ", flush=True)
        code, said = without(cure)
        print(
            f"{'noticed' if code == _FAILED else f'NOT NOTICED (pytest: {code})'}, {time.monotonic() - started:.0f} s"
        )
        if code != _FAILED:
            useless.append(cure)
            print(said[-2_000:])
    print(f"{len(wanted) - len(useless)} of {len(wanted)} noticed")
    sys.exit(bool(useless) or not wanted)


def without(cure: Cure) -> tuple[int, str]:
    """What pytest says of a copy without the cure: its exit code and its last words."""
    with tempfile.TemporaryDirectory(prefix="tidemark-cure-") as name:
        copy = Path(name) / "tidemark"
        shutil.copytree(_ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "*_cache", "__pycache__", "build"))
        Path(name).chmod(0o711)
        file = copy / cure.file
        file.write_text(taken_out(cure, file.read_text()))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *cure.words],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    return done.returncode, done.stdout + done.stderr


def taken_out(cure: Cure, text: str) -> str:
    """The file without the cure. Raises ValueError unless the cure occurs exactly once."""
    if text.count(cure.cure) != 1:
        raise ValueError(f"{cure.file} has {text.count(cure.cure)} of: {cure.cure}")
    return text.replace(cure.cure, cure.without)


if __name__ == "__main__":
    main()
