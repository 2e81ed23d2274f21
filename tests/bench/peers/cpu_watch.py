"""Watches what share of the cores other processes take, and what the cores can do."""

import os
import resource
import time

import figures

# Those that one of the engines has kernels for.
VECTOR_FLAGS = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl",
                "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


def busy_ticks(stat, cores):
    """Ticks that `cores`, a set of numbers, were not idle, from the text of /proc/stat."""
    busy = 0
    for line in stat.splitlines():
        label, *ticks = line.split()
        if label.startswith("cpu") and label[3:].isdigit() and int(label[3:]) in cores:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, ticks[:8])
            busy += user + nice + system + irq + softirq + steal
    return busy


def vector_flags(cpuinfo):
    """The VECTOR_FLAGS of the first core in the text of /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        if line.startswith("flags"):
            flags = set(line.split(":", 1)[1].split())
            return [flag for flag in VECTOR_FLAGS if flag in flags]
    return []


def _read(path):
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()


def machine_flags():
    return " ".join(vector_flags(_read("/proc/cpuinfo")))


def _own_seconds():
    return sum(usage.ru_utime + usage.ru_stime for usage in
               (resource.getrusage(resource.RUSAGE_SELF),
                resource.getrusage(resource.RUSAGE_CHILDREN)))


class CpuWatch:
    """`with CpuWatch() as watch: ...`, then watch.others. Children must have ended by then."""

    def __init__(self):
        self.others = 0.0
        self._cores = os.sched_getaffinity(0)

    def _sample(self):
        return busy_ticks(_read("/proc/stat"), self._cores), _own_seconds(), time.monotonic()

    def __enter__(self):
        self._begin = self._sample()
        return self

    def __exit__(self, *_):
        busy, own, wall = (end - begin for end, begin in zip(self._sample(), self._begin))
        self.others = figures.others_share(busy / os.sysconf("SC_CLK_TCK"), own,
                                           max(wall, 1e-3), len(self._cores))
