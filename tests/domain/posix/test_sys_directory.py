"""Busybox's applets on our files say what they say on the host's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.domain.posix import programs

pytestmark = [
    pytest.mark.skipif(not os.path.exists(programs.BUSYBOX), reason="needs busybox-static as /bin/busybox"),
    pytest.mark.timeout(60),
]
MAKE = "umask 022; mkdir -p a/b/c; echo hello >a/f; ln -s f a/l; ln a/f a/h; ln -s nowhere a/b/x; chmod 711 a/h; mkfifo a/p; "
SCRIPTS = [
    "find a | sort; find a -type l | sort; find a -perm -4000 | sort; find a -type f -links 2 | sort",
    "cp -a a z; find z | sort; stat -c '%n %a %h %F %s' z/f z/l z/p; readlink z/b/x; cmp a/f z/f; diff a/f z/h",
    "mv a/f a/b/g; mv a/b m; ls -1 m; ls -1 a; mv m a/h 2>/dev/null; echo $?; mv a a/b 2>/dev/null; echo $?",
    "tar cf t a; tar tf t | sort; rm -r a; tar xf t; find a | sort; stat -c '%a %h %F' a/h a/l",
    "rmdir a 2>/dev/null; echo $?; rm -rf a; ls -A; mkdir -m 700 q; stat -c %a q; cd q; rmdir ../q; pwd -P; ls",
    "dd if=/dev/zero of=s bs=1 count=1 seek=100000 2>/dev/null; stat -c %s s; truncate -s 5 s; wc -c <s; od -An -tx1 s",
    "sed -i s/hello/bye/ a/f; cat a/f; awk '{ print toupper($0) > \"a/up\" }' a/f; cat a/up; tail -c 3 a/up",
    "(echo through >a/p &); cat a/p; (cat a/p &) ; echo back >a/p; echo x >>a/f; cat a/f; exec 3<a/f; read y <&3; echo $y",
    "touch -d '2020-02-03 04:05:06' a/f; stat -c %Y a/f; touch -r a/f n; [ n -nt a/f ]; echo $?; [ a/f -ef a/h ]; echo $?",
    "ls a/f/ 2>/dev/null; echo $?; cat a/l/; ln -s loop loop; cat loop 2>&1; echo x >/dev/full; du -a a | wc -l; realpath a/b/../l",  # noqa: E501
    "xargs -n 1 echo <a/f; tee a/1 a/2 <a/f; cat a/1 a/2 | sort | uniq -c; grep -c hello a/f a/h; cpio --help >/dev/null 2>&1; echo $?",  # noqa: E501
]


@pytest.fixture(scope="module")
def disk() -> bytes:
    return programs.archive()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_applet_says_the_same(script: str, disk: bytes, tmp_path: Path) -> None:
    applets = tmp_path / "applets"
    applets.mkdir()
    subprocess.run([programs.BUSYBOX, "--install", "-s", str(applets)], check=True)
    work = tmp_path / "w"
    work.mkdir()
    whole = MAKE + script
    command = [programs.BUSYBOX, "sh", "-c", whole]
    host = subprocess.run(command, cwd=work, env={"PATH": str(applets)}, capture_output=True, check=False)
    result = programs.run(["/bin/sh", "-c", "mkdir /w; cd /w; " + whole], disk)
    said = result.output.decode().replace("\r\n", "\n")
    want = (host.stdout + host.stderr).decode().replace(str(work), "/w")
    assert sorted(said.splitlines()) == sorted(want.splitlines())

