"""Measures the devices of this host before it joins a job, and finds the slow one among many hosts.

    srun --ntasks-per-node=1 python tools/bench_node.py --output=bench/{host}.json
    python tools/bench_node.py --compare=bench --tolerance=0.03 --exclude_file=bad_nodes

Of each device: products of matrices (all devices at work at once, as in training), copies in its own memory, and to
and from the host; of the host: a sum over all of its devices. BLOOM's bad node was 2.5 % slower than the others in such
a measurement and cost the whole run 6 %. Each device also computes a product whose result is known to the last bit.

--compare names what is slower than the median of all by more than --tolerance, and what failed; then the exit code is
3, as it is for a host that failed or computed something wrong itself. tools/launch_slurm.sh reads --exclude_file.
"""

import concurrent.futures
import datetime
import glob
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from bloomjax import config
from bloomjax.errors import BadInput
from bloomjax.files import one_line_errors, write_whole

EXIT_SLOW = 3
# Of each device, and of the host; more is better for all of them.
OF_DEVICE = {
    "matmul_tflops": "products, TFLOP/s",
    "copy_gb_per_second": "copy, GB/s",
    "to_device_gb_per_second": "from host, GB/s",
    "from_device_gb_per_second": "to host, GB/s",
}
OF_HOST = {"all_reduce_gb_per_second": "sum over devices, GB/s"}
RATES = OF_DEVICE | OF_HOST
# A device on the other socket is slower on every host, so these are compared with the same device of other hosts. They
# vary by several percent, and what matters is half of the lanes that does not work.
OF_LINK = {"to_device_gb_per_second", "from_device_gb_per_second"}
_LINK_TOLERANCE = 0.2
_CHECK_SIZE = 2048

_FLAGS = flags.FlagValues()
_SIZE = flags.DEFINE_integer(
    "matrix_size", None, "Rows and columns (8192; on CPUs 512).", flag_values=_FLAGS
)
_COPY_MIB = flags.DEFINE_integer(
    "copy_mib", None, "Size of what is copied and summed (512; on CPUs 16).", flag_values=_FLAGS
)
_REPEATS = flags.DEFINE_integer(
    "repeats", 20, "Times that each is measured; the median counts.", flag_values=_FLAGS
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Write the JSON here; {host} becomes the host.", flag_values=_FLAGS
)
_JSON = flags.DEFINE_bool("json", False, "One JSON object on stdout.", flag_values=_FLAGS)
_COMPARE = flags.DEFINE_list(
    "compare", None, "Files of --output, their folders, or patterns; measures nothing.", flag_values=_FLAGS
)  # fmt: skip
_TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.05, "Slow is what misses the median by more than this share.", flag_values=_FLAGS
)
_EXCLUDE_FILE = flags.DEFINE_string(
    "exclude_file", None, "With --compare: append the hosts found to this list.", flag_values=_FLAGS
)


# ---- measuring ----


def this_host() -> str:
    """As Slurm calls it, which need not be what the system does."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of one call of `run`, whose result is waited for; two calls before do not count."""
    import jax

    found = []
    for number in range(-2, repeats):
        start = time.monotonic()
        jax.block_until_ready(run())
        if number >= 0:
            found.append(time.monotonic() - start)
    return statistics.median(found)


def matmul_rates(devices: Sequence[Any], size: int, repeats: int) -> list[float]:
    """TFLOP/s of each device while all of them work: they share power and cooling."""
    from bloomjax.stragglers import MatrixProducts

    def measure(device: Any) -> float:
        program = MatrixProducts(device, size, 1 if device.platform == "cpu" else 16)
        program.seconds()  # compiles
        seconds = statistics.median(program.seconds() for _ in range(repeats))
        return 2 * size**3 / seconds / 1e12

    with concurrent.futures.ThreadPoolExecutor(len(devices)) as threads:
        return list(threads.map(measure, devices))


def copy_rates(device: Any, num_bytes: int, repeats: int) -> dict[str, float]:
    """GB/s: read and written in the device's own memory, and from and to the host."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    on_host = np.arange(num_bytes // 4, dtype=np.float32)
    on_device = jax.device_put(on_host, device)
    add = jax.jit(lambda x: x + jnp.float32(1))  # a plain copy could be left out
    copies = median_seconds(lambda: add(on_device), repeats)
    up = median_seconds(lambda: jax.device_put(on_host, device, may_alias=False), repeats)
    down = []
    for _ in range(repeats):
        fresh = jax.block_until_ready(add(on_device))  # an array keeps what was fetched of it
        start = time.monotonic()
        np.array(fresh)
        down.append(time.monotonic() - start)
    return {
        "copy_gb_per_second": 2 * num_bytes / copies / 1e9,
        "to_device_gb_per_second": num_bytes / up / 1e9,
        "from_device_gb_per_second": num_bytes / statistics.median(down) / 1e9,
    }


def all_reduce_rate(devices: Sequence[Any], num_bytes: int, repeats: int) -> float | None:
    """GB/s of a sum of `num_bytes` from each of these devices; None of one device.

    Bus bandwidth, 2 (n - 1) / n times bytes over seconds, as NVIDIA's nccl-tests define it (PERFORMANCE.md there).
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    if len(devices) == 1:
        return None
    mesh = Mesh(np.array(devices), ("all",))
    spread = PartitionSpec("all")
    shape = (len(devices), num_bytes // 4)
    ones = jax.jit(
        lambda: jnp.ones(shape, jnp.float32), out_shardings=NamedSharding(mesh, spread)
    )()
    add_up = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=spread, out_specs=PartitionSpec()
        )
    )
    seconds = median_seconds(lambda: add_up(ones), repeats)
    return 2 * (len(devices) - 1) / len(devices) * num_bytes / seconds / 1e9


def computes_right(device: Any, size: int = _CHECK_SIZE) -> bool:
    """Whether a product of matrices of -1, 0 and 1 is right in every bit; all of its sums are exact in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(size)
    a, b = rng.integers(-1, 2, (2, size, size), dtype=np.int8)
    left, right = rng.integers(0, 2**16, (2, size), dtype=np.int64)

    def check(a, b, left, right):
        product = jnp.matmul(
            a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32
        )
        exact = product.astype(jnp.int32).astype(jnp.uint32)  # sums are modulo 2**32 from here on
        return jnp.sum(exact * left[:, None] * right[None, :], dtype=jnp.uint32)

    arguments = (a, b, left.astype(np.uint32), right.astype(np.uint32))
    found = int(jax.jit(check)(*jax.device_put(arguments, device)))
    return found == int(left @ (a.astype(np.int64) @ (b.astype(np.int64) @ right))) % 2**32


def measure() -> dict[str, Any]:
    """All of this host: what --json prints. What a device refuses stands in `failed`."""
    import jax

    record: dict[str, Any] = {
        "host": this_host(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "failed": [],
    }
    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        return record | {"failed": [f"no devices: {_one_line(error)}"], "devices": []}
    is_cpu = devices[0].platform == "cpu"
    size = _SIZE.value or (512 if is_cpu else 8192)
    num_bytes = (_COPY_MIB.value or (16 if is_cpu else 512)) * 2**20
    record |= {
        "device_kind": devices[0].device_kind,
        "settings": {"matrix_size": size, "copy_bytes": num_bytes, "num_devices": len(devices)},
        "jax": jax.__version__,
        "devices": [{"device": device.id} for device in devices],
    }

    def attempt(what: str, function: Callable[[], Any]) -> Any:
        try:
            return function()
        except RuntimeError as error:  # jax's, too
            record["failed"].append(f"{what}: {_one_line(error)}")
            return None

    for device, found in zip(devices, record["devices"], strict=True):
        is_right = attempt(f"device {device.id}", lambda device=device: computes_right(device))
        if is_right is False:
            record["failed"].append(f"device {device.id}: a product of matrices is wrong")
        rates = lambda device=device: copy_rates(device, num_bytes, _REPEATS.value)  # noqa: E731
        found |= attempt(f"device {device.id}, copies", rates) or {}
    rates = attempt("products", lambda: matmul_rates(devices, size, _REPEATS.value))
    for found, rate in zip(record["devices"], rates or [], strict=False):
        found["matmul_tflops"] = rate
    record["all_reduce_gb_per_second"] = attempt(
        "sum over devices", lambda: all_reduce_rate(devices, num_bytes, _REPEATS.value)
    )
    return record


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# ---- comparing ----


def read(places: Sequence[str]) -> list[dict[str, Any]]:
    """The newest record of each host. BadInput where there is none, and for a file that holds something else."""
    paths: list[Path] = []
    for place in places:
        path = Path(place)
        found = (
            sorted(path.glob("*.json")) if path.is_dir() else [*map(Path, sorted(glob.glob(place)))]
        )
        if not found:
            kind = "no file *.json in" if path.is_dir() else "there is no"
            raise BadInput(f"--compare={place}: {kind} {path}")
        paths += found
    newest: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            record = json.loads(path.read_bytes())
            host, when = record["host"], record["time"]
            complete = {"devices", "failed"} <= record.keys()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            complete, host, when = False, "", ""
        if not complete:
            raise BadInput(
                f"--compare: {path} is no file that bench_node --output has written whole"
            )
        if host not in newest or newest[host]["time"] < when:
            newest[host] = record
    return [newest[host] for host in sorted(newest)]


def values(record: dict[str, Any]) -> Iterator[tuple[int | None, str, str, float]]:
    """Of each rate in a record: device (None: the host), name, with whom it is compared, and value."""
    for position, found in enumerate(record["devices"]):
        for name in OF_DEVICE:
            peers = f"{name} {position}" if name in OF_LINK else name
            if found.get(name) is not None:
                yield found["device"], name, peers, found[name]
    yield from (
        (None, name, name, record[name]) for name in OF_HOST if record.get(name) is not None
    )


def compare(records: Sequence[dict[str, Any]], tolerance: float) -> list[dict[str, Any]]:
    """Every rate of every host with its share of the median of its kind, the slowest first.

    `is_slow`: by more than `tolerance` (0.2 at least of links to the host). Of an even number the median is the higher
    one in the middle, so that of two hosts the slow one is named. BadInput for measurements that cannot be compared.
    """
    whole = [record for record in records if "settings" in record]
    for record in whole[1:]:
        for name in ("device_kind", "settings"):
            if record[name] != whole[0][name]:
                raise BadInput(
                    f"--compare: {whole[0]['host']} has {name} {whole[0][name]}, {record['host']} has "
                    f"{record[name]}; only like can be compared"
                )
    rates: dict[str, list[float]] = {}
    for record in whole:
        for _, _, peers, value in values(record):
            rates.setdefault(peers, []).append(value)
    medians = {peers: statistics.median_high(found) for peers, found in rates.items()}
    rows = []
    for record in whole:
        for device, name, peers, value in values(record):
            share = value / medians[peers]
            allowed = max(tolerance, _LINK_TOLERANCE) if name in OF_LINK else tolerance
            rows.append(
                {
                    "host": record["host"], "device": device, "rate": name, "value": value,
                    "median": medians[peers], "share": share, "is_slow": not share >= 1 - allowed,
                }
            )  # fmt: skip
    return sorted(rows, key=lambda row: row["share"])


def reasons(
    records: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> dict[str, list[str]]:
    """What is wrong with each host, by host; of a rate the slowest device."""
    found: dict[str, list[str]] = {record["host"]: list(record["failed"]) for record in records}
    named = set()
    for row in rows:
        if row["is_slow"] and (row["host"], row["rate"]) not in named:
            named.add((row["host"], row["rate"]))
            device = "" if row["device"] is None else f"device {row['device']}, "
            found[row["host"]].append(
                f"{device}{RATES[row['rate']]}: {row['value']:.4g}, {1 - row['share']:.1%} below {row['median']:.4g}"
            )
    return {host: lines for host, lines in found.items() if lines}


def exclude(path: Path, hosts: dict[str, list[str]]) -> list[str]:
    """Appends those hosts to the list that are not in it by their own name, each with its reason. Returns them."""
    with one_line_errors(f"--exclude_file={path}"):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    listed = {
        name
        for line in before.splitlines()
        for name in line.split("#")[0].replace(",", " ").split()
    }
    new = [host for host in hosts if host not in listed]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [f"{host}  # {today} bench_node: {'; '.join(hosts[host])}\n" for host in new]
    if lines:
        start = "\n" if before and not before.endswith("\n") else ""
        with one_line_errors(f"--exclude_file={path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(start + "".join(lines))
    return new


# ---- printing ----


def table(record: dict[str, Any]) -> Iterator[str]:
    """A line a device, for a person."""
    if not record["devices"]:
        return
    settings = record["settings"]
    yield (
        f"{record['host']}: {settings['num_devices']} x {record['device_kind']}, matrices of "
        f"{settings['matrix_size']}, copies of {settings['copy_bytes'] // 2**20} MiB"
    )
    yield f"{'device':>8}" + "".join(f"{title:>20}" for title in OF_DEVICE.values())
    for found in record["devices"]:
        cells = (f"{found[name]:20.4g}" if name in found else f"{'-':>20}" for name in OF_DEVICE)
        yield f"{found['device']:>8}" + "".join(cells)
    for name, title in OF_HOST.items():
        if record.get(name) is not None:
            yield f"{title}: {record[name]:.4g}"


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line a rate: the median and the slowest of all."""
    yield f"{'':<24}{'median':>12}{'slowest':>12}"
    for name, title in RATES.items():
        slowest = next((row for row in rows if row["rate"] == name), None)
        if slowest:
            device = "" if slowest["device"] is None else f", device {slowest['device']}"
            yield (
                f"{title:<24}{slowest['median']:12.4g}{slowest['value']:12.4g}  {slowest['share'] - 1:+.1%}  "
                f"{slowest['host']}{device}"
            )


# ---- the two commands ----


def bench_this_host() -> int:
    """Measures, prints and writes; 3 if something failed."""
    if _EXCLUDE_FILE.value is not None:
        raise BadInput("--exclude_file takes what --compare finds; this host alone has no median")
    output = None
    if _OUTPUT.value is not None:
        output = Path(_OUTPUT.value.replace("{host}", this_host()))
        with one_line_errors(f"--output={output}"):
            output.parent.mkdir(parents=True, exist_ok=True)
        if output.is_dir():
            raise BadInput(
                f"--output={output} is a folder; name a file in it, as {output}/{{host}}.json"
            )
    record = measure()
    if output is not None:
        with one_line_errors(f"--output={output}"):
            write_whole(output, json.dumps(record, indent=1).encode() + b"\n")
    print(json.dumps(record) if _JSON.value else "\n".join(table(record)), flush=True)
    for line in record["failed"]:
        print(f"bench_node: {record['host']}: {line}", file=sys.stderr)
    return EXIT_SLOW if record["failed"] else 0


def compare_hosts(places: Sequence[str]) -> int:
    """Compares, prints and appends; 3 if a host was found."""
    if not 0 < _TOLERANCE.value < 1:
        raise BadInput(f"--tolerance={_TOLERANCE.value} must be between 0 and 1")
    if _OUTPUT.value is not None:
        raise BadInput("--output is of a measurement, --compare measures nothing; give one of them")
    records = read(places)
    rows = compare(records, _TOLERANCE.value)
    found = reasons(records, rows)
    added = exclude(Path(_EXCLUDE_FILE.value), found) if _EXCLUDE_FILE.value and found else []
    if _JSON.value:
        hosts = [record["host"] for record in records]
        print(json.dumps({"hosts": hosts, "found": found, "added": added, "rates": rows}))
    else:
        print(f"{len(records)} hosts, tolerance {_TOLERANCE.value:.1%}")
        print("\n".join(summary(rows)))
        for host, lines in found.items():
            print(f"{host}: {'; '.join(lines)}")
        if added:
            print(f"{_EXCLUDE_FILE.value}: added {', '.join(added)}")
    return EXIT_SLOW if found else 0


def bench_node() -> int:
    """What the flags ask for."""
    for flag in (_SIZE, _COPY_MIB, _REPEATS):
        if flag.value is not None and flag.value < 1:
            raise BadInput(f"--{flag.name}={flag.value} must be at least 1")
    return bench_this_host() if _COMPARE.value is None else compare_hosts(_COMPARE.value)


def main(argv: list[str] | None = None) -> None:
    """The command, also with the arguments of a test."""
    config.call(bench_node, argv, _FLAGS)


if __name__ == "__main__":
    main()
