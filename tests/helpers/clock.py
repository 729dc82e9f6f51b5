"""A process whose wall clock is off, as on a host without NTP.

    with_clock = clock.shifted(folder, seconds=3600)
    start(..., env=with_clock)            # it and its children read a clock an hour ahead

Only the wall clock: monotonic time, sleeps and waits are those of the machine. (faketime and
libfaketime 0.9.10 break sleeps of Python 3.11.) Needs a C compiler.
"""

import shutil
import subprocess
from pathlib import Path

SOURCE = """\
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t id, struct timespec *found) {
  int failed = (int)syscall(SYS_clock_gettime, id, found);
  if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) found->tv_sec += SHIFT;
  return failed;
}
int gettimeofday(struct timeval *restrict found, void *restrict zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  found->tv_sec = now.tv_sec;
  found->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *found) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (found != NULL) *found = now.tv_sec;
  return now.tv_sec;
}
"""


def compiler() -> str | None:
    """Return a C compiler, or None."""
    return shutil.which("cc") or shutil.which("gcc")


def shifted(folder: Path, seconds: int) -> dict[str, str]:
    """Return environment variables for processes whose clock is ``seconds`` ahead."""
    folder.mkdir(parents=True, exist_ok=True)
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(SOURCE)
    words = ["-O2", "-shared", "-fPIC", f"-DSHIFT={seconds}", str(source), "-o", str(library)]
    subprocess.run([str(compiler()), *words], check=True)
    return {"LD_PRELOAD": str(library)}
