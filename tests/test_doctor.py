"""Proves: `stx-patch doctor` says what /proc, /sys and trying tell, and nothing where they do not.

Readers are given made-up roots; what is tried is tried on this machine.
"""

import json
import os
import stat
import types
from pathlib import Path

import pytest
import safetensors.torch
import torch
from patch_helpers import leaves_stock, run_python  # noqa: F401

from stx_patch import _cli, _doctor, _doctor_machine, _machine, _native
from stx_patch._finding import NOTE, OK, PROBLEM, worse

GIB = 1 << 30
NAMES = [
    "stx_patch",
    "safetensors",
    "torch",
    "CUDA",
    "GPUDirect Storage",
    "io_uring",
    "direct I/O",
    "file system",
    "read-ahead",
    "huge pages",
    "page cache",
    "residency",
    "memory",
    "locked memory",
    "libraries",
    "variables",
]


@pytest.fixture
def root(tmp_path):
    """An empty place for /proc and /sys; `write` puts files there."""
    base = tmp_path / "root"
    base.mkdir()

    def write(files):
        for name, text in files.items():
            path = base / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return base

    return write


@pytest.fixture
def cli(capsys):
    """Run a command: (exit status, stdout, stderr)."""

    def run(*arguments):
        status = _cli.main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


# --- the command ---


def test_everything_is_told_here(cli, tmp_path):
    status, text, errors = cli("doctor", tmp_path, "--json")
    findings = json.loads(text)["findings"]
    assert [finding["name"] for finding in findings] == NAMES and errors == ""
    assert {finding["state"] for finding in findings} <= {OK, NOTE, PROBLEM}
    assert status == any(finding["state"] == PROBLEM for finding in findings)
    assert all(finding["seen"] for finding in findings)
    status_of_text, text, _ = cli("doctor", tmp_path)
    assert status_of_text == status
    for finding in findings:
        assert any(line.split()[0] == finding["state"] for line in text.splitlines())
        assert finding["name"] in text
        assert finding["advice"] is None or finding["advice"] in text


def test_a_file_and_the_current_folder_will_do(cli, sample, monkeypatch):
    monkeypatch.chdir(sample.parent)
    assert cli("doctor", sample)[0] == cli("doctor")[0]
    status, text, errors = cli("doctor", sample.parent / "missing")
    assert (status, text) == (2, "") and "missing" in errors and errors.count("\n") == 1


def test_nothing_is_left_behind(cli, tmp_path):
    before = os.stat(tmp_path).st_mtime_ns, os.listdir(tmp_path)
    descriptors = len(os.listdir("/proc/self/fd"))
    cli("doctor", tmp_path)
    assert os.listdir(tmp_path) == before[1]
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_bare_container_is_no_problem(root, tmp_path, monkeypatch):
    """Without /proc and /sys nothing is known, and nothing goes wrong."""
    for name in [name for name in os.environ if name.startswith("STX_PATCH")]:
        monkeypatch.delenv(name)
    findings = {one.name: one for one in _doctor.examine(str(tmp_path), root({}))}
    for name in ("file system", "read-ahead", "huge pages", "memory"):
        assert findings[name].state == NOTE and findings[name].seen.startswith("unknown")
    assert "kernel unknown" in findings["page cache"].seen


def test_without_torch_it_says_so():
    text = run_python(
        """
        import sys
        sys.modules["torch"] = None
        from stx_patch import _cli
        assert _cli.main(["doctor"]) == 1
        """,
        expect_output=None,
    )
    lines = text.splitlines()
    assert any(
        "problem" in line and "torch" in line and "cannot be imported" in line for line in lines
    )
    assert any("CUDA" in line and "unknown without torch" in line for line in lines)


def test_libraries_are_not_imported():
    run_python(
        """
        import sys
        from stx_patch import _cli
        _cli.main(["doctor"])
        assert "torch" in sys.modules
        assert not {"transformers", "diffusers", "accelerate", "safetensors"} & sys.modules.keys()
        """,
        expect_output=None,
    )


def test_without_the_core_it_says_so(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "core", None)
    monkeypatch.setattr(_native, "import_error", "no such library")
    status, text, _ = cli("doctor", tmp_path, "--json")
    findings = {one["name"]: one for one in json.loads(text)["findings"]}
    assert status == 1 and findings["stx_patch"]["state"] == PROBLEM
    assert "without its native core (no such library)" in findings["stx_patch"]["seen"]
    assert findings["io_uring"]["seen"] == "not tried without the native core"


def test_a_problem_outweighs_a_note():
    assert worse(OK, NOTE) == NOTE == worse(NOTE, OK) and worse(PROBLEM, NOTE) == PROBLEM


# --- what is installed ---


def versions(**known):
    return lambda package: known.get(package.replace("-", "_"))


@pytest.mark.parametrize(
    "version, state", [(None, PROBLEM), ("0.5.3", PROBLEM), ("0.6.0", OK), ("0.10.1rc1", OK)]
)
def test_safetensors_has_to_be_new_enough(version, state):
    assert _doctor.check_safetensors(versions(safetensors=version)).state == state


@pytest.mark.parametrize("version, state", [("2.3.1", PROBLEM), ("2.4.0", OK), ("2.13.0+cpu", OK)])
def test_torch_has_to_be_new_enough(version, state):
    found = _doctor.check_torch(types.SimpleNamespace(__version__=version), None)
    assert found.state == state and version in found.seen


def test_libraries_are_listed_with_their_versions():
    seen = _doctor.check_libraries(versions(transformers="5.1", vllm="0.9")).seen
    assert seen == "transformers 5.1, vllm 0.9"
    assert _doctor.check_libraries(versions()).seen == "none of those we know"


class Torch:
    """A torch of some build, on a machine with some devices."""

    def __init__(self, cuda=None, hip=None, devices=(), warning=None, error=None):
        import warnings

        def is_available():
            if warning:
                warnings.warn(warning, stacklevel=1)
            if error:
                raise RuntimeError(error)
            return bool(devices)

        self.version = types.SimpleNamespace(cuda=cuda, hip=hip)
        self.cuda = types.SimpleNamespace(
            is_available=is_available,
            device_count=lambda: len(devices),
            get_device_name=lambda number: devices[number],
        )


def core(engine="uring", refusal=None, runtime=True):
    return types.SimpleNamespace(
        probe_engine=lambda kind: engine,
        engine=lambda: (None, refusal, None),
        device_runtime=lambda: runtime,
    )


DRIVER = {"proc/driver/nvidia/version": "NVRM version: 570.1\n"}
CUDA = {
    "no build, no driver": (Torch(), {}, core(), OK, "built without it"),
    "no build, a driver": (Torch(), DRIVER, core(), NOTE, "a driver is loaded, but torch"),
    "no device": (Torch("12.8"), {}, core(), NOTE, "CUDA 12.8, but finds no device"),
    "a driver that is too old": (
        Torch("12.8", warning="The NVIDIA driver on your system is too old\nmore"),
        DRIVER,
        core(),
        NOTE,
        "finds no device (The NVIDIA driver on your system is too old)",
    ),
    "a driver that fails": (
        Torch("12.8", error="CUDA unknown error"),
        DRIVER,
        core(),
        NOTE,
        "finds no device (CUDA unknown error)",
    ),
    "devices": (Torch("13.0", devices=("H1", "H2")), DRIVER, core(), OK, "2 devices: H1, H2; the"),
    "ROCm": (Torch(hip="6.4", devices=("MI",)), {}, core(), OK, "ROCm 6.4; 1 device: MI"),
    "no runtime": (
        Torch("13.0", devices=("H1",)),
        DRIVER,
        core(runtime=False),
        PROBLEM,
        "go to safetensors",
    ),
    "no core": (Torch("13.0", devices=("H1",)), DRIVER, None, NOTE, "no native core"),
}


@pytest.mark.parametrize("case", CUDA)
def test_cuda(root, case):
    fake, files, a_core, state, expected = CUDA[case]
    found = _doctor.check_cuda(root(files), fake, a_core)
    assert found.state == state and expected.replace("a driver", "an NVIDIA driver") in found.seen


@pytest.mark.parametrize(
    "modules, loaded",
    [(None, "unknown"), ("nvidia_fs 1 0 - Live\n", "loaded"), ("nvidia_fs2 1 0\n", "not loaded")],
)
def test_direct_storage_is_told_and_not_used(root, modules, loaded):
    base = root({} if modules is None else {"proc/modules": modules})
    found = _doctor.check_storage(base, lambda name: name == "cufile", versions())
    assert found.state == OK and found.seen == (
        f"not used by this version; libcufile: found; kernel module nvidia_fs: {loaded}"
    )
    found = _doctor.check_storage(base, lambda name: False, versions(nvidia_cufile_cu12="1.2"))
    assert "not found (and in the package nvidia-cufile-cu12)" in found.seen


VARIABLES = {
    "none": ({"PATH": "/bin", "STX_PATCHES": "1"}, OK, "none of STX_PATCH*", None),
    "valid": ({"STX_PATCH_ENGINE": "threads"}, OK, "STX_PATCH_ENGINE=threads", None),
    "empty": ({"STX_PATCH_READ_AHEAD": " "}, OK, "STX_PATCH_READ_AHEAD=", None),
    "on": ({"STX_PATCH": "1"}, OK, "STX_PATCH=1", None),
    "off": ({"STX_PATCH": "0"}, NOTE, "STX_PATCH=0 (patch() does nothing)", None),
    "no switch": (
        {"STX_PATCH": "off"},
        NOTE,
        "STX_PATCH=off (says nothing)",
        "set STX_PATCH to 1 (on)",
    ),
    "off, in words": ({"STX_PATCH": "false"}, NOTE, "=false (patch() does nothing)", None),
    "filter": ({"STX_PATCH_FILTER": "a.*,b"}, OK, "STX_PATCH_FILTER=a.*,b", None),
    "wrong filter": (
        {"STX_PATCH_FILTER": "a,,b"},
        PROBLEM,
        "STX_PATCH_FILTER=a,,b (STX_PATCH_FILTER: 'a,,b' has an empty pattern in it)",
        "correct or unset STX_PATCH_FILTER",
    ),
    "trace": ({"STX_PATCH_TRACE": "t.json"}, OK, "STX_PATCH_TRACE=t.json", None),
    "trace to nowhere": (
        {"STX_PATCH_TRACE": "/nothing/there/t.json"},
        NOTE,
        "t.json (no file can be written there)",
        "make /nothing/there a folder",
    ),
    "run": ({"STX_PATCH_RUN": "{}"}, OK, "STX_PATCH_RUN={}", None),
    "wrong": (
        {"STX_PATCH_INFLIGHT_BYTES": "0", "STX_PATCH": "0"},
        PROBLEM,
        "STX_PATCH_INFLIGHT_BYTES=0 (inflight_bytes must be more than 0)",
        "correct or unset STX_PATCH_INFLIGHT_BYTES",
    ),
    "unknown": (
        {"STX_PATCH_ENGINES": "uring"},
        NOTE,
        "STX_PATCH_ENGINES=uring (no variable of this version)",
        "unset STX_PATCH_ENGINES",
    ),
}


@pytest.mark.parametrize("case", VARIABLES)
def test_variables(case):
    environ, state, seen, advice = VARIABLES[case]
    found = _doctor.check_variables(environ)
    assert found.state == state and seen in found.seen
    assert (found.advice is None) if advice is None else found.advice.startswith(advice)


# --- the kernel ---


def test_io_uring_is_proven_by_a_ring(root):
    assert _doctor_machine.check_uring(root({}), core()).state == OK
    found = _doctor_machine.check_uring(Path("/"), _native.core)
    assert (found.state == OK) == (_native.core.probe_engine(0) == "uring")


REFUSED = "io_uring: Operation not permitted"
URING = {
    "nothing is known": ({}, REFUSED, [], None),
    "forbidden": (
        {"proc/sys/kernel/io_uring_disabled": "2\n"},
        REFUSED,
        ["kernel.io_uring_disabled is 2"],
        "sysctl",
    ),
    "allowed, and filtered": (
        {"proc/sys/kernel/io_uring_disabled": "0\n", "proc/self/status": "Seccomp:\t2\n"},
        REFUSED,
        ["are filtered (seccomp)"],
        "seccomp profile",
    ),
    "strict mode is no filter": ({"proc/self/status": "Seccomp:\t1\n"}, REFUSED, [], None),
    "not built": (
        {"proc/self/status": "Seccomp:\t2\n"},
        "io_uring: not in this build",
        ["not in this build"],
        None,
    ),
}


@pytest.mark.parametrize("case", URING)
def test_why_io_uring_is_refused(root, case):
    files, refusal, said, advice = URING[case]
    found = _doctor_machine.check_uring(root(files), core("threads", refusal))
    assert found.state == NOTE and refusal in found.seen
    assert all(text in found.seen for text in said)
    assert ("seccomp" in found.seen) == ("filtered" in case or case == "not built")
    assert (found.advice is None) if advice is None else advice in found.advice


def test_what_the_page_cache_is_asked(root):
    check = _doctor_machine.check_page_cache
    assert check("6.8.0-31-generic", None, True).state == OK
    old = check("6.1.0", "Function not implemented", True)
    assert old.state == NOTE and "no cachestat (Function not implemented)" in old.seen
    assert old.advice == "Linux 6.5 or newer has it"
    older = check("5.10.0", "Function not implemented", False)
    assert "no MADV_POPULATE_READ" in older.seen and "5.14" in older.advice
    assert check("6.8.0", "Operation not permitted", True).advice is None  # it is new enough
    base = root({"proc/sys/kernel/osrelease": "6.8.0-31-generic\n"})
    assert _machine.kernel_release(base) == "6.8.0-31-generic"


def test_what_is_tried_agrees_with_the_kernel_here():
    """A kernel that is new enough may still be forbidden to answer; an old one cannot answer."""
    numbers = _machine.version_numbers(os.uname().release)
    assert _machine.try_cachestat() is not None or numbers >= (6, 5)
    assert not _machine.can_populate() or numbers >= (5, 14)


# --- memory ---


def cgroup(limit, used, inactive=0, folder="sys/fs/cgroup/app"):
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 1\ninactive_file {inactive}\n",
    }


MEMINFO = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nFileHugePages: 4 kB\n"}
V2 = {"proc/self/cgroup": "0::/app/job\n"}
V1_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def v1(limit, used, folder):
    files = dict(zip(V1_NAMES, (f"{limit}\n", f"{used}\n"), strict=True))
    return {f"{folder}/{name}": text for name, text in files.items()}


# files -> (limit, used, free), in GiB
MEMORY = {
    "no group": (MEMINFO, None, 0, 8),
    "a group": ({**MEMINFO, **V2, **cgroup(6 * GIB, 2 * GIB)}, 6, 2, 4),
    "what is cached is free": ({**MEMINFO, **V2, **cgroup(6 * GIB, 5 * GIB, 4 * GIB)}, 6, 1, 5),
    "no limit": ({**MEMINFO, **V2, **cgroup("max", GIB)}, None, 0, 8),
    "more than there is": ({**MEMINFO, **V2, **cgroup(64 * GIB, GIB)}, 64, 1, 8),
    "the one above is tighter": (
        {
            **MEMINFO,
            **V2,
            **cgroup(6 * GIB, GIB, folder="sys/fs/cgroup/app/job"),
            **cgroup(5 * GIB, 3 * GIB),
        },
        5,
        3,
        2,
    ),
    "a container's own": (
        {**MEMINFO, "proc/self/cgroup": "0::/\n", **cgroup(2 * GIB, GIB, folder="sys/fs/cgroup")},
        2,
        1,
        1,
    ),
    "version 1": (
        {
            **MEMINFO,
            "proc/self/cgroup": "4:cpu,memory:/app\n0::/\n",
            **v1(3 * GIB, GIB, "sys/fs/cgroup/memory/app"),
            **v1(9223372036854771712, 5 * GIB, "sys/fs/cgroup/memory"),
        },
        3,
        1,
        2,
    ),
    "a group that leads out": (
        {
            **MEMINFO,
            "proc/self/cgroup": "0::/../../app\n",
            **cgroup(4 * GIB, GIB, folder="sys/fs/cgroup/app"),
        },
        4,
        1,
        3,
    ),
    "lines that are none": ({**MEMINFO, "proc/self/cgroup": "\nx\n1:\n"}, None, 0, 8),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory(root, case):
    files, limit, used, free = MEMORY[case]
    found = _machine.memory(root(files))
    assert found.limit == (None if limit is None else limit * GIB)
    assert (found.used, found.free) == (used * GIB, free * GIB)
    told = _doctor_machine.check_memory(found)
    assert told.state == OK and "8.6 GB of 17.2 GB available" in told.seen
    assert ("no limit by a control group" in told.seen) == (limit is None)


def test_little_memory_is_a_note():
    found = _doctor_machine.check_memory(_machine.Memory(8 * GIB, 4 * GIB, GIB, GIB - 1000))
    assert found.state == NOTE and "read ahead up to 250 bytes" in found.seen


def thp(mode):
    return {"sys/kernel/mm/transparent_hugepage/enabled": mode}


@pytest.mark.parametrize(
    "files, state, said",
    [
        (thp("always [madvise] never\n"), OK, "madvise"),
        ({**thp("[always] madvise never"), **MEMINFO}, OK, "holds 4.1 kB of files in them"),
        (thp("always madvise [never]\n"), NOTE, "small pages"),
        ({**thp("[always] x"), "proc/self/status": "THP_enabled:\t0\n"}, NOTE, "prctl"),
        ({}, NOTE, "unknown"),
    ],
)
def test_huge_pages(root, files, state, said):
    found = _doctor_machine.check_huge_pages(_machine.huge_pages(root(files)))
    assert found.state == state and said in found.seen
    assert (found.advice is not None) == ("[never]" in str(files))


def test_locked_memory_is_told(monkeypatch):
    import resource

    limits = {"at most 8.4 MB": (8 << 20, -1), "no limit": (resource.RLIM_INFINITY,) * 2}
    for text, limit in limits.items():
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: limit)
        found = _doctor_machine.check_locked()
        assert found.state == OK and found.seen == f"{text} (RLIMIT_MEMLOCK)"


# --- files ---

MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 22 0:45 / /mnt/models rw,relatime shared:5 master:1 - nfs4 server:/models rw,vers=4.2
32 22 0:46 / /mnt/models/with\\040space rw - fuse.sshfs me@there:/ rw
33 22 0:47 / /mnt/models/covered rw - ext4 /dev/vdb rw
34 33 0:48 / /mnt/models/covered rw - lustre lu:/x rw
broken line
"""


@pytest.mark.parametrize(
    "path, kind, point, state",
    [
        ("/", "ext4", "/", OK),
        ("/mnt/modelstore/x", "ext4", "/", OK),
        ("/mnt/models", "nfs4", "/mnt/models", NOTE),
        ("/mnt/models/llama/model.safetensors", "nfs4", "/mnt/models", NOTE),
        ("/mnt/models/with space/x", "fuse.sshfs", "/mnt/models/with space", NOTE),
        ("/mnt/models/covered/x", "lustre", "/mnt/models/covered", NOTE),
    ],
)
def test_the_file_system_of_a_path(root, path, kind, point, state):
    mount = _machine.find_mount(root({"proc/self/mountinfo": MOUNTS}), path)
    assert (mount.kind, mount.point) == (kind, point)
    found = _doctor_machine.check_file_system(mount)
    assert found.state == state and kind in found.seen
    assert (found.advice is not None) == (state == NOTE)


DEVICE = os.makedev(254, 1)


@pytest.mark.parametrize(
    "name, kib",
    [
        ("sys/dev/block/254:1/queue/read_ahead_kb", 128),
        ("sys/dev/block/queue/read_ahead_kb", 4096),  # what a partition's .. is, without its link
        ("sys/class/bdi/254:1/read_ahead_kb", 0),
    ],
)
def test_the_read_ahead_of_a_device(root, name, kib):
    base = root({name: f"{kib}\n", "sys/dev/block/254:1/size": "1"})
    found = _machine.read_ahead(base, DEVICE)
    assert found.kib == kib and found.path.read_text() == f"{kib}\n"
    told = _doctor_machine.check_read_ahead(found)
    assert told.state == (OK if kib else NOTE) and f"{kib:,} KiB" in told.seen
    assert kib or told.advice == f"echo 128 > {found.path}"


def test_a_direct_read_is_tried_in_a_folder_and_with_a_file(tmp_path, sample):
    in_folder = _machine.try_direct_read(str(tmp_path))
    with_file = _machine.try_direct_read(str(sample))
    assert in_folder.with_what == "a temporary file" and with_file.with_what == sample.name
    assert in_folder.worked == with_file.worked is not None
    empty = tmp_path / "empty"
    empty.touch()
    assert _machine.try_direct_read(str(empty)).worked is None


def test_where_nothing_can_be_written_a_file_is_read(sample, tmp_path, monkeypatch):
    def refuse(**keywords):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(_machine.tempfile, "TemporaryFile", refuse)
    assert _machine.try_direct_read(str(tmp_path)).with_what == sample.name
    (tmp_path / "none").mkdir()
    found = _machine.try_direct_read(str(tmp_path / "none"))
    assert found.worked is None
    told = _doctor_machine.check_direct(found)
    assert told.state == NOTE and "Read-only file system" in told.seen


@pytest.mark.parametrize(
    "error, worked", [(22, False), (13, None), (2, None)], ids=["EINVAL", "EACCES", "ENOENT"]
)
def test_only_a_refusal_is_told_as_one(sample, monkeypatch, error, worked):
    def refuse(path, flags):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(_machine.os, "open", refuse)
    found = _machine.try_direct_read(str(sample))
    assert found.worked is worked and found.why_not == os.strerror(error)
    told = _doctor_machine.check_direct(found)
    assert told.state == NOTE and told.seen.startswith(
        "refused" if worked is False else "not tried"
    )


def test_whose_files_are_told_of(tmp_path, monkeypatch):
    for name in ("a", "b"):
        safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert _doctor_machine.check_residency(str(tmp_path)).seen == "told of 2 files"
    monkeypatch.setattr(_machine.os, "geteuid", lambda: 12345)
    monkeypatch.setattr(
        _machine.os, "access", lambda path, *_, **__: path.endswith("a.safetensors")
    )
    found = _doctor_machine.check_residency(str(tmp_path))
    assert found.state == NOTE and found.seen.startswith("of 1 of 2 files the system does not tell")
    assert str(tmp_path / "b.safetensors") in found.seen
    one = _doctor_machine.check_residency(str(tmp_path / "a.safetensors"))
    assert one.seen == "told of 1 file"
    (tmp_path / "none").mkdir()
    assert _doctor_machine.check_residency(str(tmp_path / "none")).state == OK


def test_what_is_no_text_is_not_told(tmp_path):
    (tmp_path / "odd").write_bytes(b"\xff\xfe12")
    assert _machine.read_text(tmp_path / "odd") is not None
    assert _machine.read_text(tmp_path) is None
    assert _machine.number_after("x: 5\ny: 6\n", "y:") == 6
    assert _machine.number_after("ax: 5\n", "x:") is None
    assert stat.S_ISDIR(os.stat(tmp_path).st_mode)
