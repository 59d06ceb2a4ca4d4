"""Stores: create-if-absent under real races, nothing outside the folder, nothing lost when a process dies or a disk refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import Forked, run_python

from kdcache.errors import MissingError, StoreError, UsageError
from kdcache.store import LocalStore, open_store
from kdcache.store.local import MAX_OPEN_FILES
from kdcache.testing import check_store


def test_local_store_keeps_the_contract(tmp_path: Path) -> None:
    folders = iter(range(100))
    check_store(lambda: LocalStore(tmp_path / str(next(folders))))


def test_of_eight_processes_exactly_one_creates_an_object(tmp_path: Path) -> None:
    """They wait at a pipe for one another, so that they race."""
    opened, closed = os.pipe()

    def race(me: int) -> None:
        os.close(closed)
        store = LocalStore(tmp_path / "store")
        os.read(opened, 1)  # ends when the last who could write has closed
        (tmp_path / f"{me}.json").write_text(json.dumps([store.put_new(f"f/{i}", bytes([me]) * 100_000) for i in range(20)]))

    processes = [Forked(partial(race, me), tmp_path / f"{me}.log") for me in range(8)]
    os.close(closed)
    assert [process.wait(60) for process in processes] == [0] * 8
    os.close(opened)
    won = [json.loads((tmp_path / f"{me}.json").read_text()) for me in range(8)]
    store = LocalStore(tmp_path / "store")
    for i in range(20):
        winners = [process for process in range(8) if won[process][i]]
        assert len(winners) == 1
        assert store.get(f"f/{i}", max_size=100_000) == bytes([winners[0]]) * 100_000
    assert len(list(store.list())) == 20
    assert not (tmp_path / "store" / "tmp").exists()


def test_what_a_killed_process_spooled_is_swept_and_a_live_attempt_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom kdcache.store import LocalStore\n"
        "spool = LocalStore(sys.argv[1]).new_spool(); (spool / 'big').write_bytes(bytes(1000)); print(spool, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    store = LocalStore(tmp_path)
    ours = store.new_spool()
    assert store.sweep_spools() == 0
    assert (theirs / "big").exists()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert store.sweep_spools() == 1
    assert not theirs.exists()
    assert ours.exists()
    store.drop_spool(ours)
    assert not (tmp_path / "tmp").exists()


def test_a_spool_killed_before_it_was_locked_is_swept(tmp_path: Path) -> None:
    (tmp_path / "tmp" / "abc").mkdir(parents=True)
    (tmp_path / "tmp" / "stray").write_text("not ours")
    assert LocalStore(tmp_path).sweep_spools() == 1
    assert os.listdir(tmp_path / "tmp") == ["stray"]


def test_a_spool_killed_while_it_is_dropped_is_swept(tmp_path: Path) -> None:
    """Its lock is what it is known by, so the lock goes last."""
    code = (
        "import os, shutil, signal, sys\nfrom pathlib import Path\nfrom kdcache.store import LocalStore\n"
        "store = LocalStore(sys.argv[1]); spool = store.new_spool()\n"
        "for name in ('a', 'z'): (spool / name).mkdir(); (spool / name / 'file').write_text('x')\n"
        "remove = shutil.rmtree\n"
        "def killed(path, *rest, **options):\n"
        "    if Path(path) == spool: (spool / 'lock').unlink()\n"  # a folder's entries go in any order
        "    else: remove(path)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shutil.rmtree = killed; store.drop_spool(spool)"
    )
    assert run_python(code, tmp_path, check=False).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    assert LocalStore(tmp_path).sweep_spools() == 1
    assert not (tmp_path / "tmp").exists()


def test_a_full_disk_is_an_error_and_nothing_before_it_is_lost(tmp_path: Path) -> None:
    """The limit on a file's size stands for the disk's: write() fails in the same place."""
    LocalStore(tmp_path).put_new("before", b"kept")
    code = (
        "import resource, sys\nfrom kdcache.store import LocalStore\nfrom kdcache.errors import StoreError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "try: LocalStore(sys.argv[1]).put_new('after', bytes(100_000))\n"
        "except StoreError as error: print(error)"
    )
    assert "after can't be written: File too large; nothing that was there before is lost" in run_python(code, tmp_path).stdout
    store = LocalStore(tmp_path)
    assert dict(store.list()) == {"before": 4}
    assert not (tmp_path / "tmp").exists()


def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "cache")
    store.put_new("before", b"kept")
    (tmp_path / "cache").chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents[:3]):  # of the session, the process, the user: another user must be able to get there
        if folder.stat().st_mode & 0o055 != 0o055:
            folder.chmod(folder.stat().st_mode | 0o055)
    code = (
        "import os, sys\nfrom kdcache.store import LocalStore\nfrom kdcache.errors import StoreError\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "store = LocalStore(sys.argv[1]); print(store.get('before', max_size=9))\n"
        "for path in ('after', 'f/after'):\n"
        "    try: store.put_new(path, b'x')\n"
        "    except StoreError as error: print(error)"
    )
    lines = run_python(code, tmp_path / "cache").stdout.splitlines()
    (tmp_path / "cache").chmod(0o755)
    assert lines[0] == "b'kept'"
    assert all("Permission denied" in line for line in lines[1:])
    assert len(lines) == 3


def test_a_file_in_the_way_of_a_cache_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = LocalStore(tmp_path / "file")
    assert store.size("cache.json") is None
    with pytest.raises(StoreError, match=r"Not a directory; expected a writable folder"):
        store.put_new("cache.json", b"x")


def test_a_missing_file_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"no file views/a.json; run 'kdcache verify'"):
        LocalStore(tmp_path).get("views/a.json", max_size=10)


def test_open_files_are_bounded(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for i in range(MAX_OPEN_FILES + 20):
        store.put_new(f"{i}", b"x")
        store.get_range(f"{i}", 0, 1)
    assert len(store._descriptors) == MAX_OPEN_FILES
    assert store.get_range("0", 0, 1) == b"x"


def test_a_store_works_after_a_fork(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom kdcache.store import LocalStore\n"
        "store = LocalStore(sys.argv[1]); store.put_new('a', b'abc'); store.get_range('a', 0, 1)\n"
        "store._lock.acquire()\n"  # as another thread may hold it at the instant of the fork
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    assert store.get_range('a', 1, 2) == b'bc'; store.delete('a'); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    run_python(code, tmp_path, timeout_s=30)
    assert LocalStore(tmp_path).size("a") is None


def test_a_forked_child_that_deletes_first_does_not_hang(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom kdcache.store import LocalStore\n"
        "store = LocalStore(sys.argv[1]); store.put_new('a', b'abc'); store._lock.acquire()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    store.delete('a'); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0"
    )
    run_python(code, tmp_path, timeout_s=30)


def test_a_store_is_opened_by_path_or_file_url_and_no_other(tmp_path: Path) -> None:
    assert open_store(tmp_path).url == open_store(f"file://{tmp_path}").url == str(tmp_path)
    with pytest.raises(UsageError, match="scheme"):
        open_store("s3://bucket/cache")
